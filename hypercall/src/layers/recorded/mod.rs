//! [`Recorded`]: a host that writes down all that a domain is told, so that the domain can be run again.
//!
//! A domain is a function of what its host tells it and of the order in which its threads run. So only the thread that has
//! the *baton* runs; it passes the baton on where it sleeps (`park`, `join`, `yield_now`, disks) and ends. Nothing that
//! happens between two hypercalls of one thread can then depend on another, and the order of the records is the schedule.
//! Interrupts raise a shadow of the component's signal; what they did reaches the component only where a thread gets the
//! baton back, as a record of its own. What a device writes to memory is recorded as it is read (`dma_read`, `dma_copy`,
//! `dma_unmap`).
//!
//! A thread that spins and asks for the time, or a device's registers or memory, lets others run now and then. One that
//! spins without a call spins for ever. (Locks of `anykernel` spin for a while, then park.)

mod file;
mod host;
mod record;
#[cfg(test)]
mod tests;
mod usb;

pub use file::{CorruptChunk, MAGIC, crc32, take_chunk};
pub use host::Recorded;
pub use record::{
    Event, NoRecord, Record, SEED, USB_STATUS, digest, mix, outcome_of, submitted, usb_device_of,
};

use super::ByteRing;
use crate::{Clock, Signal, Threads};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use record::put;

/// Why somebody from outside enters a domain ([`Recorded::enter`]).
pub const ENTER_STOP: u64 = 1;

/// How long a full ring is waited for, before a recording is given up because nobody reads it.
const PATIENCE_NS: u64 = 10_000_000_000;

/// How often a thread may ask for what it could spin on, before others have their turn.
const SLICE_CALLS: u32 = 64;

/// A signal that the host may raise.
struct Source {
    /// What the component looks at; `None` when it was given back.
    signal: Option<Arc<Signal>>,
    /// For what it was given to the host.
    uses: Vec<Use>,
    /// How often it is just being given to the host.
    pending: u32,
    /// What the host raises.
    shadow: Arc<Signal>,
    /// How much of the shadow's count the component has seen.
    seen: u32,
}

/// What a signal was given to the host for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Irq(u32),
    Link(u32),
    UsbWatch,
    Usb(u64),
}

/// What only the holder of the baton touches.
struct Held {
    sources: Vec<Source>,
    bytes: Vec<u8>,
    /// The number of the thread.
    thread: u32,
    /// How often it asked for what it could spin on.
    asked: u32,
}

/// The state of a recording, which lives for ever.
pub struct Recorder {
    out: ByteRing,
    /// The baton, as a ticket lock: who comes first is served first.
    next: AtomicU32,
    serving: crate::atomic::AtomicU32,
    held: UnsafeCell<Held>,
    threads: AtomicU32,
    given_up: AtomicBool,
}

#[expect(unsafe_code, reason = "the baton is a lock")]
// SAFETY: `held` is touched only by the holder of the baton, through `held()`.
unsafe impl Sync for Recorder {}

impl Recorder {
    /// A recording that goes to `out`.
    pub fn new(out: ByteRing) -> Self {
        Self {
            out,
            next: AtomicU32::new(0),
            serving: crate::atomic::AtomicU32::new(0),
            held: UnsafeCell::new(Held { sources: Vec::new(), bytes: Vec::new(), thread: 0, asked: 0 }),
            threads: AtomicU32::new(1),
            given_up: AtomicBool::new(false),
        }
    }

    /// Whether the recording ends early, because nobody read it.
    pub fn given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    /// The number of a thread that is to be.
    fn new_thread(&self) -> u32 {
        self.threads.fetch_add(1, Ordering::Relaxed)
    }

    /// Waits for the baton.
    fn acquire<H: Threads>(&self, host: &H, thread: u32) {
        let ticket = self.next.fetch_add(1, Ordering::Relaxed);
        loop {
            let serving = self.serving.load(Ordering::Acquire);
            if serving == ticket {
                break;
            }
            host.park(&self.serving, serving, None);
        }
        self.held(|held| (held.thread, held.asked) = (thread, 0));
    }

    /// Whether its holder had the baton for long, and if so, whether others want it.
    fn slice_over(&self) -> Option<bool> {
        let over = self.held(|held| {
            held.asked = (held.asked + 1) % SLICE_CALLS;
            held.asked == 0
        });
        let others = || {
            let (next, serving) = (self.next.load(Ordering::Relaxed), self.serving.load(Ordering::Relaxed));
            next.wrapping_sub(serving) > 1
        };
        over.then(others)
    }

    /// Gives the baton to who waited longest.
    fn release<H: Threads>(&self, host: &H) {
        self.serving.fetch_add(1, Ordering::Release);
        host.unpark(&self.serving, u32::MAX);
    }

    /// Only the holder of the baton calls this, and `f` calls no host.
    #[expect(unsafe_code, reason = "the baton is a lock")]
    fn held<T>(&self, f: impl FnOnce(&mut Held) -> T) -> T {
        // SAFETY: the caller has the baton, so there is no other; `f` cannot come back here.
        f(unsafe { &mut *self.held.get() })
    }

