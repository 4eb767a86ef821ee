//! The DHCPv4 client (RFC 2131): one per interface that is configured so, run by shard 0.

use crate::io::Layout;
use crate::ipv4::Outgoing;
use crate::packet::{Mac, be32, protocol, put};
use crate::shard::Shard;
use alloc::string::String;
use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr, SocketAddr};

pub(crate) const CLIENT_PORT: u16 = 68;
const SERVER_PORT: u16 = 67;

const SECOND_NS: u64 = 1_000_000_000;
/// Length of a message up to its options, and the cookie that begins them.
const FIXED_LEN: usize = 236;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Requests for one offer before starting over.
const REQUEST_TRIES: u8 = 4;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;

/// What a lease gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lease {
    pub(crate) addr: Ipv4Addr,
    pub(crate) prefix: u8,
    pub(crate) router: Option<Ipv4Addr>,
    pub(crate) dns: Vec<IpAddr>,
    server: Ipv4Addr,
    renew_ns: u64,
    rebind_ns: u64,
    lease_ns: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Looking for servers.
    Selecting { tries: u8 },
    /// One offer was taken up.
    Requesting { addr: Ipv4Addr, server: Ipv4Addr, tries: u8 },
    /// The lease runs; renewed from `renew_at_ns` on with its server, from `rebind_at_ns` on with any.
    Bound { lease: Lease, renew_at_ns: u64, rebind_at_ns: u64, ends_at_ns: u64 },
}

/// A client.
#[derive(Debug)]
pub(crate) struct Dhcp {
    mac: Mac,
    hostname: String,
    xid: u32,
    state: State,
    next_ns: u64,
    started_ns: u64,
}

/// A message to send.
pub(crate) struct Send {
    /// Our address if we have one, else unspecified.
    from: Ipv4Addr,
    /// The server, or everybody.
    to: Option<Ipv4Addr>,
    data: Vec<u8>,
}

/// What became of the lease.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Bound(Lease),
    Lost,
}

/// A server's message.
#[derive(Debug)]
struct Reply<'a> {
    xid: u32,
    yours: Ipv4Addr,
    mac: &'a [u8],
    kind: u8,
    mask: Option<Ipv4Addr>,
    router: Option<Ipv4Addr>,
    dns: Vec<IpAddr>,
    lease_s: Option<u32>,
    renew_s: Option<u32>,
    rebind_s: Option<u32>,
    server: Option<Ipv4Addr>,
}

impl<'a> Reply<'a> {
    fn parse(data: &'a [u8]) -> Option<Self> {
        // A reply, over Ethernet.
        if data.get(..3)? != [2, 1, 6] || data.get(FIXED_LEN..FIXED_LEN + 4)? != COOKIE {
            return None;
        }
        let mut reply = Reply {
            xid: be32(data, 4)?,
            yours: be32(data, 16)?.into(),
            mac: data.get(28..34)?,
            kind: 0,
            mask: None,
            router: None,
            dns: Vec::new(),
            lease_s: None,
            renew_s: None,
            rebind_s: None,
            server: None,
        };
        let mut options = data.get(FIXED_LEN + 4..)?;
        loop {
            let (code, rest) = match options.split_first() {
                None | Some((255, _)) => break,
                Some((0, rest)) => {
                    options = rest;
                    continue;
                }
                Some((code, rest)) => (*code, rest),
            };
            let (len, rest) = rest.split_first()?;
            let (value, rest) = rest.split_at_checked(usize::from(*len))?;
            options = rest;
            let address = || be32(value, 0).map(Ipv4Addr::from);
            match code {
                1 => reply.mask = address(),
                3 => reply.router = address(),
                6 => reply.dns.extend(
                    value
                        .chunks_exact(4)
                        .take(4)
                        .filter_map(|chunk| be32(chunk, 0).map(|addr| IpAddr::V4(addr.into()))),
                ),
                51 => reply.lease_s = be32(value, 0),
                53 => reply.kind = *value.first()?,
                54 => reply.server = address(),
                58 => reply.renew_s = be32(value, 0),
                59 => reply.rebind_s = be32(value, 0),
                _ => {}
            }
        }
        Some(reply)
    }

