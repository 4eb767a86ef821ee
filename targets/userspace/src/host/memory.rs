//! Pages: from mmap when large, from the process's heap when small.
#![expect(unsafe_code, reason = "hands out pages")]

use super::PosixHost;
use core::ptr::NonNull;
use hypercall::{Error, Memory, PAGE_SIZE, Pages, Result};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::alloc::Layout;
use std::sync::atomic::{AtomicU64, Ordering};

/// From this many pages on each run is a mapping of its own. Below, thousands of single-page mappings would run into the
/// kernel's limit of mappings per process (65,530).
const MAP_FROM: usize = 32;

/// What is counted against the limit until it goes out of scope unspent.
fn charge(used: &AtomicU64, bytes: u64, limit: u64) -> Result<()> {
    used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
        used.checked_add(bytes).filter(|used| *used <= limit)
    })
    .map(|_| ())
    .map_err(|_| Error::NoMemory)
}

// SAFETY: both sources give zeroed, page-aligned memory of the length asked for, which is nobody else's.
unsafe impl Memory for PosixHost {
    fn alloc_pages(&self, count: usize) -> Result<Pages> {
        let bytes = count.checked_mul(PAGE_SIZE).filter(|bytes| *bytes > 0).ok_or(Error::Invalid)?;
        self.with(|inner| {
            charge(&inner.memory_used, bytes as u64, inner.memory)?;
            let base = if count >= MAP_FROM {
                // SAFETY: a new anonymous mapping; it replaces nothing.
                unsafe {
                    mmap_anonymous(
                        core::ptr::null_mut(),
                        bytes,
                        ProtFlags::READ | ProtFlags::WRITE,
                        MapFlags::PRIVATE | MapFlags::NORESERVE,
                    )
                }
                .ok()
                .and_then(|base| NonNull::new(base.cast()))
            } else {
                let layout = Layout::from_size_align(bytes, PAGE_SIZE).map_err(|_| Error::Invalid)?;
                // SAFETY: the layout's size is above 0.
                NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })
            };
            base.map(|base| Pages { base, count }).ok_or_else(|| {
                inner.memory_used.fetch_sub(bytes as u64, Ordering::Relaxed);
                Error::NoMemory
            })
        })
        .unwrap_or(Err(Error::Gone))
    }

    unsafe fn free_pages(&self, pages: Pages) {
        let bytes = pages.count * PAGE_SIZE;
        self.with(|inner| inner.memory_used.fetch_sub(bytes as u64, Ordering::Relaxed));
        if pages.count >= MAP_FROM {
            // SAFETY: by the contract this is a mapping that `alloc_pages` made, and nothing refers to it.
            if let Err(error) = unsafe { munmap(pages.base.as_ptr().cast(), bytes) } {
                log::error!("munmap of {bytes} bytes: {error}");
            }
        } else if let Ok(layout) = Layout::from_size_align(bytes, PAGE_SIZE) {
            // SAFETY: by the contract this came from `alloc_pages`, which used the same layout.
            unsafe { std::alloc::dealloc(pages.base.as_ptr(), layout) }
        }
    }

    fn memory_bytes(&self) -> u64 {
        self.with(|inner| inner.memory).unwrap_or(0)
    }
}
