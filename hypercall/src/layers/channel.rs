//! [`Channel`]: how a domain hands a trace or a recording to the process that watches it.

use super::{ByteRing, TraceRing};
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

/// Says where a channel begins. Kept inverted, so that only a channel holds it in this form.
const NOT_MAGIC: [u64; 4] = [!0x6c65_6e6e_6168_6b61, !0x7b1e_93c5_d04f_62a8, !0xc2a9_1d3e_58f0_b746, 1];
const VERSION: u64 = 1;

/// Where a channel may begin, in bytes: at whole pages.
pub const CHANNEL_ALIGN: usize = 4096;

const PAGE_WORDS: usize = CHANNEL_ALIGN / 8;
const VERSION_AT: usize = 4;
const LEN_AT: usize = 5;
const KIND_AT: usize = 6;
/// The words of the notes.
const NOTES: usize = 16 << 10;

/// What a channel carries beside notes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum ChannelKind {
    /// [`super::TraceEvent`]s.
    Trace = 1,
    /// A recording.
    Recording = 2,
}

/// A block of memory that a domain writes and a process reads: a page that says so, a stream of notes (counters as text), and
/// either a queue of events or a stream of bytes.
///
/// It works without a driver, costs no exit of a virtual machine, and holds what was written when the domain dies. Whoever
/// reads looks for it at the beginning of each page of the guest's memory.
#[derive(Clone, Copy)]
pub struct Channel {
    words: &'static [AtomicU64],
    kind: ChannelKind,
}

impl Channel {
    /// Makes a channel in `words`, which begin at a whole page and nobody else uses; `None` if they are too few.
    pub fn create(words: &'static [AtomicU64], kind: ChannelKind) -> Option<Self> {
        let channel = Self { words, kind };
        ByteRing::over(channel.notes_words()?)?;
        match kind {
            ChannelKind::Trace => drop(TraceRing::over(channel.main_words()?)?),
            ChannelKind::Recording => drop(ByteRing::over(channel.main_words()?)?),
        }
        for (at, value) in [(VERSION_AT, VERSION), (LEN_AT, words.len() as u64), (KIND_AT, kind as u64)] {
            words[at].store(value, Relaxed);
        }
        // The first word last: who finds it finds everything.
        for at in [3, 2, 1, 0] {
            words[at].store(!NOT_MAGIC[at], Release);
        }
        Some(channel)
    }

    /// The channel that begins at the first of `words`, which may go on behind it; `None` if there is none.
    pub fn attach(words: &'static [AtomicU64]) -> Option<Self> {
        let magic = |at: usize| words.get(at).is_some_and(|word| word.load(Acquire) == !NOT_MAGIC[at]);
        if !(0..4).all(magic) || words.get(VERSION_AT)?.load(Relaxed) != VERSION {
            return None;
        }
        let kind = match words.get(KIND_AT)?.load(Relaxed) {
            1 => ChannelKind::Trace,
            2 => ChannelKind::Recording,
            _ => return None,
        };
        let words = words.get(..usize::try_from(words.get(LEN_AT)?.load(Relaxed)).ok()?)?;
        let channel = Self { words, kind };
        channel.notes_words().and_then(ByteRing::attach)?;
        Some(channel)
    }

    /// Whether the reader has everything.
    pub fn is_drained(&self) -> bool {
        let main = self.events().map(|ring| ring.is_empty()).or_else(|| Some(self.bytes()?.is_empty()));
        main.unwrap_or(true) && self.notes().is_none_or(|ring| ring.is_empty())
    }

    /// Ends it: nobody finds it any more.
    pub fn close(&self) {
        self.words[..4].iter().for_each(|word| word.store(0, Release));
    }

    fn notes_words(&self) -> Option<&'static [AtomicU64]> {
        self.words.get(PAGE_WORDS..PAGE_WORDS + NOTES)
    }

    fn main_words(&self) -> Option<&'static [AtomicU64]> {
        self.words.get(PAGE_WORDS + NOTES..)
    }

    /// What it carries.
    pub fn kind(&self) -> ChannelKind {
        self.kind
    }

    /// Lines of text, written by one thread: counters.
    pub fn notes(&self) -> Option<ByteRing> {
        ByteRing::attach(self.notes_words()?)
    }

    /// The events, of [`ChannelKind::Trace`].
    pub fn events(&self) -> Option<TraceRing> {
        TraceRing::attach(self.main_words().filter(|_| self.kind == ChannelKind::Trace)?)
    }

    /// The bytes, of [`ChannelKind::Recording`].
    pub fn bytes(&self) -> Option<ByteRing> {
        ByteRing::attach(self.main_words().filter(|_| self.kind == ChannelKind::Recording)?)
    }
}
