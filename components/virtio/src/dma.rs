//! Memory shared with a device, as owned tokens.
//!
//! Who may touch a buffer follows from who owns its token. A [`Chain`] is ours: its bytes can be filled in place.
//! [`Chain::lend`] turns it into a [`Lent`], which has no accessors: the device has it. Only the queue turns it back,
//! when the device has returned it or was reset. A `Lent` that is dropped leaks its memory, because the device may still
//! write to it.
//!
//! What a device wrote is only ever copied out ([`DmaSlot::copy_out`], atomic loads), never lent as a slice: it may
//! change while we look at it.
#![expect(unsafe_code, reason = "memory that a device reads and writes")]

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::mem::ManuallyDrop;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};
use hypercall::{Dma, DmaAddr, DmaBlock, DmaDirection, Error, Result, Width};

/// A block of coherent memory, freed when dropped.
pub(crate) struct DmaMemory<H: Dma> {
    host: H,
    block: ManuallyDrop<DmaBlock>,
}

// SAFETY: shared access is by atomics only; slices are given out by `DmaSlot`s, which own disjoint ranges.
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

    /// Where the device sees byte `offset`.
    pub(crate) fn device_addr(&self, offset: usize) -> u64 {
        self.block.device.0.wrapping_add(offset as u64)
    }

    fn at<T>(&self, offset: usize) -> NonNull<T> {
        let end = offset.checked_add(size_of::<T>());
        assert!(end.is_some_and(|end| end <= self.block.len), "offset {offset} outside DMA memory");
        // SAFETY: just checked that the offset lies inside the block.
        let at = unsafe { self.block.cpu.add(offset) }.cast::<T>();
        assert!(at.is_aligned(), "offset {offset} is not aligned");
        at
    }

    /// The 16 bits that the device may have written at `offset`.
    pub(crate) fn device_u16(&self, offset: usize) -> u16 {
        // SAFETY: the block is this host's and lives as long as `self`.
        unsafe { self.host.dma_read(&self.block, offset, Width::U16) as u16 }
    }

    /// The 32 bits that the device may have written at `offset`.
    pub(crate) fn device_u32(&self, offset: usize) -> u32 {
        // SAFETY: as above.
        unsafe { self.host.dma_read(&self.block, offset, Width::U32) as u32 }
    }

    /// The 16 bits at `offset`, to write. Panics outside the block: offsets are ours, never the device's.
    pub(crate) fn u16_at(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: valid, aligned, lives as long as `self`, and only ever accessed atomically.
        unsafe { AtomicU16::from_ptr(self.at(offset).as_ptr()) }
    }

    /// The 32 bits at `offset`; see [`DmaMemory::u16_at`].
    pub(crate) fn u32_at(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(self.at(offset).as_ptr()) }
    }

    /// The 64 bits at `offset`; see [`DmaMemory::u16_at`].
    pub(crate) fn u64_at(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(self.at(offset).as_ptr()) }
    }
}

impl<H: Dma> Drop for DmaMemory<H> {
    fn drop(&mut self) {
        // SAFETY: taken once, in drop; the block came from this host. Whoever lends memory to a device keeps the
        // owner from being dropped (`Lent`, `Queue`).
        unsafe {
            let block = ManuallyDrop::take(&mut self.block);
            self.host.dma_free(block);
        }
    }
}

/// A piece of coherent memory with one owner.
pub(crate) struct DmaSlot<H: Dma> {
    memory: Arc<DmaMemory<H>>,
    offset: usize,
    len: usize,
}

impl<H: Dma> DmaSlot<H> {
    /// As many slots of `len` bytes as the host has memory for, at most `count`. `len` is rounded up to 64 bytes, so that
    /// two slots share no cache line.
    pub(crate) fn pool(host: H, len: usize, count: usize) -> Result<Vec<Self>>
    where
        H: Copy,
    {
        // Small blocks, because long runs of device memory are scarce on a small machine.
        const BLOCK_BYTES: usize = 64 << 10;
        let stride = len.checked_next_multiple_of(64).ok_or(Error::Invalid)?;
        let per_block = (BLOCK_BYTES / stride).max(1);
        let mut slots = Vec::new();
        slots.try_reserve_exact(count).map_err(|_| Error::NoMemory)?;
        while slots.len() < count {
            let here = per_block.min(count - slots.len());
            let memory = match DmaMemory::new(host, stride * here, 64) {
                Ok(memory) => Arc::new(memory),
                Err(error) if slots.is_empty() => return Err(error),
                Err(_) => break,
            };
            slots.extend((0..here).map(|i| Self { memory: memory.clone(), offset: i * stride, len }));
        }
        Ok(slots)
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn device_addr(&self, offset: usize) -> u64 {
        self.memory.device_addr(self.offset + offset)
    }

    /// All of it, to be filled in place. What was in it before is unspecified.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: inside the block by construction; slots are disjoint and this one is borrowed mutably and not lent
        // to the device, so nobody else is entitled to these bytes.
        unsafe { core::slice::from_raw_parts_mut(self.memory.block.cpu.add(self.offset).as_ptr(), self.len) }
    }

