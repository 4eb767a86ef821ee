//! The stack as the rest of the system sees it: threads and locks around the shards, and the socket handles.
//!
//! Each shard is behind a mutex. Its thread sleeps on a signal and polls; application threads take the lock
//! themselves to send and receive, so that a packet leaves without a change of threads. Wakers are called, and other
//! shards told, after the lock is given back.

use crate::config::{Limits, Settings};
use crate::counters::NetCounters;
use crate::shard::{FlowId, Message, NicSetup, Shard, ShardSetup, UdpId, scope_of};
use crate::slab::Key;
use crate::tcp::listen::Accept;
use alloc::sync::{Arc, Weak};
use alloc::{boxed::Box, format, string::String, vec::Vec};
use anykernel::manifest::{Capability, Manifest};
use anykernel::nic::{Nic, NicQueue};
use anykernel::socket::{
    Datagram, InterfaceStatus, Listener, Lookup, NetError, Ping, Result, Shutdown, SocketProvider, Stream,
};
use anykernel::sync::{Mutex, MutexGuard};
use anykernel::{Kernel, StartError};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use core::task::{Context, Poll};
use crossbeam_queue::ArrayQueue;
use hypercall::{ContractVersion, CpuId, Host, Signal};

/// Messages between two shards that wait. More are dropped and counted.
const RING_LEN: usize = 1024;

/// The dynamic ports (RFC 6335, 6).
const EPHEMERAL: core::ops::RangeInclusive<u16> = 49_152..=65_535;

const MANIFEST: Manifest = Manifest {
    name: "net",
    summary: "Ethernet, IPv4, IPv6, UDP and TCP",
    core: &[
        Capability::Clock,
        Capability::Memory,
        Capability::Threads,
        Capability::Cpus,
        Capability::Entropy,
    ],
    contracts: &[ContractVersion::CORE],
};

/// A shard with what its thread and others need to reach it.
struct Cell<H: Host> {
    shard: Mutex<H, Shard>,
    signal: Arc<Signal>,
    inbox: ArrayQueue<Message>,
    /// The deadline that the thread sleeps to; an earlier one needs the signal. `0` while it is awake.
    sleeps_until: AtomicU64,
}

/// The stack.
pub(crate) struct Stack<H: Host> {
    host: H,
    cells: Vec<Cell<H>>,
    counters: NetCounters,
    next_port: AtomicU32,
    /// What has the settings.
    kernel: Weak<Kernel<H>>,
    /// Interfaces by their numbers. Held while one comes or goes.
    places: Mutex<H, Vec<Place>>,
}

/// A number of an interface, and who has it.
struct Place {
    mac: [u8; 6],
    /// `None`: it was unplugged.
    name: Option<String>,
}

/// The lock of a shard. Giving it back lets the shard send, then wakes whoever waited.
struct Session<'a, H: Host> {
    stack: &'a Stack<H>,
    index: usize,
    guard: Option<MutexGuard<'a, H, Shard>>,
}

impl<H: Host> Deref for Session<'_, H> {
    type Target = Shard;
    #[expect(clippy::expect_used, reason = "the guard is there until drop")]
    fn deref(&self) -> &Shard {
        self.guard.as_ref().expect("guard")
    }
}

impl<H: Host> DerefMut for Session<'_, H> {
    #[expect(clippy::expect_used, reason = "the guard is there until drop")]
    fn deref_mut(&mut self) -> &mut Shard {
        self.guard.as_mut().expect("guard")
    }
}

impl<H: Host> Drop for Session<'_, H> {
    fn drop(&mut self) {
        let Some(mut guard) = self.guard.take() else { return };
        let mut more = guard.finish();
        // Only the thread asks the device to tell of room.
        more |= guard.io.is_waiting();
        let (mut wakers, mut messages) = (Vec::new(), Vec::new());
        guard.swap_effects(&mut wakers, &mut messages);
        let deadline = guard.next_deadline_ns();
        drop(guard);
        self.stack.deliver(&mut messages);
        for waker in wakers {
            waker.wake();
        }
        if let Some(cell) = self.stack.cells.get(self.index) {
            let sleeps_until = cell.sleeps_until.load(Ordering::Relaxed);
            if more || deadline.is_some_and(|deadline| deadline < sleeps_until) {
                cell.signal.raise(&self.stack.host);
            }
        }
    }
}

