//! A mounted file system of an instance, shown to Linux through FUSE (fuse(4)).
//!
//! Whoever mounts it is its only user: Linux lets nobody else in, so modes are shown and not enforced. Everything is
//! written here, so Linux may keep what it was told.

mod nodes;

use crate::Failure;
use crate::host::Recover;
use anykernel::block::BlockError;
use anykernel::fs::{DirEntry, FileKind, FsError, Inode, Metadata, Namespace, Timestamp};
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, Session, TimeOrNow,
    WriteFlags,
};
use nodes::Nodes;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long Linux may believe what it was told. Nobody else changes anything.
const VALID: Duration = Duration::from_secs(3600);
/// Most names of a directory that are shown. A corrupt one may say that it has more.
const MOST_NAMES: usize = 1 << 22;
/// Bytes that Linux reads ahead, and writes at once.
const TRANSFER: u32 = 1 << 20;
/// Requests that are served at once.
const THREADS: usize = 4;
const PATIENCE: Duration = Duration::from_secs(5);

/// A mount, until [`Mount::end`].
pub struct Mount {
    session: BackgroundSession,
    place: PathBuf,
}

impl std::fmt::Debug for Mount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mount({})", self.place.display())
    }
}

impl Mount {
    /// Shows `root` and what is below it at the directory `place`. `name` is what mount(8) lists. Failures are lines for a
    /// person.
    pub fn new(
        names: Arc<dyn Namespace>,
        root: Arc<dyn Inode>,
        place: &Path,
        name: &str,
        writable: bool,
    ) -> Result<Self, Failure> {
        let shown = place.display();
        if !place.is_dir() {
            return Err(Failure::new(format!("{shown} is no directory: make it, then mount there")));
        }
        let key = root.metadata().map_err(|error| Failure::new(format!("{name}: {error}")))?.inode;
        let state = Fuse {
            names,
            nodes: Mutex::new(Nodes::new(root, key)),
            listings: Mutex::default(),
            owner: (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw()),
        };
        let mut config = Config::default();
        config.n_threads = Some(THREADS);
        config.mount_options = vec![
            // A comma would end the option.
            MountOption::FSName(name.replace(',', "_")),
            MountOption::NoDev,
            MountOption::NoSuid,
            if writable { MountOption::RW } else { MountOption::RO },
        ];
        let there = Path::new("/dev/fuse").exists();
        let session = Session::new(state, place, &config).and_then(Session::spawn);
        let session = session.map_err(|error| {
            Failure::new(match error.kind() {
                _ if !there => "there is no /dev/fuse: `modprobe fuse` as root loads its driver; in a container it is handed in \
                     with --device /dev/fuse"
                    .into(),
                // What is not there is the helper that mounts for those who may not.
                ErrorKind::NotFound => {
                    format!("{shown}: only root may mount: install fuse3 (its fusermount3 mounts for others), or be root")
                }
                ErrorKind::PermissionDenied => format!(
                    "{shown}: not permitted to mount there: be root, or give a directory and a /dev/fuse of your own (in a \
                     container: --cap-add SYS_ADMIN)"
                ),
                _ => format!("{shown}: {error}"),
            })
        })?;
        Ok(Self { session, place: place.into() })
    }

    /// It was unmounted from outside.
    pub fn is_over(&self) -> bool {
        self.session.guard.is_finished()
    }

    /// Takes it away: nobody finds it any more. Who still has a file open is waited for a little; `false` if somebody has after
    /// that.
    pub fn end(self) -> bool {
        if !self.is_over()
            && rustix::mount::unmount(&self.place, rustix::mount::UnmountFlags::DETACH).is_err()
        {
            for helper in ["fusermount3", "fusermount"] {
                let mut command = Command::new(helper);
                command.args(["-u", "-z", "--"]).arg(&self.place).stdin(Stdio::null()).stderr(Stdio::null());
                if command.status().is_ok_and(|status| status.success()) {
                    break;
                }
            }
        }
        let start = Instant::now();
        while !self.is_over() && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.is_over()
    }
}

