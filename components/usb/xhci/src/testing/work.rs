//! Commands and transfers, carried out as the specification says.

use super::{Memory, Model, PORTS, SLOTS, read_trb, read64};
use crate::trb::{Trb, bit, code, kind};
use alloc::vec::Vec;
use hypercall::testing::usb_progress;
use hypercall::{UsbStatus, UsbTransferKind};

/// Blocks of one transfer, and bytes; transfers and commands at a time.
const MAX_BLOCKS: usize = 600;
const MAX_BYTES: usize = 1 << 20;
const MAX_WORK: usize = 32;
/// A device that had nothing to say is asked again after so many ticks.
const ASK_AGAIN: u32 = 4;
/// Of contexts.
const STRIDE: u64 = 32;
const CONTEXT_STATE_ERROR: u32 = 19;

/// A place on a ring.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Ring {
    pub(super) at: u64,
    pub(super) cycle: bool,
}

impl Ring {
    fn of(pointer: u64) -> Self {
        Self { at: pointer & !0xf, cycle: pointer & 1 != 0 }
    }

    /// The next block and where it is, behind links.
    fn next(&mut self, memory: &mut dyn Memory) -> Option<(u64, Trb)> {
        for _ in 0..4 {
            let block = read_trb(memory, self.at)?;
            if (block.control & bit::CYCLE != 0) != self.cycle {
                return None;
            }
            if block.kind() != kind::LINK {
                let at = self.at;
                self.at += 16;
                return Some((at, block));
            }
            self.cycle ^= block.control & bit::TOGGLE != 0;
            self.at = block.parameter & !0xf;
        }
        None
    }
}

/// An endpoint.
pub(super) struct Endpoint {
    pub(super) ring: Ring,
    halted: bool,
    /// What of the first transfer was moved already.
    partial: Option<(Vec<u8>, usize)>,
}

impl Endpoint {
    fn new(ring: Ring) -> Self {
        Self { ring, halted: false, partial: None }
    }
}

/// A device with an address.
pub(super) struct Slot {
    port: usize,
    endpoints: [Option<Endpoint>; 32],
    /// Endpoints whose doorbell rang, a bit for each: between two looks of the driver only they have anything to do.
    rung: u32,
}

impl Slot {
    pub(super) fn endpoint(&mut self, index: usize) -> Option<&mut Endpoint> {
        self.endpoints.get_mut(index)?.as_mut()
    }

    /// The doorbell of an endpoint.
    pub(super) fn ring(&mut self, index: usize) {
        if self.endpoint(index).is_some() {
            self.rung |= 1 << index;
        }
    }

    /// Puts an endpoint in its place, or nothing.
    fn set(&mut self, index: usize, endpoint: Option<Endpoint>) {
        self.rung &= !(1 << index);
        self.endpoints[index] = endpoint;
    }
}

/// A transfer as it stands on a ring.
#[derive(Default)]
struct Td {
    setup: Option<[u8; 8]>,
    buffers: Vec<(u64, usize)>,
    /// Its last block with data.
    data: u64,
    /// Parameter of its event data block.
    event: Option<u64>,
    /// Its status stage.
    status: Option<u64>,
    target: usize,
}

impl Td {
    fn bytes(&self) -> usize {
        self.buffers.iter().map(|(_, len)| len).sum()
    }

    /// The next one; `None`: it is not there as a whole.
    fn take(memory: &mut dyn Memory, ring: &mut Ring) -> Option<Self> {
        let mut td = Self::default();
        for _ in 0..MAX_BLOCKS {
            let (at, block) = ring.next(memory)?;
            td.target = (block.status >> 22) as usize;
            match block.kind() {
                kind::SETUP => {
                    td.setup = Some(block.parameter.to_le_bytes());
                    continue;
                }
                kind::NORMAL | kind::DATA => {
                    td.data = at;
                    td.buffers.push((block.parameter, block.data_len()));
                }
                kind::EVENT_DATA => td.event = Some(block.parameter),
                kind::STATUS => td.status = Some(at),
                _ => {}
            }
            let over = if td.setup.is_some() { td.status.is_some() } else { block.control & bit::CHAIN == 0 };
            if td.bytes() > MAX_BYTES {
                return None;
            }
            if over {
                return Some(td);
            }
        }
        None
    }
}

