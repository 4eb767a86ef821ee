//! An endpoint: its transfers in flight and their blocks on its ring.
//!
//! A transfer's data is followed by an event data block (4.11.5.2), so that each transfer ends with one event that
//! carries its length and our number for it, however it was cut. Control transfers have a second one, of their status stage.

use crate::context::EndpointContext;
use crate::ring::{Producer, Written};
use crate::trb::{self, Trb, bit, kind};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use anykernel::driver::{MappedBuffer, Quiet};
use anykernel_usb::controller::{EndpointKind, Token, Transfer};
use hypercall::{Dma, Result};

/// Blocks of the ring of a bulk endpoint, and of others.
const BULK_BLOCKS: usize = 1024;
const OTHER_BLOCKS: usize = 256;

/// A transfer in flight.
pub(crate) struct InFlight<H: Dma> {
    /// Without its buffers.
    transfer: Transfer,
    buffers: Vec<MappedBuffer<H>>,
    /// In all buffers.
    pub(crate) bytes: usize,
    /// Our number for it.
    pub(crate) number: u64,
    /// How many blocks it takes.
    blocks: usize,
    /// Where on the ring; `None`: not there yet.
    written: Option<Written>,
    /// Bytes that were moved, as far as that is known.
    pub(crate) actual: usize,
    /// To be ended at the next chance.
    pub(crate) cancelled: bool,
}

impl<H: Dma> InFlight<H> {
    /// A transfer whose buffers were mapped.
    pub(crate) fn new(transfer: Transfer, buffers: Vec<MappedBuffer<H>>, number: u64) -> Self {
        let bytes = buffers.iter().map(MappedBuffer::len).sum();
        Self { transfer, buffers, bytes, number, blocks: 0, written: None, actual: 0, cancelled: false }
    }

    pub(crate) fn is_control(&self) -> bool {
        self.transfer.setup.is_some()
    }

    pub(crate) fn is_in(&self) -> bool {
        match self.transfer.setup {
            Some([kind, ..]) => kind & 0x80 != 0,
            None => self.transfer.endpoint & 0x80 != 0,
        }
    }

    pub(crate) fn token(&self) -> Token {
        self.transfer.token
    }

    /// The transfer with its buffers.
    pub(crate) fn reclaim(self, quiet: &Quiet) -> Transfer {
        let mut transfer = self.transfer;
        transfer.data.extend(self.buffers.into_iter().map(|buffer| buffer.reclaim(quiet)));
        transfer
    }

    /// The transfer without them: they are lost, as the controller may still write to them.
    pub(crate) fn abandon(self) -> Transfer {
        self.transfer
    }

    fn holds(&self, index: usize) -> bool {
        self.first().is_some_and(|first| (first..first + self.blocks).contains(&index))
    }

    /// Index of its first block on the ring.
    fn first(&self) -> Option<usize> {
        self.written.map(|written| written.first)
    }

