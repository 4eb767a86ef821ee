//! What a host controller is to the stack: the trait that an xHCI driver implements.
//!
//! A controller moves packets and keeps the state of endpoints; it never enumerates, retries or times anything out:
//! that is the stack's. Nothing here blocks. A call starts something and returns; what became of it comes out of
//! [`HostController::poll`] as an [`Event`]. Owned by one stack, which calls it under a lock from whichever thread needs
//! it.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

pub use hypercall::{UsbSpeed as Speed, UsbStatus as Status};

/// Names a device that the controller holds, from [`Outcome::Attached`] until it is detached. The controller chooses the
/// numbers (xHCI: the slot ID).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

/// A port of the root hub, numbered from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootPort(pub u8);

/// What a controller is. Constant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControllerInfo {
    /// For people: `xhci 0000:00:04.0`.
    pub name: String,
    /// How many root ports there are. Those of USB 2 and of USB 3 are ports of their own, also where they share a socket.
    pub ports: u8,
    /// Most devices that it can hold at once, hubs included.
    pub max_slots: u32,
    /// Most bytes that one transfer may carry; at least 65,536.
    pub max_transfer_bytes: usize,
    /// Most buffers that one transfer may be spread over; at least 1.
    pub max_buffers: usize,
}

/// State of a root port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PortStatus {
    /// Something is plugged in.
    pub connected: bool,
    /// Its device can be spoken to. A USB 3 port gets there by itself once something is plugged in; a USB 2 port by a
    /// reset.
    pub enabled: bool,
    /// A reset is going on.
    pub resetting: bool,
    /// The port has power.
    pub powered: bool,
    /// The port was switched off because it drew too much current.
    pub over_current: bool,
    /// A USB 3 port (root hub of its own, no reset needed to enable it).
    pub super_speed: bool,
    /// A USB 3 port whose link is stuck (xHCI: Inactive or Compliance Mode): a warm reset helps.
    pub needs_warm_reset: bool,
    /// The link sleeps (U3), or its device is waking it (Resume). The stack puts none to sleep; a firmware may have.
    pub suspended: bool,
    /// Speed of the device. `None` while that is not known: always known once `enabled`.
    pub speed: Option<Speed>,
    /// `connected` changed (perhaps twice) since [`PortAction::ClearChanges`].
    pub connect_changed: bool,
    /// A reset ended since then.
    pub reset_changed: bool,
}

/// What can be done with a root port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortAction {
    /// Switches power on.
    PowerOn,
    /// Starts a reset; its end is a change of the port. The stack holds one at a time per controller.
    Reset,
    /// The same for a USB 3 port with its link trained anew. As [`PortAction::Reset`] on others.
    WarmReset,
    /// Disables the port until it is reset or something is plugged in anew.
    Disable,
    /// Begins to wake a link that sleeps; [`PortAction::Resumed`] is to follow 20 ms later (USB 2.0, 7.1.7.7).
    Resume,
    /// The link is awake from now on.
    Resumed,
    /// Forgets what changed so far.
    ClearChanges,
}

/// Where a device is plugged in, as far as the controller must know it (xHCI 1.2, 6.2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The root port under which it is.
    pub root_port: RootPort,
    /// Port numbers of the hubs on the way, 4 bits each, that nearest to the root port lowest; 0: at the root port itself (USB 3.2, 8.9).
    /// A number above 15 is 15 here.
    pub route: u32,
    /// Speed of the device.
    pub speed: Speed,
    /// For a low or full speed device behind a high speed hub: that hub and its port, for split transactions.
    pub translator: Option<Translator>,
}

/// A high speed hub that speaks full or low speed to a device (USB 2.0, 11.14).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translator {
    /// The hub.
    pub hub: Slot,
    /// Its port on the way to the device.
    pub port: u8,
    /// It has a translator for each port, and these are in use.
    pub multiple: bool,
}

/// What the controller must know of a hub (xHCI 1.2, 6.2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HubSpec {
    /// How many ports it has.
    pub ports: u8,
    /// Think time of its translator in units of 8 full speed bit times, less one: bits 5 and 6 of `wHubCharacteristics`.
    pub think_time: u8,
    /// Each port has a translator of its own.
    pub multiple_translators: bool,
}

/// Kinds of endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EndpointKind {
    /// Endpoint 0, and in theory others.
    Control,
    /// Isochronous: never configured by this stack.
    Isochronous,
    /// Bulk.
    Bulk,
    /// Interrupt.
    Interrupt,
}

