//! Indexed directories ("Hash Tree Directories", `directory.rst`): looking a name up by its hash.

use super::bytes::{le16, le32};
use super::checksum::crc32c;
use super::directory;
use super::hash::{HashKind, hash};
use super::inode::{Ext4Inode, flag};
use super::superblock::{compat, incompat};
use alloc::vec::Vec;
use anykernel::fs::Result;
use hypercall::Host;

/// What the index says about a name.
pub(super) enum Answer {
    Found(u32),
    Absent,
    /// There is no index, or none that can be used: look at every entry.
    NotIndexed,
}

/// Where the count of entries is in an inner block: behind the entries `.` and `..` and the root's own fields, or behind
/// one entry that spans the block.
const ROOT_COUNT: usize = 0x20;
const NODE_COUNT: usize = 0x8;

fn count_offset(number: u64) -> usize {
    if number == 0 { ROOT_COUNT } else { NODE_COUNT }
}

/// Whether a block of an indexed directory belongs to the index: the first one, or one that is a single unused entry.
pub(super) fn is_inner(block: &[u8], number: u64) -> bool {
    let spans = match le16(block, 4) {
        Some(0 | 0xffff) if block.len() == 65_536 => true,
        Some(len) => usize::from(len) == block.len(),
        None => false,
    };
    // An empty leaf has the entry of its checksum at the end, so none of its entries spans it.
    number == 0 || le32(block, 0) == Some(0) && spans
}

/// Entries of an inner block: (limit, count), checked against the block.
fn limits<H: Host>(inode: &Ext4Inode<H>, block: &[u8], number: u64) -> Option<(usize, usize)> {
    let at = count_offset(number);
    let limit = usize::from(le16(block, at)?);
    let count = usize::from(le16(block, at + 2)?);
    let tail = if inode.volume.superblock.metadata_checksums() { 8 } else { 0 };
    (count >= 1 && count <= limit && at + limit * 8 + tail <= block.len()).then_some((limit, count))
}

/// Checks the checksum of an inner block, which lies behind the room for its entries.
pub(super) fn check<H: Host>(inode: &Ext4Inode<H>, block: &[u8], number: u64) -> Result<()> {
    let good = limits(inode, block, number).is_some_and(|(limit, count)| {
        let at = count_offset(number);
        let tail = at + limit * 8;
        let covered = block.get(..at + count * 8).unwrap_or_default();
        // The tail is covered with its checksum zero.
        let reserved = block.get(tail..tail + 4).unwrap_or_default();
        let crc = crc32c(crc32c(crc32c(inode.checksum_seed, covered), reserved), &[0; 4]);
        le32(block, tail + 4) == Some(crc)
    });
    if good { Ok(()) } else { Err(inode.bad("the checksum of a directory's index is wrong")) }
}

/// An inner block on the way, and which of its entries was taken.
struct Frame {
    block: Vec<u8>,
    number: u64,
    count: usize,
    taken: usize,
}

impl Frame {
    fn entry(&self, at: usize) -> Option<(u32, u64)> {
        let base = count_offset(self.number) + at * 8;
        // The first entry has the counts in place of its hash, and stands for everything below the second.
        let hash = if at == 0 { 0 } else { le32(&self.block, base)? };
        Some((hash, u64::from(le32(&self.block, base + 4)? & 0x0fff_ffff)))
    }
}

pub(super) fn lookup<H: Host>(inode: &Ext4Inode<H>, name: &[u8]) -> Result<Answer> {
    let sb = &inode.volume.superblock;
    if !inode.has(flag::INDEX)
        || sb.compat & compat::DIR_INDEX == 0
        || inode.inline().is_some()
        || matches!(name, b"." | b"..")
    {
        return Ok(Answer::NotIndexed);
    }
    let mut block = Vec::new();
    directory::read_checked(inode, 0, &mut block)?;
    let levels = block.get(0x1e).copied().unwrap_or(u8::MAX);
    let most = if sb.has(incompat::LARGEDIR) { 2 } else { 1 };
    let kind = block.get(0x1c).and_then(|version| HashKind::new(*version, sb.unsigned_hash));
    let (Some(kind), Some(8), true) = (kind, block.get(0x1d).copied(), levels <= most) else {
        return Ok(Answer::NotIndexed);
    };
    let wanted = hash(kind, &sb.hash_seed, name);
    let mut frames: Vec<Frame> = Vec::new();
    let mut number = 0;
    loop {
        let broken = || inode.bad("a directory's index is wrong");
        let (_, count) = limits(inode, &block, number).ok_or_else(broken)?;
        let mut frame = Frame { block: core::mem::take(&mut block), number, count, taken: 0 };
        // The last entry whose hash is not above the wanted one.
        let (mut low, mut high) = (1, count);
        while low < high {
            let middle = low + (high - low) / 2;
            if frame.entry(middle).ok_or_else(broken)?.0 > wanted { high = middle } else { low = middle + 1 }
        }
        frame.taken = low - 1;
        number = frame.entry(frame.taken).ok_or_else(broken)?.1;
        frames.push(frame);
        if frames.len() > usize::from(levels) {
            break;
        }
        if number == 0 {
            return Err(broken());
        }
        directory::read_checked(inode, number, &mut block)?;
    }
    // A leaf, and those after it while names with this hash go on there.
    let mut left = inode.size / inode.volume.block_size() as u64;
    loop {
        directory::read_checked(inode, number, &mut block)?;
        if let Some(found) = directory::search(inode, &block, name)? {
            return Ok(Answer::Found(found));
        }
        left = left.saturating_sub(1);
        match next_leaf(inode, &mut frames, wanted)? {
            Some(next) if left > 0 => number = next,
            _ => return Ok(Answer::Absent),
        }
    }
}

/// The next leaf, if its names may have the hash `wanted`: the lowest bit of its hash says that it goes on with the one
/// before.
fn next_leaf<H: Host>(inode: &Ext4Inode<H>, frames: &mut [Frame], wanted: u32) -> Result<Option<u64>> {
    let broken = || inode.bad("a directory's index is wrong");
    let Some(level) = frames.iter().rposition(|frame| frame.taken + 1 < frame.count) else { return Ok(None) };
    let Some(frame) = frames.get_mut(level) else { return Ok(None) };
    frame.taken += 1;
    let (hash, mut number) = frame.entry(frame.taken).ok_or_else(broken)?;
    if hash & 1 == 0 || hash & !1 != wanted {
        return Ok(None);
    }
    for frame in frames.iter_mut().skip(level + 1) {
        let mut block = Vec::new();
        directory::read_checked(inode, number, &mut block)?;
        let (_, count) = limits(inode, &block, number).ok_or_else(broken)?;
        *frame = Frame { block, number, count, taken: 0 };
        number = frame.entry(0).ok_or_else(broken)?.1;
    }
    Ok(Some(number))
}
