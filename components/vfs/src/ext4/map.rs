//! From blocks of a file to blocks of the volume: extent trees ("The Extent Tree" in `ifork.rst`) and the block maps of
//! ext2 and ext3.
//!
//! A [`Leaf`] is one node's worth of the map, read and checked at once and kept by the inode, so that reading on
//! costs no look at the tree.

use super::bytes::{join, le16, le32};
use super::checksum::crc32c;
use super::inode::{Ext4Inode, flag};
use alloc::vec::Vec;
use anykernel::fs::{FsError, Result};
use hypercall::Host;

const EXTENT_MAGIC: u16 = 0xf30a;
/// As deep as a tree of 2^32 blocks needs to be.
const MAX_DEPTH: u16 = 5;
/// An extent at least this long stands for blocks that were never written.
const UNWRITTEN: u16 = 0x8000;
/// Blocks of a file are numbered with 32 bits.
const END: u64 = 1 << 32;

/// Blocks that follow each other both in the file and on the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// First block of the file.
    pub(super) first: u64,
    /// How many, at least 1.
    pub(super) count: u64,
    /// First block on the volume; `None`: a hole, or never written. Reads as zeros.
    pub(super) physical: Option<u64>,
}

/// The map of the file's blocks `from .. to`. What no run holds is a hole.
#[derive(Debug)]
pub(super) struct Leaf {
    from: u64,
    to: u64,
    /// In order, without overlaps, within the range.
    runs: Vec<Run>,
}

impl Leaf {
    pub(super) fn covers(&self, block: u64) -> bool {
        (self.from..self.to).contains(&block)
    }

    /// The run from `block` on, which the leaf covers.
    pub(super) fn run(&self, block: u64) -> Run {
        let after = self.runs.partition_point(|run| run.first <= block);
        if let Some(run) = after.checked_sub(1).and_then(|at| self.runs.get(at))
            && block < run.first + run.count
        {
            let skip = block - run.first;
            return Run {
                first: block,
                count: run.count - skip,
                physical: run.physical.map(|physical| physical + skip),
            };
        }
        let next = self.runs.get(after).map_or(self.to, |run| run.first);
        Run { first: block, count: next.saturating_sub(block).max(1), physical: None }
    }
}

/// Reads the leaf that covers `block`.
pub(super) fn load<H: Host>(inode: &Ext4Inode<H>, block: u64) -> Result<Leaf> {
    if block >= END {
        return Err(inode.bad("a block beyond the largest file"));
    }
    if inode.has(flag::EXTENTS) { extent_leaf(inode, block) } else { indirect_leaf(inode, block) }
}

fn extent_leaf<H: Host>(inode: &Ext4Inode<H>, block: u64) -> Result<Leaf> {
    let mut node: Vec<u8> = inode.root.to_vec();
    let (mut from, mut to) = (0, END);
    let mut expected = None;
    loop {
        let broken = || inode.bad("a node of its extent tree is wrong");
        let magic = le16(&node, 0).ok_or_else(broken)?;
        let entries = usize::from(le16(&node, 2).ok_or_else(broken)?);
        let room = usize::from(le16(&node, 4).ok_or_else(broken)?);
        let depth = le16(&node, 6).ok_or_else(broken)?;
        let unchecked = hypercall::planted!("unchecked-extent");
        if magic != EXTENT_MAGIC
            || entries > room && !unchecked
            || 12 + room * 12 > node.len() && !unchecked
            || depth > MAX_DEPTH
            || expected.is_some_and(|expected| expected != depth)
        {
            return Err(broken());
        }
        #[expect(clippy::indexing_slicing, reason = "planted")]
        let entry = |at: usize| match unchecked {
            true => Ok(&node[12 + at * 12..24 + at * 12]),
            false => node.get(12 + at * 12..24 + at * 12).ok_or_else(broken),
        };
        if depth == 0 {
            let runs = extents(inode, (0..entries).map(entry), from, to)?;
            return Ok(Leaf { from, to, runs });
        }
        // The last entry that begins at or before the block.
        let mut child = None;
        let mut last = None;
        for at in 0..entries {
            let index = entry(at)?;
            let first = u64::from(le32(index, 0).ok_or_else(broken)?);
            if last.is_some_and(|last| first <= last) || first < from && at > 0 || first >= to {
                return Err(broken());
            }
            last = Some(first);
            if first > block {
                to = first;
                break;
            }
            let number =
                join(u32::from(le16(index, 8).ok_or_else(broken)?), le32(index, 4).ok_or_else(broken)?);
            child = Some((first.max(from), number));
        }
        let Some((first, number)) = child else {
            // Nothing before the first entry: a hole.
            return Ok(Leaf { from, to, runs: Vec::new() });
        };
        from = first;
        expected = Some(depth - 1);
        let mut next = Vec::new();
        inode.volume.read_block(number, &mut next)?;
        check_node(inode, &next)?;
        node = next;
    }
}

