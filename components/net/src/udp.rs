//! UDP (RFC 768): our own data path. A socket lives in the shard that its port names, so it needs no lock of its own.

use crate::checksum::Sum;
use crate::io::Layout;
use crate::ipv4::{Outgoing, put_payload};
use crate::packet::{Ip, be16, protocol, put};
use crate::route::LOOPBACK;
use crate::shard::{Shard, scope_of};
use crate::slab::{Key, Slab};
use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use anykernel::socket::{NetError, Result};
use core::net::{IpAddr, SocketAddr};
use core::task::{Context, Poll, Waker};

const HEADER_LEN: usize = 8;
/// Datagrams that wait in one socket, however small.
const MAX_QUEUED: usize = 1024;

/// Names a UDP socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpId {
    pub(crate) shard: usize,
    pub(crate) key: Key,
}

pub(crate) struct UdpSocket {
    local: SocketAddr,
    queue: VecDeque<(SocketAddr, usize)>,
    bytes: VecDeque<u8>,
    waker: Option<Waker>,
    /// Of the last destination, told to the next receiver.
    error: Option<NetError>,
    last_to: Option<SocketAddr>,
}

/// The sockets of a shard.
#[derive(Default)]
pub(crate) struct UdpTable {
    sockets: Slab<UdpSocket>,
    ports: BTreeMap<u16, Vec<Key>>,
}

impl UdpTable {
    fn find(&self, addr: IpAddr, port: u16) -> Option<Key> {
        let mut wildcard = None;
        for key in self.ports.get(&port)? {
            let local = self.sockets.get(*key)?.local.ip();
            if local == addr {
                return Some(*key);
            }
            if local.is_unspecified() && (local.is_ipv6() || addr.is_ipv4()) {
                wildcard = Some(*key);
            }
        }
        wildcard
    }
}

impl Shard {
    /// The shard that owns the local port.
    pub(crate) fn udp_shard(&self, port: u16) -> usize {
        if port == crate::dhcp::CLIENT_PORT { 0 } else { udp_home(port, self.count) }
    }

    /// Takes in a datagram.
    pub(crate) fn udp_in(&mut self, iface: usize, ip: &Ip<'_>, direct: bool, checksum_ok: bool) {
        let (Some((src_port, dst_port)), Some(len), Some(checksum)) =
            (ip.ports(), be16(ip.payload, 4), be16(ip.payload, 6))
        else {
            return self.io.counters.drop_malformed.increment();
        };
        let Some(payload) = ip.payload.get(HEADER_LEN..usize::from(len)) else {
            return self.io.counters.drop_malformed.increment();
        };
        // 0: the sender made none, which only IPv4 allows (RFC 8200, 8.1).
        let unsummed = checksum == 0 && ip.src.is_ipv4();
        let datagram = Ip { payload: ip.payload.get(..usize::from(len)).unwrap_or_default(), ..*ip };
        if !checksum_ok && !unsummed && !datagram.transport_checksum_ok() {
            return self.io.counters.drop_checksum.increment();
        }
        if dst_port == crate::dhcp::CLIENT_PORT && iface != LOOPBACK {
            return self.dhcp_in(iface, payload);
        }
        let from = SocketAddr::new(ip.src, src_port);
        let Some(key) = self.udp.find(ip.dst, dst_port) else {
            self.io.counters.drop_no_socket.increment();
            if direct {
                self.icmp_port_unreachable(ip);
            }
            return;
        };
        let limit = self.limits.udp_bytes;
        let Some(socket) = self.udp.sockets.get_mut(key) else { return };
        let full =
            socket.queue.len() >= MAX_QUEUED || socket.bytes.len() + payload.len() > limit.max(payload.len());
        if full || socket.bytes.try_reserve(payload.len()).is_err() {
            return self.io.counters.drop_udp_full.increment();
        }
        socket.bytes.extend(payload);
        socket.queue.push_back((from, payload.len()));
        self.wakers.extend(socket.waker.take());
    }

    /// Makes a socket. The port names this shard.
    pub(crate) fn udp_bind(&mut self, local: SocketAddr) -> Result<UdpId> {
        let taken = self.udp.ports.get(&local.port()).is_some_and(|keys| {
            keys.iter().any(|key| {
                self.udp.sockets.get(*key).is_some_and(|socket| {
                    let other = socket.local.ip();
                    other == local.ip()
                        || other.is_ipv4() == local.is_ipv4()
                            && (other.is_unspecified() || local.ip().is_unspecified())
                })
            })
        });
        if taken {
            return Err(NetError::AddrInUse);
        }
        let socket = UdpSocket {
            local,
            queue: VecDeque::new(),
            bytes: VecDeque::new(),
            waker: None,
            error: None,
            last_to: None,
        };
        let key = self.udp.sockets.insert(socket).map_err(|_| NetError::NoMemory)?;
        self.udp.ports.entry(local.port()).or_default().push(key);
        Ok(UdpId { shard: self.id, key })
    }

