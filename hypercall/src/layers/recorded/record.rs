//! What a recording is made of: one [`Record`] after another, as bytes.
//!
//! ```text
//! record  = code thread count(arguments) argument* count(results) result* count(data) data
//! ```
//! `code` is one byte, the others are numbers of 7 bits a byte, low ones first, as LEB128 has them; `data` is bytes.

use crate::{
    Call, Error, UsbDeviceId, UsbDeviceInfo, UsbPath, UsbSpeed, UsbStatus, UsbTransfer, UsbTransferKind,
};
use alloc::vec::Vec;

/// What happened, beside calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A hypercall returned.
    Call(Call),
    /// A thread begins to run.
    Begin,
    /// A thread has ended.
    End,
    /// The host raised a signal: results are its number and by how much.
    Raise,
    /// The thread's target waited for something that is not the domain's: the result is what it was told.
    Outside,
    /// Somebody who is no thread of the domain enters it; the argument is what for.
    Enter,
    /// And leaves.
    Leave,
    /// The thread called for a long time without sleeping, and others had their turn before it goes on.
    Preempt,
}

const EVENTS: [(u8, Event); 7] = [
    (0xf0, Event::Begin),
    (0xf1, Event::End),
    (0xf2, Event::Raise),
    (0xf3, Event::Outside),
    (0xf4, Event::Enter),
    (0xf5, Event::Leave),
    (0xf6, Event::Preempt),
];

impl Event {
    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Call(call) => call.name(),
            Self::Begin => "begin",
            Self::End => "end",
            Self::Raise => "raise",
            Self::Outside => "outside",
            Self::Enter => "enter",
            Self::Leave => "leave",
            Self::Preempt => "preempt",
        }
    }

    fn code(self) -> u8 {
        match self {
            Self::Call(call) => call as u8,
            other => EVENTS.iter().find(|(_, event)| *event == other).map_or(0xff, |(code, _)| *code),
        }
    }

    fn of_code(code: u8) -> Option<Self> {
        let call = Call::ALL.get(usize::from(code)).map(|call| Self::Call(*call));
        call.or_else(|| EVENTS.iter().find(|(known, _)| *known == code).map(|(_, event)| *event))
    }
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What.
    pub event: Event,
    /// In which thread; 0 is the first.
    pub thread: u32,
    /// What the thread said: numbers, and for bytes their [`digest`]. No addresses of memory.
    pub arguments: Vec<u64>,
    /// What it was told.
    pub results: Vec<u64>,
    /// The bytes that it was told.
    pub data: Vec<u8>,
}

/// Most numbers in a list; the reader refuses more.
const MOST_NUMBERS: u64 = 16;
/// Most bytes of data; the reader refuses more. What is read of a disk in one call is far less.
const MOST_DATA: usize = 64 << 20;

fn put_number(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a record to `out`.
pub(super) fn put(
    out: &mut Vec<u8>,
    event: Event,
    thread: u32,
    arguments: &[u64],
    results: &[u64],
    data: &[u8],
) {
    out.push(event.code());
    put_number(out, thread.into());
    for list in [arguments, results] {
        put_number(out, list.len() as u64);
        list.iter().for_each(|value| put_number(out, *value));
    }
    put_number(out, data.len() as u64);
    out.extend_from_slice(data);
}

/// Why there is no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoRecord {
    /// The bytes end before it does.
    Cut,
    /// No record begins like this.
    Invalid,
}

fn take_byte(bytes: &mut &[u8]) -> Result<u8, NoRecord> {
    let (first, rest) = bytes.split_first().ok_or(NoRecord::Cut)?;
    *bytes = rest;
    Ok(*first)
}

fn take_number(bytes: &mut &[u8]) -> Result<u64, NoRecord> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let first = take_byte(bytes)?;
        let part = u64::from(first & 0x7f);
        if part << shift >> shift != part {
            break;
        }
        value |= part << shift;
        if first & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(NoRecord::Invalid)
}

fn take_list(bytes: &mut &[u8]) -> Result<Vec<u64>, NoRecord> {
    match take_number(bytes)? {
        count @ ..=MOST_NUMBERS => (0..count).map(|_| take_number(bytes)).collect(),
        _ => Err(NoRecord::Invalid),
    }
}

impl Record {
    /// Appends it to `out`.
    pub fn put(&self, out: &mut Vec<u8>) {
        put(out, self.event, self.thread, &self.arguments, &self.results, &self.data);
    }

