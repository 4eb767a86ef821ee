//! Threads, and the one primitive on which all blocking is built.

use crate::atomic::AtomicU32;
use crate::{CpuId, Result};
use alloc::boxed::Box;

/// A thread of this domain. Never 0; not reused while somebody may still join it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ThreadId(pub u64);

/// How to start a thread.
#[derive(Debug, Clone, Copy)]
pub struct ThreadSpec<'a> {
    /// Shown in traces, dumps and, where the host has such a thing, its thread list. Cut to 15 bytes there.
    pub name: &'a str,
    /// Run on this CPU only; `None` lets the host choose.
    pub cpu: Option<CpuId>,
}

/// Why [`Threads::park`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParkResult {
    /// An [`Threads::unpark`], or nothing at all: spurious returns are allowed.
    Woken,
    /// The word did not hold the expected value when it was looked at.
    Changed,
    /// The deadline has passed.
    TimedOut,
}

/// Threads and park/unpark.
pub trait Threads {
    /// Starts a thread that runs `entry` once.
    ///
    /// Every thread ends by returning from `entry` and must be joined. Errors: [`crate::Error::NoMemory`];
    /// [`crate::Error::Invalid`] for a CPU that does not exist. Context: thread. May block for memory.
    /// Counterparts: `rumpuser_thread_create`; LKL `thread_create`.
    fn spawn(&self, spec: ThreadSpec<'_>, entry: Box<dyn FnOnce() + Send + 'static>) -> Result<ThreadId>;

    /// Waits until `thread` has ended and frees what it held. Each thread is joined at most once.
    ///
    /// Errors: [`crate::Error::NotFound`] if there is no such thread, it was joined before, or it is the caller.
    /// Context: thread. Blocks. Counterparts: `rumpuser_thread_join`; LKL `thread_join`.
    fn join(&self, thread: ThreadId) -> Result<()>;

    /// Sleeps until `word` is unparked, if it still holds `expected`; at the latest until `deadline_ns` of
    /// [`crate::Clock::monotonic_ns`].
    ///
    /// The comparison and the going to sleep are one step with regard to [`Threads::unpark`] on the same word: a
    /// thread that stores a new value and then unparks always wakes a thread that parked on the old one (no lost
    /// wake-up). A deadline that has passed still compares first, then returns `TimedOut`. May return
    /// `Woken` for no reason; a thread that an unpark counted never returns `TimedOut`. Context: thread. Blocks. Cannot fail.
    ///
    /// Counterparts: futex(2) `FUTEX_WAIT`; `rumpuser_cv_wait` and `cv_timedwait`; LKL `sem_down`.
    fn park(&self, word: &AtomicU32, expected: u32, deadline_ns: Option<u64>) -> ParkResult;

    /// Wakes at most `count` threads parked on `word`; `u32::MAX` means all. Says how many.
    ///
    /// `word` is only compared as an address, never read. Context: any, interrupt included. Never blocks.
    /// Counterparts: futex(2) `FUTEX_WAKE`; `rumpuser_cv_signal` and `cv_broadcast`; LKL `sem_up`.
    fn unpark(&self, word: &AtomicU32, count: u32) -> u32;

    /// Lets other threads of this CPU run. Context: thread.
    /// Counterpart: sched_yield(2); neither rumpuser nor LKL has one.
    fn yield_now(&self);
}
