//! Files of another instance, by 9P ([`files`]): a [`Namespace`] as if they were mounted here. Everything that comes from there is
//! as hostile as a disk.

mod guest;
mod wire;

pub use guest::Guest;

use crate::Failure;
use ::files::wire::{self as protocol, Reader, Writer, op, open, set};
use anykernel::fs::{
    DirEntry, File, FileKind, FsError, FsStats, Inode, Metadata, Namespace, OpenOptions, Result, Timestamp,
};
use std::any::Any;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::Duration;
use wire::{Fid, Wire, whole};

/// Symbolic links on the way, as path_resolution(7) has it.
const MOST_LINKS: usize = 40;
/// How often a server that is not there yet is looked for.
const PERIOD: Duration = Duration::from_millis(50);

/// What a server has. Its connection ends with [`Remote::close`], or when this and every file of it are dropped.
#[derive(Debug)]
pub struct Remote {
    wire: Arc<Wire>,
}

impl Remote {
    /// Connects to a server of the application `files` as soon as it answers; `Ok(None)`: it will not, says `over`.
    pub fn connect(
        address: SocketAddrV4,
        key: &str,
        over: impl Fn() -> bool,
    ) -> Result<Option<Arc<Self>>, Failure> {
        while !over() {
            if let Some(wire) = Wire::connect(address, key)? {
                return Ok(Some(Arc::new(Self { wire: Arc::new(wire) })));
            }
            std::thread::sleep(PERIOD);
        }
        Ok(None)
    }

    /// Ends the connection: whoever still has a file gets errors.
    pub fn close(&self) {
        self.wire.close();
    }

    fn root(&self) -> Result<Arc<dyn Inode>> {
        RemoteInode::walk(&self.wire, 0, None)
    }

    /// The directory that holds the last name of a path, and that name.
    fn parent<'a>(&self, path: &'a [u8]) -> Result<(Arc<dyn Inode>, &'a [u8])> {
        let end = path.iter().rposition(|byte| *byte != b'/').ok_or(FsError::Invalid)? + 1;
        let path = &path[..end];
        let at = path.iter().rposition(|byte| *byte == b'/').ok_or(FsError::Invalid)?;
        Ok((self.resolve(&path[..=at], true)?, &path[at + 1..]))
    }
}

impl Namespace for Remote {
    fn mount(&self, _: &str, _: &[u8], _: Option<&str>, _: bool) -> Result<()> {
        Err(FsError::Unsupported)
    }

    fn unmount(&self, _: &[u8]) -> Result<()> {
        Err(FsError::Unsupported)
    }

    fn resolve(&self, path: &[u8], follow: bool) -> Result<Arc<dyn Inode>> {
        let mut way = vec![self.root()?];
        // The last is the next.
        let mut names: Vec<Vec<u8>> = path.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec).collect();
        let mut links = 0;
        while let Some(name) = names.pop() {
            let at = way.last().ok_or(FsError::Invalid)?.clone();
            match &name[..] {
                b"" | b"." => continue,
                b".." => {
                    way.truncate(way.len().saturating_sub(1).max(1));
                    continue;
                }
                _ => {}
            }
            let next = at.lookup(&name)?;
            let last = names.iter().all(Vec::is_empty);
            if next.metadata()?.kind == FileKind::Symlink && (follow || !last) {
                links += 1;
                if links > MOST_LINKS {
                    return Err(FsError::Loop);
                }
                let target = next.read_link()?;
                if target.starts_with(b"/") {
                    way.truncate(1);
                }
                names.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
            } else {
                way.push(next);
            }
        }
        way.pop().ok_or(FsError::Invalid)
    }

    fn open(&self, path: &[u8], options: OpenOptions) -> Result<File> {
        let inode = match self.resolve(path, true) {
            Ok(_) if options.create_new => return Err(FsError::Exists),
            Err(FsError::NotFound) if options.create || options.create_new => {
                let (parent, name) = self.parent(path)?;
                parent.create(name, FileKind::File, None)?
            }
            found => found?,
        };
        let flags = if options.write { open::READ_AND_WRITE } else { 0 };
        let flags = flags | if options.truncate { open::TRUNCATE } else { 0 };
        let fid = RemoteInode::of(&inode)?.fid;
        self.wire.ask(op::LOPEN, |message| {
            message.u32(fid).u32(flags);
        })?;
        Ok(File { inode, options })
    }

    fn create(&self, path: &[u8], kind: FileKind, target: Option<&[u8]>) -> Result<()> {
        let (parent, name) = self.parent(path)?;
        parent.create(name, kind, target).map(drop)
    }

    fn remove(&self, path: &[u8]) -> Result<()> {
        let (parent, name) = self.parent(path)?;
        parent.remove(name)
    }

    fn rename(&self, from: &[u8], to: &[u8]) -> Result<()> {
        let ((from, name), (to, new_name)) = (self.parent(from)?, self.parent(to)?);
        from.rename(name, &to, new_name)
    }

    fn stats(&self, _: &[u8]) -> Result<FsStats> {
        let answer = self.wire.ask(op::STATFS, |message| {
            message.u32(0);
        })?;
        let mut body = Reader(&answer);
        let (number, block_size) = (whole(body.u32())?, whole(body.u32())?);
        let (blocks, free_blocks) = (whole(body.u64())?, whole(body.u64())?);
        whole(body.bytes(8 * 4))?;
        Ok(FsStats {
            kind: protocol::KINDS.iter().find(|(one, _)| *one == number).map_or("unknown", |(_, name)| name),
            block_size,
            blocks,
            free_blocks,
            max_name: whole(body.u32())?,
            read_only: false,
            label: String::new(),
        })
    }

    fn mounts(&self) -> Vec<Vec<u8>> {
        vec![b"/".to_vec()]
    }

    fn sync(&self) -> Result<()> {
        self.wire
            .ask(op::FSYNC, |message| {
                message.u32(0).u32(0);
            })
            .map(drop)
    }
}