    /// Takes the first record off `bytes`. Without one, nothing is taken.
    pub fn take(bytes: &mut &[u8]) -> Result<Self, NoRecord> {
        let mut rest = *bytes;
        let event = Event::of_code(take_byte(&mut rest)?).ok_or(NoRecord::Invalid)?;
        let thread = u32::try_from(take_number(&mut rest)?).map_err(|_| NoRecord::Invalid)?;
        let (arguments, results) = (take_list(&mut rest)?, take_list(&mut rest)?);
        let len = usize::try_from(take_number(&mut rest)?)
            .ok()
            .filter(|len| *len <= MOST_DATA)
            .ok_or(NoRecord::Invalid)?;
        let (data, rest) = rest.split_at_checked(len).ok_or(NoRecord::Cut)?;
        *bytes = rest;
        Ok(Self { event, thread, arguments, results, data: data.to_vec() })
    }
}

/// What of a transfer a recording compares: where to, how, and what is sent.
pub fn submitted(device: UsbDeviceId, transfer: &UsbTransfer) -> [u64; 8] {
    let (kind, setup) = match transfer.kind {
        UsbTransferKind::Control(setup) => (0, u64::from_le_bytes(setup)),
        UsbTransferKind::Bulk => (1, 0),
        UsbTransferKind::Interrupt => (2, 0),
    };
    let sent = if receives(transfer) {
        0
    } else {
        transfer.data.iter().fold(SEED, |hash, buffer| mix(hash, digest(buffer)))
    };
    let len = transfer.len() as u64;
    [device.0, kind, setup, transfer.endpoint.into(), len, sent, transfer.zero_packet.into(), transfer.tag]
}

/// Whether the device fills its data.
pub(super) fn receives(transfer: &UsbTransfer) -> bool {
    let direction = match transfer.kind {
        UsbTransferKind::Control([request_type, ..]) => request_type,
        _ => transfer.endpoint,
    };
    direction & 0x80 != 0
}

/// How transfers end, by the number that stands for it.
pub const USB_STATUS: [UsbStatus; 6] = [
    UsbStatus::Done,
    UsbStatus::Stall,
    UsbStatus::Overflow,
    UsbStatus::Error,
    UsbStatus::Cancelled,
    UsbStatus::Gone,
];

/// A device of the platform as three words: its number, its place, and the rest.
pub(super) fn usb_device_words(info: UsbDeviceInfo) -> [u64; 3] {
    let mut path = [0; 8];
    path[0] = info.path.bus;
    for (to, port) in path[1..].iter_mut().zip(info.path.ports()) {
        *to = *port;
    }
    let speed = SPEEDS.iter().position(|speed| *speed == info.speed).unwrap_or(0) as u8;
    let rest = [info.address, info.configuration, speed, 0, 0, 0, 0, 0];
    [info.id.0, u64::from_le_bytes(path), u64::from_le_bytes(rest)]
}

/// The device that those words stand for; `None` if they stand for none.
pub fn usb_device_of([id, path, rest]: [u64; 3]) -> Option<UsbDeviceInfo> {
    let [bus, ports @ ..] = path.to_le_bytes();
    let ports = ports.into_iter().take_while(|port| *port > 0);
    let path = ports.into_iter().try_fold(UsbPath::root(bus), UsbPath::child)?;
    let [address, configuration, speed, ..] = rest.to_le_bytes();
    let speed = *SPEEDS.get(usize::from(speed))?;
    Some(UsbDeviceInfo { id: UsbDeviceId(id), path, address, speed, configuration })
}

const SPEEDS: [UsbSpeed; 5] =
    [UsbSpeed::Low, UsbSpeed::Full, UsbSpeed::High, UsbSpeed::Super, UsbSpeed::SuperPlus];

/// A number that stands for bytes (FNV-1a over words, then bytes).
pub fn digest(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let words = words.iter().map(|word| u64::from_le_bytes(*word));
    words.chain(rest.iter().map(|byte| u64::from(*byte))).fold(mix(SEED, bytes.len() as u64), mix)
}

/// Where a digest of numbers begins.
pub const SEED: u64 = 0xcbf2_9ce4_8422_2325;

/// The digest `hash` with one number more.
pub fn mix(hash: u64, number: u64) -> u64 {
    // The rotation brings what a multiplication moved up back down.
    ((hash ^ number).wrapping_mul(0x0100_0000_01b3)).rotate_left(29)
}

/// An outcome as a number: 0 is success.
pub(super) fn outcome<T>(result: &crate::Result<T>) -> u64 {
    result.as_ref().map_or_else(
        |error| ERRORS.iter().position(|one| one == error).map_or(u64::MAX, |at| at as u64 + 1),
        |_| 0,
    )
}

/// What such a number stands for; `None` for one that stands for nothing.
pub fn outcome_of(number: u64) -> Option<crate::Result<()>> {
    match number {
        0 => Some(Ok(())),
        number => ERRORS.get(usize::try_from(number).ok()? - 1).map(|error| Err(*error)),
    }
}

const ERRORS: [Error; 10] = [
    Error::NoMemory,
    Error::Invalid,
    Error::NotFound,
    Error::Unsupported,
    Error::WouldBlock,
    Error::Busy,
    Error::Denied,
    Error::BufferTooSmall,
    Error::Io,
    Error::Gone,
];
