//! [`crate::Threads`]: starting and joining.

use super::support::{MS, STUCK_NS, Stop, ensure, helper, not_run, pause, wait_until};
use crate::{CpuId, Error, Host, ThreadId, ThreadSpec};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Acquire, Release, SeqCst},
};

pub(super) fn run<H: Host>(host: H) -> Result<(), Stop> {
    let runs = Arc::new(AtomicU32::new(0));
    let mine = runs.clone();
    helper(host, None, move || {
        mine.fetch_add(1, SeqCst);
    })?
    .finish()?;
    pause(host, 2 * MS);
    let runs = runs.load(SeqCst);
    ensure!(runs == 1, "the entry of a thread ran {runs} times");
    Ok(())
}

pub(super) fn join_waits<H: Host>(host: H) -> Result<(), Stop> {
    let ended = Arc::new(AtomicU32::new(0));
    let mine = ended.clone();
    let entry = Box::new(move || {
        pause(host, 20 * MS);
        mine.store(1, Release);
    });
    let thread = spawn(host, None, entry)?;
    let joined = host.join(thread);
    let early = ended.load(Acquire) == 0;
    // Not to leave it behind in either case.
    wait_until(host, STUCK_NS, || ended.load(Acquire) == 1);
    ensure!(joined.is_ok(), "join returned {joined:?}");
    ensure!(!early, "join returned before the thread had ended");
    Ok(())
}

pub(super) fn join_frees<H: Host>(host: H) -> Result<(), Stop> {
    let captured = Arc::new(());
    let mine = captured.clone();
    let thread = spawn(host, None, Box::new(move || drop(mine)))?;
    let joined = host.join(thread);
    ensure!(joined.is_ok(), "join returned {joined:?}");
    ensure!(Arc::strong_count(&captured) == 1, "what the entry captured is still alive after join");
    Ok(())
}

pub(super) fn join_once<H: Host>(host: H) -> Result<(), Stop> {
    let thread = spawn(host, None, Box::new(|| ()))?;
    let first = host.join(thread);
    ensure!(first.is_ok(), "the first join returned {first:?}");
    let second = host.join(thread);
    ensure!(second == Err(Error::NotFound), "the second join returned {second:?} instead of NotFound");
    Ok(())
}

pub(super) fn join_unknown<H: Host>(host: H) -> Result<(), Stop> {
    for id in [0, u64::MAX - 1] {
        let result = host.join(ThreadId(id));
        ensure!(result == Err(Error::NotFound), "join of thread {id}, which is none, returned {result:?}");
    }
    Ok(())
}

pub(super) fn join_self<H: Host>(host: H) -> Result<(), Stop> {
    /// Of the thread's answer: not there yet, right, wrong.
    const NONE: u32 = 0;
    const REFUSED: u32 = 1;
    const OTHER: u32 = 2;
    let id = Arc::new(AtomicU64::new(0));
    let answer = Arc::new(AtomicU32::new(NONE));
    let (its_id, its_answer) = (id.clone(), answer.clone());
    let entry = Box::new(move || {
        wait_until(host, STUCK_NS, || its_id.load(Acquire) != 0);
        let result = host.join(ThreadId(its_id.load(Acquire)));
        its_answer.store(if result == Err(Error::NotFound) { REFUSED } else { OTHER }, Release);
    });
    let thread = spawn(host, None, entry)?;
    id.store(thread.0, Release);
    let answered = wait_until(host, STUCK_NS, || answer.load(Acquire) != NONE);
    ensure!(answered, "a thread that joins itself hangs");
    ensure!(answer.load(Acquire) == REFUSED, "a thread that joined itself was not refused with NotFound");
    let joined = host.join(thread);
    ensure!(joined.is_ok(), "after it tried to join itself a thread cannot be joined: {joined:?}");
    Ok(())
}

