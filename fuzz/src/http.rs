//! The HTTP server, run as it is: its executor on this thread, sockets and clock played from the input. What it sends is
//! read as a client would: every answer has a status line, and the body that its headers promise.

use crate::host::{FuzzHost, Script};
use crate::input::Input;
use crate::watch;
use anykernel::Kernel;
use anykernel::config::Config;
use anykernel::fs::OpenOptions;
use anykernel::socket::{
    Datagram, InterfaceStatus, Listener, Lookup, NetError, Ping, Result, Shutdown, SocketProvider, Stream,
};
use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// Bytes that a client's socket takes before the server has to wait.
const WINDOW: usize = 4096;

#[derive(Default)]
struct Wire {
    to_server: VecDeque<u8>,
    ended: bool,
    error: Option<NetError>,
    sent: Vec<u8>,
    room: usize,
    server_ended: bool,
    waker: Vec<Waker>,
}

#[derive(Default)]
struct Connection(Mutex<Wire>);

impl Connection {
    fn lock(&self) -> MutexGuard<'_, Wire> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Wire)) {
        let wakers = {
            let mut wire = self.lock();
            change(&mut wire);
            core::mem::take(&mut wire.waker)
        };
        wakers.into_iter().for_each(Waker::wake);
    }
}

fn address(last: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, last], 80))
}

