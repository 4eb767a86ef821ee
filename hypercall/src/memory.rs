//! Pages: memory in bulk, for caches and buffers, whose allocation may fail.
//!
//! Small objects come from `alloc`, whose global allocator every target provides. What grows with outside
//! input asks here (or uses the `try_reserve` family), so that it can be refused.

use crate::Result;
use core::ptr::NonNull;

/// Size in bytes of a page in this contract, on every target.
pub const PAGE_SIZE: usize = 4096;

/// A run of pages that [`Memory::alloc_pages`] handed out. Not `Copy`: freed once, by value.
#[derive(Debug)]
pub struct Pages {
    /// First byte; aligned to [`PAGE_SIZE`].
    pub base: NonNull<u8>,
    /// Length in pages, at least 1.
    pub count: usize,
}

#[expect(unsafe_code, reason = "a run of pages is exclusively owned memory")]
// SAFETY: `Pages` owns its memory exclusively, as `Vec` does; nothing in it is tied to a thread.
unsafe impl Send for Pages {}

/// Page allocation.
///
/// # Safety
/// Implementor: `alloc_pages` returns memory that is valid for reads and writes of `count * PAGE_SIZE` bytes, zeroed,
/// aligned to `PAGE_SIZE`, and given to nobody else until it is freed.
#[expect(unsafe_code, reason = "the implementor vouches for memory")]
pub unsafe trait Memory {
    /// `count` zeroed, virtually contiguous pages.
    ///
    /// Errors: [`crate::Error::NoMemory`]; [`crate::Error::Invalid`] if `count` is 0. Context: thread. May block for
    /// a short time. Counterparts: `rumpuser_malloc`, `rumpuser_anonmmap`; LKL `mem_alloc`.
    fn alloc_pages(&self, count: usize) -> Result<Pages>;

    /// Gives pages back.
    ///
    /// Context: thread. Does not fail. Counterparts: `rumpuser_free`, `rumpuser_unmap`; LKL `mem_free`.
    ///
    /// # Safety
    /// `pages` came from `alloc_pages` of the same host, and nothing refers to its memory any more.
    unsafe fn free_pages(&self, pages: Pages);

    /// How many bytes the whole domain may use: what `--memory` said, or what the machine has.
    /// Caches size themselves by it. Context: any. Counterpart: the `mem_size` of
    /// LKL's `lkl_start_kernel`.
    fn memory_bytes(&self) -> u64;
}
