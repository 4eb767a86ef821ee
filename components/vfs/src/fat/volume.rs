//! A mounted volume: what its inodes share.
//!
//! Locks, in the order in which they are taken: `namespace` (changes of names; only its holder locks more than one
//! inode), an inode's own, `dirs` or `files`, `meta`, `orphans`.

use super::bpb::{BOOT_BYTES, Layout, Root, Width};
use super::bytes::{le32, put};
use super::chain::Extent;
use super::dir::Dir;
use super::entry::{Entry, Found, Parser, SLOT, Seen};
use super::file::FileNode;
use super::meta::Meta;
use super::name;
use super::table::{Cursor, END_OF_CHAIN, Link, Table};
use super::time::DosTime;
use crate::cache::CachedDevice;
use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use anykernel::fs::{FsError, Result};
use anykernel::sync::{Mutex, RwLock};
use core::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};
use hypercall::Host;

/// So many directories are remembered although nobody uses them.
const IDLE_DIRS: usize = 64;

/// A mounted volume.
pub(super) struct Volume<H: Host> {
    pub(super) host: H,
    pub(super) table: Table<H>,
    pub(super) read_only: bool,
    /// More bytes of indexes than this, and those of idle directories go.
    index_limit: usize,
    /// More changed sectors of directories than this, and they are written.
    pub(super) many_sectors: usize,
    /// The disk says that we are at it.
    pub(super) dirty: AtomicBool,
    pub(super) namespace: Mutex<H, ()>,
    pub(super) meta: RwLock<H, Meta>,
    /// Directories by their first cluster (0: a fixed root).
    dirs: Mutex<H, BTreeMap<u32, Arc<Dir<H>>>>,
    /// Files in use, by the place of their entry.
    files: Mutex<H, BTreeMap<u64, Weak<FileNode<H>>>>,
    /// Clusters of removed files whose last user is gone.
    pub(super) orphans: Mutex<H, Vec<Extent>>,
}

/// The FSInfo sector: a hint of how much is free, and where. Source: fatgen103, "FAT32 FSInfo Sector Structure".
struct FsInfo([u8; 512]);

impl FsInfo {
    fn is_valid(&self) -> bool {
        le32(&self.0, 0) == 0x4161_5252
            && le32(&self.0, 484) == 0x6141_7272
            && le32(&self.0, 508) == 0xaa55_0000
    }
}

impl<H: Host> Volume<H> {
    /// Reads and checks what is needed to use the volume. Writes nothing.
    pub(super) fn open(host: H, disk: Arc<CachedDevice<H>>, read_only: bool) -> Result<Arc<Self>> {
        let layout = read_layout(&disk)?;
        let table = Table { disk, layout };
        if table.layout.was_dirty {
            log::warn!("vfat: {} was not cleanly unmounted; run fsck.fat", table.disk.info().name);
        }
        let mut meta = Meta::new(2, None);
        if let Some(info) = read_info(&table)? {
            let (free, next) = (le32(&info.0, 488), le32(&info.0, 492));
            meta.free = Some(free).filter(|free| *free <= table.layout.clusters && !table.layout.was_dirty);
            meta.free_is_hint = meta.free.is_some();
            if table.layout.is_cluster(next) {
                meta.next_free = next;
            }
        }
        if let Root::Chain(root) = table.layout.root
            && matches!(table.cursor().link(root)?, Link::Free | Link::Broken)
        {
            return Err(FsError::Corrupt);
        }
        let memory = usize::try_from(host.memory_bytes()).unwrap_or(usize::MAX);
        Ok(Arc::new(Self {
            host,
            table,
            read_only,
            index_limit: memory / 32,
            many_sectors: (memory / 64 / 512).clamp(64, 2048),
            dirty: AtomicBool::new(false),
            namespace: Mutex::new(host, ()),
            meta: RwLock::new(host, meta),
            dirs: Mutex::new(host, BTreeMap::new()),
            files: Mutex::new(host, BTreeMap::new()),
            orphans: Mutex::new(host, Vec::new()),
        }))
    }