pub(super) fn ids<H: Host>(host: H) -> Result<(), Stop> {
    let go = Arc::new(AtomicU32::new(0));
    let mut threads = Vec::new();
    for _ in 0..4 {
        let go = go.clone();
        let entry = Box::new(move || {
            wait_until(host, STUCK_NS, || go.load(Acquire) != 0);
        });
        threads.push(spawn(host, None, entry)?);
    }
    let mut ids = threads.clone();
    ids.sort();
    ids.dedup();
    let fine = ids.len() == threads.len() && !ids.contains(&ThreadId(0));
    go.store(1, Release);
    for thread in ids {
        // Whether join is right is another check.
        let _ = host.join(thread);
    }
    ensure!(fine, "threads alive at once have the ids {threads:?}");
    Ok(())
}

pub(super) fn many<H: Host>(host: H) -> Result<(), Stop> {
    let count = Arc::new(AtomicU32::new(0));
    for _ in 0..8 {
        let mut batch = Vec::new();
        for _ in 0..8 {
            let count = count.clone();
            batch.push(helper(host, None, move || {
                count.fetch_add(1, SeqCst);
            })?);
        }
        for thread in batch {
            thread.finish()?;
        }
    }
    let count = count.load(SeqCst);
    ensure!(count == 64, "of 64 threads {count} ran");
    Ok(())
}

pub(super) fn cpu_refused<H: Host>(host: H) -> Result<(), Stop> {
    for cpu in [host.cpu_count(), u32::MAX] {
        let result = host.spawn(ThreadSpec { name: "conformance", cpu: Some(CpuId(cpu)) }, Box::new(|| ()));
        if let Ok(thread) = result {
            let _ = host.join(thread);
        }
        ensure!(result == Err(Error::Invalid), "spawn on CPU {cpu}, which is none, returned {result:?}");
    }
    Ok(())
}

pub(super) fn cpu_binding<H: Host>(host: H) -> Result<(), Stop> {
    for cpu in 0..host.cpu_count() {
        let strayed = Arc::new(AtomicU32::new(u32::MAX));
        let mine = strayed.clone();
        helper(host, Some(CpuId(cpu)), move || {
            for _ in 0..50 {
                let now = host.current_cpu().0;
                if now != cpu {
                    mine.store(now, SeqCst);
                }
                host.yield_now();
            }
        })?
        .finish()?;
        let strayed = strayed.load(SeqCst);
        ensure!(strayed == u32::MAX, "a thread bound to CPU {cpu} ran on CPU {strayed}");
    }
    Ok(())
}

/// Two threads on two CPUs wait for each other without ever yielding.
pub(super) fn parallel<H: Host>(host: H) -> Result<(), Stop> {
    let cpus = host.cpu_count();
    if cpus < 2 {
        not_run!("the domain has one CPU");
    }
    let turn = Arc::new(AtomicU32::new(0));
    let play = |me: u32| {
        let turn = turn.clone();
        move || {
            let start = host.monotonic_ns();
            while turn.load(Acquire) < 20 && host.monotonic_ns().saturating_sub(start) < STUCK_NS {
                if turn.load(Acquire) % 2 == me {
                    turn.fetch_add(1, Release);
                }
                core::hint::spin_loop();
            }
        }
    };
    let both = [helper(host, Some(CpuId(0)), play(0))?, helper(host, Some(CpuId(cpus - 1)), play(1))?];
    // They give up by themselves, so the limit here is a longer one.
    wait_until(host, 2 * STUCK_NS, || both.iter().all(|thread| thread.done()));
    for thread in both {
        thread.finish()?;
    }
    let turns = turn.load(Acquire);
    ensure!(turns >= 20, "threads on CPUs 0 and {} do not run at the same time", cpus - 1);
    Ok(())
}

fn spawn<H: Host>(
    host: H,
    cpu: Option<CpuId>,
    entry: Box<dyn FnOnce() + Send + 'static>,
) -> Result<ThreadId, Stop> {
    let spec = ThreadSpec { name: "conformance", cpu };
    host.spawn(spec, entry).map_err(|error| Stop::Fail(alloc::format!("spawn failed: {error}")))
}
