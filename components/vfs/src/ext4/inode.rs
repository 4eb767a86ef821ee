//! Inodes ("Index Nodes", `inodes.rst`), and what can be done with them.

use super::bytes::{join, le16, le32};
use super::checksum::crc32c;
use super::map::{self, Leaf};
use super::superblock::{incompat, ro_compat};
use super::volume::Volume;
use super::{directory, htree};
use crate::cache::ReadAhead;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::fs::{DirEntry, FileKind, FsError, Inode, Metadata, Result, Timestamp};
use anykernel::sync::Mutex;
use hypercall::Host;

pub(super) mod flag {
    pub(crate) const ENCRYPT: u32 = 0x800;
    pub(crate) const INDEX: u32 = 0x1000;
    pub(crate) const HUGE_FILE: u32 = 0x4_0000;
    pub(crate) const EXTENTS: u32 = 0x8_0000;
    pub(crate) const INLINE_DATA: u32 = 0x1000_0000;
}

/// Bytes of `i_block`: the root of the extent tree, block numbers, a short link, or data.
pub(super) const ROOT_LEN: usize = 60;
/// Longest target of a symbolic link.
const MAX_LINK: u64 = 4095;
/// How many pieces of a file one read-ahead covers at most.
const MAX_AHEAD_RUNS: usize = 8;

pub(super) struct Ext4Inode<H: Host> {
    pub(super) volume: Arc<Volume<H>>,
    pub(super) number: u32,
    pub(super) flags: u32,
    pub(super) size: u64,
    pub(super) kind: FileKind,
    /// Start of the checksums of this inode's blocks.
    pub(super) checksum_seed: u32,
    pub(super) root: [u8; ROOT_LEN],
    /// Content that lies in the inode itself.
    inline: Option<Vec<u8>>,
    metadata: Metadata,
    /// The leaf of the block map used last.
    leaf: Mutex<H, Option<Arc<Leaf>>>,
    read_ahead: ReadAhead,
}

impl<H: Host> Ext4Inode<H> {
    /// Reads an inode from its bytes in the inode table. Free inodes are [`FsError::Corrupt`], because something
    /// refers to them.
    pub(super) fn parse(volume: Arc<Volume<H>>, number: u32, raw: Vec<u8>) -> Result<Self> {
        let bad = |what: &str| volume.corrupt(format_args!("inode {number}: {what}"));
        let sb = &volume.superblock;
        let u16_at = |at| le16(&raw, at).ok_or_else(|| bad("it is cut short"));
        let u32_at = |at| le32(&raw, at).ok_or_else(|| bad("it is cut short"));
        let extra = if raw.len() > 128 { usize::from(u16_at(0x80)?) } else { 0 };
        if 128 + extra > raw.len() || extra % 4 != 0 {
            return Err(bad("its extra size is wrong"));
        }
        // Fields behind byte 128 exist as far as `extra` reaches.
        let extra_u32 = |at: usize| if at + 4 <= 128 + extra { u32_at(at) } else { Ok(0) };
        let generation = u32_at(0x64)?;
        let seed = crc32c(crc32c(sb.checksum_seed, &number.to_le_bytes()), &generation.to_le_bytes());
        if sb.metadata_checksums() && !checksum_is_good(&raw, seed, extra) {
            return Err(bad("its checksum is wrong"));
        }
        let mode = u16_at(0x0)?;
        let links = u16_at(0x1a)?;
        let kind = match mode >> 12 {
            0x8 => FileKind::File,
            0x4 => FileKind::Directory,
            0xa => FileKind::Symlink,
            0x1 | 0x2 | 0x6 | 0xc => FileKind::Special,
            _ => return Err(bad("it is of no known kind")),
        };
        if links == 0 {
            return Err(bad("it is free, but referred to"));
        }
        let flags = u32_at(0x20)?;
        let large = kind == FileKind::File || kind == FileKind::Directory && sb.has(incompat::LARGEDIR);
        let size = join(if large { u32_at(0x6c)? } else { 0 }, u32_at(0x4)?);
        let block_size = u64::from(sb.block_size);
        let most = match kind {
            // Block numbers within a file have 32 bits.
            FileKind::File => block_size << 32,
            // Nothing in a directory is shared or left out, so it fits the volume.
            FileKind::Directory => block_size * sb.blocks,
            FileKind::Symlink => MAX_LINK,
            _ => u64::MAX,
        };
        if size > most {
            return Err(bad("its size is impossible"));
        }
        let mut root = [0; ROOT_LEN];
        root.copy_from_slice(raw.get(0x28..0x28 + ROOT_LEN).ok_or_else(|| bad("it is cut short"))?);
        let inline = if flags & flag::INLINE_DATA != 0 {
            Some(inline_data(&raw, &root, 128 + extra).ok_or_else(|| bad("its inline data is wrong"))?)
        } else {
            None
        };
        let sectors = join(u32::from(u16_at(0x74)?), u32_at(0x1c)?);
        let unit =
            if sb.has_ro(ro_compat::HUGE_FILE) && flags & flag::HUGE_FILE != 0 { block_size } else { 512 };
        let time = |at, extra_at| -> Result<_> { Ok(timestamp(u32_at(at)?, extra_u32(extra_at)?)) };
        let metadata = Metadata {
            inode: u64::from(number),
            kind,
            mode: mode & 0o7777,
            size,
            allocated: sectors.saturating_mul(unit),
            links: u32::from(links),
            uid: u32::from(u16_at(0x78)?) << 16 | u32::from(u16_at(0x2)?),
            gid: u32::from(u16_at(0x7a)?) << 16 | u32::from(u16_at(0x18)?),
            modified: time(0x10, 0x88)?,
            accessed: time(0x8, 0x8c)?,
            changed: time(0xc, 0x84)?,
        };
        let cache = volume.device.cache();
        let (host, ahead) = (cache.host(), cache.read_ahead_bytes());
        Ok(Self {
            number,
            flags,
            size,
            kind,
            checksum_seed: seed,
            root,
            inline,
            metadata,
            leaf: Mutex::new(host, None),
            read_ahead: ReadAhead::new(ahead),
            volume,
        })
    }

