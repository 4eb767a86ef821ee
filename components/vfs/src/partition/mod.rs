//! Partitions: each becomes a block device `diskNpM`.
//!
//! A protective MBR means GPT (UEFI 2.10, 5.3); everything else that looks like one is an MBR (UEFI 2.10, 5.2, and the
//! extended partitions of DOS). What is not inside the disk, or overlaps an earlier partition, is left out with a
//! warning and counted in `vfs.partitions_refused`.

mod gpt;
mod mbr;
#[cfg(test)]
mod tests;

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::block::{BlockDevice, BlockError, BlockInfo, Op, Rejected, Request, transfer};
use hypercall::Host;

/// Most partitions of one disk.
const MAX_PARTITIONS: usize = 256;

/// Where a partition is, in sectors of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Extent {
    /// As its name counts: from 1; logical partitions of an MBR from 5.
    number: u32,
    first: u64,
    count: u64,
}

/// A part of a disk as a device. Completed requests carry the sector of the disk.
struct Partition {
    disk: Arc<dyn BlockDevice>,
    first: u64,
    info: BlockInfo,
}

impl Partition {
    /// Hands a request to the disk's `submit`, with its sector counted from the start of the disk.
    fn pass(
        &self,
        mut request: Request,
        submit: impl FnOnce(Request) -> Result<(), Rejected>,
    ) -> Result<(), Rejected> {
        if request.op == Op::Flush {
            return submit(request);
        }
        let sectors = (request.bytes() / self.info.sector_size as usize) as u64;
        let inside = request.sector.checked_add(sectors).is_some_and(|end| end <= self.info.sectors);
        if !inside {
            return Err(Rejected { request, reason: Some(BlockError::Invalid) });
        }
        let sector = request.sector;
        request.sector += self.first;
        submit(request).map_err(|mut rejected| {
            rejected.request.sector = sector;
            rejected
        })
    }
}

impl BlockDevice for Partition {
    fn info(&self) -> &BlockInfo {
        &self.info
    }

    fn submit(&self, request: Request) -> Result<(), Rejected> {
        self.pass(request, |request| self.disk.submit(request))
    }

    fn submit_and_poll(&self, request: Request) -> Result<(), Rejected> {
        self.pass(request, |request| self.disk.submit_and_poll(request))
    }

    fn poll(&self) {
        self.disk.poll();
    }
}

/// Reads sectors of a disk.
struct Reader<'a, H> {
    host: H,
    disk: &'a Arc<dyn BlockDevice>,
}

impl<H: Host> Reader<'_, H> {
    fn sector_size(&self) -> usize {
        self.disk.info().sector_size as usize
    }

    fn sectors(&self) -> u64 {
        self.disk.info().sectors
    }

    /// `count` sectors from `first`, in requests that the disk takes.
    fn read(&self, first: u64, count: usize) -> Result<Vec<u8>, BlockError> {
        let most = (self.disk.info().max_request_bytes / self.sector_size()).max(1);
        let mut content = Vec::new();
        content.try_reserve_exact(count * self.sector_size()).map_err(|_| BlockError::NoMemory)?;
        let mut done = 0;
        while done < count {
            let now = (count - done).min(most);
            let memory: Box<[u8]> = vec![0; now * self.sector_size()].into_boxed_slice();
            let back = transfer(self.host, &**self.disk, Op::Read, first + done as u64, vec![memory])?;
            back.iter().for_each(|memory| content.extend_from_slice(memory));
            done += now;
        }
        Ok(content)
    }
}

/// Looks for partitions on every device that is registered now and has none yet, and registers them. A disk that cannot
/// be read is reported and skipped. Called again for disks that were plugged in since; a mount does so by itself when it
/// misses its device. Context: thread. Blocks.
pub fn scan<H: Host>(kernel: &Kernel<H>) {
    let devices = kernel.block_devices();
    let is_part = |name: &str, disk: &str| {
        let number = name.strip_prefix(disk).and_then(|rest| rest.strip_prefix('p'));
        number.is_some_and(|number| number.parse::<u32>().is_ok())
    };
    for disk in &devices {
        let name = disk.info().name.clone();
        let related = devices.iter().map(|other| &other.info().name);
        if related.into_iter().any(|other| is_part(other, &name) || is_part(&name, other)) {
            continue;
        }
        let sector_size = disk.info().sector_size as usize;
        if !sector_size.is_power_of_two() || !(512..=4096).contains(&sector_size) || disk.info().sectors < 2 {
            continue;
        }
        let reader = Reader { host: kernel.host(), disk };
        let mut refused = Vec::new();
        match find(&reader, &mut refused) {
            Ok(extents) => {
                for extent in extents {
                    kernel.add_block_device(Arc::new(partition(disk, extent)));
                }
            }
            Err(error) => log::warn!("{name}: its partitions are unknown: {error}"),
        }
        for line in refused {
            kernel.counter("vfs.partitions_refused").increment();
            log::warn!("{name}: {line}");
        }
    }
}

fn partition(disk: &Arc<dyn BlockDevice>, extent: Extent) -> Partition {
    let info = disk.info();
    let name = format!("{}p{}", info.name, extent.number);
    Partition {
        info: BlockInfo { name, sectors: extent.count, ..info.clone() },
        disk: disk.clone(),
        first: extent.first,
    }
}

/// The partitions of a disk, in the order of their table, none of them outside the disk or in another's place.
fn find<H: Host>(reader: &Reader<'_, H>, refused: &mut Vec<String>) -> Result<Vec<Extent>, BlockError> {
    let boot = reader.read(0, 1)?;
    let found = match mbr::parse(&boot, reader.sectors()) {
        None => Vec::new(),
        Some(table) if table.protective => gpt::read(reader, refused)?,
        Some(table) => mbr::read(reader, &table, refused)?,
    };
    let mut kept: Vec<Extent> = Vec::new();
    for extent in found {
        let end = extent.first.checked_add(extent.count);
        let overlaps = |other: &&Extent| {
            extent.first < other.first + other.count
                && other.first < extent.first.saturating_add(extent.count)
        };
        if extent.count == 0 || end.is_none_or(|end| end > reader.sectors()) {
            refused.push(format!(
                "partition {} is not inside the disk: was its image cut short?",
                extent.number
            ));
        } else if let Some(other) = kept.iter().find(overlaps) {
            refused.push(format!("partition {} overlaps partition {}", extent.number, other.number));
        } else if kept.len() == MAX_PARTITIONS {
            refused.push(format!("more than {MAX_PARTITIONS} partitions"));
            break;
        } else {
            kept.push(extent);
        }
    }
    Ok(kept)
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
}
