//! From an engine to the wire: the next hop's address, offloads, and what was sent last.

use super::engine::Egress;
use crate::checksum::Sum;
use crate::io::{Io, Layout};
use crate::neighbor::Neighbors;
use crate::packet::{Mac, Tcp, flag, put};
use crate::route::{Hop, LOOPBACK};

/// What was said in the segments sent; TIME-WAIT answers with it when the engine is gone.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Emitted {
    /// The sequence number after everything sent, probes of a closed window not counted (SND.NXT).
    pub(super) seq: u32,
    pub(super) ack: u32,
    pub(super) window: u16,
    pub(super) count: u32,
    /// The window was said once in a segment that is no SYN, in which it is not scaled (RFC 7323, 2.2).
    pub(super) scaled: bool,
    /// The peer's window is closed: data sent is a probe.
    pub(super) shut: bool,
}

impl Emitted {
    /// Takes down what a segment says, after mending it. An empty one begins after everything sent (RFC 9293, 3.10.7.4); in
    /// smoltcp's it begins where a retransmission stands, and no peer that has that data listens to it.
    fn note(&mut self, segment: &mut [u8]) {
        let Some(mut tcp) = Tcp::parse(segment) else { return };
        let is_behind = |seq: u32| (seq.wrapping_sub(self.seq) as i32) < 0;
        let is_empty = tcp.len == 0 && tcp.has(flag::ACK) && tcp.flags & (flag::SYN | flag::FIN) == 0;
        if is_empty && is_behind(tcp.seq) {
            tcp.seq = self.seq;
            put(segment, 4, &tcp.seq.to_be_bytes());
        }
        let is_probe = tcp.len > 0 && self.shut;
        if tcp.has(flag::SYN) || !is_behind(tcp.end()) && !is_probe {
            self.seq = tcp.end();
        }
        self.ack = tcp.ack;
        self.window = tcp.window;
        self.count = self.count.wrapping_add(1);
        self.scaled |= !tcp.has(flag::SYN);
    }
}

/// Where a connection's packets go, and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way {
    pub(super) hop: Hop,
    pub(super) v6: bool,
    /// A router told that our segments are too long for its next link.
    pub(super) may_fragment: bool,
}

/// The way out of a connection.
pub(super) struct LinkEgress<'a> {
    io: &'a mut Io,
    neighbors: &'a mut Neighbors,
    now_ns: u64,
    way: Way,
    emitted: &'a mut Emitted,
    /// The next hop's link address, once it was needed.
    pub(super) mac: Option<Mac>,
    /// The next hop has to be asked for first.
    pub(super) unresolved: bool,
    /// The next hop is known for long: ask it again.
    pub(super) probe: bool,
    /// The interface has no room.
    pub(super) full: bool,
}

impl<'a> LinkEgress<'a> {
    pub(super) fn new(
        io: &'a mut Io,
        neighbors: &'a mut Neighbors,
        now_ns: u64,
        way: Way,
        emitted: &'a mut Emitted,
    ) -> Self {
        Self { io, neighbors, now_ns, way, emitted, mac: None, unresolved: false, probe: false, full: false }
    }

    fn resolve(&mut self) -> bool {
        if self.mac.is_some() || self.way.hop.iface == LOOPBACK {
            return true;
        }
        match self.neighbors.lookup(self.way.hop.iface, self.way.hop.next, self.now_ns) {
            Some((mac, probe)) => {
                self.mac = Some(mac);
                self.probe = probe;
                true
            }
            None => {
                self.unresolved = true;
                false
            }
        }
    }
}

impl Egress for LinkEgress<'_> {
    fn ready(&mut self) -> bool {
        if !self.io.has_room(self.way.hop.iface) {
            self.full = true;
            return false;
        }
        self.resolve()
    }

    fn send(&mut self, len: usize, mss: Option<u16>, fill: &mut dyn FnMut(&mut [u8])) {
        let header_len = if self.way.v6 { 40 } else { 20 };
        let emitted = &mut *self.emitted;
        let may_fragment = self.way.may_fragment && !self.way.v6;
        let mut write = |buf: &mut [u8]| {
            fill(buf);
            if may_fragment {
                let ident = emitted.count as u16;
                allow_fragments(buf, ident);
            }
            if let Some(segment) = buf.get_mut(header_len..) {
                emitted.note(segment);
            }
        };
        let resolved = self.mac.is_some()
            || self.way.hop.iface == LOOPBACK
            || match self.neighbors.lookup(self.way.hop.iface, self.way.hop.next, self.now_ns) {
                Some((mac, _)) => {
                    self.mac = Some(mac);
                    true
                }
                None => false,
            };
        if resolved {
            let layout = Layout::tcp(self.way.v6, mss);
            self.io.transmit(self.way.hop.iface, self.mac.unwrap_or_default(), len, layout, &mut write);
        } else {
            // An immediate answer to a neighbour that was forgotten: the peer will repeat what it sent.
            self.unresolved = true;
            self.io.counters.drop_unresolved.increment();
            write(&mut alloc::vec![0; len]);
        }
    }
}

/// Takes the "don't fragment" flag off an IPv4 packet and numbers it instead.
fn allow_fragments(packet: &mut [u8], ident: u16) {
    put(packet, 4, &ident.to_be_bytes());
    put(packet, 6, &[0; 2]);
    put(packet, 10, &[0; 2]);
    let sum = packet.get(..20).map_or(0, |header| Sum::default().bytes(header).finish());
    put(packet, 10, &sum.to_be_bytes());
}
