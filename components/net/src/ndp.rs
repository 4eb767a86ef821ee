//! Neighbour discovery (RFC 4861) and address configuration without a server (RFC 4862): link-local addresses,
//! duplicate address detection, router advertisements with prefixes and name servers (RFC 8106). Run by shard 0.

use crate::config::Ipv6Setting;
use crate::io::Layout;
use crate::ipv4::Outgoing;
use crate::packet::{Ip, Mac, be16, be32, protocol, put};
use crate::route::{Hop, solicited_node};
use crate::shard::Shard;
use alloc::vec::Vec;
use core::net::{IpAddr, Ipv6Addr};

const SECOND_NS: u64 = 1_000_000_000;
/// RFC 4862, 5.1: one probe, one second (RETRANS_TIMER).
const DAD_NS: u64 = SECOND_NS;
/// RFC 4861, 10: MAX_RTR_SOLICITATIONS and RTR_SOLICITATION_INTERVAL.
const ROUTER_SOLICITS: u8 = 3;
const ROUTER_SOLICIT_NS: u64 = 4 * SECOND_NS;
/// Most addresses of an interface; a router that advertises more is ignored.
const MAX_ADDRESSES: usize = 8;
/// RFC 4862, 5.5.3 e: an unauthenticated advertisement cannot shorten a lifetime below this.
const TWO_HOURS_NS: u64 = 7200 * SECOND_NS;

const ROUTER_SOLICIT: u8 = 133;
const ROUTER_ADVERT: u8 = 134;
const NEIGHBOR_SOLICIT: u8 = 135;
const NEIGHBOR_ADVERT: u8 = 136;

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);

#[derive(Debug, Clone)]
struct Address {
    addr: Ipv6Addr,
    prefix: u8,
    /// Being checked for duplicates until then.
    dad_until_ns: Option<u64>,
    valid_until_ns: Option<u64>,
    probed: bool,
}

/// IPv6 configuration of one interface.
#[derive(Debug)]
pub(crate) struct Ndp {
    interface_id: u64,
    auto: bool,
    addresses: Vec<Address>,
    router: Option<(Ipv6Addr, u64)>,
    dns: Vec<(Ipv6Addr, u64)>,
    solicits: u8,
    next_solicit_ns: Option<u64>,
}

/// What is to be done for an interface.
#[derive(Debug, PartialEq, Eq)]
enum Act {
    /// Ask whether somebody has the address.
    Probe(Ipv6Addr),
    SolicitRouter,
    /// Addresses or routers changed.
    Update,
}

/// The modified EUI-64 of a MAC address (RFC 4291, appendix A).
fn interface_id(mac: Mac) -> u64 {
    let [a, b, c, d, e, f] = mac;
    u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

fn with_prefix(prefix: Ipv6Addr, interface_id: u64) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(prefix) & !u128::from(u64::MAX) | u128::from(interface_id))
}

/// What a router advertises.
#[derive(Debug, Default, PartialEq, Eq)]
struct RouterAdvert {
    lifetime_s: u16,
    prefixes: Vec<(Ipv6Addr, u32)>,
    dns: Vec<(Ipv6Addr, u32)>,
    mac: Option<Mac>,
}

/// Walks options: `None` if one is malformed, for which RFC 4861 drops the whole message.
fn options(mut data: &[u8]) -> Option<Vec<(u8, &[u8])>> {
    let mut found = Vec::new();
    while let Some((&[kind, units], _)) = data.split_first_chunk::<2>() {
        let (option, rest) = data.split_at_checked(usize::from(units) * 8)?;
        if units == 0 {
            return None;
        }
        found.push((kind, option));
        data = rest;
    }
    data.is_empty().then_some(found)
}

fn link_address(options: &[(u8, &[u8])], kind: u8) -> Option<Mac> {
    let (_, option) = options.iter().find(|(of, _)| *of == kind)?;
    Some(*option.get(2..)?.first_chunk()?)
}

