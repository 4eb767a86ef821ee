//! Private contract: memory that a device reads and writes.

use crate::Result;
use core::ptr::NonNull;

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
}
