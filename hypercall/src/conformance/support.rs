//! What checks share: verdicts, limits, threads that cannot get the suite stuck.

use crate::{Host, ThreadSpec};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use core::sync::atomic::{
    AtomicBool,
    Ordering::{Acquire, Release},
};

/// Why a check ends before its end.
pub(super) enum Stop {
    Fail(String),
    NotRun(String),
}

/// Fails the check with a reason unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($reason:tt)+) => {
        if !$condition {
            return Err($crate::conformance::support::Stop::Fail(alloc::format!($($reason)+)));
        }
    };
}

/// Ends the check because the host was not given what it needs.
macro_rules! not_run {
    ($($reason:tt)+) => {
        return Err($crate::conformance::support::Stop::NotRun(alloc::format!($($reason)+)))
    };
}

pub(super) use {ensure, not_run};

pub(super) const MS: u64 = 1_000_000;
/// After this long something that should happen soon does not happen.
pub(super) const STUCK_NS: u64 = 3_000 * MS;
/// A bound for loops on a host whose clock stands still.
const MOST_YIELDS: u32 = 50_000_000;

/// Yields until `condition`, for at most `limit_ns`. Says whether it came true.
pub(super) fn wait_until<H: Host>(host: H, limit_ns: u64, mut condition: impl FnMut() -> bool) -> bool {
    let start = host.monotonic_ns();
    for _ in 0..MOST_YIELDS {
        if condition() {
            return true;
        }
        if host.monotonic_ns().saturating_sub(start) > limit_ns {
            break;
        }
        host.yield_now();
    }
    condition()
}

/// Lets about `ns` pass.
pub(super) fn pause<H: Host>(host: H, ns: u64) {
    wait_until(host, ns, || false);
}

/// A thread whose end is seen without relying on `join`.
pub(super) struct Helper<H> {
    host: H,
    thread: crate::ThreadId,
    done: Arc<AtomicBool>,
}

/// Starts a thread, on a CPU if one is named.
pub(super) fn helper<H: Host>(
    host: H,
    cpu: Option<crate::CpuId>,
    body: impl FnOnce() + Send + 'static,
) -> Result<Helper<H>, Stop> {
    let done = Arc::new(AtomicBool::new(false));
    let mine = done.clone();
    let entry = Box::new(move || {
        body();
        mine.store(true, Release);
    });
    match host.spawn(ThreadSpec { name: "conformance", cpu }, entry) {
        Ok(thread) => Ok(Helper { host, thread, done }),
        Err(error) => Err(Stop::Fail(alloc::format!("spawn on {cpu:?} failed: {error}"))),
    }
}

impl<H: Host> Helper<H> {
    pub(super) fn done(&self) -> bool {
        self.done.load(Acquire)
    }

    /// Waits for the end and joins. A thread that does not end is left alone: better leaked than stuck.
    pub(super) fn finish(self) -> Result<(), Stop> {
        ensure!(wait_until(self.host, STUCK_NS, || self.done()), "a thread of the check did not end");
        let joined = self.host.join(self.thread);
        ensure!(joined.is_ok(), "join of a thread that ended: {joined:?}");
        Ok(())
    }
}
