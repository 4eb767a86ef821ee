//! Frames as the peer makes and reads them. Written from the RFCs, not with the code under test.

/// The stack's address.
pub const STACK_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// The peer's.
pub const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The stack's.
pub const STACK: [u8; 4] = [10, 0, 0, 2];
/// The peer's: router, name server, client.
pub const PEER: [u8; 4] = [10, 0, 0, 1];
/// The stack's link-local address, made of its MAC.
pub const STACK6: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe, 0, 0, 2];
/// The peer's.
pub const PEER6: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe, 0, 0, 1];

fn sum(mut total: u32, data: &[u8]) -> u32 {
    for pair in data.chunks(2) {
        total += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    }
    total
}

fn fold(mut total: u32) -> u16 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// An Ethernet frame from the peer to the stack.
pub fn ethernet(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [STACK_MAC, PEER_MAC].concat();
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    frame
}

/// An IPv4 frame from the peer to the stack.
pub fn ipv4(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((20 + payload.len() as u16).to_be_bytes());
    packet.extend([0, 1, 0x40, 0, 64, protocol, 0, 0]);
    packet.extend(PEER);
    packet.extend(STACK);
    packet.extend(payload);
    let mut frame = ethernet(0x0800, &packet);
    repair(&mut frame);
    frame
}

/// An IPv6 frame from the peer to the stack.
pub fn ipv6(next: u8, hop_limit: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, hop_limit]);
    packet.extend(PEER6);
    packet.extend(STACK6);
    packet.extend(payload);
    let mut frame = ethernet(0x86dd, &packet);
    repair(&mut frame);
    frame
}

/// A UDP datagram from the peer to the stack, over IPv4.
pub fn udp(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(from.to_be_bytes());
    datagram.extend(to.to_be_bytes());
    datagram.extend((8 + payload.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    ipv4(17, &datagram)
}

/// An ARP packet from the peer: 1 asks for the stack, 2 answers it.
pub fn arp(operation: u8) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, operation];
    packet.extend(PEER_MAC);
    packet.extend(PEER);
    packet.extend(STACK_MAC);
    packet.extend(STACK);
    ethernet(0x0806, &packet)
}

/// Makes every checksum of a frame right that has a place for one.
pub fn repair(frame: &mut [u8]) {
    if frame.len() < 34 {
        return;
    }
    let (header_end, protocol, pseudo) = match u16::from_be_bytes([frame[12], frame[13]]) {
        0x0800 => {
            let len = usize::from(frame[14] & 15) * 4;
            if len < 20 || frame.len() < 14 + len {
                return;
            }
            frame[24..26].fill(0);
            let header = !fold(sum(0, &frame[14..14 + len]));
            frame[24..26].copy_from_slice(&header.to_be_bytes());
            if u16::from_be_bytes([frame[20], frame[21]]) & 0x3fff != 0 {
                return; // A fragment: the sum is over the whole packet.
            }
            (14 + len, frame[23], sum(0, &frame[26..34]))
        }
        0x86dd if frame.len() >= 54 => (54, frame[20], sum(0, &frame[22..54])),
        _ => return,
    };
    let payload = &mut frame[header_end..];
    let at = match protocol {
        1 | 58 => 2,
        6 => 16,
        17 => 6,
        _ => return,
    };
    if payload.len() < at + 2 {
        return;
    }
    payload[at..at + 2].fill(0);
    let pseudo = if protocol == 1 { 0 } else { pseudo + u32::from(protocol) + payload.len() as u32 };
    let value = match !fold(sum(pseudo, payload)) {
        0 if protocol == 17 => 0xffff,
        value => value,
    };
    payload[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// A TCP segment of an IPv4 frame.
#[derive(Debug, Clone)]
pub struct Segment<'a> {
    /// Source port.
    pub from: u16,
    /// Destination port.
    pub to: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// FIN 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32.
    pub flags: u8,
    /// Window, unscaled.
    pub window: u16,
    /// Options, a multiple of 4 bytes.
    pub options: &'a [u8],
    /// Data.
    pub data: &'a [u8],
}

impl Segment<'_> {
    /// As a frame from the peer, with an urgent pointer.
    pub fn frame(&self, urgent: u16) -> Vec<u8> {
        let mut tcp = Vec::with_capacity(64 + self.data.len());
        tcp.extend(self.from.to_be_bytes());
        tcp.extend(self.to.to_be_bytes());
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        tcp.push((5 + self.options.len() as u8 / 4) << 4);
        tcp.push(self.flags);
        tcp.extend(self.window.to_be_bytes());
        tcp.extend([0, 0]);
        tcp.extend(urgent.to_be_bytes());
        tcp.extend(self.options);
        tcp.extend(self.data);
        ipv4(6, &tcp)
    }
}

/// Reads a frame that the stack sent as TCP over IPv4. Panics if a checksum or length in it is wrong.
pub fn read_tcp(frame: &[u8]) -> Option<Segment<'_>> {
    if frame.get(12..14)? != [8, 0] || *frame.get(23)? != 6 {
        return None;
    }
    let mut again = frame.to_vec();
    repair(&mut again);
    assert!(again == frame, "the stack sent a wrong checksum");
    let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
    assert!(total + 14 <= frame.len(), "the stack sent a packet longer than its frame");
    let tcp = &frame[34..14 + total];
    let header = usize::from(tcp[12] >> 4) * 4;
    let be32 = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
    Some(Segment {
        from: u16::from_be_bytes([tcp[0], tcp[1]]),
        to: u16::from_be_bytes([tcp[2], tcp[3]]),
        seq: be32(4),
        ack: be32(8),
        flags: tcp[13],
        window: u16::from_be_bytes([tcp[14], tcp[15]]),
        options: &tcp[20..header],
        data: &tcp[header..],
    })
}
