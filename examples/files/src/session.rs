//! A client's session: requests in, answers out. It knows nothing of connections.

use crate::wire::{self, HEADER, MAX_WALK, MSIZE, NO_FID, Reader, Writer, op, open, set};
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::fs::{FileKind, FsError, Inode, Metadata, Namespace, Result, Timestamp};

/// Fids that a client may have.
const MAX_FIDS: usize = 16 << 10;
/// A version's least message: header and what an attribute takes.
const LEAST_MSIZE: u32 = 4096;
/// READ's and READDIR's answers begin so.
const COUNTED: usize = HEADER + 4;

/// Where a fid is: a file, and how the walk got there, for `..`.
#[derive(Clone)]
struct Fid {
    inode: Arc<dyn Inode>,
    above: Vec<Arc<dyn Inode>>,
}

/// A client that may have everything that is mounted. Of a fid nothing is remembered but its file: opening one checks, and
/// changes nothing.
pub struct Session {
    names: Arc<dyn Namespace>,
    /// What ATTACH must name, if not empty.
    key: String,
    msize: u32,
    fids: BTreeMap<u32, Fid>,
    attached: bool,
}

/// The message makes no sense, and so does what follows: the connection is to be closed.
#[derive(Debug, PartialEq, Eq)]
pub struct Broken;

/// A request that is too short is one that makes no sense.
fn some<T>(value: Option<T>) -> Result<T> {
    value.ok_or(FsError::Invalid)
}

/// A name in a directory, as it may be made or looked for.
fn name(bytes: Option<&[u8]>) -> Result<&[u8]> {
    let bytes = some(bytes)?;
    let bad = bytes.is_empty()
        || bytes == b"."
        || bytes == b".."
        || bytes.iter().any(|one| matches!(one, b'/' | 0));
    if bad { Err(FsError::Invalid) } else { Ok(bytes) }
}

impl Session {
    /// A session in which nothing was said yet.
    pub fn new(names: Arc<dyn Namespace>, key: &str) -> Self {
        Self { names, key: key.into(), msize: MSIZE, fids: BTreeMap::new(), attached: false }
    }

    /// The longest message that was agreed to.
    pub fn msize(&self) -> u32 {
        self.msize
    }

    /// The client has proved to be one.
    pub fn attached(&self) -> bool {
        self.attached
    }

    /// The answer to a whole message.
    pub fn answer(&mut self, message: &[u8]) -> Result<Vec<u8>, Broken> {
        let (start, body) = message.split_first_chunk::<HEADER>().ok_or(Broken)?;
        let (len, kind, tag) = wire::header(start);
        if len as usize != message.len() || len > self.msize {
            return Err(Broken);
        }
        // Requests are even.
        if kind % 2 == 1 {
            return Err(Broken);
        }
        let mut answer = Writer::new(kind + 1, tag);
        match self.request(kind, Reader(body), &mut answer) {
            Ok(()) => Ok(answer.finish()),
            Err(error) => {
                let mut failure = Writer::new(op::LERROR, tag);
                failure.u32(wire::errno(error));
                Ok(failure.finish())
            }
        }
    }

    fn request(&mut self, kind: u8, mut body: Reader<'_>, answer: &mut Writer) -> Result<()> {
        match kind {
            op::VERSION => self.version(body, answer),
            op::ATTACH => self.attach(body, answer),
            op::WALK => self.walk(body, answer),
            // Answers come in order, so there is nothing left to be flushed.
            op::FLUSH => Ok(()),
            op::CLUNK => some(body.u32()).map(|fid| drop(self.fids.remove(&fid))),
            op::REMOVE => {
                some(body.u32()).map(|fid| drop(self.fids.remove(&fid)))?;
                Err(FsError::Unsupported)
            }
            op::GETATTR | op::SETATTR | op::STATFS | op::READLINK => self.attribute(kind, body, answer),
            op::LOPEN | op::READ | op::WRITE | op::READDIR | op::FSYNC => self.content(kind, body, answer),
            op::LCREATE | op::MKDIR | op::SYMLINK | op::UNLINKAT | op::RENAMEAT => {
                self.change(kind, body, answer)
            }
            _ => Err(FsError::Unsupported),
        }
    }