impl Model {
    pub(super) fn work(&mut self, memory: &mut dyn Memory) {
        self.ticks = self.ticks.wrapping_add(1);
        let ask_again = self.ticks.is_multiple_of(ASK_AGAIN);
        if core::mem::take(&mut self.rung) {
            for _ in 0..MAX_WORK {
                let mut ring = self.commands;
                let Some((at, block)) = ring.next(memory) else { break };
                self.commands = ring;
                let (code, slot) = self.execute(memory, block);
                let control = kind::COMMAND_EVENT | (slot as u32) << 24;
                self.tell(memory, 0, Trb { parameter: at, status: code << 24, control });
            }
        }
        for number in 1..=SLOTS {
            let mut rung = self.slots[number].as_ref().map_or(0, |slot| slot.rung);
            while rung != 0 {
                let index = rung.trailing_zeros() as usize;
                rung &= rung - 1;
                let endpoint = self.slots[number].as_mut().and_then(|slot| slot.endpoint(index));
                if ask_again || endpoint.is_some_and(|endpoint| endpoint.partial.is_none()) {
                    self.serve(memory, number, index);
                }
            }
        }
    }

    /// Carries a command out: how it went, and of which slot it was.
    fn execute(&mut self, memory: &mut dyn Memory, block: Trb) -> (u32, usize) {
        let (number, index) = (usize::from(block.slot()), usize::from(block.endpoint()));
        if block.kind() == kind::ENABLE_SLOT {
            let Some(free) = (1..=SLOTS).find(|number| self.slots[*number].is_none()) else {
                return (code::NO_SLOTS, 0);
            };
            self.slots[free] = Some(Slot { port: PORTS, endpoints: [const { None }; 32], rung: 0 });
            return (code::SUCCESS, free);
        }
        let output = read64(memory, self.contexts.wrapping_add(8 * number as u64)).unwrap_or(0);
        let Some(slot) = self.slots.get_mut(number).and_then(Option::as_mut) else {
            return (code::SLOT_NOT_ENABLED, number);
        };
        let code = match block.kind() {
            kind::DISABLE_SLOT => {
                self.slots[number] = None;
                code::SUCCESS
            }
            kind::ADDRESS_DEVICE => {
                let place = read64(memory, block.parameter + STRIDE).unwrap_or(0) >> 48 & 0xff;
                slot.port = (place as usize).wrapping_sub(1);
                let ring = read64(memory, block.parameter + 2 * STRIDE + 8).unwrap_or(0);
                slot.set(1, Some(Endpoint::new(Ring::of(ring))));
                match self.devices.get_mut(slot.port).and_then(Option::as_mut) {
                    None => code::TRANSACTION,
                    Some(device) => {
                        device.control([0, 5, number as u8, 0, 0, 0, 0, 0], &mut []);
                        memory.write(output + 12, &(number as u32 | 2 << 27).to_le_bytes());
                        code::SUCCESS
                    }
                }
            }
            kind::EVALUATE_CONTEXT => code::SUCCESS,
            kind::CONFIGURE_ENDPOINT => {
                let flags = read64(memory, block.parameter).unwrap_or(0);
                for index in 2..32 {
                    if flags >> index & 1 != 0 {
                        slot.set(index, None);
                    }
                    if flags >> (32 + index) & 1 != 0 {
                        let at = block.parameter + (1 + index as u64) * STRIDE + 8;
                        let ring = Ring::of(read64(memory, at).unwrap_or(0));
                        slot.set(index, Some(Endpoint::new(ring)));
                    }
                }
                code::SUCCESS
            }
            kind::RESET_DEVICE => {
                (2..32).for_each(|index| slot.set(index, None));
                code::SUCCESS
            }
            other => match slot.endpoint(index) {
                None => CONTEXT_STATE_ERROR,
                Some(endpoint) => match other {
                    kind::RESET_ENDPOINT if endpoint.halted => {
                        endpoint.halted = false;
                        slot.rung &= !(1 << index);
                        code::SUCCESS
                    }
                    kind::STOP_ENDPOINT if !endpoint.halted => {
                        let pointer = endpoint.ring.at | u64::from(endpoint.ring.cycle);
                        slot.rung &= !(1 << index);
                        memory.write(output + index as u64 * STRIDE + 8, &pointer.to_le_bytes());
                        code::SUCCESS
                    }
                    kind::SET_DEQUEUE => {
                        slot.set(index, Some(Endpoint::new(Ring::of(block.parameter))));
                        code::SUCCESS
                    }
                    _ => CONTEXT_STATE_ERROR,
                },
            },
        };
        (code, number)
    }

