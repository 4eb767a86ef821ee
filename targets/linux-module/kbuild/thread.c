// SPDX-License-Identifier: MIT OR GPL-2.0
/* Kernel threads, park and unpark, CPUs, time, and how a domain ends. */
#include "shim.h"
#include <linux/completion.h>
#include <linux/cpumask.h>
#include <linux/hash.h>
#include <linux/hrtimer.h>
#include <linux/kthread.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/sched.h>
#include <linux/sched/stat.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/timekeeping.h>
#include <linux/vmalloc.h>
#include <asm/irq_stack.h>

/*
 * Rust runs on a stack of its own: the 16 KiB that Linux gives to a thread are for the block and network layers below
 * us. vmalloc leaves an unmapped page on both sides.
 */
#define AK_STACK_BYTES (128 << 10)
#define AK_WAIT_STEP (HZ / 2)	/* waits look at ak_dead this often, and never long enough for the hung-task watchdog */

atomic_t ak_dead;

/* ---- threads ---- */

struct ak_thread {
	struct list_head node;
	u64 id;			/* 0: the first thread */
	struct task_struct *task;
	struct completion done;
	void *entry;
	void *stack;
	unsigned long kernel_sp;	/* where to go on with the kernel's stack at an early end */
	bool joined;
};

static LIST_HEAD(ak_threads);
static DEFINE_MUTEX(ak_threads_lock);
static u64 ak_last_id;

static void ak_wake_all(void);

static void ak_thread_run(struct ak_thread *t)
{
	if (t->id)
		ak_rust_thread(t->entry);
	else
		ak_rust_main();
}

#define AK_RUN_ARGS , [arg1] "r" (t)

static noinline void ak_on_own_stack(struct ak_thread *t)
{
	t->kernel_sp = (unsigned long)__builtin_frame_address(0);
	call_on_stack(t->stack + AK_STACK_BYTES - 16, ak_thread_run, ASM_CALL_ARG1, AK_RUN_ARGS);
}

static int ak_thread_main(void *data)
{
	struct ak_thread *t = data;

	ak_on_own_stack(t);
	/* Completes in the kernel's text, so that nobody is left in ours when the joiner goes on. */
	kthread_complete_and_exit(&t->done, 0);
}

static void ak_thread_leave(struct ak_thread *t)
{
	kthread_complete_and_exit(&t->done, 0);
}

static void __noreturn ak_quit(void)
{
	struct ak_thread *t;

	if (!in_task() || !(current->flags & PF_KTHREAD) || kthread_func(current) != ak_thread_main)
		panic("anykernel: the domain ended in a context that cannot end");
	t = kthread_data(current);
	__set_current_state(TASK_RUNNING);
	/* The joiner frees our stack, so the last steps are made on the kernel's. What was on it is not needed any more. */
	call_on_stack(((t->kernel_sp - 512) & ~15UL), ak_thread_leave, ASM_CALL_ARG1, AK_RUN_ARGS);
	BUG();
}

void ak_thread_quit(void)
{
	/* Asked again so that objtool believes that this may return: 6.1 and 6.12 disagree on how to tell it otherwise. */
	if (atomic_read(&ak_dead))
		ak_quit();
}

static int ak_thread_make(struct ak_thread *t, u32 cpu, const char *name, size_t name_len)
{
	int error = -ENOMEM;

	init_completion(&t->done);
	t->stack = vmalloc(AK_STACK_BYTES);
	if (!t->stack)
		return -ENOMEM;
	t->task = kthread_create(ak_thread_main, t, "%.*s", (int)min_t(size_t, name_len, TASK_COMM_LEN - 1), name);
	if (IS_ERR(t->task)) {
		error = PTR_ERR(t->task);
		vfree(t->stack);
		return error;
	}
	if (cpu != AK_ANY_CPU)
		kthread_bind(t->task, cpu);
	get_task_struct(t->task);
	return 0;
}

static void ak_thread_free(struct ak_thread *t)
{
	put_task_struct(t->task);
	vfree(t->stack);
	kfree(t);
}

/* ---- CPUs: the domain's are those online at load, numbered from 0 ---- */

