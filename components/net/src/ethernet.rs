//! The way in: from a frame to the shard and the protocol it belongs to.

use crate::packet::{BROADCAST, ETHERNET_LEN, Ethernet, Ip, ethertype, protocol};
use crate::shard::{Message, Shard};

impl Shard {
    /// Takes a frame from one of our queues: finds the shard it belongs to, and takes it in or passes it on.
    pub(crate) fn frame_from_nic(&mut self, iface: usize, frame: &[u8], checksum_ok: bool) {
        self.io.counters.rx_frames.increment();
        self.io.counters.rx_bytes.add(frame.len() as u64);
        if self.count > 1 {
            let shard = self.steer(frame);
            if shard != self.id {
                return match self.io.copy(frame) {
                    Some(frame) => {
                        self.io.counters.steered.increment();
                        self.io.outbox.push((shard, Message::Frame { iface, frame, checksum_ok }));
                    }
                    None => self.io.counters.drop_no_memory.increment(),
                };
            }
        }
        self.frame_in(iface, frame, checksum_ok);
    }

    /// Takes in a frame that belongs to this shard.
    pub(crate) fn frame_in(&mut self, iface: usize, frame: &[u8], checksum_ok: bool) {
        let Some(ethernet) = Ethernet::parse(frame) else {
            return self.io.counters.drop_malformed.increment();
        };
        let to_us = ethernet.dst == self.io.mac(iface);
        let to_group = ethernet.dst.first().is_some_and(|first| first & 1 != 0);
        if !to_us && !to_group {
            return self.io.counters.drop_not_ours.increment();
        }
        // RFC 1122, 3.3.6: what came by a link broadcast is never answered with an error, nor taken as TCP.
        match ethernet.ethertype {
            ethertype::IPV4 => self.ipv4_in(iface, ethernet.payload, to_us, checksum_ok),
            ethertype::IPV6 => self.ipv6_in(iface, ethernet.payload, to_us, checksum_ok),
            ethertype::ARP if to_us || ethernet.dst == BROADCAST => self.arp_in(iface, ethernet.payload),
            _ => self.io.counters.drop_protocol.increment(),
        }
    }

    /// Takes in a packet that we sent to ourselves or put together, behind room for an Ethernet header.
    pub(crate) fn packet_in(&mut self, iface: usize, packet: &[u8], checksum_ok: bool) {
        let packet = packet.get(ETHERNET_LEN..).unwrap_or_default();
        match packet.first().map(|first| first >> 4) {
            Some(4) => self.ipv4_in(iface, packet, true, checksum_ok),
            _ => self.ipv6_in(iface, packet, true, checksum_ok),
        }
    }

    /// The shard that owns what `frame` belongs to: TCP by the hash of both ends, UDP by the local port. Everything
    /// else, fragments too, is shard 0's. (An ICMP error goes to the shard of the packet that it quotes.)
    pub(crate) fn steer(&self, frame: &[u8]) -> usize {
        match frame.get(12..14) {
            Some([8, 0] | [0x86, 0xdd]) => self.steer_packet(frame),
            _ => 0,
        }
    }

    /// [`Shard::steer`] for what is known to be an IP packet behind room for an Ethernet header.
    pub(crate) fn steer_packet(&self, frame: &[u8]) -> usize {
        let Some(packet) = frame.get(ETHERNET_LEN..) else { return 0 };
        let ip = match packet.first().map(|first| first >> 4) {
            // Neither a later fragment nor the first of several.
            Some(4) => Ip::parse_v4(packet)
                .filter(|ip| crate::packet::be16(ip.whole, 6).is_some_and(|field| field & 0x3fff == 0)),
            _ => Ip::parse_v6(packet),
        };
        ip.map_or(0, |ip| self.steer_ip(&ip))
    }

    /// [`Shard::steer`] for a packet that is no fragment.
    pub(crate) fn steer_ip(&self, ip: &Ip<'_>) -> usize {
        match ip.protocol {
            protocol::TCP => ip.ports().map_or(0, |(src, dst)| self.tcp_shard((ip.src, src), (ip.dst, dst))),
            protocol::UDP => ip.ports().map_or(0, |(_, dst)| self.udp_shard(dst)),
            protocol::ICMP | protocol::ICMPV6 => self.icmp_shard(ip),
            _ => 0,
        }
    }
}
