//! Rings of blocks (xHCI 1.2, 4.9): transfer and command rings, which we fill, and event rings, which the controller fills.
//!
//! Each is one segment. A cycle bit tells the blocks of this lap from those of the last.

use crate::trb::{self, Trb, bit, kind};
use alloc::vec::Vec;
use anykernel::driver::{DmaMemory, Quiet};
use hypercall::{Dma, Result};

/// No segment may cross this boundary (6.1, table 6-1).
const SEGMENT_BOUNDARY: usize = 1 << 16;

fn write<H: Dma>(memory: &DmaMemory<H>, index: usize, block: Trb, cycle: bool) {
    let at = index * trb::BYTES;
    memory.write64(at, block.parameter);
    memory.write32(at + 8, block.status);
    // The cycle bit last: it hands the block over.
    memory.write32(at + 12, block.control & !bit::CYCLE | u32::from(cycle));
}

/// Where a piece was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    /// Index of its first block.
    pub(crate) first: usize,
    /// From here on the controller may still read as long as the piece is in flight: the link in front of it, if there is one.
    pub(crate) from: usize,
}

/// A ring that we fill.
pub(crate) struct Producer<H: Dma> {
    memory: DmaMemory<H>,
    /// Where the next block goes.
    enqueue: usize,
    cycle: bool,
}

impl<H: Dma> Producer<H> {
    /// A ring of `blocks` (at most 4096), a link among them.
    pub(crate) fn new(host: H, blocks: usize) -> Result<Self> {
        let bytes = (blocks * trb::BYTES).min(SEGMENT_BOUNDARY);
        // Aligned to its size, it crosses no boundary.
        Ok(Self { memory: DmaMemory::new(host, bytes, bytes.next_power_of_two())?, enqueue: 0, cycle: true })
    }

    /// How many blocks it has, the link included.
    pub(crate) fn len(&self) -> usize {
        self.memory.len() / trb::BYTES
    }

    /// Where the controller starts after [`Producer::reset`], with the cycle bit that it expects there (bit 0).
    pub(crate) fn start(&self) -> u64 {
        self.memory.device_addr(0) | 1
    }

    /// The block at a device address.
    pub(crate) fn index_of(&self, address: u64) -> Option<usize> {
        let offset = usize::try_from(address.checked_sub(self.memory.device_addr(0))?).ok()?;
        (offset < self.memory.len() && offset.is_multiple_of(trb::BYTES)).then_some(offset / trb::BYTES)
    }

    /// Forgets everything. The controller must not be reading it.
    pub(crate) fn reset(&mut self) {
        for index in 0..self.len() {
            write(&self.memory, index, Trb::default(), false);
        }
        (self.enqueue, self.cycle) = (0, true);
    }

    /// Where `count` blocks in one piece would go, if `oldest` is the first block that the controller may still read; `None`: there is
    /// no room now. At least one block stays free.
    fn room(&self, count: usize, oldest: Option<usize>) -> Option<usize> {
        let end = self.len() - 1;
        match oldest {
            Some(oldest) if oldest > self.enqueue => (self.enqueue + count < oldest).then_some(self.enqueue),
            _ if self.enqueue + count <= end => Some(self.enqueue),
            // Around the end: up to what is still read, and the link that is about to be written.
            oldest => (count < oldest.unwrap_or(self.enqueue)).then_some(0),
        }
    }

    /// Writes `blocks` in one piece and hands them over; says where they are. See [`Producer::room`].
    ///
    /// A link is written wherever the piece does not fit before the end, so that no transfer has one in its middle.
    pub(crate) fn push(&mut self, blocks: &[Trb], oldest: Option<usize>) -> Option<Written> {
        let place = self.room(blocks.len(), oldest)?;
        let from = self.enqueue;
        if place != self.enqueue {
            // What lies behind the link was perhaps not written in this lap: it must not look valid in the next.
            for index in self.enqueue + 1..self.len() {
                write(&self.memory, index, Trb::default(), self.cycle);
            }
            let link =
                Trb { parameter: self.memory.device_addr(0), status: 0, control: kind::LINK | bit::TOGGLE };
            write(&self.memory, self.enqueue, link, self.cycle);
            (self.enqueue, self.cycle) = (0, !self.cycle);
        }
        let (first, rest) = blocks.split_first()?;
        for (index, block) in rest.iter().enumerate() {
            write(&self.memory, place + 1 + index, *block, self.cycle);
        }
        write(&self.memory, place, *first, self.cycle);
        self.enqueue = place + blocks.len();
        Some(Written { first: place, from })
    }