    /// Now, as directories keep it.
    pub(super) fn now(&self) -> DosTime {
        DosTime::from_seconds((self.host.realtime_ns() / 1_000_000_000) as i64)
    }

    /// The cluster number by which the root directory is known here.
    pub(super) fn root_start(&self) -> u32 {
        match self.table.layout.root {
            Root::Fixed { .. } => 0,
            Root::Chain(start) => start,
        }
    }

    /// The directory that begins at `start` and whose entry is at `place` (0: the root). [`FsError::Corrupt`] if another
    /// entry claims the same clusters.
    pub(super) fn dir(&self, start: u32, place: u64) -> Result<Arc<Dir<H>>> {
        let mut dirs = self.dirs.lock();
        if let Some(dir) = dirs.get(&start) {
            let same = dir.place.load(Acquire) == place;
            return if same { Ok(dir.clone()) } else { Err(FsError::Corrupt) };
        }
        let indexed: usize = dirs.values().map(|dir| dir.index_bytes.load(Relaxed)).sum();
        if dirs.len() > IDLE_DIRS || indexed > self.index_limit {
            dirs.retain(|_, dir| Arc::strong_count(dir) > 1);
        }
        let dir = Arc::new(Dir::open(self, start, place)?);
        dirs.insert(start, dir.clone());
        Ok(dir)
    }

    /// The directory that an entry describes.
    pub(super) fn child_dir(&self, found: &Found, place: u64) -> Result<Arc<Dir<H>>> {
        match found.entry.start() {
            start if self.table.layout.is_cluster(start) => self.dir(start, place),
            _ => Err(FsError::Corrupt),
        }
    }

    pub(super) fn forget_dir(&self, start: u32) {
        self.dirs.lock().remove(&start);
    }

    /// The file whose entry is at `place`; the one in use, if it is in use. The caller holds a lock on its directory.
    pub(super) fn file(self: &Arc<Self>, place: u64) -> Result<Arc<FileNode<H>>> {
        let mut files = self.files.lock();
        if let Some(file) = files.get(&place).and_then(Weak::upgrade) {
            return Ok(file);
        }
        // Read again, for a user who is just gone may have changed it since the caller found it.
        let mut bytes = [0; SLOT];
        self.read_meta(&self.meta.read(), place, &mut bytes)?;
        let file = Arc::new(FileNode::new(self, &Entry(bytes), place));
        files.insert(place, Arc::downgrade(&file));
        Ok(file)
    }

    /// A file's entry is at `new` now, or nowhere.
    pub(super) fn file_moved(&self, old: u64, new: Option<(u64, &Arc<FileNode<H>>)>) {
        let mut files = self.files.lock();
        files.remove(&old);
        if let Some((place, file)) = new {
            files.insert(place, Arc::downgrade(file));
        }
    }

    /// A file that was known at `place` has no user any more.
    pub(super) fn file_dropped(&self, place: u64) {
        let mut files = self.files.lock();
        // It may be in use again.
        if files.get(&place).is_some_and(|file| file.strong_count() == 0) {
            files.remove(&place);
        }
    }

    /// Finds `count` free clusters, links them among themselves and ends the chain. Looks behind `near` first. On
    /// [`FsError::NoSpace`] nothing changed.
    pub(super) fn allocate(&self, meta: &mut Meta, count: u32, near: Option<u32>) -> Result<Vec<Extent>> {
        if meta.free_is_hint && meta.free.is_some_and(|free| free < count) {
            self.count_free(meta)?;
        }
        for last_try in [false, true] {
            let hopeless = meta.free.is_some_and(|free| free < count);
            match if hopeless { Err(FsError::NoSpace) } else { self.find_free(meta, count, near) } {
                Ok(extents) => {
                    self.write_links(&extents)?;
                    meta.free = meta.free.map(|free| free.saturating_sub(count));
                    if let Some(last) = extents.last() {
                        meta.next_free = last.cluster + last.len;
                    }
                    return Ok(extents);
                }
                Err(FsError::NoSpace) if !last_try => {
                    if meta.pending_free() == 0 && self.orphans.lock().is_empty() {
                        return Err(FsError::NoSpace);
                    }
                    // What was removed may be used again once the disk knows that it was.
                    self.commit(meta)?;
                }
                Err(error) => return Err(error),
            }
        }
        Err(FsError::NoSpace)
    }

