//! What users of the file system hold, and the changes of names.

use super::dir::{Dir, DirState};
use super::entry::{self, Entry, Found, SLOT, Seen};
use super::file::FileNode;
use super::meta::Meta;
use super::name::{self, Basis};
use super::time::DosTime;
use super::volume::Volume;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::fs::{DirEntry, FileKind, FsError, Inode, Metadata, Result, Timestamp};
use anykernel::sync::RwLockReadGuard;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use hypercall::Host;

/// The inode number of the root; all others are the place of their entry in units of 32 bytes, and so above it.
const ROOT_INODE: u64 = 1;
/// So many entries are copied out under the lock at a time; the sink runs without it.
const LIST_BATCH: usize = 64;
/// How deep directories may lie in each other before we suspect a circle.
const MAX_DEPTH: u32 = 65_536;

/// A file or directory of a volume.
pub(super) struct Node<H: Host> {
    volume: Arc<Volume<H>>,
    body: Body<H>,
}

enum Body<H: Host> {
    File(Arc<FileNode<H>>),
    Dir(Arc<Dir<H>>),
}

/// The inode number of what has its entry at `place`.
fn inode_number(place: u64) -> u64 {
    if place == 0 { ROOT_INODE } else { place / SLOT as u64 }
}

/// What an entry tells. The size of directories is not in it.
pub(super) fn metadata_of(entry: &Entry, place: u64) -> Metadata {
    let (mode, kind) = match entry.kind() {
        FileKind::Directory => (0o755, FileKind::Directory),
        kind => (0o644, kind),
    };
    let modified = entry.modified().timestamp();
    Metadata {
        inode: inode_number(place),
        kind,
        mode: if entry.is_read_only() { mode & !0o222 } else { mode },
        size: u64::from(entry.size()),
        allocated: 0,
        links: 1,
        uid: 0,
        gid: 0,
        modified,
        accessed: entry.accessed().timestamp(),
        changed: modified,
    }
}

/// The locked directories of a rename.
struct Pair<'a> {
    from: &'a mut DirState,
    /// `None`: the same.
    to: Option<&'a mut DirState>,
}

impl Pair<'_> {
    fn target(&mut self) -> &mut DirState {
        self.to.as_deref_mut().unwrap_or(self.from)
    }
}

impl<H: Host> Node<H> {
    /// The root directory.
    pub(super) fn root(volume: &Arc<Volume<H>>) -> Result<Self> {
        let dir = volume.dir(volume.root_start(), 0)?;
        Ok(Self { volume: volume.clone(), body: Body::Dir(dir) })
    }

    fn dir(&self) -> Result<&Arc<Dir<H>>> {
        match &self.body {
            Body::Dir(dir) => Ok(dir),
            Body::File(_) => Err(FsError::NotDirectory),
        }
    }

    fn file(&self) -> Result<&Arc<FileNode<H>>> {
        match &self.body {
            Body::File(file) => Ok(file),
            Body::Dir(_) => Err(FsError::IsDirectory),
        }
    }

    fn check_writable(&self) -> Result<()> {
        if self.volume.read_only { Err(FsError::ReadOnly) } else { Ok(()) }
    }

