//! A controller in memory, for tests and fuzzing: it keeps its side of the protocol (xHCI 1.2, chapter 4) for devices that
//! are [`UsbModel`]s, until its [`Lies`] say otherwise.
//!
//! [`Model`] is its registers, ports and event rings; `work` carries out commands and transfers, `lies` is what it does
//! wrong: events with wrong pointers, cycle bits, slots, codes and lengths, events that are doubled, lost or made up,
//! registers that change or lie, ports that come and go, a controller that stops or fails, and memory written to at random.
//!
//! It knows nothing of a host: whoever plays it lends it the memory that it shares with the driver ([`Memory`]), and calls
//! [`Model::tick`] between any two looks of the driver.

#![allow(clippy::indexing_slicing, reason = "a test that breaks may panic")]

mod lies;
mod work;

pub use lies::Lies;

use crate::regs::{Command, Port, Status, extended, interrupter, op};
use crate::trb::{Trb, bit, kind};
use alloc::boxed::Box;
use alloc::vec::Vec;
use hypercall::UsbSpeed;
use hypercall::testing::UsbModel;
use work::{Ring, Slot};

/// Bytes of the registers.
pub const REGISTER_BYTES: usize = 0x4000;
/// Ports: the first two are USB 2's, the others USB 3's.
pub const PORTS: usize = 4;
const SLOTS: usize = 8;
const INTERRUPTERS: usize = 2;
const OPERATIONAL: usize = 0x40;
const EXTENDED: usize = 0x800;
const RUNTIME: usize = 0x1000;
const DOORBELLS: usize = 0x2000;

/// The memory that driver and controller share, as the controller sees it.
pub trait Memory {
    /// Fills `to` from `at` on. `false`: not all of it is memory.
    fn read(&mut self, at: u64, to: &mut [u8]) -> bool;
    /// Writes `from` at `at`. `false`: not all of it is memory.
    fn write(&mut self, at: u64, from: &[u8]) -> bool;
}

#[derive(Debug, Clone, Copy, Default)]
struct EventRing {
    table: u64,
    dequeue: u64,
    management: u32,
    base: u64,
    blocks: u64,
    next: u64,
    cycle: bool,
}

/// The controller.
pub struct Model {
    lies: Lies,
    pci: Vec<u8>,
    bar: u32,
    /// From offset 0 on.
    capabilities: [u32; 8],
    command: u32,
    status: u32,
    commands: Ring,
    /// Low half of the command ring's register, until the high one is written.
    command_low: u32,
    rung: bool,
    contexts: u64,
    ports: [u32; PORTS],
    devices: [Option<Box<dyn UsbModel>>; PORTS],
    unplugged: [Option<Box<dyn UsbModel>>; PORTS],
    events: [EventRing; INTERRUPTERS],
    slots: [Option<Slot>; SLOTS + 1],
    interrupt: bool,
    ticks: u32,
    link_states: Vec<u32>,
}

impl Model {
    /// A controller without devices, whose registers are at `bar`, of [`REGISTER_BYTES`] bytes.
    pub fn new(bar: u32, mut lies: Lies) -> Self {
        let mut pci = alloc::vec![0; 256];
        let mut put = |at: usize, value: u32| pci[at..at + 4].copy_from_slice(&value.to_le_bytes());
        put(0x00, 0x000d_1b36);
        put(0x08, 0x0c03_3001);
        put(0x10, bar);
        put(0x3c, 0x0105);
        let mut capabilities = [
            0x0110_0000 | OPERATIONAL as u32,
            SLOTS as u32 | (INTERRUPTERS as u32) << 8 | (PORTS as u32) << 24,
            // One page for itself.
            1 << 27,
            0,
            (EXTENDED as u32 / 4) << 16,
            DOORBELLS as u32,
            RUNTIME as u32,
            0,
        ];
        lies.about_itself(&mut capabilities, &mut pci);
        Self {
            lies,
            pci,
            bar,
            capabilities,
            command: 0,
            status: Status::HALTED.bits(),
            commands: Ring::default(),
            command_low: 0,
            rung: false,
            contexts: 0,
            ports: [Port::POWER.bits(); PORTS],
            devices: [const { None }; PORTS],
            unplugged: [const { None }; PORTS],
            events: [EventRing::default(); INTERRUPTERS],
            slots: [const { None }; SLOTS + 1],
            interrupt: false,
            ticks: 0,
            link_states: Vec::new(),
        }
    }

