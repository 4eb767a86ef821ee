//! The way out: the queues of the interfaces that this shard owns, and the rings to the shards that own others.

use crate::checksum::Sum;
use crate::counters::NetCounters;
use crate::packet::{ETHERNET_LEN, Mac, ethertype, put};
use crate::route::LOOPBACK;
use crate::shard::Message;
use alloc::{boxed::Box, collections::VecDeque, vec::Vec};
use anykernel::nic::{ChecksumAt, NicCaps, NicQueue, Segment, TxMeta};

/// Frames that wait for room in a transmit queue, per interface. More are dropped.
const MAX_STAGED: usize = 256;

/// Packets to ourselves that wait to be taken in. More are dropped.
const MAX_LOCAL: usize = 512;

/// Buffers kept for reuse.
const MAX_POOL: usize = 64;

/// One interface as seen by one shard.
pub(crate) struct Port {
    /// Our queue. `None` while frames are being received from it, or if another shard owns it.
    pub(crate) queue: Option<Box<dyn NicQueue>>,
    /// The shard that owns the queue we send by.
    pub(crate) owner: usize,
    pub(crate) mac: Mac,
    pub(crate) caps: NicCaps,
    staged: VecDeque<(Vec<u8>, TxMeta)>,
    needs_flush: bool,
    /// Unplugged: nothing leaves by it.
    gone: bool,
}

impl Port {
    pub(crate) fn new(queue: Option<Box<dyn NicQueue>>, owner: usize, mac: Mac, caps: NicCaps) -> Self {
        Self { queue, owner, mac, caps, staged: VecDeque::new(), needs_flush: false, gone: false }
    }

    /// Lets go of the queue, and of what waits for it. Says how many frames that were.
    pub(crate) fn unplug(&mut self) -> usize {
        self.gone = true;
        self.queue = None;
        core::mem::take(&mut self.staged).len()
    }
}

/// What a packet carries, as far as checksums and cutting go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) v6: bool,
    /// Where the transport checksum is in the transport header; `None`: the packet is complete as it is.
    pub(crate) checksum_field: Option<u16>,
    /// Payload bytes per segment, if the device is to cut it.
    pub(crate) segment: Option<u16>,
}

impl Layout {
    pub(crate) fn tcp(v6: bool, segment: Option<u16>) -> Self {
        Self { v6, checksum_field: Some(16), segment }
    }
    pub(crate) fn udp(v6: bool) -> Self {
        Self { v6, checksum_field: Some(6), segment: None }
    }
    pub(crate) fn complete(v6: bool) -> Self {
        Self { v6, checksum_field: None, segment: None }
    }
}

/// All ways out of a shard.
pub(crate) struct Io {
    pub(crate) shard: usize,
    pub(crate) ports: Vec<Port>,
    /// Packets to ourselves, each behind room for an Ethernet header.
    pub(crate) local: VecDeque<Vec<u8>>,
    /// Messages for other shards.
    pub(crate) outbox: Vec<(usize, Message)>,
    pub(crate) counters: NetCounters,
    pool: Vec<Vec<u8>>,
}

impl Io {
    pub(crate) fn new(shard: usize, ports: Vec<Port>, counters: NetCounters) -> Self {
        Self { shard, ports, local: VecDeque::new(), outbox: Vec::new(), counters, pool: Vec::new() }
    }

    /// An empty buffer with room for `len` bytes, or nothing.
    pub(crate) fn buffer(&mut self, len: usize) -> Option<Vec<u8>> {
        let mut buf = self.pool.pop().unwrap_or_default();
        buf.clear();
        buf.try_reserve(len).ok()?;
        Some(buf)
    }

    /// A buffer that holds `data`.
    pub(crate) fn copy(&mut self, data: &[u8]) -> Option<Vec<u8>> {
        let mut buf = self.buffer(data.len())?;
        buf.extend_from_slice(data);
        Some(buf)
    }

    /// Takes a buffer back.
    pub(crate) fn recycle(&mut self, buf: Vec<u8>) {
        // Jumbo buffers are not hoarded: small guests need the memory.
        if self.pool.len() < MAX_POOL && buf.capacity() <= 4096 {
            self.pool.push(buf);
        }
    }