impl<H: Host> Stack<H> {
    /// Locks a shard. Context: thread. Blocks for as long as another thread uses it.
    fn enter(&self, index: usize) -> Result<Session<'_, H>> {
        let cell = self.cells.get(index).ok_or(NetError::Invalid)?;
        let mut guard = cell.shard.lock();
        guard.set_now(self.host.monotonic_ns());
        Ok(Session { stack: self, index, guard: Some(guard) })
    }

    fn deliver(&self, messages: &mut Vec<(usize, Message)>) {
        let mut to = 0u64;
        for (index, message) in messages.drain(..) {
            let Some(cell) = self.cells.get(index) else { continue };
            let mut message = message;
            // Configuration is rare and may not be lost; the ring empties as fast as the other shard runs.
            while let Err(back) = cell.inbox.push(message) {
                if !matches!(back, Message::Routes(_)) {
                    self.counters.drop_ring_full.increment();
                    break;
                }
                message = back;
                cell.signal.raise(&self.host);
                self.host.yield_now();
            }
            to |= 1 << (index % 64);
        }
        if to != 0 {
            for (index, cell) in self.cells.iter().enumerate() {
                if to & 1 << (index % 64) != 0 {
                    cell.signal.raise(&self.host);
                }
            }
        }
    }

    /// What the thread of a shard does until `stopping`.
    fn run(&self, index: usize, stopping: impl Fn() -> bool) {
        let Some(cell) = self.cells.get(index) else { return };
        let (mut wakers, mut messages) = (Vec::new(), Vec::new());
        while !stopping() {
            let seen = cell.signal.count();
            cell.sleeps_until.store(0, Ordering::Relaxed);
            let now_ns = self.host.monotonic_ns();
            let mut guard = cell.shard.lock();
            guard.set_now(now_ns);
            for _ in 0..RING_LEN {
                let Some(message) = cell.inbox.pop() else { break };
                guard.message_in(message);
            }
            let again = guard.poll(now_ns).again || guard.arm() || !cell.inbox.is_empty();
            guard.swap_effects(&mut wakers, &mut messages);
            let deadline = guard.next_deadline_ns();
            // Under the lock, so that whoever takes it next compares with what we go to sleep with.
            if !again {
                cell.sleeps_until.store(deadline.unwrap_or(u64::MAX), Ordering::Relaxed);
            }
            drop(guard);
            self.deliver(&mut messages);
            for waker in wakers.drain(..) {
                waker.wake();
            }
            if again {
                // Others want the lock, or this CPU, too.
                self.host.yield_now();
            } else {
                cell.signal.wait(&self.host, seen, deadline);
            }
        }
    }

    /// See [`SocketProvider::attach`].
    fn attach(&self, nic: &Arc<dyn Nic>) -> Result<()> {
        let info = nic.info();
        let mut places = self.places.lock();
        if places.iter().any(|place| place.name.as_ref() == Some(&info.name)) {
            return Ok(());
        }
        let kernel = self.kernel.upgrade().ok_or(NetError::Closed)?;
        // Its own again, else any that is free.
        let free = |place: &Place| place.name.is_none();
        let number = places
            .iter()
            .position(|place| free(place) && place.mac == info.mac)
            .or_else(|| places.iter().position(free))
            .unwrap_or(places.len());
        let settings = Settings::parse(kernel.config(), number).map_err(|line| {
            log::error!("{line}");
            NetError::Invalid
        })?;
        let signals: Vec<_> = self.cells.iter().map(|cell| cell.signal.clone()).collect();
        let mut queues = open_queue_pairs(nic, &signals).map_err(|error| {
            log::error!("{error}");
            NetError::Unsupported
        })?;
        let place = Place { mac: info.mac, name: Some(info.name.clone()) };
        match places.get_mut(number) {
            Some(free) => *free = place,
            None => places.push(place),
        }
        log::info!("{}: interface {number}", info.name);
        for id in (0..self.cells.len()).rev() {
            let setup = NicSetup { info: info.clone(), queue: queues.take(id), owner: id % queues.opened };
            self.enter(id)?.plug(number, setup, &settings);
        }
        self.cells.iter().for_each(|cell| cell.signal.raise(&self.host));
        Ok(())
    }

    /// See [`SocketProvider::detach`].
    fn detach(&self, name: &str) {
        let mut places = self.places.lock();
        let number = places.iter().position(|place| place.name.as_deref() == Some(name));
        let Some((number, place)) = number.and_then(|number| Some((number, places.get_mut(number)?))) else {
            return;
        };
        place.name = None;
        for id in (0..self.cells.len()).rev() {
            if let Ok(mut shard) = self.enter(id) {
                shard.unplug(number);
            }
        }
        log::warn!("{name}: unplugged; connections over it fail");
    }

    /// The next port to try.
    fn next_port(&self) -> u16 {
        let span = u32::from(*EPHEMERAL.end() - *EPHEMERAL.start()) + 1;
        *EPHEMERAL.start() + (self.next_port.fetch_add(1, Ordering::Relaxed) % span) as u16
    }

    fn is_bindable(&self, shard: &Shard, addr: IpAddr) -> bool {
        addr.is_unspecified() || addr.is_multicast() || shard.routes.is_ours(addr)
    }
}

