//! ICMP (RFC 792) and the part of ICMPv6 (RFC 4443) that is not neighbour discovery: echo, and errors both ways.

use crate::checksum::Sum;
use crate::io::Layout;
use crate::ipv4::Outgoing;
use crate::packet::{Ip, be16, be32, protocol, put};
use crate::shard::Shard;
use crate::slab::{Key, Slab};
use crate::tcp::table::Tuple;
use anykernel::socket::{NetError, Result};
use core::net::{IpAddr, SocketAddr};
use core::task::{Context, Poll, Waker};

/// Errors and resets that a shard sends in a second (RFC 4443, 2.4 f).
const MAX_ERRORS_PER_SECOND: u32 = 1000;
/// An echo request is given up after this.
const PING_NS: u64 = 5_000_000_000;
/// Bytes of the offending packet that an error quotes: what fits the smallest MTU of both versions.
const QUOTE: usize = 512;
/// Payload of our echo requests.
const PING_PAYLOAD: usize = 48;

/// An echo request that waits.
pub(crate) struct PingState {
    ident: u16,
    dst: IpAddr,
    sent_ns: u64,
    deadline_ns: u64,
    result: Option<Result<u64>>,
    waker: Option<Waker>,
}

/// Sent errors in the current second.
#[derive(Default)]
pub(crate) struct RateLimit {
    second: u64,
    count: u32,
}

/// What an error message is about.
struct Quoted {
    local: IpAddr,
    remote: IpAddr,
    protocol: u8,
    local_port: u16,
    remote_port: u16,
    /// The first word after the ports: TCP's sequence number.
    word: u32,
}

impl Quoted {
    /// Reads the start of a packet that we are said to have sent; it may be cut off after 8 bytes of transport header.
    fn parse(data: &[u8], v4: bool) -> Option<Self> {
        let (header_len, protocol, local, remote) = if v4 {
            let header_len = usize::from(*data.first()? & 0xf) * 4;
            let addr = |at| Some(IpAddr::V4(be32(data, at)?.into()));
            (header_len, *data.get(9)?, addr(12)?, addr(16)?)
        } else {
            let addr = |at: usize| Some(IpAddr::V6((*data.get(at..)?.first_chunk::<16>()?).into()));
            (40, *data.get(6)?, addr(8)?, addr(24)?)
        };
        let transport = data.get(header_len..)?;
        Some(Self {
            local,
            remote,
            protocol,
            local_port: be16(transport, 0)?,
            remote_port: be16(transport, 2)?,
            word: be32(transport, 4)?,
        })
    }
}

impl Quoted {
    fn tuple(&self) -> Tuple {
        Tuple {
            local: self.local,
            remote: self.remote,
            local_port: self.local_port,
            remote_port: self.remote_port,
        }
    }
}

/// Whether a message is an error that quotes a packet.
fn quotes(ip: &Ip<'_>) -> bool {
    match (ip.src, ip.payload.first()) {
        (IpAddr::V4(_), Some(3 | 4 | 5 | 11 | 12)) => true,
        (IpAddr::V6(_), Some(kind)) => *kind < 128,
        _ => false,
    }
}

impl Shard {
    /// The shard that a message belongs to: that of the packet which an error quotes.
    pub(crate) fn icmp_shard(&self, ip: &Ip<'_>) -> usize {
        if !quotes(ip) {
            return 0;
        }
        let quoted = ip.payload.get(8..).and_then(|data| Quoted::parse(data, ip.src.is_ipv4()));
        match quoted {
            Some(quoted) if quoted.protocol == protocol::TCP => {
                self.tcp_shard((quoted.local, quoted.local_port), (quoted.remote, quoted.remote_port))
            }
            Some(quoted) if quoted.protocol == protocol::UDP => self.udp_shard(quoted.local_port),
            _ => 0,
        }
    }

    /// Takes in an ICMP message.
    pub(crate) fn icmpv4_in(&mut self, ip: &Ip<'_>, direct: bool) {
        if !Sum::default().bytes(ip.payload).is_valid() {
            return self.io.counters.drop_checksum.increment();
        }
        let (Some(&[kind, code]), true) = (ip.payload.first_chunk::<2>(), ip.payload.len() >= 8) else {
            return self.io.counters.drop_malformed.increment();
        };
        match kind {
            8 if direct => self.echo_reply(ip, 0),
            0 => self.pong(ip),
            3 => {
                let error = if code == 3 || code == 2 { NetError::Refused } else { NetError::Unreachable };
                if code == 4 {
                    self.too_long_in(ip);
                } else {
                    self.icmp_error_in(ip, error);
                }
            }
            11 => self.icmp_error_in(ip, NetError::Unreachable),
            _ => self.io.counters.drop_protocol.increment(),
        }
    }

