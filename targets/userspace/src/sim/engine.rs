//! The world of a simulation, what every hypercall does to it, and the loop that runs it.

use super::Random;
use super::config::SimConfig;
use super::disk::Disk;
use super::event::Event;
use super::node::Node;
use super::report::{Failure, Panicked};
use super::schedule::Scheduler;
use super::segment::{Port, Segment};
use super::thread::{State, Thread};
use super::trace::TraceHash;
use super::watchdog::Watched;
use hypercall::{Call, Result};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::rc::Rc;

/// The index of the outside among the threads.
pub(super) const OUTSIDE: u32 = 0;

/// Words by address. The order of entries is never looked at.
#[derive(Default)]
pub(super) struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_usize(usize::from(*byte));
        }
    }
    fn write_usize(&mut self, value: usize) {
        self.0 = (self.0 ^ value as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 32;
    }
}

/// Everything of one simulation.
pub(super) struct World {
    pub(super) config: SimConfig,
    pub(super) now: Cell<u64>,
    pub(super) steps: Cell<u64>,
    pub(super) hash: Cell<TraceHash>,
    pub(super) next_seq: Cell<u64>,
    pub(super) events: RefCell<BTreeMap<(u64, u64), Event>>,
    pub(super) next_event_ns: Cell<u64>,
    pub(super) threads: RefCell<Vec<Thread>>,
    pub(super) free_threads: RefCell<Vec<u32>>,
    pub(super) current: Cell<u32>,
    pub(super) slice_end_ns: Cell<u64>,
    pub(super) parked: RefCell<HashMap<usize, VecDeque<u32>, BuildHasherDefault<AddressHasher>>>,
    pub(super) dying: RefCell<VecDeque<u32>>,
    pub(super) scheduler: RefCell<Scheduler>,
    /// The loop itself runs: nobody may block.
    pub(super) in_loop: Cell<bool>,
    pub(super) nodes: RefCell<Vec<Rc<Node>>>,
    pub(super) segments: RefCell<Vec<Segment>>,
    pub(super) ports: RefCell<Vec<Port>>,
    pub(super) disks: RefCell<Vec<Disk>>,
    pub(super) random: RefCell<Random>,
    pub(super) panics: RefCell<Vec<Panicked>>,
    pub(super) watched: Watched,
    pub(super) slot: Cell<(u32, u32)>,
}

impl World {
    /// At the beginning of every hypercall of node `index`: counts it, lets it cost its time, and lets others run if it is
    /// their turn.
    #[inline]
    pub(super) fn enter(self: &Rc<Self>, index: u32, call: Call, arguments: [u64; 2]) {
        let steps = self.steps.get() + 1;
        self.steps.set(steps);
        let now = self.now.get() + self.config.call_ns;
        self.now.set(now);
        self.watched.beat(steps);
        let current = self.current.get();
        let mut hash = self.hash.get();
        hash.mix(u64::from(index) << 40 | u64::from(current) << 8 | call as u64);
        hash.mix(arguments[0]);
        hash.mix(arguments[1]);
        hash.mix(now);
        self.hash.set(hash);
        if self.in_loop.get() {
            return;
        }
        let due = self.next_event_ns.get() <= now;
        let over = now >= self.slice_end_ns.get();
        if due
            || over
            || steps >= self.config.step_limit
            || self.scheduler.borrow_mut().preempts(current, steps)
        {
            if over {
                self.scheduler.borrow_mut().falls_behind(current);
            }
            self.give_way(current, over);
        }
    }

    /// At the end of a hypercall that has a result.
    #[inline]
    pub(super) fn leave(&self, result: u64) {
        let mut hash = self.hash.get();
        hash.mix(result);
        self.hash.set(hash);
    }

    pub(super) fn leave_with<T>(&self, result: &Result<T>) {
        self.leave(match result {
            Ok(_) => 0,
            Err(error) => 1 + *error as u64,
        });
    }

    /// Runs the others until the outside can run again.
    pub(super) fn drive(&self) -> Result<(), Failure> {
        self.in_loop.set(true);
        let result = self.drive_loop();
        self.in_loop.set(false);
        self.current.set(OUTSIDE);
        self.slice_end_ns.set(self.now.get() + self.config.slice_ns);
        self.watched.rests();
        if result.is_err() {
            // It runs again, with the bad news.
            let mut threads = self.threads.borrow_mut();
            let outside = &mut threads[OUTSIDE as usize];
            let (word, timer) = (outside.word, outside.timer.take());
            let state = core::mem::replace(&mut outside.state, State::Running);
            drop(threads);
            self.forget_timer(timer);
            match state {
                State::Parked => self.forget_parked(word, OUTSIDE),
                State::Ready => self.scheduler.borrow_mut().remove(OUTSIDE),
                State::Joining(target) => self.threads.borrow_mut()[target as usize].joiner = None,
                _ => {}
            }
        }
        result
    }

    pub(super) fn drive_loop(&self) -> Result<(), Failure> {
        loop {
            self.reap();
            self.fire_due();
            let at_ns = self.now.get();
            if self.steps.get() >= self.config.step_limit {
                let threads = self.report_threads();
                return Err(Failure::StepLimit { steps: self.steps.get(), at_ns, threads });
            }
            if at_ns > self.config.time_limit_ns {
                return Err(Failure::TimeLimit { at_ns, threads: self.report_threads() });
            }
            let next = self.scheduler.borrow_mut().next();
            match next {
                Some(OUTSIDE) => {
                    self.threads.borrow_mut()[OUTSIDE as usize].state = State::Running;
                    return Ok(());
                }
                Some(at) => self.resume(at),
                None if self.next_event_ns.get() == u64::MAX => {
                    return Err(Failure::Deadlock { at_ns, threads: self.report_threads() });
                }
                None => self.now.set(at_ns.max(self.next_event_ns.get())),
            }
        }
    }
}
