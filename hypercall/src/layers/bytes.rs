//! [`ByteRing`]: a bounded stream of bytes from one writer to one reader.

use alloc::vec::Vec;
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

const CAPACITY: usize = 0;
/// Not 0: the writer gave up once, so something is missing.
const LOST: usize = 1;
const HEAD: usize = 8;
const TAIL: usize = 16;
const DATA: usize = 24;
/// Most bytes of a piece.
const PIECE: usize = 64 << 10;

/// A bounded stream for one writer and one reader, over words that live for ever; see [`super::TraceRing`].
///
/// Bytes travel in pieces of whole words behind a word with their length. Positions count words and never wrap.
#[derive(Clone, Copy)]
pub struct ByteRing {
    words: &'static [AtomicU64],
    capacity: u64,
}

impl ByteRing {
    /// An empty stream that buffers at least `bytes`; `None` without the memory for it, which is never given back.
    pub fn new(bytes: usize) -> Option<Self> {
        let len = bytes.div_ceil(8).checked_next_power_of_two()?.checked_add(DATA)?;
        let mut words = Vec::new();
        words.try_reserve_exact(len).ok()?;
        words.resize_with(len, AtomicU64::default);
        Self::over(words.leak())
    }

    /// An empty stream in `words`; `None` if they are too few.
    pub(super) fn over(words: &'static [AtomicU64]) -> Option<Self> {
        let fits = words.len().checked_sub(DATA)? as u64;
        let capacity = 1 << fits.max(1).ilog2();
        words[HEAD].store(0, Relaxed);
        words[TAIL].store(0, Relaxed);
        words[LOST].store(0, Relaxed);
        words[CAPACITY].store(capacity, Release);
        (capacity >= 2).then_some(Self { words, capacity })
    }

    /// The stream that somebody else made in `words`, to read; `None` if there is none.
    pub(super) fn attach(words: &'static [AtomicU64]) -> Option<Self> {
        let capacity = words.get(CAPACITY)?.load(Acquire);
        let fits = words.len().checked_sub(DATA)? as u64;
        (capacity.is_power_of_two() && capacity >= 2 && capacity <= fits).then_some(Self { words, capacity })
    }

    /// Whether the writer gave up once, because nobody read: what it then wrote is missing.
    pub fn lost(&self) -> bool {
        self.words[LOST].load(Relaxed) != 0
    }

    /// Whether everything was read.
    pub(super) fn is_empty(&self) -> bool {
        self.words[HEAD].load(Relaxed) == self.words[TAIL].load(Relaxed)
    }

    fn word(&self, position: u64) -> Option<&AtomicU64> {
        self.words.get(DATA + (position & (self.capacity - 1)) as usize)
    }

    /// How many bytes fit now.
    fn room(&self) -> usize {
        let used = self.words[HEAD].load(Relaxed).wrapping_sub(self.words[TAIL].load(Acquire));
        (self.capacity.saturating_sub(used).saturating_sub(1) as usize).saturating_mul(8)
    }

    /// Whether `bytes` bytes can be written without waiting.
    pub fn has_room_for(&self, bytes: usize) -> bool {
        // Each piece takes a word for its length and one that is not full.
        bytes.saturating_add(bytes.div_ceil(PIECE) * 16) <= self.room()
    }

    /// Writes all of `bytes`. While there is no room, `wait` is called, which may give up by `false`: then the rest is lost and
    /// so is the result `false`.
    pub fn write(&self, mut bytes: &[u8], mut wait: impl FnMut() -> bool) -> bool {
        while !bytes.is_empty() {
            let len = bytes.len().min(self.room()).min(PIECE);
            if len == 0 {
                if !wait() {
                    self.words[LOST].store(1, Relaxed);
                    return false;
                }
                continue;
            }
            let (piece, rest) = bytes.split_at(len);
            let mut position = self.words[HEAD].load(Relaxed);
            let mut put = |value: u64| {
                if let Some(word) = self.word(position) {
                    word.store(value, Relaxed);
                }
                position += 1;
            };
            put(len as u64);
            let (whole, tail) = piece.as_chunks::<8>();
            whole.iter().for_each(|bytes| put(u64::from_le_bytes(*bytes)));
            if !tail.is_empty() {
                let mut last = [0; 8];
                last[..tail.len()].copy_from_slice(tail);
                put(u64::from_le_bytes(last));
            }
            self.words[HEAD].store(position, Release);
            bytes = rest;
        }
        true
    }

    /// Appends what is there to `out` and says how many bytes that was. A writer that breaks the rules gives garbage, or
    /// nothing.
    pub fn read(&self, out: &mut Vec<u8>) -> usize {
        let before = out.len();
        let head = self.words[HEAD].load(Acquire);
        let mut position = self.words[TAIL].load(Relaxed);
        if head.wrapping_sub(position) > self.capacity {
            return 0;
        }
        while position != head {
            let mut take = || {
                let value = self.word(position).map_or(0, |word| word.load(Relaxed));
                position = position.wrapping_add(1);
                value
            };
            let mut left = (take() as usize).min(PIECE);
            while left > 0 {
                let len = left.min(8);
                out.extend_from_slice(&take().to_le_bytes()[..len]);
                left -= len;
            }
            if head.wrapping_sub(position) > self.capacity {
                position = head;
            }
        }
        self.words[TAIL].store(position, Release);
        out.len() - before
    }
}