impl RouterAdvert {
    fn parse(data: &[u8]) -> Option<Self> {
        let mut advert = RouterAdvert { lifetime_s: be16(data, 6)?, ..Self::default() };
        let options = options(data.get(16..)?)?;
        for (kind, option) in &options {
            let address = |at: usize| Some(Ipv6Addr::from(*option.get(at..)?.first_chunk::<16>()?));
            match kind {
                // Prefix information with the A flag; RFC 4862 wants 64 bits for a 64-bit interface identifier.
                3 if option.get(2) == Some(&64) && option.get(3).is_some_and(|flags| flags & 0x40 != 0) => {
                    let prefix = address(16)?;
                    if !prefix.is_unicast_link_local() && !prefix.is_multicast() {
                        advert.prefixes.push((prefix, be32(option, 4)?));
                    }
                }
                25 => {
                    let lifetime = be32(option, 4)?;
                    let servers = (8..option.len()).step_by(16).filter_map(address);
                    advert.dns.extend(servers.take(4).map(|server| (server, lifetime)));
                }
                _ => {}
            }
        }
        advert.mac = link_address(&options, 1);
        Some(advert)
    }
}

impl Ndp {
    pub(crate) fn new(mac: Mac, setting: Ipv6Setting, now_ns: u64) -> Self {
        let interface_id = interface_id(mac);
        let mut addresses = Vec::new();
        let mut add = |addr, prefix| {
            addresses.push(Address {
                addr,
                prefix,
                dad_until_ns: Some(now_ns + DAD_NS),
                valid_until_ns: None,
                probed: false,
            });
        };
        if setting != Ipv6Setting::None {
            add(with_prefix(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), interface_id), 64);
        }
        if let Ipv6Setting::Static(addr, prefix) = setting {
            add(addr, prefix);
        }
        let auto = setting == Ipv6Setting::Auto;
        Self {
            interface_id,
            auto,
            addresses,
            router: None,
            dns: Vec::new(),
            solicits: 0,
            next_solicit_ns: auto.then_some(now_ns + DAD_NS),
        }
    }

    pub(crate) fn next_deadline_ns(&self) -> Option<u64> {
        let addresses = self.addresses.iter().flat_map(|address| {
            let probe = (!address.probed).then_some(0);
            [probe, address.dad_until_ns, address.valid_until_ns]
        });
        let lifetimes = self.dns.iter().map(|(_, until)| Some(*until));
        addresses
            .chain(lifetimes)
            .chain([self.next_solicit_ns, self.router.map(|(_, until)| until)])
            .flatten()
            .min()
    }

    fn on_time(&mut self, now_ns: u64) -> Vec<Act> {
        let mut acts = Vec::new();
        let mut changed = false;
        for address in &mut self.addresses {
            if !address.probed {
                address.probed = true;
                acts.push(Act::Probe(address.addr));
                changed = true;
            }
            if address.dad_until_ns.is_some_and(|until| until <= now_ns) {
                address.dad_until_ns = None;
                changed = true;
            }
        }
        let expired = |until: Option<u64>| until.is_some_and(|until| until <= now_ns);
        let before = (self.addresses.len(), self.dns.len(), self.router.is_some());
        self.addresses.retain(|address| !expired(address.valid_until_ns));
        self.dns.retain(|(_, until)| *until > now_ns);
        if expired(self.router.map(|(_, until)| until)) {
            self.router = None;
        }
        changed |= before != (self.addresses.len(), self.dns.len(), self.router.is_some());
        if self.next_solicit_ns.is_some_and(|at| at <= now_ns) {
            self.solicits += 1;
            self.next_solicit_ns = (self.solicits < ROUTER_SOLICITS).then_some(now_ns + ROUTER_SOLICIT_NS);
            acts.push(Act::SolicitRouter);
        }
        if changed {
            acts.push(Act::Update);
        }
        acts
    }

    /// Takes in an advertisement. Whether it changed anything that others look at.
    fn advertised(&mut self, router: Ipv6Addr, advert: &RouterAdvert, now_ns: u64) -> bool {
        if !self.auto {
            return false;
        }
        self.next_solicit_ns = None;
        let until = |seconds: u64| now_ns.saturating_add(seconds.saturating_mul(SECOND_NS));
        let before = self.router.map(|(addr, _)| addr);
        if advert.lifetime_s > 0 {
            // The first router stays while it is there: no balancing between routers that nobody asked for.
            if self.router.is_none_or(|(addr, _)| addr == router) {
                self.router = Some((router, until(u64::from(advert.lifetime_s))));
            }
        } else if before == Some(router) {
            self.router = None;
        }
        let mut changed = before != self.router.map(|(addr, _)| addr);
        for (prefix, valid_s) in &advert.prefixes {
            let addr = with_prefix(*prefix, self.interface_id);
            let valid = until(u64::from(*valid_s));
            let full = self.addresses.len() >= MAX_ADDRESSES;
            match self.addresses.iter_mut().find(|address| address.addr == addr) {
                Some(Address { valid_until_ns: Some(known), .. }) => {
                    let floor = (*known).min(now_ns + TWO_HOURS_NS);
                    *known = valid.max(floor);
                }
                Some(_) => {}
                None if *valid_s == 0 || full => {}
                None => {
                    self.addresses.push(Address {
                        addr,
                        prefix: 64,
                        dad_until_ns: Some(now_ns + DAD_NS),
                        valid_until_ns: Some(valid),
                        probed: false,
                    });
                    changed = true;
                }
            }
        }
        for (server, lifetime_s) in &advert.dns {
            self.dns.retain(|(known, _)| known != server);
            if *lifetime_s > 0 && self.dns.len() < 4 {
                self.dns.push((*server, until(u64::from(*lifetime_s))));
                changed = true;
            }
        }
        changed
    }

    /// Somebody else has, or wants, an address that we are checking.
    fn conflict(&mut self, addr: Ipv6Addr) -> bool {
        let before = self.addresses.len();
        self.addresses.retain(|address| address.addr != addr || address.dad_until_ns.is_none());
        self.addresses.len() != before
    }
}

