//! One connection: read requests, answer them in order, until either side has had enough.

use crate::range::ByteRange;
use crate::request::{self, BadRequest};
use crate::resource::{Body, reply, status_reply};
use crate::{Server, peer};
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::fs::Inode;
use anykernel::socket::{NetError, Shutdown, TcpStream};
use hypercall::Host;

/// A request body up to this long is read and thrown away, so that the connection can go on; beyond, it closes.
const MAX_SKIPPED_BODY: u64 = 64 << 10;

/// How long a closing connection may still send, so that our last answer is not lost to a reset.
const LINGER_NS: u64 = 2_000_000_000;

/// Why a connection ends before its next request.
enum End {
    /// In order: the client closed, or idled too long between requests.
    Quiet,
    /// Answer with this status, then close.
    Status(u16),
    /// Nothing can be sent any more.
    Broken,
}

impl From<NetError> for End {
    fn from(_: NetError) -> Self {
        End::Broken
    }
}

pub(crate) async fn serve<H: Host>(server: Arc<Server<H>>, stream: TcpStream) {
    // Answers are sent whole, so waiting for more data to fill a segment only delays them.
    let _ = stream.0.set_nodelay(true);
    let mut connection = Connection { server, stream, received: Vec::new() };
    match connection.run().await {
        End::Quiet => {}
        End::Status(status) => {
            connection.server.refused.increment();
            log::debug!("httpd: {}: refused with {status}", peer(&connection.stream));
            let now = connection.server.host.realtime_ns();
            let reply = status_reply(status, now, false, true, true);
            if connection.send_reply(reply.head, reply.body).await.is_ok() {
                connection.drain().await;
            } else {
                // Not all of it was taken: that must not look like an end in order.
                connection.server.broken.increment();
                connection.stream.0.abort();
            }
        }
        End::Broken => {
            connection.server.broken.increment();
            connection.stream.0.abort();
        }
    }
}

struct Connection<H: Host> {
    server: Arc<Server<H>>,
    stream: TcpStream,
    /// Received and not yet used.
    received: Vec<u8>,
}

impl<H: Host> Connection<H> {
    async fn run(&mut self) -> End {
        loop {
            let (request, length) = match self.next_request().await {
                Ok(next) => next,
                Err(end) => return end,
            };
            self.received.drain(..length);
            self.server.requests.increment();
            let has_body = request.body_bytes > 0;
            if has_body && request.body_bytes > MAX_SKIPPED_BODY {
                return End::Status(413);
            }
            let answer =
                reply(&*self.server.files, &self.server.options, &request, self.server.host.realtime_ns());
            if self.send_reply(answer.head, answer.body).await.is_err() {
                return End::Broken;
            }
            if !request.keep_alive {
                self.drain().await;
                return End::Quiet;
            }
            if has_body && let Err(end) = self.skip(request.body_bytes).await {
                return end;
            }
        }
    }

    /// The next request's header, from what is there already or from the network.
    async fn next_request(&mut self) -> Result<(request::Request, usize), End> {
        let limit = self.server.options.max_header_bytes;
        let now = self.server.host.monotonic_ns();
        let mut deadline = now.saturating_add(if self.received.is_empty() {
            self.server.options.idle_ns
        } else {
            self.server.options.header_ns
        });
        loop {
            // RFC 9112, 2.2: be lenient about empty lines before a request.
            let blank = self.received.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
            self.received.drain(..blank);
            let head = self.received.get(..limit).unwrap_or(&self.received);
            match request::parse(head) {
                Ok(Some(parsed)) => return Ok(parsed),
                Ok(None) if self.received.len() >= limit => return Err(End::Status(431)),
                Ok(None) => {}
                Err(BadRequest(status)) => return Err(End::Status(status)),
            }
            let was_empty = self.received.is_empty();
            match self.receive(deadline).await? {
                None if was_empty => return Err(End::Quiet),
                None => {
                    self.server.timeouts.increment();
                    return Err(End::Status(408));
                }
                Some(0) if was_empty => return Err(End::Quiet),
                Some(0) => return Err(End::Status(400)),
                Some(_) if was_empty => {
                    deadline = self.server.host.monotonic_ns().saturating_add(self.server.options.header_ns);
                }
                Some(_) => {}
            }
        }
    }

