//! The journal ("Journal (jbd2)", `journal.rst`): after a crash it holds the newest content of some blocks.
//!
//! It is replayed in memory: [`replay`] finds out for which blocks of the volume the journal has committed content, and
//! [`Volume::read`](super::volume::Volume::read) takes them from there. What was freed later (revoked) is left out.

use super::bytes::{be16, be32, join};
use super::checksum::crc32c;
use super::inode::Ext4Inode;
use super::volume::Volume;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::fs::{FileKind, FsError, Result};
use hypercall::Host;

/// At the start of each block of the journal's own.
pub(super) const MAGIC: u32 = 0xc03b_3998;

const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const SUPERBLOCK_V1: u32 = 3;
const SUPERBLOCK_V2: u32 = 4;
const REVOKE: u32 = 5;

const INCOMPAT_REVOKE: u32 = 0x1;
const INCOMPAT_64BIT: u32 = 0x2;
const INCOMPAT_ASYNC_COMMIT: u32 = 0x4;
const INCOMPAT_CSUM_V2: u32 = 0x8;
const INCOMPAT_CSUM_V3: u32 = 0x10;
const INCOMPAT_FAST_COMMIT: u32 = 0x20;

const TAG_ESCAPED: u32 = 0x1;
const TAG_SAME_UUID: u32 = 0x2;
const TAG_LAST: u32 = 0x8;

/// Journals are not believed to be longer, in blocks; 16 times the default of the largest volumes.
const MAX_BLOCKS: u32 = 1 << 22;
/// More revoked blocks than this are not believed (16 MiB of memory).
const MAX_REVOKED: usize = 1 << 20;

/// A block of the volume whose newest content is elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Patch {
    pub(super) block: u64,
    /// The block of the volume, within the journal, that has it.
    pub(super) source: u64,
    /// Its first four bytes are the magic number, which the journal has as zeros.
    pub(super) escaped: bool,
}

/// All such blocks, in order.
#[derive(Default)]
pub(super) struct Overlay(Vec<Patch>);

impl Overlay {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Those for the blocks `from .. to`.
    pub(super) fn range(&self, from: u64, to: u64) -> impl Iterator<Item = &Patch> {
        let first = self.0.partition_point(|patch| patch.block < from);
        self.0.iter().skip(first).take_while(move |patch| patch.block < to)
    }
}

/// What the journal's superblock says.
struct Journal<'a, H: Host> {
    inode: &'a Ext4Inode<H>,
    /// First block of the log, and the block behind the last.
    first: u32,
    end: u32,
    features: u32,
    seed: u32,
}

/// Committed content that the log holds.
struct Written {
    patch: Patch,
    /// Its transaction, counted from the first in the log.
    sequence: u32,
    /// Its place among all that was written.
    order: u32,
}

/// Where in the log we are.
#[derive(Clone, Copy)]
struct At {
    block: u32,
    /// How many blocks were passed: the log is a ring, and after one round nothing in it is new.
    passed: u32,
}

/// Finds the newest committed content of every block in the journal of a volume that was not unmounted.
///
/// Errors: [`FsError::Unsupported`] for a journal on another device or with unknown features; [`FsError::Corrupt`].
pub(super) fn replay<H: Host>(volume: &Arc<Volume<H>>) -> Result<Overlay> {
    let sb = &volume.superblock;
    if sb.external_journal || sb.journal_inode == 0 {
        log::warn!(
            "{}: ext4: not unmounted, and its journal is on another device: run e2fsck on the image first",
            volume.device.info().name
        );
        return Err(FsError::Unsupported);
    }
    let inode = volume.inode(sb.journal_inode)?;
    if inode.kind != FileKind::File || inode.inline().is_some() {
        return Err(inode.bad("the journal is not a file"));
    }
    let mut block = Vec::new();
    let Some((journal, start, sequence)) = Journal::open(&inode, &mut block)? else {
        return Ok(Overlay::default());
    };
    let mut written = Vec::new();
    let mut revoked = Vec::new();
    journal.scan(start, sequence, &mut written, &mut revoked)?;
    overlay(written, revoked)
}

/// The last committed content of each block, unless it was revoked in that transaction or later.
fn overlay(mut written: Vec<Written>, mut revoked: Vec<(u64, u32)>) -> Result<Overlay> {
    // Later ones come last.
    written.sort_unstable_by_key(|written| (written.patch.block, written.order));
    revoked.sort_unstable();
    let mut patches: Vec<Patch> = Vec::new();
    patches.try_reserve_exact(written.len()).map_err(|_| FsError::NoMemory)?;
    for Written { patch, sequence, .. } in written {
        if patches.last().is_some_and(|last| last.block == patch.block) {
            patches.pop();
        }
        let after = revoked.partition_point(|(block, _)| *block <= patch.block);
        let last = after.checked_sub(1).and_then(|at| revoked.get(at));
        if last.is_none_or(|(block, until)| *block != patch.block || *until < sequence) {
            patches.push(patch);
        }
    }
    Ok(Overlay(patches))
}

