//! Waiting: park and unpark, and what every blocking call comes down to.

use super::engine::{OUTSIDE, World};
use super::event::Event;
use super::fiber;
use super::report::Failure;
use super::thread::{State, unwind};
use core::sync::atomic::AtomicU32;
use hypercall::{Error, ParkResult, Result, ThreadId, ThreadSpec, Threads};
use std::rc::Rc;

/// What a yield costs beside the hypercall.
const YIELD_NS: u64 = 1_000;

impl World {
    pub(super) fn sleep_outside(self: &Rc<Self>, until_ns: u64) -> Result<(), Failure> {
        self.block(State::Sleeping, Some(until_ns)).map(|_| ())
    }

    /// Lets a hypercall take its time.
    pub(super) fn sleep(self: &Rc<Self>, ns: u64) {
        if !self.in_loop.get() && ns > 0 {
            let until = self.now.get() + ns;
            self.block(State::Sleeping, Some(until)).unwrap_or_else(|failure| panic!("{failure}"));
        }
    }

    pub(super) fn park(
        self: &Rc<Self>,
        index: u32,
        word: &AtomicU32,
        expected: u32,
        deadline_ns: Option<u64>,
    ) -> ParkResult {
        assert!(!self.in_loop.get(), "an event of the simulation may not block");
        let current = self.current.get();
        if word.load(core::sync::atomic::Ordering::SeqCst) != expected {
            return ParkResult::Changed;
        }
        if self.is_down(index) {
            self.dead_turn(current);
            return ParkResult::Woken;
        }
        if deadline_ns.is_some_and(|deadline| deadline <= self.now.get()) {
            // Others get their turn all the same: who polls so must not keep them from running.
            self.give_way(current, true);
            return ParkResult::TimedOut;
        }
        let address = core::ptr::from_ref(word).addr();
        self.threads.borrow_mut()[current as usize].word = address;
        self.parked.borrow_mut().entry(address).or_default().push_back(current);
        self.block(State::Parked, deadline_ns).unwrap_or_else(|failure| panic!("{failure}"))
    }

    pub(super) fn unpark(&self, word: &AtomicU32, count: u32) -> u32 {
        let address = core::ptr::from_ref(word).addr();
        let mut woken = 0;
        while woken < count {
            let mut parked = self.parked.borrow_mut();
            let Some(waiting) = parked.get_mut(&address) else { break };
            let next = self.scheduler.borrow_mut().choose_waiter(waiting);
            if waiting.is_empty() {
                parked.remove(&address);
            }
            drop(parked);
            let Some(next) = next else { break };
            self.threads.borrow_mut()[next as usize].result = ParkResult::Woken;
            self.make_ready(next);
            woken += 1;
        }
        woken
    }

    pub(super) fn forget_parked(&self, word: usize, at: u32) {
        let mut parked = self.parked.borrow_mut();
        if let Some(waiting) = parked.get_mut(&word) {
            waiting.retain(|one| *one != at);
            if waiting.is_empty() {
                parked.remove(&word);
            }
        }
    }

    /// Blocks the caller. Only the outside ever sees a failure.
    pub(super) fn block(
        self: &Rc<Self>,
        state: State,
        deadline_ns: Option<u64>,
    ) -> Result<ParkResult, Failure> {
        assert!(!self.in_loop.get(), "an event of the simulation may not block");
        let current = self.current.get();
        let timer = deadline_ns.map(|at_ns| self.schedule(at_ns, Event::Wake(current)));
        {
            let mut threads = self.threads.borrow_mut();
            let thread = &mut threads[current as usize];
            thread.state = state;
            thread.since_ns = self.now.get();
            thread.timer = timer;
            thread.result = ParkResult::Woken;
        }
        if current == OUTSIDE {
            self.drive()?;
        } else {
            self.switch(current);
        }
        Ok(self.threads.borrow()[current as usize].result)
    }

    /// Leaves the caller, whose state says what it waits for, and comes back when it runs again.
    pub(super) fn switch(self: &Rc<Self>, current: u32) {
        if current == OUTSIDE {
            self.drive().unwrap_or_else(|failure| panic!("{failure}"));
            return;
        }
        {
            let mut threads = self.threads.borrow_mut();
            let thread = &mut threads[current as usize];
            thread.unwinding |= !thread.killed && std::thread::panicking();
        }
        fiber::suspend();
        if self.is_to_unwind() {
            unwind();
        }
    }

    /// Lets the loop run; the caller goes on when its turn comes again.
    pub(super) fn give_way(self: &Rc<Self>, current: u32, to_the_end: bool) {
        {
            let mut threads = self.threads.borrow_mut();
            let thread = &mut threads[current as usize];
            if thread.killed {
                thread.state = State::Dying;
                self.dying.borrow_mut().push_back(current);
            } else {
                thread.state = State::Ready;
                self.scheduler.borrow_mut().add(current, !to_the_end);
            }
        }
        self.switch(current);
    }

    /// Lets a moment pass, or others run.
    pub(super) fn yield_now(self: &Rc<Self>, index: u32) {
        if self.in_loop.get() {
            return;
        }
        let current = self.current.get();
        if self.is_down(index) {
            return self.dead_turn(current);
        }
        self.scheduler.borrow_mut().falls_behind(current);
        // Who spins waits for time to pass.
        self.now.set(self.now.get() + YIELD_NS);
        self.give_way(current, true);
    }

    /// What blocking is in a node that is down.
    pub(super) fn dead_turn(self: &Rc<Self>, current: u32) {
        if self.threads.borrow()[current as usize].killed {
            self.give_way(current, true);
        }
    }
}

/// Wakes whoever waits for a signal that the simulation itself raises.
pub(super) struct Raiser<'a>(pub(super) &'a World);

impl Threads for Raiser<'_> {
    fn spawn(&self, _: ThreadSpec<'_>, _: Box<dyn FnOnce() + Send + 'static>) -> Result<ThreadId> {
        Err(Error::Unsupported)
    }
    fn join(&self, _: ThreadId) -> Result<()> {
        Err(Error::Unsupported)
    }
    fn park(&self, _: &AtomicU32, _: u32, _: Option<u64>) -> ParkResult {
        ParkResult::Woken
    }
    fn unpark(&self, word: &AtomicU32, count: u32) -> u32 {
        self.0.unpark(word, count)
    }
    fn yield_now(&self) {}
}
