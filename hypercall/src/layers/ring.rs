//! [`TraceRing`]: a bounded lock-free queue of events.

use super::{TraceEvent, TraceSink};
use crate::{Call, CpuId};
use alloc::vec::Vec;
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

/// One event. `turn` says whose it is (after Dmitry Vyukov's bounded queue): `position` before it is written by the
/// event of that position, `position + 1` once it is there to be read, `position + capacity` when it is free again.
#[derive(Default)]
struct Slot {
    turn: AtomicU64,
    /// Call and CPU, start, duration, arguments.
    words: [AtomicU64; 5],
}

/// A bounded queue of events for many writers, also in interrupts: nobody waits for anybody. When it is full, new events
/// are dropped and counted.
pub struct TraceRing {
    slots: Vec<Slot>,
    tail: AtomicU64,
    head: AtomicU64,
    dropped: AtomicU64,
}

impl TraceRing {
    /// An empty queue that holds `capacity` events, rounded up to a power of two of at least 2; `None` without the
    /// memory for it (48 bytes each).
    pub fn new(capacity: usize) -> Option<Self> {
        let capacity = capacity.max(2).checked_next_power_of_two()?;
        let mut slots = Vec::new();
        slots.try_reserve_exact(capacity).ok()?;
        slots.extend((0..capacity as u64).map(|turn| Slot { turn: AtomicU64::new(turn), ..Slot::default() }));
        Some(Self { slots, tail: AtomicU64::new(0), head: AtomicU64::new(0), dropped: AtomicU64::new(0) })
    }

    /// How many events were dropped so far.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Relaxed)
    }

    fn slot(&self, position: u64) -> Option<&Slot> {
        self.slots.get(position as usize & (self.slots.len() - 1))
    }

    fn push(&self, event: TraceEvent) {
        let mut position = self.tail.load(Relaxed);
        loop {
            let Some(slot) = self.slot(position) else { return };
            let turn = slot.turn.load(Acquire);
            if turn == position {
                match self.tail.compare_exchange_weak(position, position + 1, Relaxed, Relaxed) {
                    Ok(_) => {
                        let first = u64::from(event.cpu.0) << 8 | event.call as u64;
                        let [one, two] = event.arguments;
                        for (word, value) in
                            slot.words.iter().zip([first, event.start_ns, event.duration_ns, one, two])
                        {
                            word.store(value, Relaxed);
                        }
                        slot.turn.store(position + 1, Release);
                        return;
                    }
                    Err(now) => position = now,
                }
            } else if turn < position {
                self.dropped.fetch_add(1, Relaxed);
                return;
            } else {
                position = self.tail.load(Relaxed);
            }
        }
    }

    /// Takes the oldest event out; `None` if there is none, or it is just being written.
    pub fn pop(&self) -> Option<TraceEvent> {
        let mut position = self.head.load(Relaxed);
        loop {
            let slot = self.slot(position)?;
            if slot.turn.load(Acquire) != position + 1 {
                let now = self.head.load(Relaxed);
                if now == position {
                    return None;
                }
                position = now;
                continue;
            }
            match self.head.compare_exchange_weak(position, position + 1, Relaxed, Relaxed) {
                Ok(_) => {
                    let [first, start_ns, duration_ns, one, two] =
                        slot.words.each_ref().map(|word| word.load(Relaxed));
                    slot.turn.store(position + self.slots.len() as u64, Release);
                    let call = Call::ALL.get(first as usize & 0xff).copied()?;
                    let cpu = CpuId((first >> 8) as u32);
                    return Some(TraceEvent { call, cpu, start_ns, duration_ns, arguments: [one, two] });
                }
                Err(now) => position = now,
            }
        }
    }
}

impl TraceSink for &'static TraceRing {
    #[inline]
    fn record(&self, event: TraceEvent) {
        self.push(event);
    }
}
