//! Addresses and routes. Changed by the control plane of shard 0, which gives every shard the new table.

use crate::packet::Mac;
use alloc::{string::String, vec::Vec};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The number of the interface that leads back to ourselves.
pub(crate) const LOOPBACK: usize = usize::MAX;

/// Largest IP packet over the loopback interface.
pub(crate) const LOOPBACK_MTU: u16 = 16_384;

/// An interface as routing sees it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interface {
    pub(crate) name: String,
    pub(crate) mac: Mac,
    pub(crate) mtu: u16,
    pub(crate) v4: Vec<(Ipv4Addr, u8)>,
    /// Usable addresses: those that passed duplicate address detection.
    pub(crate) v6: Vec<(Ipv6Addr, u8)>,
    /// Addresses under duplicate address detection.
    pub(crate) tentative: Vec<Ipv6Addr>,
    /// Subnets behind other routers: address, prefix length, router.
    pub(crate) routes_v4: Vec<(Ipv4Addr, u8, Ipv4Addr)>,
    pub(crate) gateway_v4: Option<Ipv4Addr>,
    pub(crate) gateway_v6: Option<Ipv6Addr>,
    pub(crate) dns: Vec<IpAddr>,
    /// Has the IPv4 and the IPv6 addresses that it was configured to get.
    pub(crate) configured_v4: bool,
    pub(crate) configured_v6: bool,
    /// Unplugged; it keeps its number.
    pub(crate) gone: bool,
}

/// All interfaces.
#[derive(Debug, Clone, Default)]
pub(crate) struct Routes {
    pub(crate) interfaces: Vec<Interface>,
    /// Packets for others are passed on.
    pub(crate) forward: bool,
}

/// Where a packet goes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hop {
    /// Index of the interface, or [`LOOPBACK`].
    pub(crate) iface: usize,
    /// Whose link address is asked for: the destination or a router.
    pub(crate) next: IpAddr,
}

/// What a destination address means to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// One of our addresses.
    Ours,
    /// A group or broadcast address that we listen to.
    Group,
    /// Somebody else's.
    Foreign,
}

pub(crate) fn same_v4(a: Ipv4Addr, b: Ipv4Addr, prefix: u8) -> bool {
    let shift = 32 - u32::from(prefix.min(32));
    (u32::from(a) ^ u32::from(b)).checked_shr(shift).unwrap_or(0) == 0
}

pub(crate) fn same_v6(a: Ipv6Addr, b: Ipv6Addr, prefix: u8) -> bool {
    let shift = 128 - u32::from(prefix.min(128));
    (u128::from(a) ^ u128::from(b)).checked_shr(shift).unwrap_or(0) == 0
}

/// `ff02::1:ffXX:XXXX` of an address (RFC 4291, 2.7.1).
pub(crate) fn solicited_node(addr: Ipv6Addr) -> Ipv6Addr {
    let low = u128::from(addr) & 0xff_ffff;
    Ipv6Addr::from(0xff02_0000_0000_0000_0000_0001_ff00_0000u128 | low)
}

/// Link address of a multicast group (RFC 1112, 6.4; RFC 2464, 7).
pub(crate) fn multicast_mac(group: IpAddr) -> Mac {
    match group {
        IpAddr::V4(v4) => {
            let [_, b, c, d] = v4.octets();
            [0x01, 0x00, 0x5e, b & 0x7f, c, d]
        }
        IpAddr::V6(v6) => {
            let [.., a, b, c, d] = v6.octets();
            [0x33, 0x33, a, b, c, d]
        }
    }
}

impl Interface {
    fn is_broadcast(&self, addr: Ipv4Addr) -> bool {
        addr.is_broadcast()
            || self.v4.iter().any(|(own, prefix)| {
                let host_bits = u32::MAX.checked_shr(u32::from(*prefix)).unwrap_or(0);
                // RFC 3021: a /31 has no broadcast address.
                *prefix < 31 && u32::from(addr) == u32::from(*own) | host_bits
            })
    }

    fn on_link(&self, addr: IpAddr) -> bool {
        match addr {
            IpAddr::V4(addr) => self.v4.iter().any(|(own, prefix)| same_v4(*own, addr, *prefix)),
            IpAddr::V6(addr) => {
                addr.is_unicast_link_local()
                    || self.v6.iter().any(|(own, prefix)| same_v6(*own, addr, *prefix))
            }
        }
    }