    /// Takes in an ICMPv6 message that is not neighbour discovery.
    pub(crate) fn icmpv6_other_in(&mut self, ip: &Ip<'_>, direct: bool) {
        let (Some(&[kind, code]), true) = (ip.payload.first_chunk::<2>(), ip.payload.len() >= 8) else {
            return self.io.counters.drop_malformed.increment();
        };
        match kind {
            128 if direct => self.echo_reply(ip, 129),
            129 => self.pong(ip),
            2 => self.too_long_in(ip),
            1 => {
                let error = if code == 4 { NetError::Refused } else { NetError::Unreachable };
                self.icmp_error_in(ip, error);
            }
            3 => self.icmp_error_in(ip, NetError::Unreachable),
            _ => self.io.counters.drop_protocol.increment(),
        }
    }

    fn too_long_in(&mut self, ip: &Ip<'_>) {
        let quoted = ip.payload.get(8..).and_then(|data| Quoted::parse(data, ip.src.is_ipv4()));
        let (Some(quoted), Some(mtu)) = (quoted, be32(ip.payload, 4)) else {
            return self.io.counters.drop_malformed.increment();
        };
        if quoted.protocol == protocol::TCP {
            self.flow_too_long(&quoted.tuple(), quoted.word, mtu);
        }
    }

    fn icmp_error_in(&mut self, ip: &Ip<'_>, error: NetError) {
        let Some(quoted) = ip.payload.get(8..).and_then(|data| Quoted::parse(data, ip.src.is_ipv4())) else {
            return self.io.counters.drop_malformed.increment();
        };
        match quoted.protocol {
            protocol::TCP => {
                if let Some(key) = self.flow_connecting(&quoted.tuple(), quoted.word) {
                    self.flow_fail(key, error);
                }
            }
            protocol::UDP => {
                let local = SocketAddr::new(quoted.local, quoted.local_port);
                self.udp_error(local, SocketAddr::new(quoted.remote, quoted.remote_port), error);
            }
            protocol::ICMP | protocol::ICMPV6 => {
                let ident = (quoted.word >> 16) as u16;
                self.ping_end(ident, quoted.remote, Err(NetError::Unreachable));
            }
            _ => {}
        }
    }

    fn echo_reply(&mut self, ip: &Ip<'_>, kind: u8) {
        if !self.limit_rate() {
            return self.io.counters.drop_rate_limit.increment();
        }
        let request = ip.payload;
        self.icmp_send(ip.dst, ip.src, request.len(), &mut |buf| {
            put(buf, 0, request);
            put(buf, 0, &[kind, 0, 0, 0]);
        });
    }

    /// Sends a message whose checksum is filled in here.
    pub(crate) fn icmp_send(
        &mut self,
        src: IpAddr,
        dst: IpAddr,
        len: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) {
        let proto = if src.is_ipv4() { protocol::ICMP } else { protocol::ICMPV6 };
        let packet = Outgoing::new(src, dst, proto, len);
        let sent = self.send_ip(packet, Layout::complete(src.is_ipv6()), &mut |buf| {
            fill(buf);
            sum_icmp(buf, src, dst);
        });
        if sent.is_err() {
            self.io.counters.drop_unresolved.increment();
        }
    }

    /// Nobody has the port of a datagram.
    pub(crate) fn icmp_port_unreachable(&mut self, ip: &Ip<'_>) {
        if ip.src.is_ipv4() { self.icmp_error(ip, 3, 3, 0) } else { self.icmp_error(ip, 1, 4, 0) }
    }

    /// We do not speak the protocol of a packet.
    pub(crate) fn icmp_protocol_unreachable(&mut self, ip: &Ip<'_>) {
        if ip.src.is_ipv4() {
            self.icmp_error(ip, 3, 2, 0);
        } else {
            // Parameter problem, unrecognised next header; the pointer is to the field, which our walk ended at.
            self.icmp_error(ip, 4, 1, 6);
        }
    }

    /// Sends an error about `ip` (RFC 1122, 3.2.2: never about an error, a group or an unspecified source).
    fn icmp_error(&mut self, ip: &Ip<'_>, kind: u8, code: u8, word: u32) {
        self.icmp_error_from(ip.dst, ip, kind, code, word);
    }

