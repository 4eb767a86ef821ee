//! Inodes: files, directories and symbolic links.

use super::content::Content;
use super::{MAX_NAME, Shared};
use alloc::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    vec::Vec,
};
use anykernel::fs::{DirEntry, FileKind, FsError, Inode, Metadata, Result, Timestamp};
use anykernel::sync::{Mutex, RwLock};
use core::sync::atomic::Ordering::Relaxed;
use hypercall::Host;

/// What an inode takes from the budget, beside content and names.
const NODE_COST: u64 = 256;
/// What a name takes beside its bytes, which are kept twice.
const NAME_COST: u64 = 128;
/// Longest target of a symbolic link.
const MAX_TARGET: usize = 4095;
/// So many entries are copied out under the lock at a time; the sink runs without it.
const LIST_BATCH: usize = 64;

pub(super) struct Node<H: Host> {
    shared: Arc<Shared<H>>,
    /// Itself: what becomes the parent of a new directory.
    me: Weak<Self>,
    number: u64,
    body: Body<H>,
    times: Mutex<H, Times>,
}

struct Times {
    modified: Timestamp,
    changed: Timestamp,
}

enum Body<H: Host> {
    File { content: RwLock<H, Content>, links: Mutex<H, u32> },
    Directory { table: RwLock<H, Table<H>>, parent: Mutex<H, Weak<Node<H>>> },
    Symlink { target: Vec<u8> },
}

/// The names in a directory, by name for lookups and by age for listing.
struct Table<H: Host> {
    names: BTreeMap<Vec<u8>, Named<H>>,
    by_age: BTreeMap<u64, Vec<u8>>,
    next_age: u64,
    subdirectories: u32,
    /// Removed: nothing can be made here any more.
    dead: bool,
}

struct Named<H: Host> {
    node: Arc<Node<H>>,
    age: u64,
}

fn now<H: Host>(host: &H) -> Timestamp {
    let ns = host.realtime_ns();
    Timestamp { seconds: (ns / 1_000_000_000) as i64, nanos: (ns % 1_000_000_000) as u32 }
}

fn check_name(name: &[u8]) -> Result<()> {
    let bad = name.is_empty()
        || name.len() > MAX_NAME
        || name == b"."
        || name == b".."
        || name.iter().any(|byte| matches!(byte, b'/' | 0));
    if bad { Err(FsError::BadName) } else { Ok(()) }
}

fn name_cost(name: &[u8]) -> u64 {
    NAME_COST + 2 * name.len() as u64
}

fn copy(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut copy = Vec::new();
    copy.try_reserve_exact(bytes.len()).map_err(|_| FsError::NoMemory)?;
    copy.extend_from_slice(bytes);
    Ok(copy)
}

impl<H: Host> Table<H> {
    /// Adds a name that is known to be free.
    fn insert(&mut self, shared: &Shared<H>, name: &[u8], node: Arc<Node<H>>) -> Result<()> {
        let (key, listed) = (copy(name)?, copy(name)?);
        shared.charge(name_cost(name))?;
        self.add(key, listed, node);
        Ok(())
    }

    /// As `insert`, with both copies of the name, whose cost was charged.
    fn add(&mut self, key: Vec<u8>, listed: Vec<u8>, node: Arc<Node<H>>) {
        let age = self.next_age;
        self.next_age += 1;
        self.subdirectories += u32::from(node.is_directory());
        self.by_age.insert(age, listed);
        self.names.insert(key, Named { node, age });
    }

    fn take(&mut self, shared: &Shared<H>, name: &[u8]) -> Option<Arc<Node<H>>> {
        let named = self.names.remove(name)?;
        self.by_age.remove(&named.age);
        self.subdirectories -= u32::from(named.node.is_directory());
        shared.release(name_cost(name));
        Some(named.node)
    }
}

