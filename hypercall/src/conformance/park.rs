//! [`crate::Threads`]: park and unpark.

use super::support::{Helper, MS, STUCK_NS, Stop, ensure, helper, pause, wait_until};
use crate::atomic::{
    AtomicU32,
    Ordering::{Acquire, Release, SeqCst},
};
use crate::{Host, ParkResult};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::AtomicU64;

/// Parks another thread on a word that nobody changes and returns when and how it came back.
fn park_aside<H: Host>(
    host: H,
    word: u32,
    expected: u32,
    for_ns: u64,
) -> Result<(ParkResult, u64, u64), Stop> {
    let word = Arc::new(AtomicU32::new(word));
    // When it began and ended, and the result.
    let times = Arc::new((AtomicU64::new(0), AtomicU64::new(0), AtomicU32::new(0)));
    let (its_word, its_times) = (word.clone(), times.clone());
    let thread = helper(host, None, move || {
        let start = host.monotonic_ns();
        let deadline = start + for_ns;
        let result = loop {
            let result = host.park(&its_word, expected, Some(deadline));
            // Returns for no reason are allowed, also beyond the deadline.
            if result != ParkResult::Woken || host.monotonic_ns() > deadline + STUCK_NS {
                break result;
            }
        };
        its_times.0.store(start, Release);
        its_times.1.store(host.monotonic_ns(), Release);
        its_times.2.store(result as u32, Release);
    })?;
    let returned = wait_until(host, for_ns + STUCK_NS, || thread.done());
    if !returned {
        // Out of its sleep, so that it can be joined: now the word differs, and it is woken.
        word.store(expected.wrapping_add(1), SeqCst);
        host.unpark(&word, u32::MAX);
    }
    thread.finish()?;
    ensure!(returned, "a park with a deadline {} ms away did not return", for_ns / MS);
    let result = match times.2.load(Acquire) {
        changed if changed == ParkResult::Changed as u32 => ParkResult::Changed,
        timed_out if timed_out == ParkResult::TimedOut as u32 => ParkResult::TimedOut,
        _ => ParkResult::Woken,
    };
    Ok((result, times.0.load(Acquire), times.1.load(Acquire)))
}

pub(super) fn deadline<H: Host>(host: H) -> Result<(), Stop> {
    for for_ns in [0, 10 * MS] {
        let (result, start, end) = park_aside(host, 7, 7, for_ns)?;
        // What else than a time-out it may be is for `park/compares`.
        let late = end.saturating_sub(start + for_ns);
        ensure!(
            result != ParkResult::Woken && late < 2_000 * MS,
            "a park of {} ms returned {result:?} {} ms late",
            for_ns / MS,
            late / MS
        );
    }
    Ok(())
}

pub(super) fn compares<H: Host>(host: H) -> Result<(), Stop> {
    for for_ns in [0, 100 * MS] {
        let (result, ..) = park_aside(host, 8, 7, for_ns)?;
        ensure!(
            result == ParkResult::Changed,
            "a park that expects 7 on a word that holds 8, deadline in {} ms, returned {result:?}",
            for_ns / MS
        );
    }
    let (result, ..) = park_aside(host, 7, 7, 5 * MS)?;
    ensure!(
        result == ParkResult::TimedOut,
        "a park that expects 7 on a word that holds 7 returned {result:?} at its deadline"
    );
    Ok(())
}

pub(super) fn not_early<H: Host>(host: H) -> Result<(), Stop> {
    let word = AtomicU32::new(7);
    for for_ns in [1_000, 100_000, MS, 3 * MS, 7 * MS] {
        let deadline = host.monotonic_ns() + for_ns;
        if host.park(&word, 7, Some(deadline)) == ParkResult::TimedOut {
            let now = host.monotonic_ns();
            ensure!(now >= deadline, "a park timed out {} ns before its deadline", deadline - now);
        }
    }
    Ok(())
}

pub(super) fn sleeps<H: Host>(host: H) -> Result<(), Stop> {
    let word = AtomicU32::new(7);
    let deadline = host.monotonic_ns() + 20 * MS;
    let mut returns = 0u32;
    while host.park(&word, 7, Some(deadline)) == ParkResult::Woken && returns < 10_000 {
        returns += 1;
    }
    ensure!(returns < 1_000, "in 20 ms park returned {returns} times for no reason: it does not sleep");
    Ok(())
}

