// SPDX-License-Identifier: MIT OR GPL-2.0
/* Heap and pages, counted, so that unloading can tell what was left behind. */
#include "shim.h"
#include <linux/mm.h>
#include <linux/percpu.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

/* A failed allocation is an answer here, not a reason to warn or to kill a process. */
#define AK_GFP (GFP_KERNEL | __GFP_NOWARN | __GFP_RETRY_MAYFAIL)

struct ak_heap_count {
	s64 bytes;
	s64 objects;
};

/* Any one of these may be negative: memory is freed on other CPUs than it was allocated on. */
static DEFINE_PER_CPU(struct ak_heap_count, ak_heap_count);
static atomic_long_t ak_pages;
static u64 ak_memory;

static void ak_heap_add(s64 bytes, s64 objects)
{
	this_cpu_add(ak_heap_count.bytes, bytes);
	this_cpu_add(ak_heap_count.objects, objects);
}

void ak_heap_init(void)
{
	struct sysinfo info;

	si_meminfo(&info);
	ak_memory = ak_memory_mb ? (u64)ak_memory_mb << 20 : (u64)info.totalram * info.mem_unit / 4;
}

void ak_heap_report(void)
{
	struct ak_heap_count sum = {};
	long pages = atomic_long_read(&ak_pages);
	int cpu;

	for_each_possible_cpu(cpu) {
		sum.bytes += per_cpu(ak_heap_count.bytes, cpu);
		sum.objects += per_cpu(ak_heap_count.objects, cpu);
	}
	if (sum.objects || sum.bytes || pages)
		pr_warn("left behind: %lld bytes in %lld allocations, %ld pages\n", sum.bytes, sum.objects, pages);
}

void *ak_heap_alloc(size_t size)
{
	void *ptr = size <= INT_MAX ? kvmalloc(size, AK_GFP) : NULL;

	if (ptr)
		ak_heap_add(size, 1);
	return ptr;
}

void *ak_heap_realloc(void *ptr, size_t size, size_t new_size)
{
	void *new;

	if (size <= PAGE_SIZE && new_size <= PAGE_SIZE) {
		/* Both sizes are kmalloc's own, which often has room left. */
		new = krealloc(ptr, new_size, AK_GFP);
		if (new)
			ak_heap_add((s64)new_size - (s64)size, 0);
		return new;
	}
	new = ak_heap_alloc(new_size);
	if (new) {
		memcpy(new, ptr, min(size, new_size));
		ak_heap_free(ptr, size);
	}
	return new;
}

void ak_heap_free(void *ptr, size_t size)
{
	kvfree(ptr);
	ak_heap_add(-(s64)size, -1);
}

void *ak_pages_alloc(size_t count)
{
	void *base = NULL;

	ak_check_alive();
	if (count > INT_MAX >> PAGE_SHIFT)
		return NULL;
	/* First counted, then taken: two threads must not both take the last page. */
	if ((u64)atomic_long_add_return(count, &ak_pages) <= ak_memory >> PAGE_SHIFT)
		base = kvzalloc(count << PAGE_SHIFT, AK_GFP);
	if (!base)
		atomic_long_sub(count, &ak_pages);
	return base;
}

void ak_pages_free(void *base, size_t count)
{
	kvfree(base);
	atomic_long_sub(count, &ak_pages);
}

static void *ak_channel;
static size_t ak_channel_size;

void *ak_channel_alloc(size_t size)
{
	if (ak_channel)
		return NULL;
	ak_channel_size = size;
	ak_channel = alloc_pages_exact(size, AK_GFP | __GFP_ZERO);
	return ak_channel;
}

void ak_channel_free(void)
{
	if (ak_channel)
		free_pages_exact(ak_channel, ak_channel_size);
}

u64 ak_memory_bytes(void)
{
	return ak_memory;
}
