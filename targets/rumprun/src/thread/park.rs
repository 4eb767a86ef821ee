//! Park and unpark: a hashed table of waiting threads.
//!
//! A bucket's lock makes "compare the word and go to sleep" one step with regard to `unpark`. The order of locks is: bucket,
//! then timer list; run queues are locked last.

use super::list::{List, QUEUE_LINK};
use super::{PARKING, Thread, scheduler};
use crate::cpu;
use crate::sync::{InterruptsOff, SpinLock};
use crate::time::{monotonic_ns, timer};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, Ordering};
use hypercall::ParkResult;

const BUCKETS: usize = 256;

static TABLE: [SpinLock<List<QUEUE_LINK>>; BUCKETS] = [const { SpinLock::new(List::new()) }; BUCKETS];

fn bucket(key: usize) -> &'static SpinLock<List<QUEUE_LINK>> {
    // Words are 4-aligned; multiplying spreads their addresses over the upper bits (Fibonacci hashing).
    let hash = (key >> 2).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    &TABLE[hash >> (usize::BITS - BUCKETS.ilog2())]
}

/// See [`hypercall::Threads::park`].
pub(crate) fn park(word: &AtomicU32, expected: u32, deadline_ns: Option<u64>) -> ParkResult {
    let key = core::ptr::from_ref(word).addr();
    let off = InterruptsOff::new();
    let Some(thread) = cpu::current_thread() else { panic!("park outside of a thread") };
    let mut waiters = bucket(key).lock();
    if word.load(Ordering::SeqCst) != expected {
        return ParkResult::Changed;
    }
    if deadline_ns.is_some_and(|deadline| monotonic_ns() >= deadline) {
        return ParkResult::TimedOut;
    }
    // SAFETY: the running thread lives, is in no list, and its bucket is locked.
    unsafe {
        let thread = thread.as_ref();
        thread.park_key.set(key);
        thread.timed_out.set(false);
        thread.state.store(PARKING, Ordering::Relaxed);
        waiters.push(thread.into());
        if let Some(deadline) = deadline_ns {
            timer::insert(thread.into(), deadline);
        }
    }
    drop(waiters);
    scheduler::leave_cpu();
    // SAFETY: the running thread lives; it is out of the bucket, so the flag is its own again.
    let timed_out = unsafe { thread.as_ref() }.timed_out.get();
    drop(off);
    if timed_out { ParkResult::TimedOut } else { ParkResult::Woken }
}

/// See [`hypercall::Threads::unpark`].
pub(crate) fn unpark(word: &AtomicU32, count: u32) -> u32 {
    unpark_address(core::ptr::from_ref(word).addr(), count)
}

/// The same for a word that may be gone: only its address counts.
pub(super) fn unpark_address(key: usize, count: u32) -> u32 {
    let mut woken = 0;
    if count == 0 {
        return 0;
    }
    {
        let mut waiters = bucket(key).lock();
        let mut at = waiters.first();
        while let Some(thread) = at
            && woken < count
        {
            // SAFETY: members of a bucket are parked threads, whose keys are covered by its lock; taken out of the
            // bucket and the timer list, the thread is in no list.
            unsafe {
                at = waiters.next(thread);
                if thread.as_ref().park_key.get() == key {
                    waiters.remove(thread);
                    timer::remove(thread);
                    scheduler::wake(thread);
                    woken += 1;
                }
            }
        }
    }
    if woken > 0 {
        scheduler::preempt_point();
    }
    woken
}

/// The deadline of a thread that parked on CPU `cpu` for `key` has passed, or had: the thread may be gone since.
pub(crate) fn time_out(cpu: u32, thread: NonNull<Thread>, key: usize) {
    let mut waiters = bucket(key).lock();
    if timer::still_due(cpu, thread, key) {
        // SAFETY: a thread in the timer list is parked; with the bucket locked it stays so, and it waits in this bucket.
        unsafe {
            waiters.remove(thread);
            timer::remove(thread);
            thread.as_ref().timed_out.set(true);
            scheduler::wake(thread);
        }
    }
}
