//! Running one future on the calling thread.

use alloc::sync::Arc;
use alloc::task::Wake;
use core::future::Future;
use core::pin::pin;
use core::task::{Context, Poll, Waker};
use hypercall::atomic::{
    AtomicU32,
    Ordering::{AcqRel, Acquire, Relaxed},
};
use hypercall::{Host, ParkResult};

/// Nobody woke the thread since it polled last.
const EMPTY: u32 = 0;
/// It was woken: poll again.
const NOTIFIED: u32 = 1;
/// It sleeps, or is about to.
const PARKED: u32 = 2;

/// Wakes a thread; one hypercall only if it sleeps.
struct ThreadWaker<H> {
    host: H,
    state: AtomicU32,
}

impl<H: Host> Wake for ThreadWaker<H> {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        if self.state.swap(NOTIFIED, AcqRel) == PARKED {
            self.host.unpark(&self.state, 1);
        }
    }
}

impl<H: Host> ThreadWaker<H> {
    /// Waits for a wake and takes it; `false` if the deadline came first.
    fn wait(&self, deadline_ns: Option<u64>) -> bool {
        if self.state.compare_exchange(EMPTY, PARKED, Acquire, Acquire).is_err() {
            self.state.store(EMPTY, Relaxed);
            return true;
        }
        loop {
            let result = self.host.park(&self.state, PARKED, deadline_ns);
            if self.state.compare_exchange(NOTIFIED, EMPTY, Acquire, Relaxed).is_ok() {
                return true;
            }
            if result == ParkResult::TimedOut {
                return self.state.swap(EMPTY, Acquire) == NOTIFIED;
            }
        }
    }
}

/// Runs `future` on the calling thread until it is ready, or gives up at `deadline_ns` with `None` (and drops it). It
/// is polled at least once. Context: thread. Blocks.
pub fn block_on_until<H: Host, F: Future>(host: H, future: F, deadline_ns: Option<u64>) -> Option<F::Output> {
    let mut future = pin!(future);
    let thread = Arc::new(ThreadWaker { host, state: AtomicU32::new(EMPTY) });
    let waker = Waker::from(thread.clone());
    let mut cx = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut cx) {
            return Some(value);
        }
        if !thread.wait(deadline_ns) {
            return None;
        }
        // A future that wakes itself all the time must not outrun the deadline.
        if deadline_ns.is_some_and(|deadline| host.monotonic_ns() >= deadline) {
            return match future.as_mut().poll(&mut cx) {
                Poll::Ready(value) => Some(value),
                Poll::Pending => None,
            };
        }
    }
}

/// Runs `future` on the calling thread until it is ready. Context: thread. Blocks.
pub fn block_on<H: Host, F: Future>(host: H, future: F) -> F::Output {
    match block_on_until(host, future, None) {
        Some(value) => value,
        None => unreachable!("a wait without deadline timed out"),
    }
}
