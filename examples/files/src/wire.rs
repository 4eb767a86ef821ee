//! 9P2000.L: numbers, and how messages are put together and taken apart. A message is `size[4] type[1] tag[2]` and a body; all
//! numbers are little endian, a string is `len[2]` and its bytes (the Plan 9 manual's intro(5), and the 9P2000.L extension as Linux's
//! `include/net/9p/9p.h` numbers it).

use alloc::vec::Vec;
use anykernel::block::BlockError;
use anykernel::fs::{FileKind, FsError};

/// The dialect that is spoken.
pub const VERSION: &[u8] = b"9P2000.L";
/// The port that is 9P's own.
pub const PORT: u16 = 564;
/// The tag of a message in front of which nothing is known.
pub const NO_TAG: u16 = 0xffff;
/// Says that there is no fid.
pub const NO_FID: u32 = u32::MAX;
/// Size, type and tag.
pub const HEADER: usize = 7;
/// Longest message that is agreed to, and shortest.
pub const MSIZE: u32 = 128 << 10;
/// Names on one walk.
pub const MAX_WALK: usize = 16;

/// Requests. An answer has the next higher number, but a failure is [`op::LERROR`].
pub mod op {
    /// Answer: it failed; `errno[4]`.
    pub const LERROR: u8 = 7;
    /// `fid[4]`; `type[4] bsize[4] blocks[8] bfree[8] bavail[8] files[8] ffree[8] fsid[8] namelen[4]`.
    pub const STATFS: u8 = 8;
    /// `fid[4] flags[4]`; `qid[13] iounit[4]`.
    pub const LOPEN: u8 = 12;
    /// `fid[4] name[s] flags[4] mode[4] gid[4]`; `qid[13] iounit[4]`. The fid is the new file's then.
    pub const LCREATE: u8 = 14;
    /// `fid[4] name[s] target[s] gid[4]`; `qid[13]`.
    pub const SYMLINK: u8 = 16;
    /// `fid[4]`; `target[s]`.
    pub const READLINK: u8 = 22;
    /// `fid[4] mask[8]`; see [`super::Attributes`].
    pub const GETATTR: u8 = 24;
    /// `fid[4] valid[4] mode[4] uid[4] gid[4] size[8] atime[8] nsec[8] mtime[8] nsec[8]`; nothing.
    pub const SETATTR: u8 = 26;
    /// `fid[4] offset[8] count[4]`; `count[4]`, entries of `qid[13] offset[8] type[1] name[s]`.
    pub const READDIR: u8 = 40;
    /// `fid[4]`; nothing.
    pub const FSYNC: u8 = 50;
    /// `dfid[4] name[s] mode[4] gid[4]`; `qid[13]`.
    pub const MKDIR: u8 = 72;
    /// `olddirfid[4] oldname[s] newdirfid[4] newname[s]`; nothing.
    pub const RENAMEAT: u8 = 74;
    /// `dirfid[4] name[s] flags[4]`; nothing.
    pub const UNLINKAT: u8 = 76;
    /// `msize[4] version[s]`; the same.
    pub const VERSION: u8 = 100;
    /// `fid[4] afid[4] uname[s] aname[s] n_uname[4]`; `qid[13]`.
    pub const ATTACH: u8 = 104;
    /// `oldtag[2]`; nothing.
    pub const FLUSH: u8 = 108;
    /// `fid[4] newfid[4] nwname[2] nwname*(wname[s])`; `nwqid[2] nwqid*(qid[13])`.
    pub const WALK: u8 = 110;
    /// `fid[4] offset[8] count[4]`; `count[4] data`.
    pub const READ: u8 = 116;
    /// `fid[4] offset[8] count[4] data`; `count[4]`.
    pub const WRITE: u8 = 118;
    /// `fid[4]`; nothing.
    pub const CLUNK: u8 = 120;
    /// `fid[4]`; nothing. The fid is gone also if that fails.
    pub const REMOVE: u8 = 122;
}

/// Bits of SETATTR's `valid`.
pub mod set {
    /// The length.
    pub const SIZE: u32 = 1 << 3;
    /// The time of the last change.
    pub const MTIME: u32 = 1 << 5;
    /// To the one given, not to now.
    pub const MTIME_SET: u32 = 1 << 8;
}

/// Flags of LOPEN, which are Linux's for open(2).
pub mod open {
    /// For reading and writing.
    pub const READ_AND_WRITE: u32 = 2;
    /// Any of these: for writing.
    pub const WRITES: u32 = 3;
    /// Cut to nothing.
    pub const TRUNCATE: u32 = 0o1000;
}

/// UNLINKAT: it is a directory (Linux's `AT_REMOVEDIR`).
pub const REMOVE_DIRECTORY: u32 = 0x200;

/// File systems by the numbers that statfs(2) gives them, and by those names that mount(8) does.
pub const KINDS: [(u32, &str); 3] = [(0xef53, "ext4"), (0x4d44, "vfat"), (0x0102_1994, "tmpfs")];

