//! Which thread runs: a run queue per CPU, round robin by time slices, threads that were woken first.
//!
//! A thread that may run anywhere is woken on the CPU where it last ran if that is idle, else on any idle CPU, else it waits
//! where it was; a CPU that runs out of work takes waiting threads from the others.
//!
//! A thread is put into a run queue only once it is off its CPU: what ran before is dealt with by what runs next
//! ([`after_switch`]).

use super::list::{List, QUEUE_LINK};
use super::{EXITING, PARKED, PARKING, RUNNABLE, Thread, WOKEN, park, switch_stacks};
use crate::cpu::{self, regs};
use crate::interrupts::{RESCHEDULE_VECTOR, apic};
use crate::sync::{InterruptsOff, SpinLock};
use crate::time::{monotonic_ns, timer};
use core::cell::Cell;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// How long a thread runs before others of its kind get their turn.
const SLICE_NS: u64 = 5_000_000;
/// How long it runs before a thread that was woken gets its turn. Most threads sleep again before that, and then the timer
/// was set for nothing: shorter times cost more timer interrupts than they save waiting.
const WAKE_SLICE_NS: u64 = 2_000_000;
/// So many woken threads run in a row before one that used up its slice does.
const WOKEN_IN_A_ROW: u32 = 16;

struct Queue {
    woken: List<QUEUE_LINK>,
    others: List<QUEUE_LINK>,
    in_a_row: u32,
}

/// The scheduler of one CPU.
pub(crate) struct Local {
    queue: SpinLock<Queue>,
    /// Threads in the queue, to be looked at without the lock.
    waiting: AtomicU32,
    /// The thread that runs when there is nothing to do. Set once.
    idle: Cell<Option<NonNull<Thread>>>,
    /// When the running thread got the CPU. Used by this CPU with interrupts off, as the next.
    since_ns: Cell<u64>,
}

/// CPUs that halt, one bit each.
static IDLE: AtomicU64 = AtomicU64::new(0);

impl Local {
    pub(crate) const fn new() -> Self {
        Self {
            queue: SpinLock::new(Queue { woken: List::new(), others: List::new(), in_a_row: 0 }),
            waiting: AtomicU32::new(0),
            idle: Cell::new(None),
            since_ns: Cell::new(0),
        }
    }

    /// Gives the CPU its idle thread. Once, before it runs threads.
    pub(crate) fn set_idle(&self, thread: NonNull<Thread>) {
        self.idle.set(Some(thread));
    }

    /// Takes a thread out of the queue; with `any_cpu`, only one that is not bound to this CPU.
    fn take(&self, any_cpu: bool) -> Option<NonNull<Thread>> {
        if self.waiting.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let mut queue = if any_cpu { self.queue.try_lock()? } else { self.queue.lock() };
        let woken_first = queue.in_a_row < WOKEN_IN_A_ROW || queue.others.is_empty();
        let free = |thread: NonNull<Thread>| {
            // SAFETY: members of the queue live, and `pinned` never changes.
            !any_cpu || !unsafe { thread.as_ref() }.pinned
        };
        let first = |list: &List<QUEUE_LINK>| {
            let mut at = list.first();
            while let Some(thread) = at
                && !free(thread)
            {
                // SAFETY: `thread` is in the list.
                at = unsafe { list.next(thread) };
            }
            at
        };
        let (woken, other) = (first(&queue.woken), first(&queue.others));
        let thread = if woken_first { woken.or(other) } else { other.or(woken) }?;
        // SAFETY: it was found in the list that it is removed from.
        unsafe {
            if Some(thread) == woken {
                queue.woken.remove(thread);
                queue.in_a_row += 1;
            } else {
                queue.others.remove(thread);
                queue.in_a_row = 0;
            }
        }
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        Some(thread)
    }
}

/// The CPU with the fewest waiting threads, idle ones first.
pub(crate) fn least_loaded() -> u32 {
    let idle = IDLE.load(Ordering::Relaxed);
    if idle != 0 {
        return idle.trailing_zeros();
    }
    (0..cpu::count()).min_by_key(|cpu| cpu::get(*cpu).scheduler.waiting.load(Ordering::Relaxed)).unwrap_or(0)
}

