/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/* What the files of the shim share among themselves. */
#ifndef AK_SHIM_H
#define AK_SHIM_H

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/atomic.h>
#include <linux/compiler.h>
#include <linux/errno.h>
#include <linux/kernel.h>
#include <linux/version.h>
#include "abi.h"

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0)
#error "needs Linux 6.1 or newer"
#endif

/* thread.c */
extern atomic_t ak_dead;		/* 0, or AK_DEAD | exit status */
#define AK_DEAD 0x100
void ak_thread_quit(void);		/* does not return if the domain is dead */
int ak_threads_start(void);		/* makes the first thread */
void ak_threads_end(void);		/* waits for every thread */
void ak_park_init(void);

/* A domain that ended must not go on: its threads end at the next call that may sleep. */
static inline void ak_check_alive(void)
{
	if (unlikely(atomic_read(&ak_dead)))
		ak_thread_quit();
}

/* main.c */
extern unsigned int ak_memory_mb;
void ak_stopped_early(void);

/* heap.c */
void ak_heap_init(void);
void ak_heap_report(void);
void ak_channel_free(void);

/* block.c */
int ak_disks_open(char *list);
void ak_disks_close(void);

/* link.c */
int ak_links_register(unsigned int count, unsigned int mtu);
void ak_links_unregister(void);

/* usb.c */
void ak_usb_end(void);

#endif
