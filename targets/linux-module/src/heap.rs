//! The global allocator, over kvmalloc.
//!
//! It may sleep, so it is for threads only; nothing of this crate that runs in interrupt context allocates.
#![expect(unsafe_code, reason = "a global allocator")]

use crate::ffi;
use core::alloc::{GlobalAlloc, Layout};
use hypercall::PAGE_SIZE;

struct Heap;

#[global_allocator]
static HEAP: Heap = Heap;

/// What the kernel aligns every object to.
const KMALLOC_ALIGN: usize = 8;

/// How many bytes to ask for so that they come aligned as wanted, or `None` if that cannot be had.
fn size_of(size: usize, align: usize) -> Option<usize> {
    if align <= KMALLOC_ALIGN {
        Some(size)
    } else if align > PAGE_SIZE {
        None
    } else if size < PAGE_SIZE {
        // Objects whose size is a power of two are aligned to it.
        Some(size.max(align).next_power_of_two())
    } else {
        Some(size)
    }
}

// SAFETY: `ak_heap_alloc` gives memory of at least the size, aligned as `size_of` explains, or null; it does not unwind.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match size_of(layout.size(), layout.align()) {
            Some(size) => ffi::ak_heap_alloc(size).cast(),
            None => core::ptr::null_mut(),
        }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        if let Some(size) = size_of(layout.size(), layout.align()) {
            // SAFETY: by the caller's promise `ptr` came from `alloc` with this layout, so with this size.
            unsafe { ffi::ak_heap_free(ptr.cast(), size) }
        }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        let sizes = (size_of(layout.size(), layout.align()), size_of(new_size, layout.align()));
        let (Some(size), Some(new_size)) = sizes else { return core::ptr::null_mut() };
        // SAFETY: as for `dealloc`; the new size is rounded so that the alignment stays.
        unsafe { ffi::ak_heap_realloc(ptr.cast(), size, new_size).cast() }
    }
}
