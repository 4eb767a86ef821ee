//! IPv4 and IPv6 input and output (RFC 791, RFC 1122, RFC 8200).

use crate::checksum::Sum;
use crate::io::Layout;
use crate::packet::{ETHERNET_LEN, Ip, be16, ip_header_len, protocol, put, write_ip_header};
use crate::route::{Class, Hop, LOOPBACK};
use crate::shard::Shard;
use anykernel::socket::{NetError, Result};
use core::net::IpAddr;

/// A packet that we make, without its payload.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outgoing {
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) hop_limit: u8,
    /// Bytes after the IP header.
    pub(crate) len: usize,
}

impl Outgoing {
    pub(crate) fn new(src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> Self {
        Self { src, dst, protocol, hop_limit: 64, len }
    }
}

impl Shard {
    /// Takes in an IPv4 packet. `direct`: it was sent to our link address.
    pub(crate) fn ipv4_in(&mut self, iface: usize, data: &[u8], direct: bool, checksum_ok: bool) {
        let Some(ip) = Ip::parse_v4(data) else { return self.io.counters.drop_malformed.increment() };
        if iface != LOOPBACK && !ip.header_checksum_ok() {
            return self.io.counters.drop_checksum.increment();
        }
        if !self.source_is_sane(iface, ip.src) {
            return self.io.counters.drop_address.increment();
        }
        let class = self.routes.classify(iface, ip.dst);
        let dhcp = ip.protocol == protocol::UDP && be16(ip.payload, 2) == Some(crate::dhcp::CLIENT_PORT);
        if class == Class::Foreign && direct && !dhcp && self.routes.forward {
            return self.forward_v4(iface, &ip, checksum_ok);
        }
        if class == Class::Foreign && !(direct && dhcp) || iface != LOOPBACK && ip.dst.is_loopback() {
            return self.io.counters.drop_not_ours.increment();
        }
        if be16(ip.whole, 6).is_some_and(|field| field & 0x3fff != 0) {
            return self.fragment_v4_in(iface, &ip);
        }
        self.ip_in(iface, &ip, direct && class == Class::Ours, checksum_ok);
    }

    /// Takes in an IPv6 packet.
    pub(crate) fn ipv6_in(&mut self, iface: usize, data: &[u8], direct: bool, checksum_ok: bool) {
        let Some(ip) = Ip::parse_v6(data) else { return self.io.counters.drop_malformed.increment() };
        if !self.source_is_sane(iface, ip.src) {
            return self.io.counters.drop_address.increment();
        }
        let class = self.routes.classify(iface, ip.dst);
        if class == Class::Foreign || iface != LOOPBACK && ip.dst.is_loopback() {
            return self.io.counters.drop_not_ours.increment();
        }
        // Answers to a link-local address leave by the interface that it is on.
        if iface != LOOPBACK && matches!(ip.src, IpAddr::V6(src) if src.is_unicast_link_local()) {
            self.scope = iface as u32 + 1;
        }
        self.ip_in(iface, &ip, direct && class == Class::Ours, checksum_ok);
        self.scope = 0;
    }

    /// A source that is a group, or ourselves coming from outside, is a lie (RFC 1122, 3.2.1.3).
    fn source_is_sane(&self, iface: usize, src: IpAddr) -> bool {
        let broadcast = matches!(src, IpAddr::V4(v4) if v4.is_broadcast());
        !src.is_multicast() && !broadcast && (iface == LOOPBACK || !self.routes.is_ours(src))
    }

    /// Hands a whole packet to its protocol. `direct`: to our own address, by our own link address.
    pub(crate) fn ip_in(&mut self, iface: usize, ip: &Ip<'_>, direct: bool, checksum_ok: bool) {
        match ip.protocol {
            protocol::TCP if direct => self.tcp_in(ip, checksum_ok),
            protocol::FRAGMENT if ip.src.is_ipv6() => self.fragment_v6_in(iface, ip),
            protocol::UDP => self.udp_in(iface, ip, direct, checksum_ok),
            protocol::ICMP if ip.src.is_ipv4() => self.icmpv4_in(ip, direct),
            protocol::ICMPV6 if ip.src.is_ipv6() => self.icmpv6_in(iface, ip, direct),
            _ => {
                self.io.counters.drop_protocol.increment();
                if direct {
                    self.icmp_protocol_unreachable(ip);
                }
            }
        }
    }