    /// Plugs a device in to port `port`, counted from 0, before the driver starts.
    pub fn plug(&mut self, port: usize, model: impl UsbModel + 'static) {
        self.devices[port] = Some(Box::new(model));
        self.connect(port);
    }

    /// Whether it says where its registers are. One that does not cannot be halted, so its driver leaves memory to it.
    pub fn can_be_halted(&self) -> bool {
        self.capabilities[0] & 0xff == OPERATIONAL as u32
    }

    /// Whether it has told its last lie.
    pub fn is_honest(&self) -> bool {
        self.lies.over()
    }

    /// Whether it wants to interrupt, since the last time.
    pub fn interrupt(&mut self) -> bool {
        core::mem::take(&mut self.interrupt)
    }

    /// Its configuration space.
    pub fn pci(&mut self) -> &mut [u8] {
        &mut self.pci
    }

    /// Its configuration space is written.
    pub fn pci_write(&mut self, at: usize, bytes: &[u8]) {
        if at == 0x10 && bytes == u32::MAX.to_le_bytes() {
            let mask = !(REGISTER_BYTES as u32 - 1);
            self.pci[0x10..0x14].copy_from_slice(&mask.to_le_bytes());
        } else if at == 0x10 {
            self.pci[0x10..0x14].copy_from_slice(&self.bar.to_le_bytes());
        } else if let Some(place) = self.pci.get_mut(at..at + bytes.len())
            && at == 4
        {
            place.copy_from_slice(bytes);
        }
    }

    /// Puts the link of a port into a state (PORTSC's PLS), as its device or the firmware does.
    pub fn set_link(&mut self, memory: &mut dyn Memory, port: usize, state: u32) {
        self.ports[port] = self.ports[port] & !(15 << 5) | state << 5 | 1 << 22;
        self.port_event(memory, port);
    }

    /// The states that the driver had links change to.
    pub fn link_states(&self) -> &[u32] {
        &self.link_states
    }

    fn connect(&mut self, port: usize) {
        let Some(device) = &self.devices[port] else { return };
        let (speed, enabled) = match device.speed() {
            UsbSpeed::Low => (2, false),
            UsbSpeed::Full => (1, false),
            UsbSpeed::High => (3, false),
            _ => (4, true),
        };
        let mut state = Port::POWER | Port::CONNECTED | Port::CONNECT_CHANGE;
        if enabled {
            state |= Port::ENABLED;
        }
        self.ports[port] = state.bits() | speed << 10;
    }

    /// Somebody pulls the device of a port out, or plugs it in again.
    fn change(&mut self, memory: &mut dyn Memory, port: usize) {
        if let Some(device) = self.unplugged[port].take() {
            self.devices[port] = Some(device);
            self.connect(port);
        } else {
            self.unplugged[port] = self.devices[port].take();
            self.ports[port] = (Port::POWER | Port::CONNECT_CHANGE).bits();
        }
        self.port_event(memory, port);
    }

    fn port_event(&mut self, memory: &mut dyn Memory, port: usize) {
        let number = port as u64 + 1;
        let event = Trb { parameter: number << 24, status: 1 << 24, control: kind::PORT_EVENT };
        self.tell(memory, 0, event);
    }

    fn running(&self) -> bool {
        self.command & Command::RUN.bits() != 0 && self.status & Status::HALTED.bits() == 0
    }