    pub(crate) fn caps(&self, iface: usize) -> NicCaps {
        self.ports.get(iface).map_or(NicCaps::empty(), |port| port.caps)
    }

    pub(crate) fn mac(&self, iface: usize) -> Mac {
        self.ports.get(iface).map_or([0; 6], |port| port.mac)
    }

    /// Whether a connection should go on sending by this interface.
    pub(crate) fn has_room(&self, iface: usize) -> bool {
        match self.ports.get(iface) {
            Some(port) => port.staged.len() < MAX_STAGED / 2 && self.outbox.len() < MAX_STAGED,
            None => self.local.len() < MAX_LOCAL / 2,
        }
    }

    /// Sends an IP packet of `len` bytes, which `fill` writes, to `dst` on the link. What cannot be sent is counted.
    pub(crate) fn transmit(
        &mut self,
        iface: usize,
        dst: Mac,
        len: usize,
        layout: Layout,
        fill: &mut dyn FnMut(&mut [u8]),
    ) {
        if iface == LOOPBACK {
            return self.transmit_local(len, fill);
        }
        let Some(port) = self.ports.get_mut(iface) else { return };
        let frame_len = ETHERNET_LEN + len;
        let offload = port.caps.contains(NicCaps::TX_CHECKSUM);
        let meta = meta(layout, offload);
        let mac = port.mac;
        let mut write = |frame: &mut [u8]| {
            let Some((header, packet)) = frame.split_first_chunk_mut::<ETHERNET_LEN>() else { return };
            let kind = if layout.v6 { ethertype::IPV6 } else { ethertype::IPV4 };
            put(header, 0, &dst);
            put(header, 6, &mac);
            put(header, 12, &kind.to_be_bytes());
            fill(packet);
            if let Some(field) = layout.checksum_field {
                fill_checksum(packet, layout.v6, usize::from(field), offload);
            }
        };
        self.counters.tx_frames.increment();
        self.counters.tx_bytes.add(frame_len as u64);
        if let Some(queue) = port.queue.as_mut()
            && port.staged.is_empty()
            && queue.transmit(frame_len, meta, &mut write).is_ok()
        {
            port.needs_flush = true;
            return;
        }
        let full = port.gone || port.staged.len() >= MAX_STAGED;
        let Some(mut buf) = self.buffer(frame_len).filter(|_| !full) else {
            // The packet counts as sent: its sender has moved on. TCP will repeat it.
            self.counters.drop_tx_full.increment();
            let mut scratch = alloc::vec![0; frame_len];
            return write(&mut scratch);
        };
        buf.resize(frame_len, 0);
        write(&mut buf);
        self.stage(iface, buf, meta);
    }

    /// Sends a frame that is complete but for its destination.
    pub(crate) fn transmit_frame(&mut self, iface: usize, frame: Vec<u8>, meta: TxMeta) {
        self.counters.tx_frames.increment();
        self.counters.tx_bytes.add(frame.len() as u64);
        self.transmit_built(iface, frame, meta);
    }

    /// Sends a frame that another shard made and counted.
    pub(crate) fn transmit_built(&mut self, iface: usize, frame: Vec<u8>, meta: TxMeta) {
        let Some(port) = self.ports.get_mut(iface) else { return };
        if let Some(queue) = port.queue.as_mut()
            && port.staged.is_empty()
            && queue.transmit(frame.len(), meta, &mut |out| put(out, 0, &frame)).is_ok()
        {
            port.needs_flush = true;
            self.recycle(frame);
        } else if port.gone || port.staged.len() >= MAX_STAGED {
            self.counters.drop_tx_full.increment();
            self.recycle(frame);
        } else {
            self.stage(iface, frame, meta);
        }
    }