/// Errors by Linux's numbers. Of several with one number the first is meant.
const ERRORS: [(FsError, u32); 23] = [
    (FsError::NotFound, 2),
    (FsError::Device(BlockError::Io), 5),
    (FsError::NoMemory, 12),
    (FsError::Device(BlockError::NoMemory), 12),
    (FsError::Busy, 16),
    (FsError::Exists, 17),
    (FsError::CrossDevice, 18),
    (FsError::Device(BlockError::Gone), 19),
    (FsError::NotDirectory, 20),
    (FsError::IsDirectory, 21),
    (FsError::Invalid, 22),
    (FsError::Device(BlockError::Invalid), 22),
    (FsError::TooLarge, 27),
    (FsError::NoSpace, 28),
    (FsError::ReadOnly, 30),
    (FsError::Device(BlockError::ReadOnly), 30),
    (FsError::BadName, 36),
    (FsError::NotEmpty, 39),
    (FsError::Loop, 40),
    (FsError::Unsupported, 95),
    // EUCLEAN and EMEDIUMTYPE.
    (FsError::Corrupt, 117),
    (FsError::NotAFileSystem, 124),
    // EBADF, which only a client's own fault brings.
    (FsError::Invalid, 9),
];

/// Linux's number of an error.
pub fn errno(error: FsError) -> u32 {
    ERRORS.iter().find(|(one, _)| *one == error).map_or(5, |(_, number)| *number)
}

/// The error with Linux's number.
pub fn error(number: u32) -> FsError {
    ERRORS.iter().find(|(_, one)| *one == number).map_or(FsError::Device(BlockError::Io), |(error, _)| *error)
}

/// The type bits of `st_mode`.
pub fn mode_of(kind: FileKind) -> u32 {
    match kind {
        FileKind::Directory => 0o040_000,
        FileKind::File => 0o100_000,
        FileKind::Symlink => 0o120_000,
        // It says no more, and none can be opened: a FIFO.
        _ => 0o010_000,
    }
}

/// What those bits say.
pub fn kind_of(mode: u32) -> FileKind {
    match mode & 0o170_000 {
        0o040_000 => FileKind::Directory,
        0o100_000 => FileKind::File,
        0o120_000 => FileKind::Symlink,
        _ => FileKind::Special,
    }
}

/// A message in the making.
#[derive(Debug, Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    /// One of this type.
    pub fn new(kind: u8, tag: u16) -> Self {
        let mut message = Self(Vec::with_capacity(64));
        message.u32(0).bytes(&[kind]).u16(tag);
        message
    }

    /// Bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// A number of two bytes.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// A number of four bytes.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// A number of eight bytes.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// A string. What is longer than one can be is cut.
    pub fn string(&mut self, text: &[u8]) -> &mut Self {
        let len = u16::try_from(text.len()).unwrap_or(u16::MAX);
        self.u16(len).bytes(text.get(..usize::from(len)).unwrap_or_default())
    }

    /// What tells one file from others: its kind, no version, its number.
    pub fn qid(&mut self, kind: FileKind, inode: u64) -> &mut Self {
        let kind = match kind {
            FileKind::Directory => 0x80,
            FileKind::Symlink => 0x02,
            _ => 0,
        };
        self.bytes(&[kind]).u32(0).u64(inode)
    }

    /// How long it is so far, in bytes.
    pub fn written(&self) -> usize {
        self.0.len()
    }

    /// Room for `len` bytes at its end, to be filled.
    pub fn room(&mut self, len: usize) -> &mut [u8] {
        let at = self.0.len();
        self.0.resize(at + len, 0);
        self.0.get_mut(at..).unwrap_or_default()
    }

    /// Takes what is behind `len` off again.
    pub fn cut(&mut self, len: usize) {
        self.0.truncate(len);
    }

    /// Puts a number where one was held free.
    pub fn set_u32(&mut self, at: usize, value: u32) {
        if let Some(place) = self.0.get_mut(at..at + 4) {
            place.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// The whole message.
    pub fn finish(mut self) -> Vec<u8> {
        // None is longer than what was agreed to, which is far below that.
        self.set_u32(0, u32::try_from(self.0.len()).unwrap_or(u32::MAX));
        self.0
    }
}

/// A message that is read; `None` where it is too short.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// So many bytes.
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (part, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(part)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    /// A byte.
    pub fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    /// A number of two bytes.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    /// A number of four bytes.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    /// A number of eight bytes.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A string.
    pub fn string(&mut self) -> Option<&'a [u8]> {
        let len = self.u16()?;
        self.bytes(len.into())
    }

    /// The number of the file.
    pub fn qid(&mut self) -> Option<u64> {
        self.bytes(5)?;
        self.u64()
    }
}

/// The header of a message: its length in all, its type and its tag.
pub fn header(bytes: &[u8; HEADER]) -> (u32, u8, u16) {
    let [a, b, c, d, kind, low, high] = *bytes;
    (u32::from_le_bytes([a, b, c, d]), kind, u16::from_le_bytes([low, high]))
}
