//! The dentry cache of a mount: what looking up a name in a directory gave, also when it gave nothing.
//!
//! Entries are known by the number of their directory's inode and their name. Whoever changes a name calls
//! [`Dentries::forget`] *after* the file system has done it; a lookup that ran meanwhile notices and keeps its
//! result to itself.

use super::MountTree;
use crate::clock_map::{ClockMap, hash_name};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::counter::Counter;
use anykernel::fs::{FileKind, FsError, Inode, Result};
use anykernel::sync::Mutex;
use core::sync::atomic::{AtomicU32, Ordering};
use hypercall::Host;

const SHARDS: usize = 16;

/// What a name leads to.
#[derive(Clone)]
pub(super) struct Child {
    pub(super) inode: Arc<dyn Inode>,
    pub(super) number: u64,
    pub(super) kind: FileKind,
}

struct Key {
    directory: u64,
    name: Box<[u8]>,
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.directory == other.directory && self.name == other.name
    }
}

struct Shard {
    /// `None`: there is no such name.
    entries: ClockMap<Key, Option<Child>>,
    /// Counts what was forgotten.
    changes: u32,
}

pub(super) struct Dentries<H: Host> {
    seed: u64,
    shards: Vec<Mutex<H, Shard>>,
    /// Counts [`Dentries::forget_all`].
    generation: AtomicU32,
    hits: Counter,
    misses: Counter,
}

impl<H: Host> Dentries<H> {
    pub(super) fn new(tree: &MountTree<H>) -> Self {
        let shard = || Shard { entries: ClockMap::new(tree.dentries_per_mount / SHARDS), changes: 0 };
        Self {
            seed: tree.seed,
            shards: (0..SHARDS).map(|_| Mutex::new(tree.host, shard())).collect(),
            generation: AtomicU32::new(0),
            hits: tree.dentry_hits.clone(),
            misses: tree.dentry_misses.clone(),
        }
    }

    fn shard(&self, hash: u32) -> &Mutex<H, Shard> {
        #[expect(clippy::indexing_slicing, reason = "the shift leaves a number below SHARDS")]
        &self.shards[(hash >> 28) as usize]
    }

    /// Looks `name` up in `directory`, whose number is `number`.
    pub(super) fn lookup(
        &self,
        directory: &Arc<dyn Inode>,
        number: u64,
        name: &[u8],
    ) -> Result<Option<Child>> {
        let hash = hash_name(self.seed, number, name);
        let cell = self.shard(hash);
        let mut shard = cell.lock();
        let known = shard.entries.get(hash, |key| key.directory == number && *key.name == *name).cloned();
        let seen = shard.changes;
        drop(shard);
        if let Some(known) = known {
            self.hits.increment();
            return Ok(known);
        }
        self.misses.increment();
        let generation = self.generation.load(Ordering::Acquire);
        let found = match directory.lookup(name) {
            Ok(inode) => {
                let metadata = inode.metadata()?;
                Some(Child { inode, number: metadata.inode, kind: metadata.kind })
            }
            Err(FsError::NotFound) => None,
            Err(error) => return Err(error),
        };
        let key = Key { directory: number, name: name.into() };
        let mut shard = cell.lock();
        // Anything forgotten in this shard since then may have been this name.
        let gone = if shard.changes == seen && self.generation.load(Ordering::Acquire) == generation {
            shard.entries.insert(hash, key, found.clone())
        } else {
            None
        };
        drop(shard);
        // Not under the lock: the last reference to an inode may have work to do.
        drop(gone);
        Ok(found)
    }

    /// `name` in the directory `number` was made, removed or replaced, or may have been.
    pub(super) fn forget(&self, number: u64, name: &[u8]) {
        let hash = hash_name(self.seed, number, name);
        let mut shard = self.shard(hash).lock();
        shard.changes = shard.changes.wrapping_add(1);
        let gone = shard.entries.remove(hash, |key| key.directory == number && *key.name == *name);
        drop(shard);
        drop(gone);
    }

    /// Forgets everything, as when a directory is gone whose number may come back.
    pub(super) fn forget_all(&self) {
        self.generation.fetch_add(1, Ordering::Release);
        self.clear();
    }

    pub(super) fn clear(&self) {
        for cell in &self.shards {
            let mut shard = cell.lock();
            shard.changes = shard.changes.wrapping_add(1);
            let gone = shard.entries.clear();
            drop(shard);
            gone.for_each(drop);
        }
    }
}