    /// Closes a socket and forgets what it received.
    pub(crate) fn udp_close(&mut self, id: UdpId) {
        let Some(socket) = self.udp.sockets.remove(id.key) else { return };
        if let Some(keys) = self.udp.ports.get_mut(&socket.local.port()) {
            keys.retain(|key| *key != id.key);
            if keys.is_empty() {
                self.udp.ports.remove(&socket.local.port());
            }
        }
    }

    pub(crate) fn udp_poll_recv(
        &mut self,
        id: UdpId,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<Result<(usize, SocketAddr)>> {
        let Some(socket) = self.udp.sockets.get_mut(id.key) else {
            return Poll::Ready(Err(NetError::Closed));
        };
        if let Some(error) = socket.error.take() {
            return Poll::Ready(Err(error));
        }
        let Some((from, len)) = socket.queue.pop_front() else {
            socket.waker = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let take = len.min(buf.len());
        let (first, second) = socket.bytes.as_slices();
        let from_first = take.min(first.len());
        put(buf, 0, first.get(..from_first).unwrap_or_default());
        put(buf, from_first, second.get(..take - from_first).unwrap_or_default());
        socket.bytes.drain(..len);
        Poll::Ready(Ok((take, from)))
    }

    /// Sends a datagram from a socket.
    pub(crate) fn udp_send(&mut self, id: UdpId, data: &[u8], to: SocketAddr) -> Result<()> {
        let Some(socket) = self.udp.sockets.get_mut(id.key) else { return Err(NetError::Closed) };
        if to.port() == 0 {
            return Err(NetError::Invalid);
        }
        socket.last_to = Some(to);
        let local = socket.local;
        self.udp_send_from(local, data, to)
    }

    /// Sends a datagram from any address.
    pub(crate) fn udp_send_from(&mut self, local: SocketAddr, data: &[u8], to: SocketAddr) -> Result<()> {
        let hop = self.routes.lookup(to.ip(), scope_of(to)).ok_or(NetError::Unreachable)?;
        let source = match local.ip() {
            ip if ip.is_unspecified() => {
                self.routes.source(to.ip(), hop).ok_or(NetError::AddrNotAvailable)?
            }
            ip => ip,
        };
        if source.is_ipv4() != to.is_ipv4() {
            return Err(NetError::Invalid);
        }
        let len = HEADER_LEN + data.len();
        if len > 65_535 - 20 {
            return Err(NetError::TooLarge);
        }
        let packet = Outgoing::new(source, to.ip(), protocol::UDP, len);
        let mut fill = |buf: &mut [u8]| {
            put(buf, 0, &local.port().to_be_bytes());
            put(buf, 2, &to.port().to_be_bytes());
            put(buf, 4, &(len as u16).to_be_bytes());
            put(buf, 6, &[0, 0]);
            put_payload(buf, HEADER_LEN, data);
        };
        let mtu = usize::from(self.routes.mtu(hop.iface));
        if len + crate::packet::ip_header_len(to.ip()) > mtu {
            let mut datagram = Vec::new();
            datagram.try_reserve_exact(len).map_err(|_| NetError::NoMemory)?;
            datagram.resize(len, 0);
            fill(&mut datagram);
            let sum = Sum::default().pseudo_header(source, to.ip(), protocol::UDP, len).bytes(&datagram);
            let sum = match sum.finish() {
                0 => 0xffff,
                sum => sum,
            };
            put(&mut datagram, 6, &sum.to_be_bytes());
            self.send_fragments(hop, packet, &datagram, mtu);
            return Ok(());
        }
        self.send_ip_by(hop, packet, Layout::udp(to.is_ipv6()), &mut fill);
        Ok(())
    }

    /// An ICMP error about a datagram from `local` to `remote`.
    pub(crate) fn udp_error(&mut self, local: SocketAddr, remote: SocketAddr, error: NetError) {
        let Some(key) = self.udp.find(local.ip(), local.port()) else { return };
        let Some(socket) = self.udp.sockets.get_mut(key) else { return };
        // Only what the application just did: anybody can send errors about datagrams that never were.
        if socket.last_to == Some(remote) {
            socket.error = Some(error);
            self.wakers.extend(socket.waker.take());
        }
    }
}

/// The shard of a local port.
pub(crate) fn udp_home(port: u16, shards: usize) -> usize {
    usize::from(port) % shards.max(1)
}