    /// Sends a packet whose payload `fill` writes. Waits for the next hop's link address if it must.
    pub(crate) fn send_ip(
        &mut self,
        packet: Outgoing,
        layout: Layout,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Result<()> {
        let hop = self.routes.lookup(packet.dst, self.scope).ok_or(NetError::Unreachable)?;
        self.send_ip_by(hop, packet, layout, fill);
        Ok(())
    }

    /// [`Shard::send_ip`] by a hop that is known.
    pub(crate) fn send_ip_by(
        &mut self,
        hop: Hop,
        packet: Outgoing,
        layout: Layout,
        fill: &mut dyn FnMut(&mut [u8]),
    ) {
        let header_len = ip_header_len(packet.dst);
        let len = header_len + packet.len;
        let mut write = |buf: &mut [u8]| {
            write_ip_header(buf, packet.src, packet.dst, packet.protocol, packet.hop_limit, packet.len);
            if let Some(payload) = buf.get_mut(header_len..) {
                fill(payload);
            }
        };
        self.send_packet(hop, len, layout, &mut write);
    }

    /// Sends a packet, IP header included, that `write` writes.
    pub(crate) fn send_packet(
        &mut self,
        hop: Hop,
        len: usize,
        layout: Layout,
        write: &mut dyn FnMut(&mut [u8]),
    ) {
        if hop.iface == LOOPBACK {
            return self.io.transmit(LOOPBACK, [0; 6], len, layout, write);
        }
        if let Some(mac) = self.routes.fixed_mac(hop) {
            return self.io.transmit(hop.iface, mac, len, layout, write);
        }
        if let Some((mac, probe)) = self.neighbors.lookup(hop.iface, hop.next, self.now_ns) {
            self.io.transmit(hop.iface, mac, len, layout, write);
            if probe {
                self.solicit(hop.iface, hop.next, Some(mac));
            }
            return;
        }
        let Some((frame, meta)) = self.io.build(hop.iface, len, layout, write) else {
            return self.io.counters.drop_no_memory.increment();
        };
        let Some((waiting, ask)) = self.neighbors.ask(hop.iface, hop.next, self.now_ns) else {
            self.io.recycle(frame);
            return self.io.counters.drop_unresolved.increment();
        };
        if let Err(frame) = waiting.push(frame, meta) {
            self.io.recycle(frame);
            self.io.counters.drop_unresolved.increment();
        }
        if ask {
            self.solicit(hop.iface, hop.next, None);
        }
    }

    /// Sends `payload`, which is complete with its checksum, in fragments that fit `mtu` (RFC 791, 3.2; RFC 8200, 4.5).
    pub(crate) fn send_fragments(&mut self, hop: Hop, packet: Outgoing, payload: &[u8], mtu: usize) {
        let v6 = packet.dst.is_ipv6();
        let ident = self.prf.next_u64() as u32;
        let header_len = ip_header_len(packet.dst) + if v6 { 8 } else { 0 };
        let most = mtu.saturating_sub(header_len) & !7;
        let mut offset = 0;
        for piece in payload.chunks(most.max(8)) {
            let more = offset + piece.len() < payload.len();
            self.send_packet(hop, header_len + piece.len(), Layout::complete(v6), &mut |buf| {
                let inner_len = header_len + piece.len() - ip_header_len(packet.dst);
                let outer = if v6 { protocol::FRAGMENT } else { packet.protocol };
                write_ip_header(buf, packet.src, packet.dst, outer, packet.hop_limit, inner_len);
                if v6 {
                    put(buf, 40, &[packet.protocol, 0]);
                    put(buf, 42, &((offset as u16) | u16::from(more)).to_be_bytes());
                    put(buf, 44, &ident.to_be_bytes());
                } else {
                    put(buf, 4, &(ident as u16).to_be_bytes());
                    put(buf, 6, &((offset / 8) as u16 | u16::from(more) << 13).to_be_bytes());
                    put(buf, 10, &[0, 0]);
                    let sum = buf.get(..20).map_or(0, |header| Sum::default().bytes(header).finish());
                    put(buf, 10, &sum.to_be_bytes());
                }
                put(buf, header_len, piece);
            });
            offset += piece.len();
        }
    }

    /// Sends a whole Ethernet payload to everybody on the link (DHCP, before there is an address).
    pub(crate) fn broadcast_v4(
        &mut self,
        iface: usize,
        packet: Outgoing,
        layout: Layout,
        fill: &mut dyn FnMut(&mut [u8]),
    ) {
        let header_len = ip_header_len(packet.dst);
        let mut write = |buf: &mut [u8]| {
            write_ip_header(buf, packet.src, packet.dst, packet.protocol, packet.hop_limit, packet.len);
            if let Some(payload) = buf.get_mut(header_len..) {
                fill(payload);
            }
        };
        self.io.transmit(iface, crate::packet::BROADCAST, header_len + packet.len, layout, &mut write);
    }
}

/// Copies `payload` behind a transport header.
pub(crate) fn put_payload(buf: &mut [u8], at: usize, payload: &[u8]) {
    put(buf, at, payload);
}

const _: () = assert!(ETHERNET_LEN == 14);