const ROUNDS: u32 = 2_000;
/// Enough rounds when that much time has passed: where each wake crosses CPUs of a loaded emulator, a round takes 10 ms.
const ROUNDS_NS: u64 = 3_000 * MS;
/// Far longer than a wake takes, short enough to try twice.
const LOST_NS: u64 = 800 * MS;
/// So many wakes may seem lost because an overloaded machine ran their thread too late. A host that loses some loses more.
const MAY_BE_LATE: u32 = 1;

/// Waits until `word` is `value`. Counts into `lost` every time-out at which it had that value already.
fn await_value<H: Host>(host: H, word: &AtomicU32, value: u32, lost: &AtomicU32) -> bool {
    for _ in 0..8 {
        let seen = word.load(Acquire);
        if seen == value {
            return true;
        }
        let deadline = host.monotonic_ns() + LOST_NS;
        while word.load(Acquire) == seen {
            if host.park(word, seen, Some(deadline)) == ParkResult::TimedOut {
                if word.load(Acquire) == value {
                    lost.fetch_add(1, SeqCst);
                    return true;
                }
                break;
            }
        }
        if lost.load(SeqCst) > MAY_BE_LATE {
            return word.load(Acquire) == value;
        }
    }
    false
}

/// Two threads in turns: each stores the other's word, unparks it, and parks on its own.
pub(super) fn no_lost_wakeup<H: Host>(host: H) -> Result<(), Stop> {
    let words = Arc::new((AtomicU32::new(0), AtomicU32::new(0)));
    let lost = Arc::new(AtomicU32::new(0));
    let reached = Arc::new(AtomicU32::new(0));
    let last_round = Arc::new(AtomicU32::new(ROUNDS));
    let end_ns = host.monotonic_ns() + ROUNDS_NS;
    let start = |first: bool| {
        let (words, lost, reached) = (words.clone(), lost.clone(), reached.clone());
        let last_round = last_round.clone();
        move || {
            let (mine, other) = if first { (&words.0, &words.1) } else { (&words.1, &words.0) };
            for round in 1..=ROUNDS {
                // Stored before the word, so the second sees it when it gets the round.
                if first && host.monotonic_ns() > end_ns {
                    last_round.store(round, SeqCst);
                }
                // The second answers, so it waits first.
                if !first && !await_value(host, mine, round, &lost) {
                    return;
                }
                // Shifts one thread against the other, so that stores meet every moment of the park.
                for _ in 0..(round % 64) * 4 {
                    core::hint::spin_loop();
                }
                other.store(round, Release);
                host.unpark(other, 1);
                if first && !await_value(host, mine, round, &lost) {
                    return;
                }
                if lost.load(SeqCst) > MAY_BE_LATE {
                    return;
                }
                reached.fetch_max(round, SeqCst);
                if last_round.load(SeqCst) == round {
                    return;
                }
            }
        }
    };
    let last = host.cpu_count().saturating_sub(1);
    let both = [
        helper(host, Some(crate::CpuId(0)), start(true))?,
        helper(host, Some(crate::CpuId(last)), start(false))?,
    ];
    // Each waits at most eight times as long as a wake counts as lost.
    wait_until(host, 10 * LOST_NS, || both.iter().all(|thread| thread.done()));
    let stuck_at = reached.load(SeqCst);
    let lost = lost.load(SeqCst);
    for thread in both {
        thread.finish()?;
    }
    ensure!(
        lost <= MAY_BE_LATE,
        "in round {}: the word was changed and unparked, but its thread slept on to its deadline",
        stuck_at + 1
    );
    let rounds = last_round.load(SeqCst);
    ensure!(stuck_at == rounds, "two threads that wake each other stopped in round {}", stuck_at + 1);
    Ok(())
}

/// Threads that park once each on one word.
struct Sleepers<H> {
    host: H,
    word: Arc<AtomicU32>,
    /// How many are about to park, and how many have returned.
    counts: Arc<(AtomicU32, AtomicU32)>,
    threads: Vec<Helper<H>>,
}