impl<H: Host> Node<H> {
    fn new(shared: &Arc<Shared<H>>, body: Body<H>) -> Result<Arc<Self>> {
        shared.charge(NODE_COST)?;
        let time = now(&shared.host);
        Ok(Arc::new_cyclic(|me| Self {
            shared: shared.clone(),
            me: me.clone(),
            number: shared.next_inode.fetch_add(1, Relaxed),
            body,
            times: Mutex::new(shared.host, Times { modified: time, changed: time }),
        }))
    }

    /// An empty directory that is in no other.
    pub(super) fn directory(shared: &Arc<Shared<H>>) -> Result<Arc<Self>> {
        let table = Table {
            names: BTreeMap::new(),
            by_age: BTreeMap::new(),
            next_age: 1,
            subdirectories: 0,
            dead: false,
        };
        let body = Body::Directory {
            table: RwLock::new(shared.host, table),
            parent: Mutex::new(shared.host, Weak::new()),
        };
        Self::new(shared, body)
    }

    fn is_directory(&self) -> bool {
        matches!(self.body, Body::Directory { .. })
    }

    fn kind(&self) -> FileKind {
        match self.body {
            Body::File { .. } => FileKind::File,
            Body::Directory { .. } => FileKind::Directory,
            Body::Symlink { .. } => FileKind::Symlink,
        }
    }

    fn table(&self) -> Result<&RwLock<H, Table<H>>> {
        match &self.body {
            Body::Directory { table, .. } => Ok(table),
            _ => Err(FsError::NotDirectory),
        }
    }

    fn content(&self) -> Result<&RwLock<H, Content>> {
        match &self.body {
            Body::File { content, .. } => Ok(content),
            Body::Directory { .. } => Err(FsError::IsDirectory),
            Body::Symlink { .. } => Err(FsError::Invalid),
        }
    }

    fn check_writable(&self) -> Result<()> {
        if self.shared.read_only { Err(FsError::ReadOnly) } else { Ok(()) }
    }

    fn touch(&self, content_too: bool) {
        let time = now(&self.shared.host);
        let mut times = self.times.lock();
        times.changed = time;
        if content_too {
            times.modified = time;
        }
    }

    /// The node lost its (only) name.
    fn unlinked(&self) {
        if let Body::File { links, .. } = &self.body {
            *links.lock() = 0;
        }
        self.touch(false);
    }

    /// Whether this directory is `other` or below it. The caller holds `moves`.
    fn is_in(&self, other: &Self) -> bool {
        let mut at = self.me.upgrade();
        while let Some(node) = at {
            if core::ptr::eq(&*node, other) {
                return true;
            }
            at = match &node.body {
                Body::Directory { parent, .. } => parent.lock().upgrade(),
                _ => None,
            };
        }
        false
    }

    /// Marks a directory as removed, if it is empty. The caller holds `moves`.
    fn kill_if_empty(&self) -> Result<()> {
        let mut table = self.table()?.write();
        if !table.names.is_empty() {
            return Err(FsError::NotEmpty);
        }
        table.dead = true;
        Ok(())
    }

    /// Moves `name` from one locked table to `new_name` in another (`None`: the same). The caller holds `moves`.
    fn move_entry(
        &self,
        from: &mut Table<H>,
        other: Option<&mut Table<H>>,
        name: &[u8],
        to: &Node<H>,
        new_name: &[u8],
    ) -> Result<()> {
        let moved = from.names.get(name).ok_or(FsError::NotFound)?.node.clone();
        let target = other.as_deref().unwrap_or(from);
        if target.dead {
            return Err(FsError::NotFound);
        }
        let replaced = target.names.get(new_name).map(|named| named.node.clone());
        if let Some(replaced) = &replaced {
            if Arc::ptr_eq(replaced, &moved) {
                return Ok(());
            }
            match (moved.is_directory(), replaced.is_directory()) {
                (true, false) => return Err(FsError::NotDirectory),
                (false, true) => return Err(FsError::IsDirectory),
                _ => {}
            }
            // The directory that is moved out of, whose table we hold: `moved` is in it.
            if core::ptr::eq(&**replaced, self) {
                return Err(FsError::NotEmpty);
            }
        }
        if moved.is_directory() && to.is_in(&moved) {
            return Err(FsError::Invalid);
        }
        // A place for the new name before anything changes.
        let (key, listed) = (copy(new_name)?, copy(new_name)?);
        self.shared.charge(name_cost(new_name))?;
        if let Some(replaced) = replaced.filter(|node| node.is_directory())
            && let Err(error) = replaced.kill_if_empty()
        {
            self.shared.release(name_cost(new_name));
            return Err(error);
        }
        from.take(&self.shared, name);
        let target = other.unwrap_or(from);
        if let Some(replaced) = target.take(&self.shared, new_name) {
            replaced.unlinked();
        }
        target.add(key, listed, moved.clone());
        if let Body::Directory { parent, .. } = &moved.body {
            *parent.lock() = to.me.clone();
        }
        moved.touch(false);
        Ok(())
    }
}

