use super::*;
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::future::poll_fn;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering::SeqCst};
use core::task::{Poll, Waker};
use hypercall::testing::TestHost;
use hypercall::{Clock, ThreadSpec, Threads};

extern crate std;
use std::sync::Mutex;
use std::vec::Vec;

const MS: u64 = 1_000_000;
/// An interpreter takes its time.
const ROUNDS: u32 = if cfg!(miri) { 20 } else { 2_000 };

/// Runs `body` while `threads` threads run the executor, then stops and joins them.
fn with_threads(threads: usize, body: impl FnOnce(TestHost, &Arc<Executor<TestHost>>)) {
    let host = TestHost::new();
    let executor = Executor::new(host);
    let running: Vec<_> = (0..threads)
        .map(|_| {
            let executor = executor.clone();
            host.spawn(ThreadSpec { name: "run", cpu: None }, Box::new(move || executor.run())).unwrap()
        })
        .collect();
    body(host, &executor);
    executor.stop();
    for thread in running {
        host.join(thread).unwrap();
    }
    assert_eq!(Arc::strong_count(&executor), 1, "a task outlived the executor's threads");
}

fn within<T>(host: TestHost, ms: u64, future: impl Future<Output = T>) -> T {
    block_on_until(host, future, Some(host.monotonic_ns() + ms * MS)).expect("in time")
}

/// Counts its drops.
struct Dropped(Arc<AtomicUsize>);
impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.fetch_add(1, SeqCst);
    }
}

#[test]
fn runs_tasks_and_joins_them() {
    with_threads(2, |host, executor| {
        let handles: Vec<_> = (0..100u32).map(|n| executor.spawn_join(async move { n * 2 })).collect();
        for (n, handle) in (0..100u32).zip(handles) {
            assert_eq!(within(host, 10_000, handle), Some(n * 2));
        }
    });
}

/// The wake comes while the poll runs: it must lead to another poll.
#[test]
fn keeps_a_wake_during_the_poll() {
    with_threads(1, |host, executor| {
        let polls = Arc::new(AtomicU32::new(0));
        let seen = polls.clone();
        let task = executor.spawn_join(poll_fn(move |cx| {
            if seen.fetch_add(1, SeqCst) == 100 {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        }));
        assert_eq!(within(host, 10_000, task), Some(()));
        assert_eq!(polls.load(SeqCst), 101);
    });
}

/// As above, with the wake from another thread at every moment of the poll.
#[test]
fn loses_no_wake_from_other_threads() {
    with_threads(2, |host, executor| {
        let word = Arc::new((AtomicU32::new(0), Mutex::new(None::<Waker>)));
        let shared = word.clone();
        let task = executor.spawn_join(async move {
            for turn in 0..ROUNDS {
                poll_fn(|cx| {
                    *shared.1.lock().unwrap() = Some(cx.waker().clone());
                    if shared.0.load(SeqCst) > turn { Poll::Ready(()) } else { Poll::Pending }
                })
                .await;
            }
        });
        let waking = std::thread::spawn(move || {
            for _ in 0..ROUNDS {
                word.0.fetch_add(1, SeqCst);
                let waker = word.1.lock().unwrap().clone();
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
        });
        assert_eq!(within(host, 20_000, task), Some(()));
        waking.join().unwrap();
    });
}

#[test]
fn stop_drops_waiting_queued_and_later_tasks() {
    let drops = Arc::new(AtomicUsize::new(0));
    let dropped = || Dropped(drops.clone());
    let stale = Arc::new(Mutex::new(None::<Waker>));
    with_threads(1, |host, executor| {
        let (keep, token) = (stale.clone(), dropped());
        let waiting = executor.spawn_join(async move {
            let _token = token;
            poll_fn(|cx| {
                *keep.lock().unwrap() = Some(cx.waker().clone());
                Poll::<()>::Pending
            })
            .await;
        });
        let (inner, token) = (executor.clone(), dropped());
        executor.spawn(async move {
            let _token = token;
            inner.sleep_until(u64::MAX).await;
        });
        while stale.lock().unwrap().is_none() {
            host.yield_now();
        }
        executor.stop();
        assert_eq!(within(host, 10_000, waiting), None);
        let token = dropped();
        executor.spawn(async move { drop(token) });
    });
    assert_eq!(drops.load(SeqCst), 3);
    stale.lock().unwrap().take().unwrap().wake();
}

#[test]
fn dropping_an_executor_that_never_ran_drops_its_tasks() {
    let drops = Arc::new(AtomicUsize::new(0));
    let executor = Executor::new(TestHost::new());
    let token = Dropped(drops.clone());
    executor.spawn(async move { drop(token) });
    drop(executor);
    assert_eq!(drops.load(SeqCst), 1);
}

#[test]
fn sleeps_until_the_deadline_and_cancels_on_drop() {
    with_threads(2, |host, executor| {
        let deadline = host.monotonic_ns() + 20 * MS;
        within(host, 10_000, executor.sleep_until(deadline));
        assert!(host.monotonic_ns() >= deadline);
        // Ready before its deadline: the timer must be gone.
        let value = within(host, 10_000, executor.timeout(u64::MAX, async { 7 }));
        assert_eq!(value, Some(7));
        let never = executor.timeout(host.monotonic_ns() + 5 * MS, core::future::pending::<()>());
        assert_eq!(within(host, 10_000, never), None);
        assert_eq!(executor.timers(), 0);
    });
}

/// An idle thread sleeps towards a far deadline; a nearer one set elsewhere must not wait for it.
#[test]
fn a_nearer_deadline_wakes_a_sleeping_thread() {
    with_threads(1, |host, executor| {
        let inner = executor.clone();
        executor.spawn(async move { inner.sleep_until(u64::MAX).await });
        while executor.timers() == 0 {
            host.yield_now();
        }
        std::thread::sleep(core::time::Duration::from_millis(5));
        within(host, 10_000, executor.sleep_until(host.monotonic_ns() + 5 * MS));
    });
}

#[test]
fn several_threads_run_one_executor() {
    with_threads(2, |host, executor| {
        // Each task blocks its thread until the other one runs too.
        let met = Arc::new(AtomicU32::new(0));
        let handles: Vec<_> = (0..2)
            .map(|_| {
                let met = met.clone();
                executor.spawn_join(async move {
                    met.fetch_add(1, SeqCst);
                    while met.load(SeqCst) < 2 {
                        std::thread::yield_now();
                    }
                })
            })
            .collect();
        for handle in handles {
            assert_eq!(within(host, 10_000, handle), Some(()));
        }
    });
}

#[test]
fn cancel_drops_the_future() {
    with_threads(1, |host, executor| {
        let drops = Arc::new(AtomicUsize::new(0));
        let token = Dropped(drops.clone());
        executor
            .spawn_join(async move {
                let _token = token;
                core::future::pending::<()>().await
            })
            .cancel();
        while drops.load(SeqCst) == 0 {
            host.yield_now();
        }
    });
}

#[test]
fn block_on_gives_up_at_the_deadline() {
    let host = TestHost::new();
    let deadline = host.monotonic_ns() + 5 * MS;
    assert_eq!(block_on_until(host, core::future::pending::<()>(), Some(deadline)), None);
    assert!(host.monotonic_ns() >= deadline);
    // A future that keeps its thread busy does not outrun it either.
    let busy = poll_fn(|cx| {
        cx.waker().wake_by_ref();
        Poll::<()>::Pending
    });
    assert_eq!(block_on_until(host, busy, Some(host.monotonic_ns() + 5 * MS)), None);
    assert_eq!(block_on(host, async { 3 }), 3);
}
