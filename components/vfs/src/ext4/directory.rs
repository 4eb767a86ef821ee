//! Directories as lists of entries ("Directory Entries", `directory.rst`).
//!
//! The inner blocks of an indexed directory look like blocks without entries, so listing needs no index.

use super::bytes::{le16, le32};
use super::checksum::crc32c;
use super::inode::{Ext4Inode, flag};
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::fs::{DirEntry, FileKind, FsError, Inode, Result};
use hypercall::Host;

/// Bytes of an entry before its name.
const HEADER: usize = 8;
/// The entry at the end of a block that holds its checksum: 12 bytes, of type 0xde.
const TAIL: usize = 12;
const TAIL_TYPE: u8 = 0xde;

/// An entry in use.
pub(super) struct Entry<'a> {
    pub(super) inode: u32,
    pub(super) name: &'a [u8],
    kind: u8,
    /// Where it begins in the block, in bytes.
    at: usize,
}

/// Calls `visit` with each entry of a block until it says `false`. Says whether it came to the end.
pub(super) fn entries<'a, H: Host>(
    inode: &Ext4Inode<H>,
    block: &'a [u8],
    visit: &mut dyn FnMut(Entry<'a>) -> Result<bool>,
) -> Result<bool> {
    let broken = || inode.bad("a directory entry is wrong");
    let has_kinds = inode.volume.superblock.has(0x2);
    let mut at = 0;
    while at < block.len() {
        let number = le32(block, at).ok_or_else(broken)?;
        let len = match le16(block, at + 4).ok_or_else(broken)? {
            // With blocks of 64 KiB their length does not fit.
            0 | 0xffff if block.len() == 65_536 => block.len() - at,
            len => usize::from(len),
        };
        let (name_len, kind) = match (block.get(at + 6), block.get(at + 7)) {
            (Some(len), Some(kind)) if has_kinds => (usize::from(*len), *kind),
            (Some(len), Some(_)) => (usize::from(*len), 0),
            _ => return Err(broken()),
        };
        if len < HEADER || len % 4 != 0 || at + len > block.len() || HEADER + name_len > len {
            return Err(broken());
        }
        let name = block.get(at + HEADER..at + HEADER + name_len).ok_or_else(broken)?;
        let entry = Entry { inode: number, name, kind, at };
        at += len;
        if number == 0 {
            continue;
        }
        if name.is_empty() || name.contains(&b'/') || name.contains(&0) {
            return Err(broken());
        }
        if !visit(entry)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A block of entries that was read and checked: whoever lists a directory looks its names up next, and each is in the
/// same block as the one before.
pub(super) struct Kept {
    inode: u32,
    number: u64,
    block: Vec<u8>,
}

/// As [`read_checked`], without reading if it is the block that was asked for last.
fn block_of<H: Host>(inode: &Ext4Inode<H>, number: u64) -> Result<Arc<Kept>> {
    let is_it = |kept: &&Arc<Kept>| kept.inode == inode.number && kept.number == number;
    if let Some(kept) = inode.volume.kept.lock().as_ref().filter(is_it) {
        return Ok(kept.clone());
    }
    let mut block = Vec::new();
    read_checked(inode, number, &mut block)?;
    let kept = Arc::new(Kept { inode: inode.number, number, block });
    let before = inode.volume.kept.lock().replace(kept.clone());
    drop(before);
    Ok(kept)
}

/// Reads a block of entries and checks its checksum. Inner blocks of an index have theirs elsewhere; `index` says that
/// the caller will check.
pub(super) fn read_checked<H: Host>(inode: &Ext4Inode<H>, number: u64, block: &mut Vec<u8>) -> Result<()> {
    inode.directory_block(number, block)?;
    if !inode.volume.superblock.metadata_checksums() {
        return Ok(());
    }
    if inode.has(flag::INDEX) && super::htree::is_inner(block, number) {
        return super::htree::check(inode, block, number);
    }
    let covered = block.len() - TAIL;
    let tail = block.get(covered..).unwrap_or_default();
    let stored = le32(tail, 8);
    let is_tail = le32(tail, 0) == Some(0) && le16(tail, 4) == Some(12) && tail.get(7) == Some(&TAIL_TYPE);
    let crc = crc32c(inode.checksum_seed, block.get(..covered).unwrap_or_default());
    if is_tail && stored == Some(crc) {
        return Ok(());
    }
    Err(inode.bad("the checksum of a directory block is wrong"))
}

fn blocks<H: Host>(inode: &Ext4Inode<H>) -> u64 {
    inode.size.div_ceil(inode.volume.block_size() as u64)
}

/// The parts of an inline directory: entries behind the parent's number, then what does not fit the inode's root.
fn inline_parts(inline: &[u8]) -> [(usize, &[u8]); 2] {
    let root = super::inode::ROOT_LEN;
    [(4, inline.get(4..root).unwrap_or_default()), (root, inline.get(root..).unwrap_or_default())]
}

/// Finds `name` by looking at every entry.
pub(super) fn lookup<H: Host>(inode: &Ext4Inode<H>, name: &[u8]) -> Result<Option<u32>> {
    if let Some(inline) = inode.inline() {
        for (_, part) in inline_parts(inline) {
            if let Some(found) = search(inode, part, name)? {
                return Ok(Some(found));
            }
        }
        return Ok(None);
    }
    let count = blocks(inode);
    let last =
        inode.volume.kept.lock().as_ref().filter(|kept| kept.inode == inode.number).map(|kept| kept.number);
    let first = last.unwrap_or(0);
    for number in (first..count).chain(0..first.min(count)) {
        if let Some(found) = search(inode, &block_of(inode, number)?.block, name)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Finds `name` in a block.
pub(super) fn search<H: Host>(inode: &Ext4Inode<H>, block: &[u8], name: &[u8]) -> Result<Option<u32>> {
    let mut found = None;
    entries(inode, block, &mut |entry| {
        if entry.name == name {
            found = Some(entry.inode);
        }
        Ok(found.is_none())
    })?;
    Ok(found)
}

/// As [`Inode::read_dir`]; the cursor counts bytes of the directory.
pub(super) fn list<H: Host>(
    inode: &Ext4Inode<H>,
    cursor: u64,
    sink: &mut dyn FnMut(DirEntry) -> bool,
) -> Result<Option<u64>> {
    let mut next = 0;
    if let Some(inline) = inode.inline() {
        for (base, part) in inline_parts(inline) {
            if !list_block(inode, part, base as u64, cursor, &mut next, sink)? {
                return Ok(Some(next));
            }
        }
        return Ok(None);
    }
    let block_size = inode.volume.block_size() as u64;
    for number in cursor / block_size..blocks(inode) {
        if !list_block(inode, &block_of(inode, number)?.block, number * block_size, cursor, &mut next, sink)?
        {
            return Ok(Some(next));
        }
    }
    Ok(None)
}

fn list_block<H: Host>(
    inode: &Ext4Inode<H>,
    block: &[u8],
    base: u64,
    cursor: u64,
    next: &mut u64,
    sink: &mut dyn FnMut(DirEntry) -> bool,
) -> Result<bool> {
    entries(inode, block, &mut |entry| {
        let at = base + entry.at as u64;
        if at < cursor || entry.name == b"." || entry.name == b".." {
            return Ok(true);
        }
        // Wherever the next entry begins, it is behind this one.
        *next = at + 1;
        let mut name = Vec::new();
        name.try_reserve_exact(entry.name.len()).map_err(|_| FsError::NoMemory)?;
        name.extend_from_slice(entry.name);
        let kind = match entry.kind {
            1 => FileKind::File,
            2 => FileKind::Directory,
            3..=6 => FileKind::Special,
            7 => FileKind::Symlink,
            // The directory does not tell.
            _ => inode.volume.inode(entry.inode)?.metadata()?.kind,
        };
        Ok(sink(DirEntry { name, inode: u64::from(entry.inode), kind }))
    })
}