static u32 ak_cpus;
static u32 *ak_cpu_of;	/* domain CPU to Linux CPU */
static u32 *ak_index_of;	/* Linux CPU to domain CPU */

u32 ak_cpu_count(void)
{
	return ak_cpus;
}

u32 ak_current_cpu(void)
{
	return ak_index_of[raw_smp_processor_id()];
}

static int ak_cpus_init(void)
{
	int cpu;

	ak_cpu_of = kcalloc(nr_cpu_ids, sizeof(u32), GFP_KERNEL);
	ak_index_of = kcalloc(nr_cpu_ids, sizeof(u32), GFP_KERNEL);
	if (!ak_cpu_of || !ak_index_of)
		return -ENOMEM;
	for_each_online_cpu(cpu) {
		if (ak_cpus == 4096)
			break;
		ak_index_of[cpu] = ak_cpus;
		ak_cpu_of[ak_cpus++] = cpu;
	}
	return 0;
}

int ak_thread_spawn(const char *name, size_t name_len, u32 cpu, void *entry, u64 *id)
{
	struct ak_thread *t;
	int error;

	ak_check_alive();
	if (cpu != AK_ANY_CPU && cpu >= ak_cpus)
		return -EINVAL;
	t = kzalloc(sizeof(*t), GFP_KERNEL);
	if (!t)
		return -ENOMEM;
	t->entry = entry;
	error = ak_thread_make(t, cpu == AK_ANY_CPU ? cpu : ak_cpu_of[cpu], name, name_len);
	if (error) {
		kfree(t);
		return error;
	}
	mutex_lock(&ak_threads_lock);
	*id = t->id = ++ak_last_id;
	list_add_tail(&t->node, &ak_threads);
	mutex_unlock(&ak_threads_lock);
	wake_up_process(t->task);
	return 0;
}

int ak_thread_join(u64 id)
{
	struct ak_thread *t, *found = NULL;

	ak_check_alive();
	mutex_lock(&ak_threads_lock);
	list_for_each_entry(t, &ak_threads, node)
		if (t->id == id && t->id && !t->joined && t->task != current) {
			t->joined = true;
			found = t;
			break;
		}
	mutex_unlock(&ak_threads_lock);
	if (!found)
		return -ENOENT;
	while (!wait_for_completion_timeout(&found->done, AK_WAIT_STEP))
		ak_check_alive();
	mutex_lock(&ak_threads_lock);
	list_del(&found->node);
	mutex_unlock(&ak_threads_lock);
	ak_thread_free(found);
	return 0;
}

int ak_threads_start(void)
{
	struct ak_thread *t;
	int error = ak_cpus_init();

	if (error)
		goto fail;
	t = kzalloc(sizeof(*t), GFP_KERNEL);
	error = -ENOMEM;
	if (!t)
		goto fail;
	error = ak_thread_make(t, AK_ANY_CPU, "ak-main", 7);
	if (error) {
		kfree(t);
		goto fail;
	}
	list_add_tail(&t->node, &ak_threads);
	wake_up_process(t->task);
	return 0;
fail:
	kfree(ak_cpu_of);
	kfree(ak_index_of);
	return error;
}

void ak_threads_end(void)
{
	struct ak_thread *t, *next;
	unsigned int left = 0;

	/* The first thread joins the others, unless the domain died. */
	t = list_first_entry(&ak_threads, struct ak_thread, node);
	while (!wait_for_completion_timeout(&t->done, AK_WAIT_STEP))
		;
	list_del(&t->node);
	ak_thread_free(t);
	if (!list_empty(&ak_threads) && !atomic_read(&ak_dead)) {
		list_for_each_entry(t, &ak_threads, node)
			left++;
		pr_warn("left behind: %u threads\n", left);
		/* They end at their next call, because the text they run is about to go. */
		atomic_set(&ak_dead, AK_DEAD);
		ak_wake_all();
	}
	list_for_each_entry_safe(t, next, &ak_threads, node) {
		while (!wait_for_completion_timeout(&t->done, AK_WAIT_STEP))
			;
		list_del(&t->node);
		ak_thread_free(t);
	}
	kfree(ak_cpu_of);
	kfree(ak_index_of);
}