    fn gateway(&self, v4: bool) -> Option<IpAddr> {
        if v4 { self.gateway_v4.map(IpAddr::V4) } else { self.gateway_v6.map(IpAddr::V6) }
    }
}

impl Routes {
    pub(crate) fn get(&self, iface: usize) -> Option<&Interface> {
        self.interfaces.get(iface)
    }

    /// Largest IP packet that the interface carries.
    pub(crate) fn mtu(&self, iface: usize) -> u16 {
        self.get(iface).map_or(LOOPBACK_MTU, |interface| interface.mtu)
    }

    /// Whether packets to `addr` stay here.
    pub(crate) fn is_ours(&self, addr: IpAddr) -> bool {
        match addr {
            IpAddr::V4(v4) => {
                v4.is_loopback()
                    || self.interfaces.iter().any(|interface| interface.v4.iter().any(|(own, _)| *own == v4))
            }
            IpAddr::V6(v6) => {
                v6.is_loopback()
                    || self.interfaces.iter().any(|interface| interface.v6.iter().any(|(own, _)| *own == v6))
            }
        }
    }

    /// What `dst` of a packet that came in on `iface` means.
    pub(crate) fn classify(&self, iface: usize, dst: IpAddr) -> Class {
        if self.is_ours(dst) {
            return Class::Ours;
        }
        let interface = self.get(iface);
        let group = match dst {
            IpAddr::V4(v4) => {
                v4 == Ipv4Addr::new(224, 0, 0, 1)
                    || v4.is_broadcast()
                    || interface.is_some_and(|interface| interface.is_broadcast(v4))
            }
            IpAddr::V6(v6) => {
                v6 == Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1)
                    || interface.is_some_and(|interface| {
                        let own = interface.v6.iter().map(|(own, _)| *own);
                        own.chain(interface.tentative.iter().copied()).any(|own| solicited_node(own) == v6)
                    })
            }
        };
        if group { Class::Group } else { Class::Foreign }
    }

    /// The next hop of `dst`. `scope` is the interface of a link-local address, 1 for the first, 0 for any.
    pub(crate) fn lookup(&self, dst: IpAddr, scope: u32) -> Option<Hop> {
        if self.is_ours(dst) {
            return Some(Hop { iface: LOOPBACK, next: dst });
        }
        let candidates = || {
            self.interfaces
                .iter()
                .enumerate()
                .filter(move |(index, _)| scope == 0 || *index as u32 + 1 == scope)
        };
        let to = |(iface, _): (usize, &Interface)| Hop { iface, next: dst };
        if dst.is_multicast() || dst == IpAddr::V4(Ipv4Addr::BROADCAST) {
            return candidates().next().map(to);
        }
        if let Some(found) = candidates().find(|(_, interface)| interface.on_link(dst)) {
            return Some(to(found));
        }
        if let IpAddr::V4(v4) = dst {
            let routes = candidates().flat_map(|(iface, interface)| {
                let to_it =
                    interface.routes_v4.iter().filter(move |(to, prefix, _)| same_v4(*to, v4, *prefix));
                to_it.map(move |(_, prefix, via)| (*prefix, Hop { iface, next: IpAddr::V4(*via) }))
            });
            if let Some((_, hop)) = routes.max_by_key(|(prefix, _)| *prefix) {
                return Some(hop);
            }
        }
        candidates()
            .find_map(|(iface, interface)| interface.gateway(dst.is_ipv4()).map(|next| Hop { iface, next }))
    }

    /// The link address of a hop that needs no question: groups and broadcasts.
    pub(crate) fn fixed_mac(&self, hop: Hop) -> Option<Mac> {
        if hop.next.is_multicast() {
            return Some(multicast_mac(hop.next));
        }
        match hop.next {
            IpAddr::V4(v4) if self.get(hop.iface).is_some_and(|interface| interface.is_broadcast(v4)) => {
                Some(crate::packet::BROADCAST)
            }
            _ => None,
        }
    }

    /// Our address for packets to `dst` by `hop`: of the same subnet if there is one (RFC 1122, 3.3.4.3), of the same
    /// scope and with the longest common prefix (RFC 6724, 5, rules 2 and 8).
    pub(crate) fn source(&self, dst: IpAddr, hop: Hop) -> Option<IpAddr> {
        if hop.iface == LOOPBACK {
            return Some(dst);
        }
        let interface = self.get(hop.iface)?;
        match (dst, hop.next) {
            (IpAddr::V4(_), IpAddr::V4(next)) => interface
                .v4
                .iter()
                .find(|(own, prefix)| same_v4(*own, next, *prefix))
                .or(interface.v4.first())
                .map(|(own, _)| IpAddr::V4(*own)),
            (IpAddr::V6(dst), _) => {
                let link_local = dst.is_unicast_link_local() || dst.is_multicast();
                interface
                    .v6
                    .iter()
                    .max_by_key(|(own, _)| {
                        let common = (u128::from(*own) ^ u128::from(dst)).leading_zeros();
                        (own.is_unicast_link_local() == link_local, common)
                    })
                    .map(|(own, _)| IpAddr::V6(*own))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes() -> Routes {
        Routes {
            interfaces: alloc::vec![Interface {
                v4: alloc::vec![(Ipv4Addr::new(10, 0, 2, 15), 24)],
                v6: alloc::vec![("fe80::1".parse().unwrap(), 64), ("fd00::5".parse().unwrap(), 64)],
                gateway_v4: Some(Ipv4Addr::new(10, 0, 2, 2)),
                routes_v4: alloc::vec![
                    (Ipv4Addr::new(10, 1, 0, 0), 16, Ipv4Addr::new(10, 0, 2, 3)),
                    (Ipv4Addr::new(10, 1, 5, 0), 24, Ipv4Addr::new(10, 0, 2, 4)),
                ],
                mtu: 1500,
                ..Default::default()
            }],
            forward: false,
        }
    }

    #[test]
    fn routes_local_link_and_gateway() {
        let routes = routes();
        let hop = |dst: &str| routes.lookup(dst.parse().unwrap(), 0);
        assert_eq!(hop("127.5.5.5").unwrap().iface, LOOPBACK);
        assert_eq!(hop("::1").unwrap().iface, LOOPBACK);
        assert_eq!(hop("10.0.2.15").unwrap().iface, LOOPBACK);
        assert_eq!(hop("10.0.2.77").unwrap().next, "10.0.2.77".parse::<IpAddr>().unwrap());
        assert_eq!(hop("8.8.8.8").unwrap().next, "10.0.2.2".parse::<IpAddr>().unwrap());
        assert_eq!(hop("10.1.4.9").unwrap().next, "10.0.2.3".parse::<IpAddr>().unwrap());
        assert_eq!(hop("10.1.5.9").unwrap().next, "10.0.2.4".parse::<IpAddr>().unwrap());
        assert_eq!(hop("fd00::77").unwrap().iface, 0);
        assert_eq!(hop("2001:db8::1"), None);
        let broadcast = hop("10.0.2.255").unwrap();
        assert_eq!(routes.fixed_mac(broadcast), Some([0xff; 6]));
    }

    #[test]
    fn sources_match_scope() {
        let routes = routes();
        let source = |dst: &str| {
            let dst = dst.parse().unwrap();
            routes.source(dst, routes.lookup(dst, 0).unwrap()).unwrap()
        };
        assert_eq!(source("fe80::9"), "fe80::1".parse::<IpAddr>().unwrap());
        assert_eq!(source("fd00::9"), "fd00::5".parse::<IpAddr>().unwrap());
        assert_eq!(source("8.8.8.8"), "10.0.2.15".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn classes() {
        let routes = routes();
        let class = |dst: &str| routes.classify(0, dst.parse().unwrap());
        assert_eq!(class("10.0.2.15"), Class::Ours);
        assert_eq!(class("10.0.2.255"), Class::Group);
        assert_eq!(class("10.0.2.16"), Class::Foreign);
        assert_eq!(class("ff02::1:ff00:5"), Class::Group);
        assert_eq!(class("ff02::1:ff00:6"), Class::Foreign);
    }
}
