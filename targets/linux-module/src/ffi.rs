//! The C half: `kbuild/abi.h` in Rust. Whoever changes a function or a structure raises [`ABI_VERSION`] in both.
//!
//! Errors are negative errno values.
#![expect(unsafe_code, reason = "functions written in C")]

use core::ffi::c_void;

pub(crate) const ABI_MAGIC: u32 = 0x616b_6d6f;
pub(crate) const ABI_VERSION: u32 = 4;
pub(crate) const NO_DEADLINE: u64 = u64::MAX;
pub(crate) const ANY_CPU: u32 = u32::MAX;
pub(crate) const WOKEN: i32 = 0;
pub(crate) const CHANGED: i32 = 1;

#[repr(C)]
#[derive(Default)]
pub(crate) struct DiskInfo {
    pub(crate) sectors: u64,
    pub(crate) sector_size: u32,
    pub(crate) read_only: u32,
}

#[repr(C)]
#[derive(Default)]
pub(crate) struct LinkInfo {
    pub(crate) mac: [u8; 6],
    pub(crate) mtu: u16,
}

/// `struct ak_usb_info`.
#[repr(C)]
#[derive(Default, Clone, Copy)]
pub(crate) struct UsbInfo {
    pub(crate) id: u64,
    pub(crate) bus: u8,
    pub(crate) depth: u8,
    pub(crate) ports: [u8; 6],
    pub(crate) address: u8,
    /// `enum usb_device_speed` (linux/usb/ch9.h).
    pub(crate) speed: u8,
    pub(crate) configuration: u8,
    pub(crate) reserved: [u8; 5],
}

pub(crate) const USB_CONTROL: u8 = 0;
pub(crate) const USB_BULK: u8 = 1;
pub(crate) const USB_INTERRUPT: u8 = 2;

/// `struct ak_usb_part`.
#[repr(C)]
pub(crate) struct UsbPart {
    pub(crate) data: *mut u8,
    pub(crate) len: usize,
}

/// `struct ak_usb_transfer`.
#[repr(C)]
pub(crate) struct UsbTransfer {
    pub(crate) tag: u64,
    pub(crate) parts: *const UsbPart,
    pub(crate) len: usize,
    pub(crate) cookie: *mut c_void,
    pub(crate) setup: [u8; 8],
    pub(crate) count: u32,
    pub(crate) kind: u8,
    pub(crate) endpoint: u8,
    pub(crate) zero_packet: u8,
    pub(crate) reserved: [u8; 1],
}

pub(crate) const USB_DONE: u32 = 0;
pub(crate) const USB_STALL: u32 = 1;
pub(crate) const USB_OVERFLOW: u32 = 2;
pub(crate) const USB_CANCELLED: u32 = 4;
pub(crate) const USB_GONE: u32 = 5;

/// `struct ak_usb_over`.
#[repr(C)]
#[derive(Default)]
pub(crate) struct UsbOver {
    pub(crate) actual: u32,
    pub(crate) status: u32,
}

/// What the C half was compiled with.
#[repr(C)]
pub(crate) struct Abi {
    magic: u32,
    version: u32,
    abi_size: u32,
    disk_info_size: u32,
    link_info_size: u32,
    page_size: u32,
    usb_info_size: u32,
    usb_transfer_size: u32,
    usb_over_size: u32,
}

impl Abi {
    pub(crate) fn fits(&self) -> bool {
        let size = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        self.magic == ABI_MAGIC
            && self.version == ABI_VERSION
            && self.abi_size == size(size_of::<Abi>())
            && self.disk_info_size == size(size_of::<DiskInfo>())
            && self.link_info_size == size(size_of::<LinkInfo>())
            && self.page_size == size(hypercall::PAGE_SIZE)
            && self.usb_info_size == size(size_of::<UsbInfo>())
            && self.usb_transfer_size == size(size_of::<UsbTransfer>())
            && self.usb_over_size == size(size_of::<UsbOver>())
    }
}

