//! What a recording is made of: one [`Record`] after another, as bytes.
//!
//! ```text
//! record  = code thread count(arguments) argument* count(results) result* count(data) data
//! ```
//! `code` is one byte, the others are numbers of 7 bits a byte, low ones first, as LEB128 has them; `data` is bytes.

use crate::{Call, Error};
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
}

const EVENTS: [(u8, Event); 6] = [
    (0xf0, Event::Begin),
    (0xf1, Event::End),
    (0xf2, Event::Raise),
    (0xf3, Event::Outside),
    (0xf4, Event::Enter),
    (0xf5, Event::Leave),
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

fn take_number(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        let part = u64::from(first & 0x7f);
        if part << shift >> shift != part {
            return None;
        }
        value |= part << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn take_list(bytes: &mut &[u8]) -> Option<Vec<u64>> {
    let count = take_number(bytes).filter(|count| *count <= MOST_NUMBERS)?;
    (0..count).map(|_| take_number(bytes)).collect()
}

impl Record {
    /// Appends it to `out`.
    pub fn put(&self, out: &mut Vec<u8>) {
        put(out, self.event, self.thread, &self.arguments, &self.results, &self.data);
    }

    /// Takes the first record off `bytes`; `None` if there is no whole one that makes sense, and then nothing is taken.
    pub fn take(bytes: &mut &[u8]) -> Option<Self> {
        let mut rest = *bytes;
        let (code, after) = rest.split_first()?;
        rest = after;
        let event = Event::of_code(*code)?;
        let thread = u32::try_from(take_number(&mut rest)?).ok()?;
        let (arguments, results) = (take_list(&mut rest)?, take_list(&mut rest)?);
        let len = usize::try_from(take_number(&mut rest)?).ok()?;
        let (data, rest) = rest.split_at_checked(len)?;
        *bytes = rest;
        Some(Self { event, thread, arguments, results, data: data.to_vec() })
    }
}

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