    /// Its blocks, in `out`.
    fn write(&self, max_packet: u16, target: u32, out: &mut Vec<Trb>) {
        out.clear();
        if let Some(setup) = self.transfer.setup {
            let data = match (self.bytes, self.is_in()) {
                (0, _) => 0,
                (_, false) => bit::DATA_OUT,
                (_, true) => bit::DATA_IN,
            };
            let control = kind::SETUP | bit::IMMEDIATE | data;
            out.push(Trb { parameter: u64::from_le_bytes(setup), status: 8 | target, control });
        }
        let direction = if self.is_control() && self.is_in() { bit::IN } else { 0 };
        let mut kind = if self.is_control() { kind::DATA } else { kind::NORMAL };
        let data = out.len();
        let mut left = self.bytes;
        for buffer in &self.buffers {
            let (mut at, mut rest) = (buffer.device_addr(), buffer.len());
            while rest > 0 {
                let here = rest.min((trb::BOUNDARY - at % trb::BOUNDARY) as usize);
                left -= here;
                let packets_left = left.div_ceil(usize::from(max_packet.max(1))).min(31) as u32;
                out.push(Trb {
                    parameter: at,
                    status: here as u32 | packets_left << 17 | target,
                    control: kind | bit::CHAIN | if kind == kind::DATA { direction } else { 0 },
                });
                kind = kind::NORMAL;
                at += here as u64;
                rest -= here;
            }
        }
        let split = self.transfer.zero_packet && self.bytes > 0 && !self.is_in();
        if !self.is_control()
            && (self.bytes == 0 || split && self.bytes.is_multiple_of(usize::from(max_packet.max(1))))
        {
            // An empty packet, after others as a transfer of its own (4.9.1).
            if let Some(last) = out.last_mut() {
                last.control &= !bit::CHAIN;
            }
            out.push(Trb { parameter: 0, status: target, control: kind::NORMAL | bit::CHAIN });
        }
        if out.len() > data {
            if let Some(last) = out.last_mut() {
                last.control |= bit::EVALUATE_NEXT;
            }
            out.push(Trb {
                parameter: self.number,
                status: target,
                control: kind::EVENT_DATA | bit::INTERRUPT,
            });
        }
        if self.is_control() {
            // The other way than the data, and to the host without any (4.11.2.2).
            let direction = if self.is_in() && self.bytes > 0 { 0 } else { bit::IN };
            out.push(Trb {
                parameter: 0,
                status: target,
                control: kind::STATUS | direction | bit::INTERRUPT,
            });
        }
    }
}

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    /// Which transfer, counted from the oldest.
    pub(crate) position: usize,
    /// It is about the last block of the transfer.
    pub(crate) last: bool,
    /// Bytes in front of its block, and in it.
    pub(crate) before: usize,
    pub(crate) here: usize,
}

/// An endpoint.
pub(crate) struct Endpoint<H: Dma> {
    ring: Producer<H>,
    pub(crate) max_packet: u16,
    pub(crate) kind: EndpointKind,
    /// What the controller was told of it; `None` for endpoint 0.
    pub(crate) context: Option<EndpointContext>,
    /// In their order: first those on the ring, then those that wait for room or for the endpoint to run.
    pub(crate) in_flight: VecDeque<InFlight<H>>,
    /// All of their blocks.
    blocks: usize,
    /// The controller reads the ring.
    running: bool,
    /// It failed: nothing is taken until it is reset.
    pub(crate) halted: bool,
    /// A job that ends cancelled transfers is waiting.
    pub(crate) cancelling: bool,
    /// There is something that the controller was not told of.
    pub(crate) rung: bool,
    /// Interrupter for its events, as it stands in `status`.
    target: u32,
}

impl<H: Dma + Copy> Endpoint<H> {
    pub(crate) fn new(host: H, kind: EndpointKind, max_packet: u16, interrupter: u16) -> Result<Self> {
        let bulk = kind == EndpointKind::Bulk;
        Ok(Self {
            ring: Producer::new(host, if bulk { BULK_BLOCKS } else { OTHER_BLOCKS })?,
            max_packet,
            kind,
            context: None,
            in_flight: VecDeque::new(),
            blocks: 0,
            running: false,
            halted: false,
            cancelling: false,
            rung: false,
            target: u32::from(interrupter) << 22,
        })
    }

    /// Where the controller has to start, once stopped and [`Endpoint::rewind`] was called, or new.
    pub(crate) fn start(&self) -> u64 {
        self.ring.start()
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running
    }

    #[expect(clippy::result_large_err, reason = "it comes back with its buffers")]
    /// Takes a transfer, if its blocks fit beside the others (else gives it back), and writes them if there is room now.
    pub(crate) fn push(
        &mut self,
        mut transfer: InFlight<H>,
        scratch: &mut Vec<Trb>,
    ) -> Result<(), InFlight<H>> {
        transfer.write(self.max_packet, self.target, scratch);
        transfer.blocks = scratch.len();
        // So that all fit in one piece when the ring is written anew.
        if self.blocks + transfer.blocks + 2 > self.ring.len() || self.in_flight.try_reserve(1).is_err() {
            return Err(transfer);
        }
        self.blocks += transfer.blocks;
        self.in_flight.push_back(transfer);
        self.pump(scratch);
        Ok(())
    }

