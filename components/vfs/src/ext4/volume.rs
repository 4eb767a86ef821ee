//! A mounted volume: checked access to its blocks, group descriptors and inodes.

use super::bytes::{join, le16, le32};
use super::checksum::{crc16, crc32c};
use super::directory::Kept;
use super::inode::Ext4Inode;
use super::journal::Overlay;
use super::superblock::{self, Superblock, compat, incompat, ro_compat};
use crate::cache::CachedDevice;
use crate::clock_map::ClockMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::counter::Counter;
use anykernel::fs::{FsError, Result};
use anykernel::sync::Mutex;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use hypercall::Host;

/// How many complaints about one volume are logged; all are counted.
const MAX_COMPLAINTS: u32 = 16;

pub(super) struct Volume<H: Host> {
    pub(super) device: Arc<CachedDevice<H>>,
    pub(super) superblock: Superblock,
    /// Blocks whose newest content is in the journal.
    pub(super) overlay: Overlay,
    inodes: Mutex<H, ClockMap<u32, Arc<Ext4Inode<H>>>>,
    /// The block of entries that was used last.
    pub(super) kept: Mutex<H, Option<Arc<Kept>>>,
    /// The group whose descriptor was read last, and its inode table.
    table: Mutex<H, Option<(u32, u64)>>,
    /// Unmounted: inodes are kept no more.
    closed: AtomicBool,
    corruptions: Counter,
    complaints: AtomicU32,
}

impl<H: Host> Volume<H> {
    pub(super) fn new(
        host: H,
        device: Arc<CachedDevice<H>>,
        superblock: Superblock,
        inodes_kept: usize,
        corruptions: Counter,
    ) -> Self {
        Self {
            device,
            superblock,
            overlay: Overlay::default(),
            inodes: Mutex::new(host, ClockMap::new(inodes_kept)),
            kept: Mutex::new(host, None),
            table: Mutex::new(host, None),
            closed: AtomicBool::new(false),
            corruptions,
            complaints: AtomicU32::new(0),
        }
    }

    /// Counts and reports a contradiction.
    pub(super) fn corrupt(&self, what: fmt::Arguments<'_>) -> FsError {
        self.corruptions.increment();
        if self.complaints.fetch_add(1, Ordering::Relaxed) < MAX_COMPLAINTS {
            log::warn!("{}: ext4: {what}: run e2fsck on the image", self.device.info().name);
        }
        FsError::Corrupt
    }

    pub(super) fn block_size(&self) -> usize {
        self.superblock.block_size as usize
    }