/// Starts the stack on every registered NIC, one shard per CPU, and becomes the kernel's socket provider.
///
/// Errors: a configuration that makes no sense, no entropy, a NIC that does not open, no memory for threads.
/// Context: thread.
pub fn start<H: Host>(kernel: &Arc<Kernel<H>>) -> Result<(), StartError> {
    kernel.admit(MANIFEST)?;
    let host = kernel.host().of_component("net");
    let fail = |what: &str| {
        let what = String::from(what);
        move |error| StartError::Host { what, error }
    };
    let count = host.cpu_count().max(1) as usize;
    let mut random = [0u8; 36];
    host.fill_random(&mut random).map_err(fail("drawing entropy for the network stack"))?;
    let (words, rest) = random.as_chunks::<8>();
    let mut secret = [0u64; 4];
    for (word, bytes) in secret.iter_mut().zip(words) {
        *word = u64::from_le_bytes(*bytes);
    }
    let first_port = rest.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let limits = Limits::new(&kernel.config().tcp, host.memory_bytes(), count);
    let counters = NetCounters::new(|name| kernel.counter(name));
    let nics = kernel.nics();
    let mut settings = Vec::new();
    for index in 0..nics.len() {
        settings.push(Settings::parse(kernel.config(), index).map_err(StartError::Config)?);
    }
    let signals: Vec<_> = (0..count).map(|_| Arc::new(Signal::new())).collect();
    let mut queues = open_queues(&nics, &signals)?;
    let now_ns = host.monotonic_ns();
    let cells = signals
        .into_iter()
        .enumerate()
        .map(|(id, signal)| {
            let nics = nics
                .iter()
                .zip(&mut queues)
                .map(|(nic, queues)| {
                    let owner = id % queues.opened;
                    NicSetup { info: nic.info().clone(), queue: queues.take(id), owner }
                })
                .collect();
            let settings = settings.clone();
            let counters = counters.clone();
            let setup = ShardSetup { id, count, secret, limits, counters, nics, settings, now_ns };
            Cell {
                shard: Mutex::new(host, Shard::new(setup)),
                signal,
                inbox: ArrayQueue::new(if count > 1 { RING_LEN } else { 1 }),
                sleeps_until: AtomicU64::new(0),
            }
        })
        .collect();
    let place = |nic: &Arc<dyn Nic>| Place { mac: nic.info().mac, name: Some(nic.info().name.clone()) };
    let stack = Arc::new(Stack {
        host,
        cells,
        counters,
        next_port: AtomicU32::new(first_port),
        kernel: Arc::downgrade(kernel),
        places: Mutex::new(host, nics.iter().map(place).collect()),
    });
    for (index, cell) in stack.cells.iter().enumerate() {
        kernel.raise_on_stop(cell.signal.clone());
        let (stack, kernel_of_thread) = (stack.clone(), kernel.clone());
        kernel.spawn(&format!("net{index}"), Some(CpuId(index as u32)), move || {
            stack.run(index, || kernel_of_thread.stopping());
        })?;
    }
    kernel.set_sockets(Arc::new(Provider(stack.clone())));
    // What came and went meanwhile.
    let now = kernel.nics();
    for nic in nics.iter().filter(|nic| now.iter().all(|one| one.info().name != nic.info().name)) {
        stack.detach(&nic.info().name);
    }
    for nic in &now {
        if let Err(error) = stack.attach(nic) {
            log::error!("{}: the network stack does not take it: {error}", nic.info().name);
        }
    }
    Ok(())
}

struct Queues {
    queues: Vec<Option<Box<dyn NicQueue>>>,
    opened: usize,
}