    /// Puts an event on a ring, if it has room.
    fn tell(&mut self, memory: &mut dyn Memory, ring: usize, mut event: Trb) {
        let copies = self.lies.about_event(&mut event);
        for _ in 0..copies {
            let flip = self.lies.about_cycle();
            let Some(ring) = self.events.get_mut(ring).filter(|ring| ring.blocks > 0) else { return };
            let behind = (ring.next + 1) % ring.blocks;
            if ring.base + 16 * behind == ring.dequeue & !0xf {
                return;
            }
            let cycle = ring.cycle != flip;
            write_trb(memory, ring.base + 16 * ring.next, event, cycle);
            ring.next = behind;
            ring.cycle ^= behind == 0;
            self.interrupt |= ring.management & interrupter::ENABLE != 0;
        }
    }

    /// What the driver reads.
    pub fn read(&mut self, offset: usize) -> u32 {
        let value = self.register(offset);
        let mut said = self.lies.about_register(value);
        if offset == OPERATIONAL + op::STATUS && self.command & Command::RUN.bits() == 0 {
            // One that does not halt may use memory for ever, which the driver then leaves to it: no test of leaks could tell.
            said |= Status::HALTED.bits();
        }
        said
    }

    fn register(&self, offset: usize) -> u32 {
        let port = offset.wrapping_sub(OPERATIONAL + op::PORTS);
        let ring = offset.wrapping_sub(RUNTIME + interrupter::FIRST);
        if let Some(value) = self.capabilities.get(offset / 4) {
            return *value;
        }
        if port / op::PORT_BYTES < PORTS {
            return if port.is_multiple_of(op::PORT_BYTES) { self.ports[port / op::PORT_BYTES] } else { 0 };
        }
        if let Some(ring) = self.events.get(ring / interrupter::BYTES) {
            return if offset.is_multiple_of(interrupter::BYTES) { ring.management } else { 0 };
        }
        const PROTOCOL: u32 = extended::PROTOCOL;
        match offset {
            _ if offset == OPERATIONAL + op::COMMAND => self.command,
            _ if offset == OPERATIONAL + op::STATUS => self.status,
            _ if offset == OPERATIONAL + op::PAGE_SIZE => 1,
            // Two of USB 2 from port 1 on, two of USB 3 from port 3 on.
            EXTENDED => PROTOCOL | 4 << 8 | 0x0200 << 16,
            0x808 => 1 | 2 << 8,
            0x810 => PROTOCOL | 0x0300 << 16,
            0x818 => 3 | 2 << 8,
            _ => 0,
        }
    }

    /// What the driver writes.
    pub fn write(&mut self, memory: &mut dyn Memory, offset: usize, value: u32) {
        let port = offset.wrapping_sub(OPERATIONAL + op::PORTS);
        let ring = offset.wrapping_sub(RUNTIME + interrupter::FIRST);
        let slot = offset.wrapping_sub(DOORBELLS) / 4;
        if port / op::PORT_BYTES < PORTS {
            if port.is_multiple_of(op::PORT_BYTES) {
                self.write_port(memory, port / op::PORT_BYTES, value);
            }
        } else if ring / interrupter::BYTES < INTERRUPTERS {
            self.write_interrupter(memory, ring / interrupter::BYTES, ring % interrupter::BYTES, value);
        } else if offset >= DOORBELLS && slot <= SLOTS {
            match &mut self.slots[slot] {
                Some(slot) => slot.ring(value as usize & 31),
                None => self.rung |= slot == 0,
            }
        } else {
            self.write_operational(offset.wrapping_sub(OPERATIONAL), value);
        }
    }