    /// A directory with its index. [`FsError::NotFound`] if it was removed.
    fn indexed<'a>(&self, dir: &'a Dir<H>) -> Result<RwLockReadGuard<'a, H, DirState>> {
        loop {
            let state = dir.state.read();
            if state.dead {
                return Err(FsError::NotFound);
            }
            if state.is_indexed() {
                return Ok(state);
            }
            drop(state);
            self.prepare(dir, &mut dir.state.write())?;
        }
    }

    /// Sees to it that the index is there. [`FsError::NotFound`] if the directory was removed.
    fn prepare(&self, dir: &Dir<H>, state: &mut DirState) -> Result<()> {
        if state.dead {
            return Err(FsError::NotFound);
        }
        state.build_index(&self.volume, &self.volume.meta.read())?;
        dir.index_bytes.store(state.index_bytes(), Relaxed);
        Ok(())
    }

    fn node(&self, found: &Found, place: u64) -> Result<Self> {
        let body = match found.entry.kind() {
            FileKind::Directory => Body::Dir(self.volume.child_dir(found, place)?),
            _ => Body::File(self.volume.file(place)?),
        };
        Ok(Self { volume: self.volume.clone(), body })
    }

    /// The number by which the `..` of its subdirectories names a directory.
    fn as_parent(&self, start: u32) -> u32 {
        if start == self.volume.root_start() { 0 } else { start }
    }

    /// Slots for a new entry under a name that is free, with an alias that is free.
    fn slots_for(&self, state: &DirState, meta: &Meta, name: &str, entry: &Entry) -> Result<Vec<[u8; SLOT]>> {
        let basis = Basis::new(name);
        let short =
            basis.pick(|short| Ok(state.find(&self.volume, meta, &name::show_short(short, 0))?.is_some()))?;
        let mut entry = *entry;
        entry.set_short(&short);
        entry::encode(name, &basis, &entry)
    }

    fn create_in(&self, dir: &Dir<H>, name: &str, kind: FileKind) -> Result<Self> {
        let volume = &self.volume;
        let _namespace = volume.namespace.lock();
        let mut state = dir.state.write();
        self.prepare(dir, &mut state)?;
        let mut meta = volume.meta.write();
        if state.find(volume, &meta, name)?.is_some() {
            return Err(FsError::Exists);
        }
        volume.begin(&mut meta)?;
        let now = volume.now();
        let (clusters, start) = match kind {
            FileKind::Directory => {
                let clusters = volume.allocate(&mut meta, 1, None)?;
                let start = clusters.first().map_or(0, |extent| extent.cluster);
                let (disk, layout) = (&volume.table.disk, &volume.table.layout);
                // Nothing refers to the cluster yet, so this need not wait.
                disk.zero(layout.cluster_offset(start), layout.cluster_bytes.into())?;
                let dots = entry::dots(start, self.as_parent(dir.start), now);
                disk.write_at(layout.cluster_offset(start), &dots)?;
                (clusters, start)
            }
            _ => (Vec::new(), 0),
        };
        let entry = Entry::new(&[b' '; 11], kind, start, now);
        let added = self
            .slots_for(&state, &meta, name, &entry)
            .and_then(|slots| state.insert(volume, &mut meta, name, &slots));
        let found = match added {
            Ok(found) => found,
            Err(error) => {
                volume.unallocate(&mut meta, &clusters)?;
                return Err(error);
            }
        };
        self.touch(&mut meta, dir)?;
        volume.relieve(&mut meta);
        drop(meta);
        let place = state.place(volume, found.slot)?;
        self.node(&found, place)
    }

    fn remove_in(&self, dir: &Dir<H>, name: &str) -> Result<()> {
        let volume = &self.volume;
        let _namespace = volume.namespace.lock();
        let mut state = dir.state.write();
        self.prepare(dir, &mut state)?;
        let found = state.find(volume, &volume.meta.read(), name)?.ok_or(FsError::NotFound)?;
        let place = state.place(volume, found.slot)?;
        let delete = |state: &mut DirState, extents: Vec<_>| {
            let mut meta = volume.meta.write();
            volume.begin(&mut meta)?;
            state.remove(volume, &mut meta, &found)?;
            meta.free_later(extents);
            self.touch(&mut meta, dir)?;
            volume.relieve(&mut meta);
            Ok(())
        };
        if found.entry.kind() == FileKind::Directory {
            let child = volume.child_dir(&found, place)?;
            if core::ptr::eq(&*child, dir) {
                return Err(FsError::Corrupt);
            }
            let mut child_state = child.state.write();
            self.prepare(&child, &mut child_state)?;
            if !child_state.is_empty()? {
                return Err(FsError::NotEmpty);
            }
            delete(&mut state, child_state.extents())?;
            child_state.dead = true;
            volume.forget_dir(child.start);
            return Ok(());
        }
        let file = volume.file(place)?;
        file.remove(|| delete(&mut state, Vec::new()))
    }

    /// Notes in a directory's own entry that its content changed. The root has none. The caller holds `namespace`.
    fn touch(&self, meta: &mut Meta, dir: &Dir<H>) -> Result<()> {
        let place = dir.place.load(Acquire);
        if place == 0 {
            return Ok(());
        }
        let mut bytes = [0; SLOT];
        self.volume.read_meta(meta, place, &mut bytes)?;
        let mut entry = Entry(bytes);
        entry.set_modified(self.volume.now());
        self.volume.write_meta(meta, place, &entry.0)
    }

    /// Whether the directory that begins at `start` is `ancestor` or below it, by the `..` entries.
    fn is_in(&self, meta: &Meta, start: u32, ancestor: u32) -> Result<bool> {
        let root = self.volume.root_start();
        let mut at = start;
        for _ in 0..MAX_DEPTH {
            if at == ancestor {
                return Ok(true);
            }
            if at == root {
                return Ok(false);
            }
            at = match self.parent_entry(meta, at)?.1.start() {
                0 => root,
                parent if self.volume.table.layout.is_cluster(parent) => parent,
                _ => return Err(FsError::Corrupt),
            };
        }
        Err(FsError::Corrupt)
    }

    /// The `..` entry of a directory other than the root, and where it is.
    fn parent_entry(&self, meta: &Meta, start: u32) -> Result<(u64, Entry)> {
        let place = self.volume.table.layout.cluster_offset(start) + SLOT as u64;
        let mut bytes = [0; SLOT];
        self.volume.read_meta(meta, place, &mut bytes)?;
        let entry = Entry(bytes);
        if &entry.short() == b"..         " { Ok((place, entry)) } else { Err(FsError::Corrupt) }
    }

    fn rename_in(&self, from: &Dir<H>, name: &str, to: &Dir<H>, new_name: &str) -> Result<()> {
        let volume = &self.volume;
        let _namespace = volume.namespace.lock();
        let mut from_state = from.state.write();
        self.prepare(from, &mut from_state)?;
        let mut to_state = match core::ptr::eq(from, to) {
            true => None,
            false => Some(to.state.write()),
        };
        if let Some(state) = to_state.as_deref_mut() {
            self.prepare(to, state)?;
        }
        let mut pair = Pair { from: &mut from_state, to: to_state.as_deref_mut() };

        let meta = volume.meta.read();
        let found = pair.from.find(volume, &meta, name)?.ok_or(FsError::NotFound)?;
        let mut target = pair.target().find(volume, &meta, new_name)?;
        let place = pair.from.place(volume, found.slot)?;
        let directory = found.entry.kind() == FileKind::Directory;
        if core::ptr::eq(from, to)
            && let Some(same) = target.take_if(|target| target.slot == found.slot)
            && same.name == new_name
        {
            return Ok(());
        }
        if directory && !core::ptr::eq(from, to) && self.is_in(&meta, to.start, found.entry.start())? {
            return Err(FsError::Invalid);
        }
        drop(meta);

        let moved = if directory { None } else { Some(volume.file(place)?) };
        let Some(target) = target else {
            return self.relocate(moved.as_ref(), &found, place, || {
                let new_place = self.move_entry(&mut pair, &found, new_name, None, Vec::new())?;
                self.after_move(&found, from, to)?;
                Ok(new_place)
            });
        };
        let target_place = pair.target().place(volume, target.slot)?;
        if target_place == place {
            // Two directories share a cluster.
            return Err(FsError::Corrupt);
        }
        match (directory, target.entry.kind() == FileKind::Directory) {
            (true, false) => return Err(FsError::NotDirectory),
            (false, true) => return Err(FsError::IsDirectory),
            (false, false) => {
                let victim = volume.file(target_place)?;
                return self.relocate(moved.as_ref(), &found, place, || {
                    victim.remove(|| {
                        self.move_entry(&mut pair, &found, new_name, Some(&target), Vec::new()).map(|_| ())
                    })?;
                    self.after_move(&found, from, to)?;
                    Ok(target_place)
                });
            }
            (true, true) => {}
        }
        let victim = volume.child_dir(&target, target_place)?;
        // It holds what is moved, or (on a corrupt volume) itself.
        if core::ptr::eq(&*victim, from) || core::ptr::eq(&*victim, to) {
            return Err(FsError::NotEmpty);
        }
        let mut victim_state = victim.state.write();
        self.prepare(&victim, &mut victim_state)?;
        if !victim_state.is_empty()? {
            return Err(FsError::NotEmpty);
        }
        self.relocate(None, &found, place, || {
            self.move_entry(&mut pair, &found, new_name, Some(&target), victim_state.extents())?;
            victim_state.dead = true;
            volume.forget_dir(victim.start);
            self.after_move(&found, from, to)?;
            Ok(target_place)
        })
    }

    /// Does `work`, which returns the new place of an entry, and lets what it describes know.
    fn relocate(
        &self,
        file: Option<&Arc<FileNode<H>>>,
        found: &Found,
        place: u64,
        work: impl FnOnce() -> Result<u64>,
    ) -> Result<()> {
        match file {
            Some(file) => file.relocate(work),
            None => {
                // Held, so that whoever has it open learns of its new place.
                let dir = self.volume.child_dir(found, place)?;
                dir.place.store(work()?, Release);
                Ok(())
            }
        }
    }

    /// Moves an entry: over `target`, of which the name stays, or to new slots. Returns the new place.
    fn move_entry(
        &self,
        pair: &mut Pair<'_>,
        found: &Found,
        new_name: &str,
        target: Option<&Found>,
        freed: Vec<super::chain::Extent>,
    ) -> Result<u64> {
        let volume = &self.volume;
        let mut meta = volume.meta.write();
        volume.begin(&mut meta)?;
        // As it is now: it may have been written since it was found.
        let old_place = pair.from.place(volume, found.slot)?;
        let mut bytes = [0; SLOT];
        volume.read_meta(&meta, old_place, &mut bytes)?;
        let content = Entry(bytes);
        let state = pair.target();
        let (first, slot) = match target {
            Some(target) => {
                let mut entry = target.entry;
                entry.set_content(&content);
                state.update(volume, &mut meta, target, &entry)?;
                (target.slot, target.slot)
            }
            None => {
                let slots = self.slots_for(state, &meta, new_name, &content)?;
                let added = state.insert(volume, &mut meta, new_name, &slots)?;
                (added.first_slot, added.slot)
            }
        };
        let sector = |place: u64| place / 512;
        let new_place = state.place(volume, slot)?;
        let together = [state.place(volume, first)?, pair.from.place(volume, found.first_slot)?, old_place]
            .iter()
            .all(|place| sector(*place) == sector(new_place));
        if !together {
            meta.moved_from(old_place);
        }
        pair.from.remove(volume, &mut meta, found)?;
        meta.free_later(freed);
        volume.relieve(&mut meta);
        Ok(new_place)
    }

    /// Notes the change in both directories, and lets the `..` of a moved directory name its new parent.
    fn after_move(&self, found: &Found, from: &Dir<H>, to: &Dir<H>) -> Result<()> {
        let mut meta = self.volume.meta.write();
        self.touch(&mut meta, from)?;
        if from.start == to.start {
            return Ok(());
        }
        self.touch(&mut meta, to)?;
        if found.entry.kind() != FileKind::Directory {
            return Ok(());
        }
        let (place, mut entry) = self.parent_entry(&meta, found.entry.start())?;
        entry.set_start(self.as_parent(to.start));
        self.volume.write_meta(&mut meta, place, &entry.0)
    }
}

