//! [`crate::HostBlock`].

use super::support::{Stop, ensure, helper, not_run};
use crate::{DiskInfo, Error, Host, HostBlock};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

/// How much of a disk the checks use.
const SCRATCH_BYTES: u64 = 1 << 20;

fn look<H: Host + HostBlock>(host: H, disk: u32) -> Result<DiskInfo, Stop> {
    host.disk_info(disk).map_err(|error| Stop::Fail(alloc::format!("disk_info({disk}): {error}")))
}

/// The disk's sector size and how many sectors may be overwritten.
fn scratch<H: Host + HostBlock>(host: H, disk: u32) -> Result<(usize, u64), Stop> {
    let info = look(host, disk)?;
    if info.read_only {
        not_run!("disk {disk} is read-only");
    }
    let sectors = info.sectors.min(SCRATCH_BYTES / u64::from(info.sector_size));
    if sectors < 16 {
        not_run!("disk {disk} has fewer than 16 sectors");
    }
    Ok((info.sector_size as usize, sectors))
}

fn read<H: Host + HostBlock>(host: H, disk: u32, sector: u64, len: usize, fill: u8) -> Result<Vec<u8>, Stop> {
    let mut buf = alloc::vec![fill; len];
    let result = host.disk_read(disk, sector, &mut buf);
    ensure!(result.is_ok(), "read of {len} bytes at sector {sector}: {result:?}");
    Ok(buf)
}

fn write<H: Host + HostBlock>(host: H, disk: u32, sector: u64, data: &[u8]) -> Result<(), Stop> {
    let result = host.disk_write(disk, sector, data);
    ensure!(result.is_ok(), "write of {} bytes at sector {sector}: {result:?}", data.len());
    Ok(())
}

/// Bytes that tell the place and the round they were written for.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

pub(super) fn info<H: Host + HostBlock>(host: H, disk: u32) -> Result<(), Stop> {
    let info = look(host, disk)?;
    let size = info.sector_size;
    ensure!(size.is_power_of_two() && (512..=4096).contains(&size), "sectors of {size} bytes");
    let bytes = info.sectors.checked_mul(u64::from(size));
    ensure!(info.sectors > 0 && bytes.is_some(), "{} sectors of {size} bytes", info.sectors);
    ensure!(look(host, disk)? == info, "disk_info changes");
    ensure!(disk < host.disk_count(), "disk {disk} exists, but disk_count is {}", host.disk_count());
    Ok(())
}

pub(super) fn not_found<H: Host + HostBlock>(host: H) -> Result<(), Stop> {
    for disk in [host.disk_count(), u32::MAX] {
        let results = [
            host.disk_info(disk).map(|_| ()),
            host.disk_read(disk, 0, &mut [0; 512]),
            host.disk_write(disk, 0, &[0; 512]),
            host.disk_flush(disk),
        ];
        let refused = results.iter().all(|result| *result == Err(Error::NotFound));
        ensure!(refused, "calls for disk {disk}, which is none, returned {results:?}");
    }
    Ok(())
}

pub(super) fn bounds<H: Host + HostBlock>(host: H, disk: u32) -> Result<(), Stop> {
    let info = look(host, disk)?;
    let size = info.sector_size as usize;
    let last = read(host, disk, info.sectors - 1, size, 0)?;
    for (sector, count) in [(info.sectors, 1), (info.sectors - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 4)] {
        let result = host.disk_read(disk, sector, &mut alloc::vec![0; count * size]);
        ensure!(
            result == Err(Error::Invalid),
            "read of {count} sectors at {sector} of {} returned {result:?} instead of Invalid",
            info.sectors
        );
        let result = host.disk_write(disk, sector, &alloc::vec![0x5a; count * size]);
        let refused = result == Err(Error::Invalid) || info.read_only && result == Err(Error::Denied);
        ensure!(refused, "write of {count} sectors at {sector} of {} returned {result:?}", info.sectors);
    }
    let after = read(host, disk, info.sectors - 1, size, 0)?;
    ensure!(after == last, "a write that was refused changed the last sector");
    Ok(())
}

pub(super) fn whole_sectors<H: Host + HostBlock>(host: H, disk: u32) -> Result<(), Stop> {
    let info = look(host, disk)?;
    let size = info.sector_size as usize;
    for len in [1, size - 1, size + 1] {
        let result = host.disk_read(disk, 0, &mut alloc::vec![0; len]);
        ensure!(result == Err(Error::Invalid), "read of {len} bytes returned {result:?} instead of Invalid");
        let result = host.disk_write(disk, 0, &alloc::vec![0; len]);
        let refused = result == Err(Error::Invalid) || info.read_only && result == Err(Error::Denied);
        ensure!(refused, "write of {len} bytes returned {result:?} instead of Invalid");
    }
    Ok(())
}

