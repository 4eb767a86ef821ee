//! `vfat`: FAT12, FAT16 and FAT32 with long names, over the block cache.
//!
//! * [`bpb`]: the boot sector; [`table`]: the allocation table; [`chain`]: clusters of a file as extents;
//! * [`entry`], [`name`], [`time`]: how directories keep names and attributes;
//! * [`meta`]: changes that wait, and the order in which they reach the disk, so that a crash costs clusters, not files;
//! * [`volume`], [`dir`], [`file`]: a mounted volume and what is on it; [`node`]: the inodes that users hold.
//!
//! Names are UTF-8 here and UTF-16 on the disk. They keep their case and are found in any case (Unicode's simple
//! mapping), by their short alias too. A long name on the disk that is not valid UTF-16, or contains `/`, is shown by
//! its alias. Times are UTC. There are no owners, links or holes; what is skipped in a file is written as zeros.
//!
//! An image may say anything: chains that leave the volume, meet free clusters, other chains or themselves, entries
//! without sense. That ends in [`FsError::Corrupt`] where it is met; nothing is followed without a bound.
//!
//! Source: fatgen103 (see [`bpb`]).

mod bpb;
mod bytes;
mod chain;
mod dir;
mod entry;
mod file;
mod meta;
mod name;
mod node;
mod table;
#[cfg(test)]
mod tests;
mod time;
mod volume;

use crate::cache::BlockCache;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use anykernel::block::BlockDevice;
use anykernel::fs::{FileSystem, FsError, FsStats, FsType, Inode, Result};
use anykernel::sync::Mutex;
use hypercall::Host;
use node::Node;
use volume::Volume;

/// The kind `vfat`.
pub struct VFat<H: Host> {
    host: H,
    cache: Arc<BlockCache<H>>,
    /// What is mounted, or still has open files.
    volumes: Mutex<H, Vec<Weak<Volume<H>>>>,
}

impl<H: Host> VFat<H> {
    /// A kind whose mounts read and write through `cache`. Time comes from `host`.
    pub fn new(host: H, cache: Arc<BlockCache<H>>) -> Self {
        Self { host, cache, volumes: Mutex::new(host, Vec::new()) }
    }
}

impl<H: Host> FsType for VFat<H> {
    fn name(&self) -> &'static str {
        "vfat"
    }

    fn probe(&self, device: &Arc<dyn BlockDevice>) -> Result<bool> {
        let disk = self.cache.open(device.clone())?;
        match volume::read_layout(&disk) {
            // A boot sector that contradicts itself is ours to refuse, at mount, with the reason.
            Ok(_) | Err(FsError::Corrupt) => Ok(true),
            Err(FsError::NotAFileSystem | FsError::Unsupported) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Mounts. A volume that was not cleanly unmounted is mounted with a warning, and stays marked. [`FsError::Busy`] if
    /// the device is mounted or has open files from before, and not all is read-only: two writers would not know of each
    /// other.
    fn mount(&self, device: Option<Arc<dyn BlockDevice>>, read_only: bool) -> Result<Arc<dyn FileSystem>> {
        let device = device.ok_or(FsError::Invalid)?;
        let disk = self.cache.open(device)?;
        let mut volumes = self.volumes.lock();
        volumes.retain(|volume| volume.strong_count() > 0);
        let read_only = read_only || disk.info().read_only;
        let others: Vec<_> = volumes.iter().filter_map(Weak::upgrade).collect();
        let in_use = others
            .iter()
            .any(|other| Arc::ptr_eq(&other.table.disk, &disk) && !(read_only && other.read_only));
        if in_use {
            return Err(FsError::Busy);
        }
        let volume = Volume::open(self.host, disk, read_only)?;
        // So that a root that makes no sense is refused here.
        Node::root(&volume)?;
        volumes.push(Arc::downgrade(&volume));
        drop(volumes);
        Ok(Arc::new(Mount { volume }))
    }
}

struct Mount<H: Host> {
    volume: Arc<Volume<H>>,
}

impl<H: Host> FileSystem for Mount<H> {
    fn root(&self) -> Result<Arc<dyn Inode>> {
        Ok(Arc::new(Node::root(&self.volume)?))
    }

    /// Where the table was not counted yet, this reads all of it.
    fn stats(&self) -> Result<FsStats> {
        let layout = &self.volume.table.layout;
        let label = self.volume.label()?;
        let free = self.volume.free_clusters(&mut self.volume.meta.write())?;
        Ok(FsStats {
            kind: "vfat",
            block_size: layout.cluster_bytes,
            blocks: layout.clusters.into(),
            free_blocks: free.into(),
            max_name: name::MAX_BYTES,
            read_only: self.volume.read_only,
            label,
        })
    }

    fn sync(&self) -> Result<()> {
        self.volume.sync()
    }
}