    /// Reads bytes of the volume, as they are after the journal's replay.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.device.read_at(offset, buf)?;
        if self.overlay.is_empty() {
            return Ok(());
        }
        let block_size = u64::from(self.superblock.block_size);
        let end = offset + buf.len() as u64;
        for patch in self.overlay.range(offset / block_size, end.div_ceil(block_size)) {
            let start = patch.block * block_size;
            let from = start.max(offset);
            let to = (start + block_size).min(end);
            let Some(part) = buf.get_mut((from - offset) as usize..(to - offset) as usize) else { continue };
            self.device.read_at(patch.source * block_size + (from - start), part)?;
            if patch.escaped {
                // The journal blanks the first four bytes of a block that begins with its magic number.
                let magic = super::journal::MAGIC.to_be_bytes();
                for (at, byte) in part.iter_mut().enumerate() {
                    if let Some(original) = magic.get((from - start) as usize + at) {
                        *byte = *original;
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether `count` blocks from `block` lie in the volume, behind its superblock.
    pub(super) fn holds(&self, block: u64, count: u64) -> bool {
        block > u64::from(self.superblock.first_data_block)
            && block.checked_add(count).is_some_and(|end| end <= self.superblock.blocks)
    }

    /// Reads a block of metadata into `block`, which gets the length of a block.
    pub(super) fn read_block(&self, number: u64, block: &mut Vec<u8>) -> Result<()> {
        if !self.holds(number, 1) {
            return Err(self.corrupt(format_args!("block {number} is referred to, but does not exist")));
        }
        block.clear();
        block.try_reserve_exact(self.block_size()).map_err(|_| FsError::NoMemory)?;
        block.resize(self.block_size(), 0);
        self.read(number * self.block_size() as u64, block)
    }

    fn has_backup(&self, group: u32) -> bool {
        let sb = &self.superblock;
        if sb.compat & compat::SPARSE_SUPER2 != 0 {
            return group == 0 || sb.backup_groups.contains(&group);
        }
        if !sb.has_ro(ro_compat::SPARSE_SUPER) || group <= 1 {
            return true;
        }
        let power_of = |base: u32| {
            let mut power = base;
            while power < group {
                power = power.saturating_mul(base);
            }
            power == group
        };
        power_of(3) || power_of(5) || power_of(7)
    }

    /// Where the descriptor of a group is, in bytes.
    fn descriptor_offset(&self, group: u32) -> u64 {
        let sb = &self.superblock;
        let size = u32::from(sb.descriptor_size);
        let per_block = sb.block_size / size;
        let index = group / per_block;
        let block = if sb.has(incompat::META_BG) && index >= sb.first_meta_group {
            // Each block of descriptors lies in the first group that it describes.
            let first = index * per_block;
            let start = u64::from(sb.first_data_block) + u64::from(first) * u64::from(sb.blocks_per_group);
            // Behind the superblock; with blocks of 1 KiB that is in block 1, even where block 0 counts.
            let skipped = first == 0 && sb.first_data_block == 0 && sb.block_size == 1024;
            start + u64::from(self.has_backup(first)) + u64::from(skipped)
        } else {
            superblock::OFFSET / u64::from(sb.block_size) + 1 + u64::from(index)
        };
        block * u64::from(sb.block_size) + u64::from(group % per_block * size)
    }

    /// First block of a group's inode table.
    fn inode_table(&self, group: u32) -> Result<u64> {
        let known = *self.table.lock();
        if let Some((_, table)) = known.filter(|(of, _)| *of == group) {
            return Ok(table);
        }
        let sb = &self.superblock;
        let mut descriptor = [0; 1024];
        let descriptor = descriptor.get_mut(..usize::from(sb.descriptor_size)).ok_or(FsError::Corrupt)?;
        self.read(self.descriptor_offset(group), descriptor)?;
        let broken = || self.corrupt(format_args!("the descriptor of group {group} is wrong"));
        let stored = le16(descriptor, 0x1e).ok_or_else(broken)?;
        let (before, after) =
            (descriptor.get(..0x1e).unwrap_or_default(), descriptor.get(0x20..).unwrap_or_default());
        if sb.metadata_checksums() {
            let crc = crc32c(crc32c(sb.checksum_seed, &group.to_le_bytes()), before);
            if crc32c(crc32c(crc, &[0, 0]), after) as u16 != stored {
                return Err(broken());
            }
        } else if sb.has_ro(ro_compat::GDT_CSUM) {
            let crc = crc16(crc16(crc16(!0, &sb.uuid), &group.to_le_bytes()), before);
            // Without 64bit there is nothing after the checksum.
            if crc16(crc, after) != stored {
                return Err(broken());
            }
        }
        let low = le32(descriptor, 0x8).ok_or_else(broken)?;
        let high = if sb.descriptor_size >= 64 && sb.has(incompat::BIT64) {
            le32(descriptor, 0x28)
        } else {
            Some(0)
        };
        let table = join(high.ok_or_else(broken)?, low);
        let blocks =
            (u64::from(sb.inodes_per_group) * u64::from(sb.inode_size)).div_ceil(u64::from(sb.block_size));
        if !self.holds(table, blocks) {
            return Err(broken());
        }
        *self.table.lock() = Some((group, table));
        Ok(table)
    }

    /// The inode `number`, from memory if it is there.
    pub(super) fn inode(self: &Arc<Self>, number: u32) -> Result<Arc<Ext4Inode<H>>> {
        let hash = number.wrapping_mul(0x9e37_79b9) >> 8;
        if let Some(known) = self.inodes.lock().get(hash, |key| *key == number) {
            return Ok(known.clone());
        }
        let inode = Arc::new(Ext4Inode::parse(self.clone(), number, self.raw_inode(number)?)?);
        let gone = if self.closed.load(Ordering::Acquire) {
            None
        } else {
            self.inodes.lock().insert(hash, number, inode.clone())
        };
        drop(gone);
        Ok(inode)
    }

    /// Lets go of all inodes, which refer to us.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        let inodes = self.inodes.lock().clear();
        inodes.for_each(drop);
    }

    fn raw_inode(&self, number: u32) -> Result<Vec<u8>> {
        let sb = &self.superblock;
        if number == 0 || number > sb.inodes {
            return Err(self.corrupt(format_args!("inode {number} is referred to, but does not exist")));
        }
        let group = (number - 1) / sb.inodes_per_group;
        let index = (number - 1) % sb.inodes_per_group;
        let offset =
            self.inode_table(group)? * u64::from(sb.block_size) + u64::from(index) * u64::from(sb.inode_size);
        let mut raw = Vec::new();
        raw.try_reserve_exact(usize::from(sb.inode_size)).map_err(|_| FsError::NoMemory)?;
        raw.resize(usize::from(sb.inode_size), 0);
        self.read(offset, &mut raw)?;
        Ok(raw)
    }
}