/// An endpoint that is to be set up. Checked: within what the specification allows for the speed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndpointSpec {
    /// `bEndpointAddress`: number 1 to 15 in bits 0 to 3, bit 7 set for IN.
    pub address: u8,
    /// Bulk or interrupt.
    pub kind: EndpointKind,
    /// Bytes per packet: bits 0 to 10 of `wMaxPacketSize`. 1 to 1024.
    pub max_packet: u16,
    /// Transactions per microframe beyond the first (high speed interrupt: bits 11 and 12 of `wMaxPacketSize`): 0 to 2.
    pub additional: u8,
    /// Packets per burst beyond the first (SuperSpeed companion, `bMaxBurst`): 0 to 15.
    pub max_burst: u8,
    /// Bytes per service interval of a SuperSpeed interrupt endpoint (companion, `wBytesPerInterval`); 0 for others.
    pub bytes_per_interval: u16,
    /// `bInterval` as the descriptor has it, made to fit the speed: 1 to 255 frames for low and full speed interrupt
    /// endpoints, 1 to 16 (2^(n-1) microframes) from high speed on; 0 for bulk.
    pub interval: u8,
}

/// What a controller can be told to do. Each command ends with one [`Event::Command`], in any order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Takes in the device that answers at address 0 now and gives it an address (SET_ADDRESS is the controller's; the stack waits
    /// afterwards). Endpoint 0 can then be used. Ends with [`Outcome::Attached`]; failed, it leaves nothing behind.
    Attach {
        /// Where the device is.
        place: Place,
        /// Packet size of endpoint 0 until told otherwise: 8, 64 or 512, by the speed.
        max_packet: u16,
    },
    /// Endpoint 0 of the device has packets of another size, as its descriptor says: 8, 16, 32 or 64.
    SetMaxPacket {
        /// Which device.
        slot: Slot,
        /// Bytes.
        max_packet: u16,
    },
    /// Forgets the endpoints in `remove`, with their transfers in flight (which complete as cancelled), then sets those in `add` up,
    /// with data toggles and sequence numbers 0. Failed, for lack of bandwidth say, it changes nothing.
    Configure {
        /// Which device.
        slot: Slot,
        /// Addresses of endpoints that were set up before.
        remove: Vec<u8>,
        /// New ones.
        add: Vec<EndpointSpec>,
        /// The device is a hub.
        hub: Option<HubSpec>,
    },
    /// Ends the halt of an endpoint in the controller, with data toggle and sequence number 0; the stack tells the device. Also
    /// good for one that is not halted and has nothing in flight.
    ResetEndpoint {
        /// Which device.
        slot: Slot,
        /// Which endpoint.
        endpoint: u8,
    },
    /// The port of the device was just reset: it is at address 0 again. Forgets its endpoints (transfers in flight complete
    /// as cancelled) and gives it an address anew. The slot stays.
    Readdress {
        /// Which device.
        slot: Slot,
        /// Packet size of endpoint 0.
        max_packet: u16,
    },
    /// The device is gone or given up. Transfers in flight complete as [`Status::Gone`], before this command does. Does not
    /// fail.
    Detach {
        /// Which device.
        slot: Slot,
    },
}

/// What came of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Of [`Command::Attach`].
    Attached {
        /// The device's name from now on.
        slot: Slot,
        /// Its address on the bus, 1 to 127.
        address: u8,
    },
    /// Of all others.
    Done,
}

/// Why a command failed, or a call was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ControllerError {
    /// The transfer ring or command ring is full: something completes first, then try again.
    Full,
    /// No memory.
    NoMemory,
    /// No slot left for a device.
    NoSlot,
    /// No bandwidth left for these endpoints.
    NoBandwidth,
    /// No such slot, port or endpoint, wrong kind or direction, too large.
    Invalid,
    /// The endpoint is halted: [`Command::ResetEndpoint`] first.
    Halted,
    /// The device did not answer, or with garbage, while it was given an address.
    NoAnswer,
    /// The controller is gone or broke: nothing works any more.
    Dead,
}

impl core::fmt::Display for ControllerError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Full => "the host controller's ring is full",
            Self::NoMemory => "out of memory",
            Self::NoSlot => "the host controller holds no more devices",
            Self::NoBandwidth => "no bandwidth left on the bus",
            Self::Invalid => "the host controller refuses it",
            Self::Halted => "the endpoint is halted",
            Self::NoAnswer => "it does not answer",
            Self::Dead => "the host controller is dead",
        })
    }
}

impl core::error::Error for ControllerError {}

/// Names a command in flight. The stack chooses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CommandTag(pub u64);