impl<H: Host> Sleepers<H> {
    /// Starts `n` and gives them time to fall asleep.
    fn start(host: H, n: u32) -> Result<Self, Stop> {
        let word = Arc::new(AtomicU32::new(0));
        let counts = Arc::new((AtomicU32::new(0), AtomicU32::new(0)));
        let mut threads = Vec::new();
        for _ in 0..n {
            let (word, counts) = (word.clone(), counts.clone());
            threads.push(helper(host, None, move || {
                counts.0.fetch_add(1, SeqCst);
                host.park(&word, 0, Some(host.monotonic_ns() + STUCK_NS));
                counts.1.fetch_add(1, SeqCst);
            })?);
        }
        wait_until(host, STUCK_NS, || counts.0.load(SeqCst) == n);
        pause(host, 10 * MS);
        Ok(Self { host, word, counts, threads })
    }

    fn returned(&self) -> u32 {
        self.counts.1.load(SeqCst)
    }

    /// Wakes whoever still sleeps and joins all.
    fn end(self) -> Result<(), Stop> {
        self.word.store(1, SeqCst);
        for _ in 0..self.threads.len() {
            self.host.unpark(&self.word, u32::MAX);
        }
        self.threads.into_iter().try_for_each(Helper::finish)
    }
}

pub(super) fn unpark_nobody<H: Host>(host: H) -> Result<(), Stop> {
    let word = AtomicU32::new(0);
    for count in [0, 1, u32::MAX] {
        let woken = host.unpark(&word, count);
        ensure!(woken == 0, "unpark of a word on which nobody parks says that it woke {woken}");
    }
    Ok(())
}

pub(super) fn unpark_wakes<H: Host>(host: H) -> Result<(), Stop> {
    let sleepers = Sleepers::start(host, 1)?;
    // Without a change of the word, so that nothing but an unpark can end the park. Again and again, because the thread
    // may not have come to sleep yet.
    let woken = wait_until(host, LOST_NS, || {
        host.unpark(&sleepers.word, 1);
        pause(host, MS);
        sleepers.returned() == 1
    });
    sleepers.end()?;
    ensure!(woken, "a parked thread was not woken by unparks within {} ms", LOST_NS / MS);
    Ok(())
}

pub(super) fn unpark_count<H: Host>(host: H) -> Result<(), Stop> {
    let sleepers = Sleepers::start(host, 4)?;
    let mut counted = 0u64;
    let mut most = 0;
    wait_until(host, LOST_NS, || {
        let woken = host.unpark(&sleepers.word, 1);
        counted += u64::from(woken);
        most = most.max(woken);
        sleepers.returned() == 4
    });
    sleepers.end()?;
    ensure!(most <= 1, "unpark of at most one says that it woke {most}");
    ensure!(counted > 0, "unparks woke 4 threads and said that they woke none");
    ensure!(counted <= 4, "unparks say that they woke {counted} of 4 threads");
    Ok(())
}

pub(super) fn unpark_at_most<H: Host>(host: H) -> Result<(), Stop> {
    // A return for no reason may look like a second wake; three in a row do not.
    for _ in 0..3 {
        let sleepers = Sleepers::start(host, 4)?;
        let before = sleepers.returned();
        host.unpark(&sleepers.word, 1);
        pause(host, 20 * MS);
        let woken = sleepers.returned() - before;
        sleepers.end()?;
        if woken <= 1 {
            return Ok(());
        }
    }
    ensure!(false, "unpark of at most one of 4 sleepers woke several");
    Ok(())
}

pub(super) fn unpark_all<H: Host>(host: H) -> Result<(), Stop> {
    let mut returned = 0;
    // One that had not come to sleep yet is not the host's fault; three times in a row it is.
    for _ in 0..3 {
        let sleepers = Sleepers::start(host, 4)?;
        host.unpark(&sleepers.word, u32::MAX);
        wait_until(host, LOST_NS / 2, || sleepers.returned() == 4);
        returned = sleepers.returned();
        sleepers.end()?;
        if returned == 4 {
            return Ok(());
        }
    }
    ensure!(false, "unpark of all woke {returned} of 4 sleepers");
    Ok(())
}

pub(super) fn unpark_by_address<H: Host>(host: H) -> Result<(), Stop> {
    for _ in 0..3 {
        let sleepers = Sleepers::start(host, 2)?;
        let other = AtomicU32::new(0);
        let before = sleepers.returned();
        let counted = host.unpark(&other, u32::MAX);
        pause(host, 10 * MS);
        let woken = sleepers.returned() - before;
        sleepers.end()?;
        ensure!(counted == 0, "unpark of another word says that it woke {counted}");
        if woken == 0 {
            return Ok(());
        }
    }
    ensure!(false, "unpark of another word wakes sleepers");
    Ok(())
}