impl<'a, H: Host> Journal<'a, H> {
    /// `None`: the log is empty. Else also where it starts, and the sequence number there.
    fn open(inode: &'a Ext4Inode<H>, block: &mut Vec<u8>) -> Result<Option<(Self, u32, u32)>> {
        inode.directory_block(0, block)?;
        let broken = || inode.bad("the journal's superblock is wrong");
        let field = |at| be32(block, at).ok_or_else(broken);
        let kind = field(4)?;
        if field(0)? != MAGIC || !matches!(kind, SUPERBLOCK_V1 | SUPERBLOCK_V2) {
            return Err(broken());
        }
        let features = if kind == SUPERBLOCK_V2 { field(0x28)? } else { 0 };
        let known = INCOMPAT_REVOKE
            | INCOMPAT_64BIT
            | INCOMPAT_ASYNC_COMMIT
            | INCOMPAT_CSUM_V2
            | INCOMPAT_CSUM_V3
            | INCOMPAT_FAST_COMMIT;
        if features & !known != 0 {
            log::warn!(
                "{}: ext4: its journal has unknown features (0x{features:x}): run e2fsck on the image first",
                inode.volume.device.info().name
            );
            return Err(FsError::Unsupported);
        }
        if features & (INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3) != 0 {
            let (before, after) = (block.get(..0xfc), block.get(0x100..0x400));
            let (Some(before), Some(after)) = (before, after) else { return Err(broken()) };
            let crc = crc32c(crc32c(crc32c(!0, before), &[0; 4]), after);
            if block.get(0x50) != Some(&4) || field(0xfc)? != crc {
                return Err(broken());
            }
        }
        let blocks = inode.size / inode.volume.block_size() as u64;
        let (end, first) = (field(0x10)?, field(0x14)?);
        // Fast commits come behind the log; they hold what later full commits also hold.
        let fast = if features & INCOMPAT_FAST_COMMIT != 0 { field(0x54)? } else { 0 };
        let log_end = end.checked_sub(fast).ok_or_else(broken)?;
        let (sequence, start) = (field(0x18)?, field(0x1c)?);
        if field(0xc)? as usize != inode.volume.block_size()
            || u64::from(end) > blocks.min(inode.volume.superblock.blocks)
            || end > MAX_BLOCKS
            || first == 0
            || first >= log_end
        {
            return Err(broken());
        }
        if start == 0 {
            return Ok(None);
        }
        if start < first || start >= log_end {
            return Err(broken());
        }
        let uuid = block.get(0x30..0x40).ok_or_else(broken)?;
        let journal = Self { inode, first, end: log_end, features, seed: crc32c(!0, uuid) };
        Ok(Some((journal, start, sequence)))
    }

    fn checksums(&self) -> bool {
        self.features & (INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3) != 0
    }

    /// The block after `at`; `None` after a whole round.
    fn next(&self, at: At) -> Option<At> {
        let block = if at.block + 1 >= self.end { self.first } else { at.block + 1 };
        (at.passed + 1 < self.end - self.first).then_some(At { block, passed: at.passed + 1 })
    }

    /// Reads the log up to its end: the first block that is not the expected one. A transaction counts when its commit
    /// block is there.
    fn scan(
        &self,
        start: u32,
        sequence: u32,
        written: &mut Vec<Written>,
        revoked: &mut Vec<(u64, u32)>,
    ) -> Result<()> {
        let mut at = Some(At { block: start, passed: 0 });
        let mut block = Vec::new();
        // Transactions since the start.
        let mut count = 0u32;
        let (mut written_before, mut revoked_before) = (written.len(), revoked.len());
        while let Some(here) = at {
            self.inode.directory_block(u64::from(here.block), &mut block)?;
            let expected = sequence.wrapping_add(count);
            if be32(&block, 0) != Some(MAGIC) || be32(&block, 8) != Some(expected) {
                break;
            }
            at = match be32(&block, 4) {
                // A checksum that is wrong means that the crash came while this was written.
                Some(DESCRIPTOR) if self.tail_is_good(&block) => {
                    self.descriptor(&block, here, count, expected, written)?
                }
                Some(REVOKE) if self.tail_is_good(&block) => {
                    self.revoke(&block, count, revoked)?;
                    self.next(here)
                }
                Some(COMMIT) if self.commit_is_good(&block) => {
                    count = count.wrapping_add(1);
                    (written_before, revoked_before) = (written.len(), revoked.len());
                    self.next(here)
                }
                _ => break,
            };
        }
        written.truncate(written_before);
        revoked.truncate(revoked_before);
        // Content is checked only now, when it is known to be committed.
        for Written { patch, .. } in written.iter() {
            if !self.inode.volume.holds(patch.block, 1)
                && patch.block != u64::from(self.inode.volume.superblock.first_data_block)
            {
                return Err(self.inode.bad("the journal writes outside the volume"));
            }
        }
        Ok(())
    }