    /// Turns the `count` blocks from `first` on into blocks that do nothing. The controller must not be reading the ring.
    pub(crate) fn blank(&mut self, first: usize, count: usize) {
        for index in first..(first + count).min(self.len()) {
            let cycle = self.memory.read32(index * trb::BYTES + 12) & bit::CYCLE != 0;
            write(&self.memory, index, Trb { control: kind::NO_OP, ..Trb::default() }, cycle);
        }
    }

    pub(crate) fn free(self, quiet: &Quiet) {
        self.memory.free(quiet);
    }
}

/// The command ring: blocks in flight carry a `T`.
pub(crate) struct Commands<H: Dma, T> {
    ring: Producer<H>,
    pending: Vec<Option<T>>,
    /// Where those in flight are, in the order of the ring.
    in_flight: alloc::collections::VecDeque<Written>,
}

impl<H: Dma, T> Commands<H, T> {
    const BLOCKS: usize = 64;

    pub(crate) fn new(host: H) -> Result<Self> {
        let pending = (0..Self::BLOCKS).map(|_| None).collect();
        Ok(Self { ring: Producer::new(host, Self::BLOCKS)?, pending, in_flight: Default::default() })
    }

    /// For the command ring control register.
    pub(crate) fn start(&self) -> u64 {
        self.ring.start()
    }

    /// Hands a command over, or gives it back: no room now.
    pub(crate) fn push(&mut self, block: Trb, token: T) -> Result<(), T> {
        let oldest = self.in_flight.front().map(|written| written.from);
        let Some(written) = self.ring.push(&[block], oldest) else { return Err(token) };
        if let Some(place) = self.pending.get_mut(written.first) {
            *place = Some(token);
        }
        self.in_flight.push_back(written);
        Ok(())
    }

    /// The command whose block is at `address` is over.
    pub(crate) fn take(&mut self, address: u64) -> Option<T> {
        let index = self.ring.index_of(address)?;
        let token = self.pending.get_mut(index)?.take()?;
        self.in_flight.retain(|one| one.first != index);
        Some(token)
    }

    /// All in flight, oldest first.
    pub(crate) fn drain(&mut self) -> Vec<T> {
        let pending = &mut self.pending;
        self.in_flight.drain(..).filter_map(|one| pending.get_mut(one.first)?.take()).collect()
    }

    pub(crate) fn free(self, quiet: &Quiet) {
        self.ring.free(quiet);
    }
}

/// An event ring (4.9.4) and its segment table (6.5).
pub(crate) struct Events<H: Dma> {
    memory: DmaMemory<H>,
    table: DmaMemory<H>,
    dequeue: usize,
    cycle: bool,
}

impl<H: Dma + Copy> Events<H> {
    /// Blocks of an event ring. There are never so many events in flight: see `MAX_IN_FLIGHT`.
    pub(crate) const BLOCKS: usize = 1024;

    pub(crate) fn new(host: H) -> Result<Self> {
        let bytes = Self::BLOCKS * trb::BYTES;
        let memory = DmaMemory::new(host, bytes, bytes)?;
        let table = DmaMemory::new(host, 64, 64)?;
        table.write64(0, memory.device_addr(0));
        table.write64(8, Self::BLOCKS as u64);
        Ok(Self { memory, table, dequeue: 0, cycle: true })
    }

    /// For the segment table base register.
    pub(crate) fn table(&self) -> u64 {
        self.table.device_addr(0)
    }

    /// For the dequeue pointer register.
    pub(crate) fn dequeue(&self) -> u64 {
        self.memory.device_addr(self.dequeue * trb::BYTES)
    }

    /// Whether there is an event.
    pub(crate) fn is_ready(&self) -> bool {
        let control = self.memory.read32(self.dequeue * trb::BYTES + 12);
        (control & bit::CYCLE != 0) == self.cycle
    }

