//! The `user` network: host ports lead into an instance's stack, without privileges.
//!
//! A second, tiny instance is the other end of a wire in memory: 10.0.2.2, with our own net component. One thread
//! listens on the host (epoll(7), edge-triggered), connects into the guest at 10.0.2.15 for each client, and relays bytes both
//! ways with back-pressure (who cannot send is not read from) and half-close. Idle connections own no buffer.

use crate::host::Recover;
use crate::instance::Instance;
use crate::link::Wire;
use crate::{ConsoleSink, Failure, Link, Publish};
use anykernel::StartError;
use anykernel::config::{Config, Interface};
use anykernel::socket::{NetError, Shutdown, SocketProvider, Stream};
use anykernel::task::block_on_until;
use hypercall::Clock;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;
use rustix::time::Timespec;
use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

/// The gateway's own address.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The guest's, as QEMU's user network gives it out.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

/// Packets of this size make bulk transfers cheap; no wire in between says otherwise.
const MTU: u16 = u16::MAX;

/// How the guest's interface on this network is configured.
pub fn guest_interface() -> Interface {
    Interface {
        ipv4: format!("{GUEST}/24"),
        ipv6: "none".into(),
        gateway: Some(GATEWAY.to_string()),
        routes: Vec::new(),
        dns: Vec::new(),
    }
}

/// Published ports that are listened on, before there is anything behind them.
#[derive(Debug)]
pub struct Bound(Vec<(TcpListener, u16)>);

/// Listens on the host side of `publish`. Failures are lines for a person.
pub fn bind(publish: &[Publish]) -> Result<Bound, Failure> {
    let listen = |publish: &Publish| {
        let listener = TcpListener::bind(publish.host).and_then(|listener| {
            listener.set_nonblocking(true)?;
            // std listens with a backlog of 128, which a burst of clients overruns.
            rustix::net::listen(&listener, 4096)?;
            Ok(listener)
        });
        listener
            .map(|listener| (listener, publish.guest))
            .map_err(|error| crate::spec::port_failure(publish.host, &error))
    };
    publish.iter().map(listen).collect::<Result<_, _>>().map(Bound)
}

impl Bound {
    /// Where the host listens, with the guest's port; in the order they were given.
    pub fn addresses(&self) -> Vec<(SocketAddr, u16)> {
        self.0.iter().filter_map(|(listener, guest)| Some((listener.local_addr().ok()?, *guest))).collect()
    }

    /// Starts the gateway. The second value is the guest's end of the wire.
    pub fn start(self) -> Result<(Gateway, Link), StartError> {
        let (ours, theirs) = Wire::pair(MTU);
        let config = Config {
            hostname: "gateway".into(),
            interfaces: vec![Interface {
                ipv4: format!("{GATEWAY}/24"),
                ipv6: "none".into(),
                ..Interface::default()
            }],
            ..Config::default()
        };
        let instance = Instance::builder()
            .name("gateway")
            .cpus(1)
            .config(config)
            .console(ConsoleSink::Null)
            .link(Link::Wire(ours))
            .start()?;
        let sockets = instance
            .kernel()
            .sockets()
            .ok_or_else(|| StartError::Other("the gateway has no network stack".into()))?;
        let (shared, poll) =
            set_up(&self.0).map_err(|error| StartError::Other(format!("the gateway: {error}")))?;
        let relay = Relay {
            shared: shared.clone(),
            poll,
            sockets,
            listeners: self.0,
            connections: HashMap::new(),
            next: 0,
            scratch: vec![0; SCRATCH],
            starved: false,
        };
        let thread = std::thread::Builder::new()
            .name("gateway".into())
            .spawn(move || relay.run())
            .map_err(|error| StartError::Other(format!("starting the gateway's thread: {error}")))?;
        Ok((Gateway { instance: Some(instance), shared, thread: Some(thread) }, Link::Wire(theirs)))
    }
}

