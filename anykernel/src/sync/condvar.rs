//! A condition variable: a sequence number to park on.

use super::MutexGuard;
use hypercall::atomic::{
    AtomicU32,
    Ordering::{Relaxed, Release},
};
use hypercall::{ParkResult, Threads};

/// Waiting for a condition that a [`super::Mutex`] guards.
#[derive(Default)]
pub struct Condvar {
    sequence: AtomicU32,
}

impl Condvar {
    super::const_unless_loom! {
        /// Nobody waits.
        pub fn new() -> Self {
            Self { sequence: AtomicU32::new(0) }
        }
    }

    /// Gives up the lock, sleeps until notified (or for no reason, or until `deadline_ns`), and takes the lock again.
    /// The flag says whether the deadline passed. Context: thread.
    pub fn wait<'a, H: Threads, T: ?Sized>(
        &self,
        guard: MutexGuard<'a, H, T>,
        deadline_ns: Option<u64>,
    ) -> (MutexGuard<'a, H, T>, bool) {
        // Read under the lock: a notifier that changes the condition after we unlock changes the sequence too.
        let seen = self.sequence.load(Relaxed);
        let mutex = guard.mutex;
        drop(guard);
        let result = mutex.host().park(&self.sequence, seen, deadline_ns);
        (mutex.lock(), result == ParkResult::TimedOut)
    }

    /// Waits while `condition` holds. `false` if the deadline passed first.
    pub fn wait_while<'a, H: Threads, T: ?Sized>(
        &self,
        mut guard: MutexGuard<'a, H, T>,
        deadline_ns: Option<u64>,
        mut condition: impl FnMut(&mut T) -> bool,
    ) -> (MutexGuard<'a, H, T>, bool) {
        while condition(&mut guard) {
            let timed_out;
            (guard, timed_out) = self.wait(guard, deadline_ns);
            if timed_out {
                let done = !condition(&mut guard);
                return (guard, done);
            }
        }
        (guard, true)
    }

    /// Wakes one waiter.
    pub fn notify_one<H: Threads>(&self, host: &H) {
        self.sequence.fetch_add(1, Release);
        host.unpark(&self.sequence, 1);
    }

    /// Wakes every waiter.
    pub fn notify_all<H: Threads>(&self, host: &H) {
        self.sequence.fetch_add(1, Release);
        host.unpark(&self.sequence, u32::MAX);
    }
}
