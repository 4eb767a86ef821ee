//! The stack as the rest of the system sees it: what makes sockets.

use crate::shard::{Shard, scope_of};
use crate::sockets::{Echo, TcpListener, TcpStream, UdpSocket};
use crate::stack::Stack;
use crate::tcp::listen::Accept;
use alloc::sync::Arc;
use alloc::{boxed::Box, vec::Vec};
use anykernel::nic::Nic;
use anykernel::socket::{
    Datagram, InterfaceStatus, Listener, Lookup, NetError, Ping, Result, SocketProvider, Stream,
};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use core::sync::atomic::Ordering;
use core::task::{Context, Poll};
use hypercall::Host;

/// The dynamic ports (RFC 6335, 6).
const EPHEMERAL: core::ops::RangeInclusive<u16> = 49_152..=65_535;

/// The stack as a socket provider.
pub(crate) struct Provider<H: Host>(pub(crate) Arc<Stack<H>>);

impl<H: Host> Stack<H> {
    /// The next port to try.
    fn next_port(&self) -> u16 {
        let span = u32::from(*EPHEMERAL.end() - *EPHEMERAL.start()) + 1;
        *EPHEMERAL.start() + (self.next_port.fetch_add(1, Ordering::Relaxed) % span) as u16
    }

    fn is_bindable(&self, shard: &Shard, addr: IpAddr) -> bool {
        addr.is_unspecified() || addr.is_multicast() || shard.routes.is_ours(addr)
    }
}

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