/// Puts a thread into a run queue and tells the CPU.
///
/// # Safety
/// The thread lives, is off every CPU and in no list.
unsafe fn enqueue(thread: NonNull<Thread>, woken: bool) {
    // SAFETY: by the caller.
    let fields = unsafe { thread.as_ref() };
    let _off = InterruptsOff::new();
    let here = cpu::this();
    let mut target = fields.cpu.load(Ordering::Relaxed);
    let idle = IDLE.load(Ordering::SeqCst);
    if !fields.pinned && idle != 0 && idle & 1 << target == 0 {
        target = idle.trailing_zeros();
        fields.cpu.store(target, Ordering::Relaxed);
    }
    fields.woken.set(woken);
    let pinned = fields.pinned;
    let there = cpu::get(target);
    let first = {
        let mut queue = there.scheduler.queue.lock();
        // SAFETY: by the caller.
        unsafe { if woken { queue.woken.push(thread) } else { queue.others.push(thread) } }
        there.scheduler.waiting.fetch_add(1, Ordering::SeqCst) == 0
    };
    if target == here.id() {
        reconsider(monotonic_ns());
    } else if IDLE.fetch_and(!(1 << target), Ordering::SeqCst) & 1 << target != 0 || first || woken {
        apic::send(there.apic_id.get(), RESCHEDULE_VECTOR);
    }
    // A CPU that went idle after we looked, and before the thread could be seen in the queue, comes and takes it.
    let late = if pinned || idle != 0 { 0 } else { IDLE.load(Ordering::SeqCst) & !(1 << target) };
    if late != 0 {
        let taker = late.trailing_zeros();
        if IDLE.fetch_and(!(1 << taker), Ordering::SeqCst) & 1 << taker != 0 {
            apic::send(cpu::get(taker).apic_id.get(), RESCHEDULE_VECTOR);
        }
    }
}

/// A thread that was just made gets its turn.
///
/// # Safety
/// As [`enqueue`].
pub(crate) unsafe fn make_ready(thread: NonNull<Thread>) {
    // SAFETY: by the caller.
    unsafe { enqueue(thread, true) };
    preempt_point();
}

/// Wakes a thread that was parked: with interrupts off, its bucket locked, and out of all lists.
///
/// # Safety
/// The thread lives.
pub(crate) unsafe fn wake(thread: NonNull<Thread>) {
    // SAFETY: by the caller.
    let state = &unsafe { thread.as_ref() }.state;
    // A thread that is still on its CPU is seen to by that CPU.
    if state.compare_exchange(PARKING, WOKEN, Ordering::AcqRel, Ordering::Acquire) == Err(PARKED) {
        state.store(RUNNABLE, Ordering::Relaxed);
        // SAFETY: by the caller, and it is parked: off its CPU.
        unsafe { enqueue(thread, true) };
    }
}

/// Decides whether the running thread of this CPU should make room for what waits, now or when the timer fires. With
/// interrupts off.
fn reconsider(now_ns: u64) {
    let here = cpu::this();
    let local = &here.scheduler;
    if local.waiting.load(Ordering::Relaxed) == 0 {
        return;
    }
    if here.current() == local.idle.get() {
        here.need_resched.store(true, Ordering::Relaxed);
        return;
    }
    let slice = if local.queue.lock().woken.is_empty() { SLICE_NS } else { WAKE_SLICE_NS };
    let end = local.since_ns.get() + slice;
    if now_ns >= end {
        here.need_resched.store(true, Ordering::Relaxed);
    } else {
        timer::arm(end);
    }
}

/// The timer of this CPU fired.
pub(crate) fn timer_fired(now_ns: u64) {
    reconsider(now_ns);
}

/// Another CPU put something into the queue of this one.
pub(crate) fn kicked() {
    reconsider(monotonic_ns());
}

/// Switches threads if that was asked for and nothing forbids it. Called where a reason not to switch has gone.
#[inline]
pub(crate) fn preempt_point() {
    // A hint, looked at again with interrupts off.
    if cpu::this().need_resched.load(Ordering::Relaxed) {
        preempt();
    }
}

#[cold]
fn preempt() {
    if regs::interrupts_on() {
        let _off = InterruptsOff::new();
        interrupt_exit();
    }
}

/// The last thing that an interrupt does: with interrupts off.
pub(crate) fn interrupt_exit() {
    let here = cpu::this();
    if here.need_resched.load(Ordering::Relaxed) && here.preemptible() && here.current().is_some() {
        schedule();
    }
}

/// See [`hypercall::Threads::yield_now`].
pub(crate) fn yield_now() {
    let _off = InterruptsOff::new();
    schedule();
}

/// The running thread has marked itself as parking or exiting and leaves its CPU. Returns when it was woken.
pub(super) fn leave_cpu() {
    let here = cpu::this();
    debug_assert!(here.preemptible(), "a thread that may not be switched out sleeps");
    schedule();
}

/// Ends the running thread.
pub(super) fn exit_thread() -> ! {
    regs::interrupts_disable();
    if let Some(thread) = cpu::current_thread() {
        // SAFETY: the running thread lives.
        unsafe { thread.as_ref() }.state.store(EXITING, Ordering::Relaxed);
    }
    leave_cpu();
    unreachable!("an ended thread runs")
}