    /// Does the transfers of an endpoint, as far as the device lets it.
    fn serve(&mut self, memory: &mut dyn Memory, number: usize, index: usize) {
        for _ in 0..MAX_WORK {
            let Some(slot) = self.slots[number].as_mut() else { return };
            let port = slot.port;
            let Some(endpoint) = slot.endpoint(index).filter(|endpoint| !endpoint.halted) else { return };
            let mut ring = endpoint.ring;
            let Some(td) = Td::take(memory, &mut ring) else { return };
            let Some(device) = self.devices.get_mut(port).and_then(Option::as_mut) else {
                // Nobody answers.
                endpoint.halted = true;
                return self.ended(memory, (number, index), &td, code::TRANSACTION, 0);
            };
            let address = (index / 2) as u8 | if index % 2 == 1 && index > 1 { 0x80 } else { 0 };
            let is_in = td.setup.map_or(address & 0x80 != 0, |setup| setup[0] & 0x80 != 0);
            let (mut data, mut moved) = endpoint.partial.take().unwrap_or_else(|| {
                let mut data = Vec::new();
                for (at, len) in td.buffers.iter().filter(|_| !is_in) {
                    let mut part = alloc::vec![0; *len];
                    memory.read(*at, &mut part);
                    data.append(&mut part);
                }
                data.resize(td.bytes(), 0);
                (data, 0)
            });
            let kind = td.setup.map_or(UsbTransferKind::Bulk, UsbTransferKind::Control);
            let Some(end) = usb_progress(&mut **device, kind, address, &mut data, false, &mut moved) else {
                endpoint.partial = Some((data, moved));
                return;
            };
            if end != UsbStatus::Done {
                endpoint.halted = true;
                let code = match end {
                    UsbStatus::Stall => code::STALL,
                    UsbStatus::Overflow => code::BABBLE,
                    _ => code::TRANSACTION,
                };
                return self.ended(memory, (number, index), &td, code, moved);
            }
            endpoint.ring = ring;
            let mut rest = &data[..moved.min(data.len())];
            for (at, len) in td.buffers.iter().filter(|_| is_in) {
                let (part, behind) = rest.split_at(rest.len().min(*len));
                memory.write(*at, part);
                rest = behind;
            }
            let short = is_in && moved < td.bytes();
            let code = if short { code::SHORT_PACKET } else { code::SUCCESS };
            self.ended(memory, (number, index), &td, code, moved);
        }
    }

    /// Tells how a transfer ended.
    fn ended(&mut self, memory: &mut dyn Memory, place: (usize, usize), td: &Td, code: u32, moved: usize) {
        let control = kind::TRANSFER_EVENT | (place.0 as u32) << 24 | (place.1 as u32) << 16;
        let mut tell = |parameter, length: usize, bits, code| {
            let status = length as u32 & 0xff_ffff | code << 24;
            self.tell(memory, td.target, Trb { parameter, status, control: control | bits });
        };
        if !matches!(code, code::SUCCESS | code::SHORT_PACKET) {
            let at = if td.data != 0 { td.data } else { td.status.unwrap_or(0) };
            return tell(at, td.bytes().saturating_sub(moved), 0, code);
        }
        if let Some(number) = td.event {
            tell(number, moved, bit::EVENT_DATA, code);
        }
        if let Some(status) = td.status {
            tell(status, 0, 0, code::SUCCESS);
        }
    }
}
