//! Disks in memory, with a volatile cache that a crash empties.

use super::TestHost;
use crate::*;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

pub(super) struct Disk {
    info: DiskInfo,
    /// What a crash leaves.
    durable: Vec<u8>,
    /// Sectors written and not yet flushed.
    cache: BTreeMap<u64, Vec<u8>>,
    fail: Option<Error>,
    calls: DiskCalls,
}

/// How often a disk was asked for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskCalls {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
}

impl TestHost {
    /// Adds a disk that holds `content`, a whole number of sectors, and returns its number.
    pub fn add_disk(&self, content: Vec<u8>, sector_size: u32, read_only: bool) -> u32 {
        assert!(content.len().is_multiple_of(sector_size as usize), "a disk has whole sectors");
        let info =
            DiskInfo { sector_size, sectors: content.len() as u64 / u64::from(sector_size), read_only };
        let disk =
            Disk { info, durable: content, cache: BTreeMap::new(), fail: None, calls: DiskCalls::default() };
        let mut disks = self.0.disks.lock().unwrap();
        disks.push(disk);
        disks.len() as u32 - 1
    }

    /// From now on every transfer of `disk` fails like this, or none does.
    pub fn fail_disk(&self, disk: u32, error: Option<Error>) {
        self.0.disks.lock().unwrap()[disk as usize].fail = error;
    }

    /// Power is lost: what was not flushed is gone.
    pub fn crash_disk(&self, disk: u32) {
        self.0.disks.lock().unwrap()[disk as usize].cache.clear();
    }

    /// What is durable on `disk`.
    pub fn disk_content(&self, disk: u32) -> Vec<u8> {
        self.0.disks.lock().unwrap()[disk as usize].durable.clone()
    }

    /// What was asked of `disk` so far.
    pub fn disk_calls(&self, disk: u32) -> DiskCalls {
        self.0.disks.lock().unwrap()[disk as usize].calls
    }

    /// Calls `body` with the disk and the range in bytes, once both are checked.
    fn with_disk<T>(
        &self,
        disk: u32,
        transfer: Option<(u64, usize)>,
        body: impl FnOnce(&mut Disk) -> Result<T>,
    ) -> Result<T> {
        let mut disks = self.0.disks.lock().unwrap();
        let disk = disks.get_mut(disk as usize).ok_or(Error::NotFound)?;
        if let Some((sector, len)) = transfer {
            let size = disk.info.sector_size as usize;
            let end = sector.checked_add((len / size) as u64);
            if !len.is_multiple_of(size) || end.is_none_or(|end| end > disk.info.sectors) {
                return Err(Error::Invalid);
            }
        }
        match disk.fail {
            Some(error) => Err(error),
            None => body(disk),
        }
    }
}

impl HostBlock for TestHost {
    fn disk_count(&self) -> u32 {
        self.0.disks.lock().unwrap().len() as u32
    }

    fn disk_info(&self, disk: u32) -> Result<DiskInfo> {
        self.0.disks.lock().unwrap().get(disk as usize).map(|disk| disk.info).ok_or(Error::NotFound)
    }

    fn disk_read(&self, disk: u32, sector: u64, buf: &mut [u8]) -> Result<()> {
        self.with_disk(disk, Some((sector, buf.len())), |disk| {
            disk.calls.reads += 1;
            let size = disk.info.sector_size as usize;
            for (at, part) in (sector..).zip(buf.chunks_mut(size)) {
                match disk.cache.get(&at) {
                    Some(cached) => part.copy_from_slice(cached),
                    None => part.copy_from_slice(&disk.durable[at as usize * size..][..size]),
                }
            }
            Ok(())
        })
    }

    fn disk_write(&self, disk: u32, sector: u64, buf: &[u8]) -> Result<()> {
        self.with_disk(disk, Some((sector, buf.len())), |disk| {
            if disk.info.read_only {
                return Err(Error::Denied);
            }
            disk.calls.writes += 1;
            for (at, part) in (sector..).zip(buf.chunks(disk.info.sector_size as usize)) {
                disk.cache.insert(at, part.to_vec());
            }
            Ok(())
        })
    }

    fn disk_flush(&self, disk: u32) -> Result<()> {
        self.with_disk(disk, None, |disk| {
            disk.calls.flushes += 1;
            let size = disk.info.sector_size as usize;
            for (at, part) in core::mem::take(&mut disk.cache) {
                disk.durable[at as usize * size..][..size].copy_from_slice(&part);
            }
            Ok(())
        })
    }
}