impl<H: Host> Inode for Node<H> {
    fn metadata(&self) -> Result<Metadata> {
        let (size, allocated, links, mode) = match &self.body {
            Body::File { content, links } => {
                let content = content.read();
                (content.size(), content.allocated(), *links.lock(), 0o644)
            }
            Body::Directory { table, .. } => {
                let table = table.read();
                let links = if table.dead { 0 } else { table.subdirectories.saturating_add(2) };
                (table.names.len() as u64, 0, links, 0o755)
            }
            Body::Symlink { target } => (target.len() as u64, 0, 1, 0o777),
        };
        let times = self.times.lock();
        Ok(Metadata {
            inode: self.number,
            kind: self.kind(),
            mode,
            size,
            allocated,
            links,
            uid: 0,
            gid: 0,
            modified: times.modified,
            accessed: times.modified,
            changed: times.changed,
        })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        Ok(self.content()?.read().read(offset, buf))
    }

    fn lookup(&self, name: &[u8]) -> Result<Arc<dyn Inode>> {
        let node = self.table()?.read().names.get(name).map(|named| named.node.clone());
        Ok(node.ok_or(FsError::NotFound)?)
    }

    fn read_dir(&self, cursor: u64, sink: &mut dyn FnMut(DirEntry) -> bool) -> Result<Option<u64>> {
        let mut cursor = cursor;
        loop {
            let mut batch = Vec::new();
            batch.try_reserve_exact(LIST_BATCH).map_err(|_| FsError::NoMemory)?;
            let table = self.table()?.read();
            for (age, name) in table.by_age.range(cursor..).take(LIST_BATCH) {
                let Some(named) = table.names.get(name) else { continue };
                let entry = DirEntry { name: copy(name)?, inode: named.node.number, kind: named.node.kind() };
                batch.push((*age, entry));
            }
            drop(table);
            if batch.is_empty() {
                return Ok(None);
            }
            for (age, entry) in batch {
                cursor = age + 1;
                if !sink(entry) {
                    return Ok(Some(cursor));
                }
            }
        }
    }

