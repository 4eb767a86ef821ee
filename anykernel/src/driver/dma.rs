//! Memory that a device reads and writes.
//!
//! Dropping any of it leaks it, because the device may still use it; who has [`Quiet`] may have it back. What the device
//! wrote is only ever copied out, never lent as a slice: it may change while one looks at it.
#![expect(unsafe_code, reason = "memory that a device reads and writes")]

use alloc::boxed::Box;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering::Release};
use hypercall::{Dma, DmaAddr, DmaBlock, DmaDirection, Error, Result, Width};

/// Proof that a device does not touch a piece of memory any more.
#[derive(Debug)]
pub struct Quiet(());

impl Quiet {
    /// # Safety
    /// The device said that it is done with the memory at hand, was halted or reset, or was never told of it.
    #[must_use]
    pub unsafe fn vouched() -> Self {
        Self(())
    }
}

/// A block of coherent memory, zeroed at first. Numbers in it are little-endian, as devices on PCI and virtio have them.
///
/// Offsets are in bytes. Each access panics where it is not inside or not aligned: offsets are the driver's, never the
/// device's. What is written becomes visible after everything written before; what is read later is no older.
#[derive(Debug)]
pub struct DmaMemory<H: Dma> {
    host: H,
    block: DmaBlock,
}

// SAFETY: shared access is by atomics only.
unsafe impl<H: Dma + Sync> Sync for DmaMemory<H> {}

impl<H: Dma> DmaMemory<H> {
    /// `len` zeroed bytes, aligned as [`Dma::dma_alloc`] says, whose errors these are.
    pub fn new(host: H, len: usize, align: usize) -> Result<Self> {
        let block = host.dma_alloc(len, align)?;
        // A shorter one is leaked: a host that lies so may lie of the rest, too.
        if block.len < len {
            return Err(Error::NoMemory);
        }
        Ok(Self { host, block })
    }

    /// Where the device sees byte `offset`.
    pub fn device_addr(&self, offset: usize) -> u64 {
        self.block.device.0.wrapping_add(offset as u64)
    }

    /// In bytes.
    pub fn len(&self) -> usize {
        self.block.len
    }

    /// Never: the contract gives no empty block.
    pub fn is_empty(&self) -> bool {
        self.block.len == 0
    }

    /// Where the driver sees byte `offset`, which the caller alone may then use. Panics outside.
    pub fn cpu(&self, offset: usize) -> NonNull<u8> {
        self.at(offset)
    }

    fn at<T>(&self, offset: usize) -> NonNull<T> {
        let end = offset.checked_add(size_of::<T>());
        assert!(end.is_some_and(|end| end <= self.block.len), "offset {offset} outside DMA memory");
        // SAFETY: just checked that the offset lies inside the block.
        let at = unsafe { self.block.cpu.add(offset) }.cast::<T>();
        assert!(at.is_aligned(), "offset {offset} is not aligned");
        at
    }

    /// Writes 16 bits.
    pub fn write16(&self, offset: usize, value: u16) {
        // SAFETY: valid, aligned, lives as long as `self`, and only ever accessed atomically.
        unsafe { AtomicU16::from_ptr(self.at(offset).as_ptr()) }.store(value.to_le(), Release);
    }

    /// Writes 32 bits.
    pub fn write32(&self, offset: usize, value: u32) {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(self.at(offset).as_ptr()) }.store(value.to_le(), Release);
    }

    /// Writes 64 bits.
    pub fn write64(&self, offset: usize, value: u64) {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(self.at(offset).as_ptr()) }.store(value.to_le(), Release);
    }

    /// The 16 bits that the device may have written at `offset`.
    pub fn read16(&self, offset: usize) -> u16 {
        // SAFETY: the block is this host's and lives as long as `self`.
        u16::from_le(unsafe { self.host.dma_read(&self.block, offset, Width::U16) as u16 })
    }

    /// The 32 bits that the device may have written at `offset`.
    pub fn read32(&self, offset: usize) -> u32 {
        // SAFETY: as above.
        u32::from_le(unsafe { self.host.dma_read(&self.block, offset, Width::U32) as u32 })
    }

    /// The 64 bits that the device may have written at `offset`.
    pub fn read64(&self, offset: usize) -> u64 {
        // SAFETY: as above.
        u64::from_le(unsafe { self.host.dma_read(&self.block, offset, Width::U64) })
    }

    /// Copies out what the device may have written from `offset` on.
    pub fn copy_out(&self, offset: usize, to: &mut [u8]) {
        // SAFETY: as above.
        unsafe { self.host.dma_copy(&self.block, offset, to) };
    }

    /// Gives it back.
    pub fn free(self, _: &Quiet) {
        // SAFETY: it came from this host, and by `Quiet` the device is done with it; nothing borrows `self`.
        unsafe { self.host.dma_free(self.block) };
    }
}