    pub(super) fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Content, names and targets of encrypted inodes are noise without a key.
    fn refuse_encrypted(&self) -> Result<()> {
        if self.has(flag::ENCRYPT) { Err(FsError::Unsupported) } else { Ok(()) }
    }

    pub(super) fn bad(&self, what: &str) -> FsError {
        self.volume.corrupt(format_args!("inode {}: {what}", self.number))
    }

    /// Content that lies in the inode.
    pub(super) fn inline(&self) -> Option<&[u8]> {
        self.inline.as_deref()
    }

    /// The part of the block map that holds `block`.
    pub(super) fn leaf(&self, block: u64) -> Result<Arc<Leaf>> {
        if let Some(leaf) = &*self.leaf.lock()
            && leaf.covers(block)
        {
            return Ok(leaf.clone());
        }
        let leaf = Arc::new(map::load(self, block)?);
        *self.leaf.lock() = Some(leaf.clone());
        Ok(leaf)
    }

    /// Reads a block of a directory. Directories have no holes.
    pub(super) fn directory_block(&self, block: u64, buf: &mut Vec<u8>) -> Result<()> {
        let run = self.leaf(block)?.run(block);
        let physical = run.physical.ok_or_else(|| self.bad("a directory with a hole"))?;
        self.volume.read_block(physical, buf)
    }

    fn fetch_ahead(&self, range: core::ops::Range<u64>) {
        let block_size = self.volume.block_size() as u64;
        let end = range.end.min(self.size.next_multiple_of(block_size));
        let mut at = range.start;
        for _ in 0..MAX_AHEAD_RUNS {
            if at >= end {
                return;
            }
            // An error here is found again by whoever reads that far.
            let Ok(leaf) = self.leaf(at / block_size) else { return };
            let run = leaf.run(at / block_size);
            let within = at % block_size;
            let len = (run.count.saturating_mul(block_size) - within).min(end - at);
            if let Some(physical) = run.physical {
                self.volume.device.prefetch(physical * block_size + within, len);
            }
            at += len;
        }
    }
}

/// The checksum covers the inode with its two checksum fields zero.
fn checksum_is_good(raw: &[u8], seed: u32, extra: usize) -> bool {
    let wide = extra >= 4;
    let (Some(low), Some(start), Some(middle)) = (le16(raw, 0x7c), raw.get(..0x7c), raw.get(0x7e..0x80))
    else {
        return false;
    };
    let mut crc = crc32c(crc32c(crc32c(seed, start), &[0, 0]), middle);
    let rest = raw.get(0x80..).unwrap_or_default();
    if !wide {
        return crc32c(crc, rest) as u16 == low;
    }
    let Some(high) = le16(raw, 0x82) else { return false };
    crc = crc32c(crc32c(crc, rest.get(..2).unwrap_or_default()), &[0, 0]);
    crc32c(crc, rest.get(4..).unwrap_or_default()) == u32::from(high) << 16 | u32::from(low)
}

/// Seconds since 1970 as a signed number, extended by two bits, and nanoseconds.
fn timestamp(seconds: u32, extra: u32) -> Timestamp {
    let epoch = i64::from(extra & 3) << 32;
    Timestamp { seconds: i64::from(seconds.cast_signed()) + epoch, nanos: (extra >> 2).min(999_999_999) }
}

