//! What a controller does wrong.

use super::{INTERRUPTERS, Memory, Model, PORTS, SLOTS};
use crate::regs::Status;
use crate::trb::{Trb, kind};
use alloc::vec::Vec;

/// A stream of bytes that decides what is done wrong, and when. Without bytes left nothing is.
pub struct Lies {
    bytes: Vec<u8>,
    at: usize,
    /// Ticks until the next one.
    wait: u32,
    /// The next event says something else: which field, and what.
    event: Option<(u8, u64)>,
    /// How often the next event comes: 0 is not at all.
    copies: usize,
    /// The next event has the wrong cycle bit.
    cycle: bool,
    /// The next reads of registers, how many and what.
    register: Option<(u8, u32)>,
    /// Does nothing for so many ticks.
    hold: u32,
}

impl Lies {
    /// Lies out of `bytes`; none at all out of none.
    pub fn new(bytes: &[u8]) -> Self {
        let (wait, hold) = (0, 0);
        let mut this = Self {
            bytes: bytes.to_vec(),
            at: 0,
            wait,
            event: None,
            copies: 1,
            cycle: false,
            register: None,
            hold,
        };
        this.wait = u32::from(this.u8()) * 16;
        this
    }

    pub(super) fn over(&self) -> bool {
        self.at >= self.bytes.len()
    }

    fn u8(&mut self) -> u8 {
        let byte = self.bytes.get(self.at).copied().unwrap_or(0);
        self.at = self.bytes.len().min(self.at + 1);
        byte
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    fn u64(&mut self) -> u64 {
        u64::from(self.u32()) | u64::from(self.u32()) << 32
    }

    fn below(&mut self, count: usize) -> usize {
        usize::from(self.u8()) % count.max(1)
    }

    /// Wrong capabilities, and a wrong configuration space.
    pub(super) fn about_itself(&mut self, capabilities: &mut [u32; 8], pci: &mut [u8]) {
        let how = self.u8();
        if how & 3 == 3 {
            for _ in 0..1 + (how >> 6) {
                let at = self.below(capabilities.len());
                capabilities[at] = self.u32();
            }
        }
        if how & 0xc == 0xc {
            for _ in 0..1 + (how >> 6) {
                let at = self.below(0x60);
                pci[at] = self.u8();
            }
        }
    }

    /// What an event says in the end, and how often.
    pub(super) fn about_event(&mut self, event: &mut Trb) -> usize {
        if let Some((field, value)) = self.event.take() {
            let put = |word: &mut u32, shift: u32, mask: u32| {
                *word = *word & !(mask << shift) | (value as u32 & mask) << shift;
            };
            match field % 8 {
                0 => event.parameter = value,
                1 => event.parameter ^= value & 0xffff,
                2 => put(&mut event.control, 24, 0xff),
                3 => put(&mut event.control, 16, 0x1f),
                4 => put(&mut event.status, 24, 0xff),
                5 => put(&mut event.status, 0, 0xff_ffff),
                6 => put(&mut event.control, 10, 0x3f),
                _ => event.control ^= 1 << 2,
            }
        }
        core::mem::replace(&mut self.copies, 1)
    }

    pub(super) fn about_cycle(&mut self) -> bool {
        core::mem::take(&mut self.cycle)
    }

    pub(super) fn about_register(&mut self, truth: u32) -> u32 {
        match &mut self.register {
            Some((times, value)) if *times > 0 => {
                *times -= 1;
                *value
            }
            _ => truth,
        }
    }

    pub(super) fn holds(&mut self) -> bool {
        self.hold = self.hold.saturating_sub(1);
        self.hold > 0
    }
}

impl Model {
    /// The next lie, if it is time.
    pub(super) fn lie(&mut self, memory: &mut dyn Memory) {
        if self.lies.over() {
            return;
        }
        if self.lies.wait > 0 {
            self.lies.wait -= 1;
            return;
        }
        let what = self.lies.u8();
        match what % 16 {
            0..=2 => self.lies.event = Some((self.lies.u8(), self.lies.u64())),
            3 => {
                // About nothing at all, or about what there is.
                let types =
                    [kind::TRANSFER_EVENT, kind::COMMAND_EVENT, kind::PORT_EVENT, u32::from(what >> 4) << 10];
                let kind = types[self.lies.below(types.len())];
                let (slot, endpoint) = (self.lies.below(SLOTS + 2) as u32, self.lies.below(32) as u32);
                let block = match self.slots.get_mut(slot as usize).and_then(Option::as_mut) {
                    Some(slot) => slot.endpoint(endpoint as usize).map_or(0, |endpoint| endpoint.ring.at),
                    None => self.commands.at,
                };
                let parameter = if what & 0x80 != 0 { self.lies.u64() } else { block };
                let status = self.lies.u32();
                let control = kind | slot << 24 | endpoint << 16 | u32::from(what & 0x40 != 0) << 2;
                let ring = self.lies.below(INTERRUPTERS);
                self.tell(memory, ring, Trb { parameter, status, control });
            }
            4 => self.lies.copies = self.lies.below(4),
            5 => self.lies.cycle = true,
            6 => {
                let value = if what & 0x80 != 0 { self.lies.u32() } else { u32::MAX };
                self.lies.register = Some((1 + (what >> 4 & 7), value));
            }
            7 => {
                // It stops, or fails; one that did may say that it runs again.
                let bits =
                    [Status::HALTED, Status::SYSTEM_ERROR, Status::CONTROLLER_ERROR, Status::NOT_READY];
                self.status ^= bits[self.lies.below(bits.len())].bits();
            }
            8 => {
                let port = self.lies.below(PORTS);
                self.ports[port] = self.lies.u32();
                if what & 0x80 != 0 {
                    self.port_event(memory, port);
                }
            }
            9 | 10 => {
                let port = self.lies.below(PORTS);
                self.change(memory, port);
            }
            11 => {
                // Somewhere near what both sides know.
                let slot = self.lies.below(SLOTS + 1);
                let places = [
                    self.contexts,
                    self.commands.at,
                    self.events[0].base + 16 * self.events[0].next,
                    super::read64(memory, self.contexts + 8 * slot as u64).unwrap_or(0),
                    self.slots[slot].as_mut().and_then(|slot| slot.endpoint(1)).map_or(0, |one| one.ring.at),
                ];
                let place = places[self.lies.below(places.len())];
                let at = place.wrapping_add(u64::from(self.lies.u8()) * 4);
                let bytes = self.lies.u32().to_le_bytes();
                memory.write(at, &bytes);
            }
            12 => self.lies.hold = u32::from(self.lies.u16()),
            13 => self.interrupt = true,
            14 => {
                // More events than there is room for.
                let event =
                    Trb { parameter: self.lies.u64(), status: self.lies.u32(), control: self.lies.u32() };
                for _ in 0..u32::from(what >> 4) * 128 {
                    self.tell(memory, 0, event);
                }
            }
            _ => {
                // Not where its registers are, which is looked at once.
                let at = 1 + self.lies.below(self.capabilities.len() - 1);
                self.capabilities[at] = self.lies.u32();
            }
        }
        let pause = self.lies.u8();
        self.lies.wait = u32::from(pause) * if pause & 1 == 0 { 1 } else { 32 };
    }
}