    /// A new session: what was before is forgotten.
    fn version(&mut self, mut body: Reader<'_>, answer: &mut Writer) -> Result<()> {
        let (msize, version) = (some(body.u32())?, some(body.string())?);
        self.fids.clear();
        self.attached = false;
        let known = version == wire::VERSION && msize >= LEAST_MSIZE;
        if known {
            self.msize = msize.min(MSIZE);
        }
        answer.u32(self.msize).string(if known { wire::VERSION } else { b"unknown" });
        Ok(())
    }

    fn attach(&mut self, mut body: Reader<'_>, answer: &mut Writer) -> Result<()> {
        let (fid, _, _) = (some(body.u32())?, some(body.u32())?, some(body.string())?);
        let asked = some(body.string())?;
        // All of it is compared, however soon it differs.
        let same = asked.iter().zip(self.key.as_bytes()).fold(0, |seen, (a, b)| seen | (a ^ b));
        if !self.key.is_empty() && (same != 0 || asked.len() != self.key.len()) {
            return Err(FsError::Invalid);
        }
        let inode = self.names.resolve(b"/", true)?;
        let metadata = inode.metadata()?;
        self.put(fid, Fid { inode, above: Vec::new() })?;
        self.attached = true;
        answer.qid(metadata.kind, metadata.inode);
        Ok(())
    }

    fn get(&self, fid: Option<u32>) -> Result<&Fid> {
        some(self.fids.get(&some(fid)?))
    }

    fn put(&mut self, number: u32, fid: Fid) -> Result<()> {
        if number == NO_FID || self.fids.contains_key(&number) {
            return Err(FsError::Invalid);
        }
        if self.fids.len() >= MAX_FIDS {
            return Err(FsError::NoMemory);
        }
        self.fids.insert(number, fid);
        Ok(())
    }

    /// As far as it goes: a name that is not there fails only if it is the first, and the new fid is made only at the end.
    fn walk(&mut self, mut body: Reader<'_>, answer: &mut Writer) -> Result<()> {
        let (from, to, count) = (some(body.u32())?, some(body.u32())?, some(body.u16())?);
        if usize::from(count) > MAX_WALK {
            return Err(FsError::Invalid);
        }
        let mut at = self.get(Some(from))?.clone();
        let mut found: Vec<Metadata> = Vec::new();
        for _ in 0..count {
            match step(&mut at, some(body.string())?) {
                Ok(metadata) => found.push(metadata),
                Err(error) if found.is_empty() => return Err(error),
                Err(_) => break,
            }
        }
        if found.len() == usize::from(count) {
            if to == from {
                self.fids.remove(&from);
            }
            self.put(to, at)?;
        }
        answer.u16(found.len() as u16);
        for metadata in found {
            answer.qid(metadata.kind, metadata.inode);
        }
        Ok(())
    }

    fn attribute(&self, kind: u8, mut body: Reader<'_>, answer: &mut Writer) -> Result<()> {
        let inode = &self.get(body.u32())?.inode;
        match kind {
            op::GETATTR => attributes(&inode.metadata()?, answer),
            op::READLINK => {
                answer.string(&inode.read_link()?);
            }
            op::SETATTR => {
                let valid = some(body.u32())?;
                some(body.bytes(12))?;
                let size = some(body.u64())?;
                some(body.bytes(16))?;
                let (seconds, nanos) = (some(body.u64())?, some(body.u64())?);
                if valid & set::SIZE != 0 {
                    inode.truncate(size)?;
                }
                if valid & set::MTIME_SET != 0 {
                    let nanos = u32::try_from(nanos).ok().filter(|nanos| *nanos < 1_000_000_000);
                    inode.set_modified(Timestamp { seconds: seconds.cast_signed(), nanos: some(nanos)? })?;
                }
            }
            _ => {
                let stats = self.names.stats(b"/")?;
                let number = wire::KINDS.iter().find(|(_, name)| *name == stats.kind).map_or(0, |one| one.0);
                answer.u32(number).u32(stats.block_size).u64(stats.blocks).u64(stats.free_blocks);
                answer.u64(stats.free_blocks).u64(0).u64(0).u64(0).u32(stats.max_name);
            }
        }
        Ok(())
    }