/// The checksum of a node lies behind the room for its entries.
fn check_node<H: Host>(inode: &Ext4Inode<H>, node: &[u8]) -> Result<()> {
    if !inode.volume.superblock.metadata_checksums() {
        return Ok(());
    }
    let end = 12 + 12 * usize::from(le16(node, 4).unwrap_or(0));
    let good =
        node.get(..end).is_some_and(|covered| le32(node, end) == Some(crc32c(inode.checksum_seed, covered)));
    if good { Ok(()) } else { Err(inode.bad("the checksum of a node of its extent tree is wrong")) }
}

fn extents<'a, H: Host>(
    inode: &Ext4Inode<H>,
    entries: impl Iterator<Item = Result<&'a [u8]>>,
    from: u64,
    to: u64,
) -> Result<Vec<Run>> {
    let broken = || inode.bad("an extent is wrong");
    let mut runs: Vec<Run> = Vec::new();
    let mut end = from;
    for entry in entries {
        let entry = entry?;
        let first = u64::from(le32(entry, 0).ok_or_else(broken)?);
        let len = le16(entry, 4).ok_or_else(broken)?;
        let physical =
            join(u32::from(le16(entry, 6).ok_or_else(broken)?), le32(entry, 8).ok_or_else(broken)?);
        let (count, written) = if len > UNWRITTEN { (len - UNWRITTEN, false) } else { (len, true) };
        let count = u64::from(count);
        if count == 0 || first < end || first + count > to || !inode.volume.holds(physical, count) {
            return Err(broken());
        }
        end = first + count;
        push(&mut runs, Run { first, count, physical: written.then_some(physical) })?;
    }
    Ok(runs)
}

/// Adds a run, to the last one if it goes on there.
fn push(runs: &mut Vec<Run>, run: Run) -> Result<()> {
    if let Some(last) = runs.last_mut()
        && last.first + last.count == run.first
        && last.physical.map(|physical| physical + last.count) == run.physical
        && last.physical.is_some()
    {
        last.count += run.count;
        return Ok(());
    }
    runs.try_reserve(1).map_err(|_| FsError::NoMemory)?;
    runs.push(run);
    Ok(())
}

/// Twelve direct blocks, then one block each of single, double and triple indirection.
fn indirect_leaf<H: Host>(inode: &Ext4Inode<H>, block: u64) -> Result<Leaf> {
    const DIRECT: u64 = 12;
    if block < DIRECT {
        return numbers_leaf(inode, &inode.root, 0, DIRECT);
    }
    let per_block = (inode.volume.block_size() / 4) as u64;
    let mut base = DIRECT;
    let mut span = per_block;
    for level in 1..=3usize {
        if block < base + span {
            let slot = 11 + level;
            let number = le32(&inode.root, slot * 4).unwrap_or(0);
            return descend(inode, block, base, span, number, level);
        }
        base += span;
        span = span.saturating_mul(per_block);
    }
    Err(inode.bad("a block beyond the largest file"))
}

fn descend<H: Host>(
    inode: &Ext4Inode<H>,
    block: u64,
    mut base: u64,
    mut span: u64,
    mut number: u32,
    levels: usize,
) -> Result<Leaf> {
    let per_block = (inode.volume.block_size() / 4) as u64;
    let mut table = Vec::new();
    for level in (1..=levels).rev() {
        if number == 0 {
            break;
        }
        inode.volume.read_block(u64::from(number), &mut table)?;
        if level == 1 {
            return numbers_leaf(inode, &table, base, per_block);
        }
        span /= per_block;
        let index = (block - base) / span;
        base += index * span;
        number = le32(&table, index as usize * 4).unwrap_or(0);
    }
    // All of what the missing table would map is a hole.
    Ok(Leaf { from: base, to: base + span, runs: Vec::new() })
}

fn numbers_leaf<H: Host>(inode: &Ext4Inode<H>, numbers: &[u8], base: u64, count: u64) -> Result<Leaf> {
    let mut runs = Vec::new();
    for at in 0..count {
        let number = le32(numbers, at as usize * 4).ok_or(FsError::Corrupt)?;
        if number == 0 {
            continue;
        }
        if !inode.volume.holds(u64::from(number), 1) {
            return Err(inode.bad("it refers to a block that does not exist"));
        }
        push(&mut runs, Run { first: base + at, count: 1, physical: Some(u64::from(number)) })?;
    }
    Ok(Leaf { from: base, to: base + count, runs })
}
