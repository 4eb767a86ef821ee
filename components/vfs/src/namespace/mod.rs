//! The tree of mounts: [`Namespace`](anykernel::fs::Namespace) for applications.
//!
//! * [`table`](self::table): what is mounted where; a walk works on a snapshot of it.
//! * [`walk`](self::walk): from a path to an inode, as path_resolution(7) says.
//! * [`dentry`](self::dentry): names that were looked up, found or not.
//! * [`node`](self::node): inodes as handed out, which keep their mount busy.

mod dentry;
mod node;
mod table;
#[cfg(test)]
mod tests;
mod walk;

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::block::{BlockDevice, BlockError};
use anykernel::counter::Counter;
use anykernel::fs::{self, File, FileKind, FsError, FsStats, FsType, Inode, OpenOptions, Result};
use anykernel::sync::Mutex;
use hypercall::Host;
use node::Node;
use table::{Mount, Table};
use walk::{Last, Place};

/// Why a mount failed, for a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountError {
    /// The kind of failure.
    pub error: FsError,
    /// One line: what is wrong and what to do.
    pub line: String,
}

impl MountError {
    fn new(error: FsError, line: String) -> Self {
        Self { error, line }
    }
}

/// The mounts of one instance.
pub struct MountTree<H: Host> {
    host: H,
    /// For devices and kinds of file systems. The kernel owns us, so we must not own it.
    kernel: Weak<Kernel<H>>,
    /// Replaced as a whole; walks take a reference.
    table: Mutex<H, Arc<Table<H>>>,
    /// Held while mounts change, directories go or names move, so that these see a still picture.
    topology: Mutex<H, ()>,
    /// Against chosen collisions in the dentry caches.
    seed: u64,
    dentries_per_mount: usize,
    dentry_hits: Counter,
    dentry_misses: Counter,
}

impl<H: Host> MountTree<H> {
    /// A tree without mounts.
    pub fn new(kernel: &Arc<Kernel<H>>) -> Arc<Self> {
        let host = kernel.host().of_component("vfs");
        let mut seed = [0; 8];
        if host.fill_random(&mut seed).is_err() {
            seed = host.monotonic_ns().to_le_bytes();
        }
        let dentries = (host.memory_bytes() >> 14).clamp(256, 32_768);
        Arc::new(Self {
            host,
            kernel: Arc::downgrade(kernel),
            table: Mutex::new(host, Arc::new(Table::default())),
            topology: Mutex::new(host, ()),
            seed: u64::from_le_bytes(seed),
            dentries_per_mount: dentries as usize,
            dentry_hits: kernel.counter("vfs.dentry_hits"),
            dentry_misses: kernel.counter("vfs.dentry_misses"),
        })
    }

    fn table(&self) -> Arc<Table<H>> {
        self.table.lock().clone()
    }

    fn node(&self, place: &Place<H>) -> Result<Arc<Node<H>>> {
        Node::new(place.mount.clone(), place.inode.clone(), place.number)
    }

    /// As [`fs::Namespace::mount`], with a reason for a person.
    pub fn mount_or_explain(
        &self,
        source: &str,
        target: &[u8],
        kind: Option<&str>,
        read_only: bool,
    ) -> Result<(), MountError> {
        let _still = self.topology.lock();
        let shown = String::from_utf8_lossy(target).into_owned();
        let fail = |error: FsError, line: String| {
            MountError::new(error, format!("mount {source} at {shown}: {line}"))
        };
        let Some(kernel) = self.kernel.upgrade() else {
            return Err(fail(FsError::Busy, "the instance has stopped".into()));
        };
        let table = self.table();
        let path = self.mount_path(&table, target).map_err(|error| {
            fail(error, format!("the mount point: {error}; it must be an existing directory"))
        })?;
        if table.at(&path).is_some() {
            return Err(fail(FsError::Busy, "something is mounted there already: unmount that first".into()));
        }
        let kinds = kernel.fs_types();
        let known = || kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ");
        let named = match kind {
            None => None,
            Some(name) => Some(kinds.iter().find(|kind| kind.name() == name).ok_or_else(|| {
                fail(FsError::Unsupported, format!("unknown file system kind {name}: known are {}", known()))
            })?),
        };
        let mut devices = kernel.block_devices();
        if source != "tmpfs" && !devices.iter().any(|device| device.info().name == source) {
            // It may be on a disk that was plugged in since.
            crate::partition::scan(&kernel);
            devices = kernel.block_devices();
        }
        let device = devices.iter().find(|device| device.info().name == source);
        if let Some(busy) = device.and_then(|device| table.uses(&device.info().name)) {
            let line = format!("the device is mounted at {} already", String::from_utf8_lossy(&busy));
            return Err(fail(FsError::Busy, line));
        }
        let (device, kind) = match (device, named) {
            (Some(device), Some(kind)) => (Some(device.clone()), kind.clone()),
            (Some(device), None) => {
                (Some(device.clone()), self.probe(&kinds, device).map_err(|(error, line)| fail(error, line))?)
            }
            // A kind without a device is its own source.
            (None, _) => match kinds.iter().find(|kind| kind.name() == source && source == "tmpfs") {
                Some(kind) => (None, kind.clone()),
                None => {
                    let names: Vec<_> = devices.iter().map(|device| device.info().name.as_str()).collect();
                    let there = if names.is_empty() {
                        "there are none".to_string()
                    } else {
                        format!("there are {}", names.join(", "))
                    };
                    let line = format!("no such block device ({there}): attach it, or correct the name");
                    return Err(fail(FsError::NotFound, line));
                }
            },
        };
        let filesystem = kind.mount(device.clone(), read_only).map_err(|error| {
            let line = device
                .as_ref()
                .and_then(|device| kind.explain(device))
                .unwrap_or_else(|| advice(error, kind.name()));
            fail(error, line)
        })?;
        let root = filesystem.root().map_err(|error| fail(error, advice(error, kind.name())))?;
        let number = root.metadata().map_err(|error| fail(error, advice(error, kind.name())))?.inode;
        let mount = Arc::new(Mount::new(self, path, source.into(), filesystem, root, number));
        let table = table.with(mount);
        *self.table.lock() = Arc::new(table);
        Ok(())
    }

