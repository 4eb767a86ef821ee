//! Passing IPv4 packets on between interfaces (RFC 1812, 5). Off unless the configuration asks for it.
//!
//! No redirects, no directed broadcasts (RFC 2644), no multicast routing. Errors go to the sender as RFC 1812, 4.3 says,
//! under the stack's own rate limit.

use crate::checksum::Sum;
use crate::io::Layout;
use crate::packet::{Ip, be16, protocol, put};
use crate::route::{Hop, LOOPBACK};
use crate::shard::Shard;
use core::net::IpAddr;

/// Of the flags and fragment offset: do not fragment, more fragments, and the offset.
const DF: u16 = 0x4000;
const MF: u16 = 0x2000;
const OFFSET: u16 = 0x1fff;

/// Addresses that no router passes on (RFC 1812, 5.3.7; RFC 3927, 7).
fn stays(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(v4) => {
            let [first, ..] = v4.octets();
            first == 0 || first >= 224 || v4.is_loopback() || v4.is_link_local()
        }
        IpAddr::V6(_) => true,
    }
}

impl Shard {
    /// Takes in a packet that somebody else is to get, sent to our link address.
    pub(crate) fn forward_v4(&mut self, iface: usize, ip: &Ip<'_>, checksum_ok: bool) {
        if iface == LOOPBACK || stays(ip.src) || stays(ip.dst) {
            return self.io.counters.drop_no_route.increment();
        }
        let fragment = be16(ip.whole, 6).unwrap_or(0);
        if ip.hop_limit <= 1 {
            self.io.counters.drop_ttl.increment();
            return self.forward_error(ip, fragment, 11, 0, 0);
        }
        let hop = self.routes.lookup(ip.dst, 0).filter(|hop| hop.iface != LOOPBACK);
        let Some(hop) = hop.filter(|hop| self.routes.fixed_mac(*hop).is_none()) else {
            self.io.counters.drop_no_route.increment();
            return self.forward_error(ip, fragment, 3, 0, 0);
        };
        let mtu = usize::from(self.routes.mtu(hop.iface));
        let header_len = ip.whole.len() - ip.payload.len();
        if ip.whole.len() <= mtu {
            self.io.counters.forwarded.increment();
            // A device may vouch for a transport checksum that nobody has filled in (a sender on the same machine).
            let whole = fragment & (MF | OFFSET) == 0;
            let refill = checksum_ok && whole && !ip.transport_checksum_ok();
            return self.send_packet(hop, ip.whole.len(), Layout::complete(false), &mut |buf| {
                put(buf, 0, ip.whole);
                if refill {
                    fill_transport(buf, header_len, ip);
                }
                fill_header(buf, header_len, ip.hop_limit - 1, fragment);
            });
        }
        // Options would have to be sorted into those that every piece carries: hardly anybody sends any.
        if fragment & DF != 0 || header_len > 20 {
            self.io.counters.drop_too_long.increment();
            return self.forward_error(ip, fragment, 3, 4, mtu as u32);
        }
        self.io.counters.forwarded.increment();
        self.forward_pieces(hop, ip, fragment, mtu);
    }

    /// Cuts a packet, which may be a piece itself (RFC 791, 3.2).
    fn forward_pieces(&mut self, hop: Hop, ip: &Ip<'_>, fragment: u16, mtu: usize) {
        const HEADER: usize = 20;
        let most = (mtu.saturating_sub(HEADER) & !7).max(8);
        let mut at = 0;
        for piece in ip.payload.chunks(most) {
            let last = at + piece.len() == ip.payload.len();
            let more = if last { fragment & MF } else { MF };
            let offset = (fragment & OFFSET).saturating_add((at / 8) as u16).min(OFFSET);
            self.send_packet(hop, HEADER + piece.len(), Layout::complete(false), &mut |buf| {
                put(buf, 0, ip.whole.get(..HEADER).unwrap_or_default());
                put(buf, 2, &((HEADER + piece.len()) as u16).to_be_bytes());
                put(buf, HEADER, piece);
                fill_header(buf, HEADER, ip.hop_limit - 1, more | offset);
            });
            at += piece.len();
        }
    }

    /// Tells the sender, from the address that faces it; only about the first of several pieces (RFC 1122, 3.2.2).
    fn forward_error(&mut self, ip: &Ip<'_>, fragment: u16, kind: u8, code: u8, word: u32) {
        if fragment & OFFSET != 0 {
            return;
        }
        let back = self.routes.lookup(ip.src, 0).and_then(|hop| self.routes.source(ip.src, hop));
        if let Some(from) = back {
            self.icmp_error_from(from, ip, kind, code, word);
        }
    }
}

/// Writes what a router changes in a header, and its checksum.
fn fill_header(buf: &mut [u8], header_len: usize, hop_limit: u8, fragment: u16) {
    put(buf, 6, &fragment.to_be_bytes());
    put(buf, 8, &[hop_limit]);
    put(buf, 10, &[0, 0]);
    let sum = buf.get(..header_len).map_or(0, |header| Sum::default().bytes(header).finish());
    put(buf, 10, &sum.to_be_bytes());
}

/// Fills in the checksum of a TCP segment or a UDP datagram.
fn fill_transport(buf: &mut [u8], header_len: usize, ip: &Ip<'_>) {
    let field = match ip.protocol {
        protocol::TCP => 16,
        protocol::UDP => 6,
        _ => return,
    };
    if ip.payload.len() < field + 2 {
        return;
    }
    put(buf, header_len + field, &[0, 0]);
    let payload = buf.get(header_len..).unwrap_or_default();
    let sum =
        Sum::default().pseudo_header(ip.src, ip.dst, ip.protocol, payload.len()).bytes(payload).finish();
    put(buf, header_len + field, &sum.to_be_bytes());
}
