//! Fragments of IP packets (RFC 791, 3.2; RFC 8200, 4.5; RFC 5722), put together by shard 0.
//!
//! Bounded in bytes, packets, pieces and time. A packet with overlapping fragments is dropped whole: nobody honest sends
//! them, and what they mean is exactly what attackers play with.

use crate::packet::{ETHERNET_LEN, Ip, be16, be32, put};
use crate::shard::{Message, Shard};
use alloc::vec::Vec;
use core::net::IpAddr;

/// Packets that wait for the rest of themselves.
const MAX_PACKETS: usize = 64;
/// Pieces of one packet: 64 KiB in the smallest IPv4 MTU.
const MAX_PIECES: usize = 128;
/// What a piece costs beside its bytes.
const PIECE_OVERHEAD: usize = 64;
/// How long the rest may take (RFC 1122, 3.3.2 says 60 to 120 s; Linux takes 30, and so do we).
const TIMEOUT_NS: u64 = 30_000_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    ident: u32,
}

/// Where a fragment belongs.
#[derive(Debug, Clone, Copy)]
struct Place {
    key: Key,
    offset: usize,
    more: bool,
}

struct Packet {
    key: Key,
    pieces: Vec<(usize, Vec<u8>)>,
    total: Option<usize>,
    deadline_ns: u64,
    cost: usize,
}

/// All packets that are not whole.
#[derive(Default)]
pub(crate) struct Reassembly {
    packets: Vec<Packet>,
    cost: usize,
}

#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Waiting,
    /// The payload, behind room for Ethernet and IP headers.
    Whole(Vec<u8>),
    Refused,
}

impl Reassembly {
    /// Adds a fragment. `header_len` is that of the header that the whole packet will get.
    fn insert(&mut self, at: Place, data: &[u8], header_len: usize, limit: usize, now_ns: u64) -> Outcome {
        let end = at.offset + data.len();
        let misaligned = at.more && !data.len().is_multiple_of(8);
        if data.is_empty() || misaligned || end + header_len > 65_535 {
            return Outcome::Refused;
        }
        let index = match self.packets.iter().position(|packet| packet.key == at.key) {
            Some(index) => index,
            None => {
                while self.packets.len() >= MAX_PACKETS {
                    self.remove(0);
                }
                self.packets.push(Packet {
                    key: at.key,
                    pieces: Vec::new(),
                    total: None,
                    deadline_ns: now_ns + TIMEOUT_NS,
                    cost: 0,
                });
                self.packets.len() - 1
            }
        };
        let Some(packet) = self.packets.get_mut(index) else { return Outcome::Refused };
        let slot = packet.pieces.partition_point(|(offset, _)| *offset < at.offset);
        let before = slot.checked_sub(1).and_then(|slot| packet.pieces.get(slot));
        let after = packet.pieces.get(slot);
        if after.is_some_and(|(offset, bytes)| *offset == at.offset && bytes == data) {
            // A duplicate, not an overlap.
            return Outcome::Waiting;
        }
        let overlaps = before.is_some_and(|(offset, bytes)| offset + bytes.len() > at.offset)
            || after.is_some_and(|(offset, _)| *offset < end);
        let beyond = packet.total.is_some_and(|total| end > total || !at.more && end != total)
            || !at.more && packet.pieces.last().is_some_and(|(offset, bytes)| offset + bytes.len() > end);
        if overlaps || beyond || packet.pieces.len() >= MAX_PIECES {
            self.remove(index);
            return Outcome::Refused;
        }
        let mut piece = Vec::new();
        if piece.try_reserve_exact(data.len()).is_err() {
            return Outcome::Refused;
        }
        piece.extend_from_slice(data);
        packet.pieces.insert(slot, (at.offset, piece));
        if !at.more {
            packet.total = Some(end);
        }
        let cost = data.len() + PIECE_OVERHEAD;
        packet.cost += cost;
        self.cost += cost;
        let have: usize = packet.pieces.iter().map(|(_, bytes)| bytes.len()).sum();
        if packet.total == Some(have) || !at.more && hypercall::planted!("reorder") {
            let room = ETHERNET_LEN + header_len;
            let mut whole = Vec::new();
            if whole.try_reserve_exact(room + have).is_err() {
                self.remove(index);
                return Outcome::Refused;
            }
            whole.resize(room, 0);
            for (_, bytes) in &packet.pieces {
                whole.extend_from_slice(bytes);
            }
            self.remove(index);
            return Outcome::Whole(whole);
        }
        // The oldest packet makes room, were it this one.
        while self.cost > limit && !self.packets.is_empty() {
            self.remove(0);
        }
        Outcome::Waiting
    }

    fn remove(&mut self, index: usize) {
        let packet = self.packets.remove(index);
        self.cost -= packet.cost;
    }

    pub(crate) fn next_deadline_ns(&self) -> Option<u64> {
        self.packets.first().map(|packet| packet.deadline_ns)
    }

    /// Drops packets whose rest did not come; says how many pieces were lost.
    pub(crate) fn on_time(&mut self, now_ns: u64) -> usize {
        let mut lost = 0;
        while self.packets.first().is_some_and(|packet| packet.deadline_ns <= now_ns) {
            lost += self.packets.first().map_or(0, |packet| packet.pieces.len());
            self.remove(0);
        }
        lost
    }
}

