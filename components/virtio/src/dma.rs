//! Memory shared with a device, as owned tokens.
//!
//! Who may touch a buffer follows from who owns its token. A [`Chain`] is ours: its bytes can be filled in place.
//! [`Chain::lend`] turns it into a [`Lent`], which has no accessors: the device has it. Only the queue turns it back,
//! when the device has returned it or was reset. A `Lent` that is dropped leaks its memory, because the device may still
//! write to it.
//!
//! What a device wrote is only ever copied out ([`DmaSlot::copy_out`], by the host), never lent as a slice: it may
//! change while we look at it.
#![expect(unsafe_code, reason = "memory that a device reads and writes")]

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::driver::{DmaMemory, MappedBuffer, Quiet};
use core::mem::ManuallyDrop;
use hypercall::{Dma, DmaDirection, Error, Result};

/// To be called when the device's status reads 0 after a reset (2.4.1: no more access to rings and buffers).
pub(crate) fn after_reset() -> Quiet {
    // SAFETY: the transport, the only caller, has just read that status.
    unsafe { Quiet::vouched() }
}

/// To be called by who owns memory that is not lent: what a device was told of is a [`Lent`], or in a queue.
pub(crate) fn not_lent() -> Quiet {
    // SAFETY: as the callers own it, the device was never told of it or has returned it.
    unsafe { Quiet::vouched() }
}

/// A block whose slots are all gone is given back.
struct Block<H: Dma>(ManuallyDrop<DmaMemory<H>>);

impl<H: Dma> Drop for Block<H> {
    fn drop(&mut self) {
        // SAFETY: taken once, in drop.
        unsafe { ManuallyDrop::take(&mut self.0) }.free(&not_lent());
    }
}

/// A piece of coherent memory with one owner.
pub(crate) struct DmaSlot<H: Dma> {
    memory: Arc<Block<H>>,
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
                Ok(memory) => Arc::new(Block(ManuallyDrop::new(memory))),
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
        self.memory.0.device_addr(self.offset + offset)
    }

    /// All of it, to be filled in place. What was in it before is unspecified.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: inside the block by construction; slots are disjoint and this one is borrowed mutably and not lent
        // to the device, so nobody else is entitled to these bytes.
        unsafe { core::slice::from_raw_parts_mut(self.memory.0.cpu(self.offset).as_ptr(), self.len) }
    }

    /// Copies `out.len()` bytes from `offset` on. `None` if they are not all inside.
    pub(crate) fn copy_out(&self, offset: usize, out: &mut [u8]) -> Option<()> {
        if offset.checked_add(out.len())? > self.len {
            return None;
        }
        self.memory.0.copy_out(self.offset + offset, out);
        Some(())
    }
}

/// A heap buffer mapped for one transfer. Unmapped and freed when dropped.
pub(crate) struct Mapped<H: Dma>(ManuallyDrop<MappedBuffer<H>>);

impl<H: Dma> Mapped<H> {
    /// Maps `buffer`, or gives it back.
    pub(crate) fn new(
        host: H,
        buffer: Box<[u8]>,
        direction: DmaDirection,
    ) -> Result<Self, (Box<[u8]>, Error)> {
        MappedBuffer::new(host, buffer, direction).map(|mapped| Self(ManuallyDrop::new(mapped)))
    }

    /// Unmaps and returns the buffer.
    pub(crate) fn into_inner(self) -> Box<[u8]> {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: taken once, as `this` is not dropped.
        unsafe { ManuallyDrop::take(&mut this.0) }.reclaim(&not_lent())
    }
}

impl<H: Dma> Drop for Mapped<H> {
    fn drop(&mut self) {
        // SAFETY: taken once, in drop.
        drop(unsafe { ManuallyDrop::take(&mut self.0) }.reclaim(&not_lent()));
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
    data: Vec<Mapped<H>>,
}

impl<H: Dma> Chain<H> {
    /// Lengths are cut to what the slot holds.
    pub(crate) fn new(slot: DmaSlot<H>, readable: usize, writable: usize, data: Vec<Mapped<H>>) -> Self {
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
        let data = self.data.iter().map(|Mapped(buffer)| {
            (buffer.device_addr(), buffer.len(), buffer.direction() == DmaDirection::FromDevice)
        });
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
    pub(crate) fn into_parts(self) -> (DmaSlot<H>, Vec<Mapped<H>>) {
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