/// What a read leaves out keeps what the buffer held before, so two different fillings show it.
pub(super) fn reads_whole<H: Host + HostBlock>(host: H, disk: u32) -> Result<(), Stop> {
    let info = look(host, disk)?;
    let size = info.sector_size as usize;
    for count in [1, 2, 8, 64, 128] {
        if count as u64 > info.sectors {
            break;
        }
        for sector in [0, info.sectors - count as u64] {
            let one = read(host, disk, sector, count * size, 0x00)?;
            let two = read(host, disk, sector, count * size, 0xff)?;
            let short = one.iter().zip(&two).position(|(one, two)| one != two);
            ensure!(
                short.is_none(),
                "read of {} bytes at sector {sector} returned Ok but filled only {}",
                count * size,
                short.unwrap_or(0)
            );
        }
    }
    Ok(())
}

pub(super) fn reads_same<H: Host + HostBlock>(host: H, disk: u32) -> Result<(), Stop> {
    let info = look(host, disk)?;
    let size = info.sector_size as usize;
    let count = info.sectors.min(32) as usize;
    let at_once = read(host, disk, 0, count * size, 0)?;
    for (sector, part) in (0..).zip(at_once.chunks(size)) {
        let single = read(host, disk, sector, size, 0)?;
        ensure!(single == part, "sector {sector} read alone differs from the same within {count}");
    }
    Ok(())
}

pub(super) fn read_only<H: Host + HostBlock>(host: H, disk: u32) -> Result<(), Stop> {
    let info = look(host, disk)?;
    if !info.read_only {
        not_run!("disk {disk} can be written");
    }
    let size = info.sector_size as usize;
    let before = read(host, disk, 0, size, 0)?;
    let inverted: Vec<u8> = before.iter().map(|byte| !byte).collect();
    let result = host.disk_write(disk, 0, &inverted);
    ensure!(
        result == Err(Error::Denied),
        "a write to a read-only disk returned {result:?} instead of Denied"
    );
    ensure!(read(host, disk, 0, size, 0)? == before, "a write to a read-only disk changed it");
    Ok(())
}

pub(super) fn write_read<H: Host + HostBlock>(host: H, disk: u32) -> Result<(), Stop> {
    let (size, sectors) = scratch(host, disk)?;
    for (seed, count) in [(1, 1), (2, 3), (3, 16), (4, sectors.min(128) as usize)] {
        let sector = sectors - count as u64;
        let data = pattern(seed, count * size);
        write(host, disk, sector, &data)?;
        let back = read(host, disk, sector, count * size, 0)?;
        let differs = back.iter().zip(&data).position(|(back, data)| back != data);
        ensure!(
            differs.is_none(),
            "{count} sectors written at {sector} read back different from byte {}",
            differs.unwrap_or(0)
        );
    }
    Ok(())
}

pub(super) fn neighbours<H: Host + HostBlock>(host: H, disk: u32) -> Result<(), Stop> {
    let (size, _) = scratch(host, disk)?;
    let mut expected = pattern(5, 16 * size);
    write(host, disk, 0, &expected)?;
    for (seed, at, count) in [(6, 1, 1), (7, 4, 3), (8, 15, 1), (9, 0, 1)] {
        let data = pattern(seed, count * size);
        write(host, disk, at as u64, &data)?;
        expected.splice(at * size..(at + count) * size, data);
        let back = read(host, disk, 0, 16 * size, 0)?;
        ensure!(back == expected, "a write of {count} sectors at {at} changed others, or came out elsewhere");
    }
    Ok(())
}

pub(super) fn flush_keeps<H: Host + HostBlock>(host: H, disk: u32) -> Result<(), Stop> {
    let (size, _) = scratch(host, disk)?;
    for seed in 10..14 {
        let data = pattern(seed, 8 * size);
        write(host, disk, 4, &data)?;
        let flushed = host.disk_flush(disk);
        ensure!(flushed.is_ok(), "flush returned {flushed:?}");
        ensure!(read(host, disk, 4, 8 * size, 0)? == data, "what was written is gone after a flush");
    }
    Ok(())
}

pub(super) fn many_threads<H: Host + HostBlock>(host: H, disk: u32) -> Result<(), Stop> {
    const THREADS: u64 = 4;
    let (size, sectors) = scratch(host, disk)?;
    let bad = Arc::new(AtomicU32::new(0));
    let share = sectors / THREADS;
    let mut threads = Vec::new();
    for thread in 0..THREADS {
        let bad = bad.clone();
        threads.push(helper(host, None, move || {
            for round in 0..16u64 {
                let data = pattern(100 + thread * 100 + round, size);
                let sector = thread * share + round % share;
                let mut back = alloc::vec![0; size];
                let fine = host.disk_write(disk, sector, &data).is_ok()
                    && host.disk_read(disk, sector, &mut back).is_ok()
                    && back == data;
                bad.fetch_add(u32::from(!fine), SeqCst);
            }
        })?);
    }
    for thread in threads {
        thread.finish()?;
    }
    let bad = bad.load(SeqCst);
    ensure!(
        bad == 0,
        "{THREADS} threads on parts of their own: {bad} of 64 writes failed or read back different"
    );
    Ok(())
}
