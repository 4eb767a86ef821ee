//! [`crate::Clock`].

use super::support::{MS, STUCK_NS, Stop, ensure, helper, wait_until};
use crate::{CpuId, Host};
use alloc::sync::Arc;
use core::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Acquire, Release},
};

pub(super) fn monotonic<H: Host>(host: H) -> Result<(), Stop> {
    let mut last = host.monotonic_ns();
    for _ in 0..20_000 {
        let now = host.monotonic_ns();
        ensure!(now >= last, "time went back by {} ns", last - now);
        last = now;
    }
    Ok(())
}

pub(super) fn advances<H: Host>(host: H) -> Result<(), Stop> {
    let start = host.monotonic_ns();
    for _ in 0..1_000_000 {
        if host.monotonic_ns() > start {
            return Ok(());
        }
        host.yield_now();
    }
    ensure!(false, "the clock stood still over 1,000,000 yields");
    Ok(())
}

pub(super) fn resolution<H: Host>(host: H) -> Result<(), Stop> {
    let mut smallest = u64::MAX;
    let mut last = host.monotonic_ns();
    let start = last;
    while smallest > 100_000 && last.saturating_sub(start) < 200 * MS {
        let now = host.monotonic_ns();
        if now > last {
            smallest = smallest.min(now - last);
        }
        last = last.max(now);
    }
    ensure!(smallest <= MS, "the smallest step of the clock is {smallest} ns, more than 1 ms");
    Ok(())
}

pub(super) fn realtime<H: Host>(host: H) -> Result<(), Stop> {
    /// 2020-01-01 and 2200-01-01.
    const YEARS: core::ops::Range<u64> = 1_577_836_800_000_000_000..7_258_118_400_000_000_000;
    let first = host.realtime_ns();
    if first == 0 {
        return Ok(()); // It does not know, which is allowed.
    }
    ensure!(YEARS.contains(&first), "wall time {first} ns is neither 0 nor between the years 2020 and 2200");
    let goes_on = wait_until(host, 500 * MS, || host.realtime_ns() != first);
    ensure!(goes_on, "wall time stood still for 500 ms");
    Ok(())
}

/// Two CPUs look at the time in turns, each told by the other what it saw.
pub(super) fn monotonic_across<H: Host>(host: H) -> Result<(), Stop> {
    const TURNS: u64 = 1_000;
    // Whose turn it is, the latest time seen, and the longest way back.
    let shared = Arc::new([const { AtomicU64::new(0) }; 3]);
    // Enough by then: on a loaded emulator a turn takes as long as its host's scheduler likes.
    let end_ns = host.monotonic_ns() + STUCK_NS / 3;
    let look = |me: u64| {
        let shared = shared.clone();
        move || {
            let [turn, latest, worst] = &*shared;
            for mine in (me..TURNS).step_by(2) {
                if !wait_until(host, STUCK_NS / 2, || turn.load(Acquire) >= mine) {
                    break;
                }
                let now = host.monotonic_ns();
                worst.fetch_max(latest.load(Acquire).saturating_sub(now), AcqRel);
                latest.fetch_max(now, AcqRel);
                turn.store(mine + 1, Release);
                if now > end_ns {
                    break;
                }
            }
        }
    };
    let first = helper(host, Some(CpuId(0)), look(0))?;
    let second = helper(host, Some(CpuId(host.cpu_count().saturating_sub(1))), look(1))?;
    first.finish()?;
    second.finish()?;
    let [turn, _, worst] = shared.each_ref().map(|one| one.load(Acquire));
    ensure!(worst == 0, "one CPU saw a time {worst} ns before what another had seen already");
    let late = host.monotonic_ns() > end_ns && turn > 1;
    ensure!(turn == TURNS || late, "two threads stopped taking turns after {turn}");
    Ok(())
}
