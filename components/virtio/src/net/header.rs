//! `struct virtio_net_hdr` in front of every frame (5.1.6).

use crate::spec::net as spec;
use anykernel::nic::{NicCaps, RxMeta, TxMeta};

/// The header of a frame to send, or `None` if it asks for what was not agreed on.
pub(super) fn transmit(meta: &TxMeta, caps: NicCaps) -> Option<[u8; spec::HEADER_BYTES]> {
    let (mut flags, mut start, mut field) = (0, 0, 0);
    if let Some(checksum) = meta.checksum {
        if !caps.contains(NicCaps::TX_CHECKSUM) {
            return None;
        }
        (flags, start, field) = (spec::HDR_NEEDS_CSUM, checksum.start, checksum.field);
    }
    let (mut kind, mut header_len, mut mss) = (spec::GSO_NONE, 0, 0);
    if let Some(segment) = meta.segment {
        let (needed, gso) =
            if segment.ipv6 { (NicCaps::TSO6, spec::GSO_TCPV6) } else { (NicCaps::TSO4, spec::GSO_TCPV4) };
        // Cutting includes the checksums of the pieces (5.1.6.2.1).
        if !caps.contains(needed) || meta.checksum.is_none() || segment.mss == 0 {
            return None;
        }
        (kind, header_len, mss) = (gso, segment.header_len, segment.mss);
    }
    let [h0, h1] = header_len.to_le_bytes();
    let [m0, m1] = mss.to_le_bytes();
    let [s0, s1] = start.to_le_bytes();
    let [f0, f1] = field.to_le_bytes();
    Some([flags, kind, h0, h1, m0, m1, s0, s1, f0, f1, 0, 0])
}

/// What a received header says: what is known of the frame, and in how many buffers it came.
pub(super) fn receive(header: &[u8; spec::HEADER_BYTES], caps: NicCaps, mergeable: bool) -> (RxMeta, u16) {
    let [flags, _, _, _, _, _, _, _, _, _, n0, n1] = *header;
    // A partial checksum means that the frame never left this machine.
    let vouched = flags & (spec::HDR_NEEDS_CSUM | spec::HDR_DATA_VALID) != 0;
    let checksum_ok = vouched && caps.contains(NicCaps::RX_CHECKSUM);
    (RxMeta { checksum_ok }, if mergeable { u16::from_le_bytes([n0, n1]) } else { 1 })
}