/// A file of the server's.
#[derive(Debug)]
struct RemoteInode {
    wire: Arc<Wire>,
    fid: Fid,
}

impl Drop for RemoteInode {
    fn drop(&mut self) {
        self.wire.clunk(self.fid);
    }
}

impl RemoteInode {
    /// The same file, or one in it, under a fid of its own.
    fn walk(wire: &Arc<Wire>, from: Fid, name: Option<&[u8]>) -> Result<Arc<dyn Inode>> {
        let fid = wire.fid();
        let walked = wire.ask(op::WALK, |message| {
            message.u32(from).u32(fid).u16(u16::from(name.is_some()));
            if let Some(name) = name {
                message.string(name);
            }
        });
        match walked {
            Ok(answer) if whole(Reader(&answer).u16())? == u16::from(name.is_some()) => {
                Ok(Arc::new(Self { wire: wire.clone(), fid }))
            }
            other => {
                wire.free(fid);
                other.and(Err(FsError::NotFound))
            }
        }
    }

    fn of(inode: &Arc<dyn Inode>) -> Result<&Self> {
        inode.as_any().downcast_ref().ok_or(FsError::CrossDevice)
    }

    fn ask(&self, kind: u8, body: impl FnOnce(&mut Writer)) -> Result<Vec<u8>> {
        self.wire.ask(kind, |message| body(message.u32(self.fid)))
    }

    fn change(&self, valid: u32, size: u64, time: Timestamp) -> Result<()> {
        let (seconds, nanos) = (time.seconds.cast_unsigned(), time.nanos.into());
        self.ask(op::SETATTR, |message| {
            message.u32(valid).u32(0).u32(0).u32(0).u64(size).u64(0).u64(0).u64(seconds).u64(nanos);
        })
        .map(drop)
    }
}