/// Directories being read, as they were when they were opened.
#[derive(Default)]
struct Listings {
    last: u64,
    by_handle: HashMap<u64, Arc<Vec<DirEntry>>>,
}

struct Fuse {
    names: Arc<dyn Namespace>,
    nodes: Mutex<Nodes>,
    listings: Mutex<Listings>,
    /// To whom everything belongs where the file system says root, as FAT does.
    owner: (u32, u32),
}

type Answer<T> = Result<T, Errno>;

fn errno(error: FsError) -> Errno {
    match error {
        FsError::NotFound => Errno::ENOENT,
        FsError::NotDirectory => Errno::ENOTDIR,
        FsError::IsDirectory => Errno::EISDIR,
        FsError::Exists => Errno::EEXIST,
        FsError::NotEmpty => Errno::ENOTEMPTY,
        FsError::ReadOnly => Errno::EROFS,
        FsError::NoSpace => Errno::ENOSPC,
        FsError::BadName | FsError::Invalid => Errno::EINVAL,
        FsError::Loop => Errno::ELOOP,
        FsError::TooLarge => Errno::EFBIG,
        FsError::CrossDevice => Errno::EXDEV,
        FsError::Unsupported => Errno::EPERM,
        FsError::Busy => Errno::EBUSY,
        FsError::NoMemory => Errno::ENOMEM,
        FsError::Device(BlockError::NoMemory) => Errno::ENOMEM,
        // Also what was unplugged.
        _ => Errno::EIO,
    }
}

fn kind(kind: FileKind) -> FileType {
    match kind {
        FileKind::File => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        // It says no more, and none can be opened.
        _ => FileType::NamedPipe,
    }
}

fn system_time(time: Timestamp) -> SystemTime {
    let nanos = Duration::from_nanos(time.nanos.into());
    let since = Duration::from_secs(time.seconds.unsigned_abs());
    let time = match time.seconds {
        0.. => UNIX_EPOCH.checked_add(since + nanos),
        _ => UNIX_EPOCH.checked_sub(since),
    };
    time.unwrap_or(UNIX_EPOCH)
}

fn timestamp(time: SystemTime) -> Timestamp {
    // Nothing on a disk of ours is older.
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: since.as_secs().cast_signed(), nanos: since.subsec_nanos() }
}

impl Fuse {
    fn inode(&self, number: INodeNo) -> Answer<Arc<dyn Inode>> {
        self.nodes.lock().recover().get(number.0).ok_or(Errno::ESTALE)
    }