    /// The frame as [`Io::transmit`] would send it, to be kept until the destination is known.
    pub(crate) fn build(
        &mut self,
        iface: usize,
        len: usize,
        layout: Layout,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Option<(Vec<u8>, TxMeta)> {
        let mut buf = self.buffer(ETHERNET_LEN + len)?;
        buf.resize(ETHERNET_LEN + len, 0);
        let port = self.ports.get(iface)?;
        let offload = port.caps.contains(NicCaps::TX_CHECKSUM);
        let kind = if layout.v6 { ethertype::IPV6 } else { ethertype::IPV4 };
        put(&mut buf, 6, &port.mac);
        put(&mut buf, 12, &kind.to_be_bytes());
        let packet = buf.get_mut(ETHERNET_LEN..)?;
        fill(packet);
        if let Some(field) = layout.checksum_field {
            fill_checksum(packet, layout.v6, usize::from(field), offload);
        }
        Some((buf, meta(layout, offload)))
    }

    fn stage(&mut self, iface: usize, buf: Vec<u8>, meta: TxMeta) {
        let Some(port) = self.ports.get_mut(iface) else { return };
        if port.owner == self.shard {
            port.staged.push_back((buf, meta));
        } else {
            let owner = port.owner;
            self.outbox.push((owner, Message::Transmit { iface, frame: buf, meta }));
        }
    }

    fn transmit_local(&mut self, len: usize, fill: &mut dyn FnMut(&mut [u8])) {
        let full = self.local.len() >= MAX_LOCAL;
        let buf = self.buffer(ETHERNET_LEN + len);
        let Some(mut buf) = buf.filter(|_| !full) else {
            self.counters.drop_tx_full.increment();
            let mut scratch = alloc::vec![0; len];
            return fill(&mut scratch);
        };
        buf.resize(ETHERNET_LEN + len, 0);
        if let Some(packet) = buf.get_mut(ETHERNET_LEN..) {
            fill(packet);
        }
        self.local.push_back(buf);
    }

    /// Hands staged frames to the queues and rings their doorbells. `true`: some queue is still full.
    pub(crate) fn flush(&mut self) -> bool {
        let mut full = false;
        for port in &mut self.ports {
            let Some(queue) = port.queue.as_mut() else { continue };
            while let Some((frame, meta)) = port.staged.pop_front() {
                if queue.transmit(frame.len(), meta, &mut |out| put(out, 0, &frame)).is_err() {
                    port.staged.push_front((frame, meta));
                    full = true;
                    break;
                }
                port.needs_flush = true;
                if self.pool.len() < MAX_POOL && frame.capacity() <= 4096 {
                    self.pool.push(frame);
                }
            }
            if core::mem::take(&mut port.needs_flush) {
                queue.flush();
            }
        }
        full
    }

    /// Whether frames wait for room in a queue of ours.
    pub(crate) fn is_waiting(&self) -> bool {
        self.ports.iter().any(|port| port.queue.is_some() && !port.staged.is_empty())
    }

    /// Asks every queue for its signal. `true`: one has something already.
    pub(crate) fn arm(&mut self) -> bool {
        let mut ready = false;
        for queue in self.ports.iter_mut().filter_map(|port| port.queue.as_mut()) {
            ready |= queue.arm();
        }
        ready
    }
}

fn meta(layout: Layout, offload: bool) -> TxMeta {
    let ip_len: u16 = if layout.v6 { 40 } else { 20 };
    let start = ETHERNET_LEN as u16 + ip_len;
    TxMeta {
        checksum: layout.checksum_field.filter(|_| offload).map(|field| ChecksumAt { start, field }),
        // smoltcp sends no TCP options on data segments as we configure it.
        segment: layout.segment.map(|mss| Segment { mss, header_len: start + 20, ipv6: layout.v6 }),
    }
}

/// Writes the transport checksum of an IP packet without options, or with `offload` the pseudo-header's sum.
fn fill_checksum(packet: &mut [u8], v6: bool, field: usize, offload: bool) {
    let (ip_len, addresses, protocol_at) = if v6 { (40, 8..40, 6) } else { (20, 12..20, 9) };
    let Some((header, transport)) = packet.split_at_mut_checked(ip_len) else { return };
    let (Some(addresses), Some(&protocol)) = (header.get(addresses), header.get(protocol_at)) else { return };
    put(transport, field, &[0, 0]);
    let len = transport.len();
    let pseudo =
        Sum::default().bytes(addresses).word(u16::from(protocol)).word((len >> 16) as u16).word(len as u16);
    let value = if offload {
        pseudo.fold()
    } else {
        match pseudo.bytes(transport).finish() {
            // 0 means "no checksum" in UDP (RFC 768).
            0 if protocol == crate::packet::protocol::UDP => 0xffff,
            value => value,
        }
    };
    put(transport, field, &value.to_be_bytes());
}