/// A heap buffer that a device has for one transfer.
#[derive(Debug)]
pub struct MappedBuffer<H: Dma> {
    host: H,
    // A raw pointer, not a box: while the device writes, nothing in Rust may claim to be the only user.
    bytes: NonNull<[u8]>,
    device: DmaAddr,
    direction: DmaDirection,
}

// SAFETY: it owns its buffer as a box does.
unsafe impl<H: Dma + Send> Send for MappedBuffer<H> {}

impl<H: Dma> MappedBuffer<H> {
    /// Maps `buffer`, or gives it back with the error of [`Dma::dma_map`]. An empty one is not mapped.
    pub fn new(host: H, buffer: Box<[u8]>, direction: DmaDirection) -> Result<Self, (Box<[u8]>, Error)> {
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

    /// Where the device sees it.
    pub fn device_addr(&self) -> u64 {
        self.device.0
    }

    /// In bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Nothing to transfer.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Which way it goes.
    pub fn direction(&self) -> DmaDirection {
        self.direction
    }

    /// Unmaps and returns the buffer.
    pub fn reclaim(self, _: &Quiet) -> Box<[u8]> {
        if !self.bytes.is_empty() {
            // SAFETY: the arguments are those of `dma_map`, and by `Quiet` the transfer is over.
            unsafe { self.host.dma_unmap(self.device, self.bytes, self.direction) };
        }
        // SAFETY: came from a box in `new`, and is taken once.
        unsafe { Box::from_raw(self.bytes.as_ptr()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    extern crate std;
    use alloc::vec;
    use hypercall::testing::TestHost;

    fn quiet() -> Quiet {
        // SAFETY: no device is here.
        unsafe { Quiet::vouched() }
    }

    #[test]
    fn numbers_are_little_endian_and_come_back() {
        let memory = DmaMemory::new(TestHost::new(), 64, 64).unwrap();
        assert_eq!(memory.read64(0), 0, "zeroed");
        memory.write64(0, 0x0807_0605_0403_0201);
        memory.write32(8, 0x0c0b_0a09);
        memory.write16(12, 0x0e0d);
        assert_eq!(
            (memory.read64(0), memory.read32(4), memory.read16(12)),
            (0x0807_0605_0403_0201, 0x0807_0605, 0x0e0d)
        );
        let mut out = [0; 14];
        memory.copy_out(0, &mut out);
        assert_eq!(out, core::array::from_fn(|i| i as u8 + 1));
        memory.free(&quiet());
    }

    #[test]
    fn wrong_offsets_panic() {
        let memory = DmaMemory::new(TestHost::new(), 64, 64).unwrap();
        let len = memory.len();
        for offset in [len - 1, len, usize::MAX, 2] {
            let access = std::panic::AssertUnwindSafe(|| memory.write32(offset, 0));
            assert!(std::panic::catch_unwind(access).is_err(), "{offset}");
        }
    }

    #[test]
    fn buffers_come_back_as_they_were() {
        let host = TestHost::new();
        for content in [vec![7u8; 100], vec![]] {
            let mapped =
                MappedBuffer::new(host, content.clone().into_boxed_slice(), DmaDirection::ToDevice).unwrap();
            assert_eq!(mapped.len(), content.len());
            assert_eq!(*mapped.reclaim(&quiet()), *content);
        }
    }
}