    /// The lease that an ACK grants, if it makes sense.
    fn lease(&self, server: Ipv4Addr) -> Option<Lease> {
        let addr = self.yours;
        if addr.is_unspecified() || addr.is_multicast() || addr.is_broadcast() || addr.is_loopback() {
            return None;
        }
        let mask = self.mask.map_or(0xffff_ff00, u32::from);
        let prefix = mask.leading_ones() as u8;
        if mask.checked_shl(u32::from(prefix)).unwrap_or(0) != 0 {
            return None;
        }
        // RFC 2131, 4.4.5: T1 is half, T2 seven eighths of the lease. At least a minute, against servers that
        // would have us do nothing else.
        let lease_s = u64::from(self.lease_s.unwrap_or(3600)).max(60);
        let rebind_s = self.rebind_s.map_or(lease_s * 7 / 8, u64::from).clamp(20, lease_s);
        let renew_s = self.renew_s.map_or(lease_s / 2, u64::from).clamp(10, rebind_s);
        Some(Lease {
            addr,
            prefix,
            router: self.router.filter(|router| !router.is_unspecified()),
            dns: self.dns.clone(),
            server,
            renew_ns: renew_s * SECOND_NS,
            rebind_ns: rebind_s * SECOND_NS,
            lease_ns: lease_s * SECOND_NS,
        })
    }
}

impl Dhcp {
    pub(crate) fn new(mac: Mac, hostname: &str, xid: u32, now_ns: u64) -> Self {
        Self {
            mac,
            hostname: hostname.chars().filter(char::is_ascii_graphic).take(63).collect(),
            xid,
            state: State::Selecting { tries: 0 },
            next_ns: now_ns,
            started_ns: now_ns,
        }
    }

    pub(crate) fn next_deadline_ns(&self) -> u64 {
        self.next_ns
    }

    /// Something is due.
    pub(crate) fn on_time(&mut self, now_ns: u64, random: u64) -> (Option<Send>, Option<Event>) {
        if now_ns < self.next_ns {
            return (None, None);
        }
        match &mut self.state {
            State::Selecting { tries } => {
                *tries = tries.saturating_add(1);
                // 4.1: doubling from four to 64 seconds, give or take one. We begin with one: servers are near.
                self.next_ns = now_ns + backoff(*tries, random);
                (Some(self.message(DISCOVER, None, now_ns)), None)
            }
            State::Requesting { tries, .. } if *tries >= REQUEST_TRIES => {
                self.start_over(now_ns, random);
                (None, None)
            }
            State::Requesting { tries, addr, server } => {
                *tries += 1;
                let chosen = Some((*addr, *server));
                self.next_ns = now_ns + backoff(*tries, random);
                (Some(self.message(REQUEST, chosen, now_ns)), None)
            }
            State::Bound { ends_at_ns, .. } if *ends_at_ns <= now_ns => {
                self.start_over(now_ns, random);
                (None, Some(Event::Lost))
            }
            State::Bound { rebind_at_ns, ends_at_ns, .. } => {
                // 4.4.5: half of the time that is left until the next stage, at least a minute.
                let stage = if now_ns < *rebind_at_ns { *rebind_at_ns } else { *ends_at_ns };
                self.next_ns = (now_ns + ((stage - now_ns) / 2).max(60 * SECOND_NS)).min(stage);
                (Some(self.message(REQUEST, None, now_ns)), None)
            }
        }
    }

    fn start_over(&mut self, now_ns: u64, random: u64) {
        self.xid = random as u32;
        self.state = State::Selecting { tries: 0 };
        self.next_ns = now_ns;
        self.started_ns = now_ns;
    }

