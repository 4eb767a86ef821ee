//! What is changed but not yet written, and the order in which it is.
//!
//! A crash may leave clusters that belong to nobody, never one that belongs to two files or a file without all of its
//! clusters. FAT has no journal, so the order of writes has to see to that. Content, and entries of the table for
//! clusters that nothing on the disk refers to yet, go to the block cache at once. Everything else waits in [`Meta`]
//! until [`Volume::commit`], which writes in steps with a flush after each:
//!
//! 1. content, new clusters and the links among them;
//! 2. links from the end of an existing chain to new clusters;
//! 3. deletion of directory entries that were moved to another sector (an entry is lost rather than seen twice);
//! 4. all other changes to directories;
//! 5. ends of chains that were cut;
//! 6. cut-off clusters become free, and from then on, not earlier, may be given to another file.

use super::chain::Extent;
use super::entry::DELETED;
use super::table::{END_OF_CHAIN, Link};
use super::volume::Volume;
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet, btree_map::Entry};
use alloc::vec::Vec;
use anykernel::fs::{FsError, Result};
use core::sync::atomic::Ordering::{Acquire, Release};
use hypercall::Host;

/// Changed directories are kept in pieces of this many bytes: the smallest that a disk writes whole.
const SECTOR: usize = 512;
/// More postponed links than this, and they are written.
const MANY_LINKS: usize = 4096;

/// The state of a volume that is not on the disk yet.
pub(super) struct Meta {
    /// Changed sectors of directories, by byte offset.
    sectors: BTreeMap<u64, Box<[u8; SECTOR]>>,
    /// Offsets of slots whose entry was moved elsewhere.
    moved: Vec<u64>,
    /// New links, from the cluster that ended a chain.
    links: BTreeMap<u32, u32>,
    /// Clusters that end their chain from now on.
    cuts: BTreeSet<u32>,
    /// Clusters that will be free.
    frees: Vec<Extent>,
    /// Counts commits; what was allocated since the last one is not referred to on the disk.
    pub(super) epoch: u64,
    /// Where to look for a free cluster.
    pub(super) next_free: u32,
    /// Entries of the table that are free, if it was counted or FSInfo says so.
    pub(super) free: Option<u32>,
    /// `free` comes from FSInfo: nobody checked it.
    pub(super) free_is_hint: bool,
}

impl Meta {
    pub(super) fn new(next_free: u32, free: Option<u32>) -> Self {
        Self {
            sectors: BTreeMap::new(),
            moved: Vec::new(),
            links: BTreeMap::new(),
            cuts: BTreeSet::new(),
            frees: Vec::new(),
            epoch: 1,
            next_free,
            free,
            free_is_hint: free.is_some(),
        }
    }

    /// What the entry of `cluster` will say, if that is not in the table yet.
    pub(super) fn pending_link(&self, cluster: u32) -> Option<Link> {
        if let Some(next) = self.links.get(&cluster) {
            return Some(Link::Next(*next));
        }
        self.cuts.contains(&cluster).then_some(Link::End)
    }

    /// Clusters that the next commit makes free.
    pub(super) fn pending_free(&self) -> u32 {
        self.frees.iter().fold(0, |sum: u32, extent| sum.saturating_add(extent.len))
    }

    /// Frees clusters, when nothing on the disk refers to them any more.
    pub(super) fn free_later(&mut self, extents: impl IntoIterator<Item = Extent>) {
        self.frees.extend(extents);
    }

    /// Ends a chain with `cluster`.
    pub(super) fn cut_after(&mut self, cluster: u32) {
        // A link that is not on the disk needs no cut there.
        if self.links.remove(&cluster).is_none() {
            self.cuts.insert(cluster);
        }
    }

    /// Notes that the entry at `place` is elsewhere now.
    pub(super) fn moved_from(&mut self, place: u64) {
        self.moved.push(place);
    }

    fn is_clean(&self) -> bool {
        self.sectors.is_empty() && self.links.is_empty() && self.cuts.is_empty() && self.frees.is_empty()
    }
}

impl<H: Host> Volume<H> {
    /// Reads directory content, with what is changed.
    pub(super) fn read_meta(&self, meta: &Meta, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.table.disk.read_at(offset, buf)?;
        let end = offset + buf.len() as u64;
        for (at, sector) in meta.sectors.range(offset - offset % SECTOR as u64..end) {
            let skip = offset.saturating_sub(*at) as usize;
            let place = at.saturating_sub(offset) as usize;
            let len = (SECTOR - skip).min(buf.len() - place);
            if let (Some(to), Some(from)) = (buf.get_mut(place..place + len), sector.get(skip..skip + len)) {
                to.copy_from_slice(from);
            }
        }
        Ok(())
    }