    /// Descriptor and revoke blocks end in a checksum.
    fn tail_is_good(&self, block: &[u8]) -> bool {
        if !self.checksums() {
            return true;
        }
        let end = block.len() - 4;
        let crc = crc32c(crc32c(self.seed, block.get(..end).unwrap_or_default()), &[0; 4]);
        be32(block, end) == Some(crc)
    }

    fn commit_is_good(&self, block: &[u8]) -> bool {
        if !self.checksums() {
            return true;
        }
        let (before, after) = (block.get(..0x10).unwrap_or_default(), block.get(0x14..).unwrap_or_default());
        be32(block, 0x10) == Some(crc32c(crc32c(crc32c(self.seed, before), &[0; 4]), after))
    }

    /// Reads the tags of a descriptor block, whose content follows it in the log. Gives the block behind that.
    fn descriptor(
        &self,
        block: &[u8],
        mut here: At,
        sequence: u32,
        raw_sequence: u32,
        written: &mut Vec<Written>,
    ) -> Result<Option<At>> {
        let broken = || self.inode.bad("a descriptor block of the journal is wrong");
        let wide = self.features & INCOMPAT_64BIT != 0;
        let v3 = self.features & INCOMPAT_CSUM_V3 != 0;
        // Version 2 of the checksums makes tags two bytes longer, and does not use them.
        let unused = if self.features & INCOMPAT_CSUM_V2 != 0 { 2 } else { 0 };
        let tag_len = match (v3, wide) {
            (true, _) => 16,
            (false, true) => 12 + unused,
            (false, false) => 8 + unused,
        };
        let end = block.len() - if self.checksums() { 4 } else { 0 };
        let mut content = Vec::new();
        let mut tag = 12;
        while tag + tag_len <= end {
            let low = be32(block, tag).ok_or_else(broken)?;
            let (flags, high, checksum) = if v3 {
                let fields = (be32(block, tag + 4), be32(block, tag + 8), be32(block, tag + 12));
                (fields.0.ok_or_else(broken)?, fields.1.ok_or_else(broken)?, fields.2.ok_or_else(broken)?)
            } else {
                let checksum = be16(block, tag + 4).ok_or_else(broken)?;
                let flags = be16(block, tag + 6).ok_or_else(broken)?;
                let high = if wide { be32(block, tag + 8).ok_or_else(broken)? } else { 0 };
                (u32::from(flags), high, u32::from(checksum))
            };
            let Some(next) = self.next(here) else { return Ok(None) };
            here = next;
            if self.checksums() {
                self.inode.directory_block(u64::from(here.block), &mut content)?;
                let crc = crc32c(crc32c(self.seed, &raw_sequence.to_be_bytes()), &content);
                if if v3 { crc != checksum } else { crc as u16 != checksum as u16 } {
                    // As the descriptor, this may be where the crash came; then there is no commit block.
                    return Ok(None);
                }
            }
            let source = self.inode.leaf(u64::from(here.block))?.run(u64::from(here.block)).physical;
            let patch = Patch {
                block: join(if wide { high } else { 0 }, low),
                source: source.ok_or_else(broken)?,
                escaped: flags & TAG_ESCAPED != 0,
            };
            written.try_reserve(1).map_err(|_| FsError::NoMemory)?;
            written.push(Written { patch, sequence, order: written.len() as u32 });
            tag += tag_len + if flags & TAG_SAME_UUID == 0 { 16 } else { 0 };
            if flags & TAG_LAST != 0 {
                break;
            }
        }
        Ok(self.next(here))
    }

    fn revoke(&self, block: &[u8], sequence: u32, revoked: &mut Vec<(u64, u32)>) -> Result<()> {
        let broken = || self.inode.bad("a revoke block of the journal is wrong");
        let end = be32(block, 12).ok_or_else(broken)? as usize;
        let most = block.len() - if self.checksums() { 4 } else { 0 };
        if end > most || end < 16 {
            return Err(broken());
        }
        let wide = self.features & INCOMPAT_64BIT != 0;
        let mut at = 16;
        while at + if wide { 8 } else { 4 } <= end {
            let number = if wide {
                join(be32(block, at).ok_or_else(broken)?, be32(block, at + 4).ok_or_else(broken)?)
            } else {
                u64::from(be32(block, at).ok_or_else(broken)?)
            };
            if revoked.len() >= MAX_REVOKED {
                return Err(broken());
            }
            revoked.try_reserve(1).map_err(|_| FsError::NoMemory)?;
            revoked.push((number, sequence));
            at += if wide { 8 } else { 4 };
        }
        Ok(())
    }
}