    /// A message from a server.
    pub(crate) fn receive(&mut self, data: &[u8], now_ns: u64, random: u64) -> (Option<Send>, Option<Event>) {
        let Some(reply) = Reply::parse(data).filter(|reply| reply.xid == self.xid && reply.mac == self.mac)
        else {
            return (None, None);
        };
        match (&mut self.state, reply.kind) {
            (State::Selecting { .. }, OFFER) => {
                let Some(server) = reply.server.filter(|_| !reply.yours.is_unspecified()) else {
                    return (None, None);
                };
                self.state = State::Requesting { addr: reply.yours, server, tries: 1 };
                self.next_ns = now_ns + backoff(1, random);
                (Some(self.message(REQUEST, Some((reply.yours, server)), now_ns)), None)
            }
            (State::Requesting { server, .. }, ACK) => {
                let server = *server;
                self.bind(&reply, server, now_ns)
            }
            (State::Bound { lease, renew_at_ns, .. }, ACK) if now_ns >= *renew_at_ns => {
                let server = reply.server.unwrap_or(lease.server);
                self.bind(&reply, server, now_ns)
            }
            (State::Requesting { .. }, NAK) => {
                self.start_over(now_ns, random);
                // Not at once: a server that refuses everything must not keep us busy.
                self.next_ns = now_ns + SECOND_NS;
                (None, None)
            }
            (State::Bound { renew_at_ns, .. }, NAK) if now_ns >= *renew_at_ns => {
                self.start_over(now_ns, random);
                (None, Some(Event::Lost))
            }
            _ => (None, None),
        }
    }

    fn bind(&mut self, reply: &Reply<'_>, server: Ipv4Addr, now_ns: u64) -> (Option<Send>, Option<Event>) {
        let Some(lease) = reply.lease(server) else { return (None, None) };
        let renew_at_ns = now_ns + lease.renew_ns;
        self.next_ns = renew_at_ns;
        self.state = State::Bound {
            renew_at_ns,
            rebind_at_ns: now_ns + lease.rebind_ns,
            ends_at_ns: now_ns + lease.lease_ns,
            lease: lease.clone(),
        };
        (None, Some(Event::Bound(lease)))
    }

    fn message(&self, kind: u8, chosen: Option<(Ipv4Addr, Ipv4Addr)>, now_ns: u64) -> Send {
        let bound = match &self.state {
            State::Bound { lease, rebind_at_ns, .. } => Some((lease, now_ns < *rebind_at_ns)),
            _ => None,
        };
        let from = bound.map_or(Ipv4Addr::UNSPECIFIED, |(lease, _)| lease.addr);
        let mut data = alloc::vec![0; FIXED_LEN];
        put(&mut data, 0, &[1, 1, 6, 0]);
        put(&mut data, 4, &self.xid.to_be_bytes());
        let seconds = ((now_ns - self.started_ns) / SECOND_NS).min(0xffff) as u16;
        put(&mut data, 8, &seconds.to_be_bytes());
        put(&mut data, 12, &from.octets());
        put(&mut data, 28, &self.mac);
        data.extend(COOKIE);
        data.extend([53, 1, kind]);
        data.extend([61, 7, 1]);
        data.extend(self.mac);
        if let Some((addr, server)) = chosen {
            data.extend([50, 4]);
            data.extend(addr.octets());
            data.extend([54, 4]);
            data.extend(server.octets());
        }
        if !self.hostname.is_empty() {
            data.extend([12, self.hostname.len() as u8]);
            data.extend(self.hostname.bytes());
        }
        // Subnet mask, router, name servers, lease and renewal times.
        data.extend([55, 6, 1, 3, 6, 51, 58, 59]);
        data.extend([57, 2]);
        data.extend(1500u16.to_be_bytes());
        data.push(255);
        // RFC 1542, 2.1: no shorter than BOOTP's 300 bytes.
        if data.len() < 300 {
            data.resize(300, 0);
        }
        Send { from, to: bound.filter(|(_, unicast)| *unicast).map(|(lease, _)| lease.server), data }
    }
}