    /// Changes directory content.
    pub(super) fn write_meta(&self, meta: &mut Meta, offset: u64, data: &[u8]) -> Result<()> {
        let mut rest = data;
        let mut at = offset;
        while !rest.is_empty() {
            let start = at - at % SECTOR as u64;
            let skip = (at - start) as usize;
            let (part, after) = rest.split_at(rest.len().min(SECTOR - skip));
            let sector = match meta.sectors.entry(start) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    let mut sector = Box::new([0; SECTOR]);
                    self.table.disk.read_at(start, &mut *sector)?;
                    new.insert(sector)
                }
            };
            let place = sector.get_mut(skip..skip + part.len());
            place.ok_or(FsError::Corrupt)?.copy_from_slice(part);
            at += part.len() as u64;
            rest = after;
        }
        Ok(())
    }

    /// Called before anything is changed: marks the volume as in use on the disk.
    /// The lock on [`Meta`] makes sure that it happens once.
    pub(super) fn begin(&self, _meta: &mut Meta) -> Result<()> {
        if self.read_only {
            return Err(FsError::ReadOnly);
        }
        if self.dirty.load(Acquire) {
            return Ok(());
        }
        if !self.table.layout.was_dirty {
            self.mark(true)?;
            self.table.disk.sync()?;
        }
        self.dirty.store(true, Release);
        Ok(())
    }

    /// Links new clusters behind `tail`, the end of an existing chain.
    pub(super) fn link_later(&self, meta: &mut Meta, tail: u32, next: u32) -> Result<()> {
        if meta.cuts.contains(&tail) {
            // The disk still has the old rest of the chain behind `tail`, and the old size in the directory.
            self.commit(meta)?;
        }
        meta.links.insert(tail, next);
        Ok(())
    }

    /// Writes what waits, if that has become much. Called at the end of each operation.
    pub(super) fn relieve(&self, meta: &mut Meta) {
        if (meta.sectors.len() > self.many_sectors || meta.links.len() > MANY_LINKS)
            && let Err(error) = self.commit(meta)
        {
            // Everything is kept; sync tries again and tells.
            log::warn!("vfat: cannot write directories: {error}");
        }
    }

    /// Writes everything, in the order of the module's description. On an error what was not written is kept.
    pub(super) fn commit(&self, meta: &mut Meta) -> Result<()> {
        let disk = &self.table.disk;
        let orphans = core::mem::take(&mut *self.orphans.lock());
        meta.free_later(orphans);
        disk.sync()?;
        if meta.is_clean() {
            return Ok(());
        }
        // Orphans come without an operation that would have said so.
        self.begin(meta)?;
        meta.epoch += 1;
        if !meta.links.is_empty() {
            let mut cursor = self.table.cursor();
            for (tail, next) in &meta.links {
                cursor.set(*tail, *next)?;
            }
            cursor.finish()?;
            disk.sync()?;
            meta.links.clear();
        }
        if !meta.moved.is_empty() {
            for place in &meta.moved {
                disk.write_at(*place, &[DELETED])?;
            }
            disk.sync()?;
            meta.moved.clear();
        }
        if !meta.sectors.is_empty() {
            for (offset, sector) in &meta.sectors {
                disk.write_at(*offset, &**sector)?;
            }
            disk.sync()?;
            meta.sectors.clear();
        }
        let mut cursor = self.table.cursor();
        if !meta.cuts.is_empty() {
            for cluster in &meta.cuts {
                cursor.set(*cluster, END_OF_CHAIN)?;
            }
            cursor.finish()?;
            disk.sync()?;
            meta.cuts.clear();
        }
        while let Some(extent) = meta.frees.last().copied() {
            let freed = self.release(extent)?;
            meta.free = meta.free.map(|free| free.saturating_add(freed));
            meta.frees.pop();
        }
        Ok(())
    }

    /// Sets the entries of `extent` to free; says how many were not.
    pub(super) fn release(&self, extent: Extent) -> Result<u32> {
        let mut cursor = self.table.cursor();
        let mut freed = 0;
        for cluster in extent.cluster..extent.cluster + extent.len {
            if cursor.value(cluster)? != 0 {
                cursor.set(cluster, 0)?;
                freed += 1;
            }
        }
        cursor.finish()?;
        Ok(freed)
    }
}