/// The first 60 bytes are in the root, the rest is the value of the attribute `system.data` behind the inode's fields.
fn inline_data(raw: &[u8], root: &[u8], attributes: usize) -> Option<Vec<u8>> {
    let mut data = root.to_vec();
    if le32(raw, attributes) != Some(0xea02_0000) {
        return Some(data);
    }
    let first = attributes + 4;
    let mut at = first;
    // Entries take 16 bytes or more each, and end with four zeros.
    while le32(raw, at).is_some_and(|head| head != 0) {
        let (name_len, space) = (usize::from(*raw.get(at)?), *raw.get(at + 1)?);
        let (offset, len) = (usize::from(le16(raw, at + 2)?), le32(raw, at + 8)? as usize);
        let name = raw.get(at + 16..at + 16 + name_len)?;
        if space == 7 && name == b"data" {
            let start = first + offset;
            data.extend_from_slice(raw.get(start..start.checked_add(len)?)?);
            return Some(data);
        }
        at += (16 + name_len).next_multiple_of(4);
    }
    Some(data)
}

impl<H: Host> Inode for Ext4Inode<H> {
    fn metadata(&self) -> Result<Metadata> {
        Ok(self.metadata.clone())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        match self.kind {
            FileKind::File => {}
            FileKind::Directory => return Err(FsError::IsDirectory),
            _ => return Err(FsError::Invalid),
        }
        self.refuse_encrypted()?;
        let len = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
        let Some(mut rest) = buf.get_mut(..len) else { return Ok(0) };
        if let Some(inline) = &self.inline {
            let from = offset.min(inline.len() as u64) as usize;
            let there = inline.get(from..).unwrap_or_default();
            let (copied, zeroed) = rest.split_at_mut(there.len().min(len));
            copied.copy_from_slice(there.get(..copied.len()).unwrap_or_default());
            zeroed.fill(0);
            return Ok(len);
        }
        if let Some(ahead) = self.read_ahead.note(offset, len as u64) {
            self.fetch_ahead(ahead);
        }
        let block_size = self.volume.block_size() as u64;
        let mut at = offset;
        while !rest.is_empty() {
            let run = self.leaf(at / block_size)?.run(at / block_size);
            let within = at % block_size;
            let here = (run.count.saturating_mul(block_size) - within).min(rest.len() as u64) as usize;
            let (part, after) = rest.split_at_mut(here);
            match run.physical {
                Some(physical) => self.volume.read(physical * block_size + within, part)?,
                None => part.fill(0),
            }
            at += here as u64;
            rest = after;
        }
        Ok(len)
    }

    fn lookup(&self, name: &[u8]) -> Result<Arc<dyn Inode>> {
        if self.kind != FileKind::Directory {
            return Err(FsError::NotDirectory);
        }
        self.refuse_encrypted()?;
        // Names of 256 bytes and more cannot be there.
        if name.is_empty() || name.len() > 255 {
            return Err(if name.is_empty() { FsError::NotFound } else { FsError::BadName });
        }
        let found = match htree::lookup(self, name)? {
            htree::Answer::Found(number) => Some(number),
            htree::Answer::Absent => None,
            htree::Answer::NotIndexed => directory::lookup(self, name)?,
        };
        Ok(self.volume.inode(found.ok_or(FsError::NotFound)?)?)
    }

    fn read_dir(&self, cursor: u64, sink: &mut dyn FnMut(DirEntry) -> bool) -> Result<Option<u64>> {
        if self.kind != FileKind::Directory {
            return Err(FsError::NotDirectory);
        }
        self.refuse_encrypted()?;
        directory::list(self, cursor, sink)
    }

    fn read_link(&self) -> Result<Vec<u8>> {
        if self.kind != FileKind::Symlink {
            return Err(FsError::Invalid);
        }
        self.refuse_encrypted()?;
        let len = self.size as usize;
        if let Some(inline) = &self.inline {
            return Ok(inline.get(..len).ok_or_else(|| self.bad("its link is cut short"))?.to_vec());
        }
        if len < ROOT_LEN && !self.has(flag::EXTENTS) {
            return Ok(self.root.get(..len).unwrap_or_default().to_vec());
        }
        let run = self.leaf(0)?.run(0);
        let physical = run.physical.ok_or_else(|| self.bad("its link has no block"))?;
        let mut block = Vec::new();
        self.volume.read_block(physical, &mut block)?;
        if len > block.len() {
            return Err(self.bad("its link is longer than a block"));
        }
        block.truncate(len);
        Ok(block)
    }

    fn as_any(&self) -> &dyn core::any::Any {
        self
    }
}
