//! Private contract: memory that a device reads and writes.

use crate::{Result, Width};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Acquire};

/// An address as the device sees it (after an IOMMU, if there is one).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DmaAddr(pub u64);

/// Which way data goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DmaDirection {
    /// The device reads what the driver wrote.
    ToDevice,
    /// The device writes what the driver will read.
    FromDevice,
}

/// Coherent memory shared with a device until it is freed. Not `Copy`: freed once, by value.
#[derive(Debug)]
pub struct DmaBlock {
    /// Where the driver sees it.
    pub cpu: NonNull<u8>,
    /// Where the device sees it.
    pub device: DmaAddr,
    /// Length in bytes.
    pub len: usize,
}

#[expect(unsafe_code, reason = "an owned block of memory")]
// SAFETY: the block is exclusively owned by its holder (beside the device); nothing ties it to a thread.
unsafe impl Send for DmaBlock {}

/// Device memory. Everything in it is hostile: the device may change it at any moment, so drivers copy a value
/// out (with volatile or atomic access) before they check it.
///
/// # Safety
/// Implementor: `dma_alloc` returns zeroed memory valid for `len` bytes, given to nobody else until freed; `dma_map`
/// returns an address through which a device reaches exactly the buffer (or a bounce copy of it) until `dma_unmap`.
#[expect(unsafe_code, reason = "the implementor vouches for memory")]
pub unsafe trait Dma {
    /// `len` bytes of zeroed, coherent, device-contiguous memory aligned to `align` (a power of two of at most
    /// 65,536).
    ///
    /// Errors: [`crate::Error::NoMemory`], [`crate::Error::Invalid`]. Context: thread. May block for memory.
    /// Counterparts: `rumpcomp_pci_dmalloc`; Linux `dma_alloc_coherent`. A length of 0 is `Invalid`.
    fn dma_alloc(&self, len: usize, align: usize) -> Result<DmaBlock>;

    /// Gives a block back.
    ///
    /// # Safety
    /// The block came from this host, no device uses it any more and nothing refers to it.
    unsafe fn dma_free(&self, block: DmaBlock);

    /// Lets a device reach `buf` for one transfer.
    ///
    /// Errors: [`crate::Error::NoMemory`] (no bounce space), [`crate::Error::Invalid`] (not mappable, for example not
    /// contiguous for the device). Context: any but interrupt. Never blocks. Counterparts: LKL `map_page` of
    /// `lkl_dev_pci_ops`; Linux `dma_map_single`.
    ///
    /// # Safety
    /// `buf` stays valid, and for `FromDevice` untouched, until `dma_unmap`.
    unsafe fn dma_map(&self, buf: NonNull<[u8]>, direction: DmaDirection) -> Result<DmaAddr>;

    /// Ends what `dma_map` began; for `FromDevice` the data is in `buf` after it.
    ///
    /// # Safety
    /// All three arguments are those of one `dma_map`, whose transfer is over.
    unsafe fn dma_unmap(&self, device: DmaAddr, buf: NonNull<[u8]>, direction: DmaDirection);

    /// Reads one number that a device may have written: what lies at `offset` in `block`, in the byte order of the CPU.
    /// What is read after it is no older (acquire).
    ///
    /// Drivers read through the host, as they do with registers, so that what a device wrote can be recorded and made up.
    /// It is one load. Panics if it is not aligned or not inside. Context: any. Never blocks. Counterparts: none;
    /// Linux has `READ_ONCE` after `dma_rmb`.
    ///
    /// # Safety
    /// The block came from this host and is not freed.
    #[inline]
    unsafe fn dma_read(&self, block: &DmaBlock, offset: usize, width: Width) -> u64 {
        let end = offset.checked_add(width.bytes());
        assert!(end.is_some_and(|end| end <= block.len), "offset {offset} outside DMA memory");
        // SAFETY: just checked that the offset lies inside the block, which is valid by the caller.
        let at = unsafe { block.cpu.add(offset) }.as_ptr();
        assert!(at.addr().is_multiple_of(width.bytes()), "offset {offset} is not aligned");
        // SAFETY: valid and aligned, and drivers write to it by atomics too.
        unsafe {
            match width {
                Width::U8 => AtomicU8::from_ptr(at).load(Acquire).into(),
                Width::U16 => AtomicU16::from_ptr(at.cast()).load(Acquire).into(),
                Width::U32 => AtomicU32::from_ptr(at.cast()).load(Acquire).into(),
                Width::U64 => AtomicU64::from_ptr(at.cast()).load(Acquire),
            }
        }
    }

    /// Copies what a device may have written from `offset` in `block` on; otherwise as [`Dma::dma_read`]. A device that
    /// breaks the rules may write meanwhile; then the copy holds some mixture.
    ///
    /// # Safety
    /// As for `dma_read`.
    #[inline]
    unsafe fn dma_copy(&self, block: &DmaBlock, offset: usize, to: &mut [u8]) {
        let end = offset.checked_add(to.len());
        assert!(end.is_some_and(|end| end <= block.len), "offset {offset} outside DMA memory");
        // SAFETY: the source lies inside the block, `to` is ordinary memory and cannot overlap it.
        unsafe { core::ptr::copy_nonoverlapping(block.cpu.add(offset).as_ptr(), to.as_mut_ptr(), to.len()) };
    }
}