impl<H: Host> Inode for Node<H> {
    fn metadata(&self) -> Result<Metadata> {
        let dir = match &self.body {
            Body::File(file) => return Ok(file.metadata()),
            Body::Dir(dir) => dir,
        };
        let state = dir.state.read();
        let place = dir.place.load(Acquire);
        let mut bytes = [0; SLOT];
        if place != 0 && !state.dead {
            self.volume.read_meta(&self.volume.meta.read(), place, &mut bytes)?;
        }
        let mut metadata = metadata_of(&Entry(bytes), place);
        metadata.kind = FileKind::Directory;
        metadata.mode |= 0o111;
        metadata.size = state.bytes(&self.volume);
        metadata.allocated = metadata.size;
        metadata.links = u32::from(!state.dead);
        Ok(metadata)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        self.file()?.read_at(offset, buf)
    }

    fn lookup(&self, name: &[u8]) -> Result<Arc<dyn Inode>> {
        let dir = self.dir()?;
        let name = core::str::from_utf8(name).map_err(|_| FsError::NotFound)?;
        let state = self.indexed(dir)?;
        let found = state.find(&self.volume, &self.volume.meta.read(), name)?.ok_or(FsError::NotFound)?;
        let place = state.place(&self.volume, found.slot)?;
        Ok(Arc::new(self.node(&found, place)?))
    }