/// Doubling from one second to 64, spread by up to a quarter.
fn backoff(tries: u8, random: u64) -> u64 {
    let base = SECOND_NS << (tries.clamp(1, 7) - 1);
    base - base / 8 + random % (base / 4)
}

impl Shard {
    /// A datagram for the DHCP client's port.
    pub(crate) fn dhcp_in(&mut self, iface: usize, data: &[u8]) {
        let random = self.prf.next_u64();
        let now_ns = self.now_ns;
        let Some(dhcp) = self.control.get_mut(iface).and_then(|control| control.dhcp.as_mut()) else {
            return self.io.counters.drop_no_socket.increment();
        };
        let (send, event) = dhcp.receive(data, now_ns, random);
        self.dhcp_act(iface, send, event);
    }

    /// Runs the clients that are due.
    pub(crate) fn dhcp_on_time(&mut self) {
        for iface in 0..self.control.len() {
            let random = self.prf.next_u64();
            let now_ns = self.now_ns;
            let Some(dhcp) = self.control.get_mut(iface).and_then(|control| control.dhcp.as_mut()) else {
                continue;
            };
            let (send, event) = dhcp.on_time(now_ns, random);
            self.dhcp_act(iface, send, event);
        }
    }

    fn dhcp_act(&mut self, iface: usize, send: Option<Send>, event: Option<Event>) {
        if let Some(Send { from, to, data }) = send {
            let source = SocketAddr::from((from, CLIENT_PORT));
            match to {
                Some(server) => {
                    // An error means that the address went away under us; the client asks everybody soon.
                    let _ = self.udp_send_from(source, &data, SocketAddr::from((server, SERVER_PORT)));
                }
                None => self.dhcp_broadcast(iface, from, &data),
            }
        }
        match event {
            Some(Event::Bound(lease)) => {
                log::info!("nic{iface}: {}/{} from DHCP server {}", lease.addr, lease.prefix, lease.server);
                let changed = self
                    .routes
                    .get(iface)
                    .is_none_or(|interface| interface.v4.as_slice() != [(lease.addr, lease.prefix)]);
                self.configure(iface, |interface, settings| {
                    interface.v4 = alloc::vec![(lease.addr, lease.prefix)];
                    let configured = settings.gateways.iter().find_map(|gateway| match gateway {
                        IpAddr::V4(gateway) => Some(*gateway),
                        IpAddr::V6(_) => None,
                    });
                    interface.gateway_v4 = configured.or(lease.router);
                    interface.dns = settings.dns.clone();
                    interface.dns.extend(&lease.dns);
                    interface.configured_v4 = true;
                });
                if changed {
                    self.arp_announce(iface, lease.addr);
                }
            }
            Some(Event::Lost) => {
                log::warn!("nic{iface}: the DHCP lease ended and was not renewed");
                self.configure(iface, |interface, _| {
                    interface.v4.clear();
                    interface.gateway_v4 = None;
                });
            }
            None => {}
        }
    }

