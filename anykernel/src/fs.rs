//! What a file system is ([`FileSystem`], [`Inode`]), and what applications use ([`Namespace`], [`File`]).
//!
//! Names and paths are bytes: what is on a disk need not be UTF-8.

use crate::block::{BlockDevice, BlockError};
use alloc::{string::String, sync::Arc, vec::Vec};
use core::fmt;

/// Why a file operation failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FsError {
    /// No such file or directory.
    NotFound,
    /// A component of the path is not a directory.
    NotDirectory,
    /// It is a directory.
    IsDirectory,
    /// It exists already.
    Exists,
    /// The directory is not empty.
    NotEmpty,
    /// The file system or device is read-only.
    ReadOnly,
    /// No room left.
    NoSpace,
    /// A name is too long for this file system, or has characters it cannot hold.
    BadName,
    /// More than 40 symbolic links on the way.
    Loop,
    /// Larger than the file system allows.
    TooLarge,
    /// Not possible between two file systems.
    CrossDevice,
    /// The kind of file or the file system does not do this.
    Unsupported,
    /// In use: mounted, open.
    Busy,
    /// No file system of a known kind is on the device.
    NotAFileSystem,
    /// What is on the disk contradicts itself.
    Corrupt,
    /// An argument is out of range, or a directory was to be moved into itself.
    Invalid,
    /// No memory.
    NoMemory,
    /// The device failed.
    Device(BlockError),
}

impl fmt::Display for FsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FsError::NotFound => "no such file or directory",
            FsError::NotDirectory => "not a directory",
            FsError::IsDirectory => "is a directory",
            FsError::Exists => "exists already",
            FsError::NotEmpty => "directory is not empty",
            FsError::ReadOnly => "read-only file system",
            FsError::NoSpace => "no space left on the device",
            FsError::BadName => "name not possible on this file system",
            FsError::Loop => "too many symbolic links",
            FsError::TooLarge => "file too large",
            FsError::CrossDevice => "not on the same file system",
            FsError::Unsupported => "not supported by this file system",
            FsError::Busy => "in use",
            FsError::NotAFileSystem => "no known file system on the device",
            FsError::Corrupt => "file system is corrupt",
            FsError::Invalid => "invalid argument",
            FsError::NoMemory => "out of memory",
            FsError::Device(error) => return error.fmt(f),
        })
    }
}

impl core::error::Error for FsError {}

impl From<BlockError> for FsError {
    fn from(error: BlockError) -> Self {
        match error {
            BlockError::ReadOnly => FsError::ReadOnly,
            BlockError::NoMemory => FsError::NoMemory,
            error => FsError::Device(error),
        }
    }
}

/// Result of a file operation.
pub type Result<T, E = FsError> = core::result::Result<T, E>;

/// Kind of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileKind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Device node, FIFO or socket: shown, never opened.
    Special,
}

/// A moment: seconds and nanoseconds since 1970-01-01 UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Timestamp {
    /// May be negative.
    pub seconds: i64,
    /// 0 to 999,999,999.
    pub nanos: u32,
}

/// What stat(2) tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// Number within its file system.
    pub inode: u64,
    /// Kind.
    pub kind: FileKind,
    /// Permission bits and set-id bits, as in the low 12 bits of `st_mode`.
    pub mode: u16,
    /// Length in bytes.
    pub size: u64,
    /// Bytes used on the device.
    pub allocated: u64,
    /// Hard links.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of content.
    pub modified: Timestamp,
    /// Last access, where kept.
    pub accessed: Timestamp,
    /// Last change of the inode.
    pub changed: Timestamp,
}

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// Without path. Never `.` or `..`.
    pub name: Vec<u8>,
    /// Inode number.
    pub inode: u64,
    /// Kind, as far as the directory tells (ext4 `filetype`), else from the inode.
    pub kind: FileKind,
}

/// What `statfs` tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsStats {
    /// `"ext4"`, `"vfat"`, `"tmpfs"`.
    pub kind: &'static str,
    /// Block (cluster) size in bytes.
    pub block_size: u32,
    /// Blocks in all.
    pub blocks: u64,
    /// Free blocks.
    pub free_blocks: u64,
    /// Longest name in bytes.
    pub max_name: u32,
    /// Nothing can be written.
    pub read_only: bool,
    /// Volume label, as far as it is UTF-8.
    pub label: String,
}

/// A file, directory or link of a mounted file system. Callable from many threads at once; may block on its device.
///
/// Operations that a file system lacks return [`FsError::ReadOnly`] or [`FsError::Unsupported`], as here by default.
pub trait Inode: Send + Sync {
    /// Attributes.
    fn metadata(&self) -> Result<Metadata>;

    /// Reads into `buf` from `offset`; fewer bytes than asked only at the end of the file. Holes read as zeros.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize>;

    /// Finds `name` in this directory. Never asked for `.` and `..`.
    fn lookup(&self, name: &[u8]) -> Result<Arc<dyn Inode>>;

    /// Lists entries from `cursor` (0: the start) to `sink` until it returns `false` or the directory ends. Returns the
    /// cursor to go on with, `None` at the end. Entries neither added nor removed meanwhile are seen exactly once.
    fn read_dir(&self, cursor: u64, sink: &mut dyn FnMut(DirEntry) -> bool) -> Result<Option<u64>>;

    /// The target of a symbolic link, at most 4,095 bytes.
    fn read_link(&self) -> Result<Vec<u8>> {
        Err(FsError::Invalid)
    }

    /// Writes all of `data` at `offset`, growing the file (a gap reads as zeros). Durable after [`Inode::sync`].
    fn write_at(&self, _offset: u64, _data: &[u8]) -> Result<usize> {
        Err(FsError::ReadOnly)
    }

