//! Model checks of everything that parks: every order of every access to a park word is tried (up to three preemptions),
//! with the weak orders that the code asks for.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p anykernel --test loom`, best in a target directory of its own.
#![cfg(loom)]

use anykernel::sync::{Condvar, Mutex, RwLock};
use hypercall::atomic::{AtomicU32, Ordering::SeqCst};
use hypercall::{
    Clock, Console, ContractVersion, CpuId, Cpus, Entropy, Exit, ExitStatus, Memory, Pages, Params,
    ParkResult, Signal, ThreadId, ThreadSpec, Threads, Versions,
};
use loom::cell::UnsafeCell;
use loom::thread;
use std::sync::Arc;
use std::task::{Poll, Waker};

/// A host whose park and unpark are what the contract says, step by step: one lock makes the comparison and the going
/// to sleep one step. Time stands still, so nothing is saved by a deadline: a lost wake-up is a deadlock, which loom
/// reports.
#[derive(Clone, Copy)]
struct Model(&'static Table);

struct Table {
    parked: loom::sync::Mutex<Parked>,
    changed: loom::sync::Condvar,
}

#[derive(Default)]
struct Parked {
    next: u64,
    /// Address and ticket.
    list: Vec<(usize, u64)>,
}

impl Model {
    fn new() -> Self {
        let table = Table { parked: Default::default(), changed: loom::sync::Condvar::new() };
        // Leaked, once for each order tried: a host is a `Copy` handle.
        Self(Box::leak(Box::new(table)))
    }
}

impl Threads for Model {
    fn park(&self, word: &AtomicU32, expected: u32, _: Option<u64>) -> ParkResult {
        let mut parked = self.0.parked.lock().unwrap();
        if word.load(SeqCst) != expected {
            return ParkResult::Changed;
        }
        let ticket = parked.next;
        parked.next += 1;
        parked.list.push((core::ptr::from_ref(word).addr(), ticket));
        while parked.list.iter().any(|one| one.1 == ticket) {
            parked = self.0.changed.wait(parked).unwrap();
        }
        ParkResult::Woken
    }
    fn unpark(&self, word: &AtomicU32, count: u32) -> u32 {
        let mut parked = self.0.parked.lock().unwrap();
        let mut woken = 0;
        parked.list.retain(|one| {
            let wake = one.0 == core::ptr::from_ref(word).addr() && woken < count;
            woken += u32::from(wake);
            !wake
        });
        if woken > 0 {
            self.0.changed.notify_all();
        }
        woken
    }
    fn spawn(&self, _: ThreadSpec<'_>, _: Box<dyn FnOnce() + Send>) -> hypercall::Result<ThreadId> {
        // Models start and join their threads themselves.
        Err(hypercall::Error::Unsupported)
    }
    fn join(&self, _: ThreadId) -> hypercall::Result<()> {
        Err(hypercall::Error::Unsupported)
    }
    fn yield_now(&self) {
        thread::yield_now();
    }
}

impl Clock for Model {
    fn monotonic_ns(&self) -> u64 {
        1
    }
    fn realtime_ns(&self) -> u64 {
        0
    }
}

// SAFETY: it gives out nothing.
unsafe impl Memory for Model {
    fn alloc_pages(&self, _: usize) -> hypercall::Result<Pages> {
        Err(hypercall::Error::NoMemory)
    }
    unsafe fn free_pages(&self, _: Pages) {}
    fn memory_bytes(&self) -> u64 {
        0
    }
}

impl Cpus for Model {
    fn cpu_count(&self) -> u32 {
        1
    }
    fn current_cpu(&self) -> CpuId {
        CpuId(0)
    }
}

impl Entropy for Model {
    fn fill_random(&self, _: &mut [u8]) -> hypercall::Result<()> {
        Err(hypercall::Error::Unsupported)
    }
}

impl Params for Model {
    fn param(&self, _: &str, _: &mut [u8]) -> hypercall::Result<usize> {
        Err(hypercall::Error::NotFound)
    }
}

impl Console for Model {
    fn console_write(&self, _: &[u8]) {}
}

impl Exit for Model {
    fn exit(&self, status: ExitStatus) -> ! {
        panic!("{status:?}")
    }
}

impl Versions for Model {
    fn contracts(&self) -> &'static [ContractVersion] {
        &[ContractVersion::CORE]
    }
}

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

/// A number whose every access loom checks for races.
struct Checked(UnsafeCell<u32>);

// SAFETY: loom reports every access that the lock under test does not order.
unsafe impl Sync for Checked {}

impl Checked {
    fn new() -> Self {
        Self(UnsafeCell::new(0))
    }
    fn add(&self) {
        // SAFETY: as above.
        self.0.with_mut(|number| unsafe { *number += 1 });
    }
    fn get(&self) -> u32 {
        // SAFETY: as above.
        self.0.with(|number| unsafe { *number })
    }
}

fn threads(n: usize, body: impl Fn(usize) + Clone + Send + 'static) {
    let started: Vec<_> = (1..n)
        .map(|index| {
            let body = body.clone();
            thread::spawn(move || body(index))
        })
        .collect();
    body(0);
    for one in started {
        one.join().unwrap();
    }
}

#[test]
fn mutex_of_two() {
    check(|| {
        let mutex = Arc::new(Mutex::new(Model::new(), Checked::new()));
        let shared = mutex.clone();
        threads(2, move |_| {
            shared.lock().add();
            shared.lock().add();
        });
        assert_eq!(mutex.lock().get(), 4);
    });
}