impl Shard {
    /// Takes in a fragment of an IPv4 packet.
    pub(crate) fn fragment_v4_in(&mut self, iface: usize, ip: &Ip<'_>) {
        let (Some(ident), Some(field)) = (be16(ip.whole, 4), be16(ip.whole, 6)) else { return };
        let key = Key { src: ip.src, dst: ip.dst, protocol: ip.protocol, ident: u32::from(ident) };
        let place = Place { key, offset: usize::from(field & 0x1fff) * 8, more: field & 0x2000 != 0 };
        self.fragment_in(iface, ip, place, ip.payload, 20);
    }

    /// Takes in a fragment of an IPv6 packet; `ip.payload` begins with the fragment header.
    pub(crate) fn fragment_v6_in(&mut self, iface: usize, ip: &Ip<'_>) {
        let (Some(&protocol), Some(field), Some(ident), Some(data)) =
            (ip.payload.first(), be16(ip.payload, 2), be32(ip.payload, 4), ip.payload.get(8..))
        else {
            return self.io.counters.drop_malformed.increment();
        };
        let key = Key { src: ip.src, dst: ip.dst, protocol, ident };
        let place = Place { key, offset: usize::from(field >> 3) * 8, more: field & 1 != 0 };
        self.fragment_in(iface, ip, place, data, 40);
    }

    fn fragment_in(&mut self, iface: usize, ip: &Ip<'_>, place: Place, data: &[u8], header_len: usize) {
        let limit = self.limits.reassembly_bytes;
        match self.reassembly.insert(place, data, header_len, limit, self.now_ns) {
            Outcome::Waiting => {}
            Outcome::Refused => self.io.counters.drop_fragment.increment(),
            Outcome::Whole(mut packet) => {
                let payload_len = packet.len() - ETHERNET_LEN - header_len;
                let mut header = [0u8; 40];
                let protocol = place.key.protocol;
                crate::packet::write_ip_header(
                    &mut header,
                    ip.src,
                    ip.dst,
                    protocol,
                    ip.hop_limit,
                    payload_len,
                );
                put(&mut packet, ETHERNET_LEN, header.get(..header_len).unwrap_or_default());
                let shard = self.steer_packet(&packet);
                if shard == self.id {
                    self.packet_in(iface, &packet, false);
                } else {
                    self.io.outbox.push((shard, Message::Packet { iface, packet, checksum_ok: false }));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::Ipv4Addr;
    use proptest::prelude::*;

    fn key(ident: u32) -> Key {
        Key { src: Ipv4Addr::LOCALHOST.into(), dst: Ipv4Addr::LOCALHOST.into(), protocol: 17, ident }
    }

    fn place(ident: u32, offset: usize, more: bool) -> Place {
        Place { key: key(ident), offset, more }
    }

    #[test]
    fn overlaps_drop_the_packet() {
        let mut table = Reassembly::default();
        assert_eq!(table.insert(place(1, 0, true), &[1; 16], 20, 10_000, 0), Outcome::Waiting);
        assert_eq!(table.insert(place(1, 0, true), &[1; 16], 20, 10_000, 0), Outcome::Waiting);
        assert_eq!(table.insert(place(1, 8, true), &[2; 16], 20, 10_000, 0), Outcome::Refused);
        assert!(table.packets.is_empty());
        assert_eq!(table.cost, 0);
    }

    #[test]
    fn a_flood_is_bounded() {
        let mut table = Reassembly::default();
        for ident in 0..100_000 {
            table.insert(place(ident, 8, true), &[0; 1480], 20, 50_000, 0);
            assert!(table.cost <= 50_000 && table.packets.len() <= MAX_PACKETS);
        }
        for n in 0..10_000 {
            table.insert(place(7, n * 16, true), &[0; 8], 20, 50_000, 0);
            assert!(table.packets.iter().all(|packet| packet.pieces.len() <= MAX_PIECES));
        }
        assert!(table.on_time(TIMEOUT_NS) > 0);
        assert_eq!((table.packets.len(), table.cost), (0, 0));
    }

    proptest! {
        #[test]
        fn any_order_gives_the_packet(
            data in proptest::collection::vec(any::<u8>(), 1..3000),
            order in proptest::collection::vec(any::<u32>(), 40),
        ) {
            let mut pieces: Vec<_> = data.chunks(80).enumerate().collect();
            let count = pieces.len();
            pieces.sort_by_key(|(n, _)| order[n % order.len()]);
            let mut table = Reassembly::default();
            for (nth, (n, piece)) in pieces.iter().enumerate() {
                let outcome = table.insert(place(1, n * 80, n + 1 < count), piece, 20, 100_000, 0);
                if nth + 1 < count {
                    prop_assert_eq!(outcome, Outcome::Waiting);
                } else if let Outcome::Whole(whole) = outcome {
                    prop_assert_eq!(&whole[34..], &data[..]);
                } else {
                    prop_assert!(false, "not whole");
                }
            }
            prop_assert_eq!(table.cost, 0);
        }

        #[test]
        fn anything_goes(pieces: Vec<(u8, u16, bool, u8)>) {
            let mut table = Reassembly::default();
            for (ident, offset, more, len) in pieces {
                let offset = usize::from(offset & 0x1fff) * 8;
                let data = std::vec![0; usize::from(len)];
                table.insert(place(u32::from(ident % 4), offset, more), &data, 20, 5000, 0);
                let cost: usize = table.packets.iter().map(|packet| packet.cost).sum();
                prop_assert_eq!(cost, table.cost);
            }
        }
    }
}