/// A running gateway; dropping it closes its ports and connections.
#[derive(Debug)]
pub struct Gateway {
    instance: Option<Instance>,
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Gateway {
    /// Waits until somebody listens on `port` of the guest, by connecting; `false` if `give_up` said so first.
    pub fn wait_until_open(&self, port: u16, give_up: impl Fn() -> bool) -> bool {
        let Some(kernel) = self.instance.as_ref().map(Instance::kernel) else { return false };
        let Some(sockets) = kernel.sockets() else { return false };
        let host = kernel.host();
        let address = SocketAddr::V4(SocketAddrV4::new(GUEST, port));
        while !give_up() {
            if let Ok(stream) = sockets.connect(address) {
                let deadline = host.monotonic_ns() + 200_000_000;
                let connected = std::future::poll_fn(|cx| stream.poll_connected(cx));
                let connected = block_on_until(host, connected, Some(deadline));
                stream.abort();
                if matches!(connected, Some(Ok(()))) {
                    return true;
                }
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        false
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.kick();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the gateway's thread panicked");
        }
        drop(self.instance.take());
    }
}

/// Bytes moved in one system call at most.
const SCRATCH: usize = 256 << 10;
/// Bytes that one connection may move before it is the next one's turn.
const TURN: usize = 1 << 20;

/// Tokens of epoll: connections count from 0 up, listeners from here up.
const LISTENERS: u64 = 1 << 62;
const KICK: u64 = u64::MAX;

/// What wakers and the relay's thread share.
#[derive(Debug)]
struct Shared {
    ready: Mutex<Vec<u64>>,
    /// The thread is about to wait in epoll and wants a kick.
    sleeping: AtomicBool,
    kick: OwnedFd,
    stop: AtomicBool,
}

impl Shared {
    fn kick(&self) {
        // Cannot fail: the counter is far from full.
        let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
    }
}

/// Called by the stack when a stream has news.
struct ConnectionWaker {
    id: u64,
    queued: AtomicBool,
    shared: Arc<Shared>,
}

impl Wake for ConnectionWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::SeqCst) {
            self.shared.ready.lock().recover().push(self.id);
            if self.shared.sleeping.swap(false, Ordering::SeqCst) {
                self.shared.kick();
            }
        }
    }
}

/// One direction of a connection.
#[derive(Default)]
struct Pipe {
    /// Read but not yet accepted by the other side.
    pending: Vec<u8>,
    sent: usize,
    /// The source has ended.
    eof: bool,
    /// The sink was told.
    finished: bool,
}

struct Connection {
    host: TcpStream,
    guest: Arc<dyn Stream>,
    notify: Arc<ConnectionWaker>,
    waker: Waker,
    connected: bool,
    up: Pipe,
    down: Pipe,
}

/// How a turn of a connection ended.
#[derive(PartialEq)]
enum Turn {
    /// It waits for something.
    Waits,
    /// It could go on at once.
    Again,
    /// It is over in order.
    Over,
    /// One side broke it: break the other.
    Broken,
}

/// One side's answer to a read or write.
enum Moved {
    Bytes(usize),
    NotNow,
    Broken,
}

struct Relay {
    shared: Arc<Shared>,
    poll: OwnedFd,
    sockets: Arc<dyn SocketProvider>,
    listeners: Vec<(TcpListener, u16)>,
    connections: HashMap<u64, Connection>,
    next: u64,
    scratch: Vec<u8>,
    /// A client could not be accepted for lack of descriptors; try again when one is free.
    starved: bool,
}

fn set_up(listeners: &[(TcpListener, u16)]) -> rustix::io::Result<(Arc<Shared>, OwnedFd)> {
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    epoll::add(&poll, &kick, epoll::EventData::new_u64(KICK), epoll::EventFlags::IN | epoll::EventFlags::ET)?;
    for (i, (listener, _)) in listeners.iter().enumerate() {
        let token = epoll::EventData::new_u64(LISTENERS + i as u64);
        epoll::add(&poll, listener, token, epoll::EventFlags::IN | epoll::EventFlags::ET)?;
    }
    let shared = Shared {
        ready: Mutex::default(),
        sleeping: AtomicBool::new(false),
        kick,
        stop: AtomicBool::new(false),
    };
    Ok((Arc::new(shared), poll))
}