    fn read_link(&self) -> Result<Vec<u8>> {
        match &self.body {
            Body::Symlink { target } => copy(target),
            _ => Err(FsError::Invalid),
        }
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<usize> {
        self.check_writable()?;
        self.content()?.write().write(&self.shared, offset, data)?;
        self.touch(true);
        Ok(data.len())
    }

    fn truncate(&self, size: u64) -> Result<()> {
        self.check_writable()?;
        self.content()?.write().truncate(&self.shared, size)?;
        self.touch(true);
        Ok(())
    }

    fn create(&self, name: &[u8], kind: FileKind, target: Option<&[u8]>) -> Result<Arc<dyn Inode>> {
        self.check_writable()?;
        check_name(name)?;
        let host = self.shared.host;
        // Only a rename reads parents, so a directory needs `moves` for its own to be set in time.
        let moves = (kind == FileKind::Directory).then(|| self.shared.moves.lock());
        let mut table = self.table()?.write();
        if table.dead {
            return Err(FsError::NotFound);
        }
        if table.names.contains_key(name) {
            return Err(FsError::Exists);
        }
        let node = match (kind, target) {
            (FileKind::File, None) => {
                let body =
                    Body::File { content: RwLock::new(host, Content::default()), links: Mutex::new(host, 1) };
                Node::new(&self.shared, body)?
            }
            (FileKind::Directory, None) => Node::directory(&self.shared)?,
            (FileKind::Symlink, Some(target)) => {
                if target.is_empty() || target.len() > MAX_TARGET {
                    return Err(FsError::Invalid);
                }
                let target = copy(target)?;
                self.shared.charge(target.len() as u64)?;
                let len = target.len() as u64;
                Node::new(&self.shared, Body::Symlink { target }).inspect_err(|_| self.shared.release(len))?
            }
            (FileKind::Special, _) => return Err(FsError::Unsupported),
            _ => return Err(FsError::Invalid),
        };
        if let Body::Directory { parent, .. } = &node.body {
            *parent.lock() = self.me.clone();
        }
        table.insert(&self.shared, name, node.clone())?;
        drop(table);
        drop(moves);
        self.touch(true);
        Ok(node)
    }

    fn remove(&self, name: &[u8]) -> Result<()> {
        self.check_writable()?;
        let find =
            |table: &Table<H>| table.names.get(name).map(|named| named.node.clone()).ok_or(FsError::NotFound);
        let mut moves = None;
        let node = loop {
            let mut table = self.table()?.write();
            let node = find(&table)?;
            if node.is_directory() {
                if moves.is_none() {
                    // `moves` comes before any table; look again once it is held.
                    drop(table);
                    moves = Some(self.shared.moves.lock());
                    continue;
                }
                node.kill_if_empty()?;
            }
            table.take(&self.shared, name);
            break node;
        };
        drop(moves);
        node.unlinked();
        self.touch(true);
        Ok(())
    }

    fn rename(&self, name: &[u8], to: &Arc<dyn Inode>, new_name: &[u8]) -> Result<()> {
        self.check_writable()?;
        check_name(new_name)?;
        let to = to.as_any().downcast_ref::<Self>().ok_or(FsError::CrossDevice)?;
        if !Arc::ptr_eq(&self.shared, &to.shared) {
            return Err(FsError::CrossDevice);
        }
        let _moves = self.shared.moves.lock();
        let mut from_table = self.table()?.write();
        if core::ptr::eq(self, to) {
            self.move_entry(&mut from_table, None, name, to, new_name)?;
        } else {
            let mut to_table = to.table()?.write();
            self.move_entry(&mut from_table, Some(&mut to_table), name, to, new_name)?;
        }
        self.touch(true);
        to.touch(true);
        Ok(())
    }

    fn set_modified(&self, time: Timestamp) -> Result<()> {
        self.check_writable()?;
        if time.nanos >= 1_000_000_000 {
            return Err(FsError::Invalid);
        }
        let changed = now(&self.shared.host);
        *self.times.lock() = Times { modified: time, changed };
        Ok(())
    }

    fn as_any(&self) -> &dyn core::any::Any {
        self
    }
}

impl<H: Host> Drop for Node<H> {
    fn drop(&mut self) {
        let mut pending = Vec::new();
        let mut returned = NODE_COST;
        match &mut self.body {
            Body::File { content, .. } => content.write().free(&self.shared),
            Body::Symlink { target } => returned += target.len() as u64,
            Body::Directory { table, .. } => {
                let mut table = table.write();
                for (name, named) in core::mem::take(&mut table.names) {
                    returned += name_cost(&name);
                    pending.push(named.node);
                }
            }
        }
        // A deep tree is taken apart here, level by level, so that its depth does not become depth of stack.
        while let Some(node) = pending.pop() {
            let Some(last) = Arc::into_inner(node) else { continue };
            let Body::Directory { table, .. } = &last.body else { continue };
            let mut table = table.write();
            for (name, named) in core::mem::take(&mut table.names) {
                returned += name_cost(&name);
                pending.push(named.node);
            }
        }
        self.shared.release(returned);
    }
}