    fn write<H: Threads + Clock>(
        &self,
        host: &H,
        event: Event,
        arguments: &[u64],
        results: &[u64],
        data: &[u8],
    ) {
        if self.given_up() {
            return;
        }
        let bytes = self.held(|held| {
            let mut bytes = core::mem::take(&mut held.bytes);
            bytes.clear();
            put(&mut bytes, event, held.thread, arguments, results, data);
            bytes
        });
        let mut deadline = None;
        let written = self.out.write(&bytes, || {
            host.yield_now();
            let now = host.monotonic_ns();
            now < *deadline.get_or_insert(now + PATIENCE_NS)
        });
        if !written {
            self.given_up.store(true, Ordering::Relaxed);
        }
        self.held(|held| held.bytes = bytes);
    }

    /// The component learns what the host did meanwhile.
    fn pass_signals<H: Threads + Clock>(&self, host: &H) {
        let count = self.held(|held| held.sources.len());
        for number in 0..count {
            let raised = self.held(|held| {
                // One that is just given to the host is not yet known by its number.
                let source = held.sources.get_mut(number).filter(|source| !source.uses.is_empty())?;
                let by = source.shadow.count().wrapping_sub(source.seen);
                source.seen = source.seen.wrapping_add(by);
                source.signal.as_ref()?.advance(by);
                (by > 0).then_some(by)
            });
            if let Some(by) = raised {
                self.write(host, Event::Raise, &[], &[number as u64, by.into()], &[]);
            }
        }
    }

    /// The shadow of `signal`, which the host may raise from now on, and its number. [`Recorder::begin_use`] follows.
    fn add_source(&self, signal: Arc<Signal>) -> (Arc<Signal>, u64) {
        self.held(|held| {
            let known =
                |source: &Source| source.signal.as_ref().is_some_and(|known| Arc::ptr_eq(known, &signal));
            let number = held.sources.iter().position(known).unwrap_or_else(|| {
                let source = Source {
                    signal: Some(signal),
                    uses: Vec::new(),
                    pending: 0,
                    shadow: Arc::new(Signal::new()),
                    seen: 0,
                };
                match held.sources.iter_mut().enumerate().find(|(_, source)| source.signal.is_none()) {
                    Some((number, free)) => {
                        *free = source;
                        number
                    }
                    None => {
                        held.sources.push(source);
                        held.sources.len() - 1
                    }
                }
            });
            let source = &mut held.sources[number];
            source.pending += 1;
            (source.shadow.clone(), number as u64)
        })
    }

    /// The host has it for this; `None`: it refused. Who sleeps on it sleeps on its own count, which now nobody raises: it is
    /// raised once, as a replay does, too.
    fn begin_use<H: Threads>(&self, host: &H, number: u64, what: Option<Use>) {
        let Some(what) = what else { return self.drop_unused(host, number, |source| source.pending -= 1) };
        let signal = self.held(|held| {
            let source = held.sources.get_mut(number as usize)?;
            source.pending -= 1;
            source.uses.push(what);
            source.signal.clone()
        });
        if let Some(signal) = signal {
            signal.advance(1);
            host.unpark(signal.word(), u32::MAX);
        }
    }

    /// The host has given it back.
    fn end_use<H: Threads>(&self, host: &H, what: Use) {
        let of = self.held(|held| held.sources.iter().position(|source| source.uses.contains(&what)));
        if let Some(number) = of {
            self.drop_unused(host, number as u64, |source| source.uses.retain(|one| *one != what));
        }
    }

    /// Lets go of a component's signal that the host does not have any more. Who sleeps on its shadow goes on to sleep on it.
    fn drop_unused<H: Threads>(&self, host: &H, number: u64, change: impl FnOnce(&mut Source)) {
        let unused = self.held(|held| {
            let source = held.sources.get_mut(number as usize)?;
            change(source);
            let unused = source.uses.is_empty() && source.pending == 0;
            Some((source.signal.take_if(|_| unused)?, source.shadow.clone()))
        });
        if let Some((signal, shadow)) = unused {
            shadow.advance(1);
            host.unpark(shadow.word(), u32::MAX);
            // Meanwhile the component may have raised it where only the shadow was looked at.
            host.unpark(signal.word(), u32::MAX);
        }
    }

    /// The shadow of the signal whose count `word` is, and what was seen of it.
    fn source_of(&self, word: &crate::atomic::AtomicU32) -> Option<(Arc<Signal>, u32)> {
        self.held(|held| {
            let counts =
                |source: &&Source| source.signal.as_ref().is_some_and(|signal| signal.is_counted_by(word));
            let source = held.sources.iter().find(counts)?;
            Some((source.shadow.clone(), source.seen))
        })
    }

    /// A component raised a signal itself: whoever sleeps on its shadow must see that. The shadow, if it is one.
    fn raised_inside(&self, word: &crate::atomic::AtomicU32) -> Option<Arc<Signal>> {
        let (shadow, _) = self.source_of(word)?;
        self.held(|held| {
            if let Some(source) = held.sources.iter_mut().find(|source| Arc::ptr_eq(&source.shadow, &shadow))
            {
                source.seen = source.seen.wrapping_add(1);
            }
        });
        shadow.advance(1);
        Some(shadow)
    }
}