/// Names a transfer in flight. The stack chooses it; no two in flight on one controller are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// A transfer: goes in with its buffers and comes back with them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    /// Chosen by the stack.
    pub token: Token,
    /// Which device.
    pub slot: Slot,
    /// `bEndpointAddress`; 0 for control transfers.
    pub endpoint: u8,
    /// The eight bytes of a control transfer's setup stage. `wLength` is the sum of the buffers' lengths, and bit 7 of the
    /// first byte their direction.
    pub setup: Option<[u8; 8]>,
    /// Scatter list. OUT: what is sent. IN: room for what is received. All of it is one transfer: a packet may cross from one
    /// buffer to the next. Any alignment.
    pub data: Vec<Box<[u8]>>,
    /// OUT: end with an empty packet if the length is a multiple of the packet size.
    pub zero_packet: bool,
}

impl Transfer {
    /// Sum of the buffers' lengths.
    pub fn len(&self) -> usize {
        self.data.iter().map(|buffer| buffer.len()).sum()
    }

    /// Whether it carries no data.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether data goes to the host.
    pub fn is_in(&self) -> bool {
        match self.setup {
            Some([request_type, ..]) => request_type & 0x80 != 0,
            None => self.endpoint & 0x80 != 0,
        }
    }
}

/// A transfer that was not accepted, with its buffers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// As it was.
    pub transfer: Transfer,
    /// Why.
    pub error: ControllerError,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Something about a root port changed: look at its status. May come for nothing.
    Port(RootPort),
    /// A command is over.
    Command {
        /// Which.
        tag: CommandTag,
        /// What came of it.
        result: Result<Outcome, ControllerError>,
    },
    /// A transfer is over.
    Transfer {
        /// As it was submitted, with what was received in its buffers.
        transfer: Transfer,
        /// Bytes that were moved, at most the buffers' length.
        actual: usize,
        /// How it ended.
        status: Status,
    },
    /// The controller broke, with one line about how. It has reset itself; every transfer and command in flight completes
    /// (as gone, dead) right after this.
    Dead(&'static str),
}

/// A host controller.
///
/// Rules for transfers: one that was accepted comes back as exactly one [`Event::Transfer`], whatever happens to device,
/// port and controller; one that was refused comes back at once. Those of an endpoint are done in the order of their
/// submission, and many may be in flight. A short IN packet ends its transfer as [`Status::Done`], and the next one begins.
///
/// When one fails (STALL, babble, error) the controller stops the endpoint: the others of that endpoint complete as
/// [`Status::Cancelled`] after it, and new ones are refused as [`ControllerError::Halted`] until
/// [`Command::ResetEndpoint`]. Endpoint 0 alone recovers by itself: a failed control transfer leaves it ready for the next.
pub trait HostController: Send {
    /// What it is.
    fn info(&self) -> &ControllerInfo;

    /// State of a root port as it is now; of a port that is not there, all false. Context: thread. Never blocks.
    fn port_status(&mut self, port: RootPort) -> PortStatus;

    /// Starts something with a root port. Nothing happens with a port that is not there. Context: thread. Never blocks.
    fn port_action(&mut self, port: RootPort, action: PortAction);

    /// Starts a command. Errors: [`ControllerError::Full`], [`ControllerError::Dead`]; whatever else is wrong with it shows
    /// when it ends. Context: thread. Never blocks.
    fn command(&mut self, tag: CommandTag, command: Command) -> Result<(), ControllerError>;

    /// Starts a transfer. It may wait for [`HostController::flush`] before the device sees it. Errors: [`ControllerError::Full`], [`ControllerError::Invalid`],
    /// [`ControllerError::Halted`], [`ControllerError::NoMemory`], [`ControllerError::Dead`]. Context: thread. Never blocks.
    fn submit(&mut self, transfer: Transfer) -> Result<(), Box<Refused>>;

    /// Tells the device about everything submitted since the last flush: one doorbell for an endpoint and batch.
    fn flush(&mut self);

    /// Asks that a transfer end soon; it completes as [`Status::Cancelled`], or as it ended before that. Those queued behind it
    /// on its endpoint go on. Nothing happens if it is over. Context: thread. Never blocks.
    fn cancel(&mut self, token: Token);

    /// Looks for what happened and appends it to `events`, in order. Bounded by what can be in flight. Context: thread.
    /// Never blocks.
    fn poll(&mut self, events: &mut VecDeque<Event>);

    /// Asks that the controller's signal be raised at the next event, before the caller sleeps. `true`: something is there
    /// already (poll on).
    fn arm(&mut self) -> bool;
}
