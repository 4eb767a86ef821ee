//! ARP (RFC 826) and its duplicate address detection (RFC 5227).

use crate::neighbor::{Neighbors, Waiting};
use crate::packet::{BROADCAST, ETHERNET_LEN, Mac, be16, be32, ethertype, put};
use crate::shard::{Message, Shard};
use anykernel::nic::TxMeta;
use core::net::{IpAddr, Ipv4Addr};

const REQUEST: u16 = 1;
const REPLY: u16 = 2;
const LEN: usize = 28;

/// A message about Ethernet and IPv4 addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Arp {
    operation: u16,
    sender_mac: Mac,
    sender: Ipv4Addr,
    target: Ipv4Addr,
}

impl Arp {
    fn parse(data: &[u8]) -> Option<Self> {
        let data = data.get(..LEN)?;
        if data.get(..6)? != [0, 1, 8, 0, 6, 4] {
            return None;
        }
        Some(Self {
            operation: be16(data, 6)?,
            sender_mac: *data.get(8..)?.first_chunk()?,
            sender: be32(data, 14)?.into(),
            target: be32(data, 24)?.into(),
        })
    }
}

impl Shard {
    /// Takes in an ARP message.
    pub(crate) fn arp_in(&mut self, iface: usize, data: &[u8]) {
        let Some(arp) = Arp::parse(data) else { return self.io.counters.drop_malformed.increment() };
        if arp.sender_mac.first().is_some_and(|first| first & 1 != 0) || arp.sender.is_multicast() {
            return self.io.counters.drop_address.increment();
        }
        let for_us = self
            .routes
            .get(iface)
            .is_some_and(|interface| interface.v4.iter().any(|(own, _)| *own == arp.target));
        // RFC 5227 probes have no sender address yet.
        if !arp.sender.is_unspecified() {
            let create = for_us && arp.operation == REQUEST;
            self.neighbor_seen(iface, IpAddr::V4(arp.sender), arp.sender_mac, create);
        }
        if for_us && arp.operation == REQUEST {
            self.arp_send(iface, REPLY, arp.target, arp.sender_mac, arp.sender);
        }
    }

    /// Asks who has `target`.
    pub(crate) fn arp_request(&mut self, iface: usize, target: Ipv4Addr, to: Option<Mac>) {
        let hop = crate::route::Hop { iface, next: IpAddr::V4(target) };
        let Some(IpAddr::V4(source)) = self.routes.source(IpAddr::V4(target), hop) else { return };
        self.arp_send(iface, REQUEST, source, to.unwrap_or(BROADCAST), target);
    }

    /// Tells everybody about our new address (RFC 5227, 2.3).
    pub(crate) fn arp_announce(&mut self, iface: usize, own: Ipv4Addr) {
        self.arp_send(iface, REQUEST, own, BROADCAST, own);
    }

    fn arp_send(&mut self, iface: usize, operation: u16, sender: Ipv4Addr, to: Mac, target: Ipv4Addr) {
        let own = self.io.mac(iface);
        let Some(mut frame) = self.io.buffer(ETHERNET_LEN + LEN) else { return };
        frame.resize(ETHERNET_LEN + LEN, 0);
        put(&mut frame, 0, &to);
        put(&mut frame, 6, &own);
        put(&mut frame, 12, &ethertype::ARP.to_be_bytes());
        put(&mut frame, 14, &[0, 1, 8, 0, 6, 4]);
        put(&mut frame, 20, &operation.to_be_bytes());
        put(&mut frame, 22, &own);
        put(&mut frame, 28, &sender.octets());
        if to != BROADCAST {
            put(&mut frame, 32, &to);
        }
        put(&mut frame, 38, &target.octets());
        self.io.transmit_frame(iface, frame, TxMeta::default());
    }

    /// A neighbour said, by ARP or NDP, where it is: tells this shard and all others.
    pub(crate) fn neighbor_seen(&mut self, iface: usize, addr: IpAddr, mac: Mac, create: bool) {
        for shard in (0..self.count).filter(|shard| *shard != self.id) {
            self.io.outbox.push((shard, Message::Neighbor { iface, addr, mac, create }));
        }
        self.neighbor_learn(iface, addr, mac, create);
    }

    /// Puts an address into this shard's cache and sends what waited for it.
    pub(crate) fn neighbor_learn(&mut self, iface: usize, addr: IpAddr, mac: Mac, create: bool) {
        match self.neighbors.learn(iface, addr, mac, create, self.now_ns) {
            Ok(Waiting { packets, flows }) => {
                for (mut frame, meta) in packets {
                    put(&mut frame, 0, &mac);
                    self.io.transmit_frame(iface, frame, meta);
                }
                for flow in flows {
                    self.touch(flow);
                }
            }
            Err(_) => self.io.counters.drop_neighbor.increment(),
        }
    }

    /// Asks for a link address in the way of its IP version.
    pub(crate) fn solicit(&mut self, iface: usize, addr: IpAddr, to: Option<Mac>) {
        match addr {
            IpAddr::V4(target) => self.arp_request(iface, target, to),
            IpAddr::V6(target) => self.ndp_solicit(iface, target, to),
        }
    }

    /// Repeats questions and gives up on neighbours that do not answer.
    pub(crate) fn neighbors_on_time(&mut self) {
        let mut actions = alloc::vec::Vec::new();
        Neighbors::on_time(&mut self.neighbors, self.now_ns, &mut actions);
        for action in actions {
            match action {
                crate::neighbor::Action::Solicit(iface, addr, to) => self.solicit(iface, addr, to),
                crate::neighbor::Action::Failed(waiting) => {
                    self.io.counters.drop_unresolved.add(waiting.packets.len() as u64);
                    for flow in waiting.flows {
                        self.flow_unreachable(flow);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parsing_takes_anything(data: alloc::vec::Vec<u8>) {
            let _ = Arp::parse(&data);
        }
    }

    #[test]
    fn other_hardware_is_refused() {
        let mut data = [0u8; LEN];
        data[..6].copy_from_slice(&[0, 1, 8, 0, 6, 4]);
        assert!(Arp::parse(&data).is_some());
        data[1] = 6;
        assert!(Arp::parse(&data).is_none());
        assert!(Arp::parse(&data[..27]).is_none());
    }
}