    fn probe(
        &self,
        kinds: &[Arc<dyn FsType>],
        device: &Arc<dyn BlockDevice>,
    ) -> Result<Arc<dyn FsType>, (FsError, String)> {
        for kind in kinds {
            match kind.probe(device) {
                Ok(true) => return Ok(kind.clone()),
                Ok(false) => {}
                Err(error @ (FsError::Device(_) | FsError::NoMemory)) => {
                    return Err((error, advice(error, kind.name())));
                }
                Err(_) => {}
            }
        }
        let known = kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ");
        let line = format!(
            "no file system that is known here ({known}): give an image that mkfs made, or one of its partitions"
        );
        Err((FsError::NotAFileSystem, line))
    }

    /// Where a mount at `target` belongs: `/`, or an existing directory without a mount.
    fn mount_path(&self, table: &Arc<Table<H>>, target: &[u8]) -> Result<Vec<u8>> {
        if table.is_empty() {
            let root = !target.is_empty() && target.iter().all(|byte| *byte == b'/');
            return if root { Ok(Vec::new()) } else { Err(FsError::NotFound) };
        }
        let place = walk::walk(table, target, Last::Follow)?.existing()?;
        if place.kind != FileKind::Directory {
            return Err(FsError::NotDirectory);
        }
        Ok(place.path)
    }

    fn find(&self, path: &[u8], last: Last) -> Result<Place<H>> {
        walk::walk(&self.table(), path, last)?.existing()
    }

    fn forget(&self, parent: &Place<H>, name: &[u8]) {
        parent.mount.dentries.forget(parent.number, name);
    }
}

/// What to do about an error of a file system.
fn advice(error: FsError, kind: &str) -> String {
    match error {
        FsError::NotAFileSystem => {
            format!("there is no {kind} file system on it: check the image and the kind")
        }
        FsError::Corrupt => format!(
            "the {kind} file system is corrupt or its image is cut short: check it (fsck) or copy it again"
        ),
        FsError::Unsupported => format!("this {kind} file system uses a feature that is not supported"),
        FsError::ReadOnly => format!("{kind} is read-only here: mount it read-only"),
        FsError::Device(error) => format!("{error}: check the device or the image file"),
        FsError::NoMemory => "out of memory: give the instance more".into(),
        error => error.to_string(),
    }
}

impl<H: Host> fs::Namespace for MountTree<H> {
    fn mount(&self, source: &str, target: &[u8], kind: Option<&str>, read_only: bool) -> Result<()> {
        self.mount_or_explain(source, target, kind, read_only).map_err(|failed| {
            log::error!("{}", failed.line);
            failed.error
        })
    }

    fn unmount(&self, target: &[u8]) -> Result<()> {
        let _still = self.topology.lock();
        let table = self.table();
        let place = walk::walk(&table, target, Last::Follow)?.existing()?;
        if place.path != place.mount.path {
            return Err(FsError::Invalid);
        }
        let mount = place.mount.clone();
        drop(place);
        if table.any_below(&mount.path) || !mount.close() {
            return Err(FsError::Busy);
        }
        match mount.filesystem.sync() {
            Ok(()) => {}
            // Its device is gone (unplugged, for example): there is nothing to keep it for.
            Err(error @ FsError::Device(BlockError::Gone)) => {
                let shown = String::from_utf8_lossy(&mount.path).into_owned();
                log::error!("unmounting {shown}: {error}; what was not written is lost");
            }
            Err(error) => {
                mount.reopen();
                return Err(error);
            }
        }
        mount.dentries.clear();
        *self.table.lock() = Arc::new(table.without(&mount));
        Ok(())
    }

    fn resolve(&self, path: &[u8], follow: bool) -> Result<Arc<dyn Inode>> {
        let place = self.find(path, if follow { Last::Follow } else { Last::Keep })?;
        Ok(self.node(&place)?)
    }