    fn dhcp_broadcast(&mut self, iface: usize, from: Ipv4Addr, data: &[u8]) {
        let dst = IpAddr::V4(Ipv4Addr::BROADCAST);
        let len = 8 + data.len();
        let packet = Outgoing::new(IpAddr::V4(from), dst, protocol::UDP, len);
        self.broadcast_v4(iface, packet, Layout::udp(false), &mut |buf| {
            put(buf, 0, &CLIENT_PORT.to_be_bytes());
            put(buf, 2, &SERVER_PORT.to_be_bytes());
            put(buf, 4, &(len as u16).to_be_bytes());
            put(buf, 6, &[0, 0]);
            put(buf, 8, data);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 1];

    fn reply(to: &Send, kind: u8, options: &[u8]) -> Vec<u8> {
        let mut data = to.data[..FIXED_LEN].to_vec();
        data[0] = 2;
        put(&mut data, 16, &[10, 0, 0, 9]);
        data.extend(COOKIE);
        data.extend([53, 1, kind, 54, 4, 10, 0, 0, 1]);
        data.extend(options);
        data.push(255);
        data
    }

    const LEASE: &[u8] = &[1, 4, 255, 255, 255, 0, 3, 4, 10, 0, 0, 1, 51, 4, 0, 0, 1, 44, 6, 4, 10, 0, 0, 3];

    fn bound() -> (Dhcp, u64) {
        let mut dhcp = Dhcp::new(MAC, "host", 7, 0);
        let discover = dhcp.on_time(0, 1).0.unwrap();
        let request = dhcp.receive(&reply(&discover, OFFER, LEASE), 5, 1).0.unwrap();
        let (_, event) = dhcp.receive(&reply(&request, ACK, LEASE), 10, 1);
        let Some(Event::Bound(lease)) = event else { panic!("no lease") };
        assert_eq!((lease.addr, lease.prefix), (Ipv4Addr::new(10, 0, 0, 9), 24));
        assert_eq!(lease.router, Some(Ipv4Addr::new(10, 0, 0, 1)));
        assert_eq!(lease.dns, [IpAddr::V4(Ipv4Addr::new(10, 0, 0, 3))]);
        (dhcp, 10)
    }

    #[test]
    fn renews_at_half_and_loses_at_the_end() {
        let (mut dhcp, at) = bound();
        assert_eq!(dhcp.next_deadline_ns(), at + 150 * SECOND_NS);
        let renew = dhcp.on_time(at + 150 * SECOND_NS, 1).0.unwrap();
        assert_eq!(renew.to, Some(Ipv4Addr::new(10, 0, 0, 1)));
        assert_eq!(renew.from, Ipv4Addr::new(10, 0, 0, 9));
        let mut lost = false;
        for _ in 0..20 {
            let now = dhcp.next_deadline_ns();
            lost |= dhcp.on_time(now, 1).1 == Some(Event::Lost);
            if lost {
                assert_eq!(now, at + 300 * SECOND_NS);
                break;
            }
        }
        assert!(lost);
    }

    #[test]
    fn a_stranger_cannot_answer() {
        let mut dhcp = Dhcp::new(MAC, "", 7, 0);
        let discover = dhcp.on_time(0, 1).0.unwrap();
        let mut offer = reply(&discover, OFFER, LEASE);
        offer[4] ^= 1;
        assert!(dhcp.receive(&offer, 1, 1).0.is_none());
        // An ACK without a request is nothing.
        assert!(dhcp.receive(&reply(&discover, ACK, LEASE), 1, 1).1.is_none());
    }

    #[test]
    fn a_refusal_starts_over_later() {
        let mut dhcp = Dhcp::new(MAC, "", 7, 0);
        let discover = dhcp.on_time(0, 1).0.unwrap();
        let request = dhcp.receive(&reply(&discover, OFFER, LEASE), 5, 1).0.unwrap();
        dhcp.receive(&reply(&request, NAK, &[]), 6, 99);
        assert_eq!(dhcp.next_deadline_ns(), 6 + SECOND_NS);
    }

    proptest! {
        #[test]
        fn parsing_takes_anything(mut data in proptest::collection::vec(any::<u8>(), 230..400)) {
            data[..3].copy_from_slice(&[2, 1, 6]);
            data[228..230].copy_from_slice(&[0, 0]);
            if data.len() >= FIXED_LEN + 4 {
                data[FIXED_LEN..FIXED_LEN + 4].copy_from_slice(&COOKIE);
            }
            if let Some(reply) = Reply::parse(&data) {
                let _ = reply.lease(Ipv4Addr::LOCALHOST);
            }
        }
    }
}
