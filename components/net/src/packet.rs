//! Views of received headers. What these functions return has been checked against the length of the frame.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A link address.
pub(crate) type Mac = [u8; 6];

/// Everyone on the link.
pub(crate) const BROADCAST: Mac = [0xff; 6];

/// Length of an Ethernet header.
pub(crate) const ETHERNET_LEN: usize = 14;

/// Largest frame that we hand to a device, when it cuts segments for us.
pub(crate) const MAX_FRAME: usize = 65_535;

pub(crate) mod ethertype {
    pub(crate) const IPV4: u16 = 0x0800;
    pub(crate) const ARP: u16 = 0x0806;
    pub(crate) const IPV6: u16 = 0x86dd;
}

pub(crate) mod protocol {
    pub(crate) const ICMP: u8 = 1;
    pub(crate) const TCP: u8 = 6;
    pub(crate) const UDP: u8 = 17;
    /// The IPv6 fragment header.
    pub(crate) const FRAGMENT: u8 = 44;
    pub(crate) const ICMPV6: u8 = 58;
}

/// Reads a big-endian number.
pub(crate) fn be16(data: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*data.get(at..)?.first_chunk()?))
}

/// Reads a big-endian number.
pub(crate) fn be32(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*data.get(at..)?.first_chunk()?))
}

/// Writes `bytes` at `at`; nothing if they do not fit.
pub(crate) fn put(data: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(field) = data.get_mut(at..).and_then(|rest| rest.get_mut(..bytes.len())) {
        field.copy_from_slice(bytes);
    }
}

/// An Ethernet frame (IEEE 802.3, DIX form).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ethernet<'a> {
    pub(crate) dst: Mac,
    pub(crate) ethertype: u16,
    pub(crate) payload: &'a [u8],
}

impl<'a> Ethernet<'a> {
    pub(crate) fn parse(frame: &'a [u8]) -> Option<Self> {
        let (header, payload) = frame.split_first_chunk::<ETHERNET_LEN>()?;
        Some(Self { dst: *header.first_chunk()?, ethertype: be16(header, 12)?, payload })
    }
}

/// An IP packet of either version, with what the layers above need of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ip<'a> {
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) hop_limit: u8,
    /// The packet from its IP header to its end, without link padding.
    pub(crate) whole: &'a [u8],
    /// What follows the IP headers.
    pub(crate) payload: &'a [u8],
}

impl<'a> Ip<'a> {
    /// Splits an IPv4 packet (RFC 791, 3.1). `None`: malformed. Does not look at checksum and fragmentation.
    pub(crate) fn parse_v4(data: &'a [u8]) -> Option<Self> {
        let (fixed, _) = data.split_first_chunk::<20>()?;
        let header_len = usize::from(fixed[0] & 0xf) * 4;
        let total_len = usize::from(u16::from_be_bytes([fixed[2], fixed[3]]));
        if fixed[0] >> 4 != 4 || header_len < 20 || total_len < header_len {
            return None;
        }
        let whole = data.get(..total_len)?;
        let address = |at| Some(IpAddr::V4(Ipv4Addr::from(be32(fixed, at)?)));
        Some(Self {
            src: address(12)?,
            dst: address(16)?,
            protocol: fixed[9],
            hop_limit: fixed[8],
            whole,
            payload: whole.get(header_len..)?,
        })
    }

    /// Splits an IPv6 packet (RFC 8200, 3), stepping over the extension headers that may be ignored: hop-by-hop and
    /// destination options without an option that asks for more, and routing headers with nothing left. `None`:
    /// malformed. A fragment keeps its fragment header as `protocol` 44.
    pub(crate) fn parse_v6(data: &'a [u8]) -> Option<Self> {
        let (fixed, _) = data.split_first_chunk::<40>()?;
        if fixed[0] >> 4 != 6 {
            return None;
        }
        let payload_len = usize::from(u16::from_be_bytes([fixed[4], fixed[5]]));
        let whole = data.get(..40 + payload_len)?;
        let address = |at: usize| Some(IpAddr::V6(Ipv6Addr::from(*fixed.get(at..)?.first_chunk::<16>()?)));
        let mut protocol = fixed[6];
        let mut payload = whole.get(40..)?;
        // Hop-by-hop, routing and destination options at most once each, twice for the last (RFC 8200, 4.1).
        for _ in 0..4 {
            match protocol {
                0 | 60 => {}
                43 if *payload.get(3)? == 0 => {}
                _ => break,
            }
            let (&[next, len], _) = payload.split_first_chunk::<2>()?;
            protocol = next;
            payload = payload.get(8 + usize::from(len) * 8..)?;
        }
        Some(Self { src: address(8)?, dst: address(24)?, protocol, hop_limit: fixed[7], whole, payload })
    }