impl Relay {
    fn run(mut self) {
        let mut events = Vec::with_capacity(256);
        let mut ready = Vec::new();
        while !self.shared.stop.load(Ordering::SeqCst) {
            self.shared.sleeping.store(true, Ordering::SeqCst);
            let idle = self.shared.ready.lock().recover().is_empty();
            if !idle {
                self.shared.sleeping.store(false, Ordering::SeqCst);
            }
            let timeout = if idle { None } else { Some(Timespec { tv_sec: 0, tv_nsec: 0 }) };
            events.clear();
            match epoll::wait(&self.poll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    log::error!("the gateway: epoll: {error}");
                    return;
                }
            }
            self.shared.sleeping.store(false, Ordering::SeqCst);
            for event in &events {
                match event.data.u64() {
                    KICK => {}
                    token if token >= LISTENERS => self.accept((token - LISTENERS) as usize),
                    id => {
                        if let Some(connection) = self.connections.get(&id) {
                            connection.notify.wake_by_ref();
                        }
                    }
                }
            }
            std::mem::swap(&mut ready, &mut *self.shared.ready.lock().recover());
            for id in ready.drain(..) {
                self.turn(id);
            }
        }
        for (_, connection) in self.connections.drain() {
            connection.guest.abort();
        }
    }

    fn accept(&mut self, index: usize) {
        let Some((listener, port)) = self.listeners.get(index) else { return };
        let guest_addr = SocketAddr::V4(SocketAddrV4::new(GUEST, *port));
        loop {
            let host = match listener.accept() {
                Ok((host, _)) => host,
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::AGAIN) => return,
                    // The client gave up while it waited.
                    Some(Errno::CONNABORTED | Errno::INTR) => continue,
                    _ => {
                        if !std::mem::replace(&mut self.starved, true) {
                            log::warn!("published port {port}: {error}: clients wait until connections end");
                        }
                        return;
                    }
                },
            };
            let guest = match self.sockets.connect(guest_addr) {
                Ok(guest) => guest,
                Err(error) => {
                    log::warn!("published port {port}: {error}");
                    reset(&host);
                    continue;
                }
            };
            let id = self.next;
            self.next += 1;
            let notify =
                Arc::new(ConnectionWaker { id, queued: AtomicBool::new(false), shared: self.shared.clone() });
            let edges = epoll::EventFlags::IN
                | epoll::EventFlags::OUT
                | epoll::EventFlags::RDHUP
                | epoll::EventFlags::ET;
            let watched = host
                .set_nonblocking(true)
                .is_ok_and(|()| epoll::add(&self.poll, &host, epoll::EventData::new_u64(id), edges).is_ok());
            if !watched {
                reset(&host);
                guest.abort();
                continue;
            }
            // Both sides pass on what they get; waiting for more is the ends' business.
            let _ = host.set_nodelay(true);
            let _ = guest.set_nodelay(true);
            let connection = Connection {
                host,
                guest,
                waker: Waker::from(notify.clone()),
                notify: notify.clone(),
                connected: false,
                up: Pipe::default(),
                down: Pipe::default(),
            };
            self.connections.insert(id, connection);
            notify.wake_by_ref();
        }
    }

    fn turn(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.notify.queued.store(false, Ordering::SeqCst);
        match connection.turn(&mut self.scratch) {
            Turn::Waits => return,
            Turn::Again => return connection.notify.wake_by_ref(),
            Turn::Over => {}
            Turn::Broken => {
                reset(&connection.host);
                connection.guest.abort();
            }
        }
        self.connections.remove(&id);
        if std::mem::take(&mut self.starved) {
            for index in 0..self.listeners.len() {
                self.accept(index);
            }
        }
    }
}