impl Queues {
    fn take(&mut self, index: usize) -> Option<Box<dyn NicQueue>> {
        self.queues.get_mut(index)?.take()
    }
}

/// Opens as many queues of every NIC as there are shards, or as it has.
fn open_queues(nics: &[Arc<dyn Nic>], signals: &[Arc<Signal>]) -> Result<Vec<Queues>, StartError> {
    nics.iter().map(|nic| open_queue_pairs(nic, signals)).collect()
}

fn open_queue_pairs(nic: &Arc<dyn Nic>, signals: &[Arc<Signal>]) -> Result<Queues, StartError> {
    let mut queues = Vec::new();
    for (index, signal) in signals.iter().enumerate().take(usize::from(nic.info().queues.max(1))) {
        let queue = nic.open_queue(index as u16, signal.clone()).map_err(|error| StartError::Host {
            what: format!("opening queue {index} of {}", nic.info().name),
            error,
        })?;
        queues.push(Some(queue));
    }
    Ok(Queues { opened: queues.len().max(1), queues })
}

/// The stack as a socket provider.
struct Provider<H: Host>(Arc<Stack<H>>);

impl<H: Host> SocketProvider for Provider<H> {
    fn listen(&self, addr: SocketAddr, backlog: usize) -> Result<Arc<dyn Listener>> {
        let stack = &self.0;
        if !stack.is_bindable(&*stack.enter(0)?, addr.ip()) || addr.ip().is_multicast() {
            return Err(NetError::AddrNotAvailable);
        }
        let tries = if addr.port() == 0 { EPHEMERAL.len() } else { 1 };
        for _ in 0..tries {
            let port = if addr.port() == 0 { stack.next_port() } else { addr.port() };
            let accept = Accept::new(SocketAddr::new(addr.ip(), port), backlog);
            // Shard 0 decides between two that want the same port at once.
            if !stack.enter(0)?.listen(&accept) {
                continue;
            }
            for index in 1..stack.cells.len() {
                stack.enter(index)?.listen(&accept);
            }
            return Ok(Arc::new(TcpListener { stack: stack.clone(), accept }));
        }
        Err(NetError::AddrInUse)
    }

