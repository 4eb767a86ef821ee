//! What is mounted where.

use super::MountTree;
use super::dentry::Dentries;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::fs::{FileSystem, FsError, Inode, Result};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use hypercall::Host;

/// One mount.
pub(super) struct Mount<H: Host> {
    /// Where: an absolute path without links, `.`, `..` or a slash at its end; empty for the root.
    pub(super) path: Vec<u8>,
    /// The device's name.
    source: String,
    pub(super) filesystem: Arc<dyn FileSystem>,
    pub(super) root: Arc<dyn Inode>,
    /// Inode number of the root.
    pub(super) root_number: u64,
    pub(super) dentries: Dentries<H>,
    /// Inodes handed out.
    open: AtomicUsize,
    /// On its way out: nothing more is handed out.
    closing: AtomicBool,
}

impl<H: Host> Mount<H> {
    pub(super) fn new(
        tree: &MountTree<H>,
        path: Vec<u8>,
        source: String,
        filesystem: Arc<dyn FileSystem>,
        root: Arc<dyn Inode>,
        root_number: u64,
    ) -> Self {
        Self {
            path,
            source,
            filesystem,
            root,
            root_number,
            dentries: Dentries::new(tree),
            open: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
        }
    }

    /// Counts an inode that is handed out. `false`: the mount is going.
    pub(super) fn enter(&self) -> bool {
        self.open.fetch_add(1, SeqCst);
        if self.closing.load(SeqCst) {
            self.leave();
            return false;
        }
        true
    }

    /// Keeps the mount busy while a name in it changes.
    pub(super) fn hold(&self) -> Result<Inside<'_, H>> {
        if self.enter() { Ok(Inside(self)) } else { Err(FsError::NotFound) }
    }

    pub(super) fn leave(&self) {
        self.open.fetch_sub(1, SeqCst);
    }

    /// Lets nobody in any more, unless somebody is in.
    pub(super) fn close(&self) -> bool {
        self.closing.store(true, SeqCst);
        if self.open.load(SeqCst) != 0 {
            self.closing.store(false, SeqCst);
            return false;
        }
        true
    }

    pub(super) fn reopen(&self) {
        self.closing.store(false, SeqCst);
    }
}

/// See [`Mount::hold`].
pub(super) struct Inside<'a, H: Host>(&'a Mount<H>);

impl<H: Host> Drop for Inside<'_, H> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// All mounts, in the order they were made. Never changed once walks can see it.
pub(super) struct Table<H: Host>(Vec<Arc<Mount<H>>>);

impl<H: Host> Default for Table<H> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<H: Host> Table<H> {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Mount<H>>> {
        self.0.iter()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether there is more than the root.
    pub(super) fn branches(&self) -> bool {
        self.0.len() > 1
    }

    pub(super) fn at(&self, path: &[u8]) -> Option<&Arc<Mount<H>>> {
        self.0.iter().find(|mount| mount.path == path)
    }

    pub(super) fn any_below(&self, path: &[u8]) -> bool {
        self.0.iter().any(|mount| is_below(&mount.path, path))
    }

    pub(super) fn at_or_below(&self, path: &[u8]) -> bool {
        self.at(path).is_some() || self.any_below(path)
    }

    /// Where the device, or one that shares sectors with it (a partition and its disk), is mounted.
    pub(super) fn uses(&self, device: &str) -> Option<Vec<u8>> {
        let part_of = |part: &str, disk: &str| {
            part.strip_prefix(disk)
                .and_then(|rest| rest.strip_prefix('p'))
                .is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
        };
        self.0
            .iter()
            .find(|mount| {
                mount.source == device || part_of(&mount.source, device) || part_of(device, &mount.source)
            })
            .map(|mount| if mount.path.is_empty() { b"/".to_vec() } else { mount.path.clone() })
    }

    pub(super) fn with(&self, mount: Arc<Mount<H>>) -> Self {
        Self(self.0.iter().cloned().chain([mount]).collect())
    }

    pub(super) fn without(&self, mount: &Arc<Mount<H>>) -> Self {
        Self(self.0.iter().filter(|other| !Arc::ptr_eq(other, mount)).cloned().collect())
    }
}

/// Whether `path` is strictly below `above`.
pub(super) fn is_below(path: &[u8], above: &[u8]) -> bool {
    path.strip_prefix(above).is_some_and(|rest| rest.first() == Some(&b'/'))
}
