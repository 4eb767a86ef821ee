//! Registers (xHCI 1.2, chapter 5 and 7) and how they are reached.

use hypercall::{Mmio, MmioRegion, Width};

/// Capability registers (5.3).
pub(crate) mod cap {
    pub(crate) const LENGTH: usize = 0x00;
    pub(crate) const VERSION: usize = 0x02;
    pub(crate) const STRUCTURAL_1: usize = 0x04;
    pub(crate) const STRUCTURAL_2: usize = 0x08;
    pub(crate) const CAPABILITY_1: usize = 0x10;
    pub(crate) const DOORBELLS: usize = 0x14;
    pub(crate) const RUNTIME: usize = 0x18;
    /// 64-byte contexts.
    pub(crate) const LARGE_CONTEXTS: u32 = 1 << 2;
}

/// Operational registers (5.4), from the end of the capability registers on.
pub(crate) mod op {
    pub(crate) const COMMAND: usize = 0x00;
    pub(crate) const STATUS: usize = 0x04;
    pub(crate) const PAGE_SIZE: usize = 0x08;
    pub(crate) const COMMAND_RING: usize = 0x18;
    pub(crate) const CONTEXTS: usize = 0x30;
    pub(crate) const CONFIG: usize = 0x38;
    pub(crate) const PORTS: usize = 0x400;
    pub(crate) const PORT_BYTES: usize = 0x10;
}

bitflags::bitflags! {
    /// USBCMD (5.4.1).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Command: u32 {
        const RUN = 1;
        const RESET = 1 << 1;
        const INTERRUPTS = 1 << 2;
    }

    /// USBSTS (5.4.2).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Status: u32 {
        const HALTED = 1;
        const SYSTEM_ERROR = 1 << 2;
        const EVENT = 1 << 3;
        const PORT_CHANGE = 1 << 4;
        const NOT_READY = 1 << 11;
        const CONTROLLER_ERROR = 1 << 12;
    }

    /// PORTSC (5.4.8).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Port: u32 {
        const CONNECTED = 1;
        /// Writing one disables it.
        const ENABLED = 1 << 1;
        const OVER_CURRENT = 1 << 3;
        const RESET = 1 << 4;
        const POWER = 1 << 9;
        const INDICATOR = 3 << 14;
        /// The link changes to the state that is written.
        const LINK_STROBE = 1 << 16;
        const CONNECT_CHANGE = 1 << 17;
        const WARM_RESET_CHANGE = 1 << 19;
        const RESET_CHANGE = 1 << 21;
        /// All bits that say what changed; writing ones clears them.
        const CHANGES = 0x7f << 17;
        const WAKE = 7 << 25;
        const WARM_RESET = 1 << 31;
        const _ = !0;
    }
}

impl Port {
    /// What to write so that nothing changes.
    pub(crate) fn kept(self) -> Self {
        self & (Self::POWER | Self::INDICATOR | Self::WAKE)
    }

    /// State of the link (5.4.8, PLS).
    pub(crate) fn link(self) -> u32 {
        self.bits() >> 5 & 0xf
    }

    /// What to write so that the link changes to `state` (PLS with LWS).
    pub(crate) fn to_link(state: u32) -> Self {
        Self::from_bits_retain(state << 5) | Self::LINK_STROBE
    }

    /// Protocol speed ID.
    pub(crate) fn speed(self) -> u32 {
        self.bits() >> 10 & 0xf
    }
}

/// States of a link (PLS).
pub(crate) mod link {
    pub(crate) const U0: u32 = 0;
    pub(crate) const U3: u32 = 3;
    pub(crate) const RESUME: u32 = 15;
}

/// PLS: Inactive and Compliance Mode, out of which only a warm reset leads.
pub(crate) const STUCK_LINKS: [u32; 2] = [6, 10];

/// Interrupter register sets (5.5.2), within the runtime registers.
pub(crate) mod interrupter {
    pub(crate) const FIRST: usize = 0x20;
    pub(crate) const BYTES: usize = 0x20;
    pub(crate) const MANAGEMENT: usize = 0x00;
    pub(crate) const MODERATION: usize = 0x04;
    pub(crate) const TABLE_SIZE: usize = 0x08;
    pub(crate) const TABLE: usize = 0x10;
    pub(crate) const DEQUEUE: usize = 0x18;
    pub(crate) const PENDING: u32 = 1;
    pub(crate) const ENABLE: u32 = 1 << 1;
    /// Event handler busy: writing one clears it, and the next event interrupts.
    pub(crate) const BUSY: u64 = 1 << 3;
}

/// Extended capabilities (7).
pub(crate) mod extended {
    pub(crate) const LEGACY: u32 = 1;
    pub(crate) const PROTOCOL: u32 = 2;
    pub(crate) const BIOS_OWNED: u32 = 1 << 16;
    pub(crate) const OS_OWNED: u32 = 1 << 24;
    /// System management interrupts: which are on, and what caused them (7.1.2).
    pub(crate) const SMI_KEPT: u32 = 0x001f_1fee;
    pub(crate) const SMI_CAUSES: u32 = 7 << 29;
}

/// A range of registers, with every access checked against what was mapped.
#[derive(Clone, Copy)]
pub(crate) struct Registers<H> {
    host: H,
    region: MmioRegion,
}

impl<H: Mmio> Registers<H> {
    pub(crate) fn new(host: H, region: MmioRegion) -> Self {
        Self { host, region }
    }

    /// The registers from `offset` on, at least `len` bytes.
    pub(crate) fn part(&self, offset: usize, len: usize) -> Option<Self>
    where
        H: Copy,
    {
        let rest = self.region.len().checked_sub(offset).filter(|rest| *rest >= len)?;
        Some(Self { host: self.host, region: self.region.part(offset, rest)? })
    }

    /// Reads as all ones outside, as an absent device does.
    pub(crate) fn read(&self, offset: usize) -> u32 {
        match self.region.holds(offset, Width::U32) {
            true => self.host.mmio_read(self.region, offset, Width::U32) as u32,
            false => u32::MAX,
        }
    }

    pub(crate) fn write(&self, offset: usize, value: u32) {
        if self.region.holds(offset, Width::U32) {
            self.host.mmio_write(self.region, offset, Width::U32, u64::from(value));
        }
    }

    /// A 64-bit register as two halves, low one first (5.1).
    pub(crate) fn write64(&self, offset: usize, value: u64) {
        self.write(offset, value as u32);
        self.write(offset + 4, (value >> 32) as u32);
    }
}