    fn content(&self, kind: u8, mut body: Reader<'_>, answer: &mut Writer) -> Result<()> {
        let inode = &self.get(body.u32())?.inode;
        let room = |count: u32| (count as usize).min(self.msize as usize - COUNTED);
        match kind {
            op::LOPEN => {
                let (flags, metadata) = (some(body.u32())?, inode.metadata()?);
                match metadata.kind {
                    FileKind::File => {}
                    FileKind::Directory if flags & open::WRITES == 0 => {}
                    FileKind::Directory => return Err(FsError::IsDirectory),
                    _ => return Err(FsError::Unsupported),
                }
                if flags & open::TRUNCATE != 0 {
                    inode.truncate(0)?;
                }
                answer.qid(metadata.kind, metadata.inode).u32(0);
            }
            op::READ => {
                let (offset, count) = (some(body.u64())?, room(some(body.u32())?));
                answer.u32(0);
                let read = inode.read_at(offset, answer.room(count))?;
                answer.cut(COUNTED + read.min(count));
                answer.set_u32(HEADER, read.min(count) as u32);
            }
            op::WRITE => {
                let (offset, count) = (some(body.u64())?, some(body.u32())?);
                let written = inode.write_at(offset, some(body.bytes(count as usize))?)?;
                answer.u32(written as u32);
            }
            op::READDIR => {
                let (cursor, count) = (some(body.u64())?, room(some(body.u32())?));
                answer.u32(0);
                list(inode, cursor, COUNTED + count, answer)?;
                answer.set_u32(HEADER, (answer.written() - COUNTED) as u32);
            }
            // Whoever says so wants all of it to be there.
            _ => {
                inode.sync()?;
                self.names.sync()?;
            }
        }
        Ok(())
    }

    fn change(&mut self, kind: u8, mut body: Reader<'_>, answer: &mut Writer) -> Result<()> {
        let number = some(body.u32())?;
        let directory = self.get(Some(number))?.clone();
        let new = name(body.string())?;
        let made = match kind {
            op::MKDIR => directory.inode.create(new, FileKind::Directory, None)?,
            op::SYMLINK => directory.inode.create(new, FileKind::Symlink, Some(some(body.string())?))?,
            op::UNLINKAT => return directory.inode.remove(new),
            op::RENAMEAT => {
                let to = &self.get(body.u32())?.inode;
                return directory.inode.rename(new, to, name(body.string())?);
            }
            _ => directory.inode.create(new, FileKind::File, None)?,
        };
        let metadata = made.metadata()?;
        answer.qid(metadata.kind, metadata.inode);
        if kind == op::LCREATE {
            answer.u32(0);
            let mut above = directory.above;
            above.push(directory.inode);
            self.fids.insert(number, Fid { inode: made, above });
        }
        Ok(())
    }
}

/// One name further. Above the root is the root.
fn step(at: &mut Fid, to: &[u8]) -> Result<Metadata> {
    if to == b".." {
        if let Some(above) = at.above.pop() {
            at.inode = above;
        }
        return at.inode.metadata();
    }
    let next = at.inode.lookup(name(Some(to))?)?;
    let metadata = next.metadata()?;
    at.above.push(core::mem::replace(&mut at.inode, next));
    Ok(metadata)
}

/// All that the file system has, and its version: none.
fn attributes(metadata: &Metadata, answer: &mut Writer) {
    const BASIC: u64 = 0x7ff;
    let Metadata { inode, kind, mode, size, allocated, links, uid, gid, modified, accessed, changed } =
        *metadata;
    answer.u64(BASIC).qid(kind, inode).u32(wire::mode_of(kind) | u32::from(mode & 0o7777)).u32(uid).u32(gid);
    answer.u64(links.into()).u64(0).u64(size).u64(4096).u64(allocated.div_ceil(512));
    for time in [accessed, modified, changed, Timestamp::default()] {
        answer.u64(time.seconds.cast_unsigned()).u64(time.nanos.into());
    }
    answer.u64(0).u64(0);
}

/// Entries as long as they fit, each with where to go on behind it.
fn list(inode: &Arc<dyn Inode>, mut cursor: u64, room: usize, answer: &mut Writer) -> Result<()> {
    loop {
        let mut one = None;
        let next = inode.read_dir(cursor, &mut |entry| {
            one = Some(entry);
            false
        })?;
        let Some((entry, next)) = one.zip(next) else { return Ok(()) };
        if answer.written() + 13 + 8 + 1 + 2 + entry.name.len() > room {
            return Ok(());
        }
        // readdir(3)'s type.
        let kind = (wire::mode_of(entry.kind) >> 12) as u8;
        answer.qid(entry.kind, entry.inode).u64(next).bytes(&[kind]).string(&entry.name);
        cursor = next;
    }
}
