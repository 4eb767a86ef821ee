//! Memory that the controller reads and writes.
//!
//! Dropping any of it leaks it, because the controller may still use it; who has [`Quiet`] may free it. What the controller
//! wrote is only ever copied out.
#![expect(unsafe_code, reason = "memory that a device reads and writes")]

use alloc::boxed::Box;
use core::mem::ManuallyDrop;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use hypercall::{Dma, DmaAddr, DmaBlock, DmaDirection, Error, Result, Width};

/// Proof that the controller does not touch a piece of memory any more.
pub(crate) struct Quiet(());

impl Quiet {
    /// To be called only after the controller said that it is done with the memory at hand (an event that ends the transfer
    /// or stops the endpoint, a disabled slot), was halted or reset, or was never told of it.
    pub(crate) fn vouched() -> Self {
        Self(())
    }
}

/// A block of coherent memory, zeroed at first.
pub(crate) struct DmaMemory<H: Dma> {
    host: H,
    block: ManuallyDrop<DmaBlock>,
}

// SAFETY: shared access is by atomics only.
unsafe impl<H: Dma + Sync> Sync for DmaMemory<H> {}

impl<H: Dma> DmaMemory<H> {
    /// `len` zeroed bytes.
    pub(crate) fn new(host: H, len: usize, align: usize) -> Result<Self> {
        let block = host.dma_alloc(len, align)?;
        if block.len < len {
            return Err(Error::NoMemory);
        }
        Ok(Self { host, block: ManuallyDrop::new(block) })
    }

    /// Where the controller sees byte `offset`.
    pub(crate) fn device_addr(&self, offset: usize) -> u64 {
        self.block.device.0.wrapping_add(offset as u64)
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.block.len
    }

    fn at<T>(&self, offset: usize) -> NonNull<T> {
        let end = offset.checked_add(size_of::<T>());
        assert!(end.is_some_and(|end| end <= self.block.len), "offset {offset} outside DMA memory");
        // SAFETY: just checked that the offset lies inside the block.
        let at = unsafe { self.block.cpu.add(offset) }.cast::<T>();
        assert!(at.is_aligned(), "offset {offset} is not aligned");
        at
    }

    /// Writes 32 bits, in the controller's byte order, after everything written before. Panics outside the block: offsets are
    /// ours, never the controller's.
    pub(crate) fn write32(&self, offset: usize, value: u32) {
        // SAFETY: valid, aligned, lives as long as `self`, and only ever accessed atomically.
        unsafe { AtomicU32::from_ptr(self.at(offset).as_ptr()) }.store(value.to_le(), Ordering::Release);
    }

    /// Writes 64 bits; see [`DmaMemory::write32`].
    pub(crate) fn write64(&self, offset: usize, value: u64) {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(self.at(offset).as_ptr()) }.store(value.to_le(), Ordering::Relaxed);
    }

    /// The 32 bits that the controller may have written at `offset`; what is read later is no older.
    pub(crate) fn read32(&self, offset: usize) -> u32 {
        // SAFETY: the block is this host's and lives as long as `self`.
        u32::from_le(unsafe { self.host.dma_read(&self.block, offset, Width::U32) as u32 })
    }

    /// The 64 bits that the controller may have written at `offset`; see [`DmaMemory::read32`].
    pub(crate) fn read64(&self, offset: usize) -> u64 {
        // SAFETY: as above.
        u64::from_le(unsafe { self.host.dma_read(&self.block, offset, Width::U64) })
    }

    /// Gives it back.
    pub(crate) fn free(self, _: &Quiet) {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: taken once, as `this` is not dropped; it came from this host, and by `Quiet` the controller is done with it.
        unsafe {
            let block = ManuallyDrop::take(&mut this.block);
            this.host.dma_free(block);
        }
    }
}

/// A heap buffer that the controller has for one transfer.
pub(crate) struct Lent<H: Dma> {
    host: H,
    // A raw pointer, not a box: while the controller writes, nothing in Rust may claim to be the only user.
    bytes: NonNull<[u8]>,
    device: DmaAddr,
    direction: DmaDirection,
}

// SAFETY: it owns its buffer as a box does.
unsafe impl<H: Dma + Send> Send for Lent<H> {}

impl<H: Dma> Lent<H> {
    /// Maps `buffer`, or gives it back. An empty one is not mapped.
    pub(crate) fn new(
        host: H,
        buffer: Box<[u8]>,
        direction: DmaDirection,
    ) -> Result<Self, (Box<[u8]>, Error)> {
        let raw = Box::into_raw(buffer);
        // SAFETY: a box is never null.
        let bytes = unsafe { NonNull::new_unchecked(raw) };
        if bytes.is_empty() {
            return Ok(Self { host, bytes, device: DmaAddr(0), direction });
        }
        // SAFETY: the buffer is owned by the new value and touched by nobody until `reclaim` unmaps it.
        match unsafe { host.dma_map(bytes, direction) } {
            Ok(device) => Ok(Self { host, bytes, device, direction }),
            // SAFETY: `raw` came from `into_raw` just now and was not mapped.
            Err(error) => Err((unsafe { Box::from_raw(raw) }, error)),
        }
    }

    /// Where the controller sees it.
    pub(crate) fn device(&self) -> u64 {
        self.device.0
    }

    /// In bytes.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Unmaps and returns the buffer.
    pub(crate) fn reclaim(self, _: &Quiet) -> Box<[u8]> {
        if !self.bytes.is_empty() {
            // SAFETY: the arguments are those of `dma_map`, and by `Quiet` the transfer is over.
            unsafe { self.host.dma_unmap(self.device, self.bytes, self.direction) };
        }
        // SAFETY: came from a box in `new`, and is taken once.
        unsafe { Box::from_raw(self.bytes.as_ptr()) }
    }
}