    fn connect(&self, to: SocketAddr) -> Result<Arc<dyn Stream>> {
        let stack = &self.0;
        if to.port() == 0 || to.ip().is_multicast() {
            return Err(NetError::Invalid);
        }
        // Connecting to "any" means ourselves, as everywhere.
        let to = match to.ip() {
            IpAddr::V4(v4) if v4.is_unspecified() => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), to.port()),
            IpAddr::V6(v6) if v6.is_unspecified() => SocketAddr::new(Ipv6Addr::LOCALHOST.into(), to.port()),
            _ => to,
        };
        let (source, secret) = {
            let shard = stack.enter(0)?;
            let hop = shard.routes.lookup(to.ip(), scope_of(to)).ok_or(NetError::Unreachable)?;
            (shard.routes.source(to.ip(), hop).ok_or(NetError::AddrNotAvailable)?, shard.secret)
        };
        let near = stack.host.current_cpu().0 as usize;
        for tried in 0..EPHEMERAL.len() {
            let local = SocketAddr::new(source, stack.next_port());
            let hash = secret.tuple_hash((local.ip(), local.port()), (to.ip(), to.port()));
            let index = crate::shard::pick(hash, stack.cells.len());
            // The port decides the shard: one of this CPU's is worth a few tries.
            if index != near && tried < 4 * stack.cells.len() {
                continue;
            }
            let mut shard = stack.enter(index)?;
            if shard.listeners.find(source, local.port()).is_some() {
                continue;
            }
            match shard.tcp_connect(local, to) {
                Err(NetError::AddrInUse) => {}
                Err(error) => return Err(error),
                Ok(flow) => {
                    drop(shard);
                    return Ok(Arc::new(TcpStream { stack: stack.clone(), flow, local, peer: to }));
                }
            }
        }
        Err(NetError::AddrInUse)
    }

    fn bind(&self, addr: SocketAddr) -> Result<Arc<dyn Datagram>> {
        let stack = &self.0;
        if !stack.is_bindable(&*stack.enter(0)?, addr.ip()) {
            return Err(NetError::AddrNotAvailable);
        }
        let tries = if addr.port() == 0 { EPHEMERAL.len() } else { 1 };
        for _ in 0..tries {
            let port = if addr.port() == 0 { stack.next_port() } else { addr.port() };
            let local = SocketAddr::new(addr.ip(), port);
            let first = stack.enter(0)?;
            let home = first.udp_shard(port);
            // Shards are entered one at a time.
            let _first = (hypercall::planted!("lock-order") && home != 0).then_some(first);
            match stack.enter(home)?.udp_bind(local) {
                Ok(id) => return Ok(Arc::new(UdpSocket { stack: stack.clone(), id, local })),
                Err(NetError::AddrInUse) => {}
                Err(error) => return Err(error),
            }
        }
        Err(NetError::AddrInUse)
    }

    fn lookup(&self, name: &str) -> Result<Box<dyn Lookup>> {
        crate::dns::lookup(self, name)
    }

    fn ping(&self, to: IpAddr) -> Result<Box<dyn Ping>> {
        let key = self.0.enter(0)?.ping_start(to)?;
        Ok(Box::new(Echo { stack: self.0.clone(), key }))
    }

    fn interfaces(&self) -> Vec<InterfaceStatus> {
        let Ok(shard) = self.0.enter(0) else { return Vec::new() };
        let interfaces = shard.routes.interfaces.iter().filter(|interface| !interface.gone);
        interfaces
            .map(|interface| InterfaceStatus {
                name: interface.name.clone(),
                mac: interface.mac,
                addresses: interface
                    .v4
                    .iter()
                    .map(|(addr, prefix)| (IpAddr::V4(*addr), *prefix))
                    .chain(interface.v6.iter().map(|(addr, prefix)| (IpAddr::V6(*addr), *prefix)))
                    .collect(),
                gateways: interface
                    .gateway_v4
                    .map(IpAddr::V4)
                    .into_iter()
                    .chain(interface.gateway_v6.map(IpAddr::V6))
                    .collect(),
                dns: interface.dns.clone(),
            })
            .collect()
    }

    fn poll_configured(&self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let mut shard = self.0.enter(0)?;
        if shard.is_configured() {
            return Poll::Ready(Ok(()));
        }
        shard.when_configured(cx.waker().clone());
        Poll::Pending
    }

    fn attach(&self, nic: Arc<dyn Nic>) -> Result<()> {
        self.0.attach(&nic)
    }

    fn detach(&self, name: &str) {
        self.0.detach(name);
    }
}

impl<H: Host> crate::dns::Resolver for Provider<H> {
    fn servers(&self) -> Vec<IpAddr> {
        let Ok(shard) = self.0.enter(0) else { return Vec::new() };
        shard.routes.interfaces.iter().flat_map(|interface| interface.dns.iter().copied()).collect()
    }
    fn socket(&self, v4: bool) -> Result<Arc<dyn Datagram>> {
        let any = if v4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        // A port that cannot be guessed (RFC 5452, 9.2), unlike those handed out in order.
        for _ in 0..8 {
            let random = self.random() as u16 | 0xc000;
            match self.bind(SocketAddr::new(any, random)) {
                Err(NetError::AddrInUse) => {}
                result => return result,
            }
        }
        self.bind(SocketAddr::new(any, 0))
    }
    fn random(&self) -> u64 {
        self.0.enter(0).map_or(0, |mut shard| shard.prf.next_u64())
    }
    fn clock(&self) -> Box<dyn crate::dns::Alarm> {
        Box::new(ShardAlarm(self.0.clone()))
    }
}

struct ShardAlarm<H: Host>(Arc<Stack<H>>);

impl<H: Host> crate::dns::Alarm for ShardAlarm<H> {
    fn now_ns(&self) -> u64 {
        self.0.host.monotonic_ns()
    }
    fn wake_at(&self, at_ns: u64, waker: &core::task::Waker) {
        if let Ok(mut shard) = self.0.enter(0) {
            shard.wake_at(at_ns, waker.clone());
        }
    }
}

/// A connection's handle.
struct TcpStream<H: Host> {
    stack: Arc<Stack<H>>,
    flow: FlowId,
    local: SocketAddr,
    peer: SocketAddr,
}

