//! Regular files.

use super::chain::Chain;
use super::entry::{Entry, SLOT};
use super::meta::Meta;
use super::time::DosTime;
use super::volume::Volume;
use crate::cache::ReadAhead;
use alloc::sync::Arc;
use anykernel::fs::{FsError, Metadata, Result, Timestamp};
use anykernel::sync::RwLock;
use hypercall::Host;

/// The largest file.
const MAX_SIZE: u64 = u32::MAX as u64;
/// Clusters whose links are read along when some are needed.
const EXTRA_LINKS: u32 = 2048;

/// A file in use. There is one for all its users.
pub(super) struct FileNode<H: Host> {
    pub(super) volume: Arc<Volume<H>>,
    state: RwLock<H, FileState>,
    read_ahead: ReadAhead,
}

struct FileState {
    entry: Entry,
    /// Byte offset of the entry on the device.
    place: u64,
    chain: Chain,
    /// [`Meta::epoch`] when the last cluster was allocated.
    tail_epoch: u64,
    /// It has no name any more.
    removed: bool,
}

impl<H: Host> FileNode<H> {
    pub(super) fn new(volume: &Arc<Volume<H>>, entry: &Entry, place: u64) -> Self {
        let state = FileState {
            entry: *entry,
            place,
            chain: Chain::new(entry.start()),
            tail_epoch: 0,
            removed: false,
        };
        Self {
            volume: volume.clone(),
            state: RwLock::new(volume.host, state),
            read_ahead: ReadAhead::new(volume.table.disk.read_ahead_bytes()),
        }
    }

    fn clusters_for(&self, bytes: u64) -> u32 {
        // Files are below 4 GiB.
        bytes.div_ceil(u64::from(self.volume.table.layout.cluster_bytes)) as u32
    }

    pub(super) fn metadata(&self) -> Metadata {
        let state = self.state.read();
        let size = u64::from(state.entry.size());
        let cluster_bytes = u64::from(self.volume.table.layout.cluster_bytes);
        let mut metadata = super::node::metadata_of(&state.entry, state.place);
        metadata.allocated = size.next_multiple_of(cluster_bytes);
        metadata.links = u32::from(!state.removed);
        metadata
    }