    /// Whether the IPv4 header sums up.
    pub(crate) fn header_checksum_ok(&self) -> bool {
        let header_len = self.whole.len() - self.payload.len();
        self.whole
            .get(..header_len)
            .is_some_and(|header| crate::checksum::Sum::default().bytes(header).is_valid())
    }

    /// Whether the transport checksum is right.
    pub(crate) fn transport_checksum_ok(&self) -> bool {
        crate::checksum::Sum::default()
            .pseudo_header(self.src, self.dst, self.protocol, self.payload.len())
            .bytes(self.payload)
            .is_valid()
    }

    /// Source and destination port of a TCP or UDP payload.
    pub(crate) fn ports(&self) -> Option<(u16, u16)> {
        Some((be16(self.payload, 0)?, be16(self.payload, 2)?))
    }
}

/// The fixed part of a TCP header (RFC 9293, 3.1).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tcp {
    pub(crate) src_port: u16,
    pub(crate) dst_port: u16,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    /// As in the header, not scaled.
    pub(crate) window: u16,
    /// Bytes of payload.
    pub(crate) len: usize,
}

/// TCP flags.
pub(crate) mod flag {
    pub(crate) const FIN: u8 = 1;
    pub(crate) const SYN: u8 = 2;
    pub(crate) const RST: u8 = 4;
    pub(crate) const ACK: u8 = 16;
}

impl Tcp {
    /// Reads the header of `segment`. `None`: malformed.
    pub(crate) fn parse(segment: &[u8]) -> Option<Self> {
        let (fixed, _) = segment.split_first_chunk::<20>()?;
        let header_len = usize::from(fixed[12] >> 4) * 4;
        if header_len < 20 {
            return None;
        }
        if hypercall::planted!("tcp-urgent-overflow") && fixed[13] & 32 != 0 {
            let last_urgent = be32(fixed, 4)? + u32::from(be16(fixed, 18)?);
            log::trace!("urgent up to {last_urgent}");
        }
        Some(Self {
            src_port: be16(fixed, 0)?,
            dst_port: be16(fixed, 2)?,
            seq: be32(fixed, 4)?,
            ack: be32(fixed, 8)?,
            flags: fixed[13],
            window: be16(fixed, 14)?,
            len: segment.len().checked_sub(header_len)?,
        })
    }

    pub(crate) fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// The sequence number after this segment.
    pub(crate) fn end(&self) -> u32 {
        let phantom = u32::from(self.has(flag::SYN)) + u32::from(self.has(flag::FIN));
        self.seq.wrapping_add(self.len as u32).wrapping_add(phantom)
    }
}

/// Writes an IP header in front of a payload of `payload_len` bytes and returns its length.
pub(crate) fn write_ip_header(
    buf: &mut [u8],
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    hop_limit: u8,
    payload_len: usize,
) -> usize {
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let mut header = [0u8; 20];
            header[0] = 0x45;
            put(&mut header, 2, &((20 + payload_len) as u16).to_be_bytes());
            // Never fragmented on the way (RFC 6864 then leaves the identification unused).
            put(&mut header, 6, &0x4000u16.to_be_bytes());
            header[8] = hop_limit;
            header[9] = protocol;
            put(&mut header, 12, &src.octets());
            put(&mut header, 16, &dst.octets());
            let sum = crate::checksum::Sum::default().bytes(&header).finish();
            put(&mut header, 10, &sum.to_be_bytes());
            put(buf, 0, &header);
            20
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let mut header = [0u8; 40];
            header[0] = 0x60;
            put(&mut header, 4, &(payload_len as u16).to_be_bytes());
            header[6] = protocol;
            header[7] = hop_limit;
            put(&mut header, 8, &src.octets());
            put(&mut header, 24, &dst.octets());
            put(buf, 0, &header);
            40
        }
        // Routing never pairs addresses of different versions.
        _ => 0,
    }
}

/// Length of the header that [`write_ip_header`] writes for a packet to `dst`.
pub(crate) fn ip_header_len(dst: IpAddr) -> usize {
    if dst.is_ipv4() { 20 } else { 40 }
}