void ak_yield(void)
{
	ktime_t pause = 10 * NSEC_PER_USEC;

	ak_check_alive();
	if (single_task_running()) {
		cond_resched();
		return;
	}
	/* yield() lets the fair scheduler choose us again at once, and EEVDF does so for whole slices. */
	set_current_state(TASK_IDLE);
	schedule_hrtimeout_range(&pause, 0, HRTIMER_MODE_REL);
}

/* ---- park and unpark ---- */

#define AK_BUCKET_BITS 8

struct ak_bucket {
	spinlock_t lock;
	struct list_head waiters;
} ____cacheline_aligned_in_smp;

struct ak_waiter {
	struct list_head node;
	const u32 *word;
	struct task_struct *task;
	bool woken;
};

static struct ak_bucket ak_buckets[1 << AK_BUCKET_BITS];

void ak_park_init(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(ak_buckets); i++) {
		spin_lock_init(&ak_buckets[i].lock);
		INIT_LIST_HEAD(&ak_buckets[i].waiters);
	}
}

static struct ak_bucket *ak_bucket(const u32 *word)
{
	return &ak_buckets[hash_ptr(word, AK_BUCKET_BITS)];
}

int ak_park(const u32 *word, u32 expected, u64 deadline_ns)
{
	struct ak_bucket *bucket = ak_bucket(word);
	struct ak_waiter waiter = { .word = word, .task = current };
	ktime_t deadline = min_t(u64, deadline_ns, KTIME_MAX);
	bool timed_out = false;
	unsigned long flags;

	ak_check_alive();
	spin_lock_irqsave(&bucket->lock, flags);
	/* A waker stores, then takes this lock: either we see its value, or it sees us. */
	if (READ_ONCE(*word) != expected) {
		spin_unlock_irqrestore(&bucket->lock, flags);
		return AK_CHANGED;
	}
	list_add_tail(&waiter.node, &bucket->waiters);
	spin_unlock_irqrestore(&bucket->lock, flags);

	for (;;) {
		set_current_state(TASK_IDLE);
		if (READ_ONCE(waiter.woken) || timed_out || atomic_read(&ak_dead))
			break;
		if (deadline_ns == AK_NO_DEADLINE)
			schedule();
		else
			timed_out = !schedule_hrtimeout_range(&deadline, 0, HRTIMER_MODE_ABS);
	}
	__set_current_state(TASK_RUNNING);

	/* The waker holds this lock until it is done with us. */
	spin_lock_irqsave(&bucket->lock, flags);
	if (!waiter.woken)
		list_del(&waiter.node);
	spin_unlock_irqrestore(&bucket->lock, flags);
	ak_check_alive();
	return waiter.woken ? AK_WOKEN : AK_TIMED_OUT;
}

static u32 ak_wake(struct ak_bucket *bucket, const u32 *word, u32 count)
{
	struct ak_waiter *waiter, *next;
	unsigned long flags;
	u32 woken = 0;

	spin_lock_irqsave(&bucket->lock, flags);
	list_for_each_entry_safe(waiter, next, &bucket->waiters, node) {
		if (woken == count)
			break;
		if (word && waiter->word != word)
			continue;
		list_del(&waiter->node);
		WRITE_ONCE(waiter->woken, true);
		wake_up_process(waiter->task);
		woken++;
	}
	spin_unlock_irqrestore(&bucket->lock, flags);
	return woken;
}

u32 ak_unpark(const u32 *word, u32 count)
{
	return ak_wake(ak_bucket(word), word, count);
}

static void ak_wake_all(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(ak_buckets); i++)
		ak_wake(&ak_buckets[i], NULL, U32_MAX);
}

void ak_exit(u32 status)
{
	/* The first one says how. */
	if (!atomic_cmpxchg(&ak_dead, 0, AK_DEAD | (status & 0xff)))
		pr_err("the domain ended with status %u; rmmod " KBUILD_MODNAME " removes what is left of it\n", status);
	ak_stopped_early();
	ak_wake_all();
	ak_quit();
}

/* ---- time ---- */

u64 ak_monotonic_ns(void)
{
	return ktime_get_ns();
}

u64 ak_realtime_ns(void)
{
	return ktime_get_real_ns();
}