    fn attributes(&self, number: u64, metadata: &Metadata) -> FileAttr {
        let Metadata { size, allocated, links, mode, .. } = *metadata;
        let (uid, gid) = if metadata.uid == 0 { self.owner } else { (metadata.uid, metadata.gid) };
        FileAttr {
            ino: INodeNo(number),
            size,
            blocks: allocated.div_ceil(512),
            atime: system_time(metadata.accessed),
            mtime: system_time(metadata.modified),
            ctime: system_time(metadata.changed),
            crtime: UNIX_EPOCH,
            kind: kind(metadata.kind),
            perm: mode & 0o7777,
            nlink: links,
            uid,
            gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// Tells Linux of a file.
    fn tell(&self, inode: Arc<dyn Inode>) -> Answer<FileAttr> {
        let metadata = inode.metadata().map_err(errno)?;
        let number = self.nodes.lock().recover().enter(inode, metadata.inode);
        Ok(self.attributes(number, &metadata))
    }

    fn make(&self, parent: INodeNo, name: &OsStr, kind: FileKind, target: Option<&[u8]>) -> Answer<FileAttr> {
        self.tell(self.inode(parent)?.create(name.as_bytes(), kind, target).map_err(errno)?)
    }

    fn remove(&self, parent: INodeNo, name: &OsStr, directory: bool) -> Answer<()> {
        let parent = self.inode(parent)?;
        let metadata = parent.lookup(name.as_bytes()).and_then(|inode| inode.metadata()).map_err(errno)?;
        match (directory, metadata.kind) {
            (true, FileKind::Directory) => {}
            (true, _) => return Err(Errno::ENOTDIR),
            (false, FileKind::Directory) => return Err(Errno::EISDIR),
            (false, _) => {}
        }
        // Nobody may get its number meanwhile.
        let mut nodes = self.nodes.lock().recover();
        parent.remove(name.as_bytes()).map_err(errno)?;
        nodes.unname(metadata.inode);
        Ok(())
    }

    fn rename(&self, from: (INodeNo, &OsStr), to: (INodeNo, &OsStr), flags: RenameFlags) -> Answer<()> {
        let (directory, name) = (self.inode(from.0)?, from.1.as_bytes());
        let (new_directory, new_name) = (self.inode(to.0)?, to.1.as_bytes());
        let number = |directory: &Arc<dyn Inode>, name| directory.lookup(name)?.metadata().map(|it| it.inode);
        let before = number(&directory, name).map_err(errno)?;
        let replaced = match number(&new_directory, new_name) {
            Ok(number) => Some(number),
            Err(FsError::NotFound) => None,
            Err(error) => return Err(errno(error)),
        };
        if flags.contains(RenameFlags::RENAME_NOREPLACE) && replaced.is_some() {
            return Err(Errno::EEXIST);
        }
        if !(flags - RenameFlags::RENAME_NOREPLACE).is_empty() {
            return Err(Errno::EINVAL);
        }
        let mut nodes = self.nodes.lock().recover();
        directory.rename(name, &new_directory, new_name).map_err(errno)?;
        if let Some(replaced) = replaced.filter(|replaced| *replaced != before) {
            nodes.unname(replaced);
        }
        if let Ok(now) = number(&new_directory, new_name) {
            nodes.renumber(before, now);
        }
        Ok(())
    }

    /// Everything in a directory.
    fn list(&self, number: INodeNo) -> Answer<Vec<DirEntry>> {
        let inode = self.inode(number)?;
        let (mut entries, mut cursor) = (Vec::new(), Some(0));
        while let Some(from) = cursor {
            cursor = inode
                .read_dir(from, &mut |entry| {
                    entries.push(entry);
                    entries.len() < MOST_NAMES
                })
                .map_err(errno)?;
            if entries.len() >= MOST_NAMES {
                return Err(Errno::EIO);
            }
        }
        Ok(entries)
    }

    fn change(
        &self,
        number: INodeNo,
        mode: Option<u32>,
        owner: (Option<u32>, Option<u32>),
        size: Option<u64>,
        modified: Option<TimeOrNow>,
    ) -> Answer<FileAttr> {
        let inode = self.inode(number)?;
        let now = self.attributes(number.0, &inode.metadata().map_err(errno)?);
        // None of the file systems that can be written keeps these.
        if mode.is_some_and(|mode| mode & 0o7777 != u32::from(now.perm))
            || owner.0.is_some_and(|uid| uid != now.uid)
            || owner.1.is_some_and(|gid| gid != now.gid)
        {
            return Err(Errno::EPERM);
        }
        if let Some(size) = size {
            inode.truncate(size).map_err(errno)?;
        }
        if let Some(modified) = modified {
            let time = match modified {
                TimeOrNow::SpecificTime(time) => time,
                TimeOrNow::Now => SystemTime::now(),
            };
            inode.set_modified(timestamp(time)).map_err(errno)?;
        }
        Ok(self.attributes(number.0, &inode.metadata().map_err(errno)?))
    }
}

impl Filesystem for Fuse {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Where the kernel has a lower limit, that holds.
        let _ = config.set_max_readahead(TRANSFER).map_err(|most| config.set_max_readahead(most));
        let _ = config.set_max_write(TRANSFER).map_err(|most| config.set_max_write(most));
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.inode(parent).and_then(|inode| inode.lookup(name.as_bytes()).map_err(errno));
        match found.and_then(|inode| self.tell(inode)) {
            Ok(attributes) => reply.entry(&VALID, &attributes, Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn forget(&self, _: &Request, number: INodeNo, count: u64) {
        self.nodes.lock().recover().forget(number.0, count);
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.inode(number).and_then(|inode| inode.metadata().map_err(errno)) {
            Ok(metadata) => reply.attr(&VALID, &self.attributes(number.0, &metadata)),
            Err(error) => reply.error(error),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        number: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match self.change(number, mode, (uid, gid), size, modified) {
            Ok(attributes) => reply.attr(&VALID, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn readlink(&self, _: &Request, number: INodeNo, reply: ReplyData) {
        match self.inode(number).and_then(|inode| inode.read_link().map_err(errno)) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(error),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        match self.make(parent, name, FileKind::Directory, None) {
            Ok(attributes) => reply.entry(&VALID, &attributes, Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn symlink(&self, _: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        match self.make(parent, name, FileKind::Symlink, Some(target.as_os_str().as_bytes())) {
            Ok(attributes) => reply.entry(&VALID, &attributes, Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        match self.make(parent, name, FileKind::File, None) {
            Ok(attributes) => {
                let flags = FopenFlags::FOPEN_KEEP_CACHE;
                reply.created(&VALID, &attributes, Generation(0), FileHandle(0), flags);
            }
            Err(error) => reply.error(error),
        }
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.remove(parent, name, false));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.remove(parent, name, true));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        empty(reply, Fuse::rename(self, (parent, name), (new_parent, new_name), flags));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn read(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut buffer = vec![0; size as usize];
        let read = self.inode(number).and_then(|inode| inode.read_at(offset, &mut buffer).map_err(errno));
        match read {
            Ok(len) => reply.data(buffer.get(..len).unwrap_or_default()),
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.inode(number).and_then(|inode| inode.write_at(offset, data).map_err(errno)) {
            // At most what Linux asked for, which fits.
            Ok(len) => reply.written(len as u32),
            Err(error) => reply.error(error),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // close(2) promises nothing.
        reply.ok();
    }

    fn fsync(&self, _: &Request, number: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(reply, self.inode(number).and_then(|inode| inode.sync().map_err(errno)));
    }

    fn fsyncdir(&self, _: &Request, number: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(reply, self.inode(number).and_then(|inode| inode.sync().map_err(errno)));
    }

    fn opendir(&self, _: &Request, number: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.list(number) {
            Ok(entries) => {
                let mut listings = self.listings.lock().recover();
                listings.last += 1;
                let handle = listings.last;
                listings.by_handle.insert(handle, Arc::new(entries));
                reply.opened(FileHandle(handle), FopenFlags::empty());
            }
            Err(error) => reply.error(error),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let listing = self.listings.lock().recover().by_handle.get(&handle.0).cloned();
        let Some(listing) = listing else { return reply.error(Errno::EBADF) };
        // Who is above need not be known: Linux shows the right number of ".." by itself.
        let dots = [(number, FileType::Directory, &b"."[..]), (number, FileType::Directory, b"..")];
        let names = listing.iter().map(|entry| (INodeNo(entry.inode), kind(entry.kind), &entry.name[..]));
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (at, (number, kind, name)) in (1..).zip(dots.into_iter().chain(names)).skip(from) {
            if reply.add(number, at, kind, OsStr::from_bytes(name)) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.listings.lock().recover().by_handle.remove(&handle.0);
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        match self.names.stats(b"/") {
            Ok(stats) => {
                let (blocks, free, size) = (stats.blocks, stats.free_blocks, stats.block_size);
                reply.statfs(blocks, free, free, 0, 0, size, stats.max_name, size);
            }
            Err(error) => reply.error(errno(error)),
        }
    }
}

fn empty(reply: ReplyEmpty, result: Answer<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}
