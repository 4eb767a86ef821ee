//! ext4, ext3 and ext2, read-only, by the kernel's description of the format (`Documentation/filesystems/ext4`).
//!
//! * [`superblock`]: what a volume is; refused if it has features that are not known here.
//! * [`volume`]: checked access to blocks, group descriptors and inodes.
//! * [`inode`] and [`map`]: files, links, and where their blocks are.
//! * [`directory`], [`htree`] and [`hash`]: names.
//! * [`journal`]: what a crash left in the journal, laid over the volume in memory. Nothing is ever written.
//!
//! What is encrypted is [`FsError::Unsupported`]; names in case-insensitive directories are found as they are written.
//! Extended attributes are not read.
//!
//! Every number from the disk is checked before it is used, and every checksum where the volume has them.
//! Contradictions are [`FsError::Corrupt`], logged with what they are and counted in `vfs.ext4_corruptions`.

mod bytes;
mod checksum;
mod directory;
mod hash;
mod htree;
mod inode;
mod journal;
mod map;
mod superblock;
#[cfg(test)]
mod tests;
mod volume;

use crate::cache::{BlockCache, CachedDevice};
use alloc::string::String;
use alloc::sync::Arc;
use anykernel::Kernel;
use anykernel::block::{BlockDevice, BlockError};
use anykernel::counter::Counter;
use anykernel::fs::{FileKind, FileSystem, FsError, FsStats, FsType, Inode, Result};
use hypercall::Host;
use superblock::{Refused, Superblock, incompat};
use volume::Volume;

/// The root directory's inode.
const ROOT: u32 = 2;

/// The kind of file system.
pub struct Ext4<H: Host> {
    host: H,
    cache: Arc<BlockCache<H>>,
    inodes_kept: usize,
    corruptions: Counter,
    replays: Counter,
}

impl<H: Host> Ext4<H> {
    /// Reads its devices through `cache`.
    pub fn new(kernel: &Kernel<H>, cache: Arc<BlockCache<H>>) -> Self {
        let host = kernel.host().of_component("ext4");
        Self {
            host,
            cache,
            inodes_kept: (host.memory_bytes() >> 15).clamp(64, 16_384) as usize,
            corruptions: kernel.counter("vfs.ext4_corruptions"),
            replays: kernel.counter("vfs.ext4_journal_replays"),
        }
    }

    fn superblock(&self, device: &CachedDevice<H>) -> Result<Result<Superblock, Refused>> {
        let mut bytes = [0; superblock::LEN];
        match device.read_at(superblock::OFFSET, &mut bytes) {
            Ok(()) => {}
            // A device too small for a superblock has none.
            Err(BlockError::Invalid) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(Superblock::parse(&bytes, device.bytes()))
    }
}

impl<H: Host> FsType for Ext4<H> {
    fn name(&self) -> &'static str {
        "ext4"
    }

    fn probe(&self, device: &Arc<dyn BlockDevice>) -> Result<bool> {
        let refused = self.superblock(&*self.cache.open(device.clone())?)?.err();
        // A broken one is still one: to mount it tells what is wrong.
        Ok(refused.is_none_or(|refused| refused.error != FsError::NotAFileSystem))
    }

    fn explain(&self, device: &Arc<dyn BlockDevice>) -> Option<String> {
        let device = self.cache.open(device.clone()).ok()?;
        let refused = self.superblock(&device).ok()?.err()?;
        Some(refused.line)
    }

    fn mount(&self, device: Option<Arc<dyn BlockDevice>>, _read_only: bool) -> Result<Arc<dyn FileSystem>> {
        let device = self.cache.open(device.ok_or(FsError::Invalid)?)?;
        let superblock = self.superblock(&device)?.map_err(|refused| {
            log::warn!("{}: {}", device.info().name, refused.line);
            refused.error
        })?;
        let dirty = superblock.has(incompat::RECOVER);
        let new = |superblock| {
            Volume::new(self.host, device.clone(), superblock, self.inodes_kept, self.corruptions.clone())
        };
        let mut volume = new(superblock.clone());
        if dirty {
            let raw = Arc::new(volume);
            let overlay = journal::replay(&raw);
            raw.close();
            let overlay = overlay?;
            self.replays.increment();
            log::info!(
                "{}: ext4: replayed {} blocks of the journal in memory",
                device.info().name,
                overlay.len()
            );
            volume = new(superblock);
            volume.overlay = overlay;
            // The journal may hold a newer superblock too.
            let mut bytes = [0; superblock::LEN];
            volume.read(superblock::OFFSET, &mut bytes)?;
            volume.superblock = Superblock::parse(&bytes, device.bytes()).map_err(|refused| refused.error)?;
        }
        let volume = Arc::new(volume);
        let mounted = Mounted { volume };
        if mounted.volume.inode(ROOT)?.kind != FileKind::Directory {
            return Err(mounted.volume.corrupt(format_args!("the root is not a directory")));
        }
        Ok(Arc::new(mounted))
    }
}

/// A mounted volume, as its user has it. Dropping it lets go of what is kept in memory.
struct Mounted<H: Host> {
    volume: Arc<Volume<H>>,
}

impl<H: Host> Drop for Mounted<H> {
    fn drop(&mut self) {
        self.volume.close();
    }
}

impl<H: Host> FileSystem for Mounted<H> {
    fn root(&self) -> Result<Arc<dyn Inode>> {
        Ok(self.volume.inode(ROOT)?)
    }

    fn stats(&self) -> Result<FsStats> {
        let sb = &self.volume.superblock;
        Ok(FsStats {
            kind: "ext4",
            block_size: sb.block_size,
            blocks: sb.blocks,
            free_blocks: sb.free_blocks,
            max_name: 255,
            read_only: true,
            label: sb.label.clone(),
        })
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}