    /// Takes the next event.
    pub(crate) fn pop(&mut self) -> Option<Trb> {
        let at = self.dequeue * trb::BYTES;
        let control = self.memory.read32(at + 12);
        if (control & bit::CYCLE != 0) != self.cycle {
            return None;
        }
        let event = Trb { parameter: self.memory.read64(at), status: self.memory.read32(at + 8), control };
        self.dequeue += 1;
        if self.dequeue == Self::BLOCKS {
            (self.dequeue, self.cycle) = (0, !self.cycle);
        }
        Some(event)
    }

    pub(crate) fn free(self, quiet: &Quiet) {
        self.memory.free(quiet);
        self.table.free(quiet);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dma::vouch;
    use hypercall::testing::TestHost;

    /// The controller's side of a transfer ring: reads as far as the cycle bit lets it.
    struct Reader {
        at: usize,
        cycle: bool,
    }

    impl Reader {
        fn next<H: Dma + Copy>(&mut self, ring: &Producer<H>) -> Option<u64> {
            loop {
                let at = self.at * trb::BYTES;
                let control = ring.memory.read32(at + 12);
                if (control & bit::CYCLE != 0) != self.cycle {
                    return None;
                }
                if control & kind::MASK == kind::LINK {
                    assert_eq!(ring.memory.read64(at), ring.memory.device_addr(0));
                    assert_ne!(control & bit::TOGGLE, 0);
                    (self.at, self.cycle) = (0, !self.cycle);
                    continue;
                }
                self.at += 1;
                return Some(ring.memory.read64(at));
            }
        }
    }

    /// Pieces of all lengths, so that links come at other places in each lap, and the reader is up to a few behind.
    #[test]
    fn a_reader_sees_every_block_once_and_in_order() {
        let mut ring = Producer::new(TestHost::new(), 32).unwrap();
        let mut reader = Reader { at: 0, cycle: true };
        // Where the reader may still be, and length, of the pieces that were not read whole.
        let mut pieces: alloc::collections::VecDeque<(usize, usize)> = Default::default();
        let (mut written, mut seen, mut in_piece) = (0u64, 0u64, 0);
        let mut seed = 1u32;
        let mut random = |below: u32| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 16) % below
        };
        for _ in 0..20_000 {
            let len = 1 + random(12) as usize;
            let blocks: Vec<Trb> = (0..len as u64)
                .map(|i| Trb { parameter: written + i, status: 0, control: kind::NORMAL })
                .collect();
            match ring.push(&blocks, pieces.front().map(|one| one.0)) {
                Some(piece) => {
                    pieces.push_back((piece.from, len));
                    written += len as u64;
                }
                None => assert!(!pieces.is_empty(), "an empty ring has room for {len}"),
            }
            for _ in 0..random(14) {
                let Some(parameter) = reader.next(&ring) else { break };
                assert_eq!(parameter, seen, "after {written} blocks");
                seen += 1;
                in_piece += 1;
                if pieces.front().is_some_and(|one| one.1 == in_piece) {
                    pieces.pop_front();
                    in_piece = 0;
                }
            }
        }
        while let Some(parameter) = reader.next(&ring) {
            assert_eq!(parameter, seen);
            seen += 1;
        }
        assert_eq!(seen, written);
        assert!(written > 50_000);
        ring.free(&vouch());
    }

    #[test]
    fn addresses_outside_name_no_block() {
        let ring = Producer::new(TestHost::new(), 32).unwrap();
        let start = ring.start() & !1;
        assert_eq!(ring.index_of(start + 16), Some(1));
        for wrong in [0, start - 16, start + 8, start + 32 * 16, u64::MAX] {
            assert_eq!(ring.index_of(wrong), None, "{wrong:#x}");
        }
        ring.free(&vouch());
    }

    #[test]
    fn a_command_is_over_once() {
        let mut commands = Commands::new(TestHost::new()).unwrap();
        let start = commands.start() & !1;
        let block = Trb::command(kind::ENABLE_SLOT, 0, 0, 0);
        for token in 0..200 {
            assert_eq!(commands.push(block, token), Ok(()));
            let index = commands.in_flight[0].first as u64;
            assert_eq!(commands.take(start + 16 * index), Some(token));
            assert_eq!(commands.take(start + 16 * index), None);
        }
        let mut taken = 0;
        while commands.push(block, taken).is_ok() {
            taken += 1;
        }
        assert!(taken >= 60, "{taken}");
        assert_eq!(commands.drain(), (0..taken).collect::<Vec<_>>());
        commands.free(&vouch());
    }
}