    fn find_free(&self, meta: &mut Meta, count: u32, near: Option<u32>) -> Result<Vec<Extent>> {
        let layout = &self.table.layout;
        let mut cursor = self.table.cursor();
        let mut at = match near.map(|near| near + 1).filter(|next| layout.is_cluster(*next)) {
            Some(next) if cursor.link(next)? == Link::Free => next,
            _ => meta.next_free,
        };
        let mut extents: Vec<Extent> = Vec::new();
        let mut found = 0;
        for _ in 0..layout.clusters {
            if found == count {
                return Ok(extents);
            }
            if !layout.is_cluster(at) {
                at = 2;
            }
            if cursor.link(at)? == Link::Free {
                found += 1;
                match extents.last_mut() {
                    Some(last) if last.cluster + last.len == at => last.len += 1,
                    _ => {
                        extents.try_reserve(1).map_err(|_| FsError::NoMemory)?;
                        extents.push(Extent { cluster: at, len: 1 });
                    }
                }
            }
            at += 1;
        }
        if found == count {
            return Ok(extents);
        }
        // The whole table was seen, so this is exact.
        meta.free = Some(found);
        meta.free_is_hint = false;
        Err(FsError::NoSpace)
    }

    fn write_links(&self, extents: &[Extent]) -> Result<()> {
        let mut cursor = self.table.cursor();
        let mut following = extents.iter().skip(1);
        for extent in extents {
            let end = extent.cluster + extent.len;
            for cluster in extent.cluster..end - 1 {
                cursor.set(cluster, cluster + 1)?;
            }
            let next = following.next().map_or(END_OF_CHAIN, |next| next.cluster);
            cursor.set(end - 1, next)?;
        }
        cursor.finish()
    }

    /// Gives back what [`Volume::allocate`] gave, if nothing refers to it yet.
    pub(super) fn unallocate(&self, meta: &mut Meta, extents: &[Extent]) -> Result<()> {
        for extent in extents {
            let freed = self.release(*extent)?;
            meta.free = meta.free.map(|free| free + freed);
        }
        Ok(())
    }

    /// A link from a cluster that the disk does not refer to yet.
    pub(super) fn link_now(&self, tail: u32, next: u32) -> Result<()> {
        let mut cursor = self.table.cursor();
        cursor.set(tail, next)?;
        cursor.finish()
    }

    /// Counts the free entries of the table, all of which it reads.
    fn count_free(&self, meta: &mut Meta) -> Result<u32> {
        let mut cursor = self.table.cursor();
        let mut free = 0;
        for cluster in 2..self.table.layout.clusters + 2 {
            free += u32::from(cursor.value(cluster)? == 0);
        }
        meta.free = Some(free);
        meta.free_is_hint = false;
        Ok(free)
    }

    /// Free clusters, those included that become free with the next commit.
    pub(super) fn free_clusters(&self, meta: &mut Meta) -> Result<u32> {
        let free = match meta.free {
            Some(free) => free,
            None => self.count_free(meta)?,
        };
        let orphans = self.orphans.lock().iter().map(|extent| extent.len).sum::<u32>();
        let pending = meta.pending_free().saturating_add(orphans);
        Ok(free.saturating_add(pending).min(self.table.layout.clusters))
    }