    pub(super) fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        loop {
            let state = self.state.read();
            let size = u64::from(state.entry.size());
            let left = size.saturating_sub(offset);
            let len = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            if len == 0 {
                return Ok(0);
            }
            let end = offset + len as u64;
            let needed = self.clusters_for(end);
            if state.chain.known() >= needed {
                self.read_ahead(&state, offset, len as u64);
                let buf = buf.get_mut(..len).ok_or(FsError::Invalid)?;
                self.for_runs(&state.chain, offset, len, |run, range| {
                    let piece = buf.get_mut(range).ok_or(FsError::Invalid)?;
                    Ok(self.volume.table.disk.read_at(run, piece)?)
                })?;
                return Ok(len);
            }
            drop(state);
            let mut state = self.state.write();
            let meta = self.volume.meta.read();
            // A truncation may have come in between: the loop looks at the size again.
            state.chain.extend_to(&self.volume.table, &meta, needed)?;
            if state.chain.known() < needed && u64::from(state.entry.size()) >= end {
                return Err(FsError::Corrupt);
            }
            // An error in what was not asked for shows when it is.
            let _ = state.chain.extend_to(&self.volume.table, &meta, needed.saturating_add(EXTRA_LINKS));
        }
    }

    fn read_ahead(&self, state: &FileState, offset: u64, len: u64) {
        if let Some(range) = self.read_ahead.note(offset, len) {
            let end = range.end.min(u64::from(state.entry.size()));
            let mut at = range.start;
            while at < end
                && let Some(run) = state.chain.run(&self.volume.table, at, (end - at) as usize)
            {
                self.volume.table.disk.prefetch(run.offset, run.len as u64);
                at += run.len as u64;
            }
        }
    }

    /// Calls `each` with device offset and range of the buffer for every piece of `offset .. offset + len`.
    fn for_runs(
        &self,
        chain: &Chain,
        offset: u64,
        len: usize,
        mut each: impl FnMut(u64, core::ops::Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let mut done = 0;
        while done < len {
            let run =
                chain.run(&self.volume.table, offset + done as u64, len - done).ok_or(FsError::Corrupt)?;
            each(run.offset, done..done + run.len)?;
            done += run.len;
        }
        Ok(())
    }

    /// Allocates so that `size` bytes have clusters. On an error nothing changed but what `chain` knows.
    fn reserve(&self, state: &mut FileState, size: u64) -> Result<()> {
        let needed = self.clusters_for(size);
        let volume = &*self.volume;
        let mut meta = volume.meta.write();
        volume.begin(&mut meta)?;
        state.chain.extend_to(&volume.table, &meta, u32::MAX)?;
        let known = state.chain.known();
        if needed <= known {
            return Ok(());
        }
        let tail = state.chain.last();
        let extents = volume.allocate(&mut meta, needed - known, tail)?;
        let Some(first) = extents.first().copied() else { return Ok(()) };
        match tail {
            None => state.entry.set_start(first.cluster),
            Some(tail) if state.tail_epoch == meta.epoch => volume.link_now(tail, first.cluster)?,
            Some(tail) => volume.link_later(&mut meta, tail, first.cluster)?,
        }
        for extent in extents {
            state.chain.push(extent)?;
        }
        state.tail_epoch = meta.epoch;
        Ok(())
    }

    fn zero(&self, chain: &Chain, start: u64, end: u64) -> Result<()> {
        let len = usize::try_from(end.saturating_sub(start)).map_err(|_| FsError::TooLarge)?;
        self.for_runs(chain, start, len, |run, range| {
            Ok(self.volume.table.disk.zero(run, range.len() as u64)?)
        })
    }

    /// Puts the entry into the directory, unless the file has no name any more.
    fn store(&self, state: &FileState) -> Result<()> {
        let mut meta = self.volume.meta.write();
        self.store_with(state, &mut meta)?;
        self.volume.relieve(&mut meta);
        Ok(())
    }

    fn store_with(&self, state: &FileState, meta: &mut Meta) -> Result<()> {
        if state.removed {
            return Ok(());
        }
        // The name is the directory's business: everything but its eleven bytes and case bits.
        let mut entry = [0; SLOT];
        self.volume.read_meta(meta, state.place, &mut entry)?;
        let mut entry = Entry(entry);
        entry.set_content(&state.entry);
        self.volume.write_meta(meta, state.place, &entry.0)
    }

    pub(super) fn write_at(&self, offset: u64, data: &[u8]) -> Result<usize> {
        if self.volume.read_only {
            return Err(FsError::ReadOnly);
        }
        if data.is_empty() {
            return Ok(0);
        }
        let end = offset.checked_add(data.len() as u64).filter(|end| *end <= MAX_SIZE);
        let end = end.ok_or(FsError::TooLarge)?;
        let mut state = self.state.write();
        let size = u64::from(state.entry.size());
        self.reserve(&mut state, end.max(size))?;
        if offset > size {
            self.zero(&state.chain, size, offset)?;
        }
        self.for_runs(&state.chain, offset, data.len(), |run, range| {
            let piece = data.get(range).ok_or(FsError::Invalid)?;
            Ok(self.volume.table.disk.write_at(run, piece)?)
        })?;
        if end > size {
            state.entry.set_size(end as u32);
        }
        state.entry.set_modified(self.volume.now());
        self.store(&state)?;
        Ok(data.len())
    }

    pub(super) fn truncate(&self, size: u64) -> Result<()> {
        if self.volume.read_only {
            return Err(FsError::ReadOnly);
        }
        if size > MAX_SIZE {
            return Err(FsError::TooLarge);
        }
        let mut state = self.state.write();
        let old = u64::from(state.entry.size());
        if size >= old {
            self.reserve(&mut state, size)?;
            self.zero(&state.chain, old, size)?;
            state.entry.set_size(size as u32);
            state.entry.set_modified(self.volume.now());
            return self.store(&state);
        }
        let volume = &*self.volume;
        let mut meta = volume.meta.write();
        volume.begin(&mut meta)?;
        state.chain.extend_to(&volume.table, &meta, u32::MAX)?;
        let cut = state.chain.truncate(self.clusters_for(size));
        match state.chain.last() {
            _ if cut.is_empty() => {}
            Some(last) => meta.cut_after(last),
            None => state.entry.set_start(0),
        }
        if !cut.is_empty() {
            state.tail_epoch = 0;
        }
        meta.free_later(cut);
        state.entry.set_size(size as u32);
        state.entry.set_modified(volume.now());
        self.store_with(&state, &mut meta)?;
        volume.relieve(&mut meta);
        Ok(())
    }

    pub(super) fn set_modified(&self, time: Timestamp) -> Result<()> {
        let mut state = self.state.write();
        self.volume.begin(&mut self.volume.meta.write())?;
        state.entry.set_modified(DosTime::from_seconds(time.seconds));
        self.store(&state)
    }

    /// Does `work`, which deletes or overwrites the file's entry, while nobody else can write that entry. The clusters
    /// become free when the last user is gone. The caller holds `namespace` and the directory.
    pub(super) fn remove(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut state = self.state.write();
        // As far as the chain makes sense; the rest stays allocated, for fsck to find.
        let _ = state.chain.extend_to(&self.volume.table, &self.volume.meta.read(), u32::MAX);
        work()?;
        state.removed = true;
        self.volume.file_moved(state.place, None);
        Ok(())
    }

    /// Does `work`, which moves the file's entry and says where it is then, while nobody else can write that entry.
    pub(super) fn relocate(self: &Arc<Self>, work: impl FnOnce() -> Result<u64>) -> Result<()> {
        let mut state = self.state.write();
        let place = work()?;
        self.volume.file_moved(state.place, Some((place, self)));
        state.place = place;
        Ok(())
    }
}

impl<H: Host> Drop for FileNode<H> {
    fn drop(&mut self) {
        let state = self.state.write();
        if state.removed {
            self.volume.orphans.lock().extend(state.chain.extents());
        } else {
            self.volume.file_dropped(state.place);
        }
    }
}