unsafe extern "C" {
    pub(crate) safe fn ak_monotonic_ns() -> u64;
    pub(crate) safe fn ak_realtime_ns() -> u64;

    #[cfg(target_os = "none")]
    pub(crate) safe fn ak_heap_alloc(size: usize) -> *mut c_void;
    /// `ptr` came from this function or `ak_heap_alloc` with `size`.
    #[cfg(target_os = "none")]
    pub(crate) fn ak_heap_realloc(ptr: *mut c_void, size: usize, new_size: usize) -> *mut c_void;
    /// As `ak_heap_realloc`.
    #[cfg(target_os = "none")]
    pub(crate) fn ak_heap_free(ptr: *mut c_void, size: usize);
    pub(crate) safe fn ak_pages_alloc(count: usize) -> *mut c_void;
    /// `base` came from `ak_pages_alloc` with `count`.
    pub(crate) fn ak_pages_free(base: *mut c_void, count: usize);
    pub(crate) safe fn ak_memory_bytes() -> u64;
    /// Once.
    #[cfg(any(feature = "trace", feature = "record"))]
    pub(crate) safe fn ak_channel_alloc(size: usize) -> *mut c_void;

    /// `name` has `name_len` bytes; `entry` is what `ak_rust_thread` takes; `id` is written.
    pub(crate) fn ak_thread_spawn(
        name: *const u8,
        name_len: usize,
        cpu: u32,
        entry: *mut c_void,
        id: *mut u64,
    ) -> i32;
    pub(crate) safe fn ak_thread_join(id: u64) -> i32;
    pub(crate) safe fn ak_yield();
    /// `word` is readable until the call returns.
    pub(crate) fn ak_park(word: *const u32, expected: u32, deadline_ns: u64) -> i32;
    /// `word` is compared only.
    pub(crate) safe fn ak_unpark(word: *const u32, count: u32) -> u32;
    pub(crate) safe fn ak_cpu_count() -> u32;
    pub(crate) safe fn ak_current_cpu() -> u32;

    /// `buf` has room for `len` bytes.
    pub(crate) fn ak_random(buf: *mut u8, len: usize) -> i32;
    /// `key` has `key_len` bytes, `buf` room for `len`.
    pub(crate) fn ak_param(key: *const u8, key_len: usize, buf: *mut u8, len: usize) -> isize;
    /// `text` has `len` bytes.
    pub(crate) fn ak_console(text: *const u8, len: usize);
    pub(crate) safe fn ak_started(error: i32);
    pub(crate) safe fn ak_app_ended(status: u32);
    pub(crate) safe fn ak_exit(status: u32) -> !;

    pub(crate) safe fn ak_disk_count() -> u32;
    /// `info` is written.
    pub(crate) fn ak_disk_info(disk: u32, info: *mut DiskInfo) -> i32;
    /// `buf` has room for `len` bytes.
    pub(crate) fn ak_disk_read(disk: u32, sector: u64, buf: *mut u8, len: usize) -> i32;
    /// `buf` has `len` bytes.
    pub(crate) fn ak_disk_write(disk: u32, sector: u64, buf: *const u8, len: usize) -> i32;
    pub(crate) safe fn ak_disk_flush(disk: u32) -> i32;

    pub(crate) safe fn ak_link_count() -> u32;
    /// `signal` is what `ak_rust_raise` takes, valid until `ak_link_close` gives it back; `info` is written.
    pub(crate) fn ak_link_open(link: u32, signal: *const c_void, info: *mut LinkInfo) -> i32;
    /// `frame` has `len` bytes.
    pub(crate) fn ak_link_send(link: u32, frame: *const u8, len: usize) -> i32;
    /// `buf` has room for `len` bytes.
    pub(crate) fn ak_link_receive(link: u32, buf: *mut u8, len: usize) -> isize;
    pub(crate) safe fn ak_link_close(link: u32) -> *const c_void;

    pub(crate) safe fn ak_usb_present() -> u32;
    pub(crate) safe fn ak_usb_start() -> i32;
    /// `signal` is what `ak_rust_raise` takes, valid until a later call gives it back; null is none.
    pub(crate) fn ak_usb_watch(signal: *const c_void) -> *const c_void;
    /// `list` has room for `room` entries.
    pub(crate) fn ak_usb_list(list: *mut UsbInfo, room: usize) -> usize;
    /// `buf` has room for `len` bytes.
    pub(crate) fn ak_usb_descriptors(device: u64, buf: *mut u8, len: usize) -> isize;
    /// `signal` is what `ak_rust_raise` takes, valid until `ak_usb_close` gives it back.
    pub(crate) fn ak_usb_open(device: u64, signal: *const c_void) -> i32;
    pub(crate) safe fn ak_usb_shut(device: u64) -> i32;
    pub(crate) safe fn ak_usb_close(device: u64) -> *const c_void;
    pub(crate) safe fn ak_usb_configure(device: u64, configuration: u32) -> i32;
    pub(crate) safe fn ak_usb_claim(device: u64, interface: u32) -> i32;
    pub(crate) safe fn ak_usb_release(device: u64, interface: u32);
    pub(crate) safe fn ak_usb_set_alternate(device: u64, interface: u32, alternate: u32) -> i32;
    pub(crate) safe fn ak_usb_clear_halt(device: u64, endpoint: u32) -> i32;
    pub(crate) safe fn ak_usb_reset(device: u64) -> i32;
    /// The parts and their data are left alone, as is the cookie, until `ak_usb_reap` gives that back; unless the call fails.
    pub(crate) fn ak_usb_submit(device: u64, transfer: *const UsbTransfer) -> i32;
    pub(crate) safe fn ak_usb_cancel(device: u64, tag: u64);
    /// `over` is written if a cookie is returned.
    pub(crate) fn ak_usb_reap(device: u64, over: *mut UsbOver) -> *mut c_void;
}