    /// Sets or clears the marks that the volume is in use: a bit in the boot sector and, where entries are wide enough,
    /// one in the table (there 0 means in use).
    pub(super) fn mark(&self, dirty: bool) -> Result<()> {
        let layout = &self.table.layout;
        let mut state = [0];
        self.table.disk.read_at(layout.state_offset, &mut state)?;
        let [old] = state;
        self.table.disk.write_at(layout.state_offset, &[old & !1 | u8::from(dirty)])?;
        let bit = match layout.width {
            Width::Fat12 => return Ok(()),
            Width::Fat16 => 0x8000,
            Width::Fat32 => 0x0800_0000,
        };
        let mut cursor: Cursor<'_, H> = self.table.cursor();
        let value = cursor.value(1)?;
        cursor.set(1, if dirty { value & !bit } else { value | bit })?;
        cursor.finish()
    }

    /// Makes everything durable and, if nothing is open for change, leaves the volume marked as clean.
    pub(super) fn sync(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        let mut meta = self.meta.write();
        self.commit(&mut meta)?;
        if !self.dirty.load(Acquire) {
            return Ok(());
        }
        if let Some(offset) = self.table.layout.fs_info
            && let Some(mut info) = read_info(&self.table)?
        {
            self.free_clusters(&mut meta)?;
            // What orphans will add is not free in the table yet.
            let free = meta.free.unwrap_or(u32::MAX);
            put(&mut info.0, 488, &free.to_le_bytes());
            put(&mut info.0, 492, &meta.next_free.to_le_bytes());
            self.table.disk.write_at(offset, &info.0)?;
        }
        self.table.disk.sync()?;
        if !self.table.layout.was_dirty {
            self.mark(false)?;
            self.table.disk.sync()?;
            self.dirty.store(false, Release);
        }
        Ok(())
    }

    /// The label in the root directory, else in the boot sector.
    pub(super) fn label(&self) -> Result<String> {
        let root = self.dir(self.root_start(), 0)?;
        let mut label = None;
        let state = root.state.read();
        state.scan(self, &self.meta.read(), 0, &mut |_, seen| match seen {
            Seen::Label(name) => {
                label = Some(name);
                false
            }
            _ => true,
        })?;
        let label = label.unwrap_or(self.table.layout.label);
        if &label == b"NO NAME    " {
            return Ok(String::new());
        }
        // A label is eleven characters without a dot: shown through the base part alone.
        let (head, tail) = label.split_at(8);
        let part = |bytes: &[u8]| {
            let mut padded = [b' '; 11];
            put(&mut padded, 0, bytes);
            let shown = name::show_short(&padded, 0);
            let missing = bytes.len().saturating_sub(shown.chars().count());
            shown + &" ".repeat(missing)
        };
        Ok((part(head) + &part(tail)).trim_end().to_string())
    }
}

impl<H: Host> Drop for Volume<H> {
    fn drop(&mut self) {
        if let Err(error) = self.sync() {
            log::error!("vfat: {}: cannot write back: {error}", self.table.disk.info().name);
        }
    }
}

/// Reads the boot sector of a device.
pub(super) fn read_layout<H: Host>(disk: &CachedDevice<H>) -> Result<Layout> {
    let mut boot = [0; BOOT_BYTES];
    if disk.bytes() < boot.len() as u64 {
        return Err(FsError::NotAFileSystem);
    }
    disk.read_at(0, &mut boot)?;
    Layout::parse(&boot, disk.bytes())
}

fn read_info<H: Host>(table: &Table<H>) -> Result<Option<FsInfo>> {
    let Some(offset) = table.layout.fs_info else { return Ok(None) };
    let mut info = FsInfo([0; 512]);
    table.disk.read_at(offset, &mut info.0)?;
    Ok(Some(info).filter(FsInfo::is_valid))
}

/// A parser and the position of what it reads.
pub(super) fn parse_slots(
    parser: &mut Parser,
    first: u32,
    bytes: &[u8],
    sink: &mut dyn FnMut(u32, Seen) -> bool,
) -> bool {
    for (slot, bytes) in (first..).zip(bytes.as_chunks::<SLOT>().0) {
        let seen = parser.feed(slot, bytes);
        let end = seen == Seen::End;
        if !sink(slot, seen) || end {
            return false;
        }
    }
    true
}