impl Connection {
    fn turn(&mut self, scratch: &mut [u8]) -> Turn {
        let Self { host, guest, waker, connected, up, down, .. } = self;
        let mut cx = Context::from_waker(waker);
        if !*connected {
            match guest.poll_connected(&mut cx) {
                Poll::Pending => return Turn::Waits,
                Poll::Ready(Ok(())) => *connected = true,
                Poll::Ready(Err(error)) => {
                    log::debug!("connecting into the guest: {error}");
                    return Turn::Broken;
                }
            }
        }
        let up = up.pump(
            scratch,
            |buf| from_host(rustix::io::read(&*host, buf)),
            |data| from_guest(guest.poll_send(&mut cx, data)),
            || guest.shutdown(Shutdown::Write).is_ok(),
        );
        let down = down.pump(
            scratch,
            |buf| from_guest(guest.poll_recv(&mut cx, buf)),
            |data| from_host(rustix::net::send(&*host, data, rustix::net::SendFlags::NOSIGNAL)),
            || rustix::net::shutdown(&*host, rustix::net::Shutdown::Write).is_ok(),
        );
        match (up, down) {
            (Turn::Broken, _) | (_, Turn::Broken) => Turn::Broken,
            (Turn::Over, Turn::Over) => Turn::Over,
            (Turn::Again, _) | (_, Turn::Again) => Turn::Again,
            _ => Turn::Waits,
        }
    }
}

impl Pipe {
    /// Moves bytes until one side is not ready.
    fn pump(
        &mut self,
        scratch: &mut [u8],
        mut read: impl FnMut(&mut [u8]) -> Moved,
        mut write: impl FnMut(&[u8]) -> Moved,
        finish: impl FnOnce() -> bool,
    ) -> Turn {
        if self.finished {
            return Turn::Over;
        }
        while let Some(rest) = self.pending.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match write(rest) {
                Moved::Bytes(n) => self.sent += n,
                Moved::NotNow => return Turn::Waits,
                Moved::Broken => return Turn::Broken,
            }
        }
        (self.pending, self.sent) = (Vec::new(), 0);
        let mut moved = 0;
        while !self.eof {
            if moved > TURN {
                return Turn::Again;
            }
            let len = match read(scratch) {
                Moved::Bytes(0) => {
                    self.eof = true;
                    break;
                }
                Moved::Bytes(len) => len.min(scratch.len()),
                Moved::NotNow => return Turn::Waits,
                Moved::Broken => return Turn::Broken,
            };
            let mut data = &scratch[..len];
            while !data.is_empty() {
                match write(data) {
                    Moved::Bytes(n) => data = data.get(n..).unwrap_or_default(),
                    Moved::NotNow => {
                        self.pending = data.to_vec();
                        return Turn::Waits;
                    }
                    Moved::Broken => return Turn::Broken,
                }
            }
            moved += len;
        }
        self.finished = true;
        if finish() { Turn::Over } else { Turn::Broken }
    }
}

fn from_host(result: rustix::io::Result<usize>) -> Moved {
    match result {
        Ok(n) => Moved::Bytes(n),
        Err(Errno::AGAIN | Errno::INTR) => Moved::NotNow,
        Err(_) => Moved::Broken,
    }
}

fn from_guest(result: Poll<Result<usize, NetError>>) -> Moved {
    match result {
        Poll::Ready(Ok(n)) => Moved::Bytes(n),
        Poll::Pending => Moved::NotNow,
        Poll::Ready(Err(_)) => Moved::Broken,
    }
}

/// Makes the close that follows a reset, so that the client does not take a broken transfer for a whole one.
fn reset(host: &TcpStream) {
    // Fails only on a socket that is gone already.
    let _ = rustix::net::sockopt::set_socket_linger(host, Some(std::time::Duration::ZERO));
}