    fn open(&self, path: &[u8], options: OpenOptions) -> Result<File> {
        let changes = options.truncate || options.create || options.create_new;
        if !options.write && (changes || !options.read) {
            return Err(FsError::Invalid);
        }
        let last = if options.create_new { Last::Keep } else { Last::Follow };
        let mut attempts = 0;
        let place = loop {
            let found = walk::walk(&self.table(), path, last)?;
            match found.place {
                Some(_) if options.create_new => return Err(FsError::Exists),
                Some(place) => break place,
                None if !options.create && !options.create_new => return Err(FsError::NotFound),
                None => {}
            }
            let (parent, name) = (found.parent, found.name);
            if found.must_be_directory {
                return Err(FsError::IsDirectory);
            }
            let inside = parent.mount.hold()?;
            let made = parent.inode.create(&name, FileKind::File, None);
            self.forget(&parent, &name);
            drop(inside);
            match made {
                Ok(inode) => {
                    let number = inode.metadata()?.inode;
                    let path = parent.child_path(&name);
                    break Place { mount: parent.mount, inode, number, kind: FileKind::File, path };
                }
                // Somebody else was faster: open what they made, unless it keeps coming and going.
                Err(FsError::Exists) if !options.create_new && attempts < 8 => attempts += 1,
                Err(error) => return Err(error),
            }
        };
        match place.kind {
            FileKind::Directory if options.write => return Err(FsError::IsDirectory),
            FileKind::File | FileKind::Directory => {}
            FileKind::Symlink => return Err(FsError::Loop),
            _ => return Err(FsError::Unsupported),
        }
        if options.write && place.mount.filesystem.stats()?.read_only {
            return Err(FsError::ReadOnly);
        }
        let node = self.node(&place)?;
        if options.truncate && place.kind == FileKind::File {
            node.truncate(0)?;
        }
        Ok(File { inode: node, options })
    }

    fn create(&self, path: &[u8], kind: FileKind, target: Option<&[u8]>) -> Result<()> {
        let found = walk::walk(&self.table(), path, Last::Keep)?;
        if found.place.is_some() {
            return Err(FsError::Exists);
        }
        if found.must_be_directory && kind != FileKind::Directory {
            return Err(FsError::NotFound);
        }
        let _inside = found.parent.mount.hold()?;
        let made = found.parent.inode.create(&found.name, kind, target);
        self.forget(&found.parent, &found.name);
        made.map(drop)
    }

    fn remove(&self, path: &[u8]) -> Result<()> {
        let _still = self.topology.lock();
        let table = self.table();
        let found = walk::walk(&table, path, Last::Keep)?;
        let place = found.place.ok_or(FsError::NotFound)?;
        if table.at_or_below(&place.path) {
            return Err(FsError::Busy);
        }
        if found.name.is_empty() {
            // `.`, `..` or the root.
            return Err(FsError::Invalid);
        }
        let removed = found.parent.inode.remove(&found.name);
        self.forget(&found.parent, &found.name);
        if place.kind == FileKind::Directory {
            // Another directory may get its number; what is known of names in it must not outlive it.
            place.mount.dentries.forget_all();
        }
        removed
    }

    fn rename(&self, from: &[u8], to: &[u8]) -> Result<()> {
        let _still = self.topology.lock();
        let table = self.table();
        let from = walk::walk(&table, from, Last::Keep)?;
        let to = walk::walk(&table, to, Last::Keep)?;
        let place = from.place.ok_or(FsError::NotFound)?;
        if from.name.is_empty() || to.name.is_empty() {
            return Err(FsError::Busy);
        }
        if !Arc::ptr_eq(&from.parent.mount, &to.parent.mount) {
            return Err(FsError::CrossDevice);
        }
        let new_path = to.parent.child_path(&to.name);
        if table.at_or_below(&place.path) || table.at_or_below(&new_path) {
            return Err(FsError::Busy);
        }
        if to.must_be_directory && place.kind != FileKind::Directory {
            return Err(FsError::NotDirectory);
        }
        if table::is_below(&new_path, &place.path) {
            return Err(FsError::CrossDevice);
        }
        if new_path == place.path {
            return Ok(());
        }
        let renamed = from.parent.inode.rename(&from.name, &to.parent.inode, &to.name);
        self.forget(&from.parent, &from.name);
        self.forget(&to.parent, &to.name);
        if to.place.is_some_and(|replaced| replaced.kind == FileKind::Directory) {
            place.mount.dentries.forget_all();
        }
        renamed
    }

    fn stats(&self, path: &[u8]) -> Result<FsStats> {
        self.find(path, Last::Follow)?.mount.filesystem.stats()
    }

    fn mounts(&self) -> Vec<Vec<u8>> {
        let shown = |path: &Vec<u8>| if path.is_empty() { b"/".to_vec() } else { path.clone() };
        self.table().iter().map(|mount| shown(&mount.path)).collect()
    }

    fn sync(&self) -> Result<()> {
        // All of them, even if one fails.
        let mut outcome = Ok(());
        for mount in self.table().iter() {
            let synced = mount.filesystem.sync();
            outcome = outcome.and(synced);
        }
        outcome
    }
}