impl<H: Host> Stream for TcpStream<H> {
    fn poll_connected(&self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.stack.enter(self.flow.shard)?.tcp_poll_connected(self.flow, cx)
    }
    fn poll_recv(&self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<Result<usize>> {
        self.stack.enter(self.flow.shard)?.tcp_poll_recv(self.flow, cx, buf)
    }
    fn poll_send(&self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize>> {
        self.stack.enter(self.flow.shard)?.tcp_poll_send(self.flow, cx, data)
    }
    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.stack.enter(self.flow.shard)?.tcp_poll_flush(self.flow, cx)
    }
    fn shutdown(&self, how: Shutdown) -> Result<()> {
        self.stack.enter(self.flow.shard)?.tcp_shutdown(self.flow, how)
    }
    fn abort(&self) {
        if let Ok(mut shard) = self.stack.enter(self.flow.shard) {
            shard.tcp_abort(self.flow);
        }
    }
    fn local_addr(&self) -> SocketAddr {
        self.local
    }
    fn peer_addr(&self) -> SocketAddr {
        self.peer
    }
    fn set_nodelay(&self, on: bool) -> Result<()> {
        self.stack.enter(self.flow.shard)?.tcp_set_nodelay(self.flow, on)
    }
    fn set_keepalive(&self, idle_ns: Option<u64>) -> Result<()> {
        self.stack.enter(self.flow.shard)?.tcp_set_keepalive(self.flow, idle_ns)
    }
}

impl<H: Host> Drop for TcpStream<H> {
    fn drop(&mut self) {
        if let Ok(mut shard) = self.stack.enter(self.flow.shard) {
            shard.tcp_drop(self.flow);
        }
    }
}

/// A listening port's handle.
struct TcpListener<H: Host> {
    stack: Arc<Stack<H>>,
    accept: Arc<Accept>,
}

impl<H: Host> Listener for TcpListener<H> {
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<Result<Arc<dyn Stream>>> {
        let accepted = self.accept.pop().or_else(|| {
            self.accept.waker().register(cx.waker());
            // One may have come between the look and the registration.
            self.accept.pop()
        });
        match accepted {
            Some(accepted) => Poll::Ready(Ok(Arc::new(TcpStream {
                stack: self.stack.clone(),
                flow: accepted.flow,
                local: accepted.local,
                peer: accepted.remote,
            }))),
            None => Poll::Pending,
        }
    }
    fn local_addr(&self) -> SocketAddr {
        self.accept.local()
    }
}

impl<H: Host> Drop for TcpListener<H> {
    fn drop(&mut self) {
        self.accept.close();
        for index in 0..self.stack.cells.len() {
            if let Ok(mut shard) = self.stack.enter(index) {
                shard.listeners.remove(&self.accept);
            }
        }
        while let Some(accepted) = self.accept.pop() {
            if let Ok(mut shard) = self.stack.enter(accepted.flow.shard) {
                shard.tcp_abort(accepted.flow);
                shard.tcp_drop(accepted.flow);
            }
        }
    }
}

/// A UDP socket's handle.
struct UdpSocket<H: Host> {
    stack: Arc<Stack<H>>,
    id: UdpId,
    local: SocketAddr,
}

impl<H: Host> Datagram for UdpSocket<H> {
    fn poll_recv_from(&self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<Result<(usize, SocketAddr)>> {
        self.stack.enter(self.id.shard)?.udp_poll_recv(self.id, cx, buf)
    }
    fn poll_send_to(&self, _: &mut Context<'_>, data: &[u8], to: SocketAddr) -> Poll<Result<()>> {
        Poll::Ready(self.stack.enter(self.id.shard)?.udp_send(self.id, data, to))
    }
    fn local_addr(&self) -> SocketAddr {
        self.local
    }
}

impl<H: Host> Drop for UdpSocket<H> {
    fn drop(&mut self) {
        if let Ok(mut shard) = self.stack.enter(self.id.shard) {
            let _second =
                (hypercall::planted!("lock-order") && self.id.shard != 0).then(|| self.stack.enter(0));
            shard.udp_close(self.id);
        }
    }
}

/// An echo request's handle.
struct Echo<H: Host> {
    stack: Arc<Stack<H>>,
    key: Key,
}

impl<H: Host> Ping for Echo<H> {
    fn poll_reply(&mut self, cx: &mut Context<'_>) -> Poll<Result<u64>> {
        self.stack.enter(0)?.ping_poll(self.key, cx)
    }
}

impl<H: Host> Drop for Echo<H> {
    fn drop(&mut self) {
        if let Ok(mut shard) = self.stack.enter(0) {
            shard.ping_drop(self.key);
        }
    }
}
