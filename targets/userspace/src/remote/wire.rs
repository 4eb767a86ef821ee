//! A connection to a 9P server: one request at a time.

use crate::Failure;
use crate::host::Recover;
use anykernel::block::BlockError;
use anykernel::fs::{FsError, Result};
use files::wire::{self, HEADER, NO_FID, NO_TAG, Reader, Writer, op};
use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::sync::Mutex;
use std::time::Duration;

/// How long an answer may take: a guest's disk may be slow.
const PATIENCE: Duration = Duration::from_secs(60);
/// The same for the first, which tells whether somebody is there.
const GREETING: Duration = Duration::from_secs(2);

/// The number of what a client has of a server's file.
pub(super) type Fid = u32;

/// The connection; after a failure it is of no more use.
#[derive(Debug)]
pub(super) struct Wire {
    line: Mutex<Line>,
    /// Bytes in one READ, WRITE or READDIR.
    pub(super) most: usize,
}

#[derive(Debug)]
struct Line {
    stream: Option<TcpStream>,
    /// Fids that are free below `next`.
    free: Vec<Fid>,
    next: Fid,
}

fn gone<E>(_: E) -> FsError {
    FsError::Device(BlockError::Gone)
}

/// An answer that is too short, or is none.
pub(super) fn whole<T>(value: Option<T>) -> Result<T> {
    value.ok_or(FsError::Device(BlockError::Io))
}

/// Sends a message and takes the answer: its type and body.
fn exchange(stream: &mut TcpStream, message: &[u8], most: u32) -> std::io::Result<(u8, Vec<u8>)> {
    stream.write_all(message)?;
    let mut start = [0; HEADER];
    stream.read_exact(&mut start)?;
    let (len, kind, _) = wire::header(&start);
    let body = (len as usize).checked_sub(HEADER).filter(|_| len <= most);
    let mut body = vec![0; body.ok_or(std::io::ErrorKind::InvalidData)?];
    stream.read_exact(&mut body)?;
    Ok((kind, body))
}

impl Wire {
    /// Says hello and attaches as fid 0. `Ok(None)`: nobody answers yet.
    pub(super) fn connect(address: SocketAddrV4, key: &str) -> Result<Option<Self>, Failure> {
        let Ok(mut stream) = TcpStream::connect_timeout(&address.into(), GREETING) else { return Ok(None) };
        // Neither can fail on a stream that is connected.
        let _ = stream.set_nodelay(true);
        let _ = stream.set_read_timeout(Some(GREETING));
        let mut hello = Writer::new(op::VERSION, NO_TAG);
        hello.u32(wire::MSIZE).string(wire::VERSION);
        let Ok((kind, body)) = exchange(&mut stream, &hello.finish(), wire::MSIZE) else { return Ok(None) };
        let mut body = Reader(&body);
        let (msize, version) = (body.u32(), body.string());
        let (Some(msize), Some(wire::VERSION), true) = (msize, version, kind == op::VERSION + 1) else {
            return Err(Failure::new(format!("{address}: what answers there does not speak 9P2000.L")));
        };
        let _ = stream.set_read_timeout(Some(PATIENCE));
        // A header, and a WRITE's or READDIR's own numbers.
        let most = (msize.min(wire::MSIZE) as usize).saturating_sub(HEADER + 16);
        let line = Line { stream: Some(stream), free: Vec::new(), next: 1 };
        let this = Self { line: Mutex::new(line), most };
        this.ask(op::ATTACH, |message| {
            message.u32(0).u32(NO_FID).string(b"anykernel").string(key.as_bytes()).u32(0);
        })
        .map_err(|error| Failure::new(format!("{address}: attaching: {error}")))?;
        Ok(Some(this))
    }

    /// Has a request carried out; the body of its answer.
    pub(super) fn ask(&self, kind: u8, body: impl FnOnce(&mut Writer)) -> Result<Vec<u8>> {
        let mut message = Writer::new(kind, 0);
        body(&mut message);
        let mut line = self.line.lock().recover();
        let stream = line.stream.as_mut().ok_or(FsError::Device(BlockError::Gone))?;
        match exchange(stream, &message.finish(), wire::MSIZE) {
            Ok((op::LERROR, body)) => Err(wire::error(whole(Reader(&body).u32())?)),
            Ok((answer, body)) if answer == kind + 1 => Ok(body),
            other => {
                line.stream = None;
                other.map_err(gone).and(Err(FsError::Device(BlockError::Io)))
            }
        }
    }

    /// Ends the connection: whoever still has a file gets errors.
    pub(super) fn close(&self) {
        self.line.lock().recover().stream = None;
    }

    /// A fid that nobody has.
    pub(super) fn fid(&self) -> Fid {
        let mut line = self.line.lock().recover();
        line.free.pop().unwrap_or_else(|| {
            line.next += 1;
            line.next - 1
        })
    }

    /// Gives a fid back that the server does not know.
    pub(super) fn free(&self, fid: Fid) {
        self.line.lock().recover().free.push(fid);
    }

    /// Gives a fid back.
    pub(super) fn clunk(&self, fid: Fid) {
        // A server that is gone has forgotten it.
        if self
            .ask(op::CLUNK, |message| {
                message.u32(fid);
            })
            .is_ok()
        {
            self.free(fid);
        }
    }
}