#[test]
fn mutex_of_three() {
    check(|| {
        let mutex = Arc::new(Mutex::new(Model::new(), Checked::new()));
        let shared = mutex.clone();
        threads(3, move |_| shared.lock().add());
        assert_eq!(mutex.lock().get(), 3);
    });
}

#[test]
fn mutex_try_lock() {
    check(|| {
        let mutex = Arc::new(Mutex::new(Model::new(), Checked::new()));
        let shared = mutex.clone();
        threads(2, move |index| {
            if index == 0 {
                shared.lock().add();
            } else if let Some(number) = shared.try_lock() {
                number.add();
            }
        });
        assert!(mutex.lock().get() >= 1);
    });
}

#[test]
fn condvar_notify_one_after_unlock() {
    check(|| {
        let host = Model::new();
        let pair = Arc::new((Mutex::new(host, (false, Checked::new())), Condvar::new()));
        threads(2, move |index| {
            if index == 0 {
                let (guard, fulfilled) = pair.1.wait_while(pair.0.lock(), None, |state| !state.0);
                assert!(fulfilled);
                assert_eq!(guard.1.get(), 1);
            } else {
                let mut guard = pair.0.lock();
                guard.1.add();
                guard.0 = true;
                drop(guard);
                pair.1.notify_one(&host);
            }
        });
    });
}

#[test]
fn condvar_notify_all() {
    check(|| {
        let host = Model::new();
        let pair = Arc::new((Mutex::new(host, false), Condvar::new()));
        threads(3, move |index| {
            if index < 2 {
                drop(pair.1.wait_while(pair.0.lock(), None, |ready| !*ready));
            } else {
                *pair.0.lock() = true;
                pair.1.notify_all(&host);
            }
        });
    });
}

#[test]
fn rwlock_of_a_writer_and_readers() {
    check(|| {
        let lock = Arc::new(RwLock::new(Model::new(), Checked::new()));
        let shared = lock.clone();
        threads(3, move |index| {
            if index == 0 {
                shared.write().add();
            } else {
                assert!(shared.read().get() <= 1);
            }
        });
        assert_eq!(lock.read().get(), 1);
    });
}

#[test]
fn rwlock_of_writers_and_a_reader() {
    check(|| {
        let lock = Arc::new(RwLock::new(Model::new(), Checked::new()));
        let shared = lock.clone();
        threads(3, move |index| {
            if index < 2 {
                shared.write().add();
            } else {
                assert!(shared.read().get() <= 2);
            }
        });
        assert_eq!(lock.read().get(), 2);
    });
}

#[test]
fn rwlock_again_and_again() {
    check(|| {
        let lock = Arc::new(RwLock::new(Model::new(), Checked::new()));
        let shared = lock.clone();
        threads(2, move |_| {
            shared.write().add();
            let _ = shared.read().get();
        });
        assert_eq!(lock.read().get(), 2);
    });
}

/// The waiter's protocol of a signal: count, look, wait.
#[test]
fn signal_loses_nothing() {
    check(|| {
        let host = Model::new();
        let shared = Arc::new((Signal::new(), AtomicU32::new(0)));
        threads(2, move |index| {
            let (signal, work) = &*shared;
            if index == 0 {
                loop {
                    let seen = signal.count();
                    if work.load(SeqCst) == 2 {
                        break;
                    }
                    signal.wait(&host, seen, None);
                }
            } else {
                for _ in 0..2 {
                    work.fetch_add(1, SeqCst);
                    signal.raise(&host);
                }
            }
        });
    });
}

/// What was written before a raise is seen after the wait.
#[test]
fn signal_publishes() {
    check(|| {
        let host = Model::new();
        let shared = Arc::new((Signal::new(), Checked::new()));
        threads(2, move |index| {
            let (signal, data) = &*shared;
            if index == 0 {
                assert!(signal.wait(&host, 0, None));
                assert_eq!(data.get(), 1);
            } else {
                data.add();
                signal.raise(&host);
            }
        });
    });
}

#[test]
fn block_on_loses_no_wake() {
    check(|| {
        let host = Model::new();
        let shared = Arc::new((AtomicU32::new(0), loom::sync::Mutex::new(None::<Waker>)));
        threads(2, move |index| {
            let (turn, waker) = &*shared;
            if index == 0 {
                anykernel::task::block_on(
                    host,
                    core::future::poll_fn(|cx| {
                        *waker.lock().unwrap() = Some(cx.waker().clone());
                        if turn.load(SeqCst) == 2 { Poll::Ready(()) } else { Poll::Pending }
                    }),
                );
            } else {
                for _ in 0..2 {
                    turn.fetch_add(1, SeqCst);
                    let waker = waker.lock().unwrap().clone();
                    if let Some(waker) = waker {
                        waker.wake();
                    }
                }
            }
        });
    });
}

/// A task comes from outside while the executor's thread goes to sleep; then the stop does.
#[test]
fn executor_loses_neither_task_nor_stop() {
    check(|| {
        let host = Model::new();
        let executor = anykernel::task::Executor::new(host);
        let runs = Arc::new(AtomicU32::new(0));
        let (its_executor, its_runs) = (executor.clone(), runs.clone());
        threads(2, move |index| {
            if index == 0 {
                its_executor.run();
            } else {
                let runs = its_runs.clone();
                let task = its_executor.spawn_join(async move {
                    runs.fetch_add(1, SeqCst);
                });
                assert_eq!(anykernel::task::block_on(host, task), Some(()));
                its_executor.stop();
            }
        });
        assert_eq!(runs.load(SeqCst), 1);
    });
}