/// A thread from another CPU's queue.
fn steal() -> Option<NonNull<Thread>> {
    let (me, count) = (cpu::current_id(), cpu::count());
    (1..count).find_map(|step| cpu::get((me + step) % count).scheduler.take(true))
}

/// Lets another thread run, if there is one that should. With interrupts off.
fn schedule() {
    let here = cpu::this();
    let Some(previous) = here.current() else { return };
    // SAFETY: the running thread lives.
    let state = &unsafe { previous.as_ref() }.state;
    here.need_resched.store(false, Ordering::Relaxed);
    // Woken before it was off: there is nothing to do.
    if state.compare_exchange(WOKEN, RUNNABLE, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
        return;
    }
    let idle = here.scheduler.idle.get();
    let runnable = state.load(Ordering::Relaxed) == RUNNABLE;
    let next = here.scheduler.take(false).or_else(|| {
        // A thread that can go on does so; else look elsewhere before going idle.
        if runnable && Some(previous) != idle { None } else { steal() }
    });
    let next = match next {
        Some(next) => next,
        None if runnable => {
            here.scheduler.since_ns.set(monotonic_ns());
            return;
        }
        None => match idle {
            Some(idle) => idle,
            None => unreachable!("each CPU has its idle thread"),
        },
    };
    if Some(previous) == idle {
        IDLE.fetch_and(!(1 << here.id()), Ordering::SeqCst);
    }
    here.set_current(next);
    let now = monotonic_ns();
    here.scheduler.since_ns.set(now);
    // SAFETY: `next` is off every CPU and out of all lists, so its stack pointer is at rest; `previous` is dealt with after
    // the switch, by whoever runs then.
    unsafe {
        next.as_ref().cpu.store(here.id(), Ordering::Relaxed);
        let passed = switch_stacks(
            previous.as_ref().stack_pointer.as_ptr(),
            next.as_ref().stack_pointer.get(),
            previous.as_ptr().cast(),
        );
        after_switch(passed);
    }
}

/// Deals with the thread that ran before, now that its stack is not in use. With interrupts off.
///
/// # Safety
/// `previous` is what `switch_stacks` passed on.
pub(super) unsafe fn after_switch(previous: *mut ()) {
    let here = cpu::this();
    let Some(previous) = NonNull::new(previous.cast::<Thread>()) else { return };
    if Some(previous) != here.scheduler.idle.get() {
        // SAFETY: nobody frees a thread before `ended` is set, below.
        let fields = unsafe { previous.as_ref() };
        match fields.state.compare_exchange(PARKING, PARKED, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => {}
            Err(EXITING) => {
                let word: *const AtomicU32 = &fields.ended;
                fields.ended.store(1, Ordering::SeqCst);
                // From here on a joiner may free the thread.
                park::unpark_address(word.addr(), u32::MAX);
            }
            Err(state) => {
                let woken = state == WOKEN;
                fields.state.store(RUNNABLE, Ordering::Relaxed);
                // SAFETY: it lives, is off its CPU and in no list.
                unsafe { enqueue(previous, woken) };
            }
        }
    }
    // What waits already limits the slice of the thread that begins.
    reconsider(here.scheduler.since_ns.get());
}

/// What a CPU does when there is nothing to do.
pub(crate) fn idle() -> ! {
    let here = cpu::this();
    let me = 1 << here.id();
    loop {
        regs::interrupts_disable();
        schedule();
        IDLE.fetch_or(me, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        // What was put anywhere before our bit was seen.
        let work = (0..cpu::count()).any(|cpu| cpu::get(cpu).scheduler.waiting.load(Ordering::SeqCst) > 0);
        if work && (here.scheduler.waiting.load(Ordering::SeqCst) > 0 || stealable()) {
            IDLE.fetch_and(!me, Ordering::SeqCst);
            continue;
        }
        // SAFETY: the tables are loaded and no lock is held.
        unsafe { regs::enable_and_halt() };
        IDLE.fetch_and(!me, Ordering::SeqCst);
    }
}

/// Whether some other CPU's queue holds a thread that may run here.
fn stealable() -> bool {
    (0..cpu::count()).filter(|cpu| *cpu != cpu::current_id()).any(|cpu| {
        let queue = cpu::get(cpu).scheduler.queue.lock();
        [&queue.woken, &queue.others].into_iter().any(|list| {
            let mut at = list.first();
            while let Some(thread) = at {
                // SAFETY: members of the queue live.
                if !unsafe { thread.as_ref() }.pinned {
                    return true;
                }
                // SAFETY: `thread` is in the list.
                at = unsafe { list.next(thread) };
            }
            false
        })
    })
}