impl Inode for RemoteInode {
    fn metadata(&self) -> Result<Metadata> {
        const ALL: u64 = 0x7ff;
        let answer = self.ask(op::GETATTR, |message| {
            message.u64(ALL);
        })?;
        let mut body = Reader(&answer);
        whole(body.u64())?;
        let (inode, mode) = (whole(body.qid())?, whole(body.u32())?);
        let (uid, gid, links) = (whole(body.u32())?, whole(body.u32())?, whole(body.u64())?);
        whole(body.u64())?;
        let size = whole(body.u64())?;
        whole(body.u64())?;
        let blocks = whole(body.u64())?;
        let mut time = || -> Result<Timestamp> {
            let (seconds, nanos) = (whole(body.u64())?.cast_signed(), whole(body.u64())?);
            let nanos = u32::try_from(nanos).ok().filter(|nanos| *nanos < 1_000_000_000);
            Ok(Timestamp { seconds, nanos: whole(nanos)? })
        };
        let (accessed, modified, changed) = (time()?, time()?, time()?);
        Ok(Metadata {
            inode,
            kind: protocol::kind_of(mode),
            mode: (mode & 0o7777) as u16,
            size,
            allocated: blocks.saturating_mul(512),
            links: u32::try_from(links).unwrap_or(u32::MAX),
            uid,
            gid,
            modified,
            accessed,
            changed,
        })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            let (at, part) = (offset + done as u64, (buf.len() - done).min(self.wire.most));
            let answer = self.ask(op::READ, |message| {
                message.u64(at).u32(part as u32);
            })?;
            let mut body = Reader(&answer);
            let count = whole(body.u32())? as usize;
            let data = whole(body.bytes(count).filter(|_| count <= part))?;
            buf[done..done + count].copy_from_slice(data);
            done += count;
            if count < part {
                break;
            }
        }
        Ok(done)
    }

    fn lookup(&self, name: &[u8]) -> Result<Arc<dyn Inode>> {
        Self::walk(&self.wire, self.fid, Some(name))
    }

    fn read_dir(&self, cursor: u64, sink: &mut dyn FnMut(DirEntry) -> bool) -> Result<Option<u64>> {
        let most = self.wire.most as u32;
        let answer = self.ask(op::READDIR, |message| {
            message.u64(cursor).u32(most);
        })?;
        let mut body = Reader(&answer);
        whole(body.u32())?;
        let mut next = None;
        while !body.0.is_empty() {
            let (inode, offset) = (whole(body.qid())?, whole(body.u64())?);
            let kind = protocol::kind_of(u32::from(whole(body.u8())?) << 12);
            let name = whole(body.string())?.to_vec();
            // A server that does not get on would never end.
            next = Some(offset).filter(|offset| *offset > next.unwrap_or(cursor));
            if next.is_none() {
                return Err(FsError::Corrupt);
            }
            if !sink(DirEntry { name, inode, kind }) {
                break;
            }
        }
        Ok(next)
    }

    fn read_link(&self) -> Result<Vec<u8>> {
        let answer = self.ask(op::READLINK, |_| ())?;
        whole(Reader(&answer).string()).map(<[u8]>::to_vec)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<usize> {
        let mut done = 0;
        for part in data.chunks(self.wire.most) {
            let at = offset + done as u64;
            let answer = self.ask(op::WRITE, |message| {
                message.u64(at).u32(part.len() as u32).bytes(part);
            })?;
            let count = whole(Reader(&answer).u32())? as usize;
            done += count.min(part.len());
            if count < part.len() {
                break;
            }
        }
        Ok(done)
    }

    fn truncate(&self, size: u64) -> Result<()> {
        self.change(set::SIZE, size, Timestamp::default())
    }

    fn create(&self, name: &[u8], kind: FileKind, target: Option<&[u8]>) -> Result<Arc<dyn Inode>> {
        match (kind, target) {
            (FileKind::Directory, None) => {
                self.ask(op::MKDIR, |message| {
                    message.string(name).u32(0o755).u32(0);
                })?;
            }
            (FileKind::Symlink, Some(target)) => {
                self.ask(op::SYMLINK, |message| {
                    message.string(name).string(target).u32(0);
                })?;
            }
            (FileKind::File, None) => {
                let made = Self::walk(&self.wire, self.fid, None)?;
                Self::of(&made)?.ask(op::LCREATE, |message| {
                    message.string(name).u32(open::READ_AND_WRITE).u32(0o644).u32(0);
                })?;
                return Ok(made);
            }
            _ => return Err(FsError::Unsupported),
        }
        self.lookup(name)
    }

    fn remove(&self, name: &[u8]) -> Result<()> {
        self.ask(op::UNLINKAT, |message| {
            message.string(name).u32(0);
        })
        .map(drop)
    }

    fn rename(&self, name: &[u8], to: &Arc<dyn Inode>, new_name: &[u8]) -> Result<()> {
        let to = Self::of(to)?.fid;
        self.ask(op::RENAMEAT, |message| {
            message.string(name).u32(to).string(new_name);
        })
        .map(drop)
    }

    fn set_modified(&self, time: Timestamp) -> Result<()> {
        self.change(set::MTIME | set::MTIME_SET, 0, time)
    }

    fn sync(&self) -> Result<()> {
        self.ask(op::FSYNC, |message| {
            message.u32(0);
        })
        .map(drop)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