impl Shard {
    /// Takes in an ICMPv6 message.
    pub(crate) fn icmpv6_in(&mut self, iface: usize, ip: &Ip<'_>, direct: bool) {
        if !ip.transport_checksum_ok() {
            return self.io.counters.drop_checksum.increment();
        }
        match ip.payload.first() {
            Some(kind @ ROUTER_SOLICIT..=137) => {
                // RFC 4861, 6.1 and 7.1: nothing that was forwarded.
                if ip.hop_limit != 255 || ip.payload.get(1) != Some(&0) || iface == crate::route::LOOPBACK {
                    return self.io.counters.drop_malformed.increment();
                }
                let taken = match *kind {
                    NEIGHBOR_SOLICIT => self.neighbor_solicit_in(iface, ip),
                    NEIGHBOR_ADVERT => self.neighbor_advert_in(iface, ip),
                    ROUTER_ADVERT => self.router_advert_in(iface, ip),
                    _ => return self.io.counters.drop_protocol.increment(),
                };
                if taken.is_none() {
                    self.io.counters.drop_malformed.increment();
                }
            }
            _ => self.icmpv6_other_in(ip, direct),
        }
    }

    fn neighbor_solicit_in(&mut self, iface: usize, ip: &Ip<'_>) -> Option<()> {
        let target = Ipv6Addr::from(*ip.payload.get(8..)?.first_chunk::<16>()?);
        let options = options(ip.payload.get(24..)?)?;
        let source = link_address(&options, 1);
        let interface = self.routes.get(iface)?;
        if interface.tentative.contains(&target) {
            // RFC 4862, 5.4.3: another host probes the address that we probe.
            if ip.src.is_unspecified() {
                self.dad_failed(iface, target);
            }
            return Some(());
        }
        if !interface.v6.iter().any(|(own, _)| *own == target) {
            return Some(());
        }
        if ip.src.is_unspecified() {
            // A probe for our address: tell everybody whose it is.
            self.neighbor_advert(iface, target, ALL_NODES, 0x20);
            return Some(());
        }
        if let Some(mac) = source.filter(|mac| mac[0] & 1 == 0) {
            self.neighbor_seen(iface, ip.src, mac, true);
        }
        let IpAddr::V6(to) = ip.src else { return None };
        self.neighbor_advert(iface, target, to, 0x60);
        Some(())
    }

    fn neighbor_advert_in(&mut self, iface: usize, ip: &Ip<'_>) -> Option<()> {
        let target = Ipv6Addr::from(*ip.payload.get(8..)?.first_chunk::<16>()?);
        let options = options(ip.payload.get(24..)?)?;
        if self.routes.get(iface)?.tentative.contains(&target) {
            self.dad_failed(iface, target);
            return Some(());
        }
        if let Some(mac) = link_address(&options, 2).filter(|mac| mac[0] & 1 == 0) {
            // Only entries that exist: nobody may fill the cache by advertising.
            self.neighbor_seen(iface, IpAddr::V6(target), mac, false);
        }
        Some(())
    }