    /// Copies `out.len()` bytes from `offset` on. `None` if they are not all inside.
    pub(crate) fn copy_out(&self, offset: usize, out: &mut [u8]) -> Option<()> {
        if offset.checked_add(out.len())? > self.len {
            return None;
        }
        // SAFETY: the block is this host's and lives as long as `self`.
        unsafe { self.memory.host.dma_copy(&self.memory.block, self.offset + offset, out) };
        Some(())
    }
}

/// A heap buffer mapped for one transfer. Unmapped and freed when dropped.
pub(crate) struct MappedBuffer<H: Dma> {
    host: H,
    // A raw pointer, not a box: while the device writes, nothing in Rust may claim to be the only user.
    bytes: NonNull<[u8]>,
    device: DmaAddr,
    direction: DmaDirection,
}

// SAFETY: it owns its buffer as a box does.
unsafe impl<H: Dma + Send> Send for MappedBuffer<H> {}

impl<H: Dma> MappedBuffer<H> {
    /// Maps `buffer`, or gives it back.
    pub(crate) fn new(
        host: H,
        buffer: Box<[u8]>,
        direction: DmaDirection,
    ) -> Result<Self, (Box<[u8]>, Error)> {
        let raw = Box::into_raw(buffer);
        // SAFETY: a box is never null.
        let bytes = unsafe { NonNull::new_unchecked(raw) };
        // SAFETY: the buffer is owned by the new value and touched by nobody until `into_inner` or drop unmap it.
        match unsafe { host.dma_map(bytes, direction) } {
            Ok(device) => Ok(Self { host, bytes, device, direction }),
            // SAFETY: `raw` came from `into_raw` just now and was not mapped.
            Err(error) => Err((unsafe { Box::from_raw(raw) }, error)),
        }
    }

    fn len(&self) -> usize {
        self.bytes.len()
    }

    fn unmap(&mut self) -> Box<[u8]> {
        // SAFETY: the arguments are those of `dma_map`. A `MappedBuffer` that we own is not lent, so its transfer is over.
        unsafe { self.host.dma_unmap(self.device, self.bytes, self.direction) };
        // SAFETY: came from a box in `new`; callers end the life of `self` without running this twice.
        unsafe { Box::from_raw(self.bytes.as_ptr()) }
    }

    /// Unmaps and returns the buffer.
    pub(crate) fn into_inner(self) -> Box<[u8]> {
        ManuallyDrop::new(self).unmap()
    }
}

impl<H: Dma> Drop for MappedBuffer<H> {
    fn drop(&mut self) {
        drop(self.unmap());
    }
}

/// One piece of a chain, as it goes into a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    /// The device writes it.
    pub(crate) write: bool,
}

/// What one request gives a device: the first `readable` bytes of a slot, mapped buffers, then the `writable` bytes that
/// follow in the slot.
pub(crate) struct Chain<H: Dma> {
    slot: DmaSlot<H>,
    readable: u32,
    writable: u32,
    data: Vec<MappedBuffer<H>>,
}

impl<H: Dma> Chain<H> {
    /// Lengths are cut to what the slot holds.
    pub(crate) fn new(
        slot: DmaSlot<H>,
        readable: usize,
        writable: usize,
        data: Vec<MappedBuffer<H>>,
    ) -> Self {
        let readable = readable.min(slot.len).min(u32::MAX as usize);
        let writable = writable.min(slot.len - readable).min(u32::MAX as usize - readable);
        Self { slot, readable: readable as u32, writable: writable as u32, data }
    }

    /// Calls `each` with every segment in order, none longer than `max_len` (at least 1) and none empty.
    pub(crate) fn for_each(&self, max_len: u32, each: &mut impl FnMut(Segment)) {
        let slot =
            |offset: u32, len: u32, write| (self.slot.device_addr(offset as usize), len as usize, write);
        let front = slot(0, self.readable, false);
        let back = slot(self.readable, self.writable, true);
        let data = self
            .data
            .iter()
            .map(|buffer| (buffer.device.0, buffer.len(), buffer.direction == DmaDirection::FromDevice));
        for (mut addr, mut len, write) in core::iter::once(front).chain(data).chain(core::iter::once(back)) {
            while len > 0 {
                let part = len.min(max_len as usize);
                each(Segment { addr, len: part as u32, write });
                addr = addr.wrapping_add(part as u64);
                len -= part;
            }
        }
    }

    /// The slot.
    pub(crate) fn slot(&self) -> &DmaSlot<H> {
        &self.slot
    }

    /// Takes it apart.
    pub(crate) fn into_parts(self) -> (DmaSlot<H>, Vec<MappedBuffer<H>>) {
        (self.slot, self.data)
    }

    /// Gives it to the device.
    pub(crate) fn lend(self) -> Lent<H> {
        Lent(ManuallyDrop::new(self))
    }
}

/// A chain that a device has. Dropping it leaks the memory.
pub(crate) struct Lent<H: Dma>(ManuallyDrop<Chain<H>>);

impl<H: Dma> Lent<H> {
    /// Takes it back.
    ///
    /// # Safety
    /// The device has returned it, or was never told of it, or does not touch memory any more.
    pub(crate) unsafe fn reclaim(self) -> Chain<H> {
        ManuallyDrop::into_inner(self.0)
    }
}
