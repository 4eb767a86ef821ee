//! On real threads: deadlines, contention, preference of writers. What orders of access can do is checked by loom
//! (`tests/loom.rs`).

use super::*;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, Ordering::SeqCst};
use hypercall::testing::TestHost;
use hypercall::{Clock, Threads};

extern crate std;
use std::thread;
use std::vec::Vec;

const MS: u64 = 1_000_000;
/// An interpreter takes its time.
const ROUNDS: u64 = if cfg!(miri) { 50 } else { 5_000 };

fn within(ms: u64, mut condition: impl FnMut() -> bool) -> bool {
    let start = std::time::Instant::now();
    while !condition() {
        if start.elapsed().as_millis() as u64 > ms {
            return false;
        }
        thread::yield_now();
    }
    true
}

#[test]
fn mutex_under_contention() {
    let mutex = Arc::new(Mutex::new(TestHost::new(), 0u64));
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let mutex = mutex.clone();
            thread::spawn(move || (0..ROUNDS).for_each(|_| *mutex.lock() += 1))
        })
        .collect();
    threads.into_iter().for_each(|one| one.join().unwrap());
    assert_eq!(Arc::into_inner(mutex).unwrap().into_inner(), 4 * ROUNDS);
}

#[test]
fn mutex_try_lock_and_get_mut() {
    let mut mutex = Mutex::new(TestHost::new(), 1);
    let guard = mutex.lock();
    assert!(mutex.try_lock().is_none());
    drop(guard);
    *mutex.try_lock().unwrap() += 1;
    assert_eq!(*mutex.get_mut(), 2);
}

#[test]
fn condvar_times_out_at_the_deadline() {
    let host = TestHost::new();
    let (mutex, condvar) = (Mutex::new(host, ()), Condvar::new());
    let deadline = host.monotonic_ns() + 10 * MS;
    let (guard, fulfilled) = condvar.wait_while(mutex.lock(), Some(deadline), |()| true);
    assert!(!fulfilled);
    assert!(host.monotonic_ns() >= deadline);
    assert!(mutex.try_lock().is_none(), "the lock is held again");
    drop(guard);
    // A condition that is fulfilled needs no wait, whatever the deadline.
    assert!(condvar.wait_while(mutex.lock(), Some(0), |()| false).1);
}

#[test]
fn condvar_passes_a_baton() {
    let host = TestHost::new();
    let shared = Arc::new((Mutex::new(host, 0u32), Condvar::new()));
    let threads: Vec<_> = (0..3u32)
        .map(|me| {
            let shared = shared.clone();
            thread::spawn(move || {
                for _ in 0..ROUNDS / 10 {
                    let (mut turn, _) = shared.1.wait_while(shared.0.lock(), None, |turn| *turn % 3 != me);
                    *turn += 1;
                    drop(turn);
                    shared.1.notify_all(&host);
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|one| one.join().unwrap());
    assert_eq!(u64::from(*shared.0.lock()), 3 * (ROUNDS / 10));
}

#[test]
fn notify_one_wakes_one_at_a_time() {
    let host = TestHost::new();
    let shared = Arc::new((Mutex::new(host, 0u32), Condvar::new(), AtomicU32::new(0)));
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let shared = shared.clone();
            thread::spawn(move || {
                let (mut tokens, _) = shared.1.wait_while(shared.0.lock(), None, |tokens| *tokens == 0);
                *tokens -= 1;
                shared.2.fetch_add(1, SeqCst);
            })
        })
        .collect();
    for served in 1..=3 {
        *shared.0.lock() += 1;
        shared.1.notify_one(&host);
        assert!(within(10_000, || shared.2.load(SeqCst) == served));
    }
    threads.into_iter().for_each(|one| one.join().unwrap());
}

#[test]
fn readers_share_and_writers_are_alone() {
    let lock = Arc::new(RwLock::new(TestHost::new(), (0u64, 0u64)));
    let threads: Vec<_> = (0..4)
        .map(|index| {
            let lock = lock.clone();
            thread::spawn(move || {
                for _ in 0..ROUNDS {
                    if index % 2 == 0 {
                        let mut pair = lock.write();
                        pair.0 += 1;
                        pair.1 += 1;
                    } else {
                        let pair = lock.read();
                        assert_eq!(pair.0, pair.1);
                    }
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|one| one.join().unwrap());
    assert_eq!(*lock.read(), (2 * ROUNDS, 2 * ROUNDS));
    let (_one, _two) = (lock.read(), lock.read());
}

/// While a writer waits, readers that come later wait too, although the lock is only read-locked.
#[test]
fn a_waiting_writer_keeps_later_readers_out() {
    let lock = Arc::new(RwLock::new(TestHost::new(), 0));
    let first = lock.read();
    let writer = {
        let lock = lock.clone();
        thread::spawn(move || *lock.write() += 1)
    };
    assert!(within(10_000, || lock.has_waiting_writer()));
    let arrived = Arc::new(AtomicU32::new(0));
    let reader = {
        let (lock, arrived) = (lock.clone(), arrived.clone());
        thread::spawn(move || {
            arrived.store(1, SeqCst);
            drop(lock.read());
        })
    };
    assert!(within(10_000, || arrived.load(SeqCst) == 1));
    thread::sleep(core::time::Duration::from_millis(20));
    assert!(!reader.is_finished() && !writer.is_finished());
    drop(first);
    writer.join().unwrap();
    reader.join().unwrap();
    assert_eq!(*lock.read(), 1);
}

/// A lock that nobody waits for makes no hypercall.
#[test]
fn free_locks_are_free() {
    #[derive(Clone, Copy)]
    struct Never;
    impl Threads for Never {
        fn spawn(
            &self,
            _: hypercall::ThreadSpec<'_>,
            _: alloc::boxed::Box<dyn FnOnce() + Send>,
        ) -> hypercall::Result<hypercall::ThreadId> {
            unreachable!()
        }
        fn join(&self, _: hypercall::ThreadId) -> hypercall::Result<()> {
            unreachable!()
        }
        fn park(&self, _: &hypercall::atomic::AtomicU32, _: u32, _: Option<u64>) -> hypercall::ParkResult {
            panic!("parks")
        }
        fn unpark(&self, _: &hypercall::atomic::AtomicU32, _: u32) -> u32 {
            panic!("unparks")
        }
        fn yield_now(&self) {
            panic!("yields")
        }
    }
    let mutex = Mutex::new(Never, 1);
    let lock = RwLock::new(Never, 1);
    for _ in 0..3 {
        *mutex.lock() += 1;
        *lock.write() += 1;
        let (_one, _two) = (lock.read(), lock.read());
    }
}
