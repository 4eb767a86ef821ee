/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * What the shim offers to Rust and Rust to the shim. src/ffi.rs is the same in Rust; whoever changes a function or a
 * structure raises AK_ABI_VERSION in both.
 *
 * Errors are negative errno values. "Thread" means a thread that ak_thread_spawn() or module start made; every call that
 * may sleep ends the calling thread instead of returning once the domain is dead.
 */
#ifndef AK_ABI_H
#define AK_ABI_H

#include <linux/types.h>

#define AK_ABI_MAGIC 0x616b6d6fu
#define AK_ABI_VERSION 4u
#define AK_NO_DEADLINE U64_MAX
#define AK_ANY_CPU U32_MAX

struct ak_disk_info {
	u64 sectors;
	u32 sector_size;
	u32 read_only;
};

struct ak_link_info {
	u8 mac[6];
	u16 mtu;
};

/* A USB device that is plugged in. */
struct ak_usb_info {
	u64 id;
	u8 bus;
	u8 depth;	/* how many of ports count: 0 is a root hub */
	u8 ports[6];
	u8 address;
	u8 speed;	/* enum usb_device_speed */
	u8 configuration;
	u8 reserved[5];
};

enum { AK_USB_CONTROL, AK_USB_BULK, AK_USB_INTERRUPT };

struct ak_usb_part {
	void *data;
	size_t len;
};

/* A transfer: parts, what they point to, and cookie are the shim's until ak_usb_reap() gives the cookie back. */
struct ak_usb_transfer {
	u64 tag;
	const struct ak_usb_part *parts;
	size_t len;	/* of all of them */
	void *cookie;
	u8 setup[8];
	u32 count;	/* of the parts */
	u8 kind;
	u8 endpoint;
	u8 zero_packet;
	u8 reserved[1];
};

enum { AK_USB_DONE, AK_USB_STALL, AK_USB_OVERFLOW, AK_USB_ERROR, AK_USB_CANCELLED, AK_USB_GONE };

struct ak_usb_over {
	u32 actual;
	u32 status;
};

/* What the shim was compiled with. Rust compares it with its own before anything else runs. */
struct ak_abi {
	u32 magic;
	u32 version;
	u32 abi_size;
	u32 disk_info_size;
	u32 link_info_size;
	u32 page_size;
	u32 usb_info_size;
	u32 usb_transfer_size;
	u32 usb_over_size;
};

/* Rust, called by the shim. */
int ak_rust_check(const struct ak_abi *abi);	/* 0 or -EINVAL; context: any */
void ak_rust_main(void);			/* the first thread's whole life */
void ak_rust_thread(void *entry);		/* the whole life of every other thread */
void ak_rust_stop(void);			/* asks ak_rust_main to return; context: any */
void ak_rust_raise(const void *signal);		/* raises a signal that a link or USB got; context: any */

/* The shim, called by Rust. Context: thread unless it says "any". */
u64 ak_monotonic_ns(void);			/* any */
u64 ak_realtime_ns(void);			/* any */

/* Aligned to 8; to min(size, page) if size is a power of two; to a page from a page on. */
void *ak_heap_alloc(size_t size);
void *ak_heap_realloc(void *ptr, size_t size, size_t new_size);
void ak_heap_free(void *ptr, size_t size);
void *ak_pages_alloc(size_t count);		/* zeroed */
void ak_pages_free(void *base, size_t count);
u64 ak_memory_bytes(void);			/* any */
/* Zeroed whole pages, contiguous in physical memory too; or NULL. Not counted: freed at unload. Once. */
void *ak_channel_alloc(size_t size);

int ak_thread_spawn(const char *name, size_t name_len, u32 cpu, void *entry, u64 *id);
int ak_thread_join(u64 id);
void ak_yield(void);
enum { AK_WOKEN, AK_CHANGED, AK_TIMED_OUT };
int ak_park(const u32 *word, u32 expected, u64 deadline_ns);
u32 ak_unpark(const u32 *word, u32 count);	/* any */
u32 ak_cpu_count(void);				/* any */
u32 ak_current_cpu(void);			/* any */

int ak_random(void *buf, size_t len);
ssize_t ak_param(const char *key, size_t key_len, void *buf, size_t len);
void ak_console(const char *text, size_t len);	/* any */
void ak_started(int error);			/* lets insmod return: 0 or a negative errno */
void ak_app_ended(u32 status);
void ak_exit(u32 status) __noreturn;

u32 ak_disk_count(void);			/* any */
int ak_disk_info(u32 disk, struct ak_disk_info *info);
int ak_disk_read(u32 disk, u64 sector, void *buf, size_t len);
int ak_disk_write(u32 disk, u64 sector, const void *buf, size_t len);
int ak_disk_flush(u32 disk);

u32 ak_link_count(void);			/* any */
int ak_link_open(u32 link, const void *signal, struct ak_link_info *info);
int ak_link_send(u32 link, const void *frame, size_t len);
ssize_t ak_link_receive(u32 link, void *buf, size_t len);
const void *ak_link_close(u32 link);		/* the signal, which nobody raises any more; or NULL */

/* hypercall::HostUsb. A device is named by the id of its list entry; cookies and signals are given back exactly once. */
u32 ak_usb_present(void);		/* whether this kernel has USB; any */
int ak_usb_start(void);			/* before all others */
const void *ak_usb_watch(const void *signal);	/* the one before, which nobody raises any more; NULL: none */
size_t ak_usb_list(struct ak_usb_info *list, size_t room);	/* how many there are, of which room are written */
ssize_t ak_usb_descriptors(u64 id, void *buf, size_t len);
int ak_usb_open(u64 id, const void *signal);
int ak_usb_shut(u64 id);			/* nothing is in flight or claimed any more; reap, then close */
const void *ak_usb_close(u64 id);		/* the signal; cookies not reaped are forgotten */
int ak_usb_configure(u64 id, u32 value);
int ak_usb_claim(u64 id, u32 interface);
void ak_usb_release(u64 id, u32 interface);
int ak_usb_set_alternate(u64 id, u32 interface, u32 alternate);
int ak_usb_clear_halt(u64 id, u32 endpoint);
int ak_usb_reset(u64 id);
int ak_usb_submit(u64 id, const struct ak_usb_transfer *transfer);
void ak_usb_cancel(u64 id, u64 tag);
void *ak_usb_reap(u64 id, struct ak_usb_over *over);	/* a cookie, or NULL */

#endif
