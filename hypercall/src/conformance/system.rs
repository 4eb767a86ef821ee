//! [`crate::Versions`], [`crate::Cpus`], [`crate::Entropy`] and [`crate::Params`].

use super::support::{Stop, ensure, helper, not_run};
use crate::{ContractVersion, Error, Host, check_versions};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{
    AtomicU32,
    Ordering::{Acquire, Release},
};

pub(super) fn versions_core<H: Host>(host: H) -> Result<(), Stop> {
    let refusal = check_versions(&[ContractVersion::CORE], host.contracts()).err();
    ensure!(refusal.is_none(), "this crate is refused: {refusal:?}");
    Ok(())
}

pub(super) fn versions_one_each<H: Host>(host: H) -> Result<(), Stop> {
    let mut names: Vec<_> = host.contracts().iter().map(|contract| contract.name).collect();
    let all = names.len();
    names.sort_unstable();
    names.dedup();
    ensure!(names.len() == all, "a contract is listed twice");
    Ok(())
}

pub(super) fn cpus_count<H: Host>(host: H) -> Result<(), Stop> {
    let count = host.cpu_count();
    ensure!((1..=4096).contains(&count), "cpu_count is {count}");
    ensure!(host.cpu_count() == count, "cpu_count changes");
    Ok(())
}

pub(super) fn cpus_in_range<H: Host>(host: H) -> Result<(), Stop> {
    let highest = Arc::new(AtomicU32::new(0));
    let look = {
        let highest = highest.clone();
        move || {
            for _ in 0..200 {
                highest.fetch_max(host.current_cpu().0, Release);
                host.yield_now();
            }
        }
    };
    let thread = helper(host, None, look.clone())?;
    look();
    thread.finish()?;
    let (highest, count) = (highest.load(Acquire), host.cpu_count());
    ensure!(highest < count, "a thread runs on CPU {highest}, but there are {count}");
    Ok(())
}

fn draw<H: Host>(host: H, buf: &mut [u8]) -> Result<(), Stop> {
    match host.fill_random(buf) {
        Ok(()) => Ok(()),
        Err(Error::Unsupported) => Err(Stop::NotRun("the platform has no source of entropy".into())),
        Err(error) => Err(Stop::Fail(alloc::format!("fill_random of {} bytes: {error}", buf.len()))),
    }
}

pub(super) fn entropy_fills<H: Host>(host: H) -> Result<(), Stop> {
    draw(host, &mut [])?;
    for len in [1, 7, 8, 33, 200] {
        // A byte that is 0 after every one of many draws was never written.
        let mut seen = alloc::vec![0u8; len];
        for _ in 0..24 {
            let mut buf = alloc::vec![0u8; len];
            draw(host, &mut buf)?;
            seen.iter_mut().zip(&buf).for_each(|(seen, byte)| *seen |= byte);
        }
        let missed = seen.iter().position(|byte| *byte == 0);
        ensure!(missed.is_none(), "of {len} bytes, byte {} is never filled", missed.unwrap_or(0));
    }
    Ok(())
}

pub(super) fn entropy_not_constant<H: Host>(host: H) -> Result<(), Stop> {
    let mut draws = Vec::new();
    for _ in 0..16 {
        let mut buf = [0u8; 16];
        draw(host, &mut buf)?;
        draws.push(buf);
    }
    draws.sort_unstable();
    draws.dedup();
    ensure!(draws.len() == 16, "of 16 draws of 16 bytes only {} differ", draws.len());
    Ok(())
}

pub(super) fn params_unknown<H: Host>(host: H) -> Result<(), Stop> {
    for key in ["", "conformance-no-such-parameter"] {
        let result = host.param(key, &mut [0; 64]);
        ensure!(result == Err(Error::NotFound), "parameter {key:?}, which nobody set, returned {result:?}");
    }
    Ok(())
}

/// The configuration, in a buffer that is just large enough or larger.
fn config<H: Host>(host: H) -> Result<Vec<u8>, Stop> {
    let mut size = 256;
    while size <= 1 << 20 {
        let mut buf = alloc::vec![0; size];
        match host.param("config", &mut buf) {
            Ok(len) => {
                ensure!(len <= size, "a value of {len} bytes was put into {size}");
                buf.truncate(len);
                return Ok(buf);
            }
            Err(Error::BufferTooSmall) => size *= 2,
            Err(Error::NotFound) => not_run!("the domain was given no configuration"),
            Err(error) => return Err(Stop::Fail(alloc::format!("parameter config: {error}"))),
        }
    }
    Err(Stop::Fail("parameter config is larger than 1 MiB".into()))
}

pub(super) fn params_config<H: Host>(host: H) -> Result<(), Stop> {
    let first = config(host)?;
    ensure!(core::str::from_utf8(&first).is_ok(), "parameter config is not UTF-8");
    ensure!(config(host)? == first, "parameter config changes");
    let mut exact = alloc::vec![0; first.len()];
    let result = host.param("config", &mut exact);
    ensure!(result == Ok(first.len()), "parameter config into a buffer of its length returned {result:?}");
    ensure!(exact == first, "parameter config differs in a buffer of its length");
    Ok(())
}

pub(super) fn params_too_small<H: Host>(host: H) -> Result<(), Stop> {
    let value = config(host)?;
    if value.is_empty() {
        not_run!("the configuration is empty");
    }
    for len in [0, value.len() / 2, value.len() - 1] {
        let mut buf = alloc::vec![0xaa; len];
        let result = host.param("config", &mut buf);
        ensure!(
            result == Err(Error::BufferTooSmall),
            "a value of {} bytes into a buffer of {len} returned {result:?} instead of BufferTooSmall",
            value.len()
        );
        ensure!(buf.iter().all(|byte| *byte == 0xaa), "the buffer was written although it is too small");
    }
    Ok(())
}