    fn router_advert_in(&mut self, iface: usize, ip: &Ip<'_>) -> Option<()> {
        let IpAddr::V6(router) = ip.src else { return None };
        let advert = RouterAdvert::parse(ip.payload)?;
        if !router.is_unicast_link_local() {
            return None;
        }
        if let Some(mac) = advert.mac.filter(|mac| mac[0] & 1 == 0) {
            self.neighbor_seen(iface, ip.src, mac, true);
        }
        let now_ns = self.now_ns;
        let control = self.control.get_mut(iface)?;
        if control.ndp.advertised(router, &advert, now_ns) {
            self.ndp_on_time();
            self.ndp_update(iface);
        }
        Some(())
    }

    fn dad_failed(&mut self, iface: usize, addr: Ipv6Addr) {
        if self.control.get_mut(iface).is_some_and(|control| control.ndp.conflict(addr)) {
            log::warn!("nic{iface}: {addr} is in use by another host; not using it");
            self.ndp_update(iface);
        }
    }

    /// Runs what is due on every interface.
    pub(crate) fn ndp_on_time(&mut self) {
        for iface in 0..self.control.len() {
            let now_ns = self.now_ns;
            let Some(control) = self.control.get_mut(iface) else { continue };
            for act in control.ndp.on_time(now_ns) {
                match act {
                    Act::Probe(addr) => {
                        let group = solicited_node(addr);
                        self.neighbor_solicit(iface, Ipv6Addr::UNSPECIFIED, addr, group, None);
                    }
                    Act::SolicitRouter => self.router_solicit(iface),
                    Act::Update => self.ndp_update(iface),
                }
            }
        }
    }

    fn ndp_update(&mut self, iface: usize) {
        let Some(control) = self.control.get(iface) else { return };
        let ndp = &control.ndp;
        let of = |tentative: bool| {
            let state = move |address: &&Address| address.dad_until_ns.is_some() == tentative;
            ndp.addresses.iter().filter(state).map(|address| (address.addr, address.prefix))
        };
        let v6: Vec<_> = of(false).collect();
        let tentative: Vec<_> = of(true).map(|(addr, _)| addr).collect();
        let router = ndp.router.map(|(router, _)| router);
        let dns: Vec<_> = ndp.dns.iter().map(|(server, _)| IpAddr::V6(*server)).collect();
        self.configure(iface, |interface, settings| {
            if let Some((addr, _)) = v6.iter().find(|known| !interface.v6.contains(known)) {
                log::info!("{}: {addr}", interface.name);
            }
            interface.v6 = v6;
            interface.configured_v6 |= tentative.is_empty();
            interface.tentative = tentative;
            let named = settings.gateways.iter().find_map(|gateway| match gateway {
                IpAddr::V6(gateway) => Some(*gateway),
                IpAddr::V4(_) => None,
            });
            interface.gateway_v6 = named.or(router);
            interface.dns.retain(|server| server.is_ipv4() || settings.dns.contains(server));
            interface.dns.extend(dns.iter().filter(|server| !settings.dns.contains(server)));
        });
    }

    /// Asks who has `target`: everybody, or the one who had it.
    pub(crate) fn ndp_solicit(&mut self, iface: usize, target: Ipv6Addr, to: Option<Mac>) {
        let hop = Hop { iface, next: IpAddr::V6(target) };
        let Some(IpAddr::V6(source)) = self.routes.source(IpAddr::V6(target), hop) else { return };
        let dst = if to.is_some() { target } else { solicited_node(target) };
        self.neighbor_solicit(iface, source, target, dst, to);
    }

    fn neighbor_solicit(
        &mut self,
        iface: usize,
        src: Ipv6Addr,
        target: Ipv6Addr,
        dst: Ipv6Addr,
        to: Option<Mac>,
    ) {
        let own = self.io.mac(iface);
        let with_option = !src.is_unspecified();
        let len = if with_option { 32 } else { 24 };
        self.ndp_send(iface, src, dst, to, len, &mut |buf| {
            put(buf, 0, &[NEIGHBOR_SOLICIT, 0]);
            put(buf, 8, &target.octets());
            if with_option {
                put(buf, 24, &[1, 1]);
                put(buf, 26, &own);
            }
        });
    }

