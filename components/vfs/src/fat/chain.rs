//! A chain of clusters as a list of extents, read from the table as far as needed.

use super::meta::Meta;
use super::table::{Link, Table};
use alloc::vec::Vec;
use anykernel::fs::{FsError, Result};
use hypercall::Host;

/// Clusters that follow each other on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) cluster: u32,
    pub(super) len: u32,
}

/// Where a piece of a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// Byte offset on the device.
    pub(super) offset: u64,
    /// Bytes.
    pub(super) len: usize,
}

/// The clusters of a file or directory.
#[derive(Debug)]
pub(super) struct Chain {
    /// With the number of its first cluster in the file.
    extents: Vec<(u32, Extent)>,
    /// How many clusters are known.
    known: u32,
    /// Where to read on; `None`: all are known. A number that is no cluster: the chain is broken here.
    next: Option<u32>,
    /// Brent's cycle detection: a cluster seen, and at how many known clusters to move on to a later one.
    seen: u32,
    move_at: u32,
}

impl Chain {
    /// The chain that begins with `start`; 0 means none.
    pub(super) fn new(start: u32) -> Self {
        let next = Some(start).filter(|start| *start != 0);
        Self { extents: Vec::new(), known: 0, next, seen: 0, move_at: 1 }
    }

    /// Clusters known so far.
    pub(super) fn known(&self) -> u32 {
        self.known
    }

    /// The last cluster known.
    pub(super) fn last(&self) -> Option<u32> {
        self.extents.last().map(|(_, extent)| extent.cluster + extent.len - 1)
    }

    pub(super) fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        self.extents.iter().map(|(_, extent)| *extent)
    }

    /// Reads on until `clusters` are known or the chain ends. [`FsError::Corrupt`] if it leaves the volume, meets a
    /// free cluster or itself; what is known by then stays usable.
    pub(super) fn extend_to<H: Host>(&mut self, table: &Table<H>, meta: &Meta, clusters: u32) -> Result<()> {
        let mut cursor = table.cursor();
        while self.known < clusters
            && let Some(cluster) = self.next
        {
            if !table.layout.is_cluster(cluster) {
                return Err(FsError::Corrupt);
            }
            if cluster == self.seen && !hypercall::planted!("fat-cluster-loop") {
                self.next = Some(0);
                return Err(FsError::Corrupt);
            }
            let link = match meta.pending_link(cluster) {
                Some(link) => link,
                None => cursor.link(cluster)?,
            };
            self.push(Extent { cluster, len: 1 })?;
            if self.known == self.move_at {
                self.seen = cluster;
                self.move_at = self.move_at.saturating_mul(2);
            }
            self.next = match link {
                Link::Next(next) => Some(next),
                Link::End => None,
                Link::Free | Link::Broken => Some(0),
            };
        }
        Ok(())
    }

    /// Appends clusters to a chain that is known to its end.
    pub(super) fn push(&mut self, extent: Extent) -> Result<()> {
        match self.extents.last_mut() {
            Some((_, last)) if last.cluster + last.len == extent.cluster => last.len += extent.len,
            _ => {
                self.extents.try_reserve(1).map_err(|_| FsError::NoMemory)?;
                self.extents.push((self.known, extent));
            }
        }
        self.known += extent.len;
        Ok(())
    }

    /// Cuts a chain that is known to its end to `clusters`; returns what was cut off.
    pub(super) fn truncate(&mut self, clusters: u32) -> Vec<Extent> {
        let mut cut = Vec::new();
        while self.known > clusters
            && let Some((first, extent)) = self.extents.pop()
        {
            let keep = clusters.saturating_sub(first);
            if keep > 0 {
                self.extents.push((first, Extent { cluster: extent.cluster, len: keep }));
            }
            cut.push(Extent { cluster: extent.cluster + keep, len: extent.len - keep });
            self.known = first + keep;
        }
        if self.known == 0 {
            self.next = None;
        }
        cut.reverse();
        cut
    }

    /// The cluster with number `index` of the file, and how many follow it on the device, itself included.
    fn find(&self, index: u32) -> Option<(u32, u32)> {
        let after = self.extents.partition_point(|(first, _)| *first <= index);
        let (first, extent) = self.extents.get(after.checked_sub(1)?)?;
        let skip = index - first;
        (skip < extent.len).then(|| (extent.cluster + skip, extent.len - skip))
    }

    /// The longest piece from `offset` of the file, at most `len` bytes, that is in one piece on the device.
    pub(super) fn run<H: Host>(&self, table: &Table<H>, offset: u64, len: usize) -> Option<Run> {
        let cluster_bytes = u64::from(table.layout.cluster_bytes);
        let (cluster, count) = self.find(u32::try_from(offset / cluster_bytes).ok()?)?;
        let within = offset % cluster_bytes;
        let most = u64::from(count) * cluster_bytes - within;
        Some(Run {
            offset: table.layout.cluster_offset(cluster) + within,
            len: len.min(usize::try_from(most).unwrap_or(usize::MAX)),
        })
    }
}
