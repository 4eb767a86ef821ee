//! [`TraceRing`]: a bounded lock-free queue of events.

use super::{ComponentName, TraceEvent, TraceSink};
use crate::{Call, CpuId};
use alloc::vec::Vec;
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

/// Which word holds what. The three that change are on cache lines of their own.
const CAPACITY: usize = 0;
const TAIL: usize = 8;
const HEAD: usize = 16;
const DROPPED: usize = 24;
const SLOTS: usize = 32;
/// Words of a slot. The first, its turn, says whose it is (after Dmitry Vyukov's bounded queue): `position` before it is
/// written by the event of that position, `position + 1` once it is there to be read, `position + capacity` when it is
/// free again. Then call and CPU, component, start, duration, arguments.
const SLOT: usize = 7;

/// A bounded queue of events for many writers, also in interrupts: nobody waits for anybody. When it is full, new events
/// are dropped and counted.
///
/// It is a handle to plain words that live for ever, so that a domain in a virtual machine can write where a process of the
/// host reads ([`super::Channel`]).
#[derive(Clone, Copy)]
pub struct TraceRing {
    words: &'static [AtomicU64],
    capacity: u64,
}

impl TraceRing {
    /// An empty queue that holds `capacity` events, rounded up to a power of two of at least 2; `None` without the
    /// memory for it (56 bytes each). Its memory is never given back.
    pub fn new(capacity: usize) -> Option<Self> {
        let capacity = capacity.max(2).checked_next_power_of_two()?;
        let len = capacity.checked_mul(SLOT)?.checked_add(SLOTS)?;
        let mut words = Vec::new();
        words.try_reserve_exact(len).ok()?;
        words.resize_with(len, AtomicU64::default);
        Self::over(words.leak())
    }

    /// An empty queue in `words`, as large as fits; `None` if two events do not.
    pub(super) fn over(words: &'static [AtomicU64]) -> Option<Self> {
        let fits = (words.len().checked_sub(SLOTS)? / SLOT) as u64;
        let capacity = 1 << fits.max(1).ilog2();
        let ring = Self { words, capacity };
        for position in 0..capacity {
            ring.slot(position)?[0].store(position, Relaxed);
        }
        for at in [TAIL, HEAD, DROPPED] {
            words[at].store(0, Relaxed);
        }
        words[CAPACITY].store(capacity, Release);
        (capacity >= 2).then_some(ring)
    }

    /// The queue that somebody else made in `words`, to read; `None` if there is none.
    pub(super) fn attach(words: &'static [AtomicU64]) -> Option<Self> {
        let capacity = words.get(CAPACITY)?.load(Acquire);
        let len = usize::try_from(capacity).ok()?.checked_mul(SLOT)?.checked_add(SLOTS)?;
        (capacity.is_power_of_two() && capacity >= 2 && len <= words.len())
            .then_some(Self { words, capacity })
    }

    /// How many events were dropped so far.
    pub fn dropped(&self) -> u64 {
        self.words[DROPPED].load(Relaxed)
    }

    /// Whether everything was read.
    pub(super) fn is_empty(&self) -> bool {
        self.words[HEAD].load(Relaxed) == self.words[TAIL].load(Relaxed)
    }

    fn slot(&self, position: u64) -> Option<&[AtomicU64; SLOT]> {
        let start = SLOTS + (position & (self.capacity - 1)) as usize * SLOT;
        self.words.get(start..start + SLOT)?.try_into().ok()
    }

    fn push(&self, event: TraceEvent) {
        let tail = &self.words[TAIL];
        let mut position = tail.load(Relaxed);
        loop {
            let Some([turn_word, words @ ..]) = self.slot(position) else { return };
            let turn = turn_word.load(Acquire);
            if turn == position {
                match tail.compare_exchange_weak(position, position + 1, Relaxed, Relaxed) {
                    Ok(_) => {
                        let first = u64::from(event.cpu.0) << 8 | event.call as u64;
                        let [one, two] = event.arguments;
                        for (word, value) in words.iter().zip([
                            first,
                            event.component.to_word(),
                            event.start_ns,
                            event.duration_ns,
                            one,
                            two,
                        ]) {
                            word.store(value, Relaxed);
                        }
                        turn_word.store(position + 1, Release);
                        return;
                    }
                    Err(now) => position = now,
                }
            } else if turn < position {
                self.words[DROPPED].fetch_add(1, Relaxed);
                return;
            } else {
                position = tail.load(Relaxed);
            }
        }
    }

    /// Takes the oldest event out; `None` if there is none, or it is just being written.
    pub fn pop(&self) -> Option<TraceEvent> {
        let head = &self.words[HEAD];
        let mut position = head.load(Relaxed);
        loop {
            let [turn, words @ ..] = self.slot(position)?;
            if turn.load(Acquire) != position.wrapping_add(1) {
                let now = head.load(Relaxed);
                if now == position {
                    return None;
                }
                position = now;
                continue;
            }
            match head.compare_exchange_weak(position, position.wrapping_add(1), Relaxed, Relaxed) {
                Ok(_) => {
                    let [first, component, start_ns, duration_ns, one, two] =
                        words.each_ref().map(|word| word.load(Relaxed));
                    turn.store(position.wrapping_add(self.capacity), Release);
                    let call = Call::ALL.get(first as usize & 0xff).copied()?;
                    let cpu = CpuId((first >> 8) as u32);
                    let component = ComponentName::from_word(component);
                    let arguments = [one, two];
                    return Some(TraceEvent { call, component, cpu, start_ns, duration_ns, arguments });
                }
                Err(now) => position = now,
            }
        }
    }
}

impl TraceSink for TraceRing {
    #[inline]
    fn record(&self, event: TraceEvent) {
        self.push(event);
    }
}
