//! What happens at a time.

use super::engine::World;
use super::segment::Flight;
use super::thread::State;
use hypercall::ParkResult;

pub(super) enum Event {
    Wake(u32),
    Flight(Flight),
    /// Bytes have left a sender's queue.
    Departed(usize, usize),
    Call(Box<dyn FnOnce()>),
}

impl World {
    pub(super) fn schedule(&self, at_ns: u64, event: Event) -> (u64, u64) {
        let seq = self.next_seq.get();
        self.next_seq.set(seq + 1);
        let mut events = self.events.borrow_mut();
        events.insert((at_ns, seq), event);
        self.next_event_ns.set(self.next_event_ns.get().min(at_ns));
        (at_ns, seq)
    }

    pub(super) fn forget_timer(&self, timer: Option<(u64, u64)>) {
        if let Some(key) = timer {
            let mut events = self.events.borrow_mut();
            let event = events.remove(&key);
            if key.0 == self.next_event_ns.get() {
                self.next_event_ns.set(events.first_key_value().map_or(u64::MAX, |(key, _)| key.0));
            }
            drop((events, event));
        }
    }

    pub(super) fn fire_due(&self) {
        while self.next_event_ns.get() <= self.now.get() {
            let mut events = self.events.borrow_mut();
            let event = events.pop_first();
            self.next_event_ns.set(events.first_key_value().map_or(u64::MAX, |(key, _)| key.0));
            drop(events);
            match event {
                Some((_, Event::Wake(thread))) => self.timed_out(thread),
                Some((_, Event::Flight(flight))) => self.land(flight),
                Some((_, Event::Departed(port, bytes))) => self.departed(port, bytes),
                Some((_, Event::Call(what))) => what(),
                None => return,
            }
        }
    }

    pub(super) fn timed_out(&self, at: u32) {
        let mut threads = self.threads.borrow_mut();
        let thread = &mut threads[at as usize];
        thread.timer = None;
        let (word, state) = (thread.word, thread.state);
        thread.result = ParkResult::TimedOut;
        drop(threads);
        match state {
            State::Parked => {
                self.forget_parked(word, at);
                self.make_ready(at);
            }
            State::Sleeping => self.make_ready(at),
            _ => {}
        }
    }
}