    fn read_dir(&self, cursor: u64, sink: &mut dyn FnMut(DirEntry) -> bool) -> Result<Option<u64>> {
        let dir = self.dir()?;
        let mut cursor = cursor;
        loop {
            let Ok(first) = u32::try_from(cursor) else { return Ok(None) };
            let mut batch: Vec<Found> = Vec::new();
            batch.try_reserve_exact(LIST_BATCH).map_err(|_| FsError::NoMemory)?;
            let state = dir.state.read();
            if state.dead {
                return Ok(None);
            }
            state.scan(&self.volume, &self.volume.meta.read(), first, &mut |_, seen| {
                if let Seen::Entry(found) = seen {
                    batch.push(found);
                }
                batch.len() < LIST_BATCH
            })?;
            let mut entries = Vec::new();
            entries.try_reserve_exact(batch.len()).map_err(|_| FsError::NoMemory)?;
            for found in batch {
                let inode = inode_number(state.place(&self.volume, found.slot)?);
                let kind = found.entry.kind();
                entries.push((found.slot, DirEntry { name: found.name.into_bytes(), inode, kind }));
            }
            drop(state);
            if entries.is_empty() {
                return Ok(None);
            }
            for (slot, entry) in entries {
                cursor = u64::from(slot) + 1;
                if !sink(entry) {
                    return Ok(Some(cursor));
                }
            }
        }
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<usize> {
        self.file()?.write_at(offset, data)
    }

    fn truncate(&self, size: u64) -> Result<()> {
        self.file()?.truncate(size)
    }

    fn create(&self, name: &[u8], kind: FileKind, _target: Option<&[u8]>) -> Result<Arc<dyn Inode>> {
        self.check_writable()?;
        let dir = self.dir()?;
        let name = name::check(name)?;
        if !matches!(kind, FileKind::File | FileKind::Directory) {
            return Err(FsError::Unsupported);
        }
        Ok(Arc::new(self.create_in(dir, name, kind)?))
    }

    fn remove(&self, name: &[u8]) -> Result<()> {
        self.check_writable()?;
        let dir = self.dir()?;
        let name = core::str::from_utf8(name).map_err(|_| FsError::NotFound)?;
        self.remove_in(dir, name)
    }

    fn rename(&self, name: &[u8], to: &Arc<dyn Inode>, new_name: &[u8]) -> Result<()> {
        self.check_writable()?;
        let to = to.as_any().downcast_ref::<Self>().ok_or(FsError::CrossDevice)?;
        if !Arc::ptr_eq(&self.volume, &to.volume) {
            return Err(FsError::CrossDevice);
        }
        let (from, to) = (self.dir()?, to.dir()?);
        let name = core::str::from_utf8(name).map_err(|_| FsError::NotFound)?;
        self.rename_in(from, name, to, name::check(new_name)?)
    }

    fn set_modified(&self, time: Timestamp) -> Result<()> {
        self.check_writable()?;
        let dir = match &self.body {
            Body::File(file) => return file.set_modified(time),
            Body::Dir(dir) => dir,
        };
        let state = dir.state.write();
        let place = dir.place.load(Acquire);
        if place == 0 || state.dead {
            // Nowhere to keep it.
            return Ok(());
        }
        let mut meta = self.volume.meta.write();
        self.volume.begin(&mut meta)?;
        let mut bytes = [0; SLOT];
        self.volume.read_meta(&meta, place, &mut bytes)?;
        let mut entry = Entry(bytes);
        entry.set_modified(DosTime::from_seconds(time.seconds));
        self.volume.write_meta(&mut meta, place, &entry.0)
    }

    fn sync(&self) -> Result<()> {
        if self.volume.read_only {
            return Ok(());
        }
        self.volume.commit(&mut self.volume.meta.write())
    }

    fn as_any(&self) -> &dyn core::any::Any {
        self
    }
}