    /// Receives something behind what is there; `None` at the deadline.
    async fn receive(&mut self, deadline_ns: u64) -> Result<Option<usize>, End> {
        const STEP: usize = 2048;
        let start = self.received.len();
        if self.received.try_reserve(STEP).is_err() {
            return Err(End::Status(503));
        }
        self.received.resize(start + STEP, 0);
        let room = self.received.get_mut(start..).unwrap_or_default();
        let result = self.server.executor.timeout(deadline_ns, self.stream.recv(room)).await;
        let count = match result {
            Some(Ok(count)) => count.min(STEP),
            _ => 0,
        };
        self.received.truncate(start + count);
        match result {
            None => Ok(None),
            Some(Ok(_)) => Ok(Some(count)),
            Some(Err(error)) => Err(error.into()),
        }
    }

    /// Throws a request's body away.
    async fn skip(&mut self, mut bytes: u64) -> Result<(), End> {
        let deadline = self.server.host.monotonic_ns().saturating_add(self.server.options.header_ns);
        loop {
            let have = usize::try_from(bytes).unwrap_or(usize::MAX).min(self.received.len());
            self.received.drain(..have);
            bytes -= have as u64;
            if bytes == 0 {
                return Ok(());
            }
            match self.receive(deadline).await? {
                None => return Err(End::Status(408)),
                Some(0) => return Err(End::Quiet),
                Some(_) => {}
            }
        }
    }

    async fn send_reply(&mut self, mut head: Vec<u8>, body: Body) -> Result<(), NetError> {
        match body {
            Body::Empty => self.send(&head).await,
            Body::Bytes(bytes) => {
                self.send(&head).await?;
                self.send(&bytes).await
            }
            Body::File { inode, parts, trailer } => {
                // What precedes the first bytes of the file travels with them.
                let mut pending = core::mem::take(&mut head);
                for (prelude, range) in parts {
                    pending.extend_from_slice(&prelude);
                    self.send_file(&inode, range, &mut pending).await?;
                }
                pending.extend_from_slice(&trailer);
                self.send(&pending).await
            }
        }
    }

    /// Sends `pending` and then a part of a file; leaves `pending` empty. If the file ends early or cannot be read, the
    /// promised length cannot be kept and the connection has to break.
    async fn send_file(
        &mut self,
        inode: &Arc<dyn Inode>,
        range: ByteRange,
        pending: &mut Vec<u8>,
    ) -> Result<(), NetError> {
        let (mut offset, mut left) = (range.first, range.len());
        while left > 0 {
            let start = pending.len();
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(self.server.chunk_bytes);
            pending.try_reserve_exact(want).map_err(|_| NetError::NoMemory)?;
            pending.resize(start + want, 0);
            let got = match inode.read_at(offset, pending.get_mut(start..).unwrap_or_default()) {
                Ok(got) if got > 0 => got.min(want),
                Ok(_) => {
                    log::warn!("httpd: {}: the file became shorter while it was sent", peer(&self.stream));
                    return Err(NetError::Closed);
                }
                Err(error) => {
                    log::warn!(
                        "httpd: {}: reading failed while the file was sent: {error}",
                        peer(&self.stream)
                    );
                    return Err(NetError::Closed);
                }
            };
            pending.truncate(start + got);
            self.send(pending).await?;
            pending.clear();
            offset += got as u64;
            left -= got as u64;
        }
        Ok(())
    }

    /// Sends all of `data`; a client that takes nothing for too long is given up.
    async fn send(&self, mut data: &[u8]) -> Result<(), NetError> {
        while !data.is_empty() {
            let deadline = self.server.host.monotonic_ns().saturating_add(self.server.options.send_ns);
            match self.server.executor.timeout(deadline, self.stream.send(data)).await {
                Some(Ok(count)) => data = data.get(count..).unwrap_or_default(),
                Some(Err(error)) => return Err(error),
                None => {
                    self.server.timeouts.increment();
                    log::debug!("httpd: {}: takes no data, given up", peer(&self.stream));
                    return Err(NetError::TimedOut);
                }
            }
        }
        Ok(())
    }

    /// Closes our side and reads on for a moment: closing with unread input would reset the connection and could destroy
    /// the answer on its way (RFC 9112, 9.6).
    async fn drain(&mut self) {
        if self.stream.0.shutdown(Shutdown::Write).is_err() {
            return;
        }
        let deadline = self.server.host.monotonic_ns().saturating_add(LINGER_NS);
        loop {
            self.received.clear();
            match self.receive(deadline).await {
                Ok(Some(count)) if count > 0 => {}
                _ => return,
            }
        }
    }
}