    fn write_operational(&mut self, offset: usize, value: u32) {
        let high = |low: u64| low & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            op::COMMAND if value & Command::RESET.bits() != 0 => {
                self.command = 0;
                self.status = Status::HALTED.bits();
                self.slots = [const { None }; SLOTS + 1];
                self.events = [EventRing::default(); INTERRUPTERS];
            }
            op::COMMAND => {
                self.command = value;
                match value & Command::RUN.bits() {
                    0 => self.status |= Status::HALTED.bits(),
                    _ => self.status &= !Status::HALTED.bits(),
                }
            }
            op::STATUS => self.status &= !(value & (Status::EVENT | Status::PORT_CHANGE).bits()),
            op::COMMAND_RING => self.command_low = value,
            0x1c => {
                let at = u64::from(self.command_low & !0x3f) | u64::from(value) << 32;
                self.commands = Ring { at, cycle: self.command_low & 1 != 0 };
            }
            op::CONTEXTS => self.contexts = u64::from(value),
            0x34 => self.contexts = high(self.contexts),
            _ => {}
        }
    }

    fn write_interrupter(&mut self, memory: &mut dyn Memory, index: usize, offset: usize, value: u32) {
        let ring = &mut self.events[index];
        let high = |low: u64| low & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            interrupter::MANAGEMENT => ring.management = value & interrupter::ENABLE,
            interrupter::TABLE => ring.table = u64::from(value),
            0x14 => {
                ring.table = high(ring.table);
                let mut entry = [0; 16];
                if memory.read(ring.table & !0x3f, &mut entry) {
                    let word = |at: usize| u64::from_le_bytes(*entry[at..].first_chunk().unwrap_or(&[0; 8]));
                    (ring.base, ring.blocks, ring.next, ring.cycle) = (word(0), word(8) & 0xffff, 0, true);
                }
            }
            interrupter::DEQUEUE => ring.dequeue = ring.dequeue & !0xffff_ffff | u64::from(value),
            0x1c => ring.dequeue = high(ring.dequeue),
            _ => {}
        }
    }

    fn write_port(&mut self, memory: &mut dyn Memory, port: usize, value: u32) {
        let (written, mut state) = (Port::from_bits_retain(value), Port::from_bits_retain(self.ports[port]));
        state &= !(written & Port::CHANGES);
        if written.contains(Port::ENABLED) {
            state &= !Port::ENABLED;
        }
        if written.contains(Port::LINK_STROBE) {
            self.link_states.push(written.link());
            state = Port::from_bits_retain(state.bits() & !(15 << 5) | written.link() << 5);
        }
        let reset = written.intersects(Port::RESET | Port::WARM_RESET);
        if reset && let Some(device) = &mut self.devices[port] {
            device.bus_reset();
            state |= Port::ENABLED | Port::RESET_CHANGE;
        }
        self.ports[port] = state.bits();
        if reset {
            self.port_event(memory, port);
        }
    }

    /// Time passes: it does what it was asked for, and what its lies have it do.
    pub fn tick(&mut self, memory: &mut dyn Memory) {
        self.lie(memory);
        if self.running() && !self.lies.holds() {
            self.work(memory);
        }
    }
}

fn read64(memory: &mut dyn Memory, at: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    memory.read(at, &mut bytes).then(|| u64::from_le_bytes(bytes))
}

fn read_trb(memory: &mut dyn Memory, at: u64) -> Option<Trb> {
    let mut bytes = [0; 16];
    if !memory.read(at, &mut bytes) {
        return None;
    }
    let word = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().unwrap_or(&[0; 4]));
    let parameter = u64::from(word(0)) | u64::from(word(4)) << 32;
    Some(Trb { parameter, status: word(8), control: word(12) })
}

fn write_trb(memory: &mut dyn Memory, at: u64, block: Trb, cycle: bool) {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&block.parameter.to_le_bytes());
    bytes[8..12].copy_from_slice(&block.status.to_le_bytes());
    let control = block.control & !bit::CYCLE | u32::from(cycle);
    bytes[12..].copy_from_slice(&control.to_le_bytes());
    memory.write(at, &bytes);
}