impl Stream for Connection {
    fn poll_connected(&self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_recv(&self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<Result<usize>> {
        watch::step();
        let mut wire = self.lock();
        if wire.to_server.is_empty() {
            if let Some(error) = wire.error {
                return Poll::Ready(Err(error));
            }
            if wire.ended {
                return Poll::Ready(Ok(0));
            }
            wire.waker.push(cx.waker().clone());
            return Poll::Pending;
        }
        let n = buf.len().min(wire.to_server.len());
        for (place, byte) in buf.iter_mut().zip(wire.to_server.drain(..n)) {
            *place = byte;
        }
        Poll::Ready(Ok(n))
    }
    fn poll_send(&self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize>> {
        watch::step();
        let mut wire = self.lock();
        if let Some(error) = wire.error {
            return Poll::Ready(Err(error));
        }
        assert!(!wire.server_ended, "the server sends after it ended its stream");
        let n = data.len().min(wire.room);
        if n == 0 {
            wire.waker.push(cx.waker().clone());
            return Poll::Pending;
        }
        wire.room -= n;
        wire.sent.extend(&data[..n]);
        Poll::Ready(Ok(n))
    }
    fn poll_flush(&self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn shutdown(&self, how: Shutdown) -> Result<()> {
        if how != Shutdown::Read {
            self.lock().server_ended = true;
        }
        Ok(())
    }
    fn abort(&self) {
        self.lock().error = Some(NetError::Closed);
    }
    fn local_addr(&self) -> SocketAddr {
        address(2)
    }
    fn peer_addr(&self) -> SocketAddr {
        address(1)
    }
    fn set_nodelay(&self, _: bool) -> Result<()> {
        Ok(())
    }
    fn set_keepalive(&self, _: Option<u64>) -> Result<()> {
        Ok(())
    }
}

#[derive(Default)]
struct Port {
    waiting: Mutex<VecDeque<Arc<Connection>>>,
    waker: Mutex<Option<Waker>>,
}

struct Sockets(Arc<Port>);
struct Listening(Arc<Port>);

impl Listener for Listening {
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<Result<Arc<dyn Stream>>> {
        match self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front() {
            Some(connection) => Poll::Ready(Ok(connection)),
            None => {
                *self.0.waker.lock().unwrap_or_else(PoisonError::into_inner) = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
    fn local_addr(&self) -> SocketAddr {
        address(2)
    }
}

impl SocketProvider for Sockets {
    fn listen(&self, _: SocketAddr, _: usize) -> Result<Arc<dyn Listener>> {
        Ok(Arc::new(Listening(self.0.clone())))
    }
    fn connect(&self, _: SocketAddr) -> Result<Arc<dyn Stream>> {
        Err(NetError::Unsupported)
    }
    fn bind(&self, _: SocketAddr) -> Result<Arc<dyn Datagram>> {
        Err(NetError::Unsupported)
    }
    fn lookup(&self, _: &str) -> Result<Box<dyn Lookup>> {
        Err(NetError::Unsupported)
    }
    fn ping(&self, _: IpAddr) -> Result<Box<dyn Ping>> {
        Err(NetError::Unsupported)
    }
    fn interfaces(&self) -> Vec<InterfaceStatus> {
        Vec::new()
    }
    fn poll_configured(&self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The thread that the server runs on goes to sleep in `httpd::main`; from there its executor is run, and from that
/// one's sleep the clients.
struct Story {
    input: Input,
    kernel: Arc<Kernel<FuzzHost>>,
    port: Arc<Port>,
    connections: Vec<Arc<Connection>>,
    serving: bool,
    closing: u8,
}

const PIECES: [&[u8]; 24] = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /hello.txt HTTP/1.1\r\nHost: a\r\n",
    b"HEAD /large HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /large HTTP/1.0\r\n\r\n",
    b"GET /large HTTP/1.1\r\nHost: a\r\nRange: bytes=",
    b"0-0,",
    b"-5",
    b"100-",
    b"18446744073709551615-",
    b"-18446744073709551615",
    b"0-18446744073709551615",
    b"9999-",
    b"\r\n",
    b"\r\n\r\n",
    b"Connection: close\r\n",
    b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"If-None-Match: *\r\n",
    b"If-Modified-Since: Tue, 14 Nov 2023 22:13:20 GMT\r\n",
    b"If-Range: \"0\"\r\n",
    b"If-Match: W/\"1\", \"2\"\r\n",
    b"GET /dir HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /dir/%2e%2e/../hello.txt?x HTTP/1.1\r\nHost: a\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
];

impl Story {
    fn client(&mut self, host: FuzzHost) {
        let choice = self.input.u8();
        let which = usize::from(choice >> 5) % self.connections.len().max(1);
        let connection = self.connections.get(which).cloned();
        match choice & 15 {
            0 if self.connections.len() < 4 => {
                let connection = Arc::new(Connection::default());
                connection.lock().room = WINDOW;
                self.port
                    .waiting
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push_back(connection.clone());
                self.connections.push(connection);
                let waker = self.port.waker.lock().unwrap_or_else(PoisonError::into_inner).take();
                waker.into_iter().for_each(Waker::wake);
            }
            12 => host.advance(crate::net::pause(choice >> 4)),
            13 => {
                if let Some(connection) = connection {
                    connection.change(|wire| wire.ended = true);
                }
            }
            14 => {
                if let Some(connection) = connection {
                    connection.change(|wire| wire.error = Some(NetError::Reset));
                }
            }
            15 => {
                if let Some(connection) = connection {
                    let room = self.input.u16();
                    connection.change(|wire| wire.room += usize::from(room));
                }
            }
            kind => {
                let bytes = match kind {
                    1..9 => self.input.pick(&PIECES).to_vec(),
                    9 => vec![b'a'; self.input.u16().into()],
                    _ => {
                        let len = self.input.u8();
                        self.input.bytes(len.into())
                    }
                };
                if let Some(connection) = connection {
                    connection.change(|wire| wire.to_server.extend(bytes));
                }
            }
        }
    }
}

impl Script for Story {
    fn step(&mut self, host: FuzzHost) -> bool {
        watch::step();
        if !self.serving {
            self.serving = true;
            let inner = Self {
                input: core::mem::take(&mut self.input),
                kernel: self.kernel.clone(),
                port: self.port.clone(),
                connections: core::mem::take(&mut self.connections),
                serving: true,
                closing: 0,
            };
            host.run_thread(inner);
            return false;
        }
        if !self.input.is_empty() {
            self.client(host);
        } else if self.closing < 20 {
            // Whoever waits for room or for the rest of a request gets it, or is given up.
            self.closing += 1;
            for connection in &self.connections {
                connection.change(|wire| {
                    wire.room += 1 << 20;
                    wire.ended |= self.closing > 10;
                });
            }
            host.advance(crate::net::pause(6 + self.closing % 2));
        } else {
            for connection in &self.connections {
                let wire = connection.lock();
                let whole = wire.error.is_none();
                check_answers(&wire.sent, whole);
            }
            self.connections.clear();
            // The executor first: the thread below waits for the end of the instance.
            self.kernel.stop();
            return false;
        }
        true
    }
}

/// Reads what a server sent on one connection.
fn check_answers(mut sent: &[u8], whole: bool) {
    while !sent.is_empty() {
        let Some(end) = sent.windows(4).position(|four| four == b"\r\n\r\n") else {
            assert!(!whole, "a header without end: {:?}", String::from_utf8_lossy(sent));
            return;
        };
        let head = std::str::from_utf8(&sent[..end]).expect("a header is text");
        let status: u16 = head.get(9..12).and_then(|digits| digits.parse().ok()).expect("a status");
        assert!(head.starts_with("HTTP/1.") && (200..600).contains(&status), "{head}");
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("content-length").then(|| value.parse::<u64>().expect("a length"))
        });
        let range = head.lines().find_map(|line| line.strip_prefix("Content-Range: bytes "));
        if let (206, Some(range), Some(length)) = (status, range, length) {
            let (span, total) = range.split_once('/').expect("a range");
            let (first, last) = span.split_once('-').expect("a range");
            let (first, last, total): (u64, u64, u64) =
                (first.parse().expect("first"), last.parse().expect("last"), total.parse().expect("total"));
            assert!(first <= last && last < total && length == last - first + 1, "{head}");
        }
        sent = &sent[end + 4..];
        // An answer to HEAD, or without a body, is followed by the next answer at once.
        if sent.starts_with(b"HTTP/1.") || sent.is_empty() || status == 304 {
            continue;
        }
        let length = length.expect("a body has a length") as usize;
        if sent.len() < length {
            assert!(!whole, "{} of {length} bytes of a body", sent.len());
            return;
        }
        sent = &sent[length..];
    }
}

/// One execution.
pub fn run(data: &[u8]) {
    let host = FuzzHost::fresh();
    let input = Input::new(data);
    let app = ["httpd", "--workers", "1"].map(String::from).to_vec();
    let kernel = Kernel::new(host, Config { app, ..Config::default() });
    anykernel_vfs::start(&kernel).expect("a tmpfs");
    let files = kernel.namespace().expect("a namespace");
    for (path, len) in [("/hello.txt", 13), ("/large", 10_000), ("/empty", 0)] {
        let file = files.open(path.as_bytes(), OpenOptions::CREATE).expect("a file");
        let content: Vec<u8> = (0..len).map(|at: usize| at as u8 | 0x80).collect();
        file.write_at(0, &content).expect("room");
    }
    files.create(b"/dir", anykernel::fs::FileKind::Directory, None).expect("a directory");
    drop(files);
    let port = Arc::new(Port::default());
    kernel.set_sockets(Arc::new(Sockets(port.clone())));
    let story =
        Story { input, kernel: kernel.clone(), port, connections: Vec::new(), serving: false, closing: 0 };
    host.set_script(story);
    let status = httpd::main(&kernel);
    assert_eq!(status, hypercall::ExitStatus::Success);
    host.clear_script();
    kernel.shutdown();
}
