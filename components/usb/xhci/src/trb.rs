//! Transfer request blocks (xHCI 1.2, 6.4) and completion codes (6.4.5).

/// Bytes of a block.
pub(crate) const BYTES: usize = 16;

/// No block of a transfer may cross such a boundary (6.4.1).
pub(crate) const BOUNDARY: u64 = 1 << 16;

/// A block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Trb {
    pub(crate) parameter: u64,
    pub(crate) status: u32,
    pub(crate) control: u32,
}

/// Types (6.4.6), as they stand in `control`.
pub(crate) mod kind {
    pub(crate) const MASK: u32 = 0x3f << 10;
    pub(crate) const NORMAL: u32 = 1 << 10;
    pub(crate) const SETUP: u32 = 2 << 10;
    pub(crate) const DATA: u32 = 3 << 10;
    pub(crate) const STATUS: u32 = 4 << 10;
    pub(crate) const LINK: u32 = 6 << 10;
    pub(crate) const EVENT_DATA: u32 = 7 << 10;
    pub(crate) const NO_OP: u32 = 8 << 10;
    pub(crate) const ENABLE_SLOT: u32 = 9 << 10;
    pub(crate) const DISABLE_SLOT: u32 = 10 << 10;
    pub(crate) const ADDRESS_DEVICE: u32 = 11 << 10;
    pub(crate) const CONFIGURE_ENDPOINT: u32 = 12 << 10;
    pub(crate) const EVALUATE_CONTEXT: u32 = 13 << 10;
    pub(crate) const RESET_ENDPOINT: u32 = 14 << 10;
    pub(crate) const STOP_ENDPOINT: u32 = 15 << 10;
    pub(crate) const SET_DEQUEUE: u32 = 16 << 10;
    pub(crate) const RESET_DEVICE: u32 = 17 << 10;
    pub(crate) const TRANSFER_EVENT: u32 = 32 << 10;
    pub(crate) const COMMAND_EVENT: u32 = 33 << 10;
    pub(crate) const PORT_EVENT: u32 = 34 << 10;
}

/// Bits of `control`.
pub(crate) mod bit {
    pub(crate) const CYCLE: u32 = 1 << 0;
    /// Link: the cycle bit turns over behind it.
    pub(crate) const TOGGLE: u32 = 1 << 1;
    /// The next block is looked at before the endpoint is left.
    pub(crate) const EVALUATE_NEXT: u32 = 1 << 1;
    /// Transfer event: `parameter` is that of an event data block.
    pub(crate) const EVENT_DATA: u32 = 1 << 2;
    pub(crate) const CHAIN: u32 = 1 << 4;
    pub(crate) const INTERRUPT: u32 = 1 << 5;
    /// The data is in `parameter` itself.
    pub(crate) const IMMEDIATE: u32 = 1 << 6;
    /// Data and status stage: to the host.
    pub(crate) const IN: u32 = 1 << 16;
    /// Setup stage: a data stage follows, to the device or to the host.
    pub(crate) const DATA_OUT: u32 = 2 << 16;
    pub(crate) const DATA_IN: u32 = 3 << 16;
}

/// Completion codes (6.4.5).
pub(crate) mod code {
    pub(crate) const SUCCESS: u32 = 1;
    pub(crate) const BABBLE: u32 = 3;
    pub(crate) const TRANSACTION: u32 = 4;
    pub(crate) const STALL: u32 = 6;
    pub(crate) const RESOURCE: u32 = 7;
    pub(crate) const BANDWIDTH: u32 = 8;
    pub(crate) const NO_SLOTS: u32 = 9;
    pub(crate) const SLOT_NOT_ENABLED: u32 = 11;
    pub(crate) const SHORT_PACKET: u32 = 13;
    pub(crate) const RING_UNDERRUN: u32 = 14;
    pub(crate) const RING_OVERRUN: u32 = 15;
    pub(crate) const PARAMETER: u32 = 17;
    pub(crate) const STOPPED: u32 = 26;
    pub(crate) const STOPPED_LENGTH_INVALID: u32 = 27;
    pub(crate) const STOPPED_SHORT_PACKET: u32 = 28;
    pub(crate) const SECONDARY_BANDWIDTH: u32 = 35;
}

impl Trb {
    /// A command for a slot (bits 24 to 31) and perhaps an endpoint (bits 16 to 20).
    pub(crate) fn command(kind: u32, slot: u8, endpoint: u8, parameter: u64) -> Self {
        Self { parameter, status: 0, control: kind | u32::from(slot) << 24 | u32::from(endpoint) << 16 }
    }

    /// Its type.
    pub(crate) fn kind(&self) -> u32 {
        self.control & kind::MASK
    }

    /// Of an event: how it went.
    pub(crate) fn code(&self) -> u32 {
        self.status >> 24
    }

    /// Of an event: the slot.
    pub(crate) fn slot(&self) -> u8 {
        (self.control >> 24) as u8
    }

    /// Of a transfer event: the endpoint, as its index in the device context.
    pub(crate) fn endpoint(&self) -> u8 {
        (self.control >> 16) as u8 & 0x1f
    }

    /// Bytes that a data block moves.
    pub(crate) fn data_len(&self) -> usize {
        match self.kind() {
            kind::NORMAL | kind::DATA => (self.status & 0x1_ffff) as usize,
            _ => 0,
        }
    }
}