    fn neighbor_advert(&mut self, iface: usize, target: Ipv6Addr, to: Ipv6Addr, flags: u8) {
        let own = self.io.mac(iface);
        self.ndp_send(iface, target, to, None, 32, &mut |buf| {
            put(buf, 0, &[NEIGHBOR_ADVERT, 0, 0, 0, flags]);
            put(buf, 8, &target.octets());
            put(buf, 24, &[2, 1]);
            put(buf, 26, &own);
        });
    }

    fn router_solicit(&mut self, iface: usize) {
        let own = self.io.mac(iface);
        let hop = Hop { iface, next: IpAddr::V6(ALL_ROUTERS) };
        let source = match self.routes.source(IpAddr::V6(ALL_ROUTERS), hop) {
            Some(IpAddr::V6(source)) => source,
            _ => Ipv6Addr::UNSPECIFIED,
        };
        let with_option = !source.is_unspecified();
        let len = if with_option { 16 } else { 8 };
        self.ndp_send(iface, source, ALL_ROUTERS, None, len, &mut |buf| {
            put(buf, 0, &[ROUTER_SOLICIT, 0]);
            if with_option {
                put(buf, 8, &[1, 1]);
                put(buf, 10, &own);
            }
        });
    }

    fn ndp_send(
        &mut self,
        iface: usize,
        src: Ipv6Addr,
        dst: Ipv6Addr,
        to: Option<Mac>,
        len: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) {
        let (src, dst) = (IpAddr::V6(src), IpAddr::V6(dst));
        let mut packet = Outgoing::new(src, dst, protocol::ICMPV6, len);
        packet.hop_limit = 255;
        let mut write = |buf: &mut [u8]| {
            crate::packet::write_ip_header(buf, src, dst, packet.protocol, packet.hop_limit, len);
            if let Some(payload) = buf.get_mut(40..) {
                payload.fill(0);
                fill(payload);
                crate::icmp::sum_icmp(payload, src, dst);
            }
        };
        let layout = Layout::complete(true);
        match to {
            Some(mac) => self.io.transmit(iface, mac, 40 + len, layout, &mut write),
            None => self.send_packet(Hop { iface, next: dst }, 40 + len, layout, &mut write),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parsing_takes_anything(data: Vec<u8>) {
            let _ = RouterAdvert::parse(&data);
            let _ = options(&data);
        }
    }

    const MAC: Mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

    #[test]
    fn link_local_address_after_detection() {
        let mut ndp = Ndp::new(MAC, Ipv6Setting::Auto, 0);
        let own: Ipv6Addr = "fe80::5054:ff:fe12:3456".parse().unwrap();
        assert_eq!(ndp.on_time(0), [Act::Probe(own), Act::Update]);
        assert!(ndp.addresses[0].dad_until_ns.is_some());
        assert_eq!(ndp.on_time(DAD_NS), [Act::SolicitRouter, Act::Update]);
        assert!(ndp.addresses[0].dad_until_ns.is_none());
        assert!(!ndp.conflict(own), "too late to be a conflict");
    }

    #[test]
    fn many_prefixes_are_bounded_and_lifetimes_end() {
        let mut ndp = Ndp::new(MAC, Ipv6Setting::Auto, 0);
        let prefixes = (0..100u16).map(|n| (Ipv6Addr::new(0x2001, 0xdb8, n, 0, 0, 0, 0, 0), 100)).collect();
        let router = "fe80::1".parse().unwrap();
        let advert = RouterAdvert { lifetime_s: 10, prefixes, ..Default::default() };
        assert!(ndp.advertised(router, &advert, 0));
        assert_eq!(ndp.addresses.len(), MAX_ADDRESSES);
        assert_eq!(ndp.router.unwrap().0, router);
        ndp.on_time(10 * SECOND_NS);
        assert!(ndp.router.is_none());
        // A shorter lifetime than two hours is not taken from an advertisement, unless it was so short before.
        ndp.on_time(100 * SECOND_NS);
        assert_eq!(ndp.addresses.len(), 1);
    }
}