    /// [`Shard::icmp_error`] by a router, whose address is `from`.
    pub(crate) fn icmp_error_from(&mut self, from: IpAddr, ip: &Ip<'_>, kind: u8, code: u8, word: u32) {
        let is_error = matches!(ip.protocol, protocol::ICMP | protocol::ICMPV6) && quotes(ip);
        if ip.src.is_unspecified() || ip.src.is_multicast() || is_error {
            return;
        }
        if !self.limit_rate() {
            return self.io.counters.drop_rate_limit.increment();
        }
        let quote = ip.whole.get(..ip.whole.len().min(QUOTE)).unwrap_or_default();
        self.icmp_send(from, ip.src, 8 + quote.len(), &mut |buf| {
            put(buf, 0, &[kind, code, 0, 0]);
            put(buf, 4, &word.to_be_bytes());
            put(buf, 8, quote);
        });
    }

    /// Whether one more answer may be sent in this second.
    pub(crate) fn limit_rate(&mut self) -> bool {
        let second = self.now_ns / 1_000_000_000;
        let limit = &mut self.rate_limit;
        if limit.second != second {
            *limit = RateLimit { second, count: 0 };
        }
        limit.count += 1;
        limit.count <= MAX_ERRORS_PER_SECOND
    }

    /// Sends an echo request.
    pub(crate) fn ping_start(&mut self, dst: IpAddr) -> Result<Key> {
        let hop = self.routes.lookup(dst, self.scope).ok_or(NetError::Unreachable)?;
        let src = self.routes.source(dst, hop).ok_or(NetError::AddrNotAvailable)?;
        let ident = self.prf.next_u64() as u16;
        let state = PingState {
            ident,
            dst,
            sent_ns: self.now_ns,
            deadline_ns: self.now_ns + PING_NS,
            result: None,
            waker: None,
        };
        let key = self.pings.insert(state).map_err(|_| NetError::NoMemory)?;
        self.timers.insert(self.now_ns + PING_NS, crate::shard::Timer::Ping(key));
        let kind = if dst.is_ipv4() { 8 } else { 128 };
        self.icmp_send(src, dst, 8 + PING_PAYLOAD, &mut |buf| {
            buf.fill(0);
            put(buf, 0, &[kind, 0, 0, 0]);
            put(buf, 4, &ident.to_be_bytes());
            put(buf, 6, &1u16.to_be_bytes());
        });
        Ok(key)
    }

    fn pong(&mut self, ip: &Ip<'_>) {
        let Some(ident) = be16(ip.payload, 4) else { return };
        let now_ns = self.now_ns;
        self.ping_end(ident, ip.src, Ok(now_ns));
    }

    /// Ends the ping to `dst` with a time of arrival or an error.
    fn ping_end(&mut self, ident: u16, dst: IpAddr, result: Result<u64>) {
        let Some(key) = find_ping(&self.pings, ident, dst) else {
            return self.io.counters.drop_no_socket.increment();
        };
        if let Some(ping) = self.pings.get_mut(key) {
            ping.result = Some(result.map(|at| at.saturating_sub(ping.sent_ns)));
            self.wakers.extend(ping.waker.take());
        }
    }

    pub(crate) fn ping_on_time(&mut self, key: Key) {
        if let Some(ping) = self.pings.get_mut(key)
            && ping.deadline_ns <= self.now_ns
        {
            ping.result.get_or_insert(Err(NetError::TimedOut));
            self.wakers.extend(ping.waker.take());
        }
    }

    pub(crate) fn ping_poll(&mut self, key: Key, cx: &mut Context<'_>) -> Poll<Result<u64>> {
        let Some(ping) = self.pings.get_mut(key) else { return Poll::Ready(Err(NetError::Closed)) };
        match ping.result {
            Some(result) => Poll::Ready(result),
            None => {
                ping.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    pub(crate) fn ping_drop(&mut self, key: Key) {
        self.pings.remove(key);
    }
}

fn find_ping(pings: &Slab<PingState>, ident: u16, dst: IpAddr) -> Option<Key> {
    let waits = |ping: &PingState| ping.ident == ident && ping.dst == dst && ping.result.is_none();
    pings.iter().find(|(_, ping)| waits(ping)).map(|(key, _)| key)
}

/// Fills in the checksum of a message.
pub(crate) fn sum_icmp(buf: &mut [u8], src: IpAddr, dst: IpAddr) {
    put(buf, 2, &[0, 0]);
    let sum = if src.is_ipv4() {
        Sum::default()
    } else {
        Sum::default().pseudo_header(src, dst, protocol::ICMPV6, buf.len())
    };
    let sum = sum.bytes(buf).finish();
    put(buf, 2, &sum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn quotes_take_anything(data: alloc::vec::Vec<u8>, v4: bool) {
            let _ = Quoted::parse(&data, v4);
        }
    }
}