    /// Sets the length.
    fn truncate(&self, _size: u64) -> Result<()> {
        Err(FsError::ReadOnly)
    }

    /// Makes a file or directory in this directory. `target` is for symbolic links only.
    fn create(&self, _name: &[u8], _kind: FileKind, _target: Option<&[u8]>) -> Result<Arc<dyn Inode>> {
        Err(FsError::ReadOnly)
    }

    /// Removes a name; a directory must be empty. An open file lives on until its last user is gone.
    fn remove(&self, _name: &[u8]) -> Result<()> {
        Err(FsError::ReadOnly)
    }

    /// Renames within one file system, replacing what is there as rename(2) does. [`FsError::Invalid`] if `to` is the
    /// directory that moves, or below it.
    fn rename(&self, _name: &[u8], _to: &Arc<dyn Inode>, _new_name: &[u8]) -> Result<()> {
        Err(FsError::ReadOnly)
    }

    /// Sets the time of last change of content, where kept.
    fn set_modified(&self, _time: Timestamp) -> Result<()> {
        Err(FsError::ReadOnly)
    }

    /// Makes content and attributes durable.
    fn sync(&self) -> Result<()> {
        Ok(())
    }

    /// For a file system to recognise its own inodes (rename).
    fn as_any(&self) -> &dyn core::any::Any;
}

/// A mounted file system.
pub trait FileSystem: Send + Sync {
    /// Its root directory.
    fn root(&self) -> Result<Arc<dyn Inode>>;
    /// Size and kind.
    fn stats(&self) -> Result<FsStats>;
    /// Makes everything durable.
    fn sync(&self) -> Result<()>;
}

/// A kind of file system that can be mounted.
pub trait FsType: Send + Sync {
    /// `"ext4"`, `"vfat"`, `"tmpfs"`: as mount(8) calls it.
    fn name(&self) -> &'static str;
    /// Whether this kind is on `device`; cheap, reads a few sectors. Kinds without a device say `false`.
    fn probe(&self, device: &Arc<dyn BlockDevice>) -> Result<bool>;
    /// Why this device cannot be mounted, in one line that says what to do; asked after a mount failed. `None`: nothing
    /// is known beyond the error.
    fn explain(&self, _device: &Arc<dyn BlockDevice>) -> Option<String> {
        None
    }
    /// Mounts. Refuses with [`FsError::NotAFileSystem`], [`FsError::Corrupt`] or [`FsError::Unsupported`]; `read_only`
    /// also means that nothing at all is written to the device.
    fn mount(&self, device: Option<Arc<dyn BlockDevice>>, read_only: bool) -> Result<Arc<dyn FileSystem>>;
}

/// How to open a file; as `std::fs::OpenOptions`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OpenOptions {
    /// For reading.
    pub read: bool,
    /// For writing.
    pub write: bool,
    /// Make it if it is not there.
    pub create: bool,
    /// Fail if it is there.
    pub create_new: bool,
    /// Cut it to nothing.
    pub truncate: bool,
}

impl OpenOptions {
    /// Read only.
    pub const READ: Self =
        Self { read: true, write: false, create: false, create_new: false, truncate: false };
    /// A new or emptied file for writing.
    pub const CREATE: Self =
        Self { read: true, write: true, create: true, create_new: false, truncate: true };
}

/// An open regular file or directory.
#[derive(Clone)]
pub struct File {
    /// What is open.
    pub inode: Arc<dyn Inode>,
    /// How.
    pub options: OpenOptions,
}

impl File {
    /// As [`Inode::read_at`].
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        if !self.options.read {
            return Err(FsError::Invalid);
        }
        self.inode.read_at(offset, buf)
    }

    /// As [`Inode::write_at`].
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<usize> {
        if !self.options.write {
            return Err(FsError::Invalid);
        }
        self.inode.write_at(offset, data)
    }

    /// As [`Inode::metadata`].
    pub fn metadata(&self) -> Result<Metadata> {
        self.inode.metadata()
    }
}

/// The tree of mounts, as applications see it. Paths are absolute; `.`, `..`, repeated slashes and symbolic links are
/// followed as path_resolution(7) says, at most 40 links.
pub trait Namespace: Send + Sync {
    /// Mounts what is on `source` (a registered block device's name, or the kind's own for tmpfs) at `target`, an
    /// existing directory or `/`. `kind` `None`: probe.
    fn mount(&self, source: &str, target: &[u8], kind: Option<&str>, read_only: bool) -> Result<()>;
    /// Unmounts what is at `target`, after a sync. [`FsError::Busy`] if something is open or mounted below.
    fn unmount(&self, target: &[u8]) -> Result<()>;
    /// The inode at `path`; the last component's link is followed if `follow`.
    fn resolve(&self, path: &[u8], follow: bool) -> Result<Arc<dyn Inode>>;
    /// Opens a file or (for reading) a directory.
    fn open(&self, path: &[u8], options: OpenOptions) -> Result<File>;
    /// Makes a directory or, with a target, a symbolic link.
    fn create(&self, path: &[u8], kind: FileKind, target: Option<&[u8]>) -> Result<()>;
    /// Removes a file or an empty directory.
    fn remove(&self, path: &[u8]) -> Result<()>;
    /// Renames.
    fn rename(&self, from: &[u8], to: &[u8]) -> Result<()>;
    /// Size and kind of the file system that holds `path`.
    fn stats(&self, path: &[u8]) -> Result<FsStats>;
    /// The directories at which something is mounted.
    fn mounts(&self) -> Vec<Vec<u8>>;
    /// Makes everything durable.
    fn sync(&self) -> Result<()>;
}
