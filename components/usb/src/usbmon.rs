//! What goes over the bus as a capture: usbmon's binary form with 64 bytes of header (`LINKTYPE_USB_LINUX_MMAPPED`, 220), in a
//! classic pcap file, as Wireshark reads it.
//!
//! Layout: <https://www.tcpdump.org/linktypes/LINKTYPE_USB_LINUX_MMAPPED.html> and Linux, Documentation/usb/usbmon.rst.

use crate::controller::{Slot, Status, Transfer};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use hypercall::UsbPath;

/// The link type of the packets.
pub const LINKTYPE: u32 = 220;
/// Length of the header of a packet.
pub const HEADER_LEN: usize = 64;
/// Data beyond this is cut.
pub const SNAP_LEN: u32 = 256 << 10;

/// The 24 bytes with which a capture file begins (pcap, microseconds, little-endian).
pub fn file_header() -> [u8; 24] {
    let mut header = [0; 24];
    let words = [0xa1b2_c3d4u32, 2 | 4 << 16, 0, 0, SNAP_LEN + HEADER_LEN as u32, LINKTYPE];
    let bytes = words.iter().flat_map(|word| word.to_le_bytes());
    header.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    header
}

/// What a packet is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Submitted.
    Submit,
    /// Over.
    Complete,
    /// Not accepted.
    Refused,
}

/// Linux's error numbers, as URBs have them.
fn status_number(status: Status) -> i32 {
    match status {
        Status::Done => 0,
        Status::Stall => -32,
        Status::Overflow => -75,
        Status::Cancelled => -104,
        Status::Gone => -108,
        _ => -71,
    }
}

/// One packet with its record header, as it stands in a file. `moved`: bytes that a completed transfer moved.
pub fn record(
    kind: Kind,
    realtime_ns: u64,
    transfer: &Transfer,
    (bus, address): (u8, u8),
    transfer_kind: u8,
    moved: usize,
    status: Status,
) -> Vec<u8> {
    let is_in = transfer.is_in();
    let with_data = matches!((kind, is_in), (Kind::Submit, false) | (Kind::Complete, true));
    let len = if kind == Kind::Complete { moved } else { transfer.len() };
    let captured = if with_data { len.min(SNAP_LEN as usize) } else { 0 };
    let micros = realtime_ns / 1000;
    let (seconds, rest) = (micros / 1_000_000, micros % 1_000_000);
    let mut bytes = Vec::new();
    if bytes.try_reserve_exact(16 + HEADER_LEN + captured).is_err() {
        return bytes;
    }
    let total = (HEADER_LEN + captured) as u32;
    let original = (HEADER_LEN + if with_data { len } else { 0 }) as u32;
    for word in [seconds as u32, rest as u32, total, original] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(&transfer.token.0.to_le_bytes());
    bytes.push(match kind {
        Kind::Submit => b'S',
        Kind::Complete => b'C',
        Kind::Refused => b'E',
    });
    let direction = if is_in { 0x80 } else { 0 };
    bytes.extend_from_slice(&[transfer_kind, transfer.endpoint & 0x0f | direction, address]);
    bytes.extend_from_slice(&u16::from(bus).to_le_bytes());
    let has_setup = kind == Kind::Submit && transfer.setup.is_some();
    bytes.push(if has_setup { 0 } else { b'-' });
    // Why there is no data, if there is none.
    bytes.push(match (with_data, is_in) {
        (true, _) => 0,
        (false, true) => b'<',
        (false, false) => b'>',
    });
    bytes.extend_from_slice(&seconds.to_le_bytes());
    bytes.extend_from_slice(&(rest as u32).to_le_bytes());
    let number = match kind {
        Kind::Submit => -115,
        Kind::Complete => status_number(status),
        Kind::Refused => -5,
    };
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(&(len as u32).to_le_bytes());
    bytes.extend_from_slice(&(captured as u32).to_le_bytes());
    bytes.extend_from_slice(&if has_setup { transfer.setup.unwrap_or_default() } else { [0; 8] });
    // Interval, start frame, flags, number of isochronous descriptors.
    bytes.extend_from_slice(&[0; 16]);
    let mut left = captured;
    for buffer in &transfer.data {
        let part = buffer.get(..left.min(buffer.len())).unwrap_or_default();
        bytes.extend_from_slice(part);
        left -= part.len();
    }
    bytes
}

/// Takes the bytes of a capture file, piece by piece.
#[derive(Clone)]
pub struct Capture(Arc<Take>);

type Take = dyn Fn(&[u8]) + Send + Sync;

impl Capture {
    /// `take` gets the file's header and then a record for each call. It must neither block for long nor call the stack.
    pub fn new(take: impl Fn(&[u8]) + Send + Sync + 'static) -> Self {
        Self(Arc::new(take))
    }

    pub(crate) fn tap(self) -> Tap {
        Tap::new(move |bytes| (self.0)(bytes))
    }
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Capture")
    }
}

type Sink = Box<dyn FnMut(&[u8]) + Send>;

/// Sees every transfer of a stack, and hands records on.
pub struct Tap {
    /// Takes one record. Called with locks held: must neither block nor call the stack.
    sink: Sink,
    places: BTreeMap<Slot, (u8, u8)>,
    interrupts: Vec<(Slot, u8)>,
}

impl Tap {
    /// A tap that gives the file header and then each record to `sink`, which must neither block nor call the stack.
    pub fn new(mut sink: impl FnMut(&[u8]) + Send + 'static) -> Self {
        sink(&file_header());
        Self { sink: Box::new(sink), places: BTreeMap::new(), interrupts: Vec::new() }
    }

    pub(crate) fn name(&mut self, slot: Slot, path: UsbPath, address: u8) {
        self.places.insert(slot, (path.bus, address));
        self.interrupts.retain(|one| one.0 != slot);
    }

    /// Says that an endpoint is an interrupt endpoint; all others but 0 pass for bulk.
    pub(crate) fn interrupt(&mut self, slot: Slot, endpoint: u8) {
        self.interrupts.push((slot, endpoint));
    }

    fn tell(&mut self, kind: Kind, realtime_ns: u64, transfer: &Transfer, moved: usize, status: Status) {
        let place = self.places.get(&transfer.slot).copied().unwrap_or((0, 0));
        // usbmon: 1 interrupt, 2 control, 3 bulk.
        let transfer_kind = match transfer.setup {
            Some(_) => 2,
            None if self.interrupts.contains(&(transfer.slot, transfer.endpoint)) => 1,
            None => 3,
        };
        (self.sink)(&record(kind, realtime_ns, transfer, place, transfer_kind, moved, status));
    }

    pub(crate) fn submitted(&mut self, realtime_ns: u64, transfer: &Transfer) {
        self.tell(Kind::Submit, realtime_ns, transfer, 0, Status::Done);
    }

    pub(crate) fn completed(&mut self, realtime_ns: u64, transfer: &Transfer, moved: usize, status: Status) {
        self.tell(Kind::Complete, realtime_ns, transfer, moved, status);
    }

    pub(crate) fn refused(&mut self, realtime_ns: u64, transfer: &Transfer) {
        self.tell(Kind::Refused, realtime_ns, transfer, 0, Status::Error);
    }
}