    /// Writes what waits, as far as there is room.
    fn pump(&mut self, scratch: &mut Vec<Trb>) {
        if !self.running {
            return;
        }
        let waiting = self.in_flight.iter().position(|one| one.written.is_none());
        let Some(mut next) = waiting else { return };
        let mut oldest = self.in_flight.front().and_then(|one| one.written).map(|one| one.from);
        while let Some(transfer) = self.in_flight.get_mut(next) {
            transfer.write(self.max_packet, self.target, scratch);
            let Some(written) = self.ring.push(scratch, oldest) else { return };
            transfer.written = Some(written);
            oldest = oldest.or(Some(written.from));
            self.rung = true;
            next += 1;
        }
    }

    /// Finds the transfer that an event is about, by our number for it.
    pub(crate) fn find_number(&self, number: u64) -> Option<Found> {
        let position = self.in_flight.iter().position(|one| one.number == number && one.written.is_some())?;
        let transfer = self.in_flight.get(position)?;
        Some(Found { position, last: !transfer.is_control(), before: 0, here: transfer.bytes })
    }

    /// Finds it by the address of one of its blocks.
    pub(crate) fn find_block(&self, address: u64, scratch: &mut Vec<Trb>) -> Option<Found> {
        let index = self.ring.index_of(address)?;
        let position = self.in_flight.iter().position(|one| one.holds(index))?;
        let transfer = self.in_flight.get(position)?;
        transfer.write(self.max_packet, self.target, scratch);
        let at = index - transfer.first()?;
        Some(Found {
            position,
            last: at + 1 == transfer.blocks,
            before: scratch.iter().take(at).map(Trb::data_len).sum(),
            here: scratch.get(at).map_or(0, Trb::data_len),
        })
    }

    /// Takes the transfer at `position` out.
    pub(crate) fn take(&mut self, position: usize, scratch: &mut Vec<Trb>) -> Option<InFlight<H>> {
        let transfer = self.in_flight.remove(position)?;
        self.blocks = self.blocks.saturating_sub(transfer.blocks);
        self.pump(scratch);
        Some(transfer)
    }

    /// The controller does not read the ring any more.
    pub(crate) fn stopped(&mut self) {
        self.running = false;
        self.rung = false;
    }

    /// The controller stopped at the block at `dequeue`. If that is in the middle of a transfer that is to go on, the ring stays,
    /// with the others that were cancelled made void (`true`); else it is to be written anew.
    pub(crate) fn resume_in_place(&mut self, dequeue: u64) -> bool {
        let Some(index) = self.ring.index_of(dequeue) else { return false };
        let Some(front) = self.in_flight.front() else { return false };
        if front.cancelled || !front.holds(index) || front.first() == Some(index) {
            return false;
        }
        for transfer in self.in_flight.iter().filter(|one| one.cancelled) {
            if let Some(first) = transfer.first() {
                self.ring.blank(first, transfer.blocks);
            }
        }
        true
    }

    /// Empties the ring; transfers are written anew when it runs.
    pub(crate) fn rewind(&mut self) {
        self.ring.reset();
        for transfer in &mut self.in_flight {
            (transfer.written, transfer.actual) = (None, 0);
        }
    }

    /// The controller may read the ring from now on.
    pub(crate) fn run(&mut self, scratch: &mut Vec<Trb>) {
        self.running = true;
        self.rung |= !self.in_flight.is_empty();
        self.pump(scratch);
    }

    /// Takes all transfers that `which` picks.
    pub(crate) fn drain(&mut self, which: impl Fn(&InFlight<H>) -> bool) -> Vec<InFlight<H>> {
        let (mut out, mut kept) = (Vec::new(), VecDeque::new());
        for transfer in core::mem::take(&mut self.in_flight) {
            if which(&transfer) { out.push(transfer) } else { kept.push_back(transfer) }
        }
        self.in_flight = kept;
        self.blocks = self.in_flight.iter().map(|one| one.blocks).sum();
        out
    }

    pub(crate) fn free(self, quiet: &Quiet) {
        self.ring.free(quiet);
    }
}
