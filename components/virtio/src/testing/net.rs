//! A virtio-net device model (5.1).

use super::device::{Element, Hostility, Model, Rings};
use alloc::vec::Vec;
use std::collections::VecDeque;

const F_STATUS: u64 = 1 << 16;
const F_MTU: u64 = 1 << 3;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_VERSION_1: u64 = 1 << 32;

/// A frame that the driver sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentFrame {
    /// The queue pair it came from.
    pub pair: u16,
    /// The virtio-net header.
    pub header: Vec<u8>,
    /// The frame.
    pub frame: Vec<u8>,
}

/// A network interface.
pub struct NetModel {
    /// Its address.
    pub mac: [u8; 6],
    /// Largest packet.
    pub mtu: u16,
    /// Features of its type.
    pub features: u64,
    /// Queue pairs.
    pub pairs: u16,
    /// Entries of each queue.
    pub queue_size: u16,
    /// What was sent.
    pub sent: Vec<SentFrame>,
    /// How many pairs the driver asked for.
    pub active_pairs: u16,
    /// The link.
    pub up: bool,
    /// Sent frames come back as received ones.
    pub echo: bool,
    /// Chains of the transmit queues stay with the device until [`NetModel::finish_sending`].
    pub slow: bool,
    /// Largest receive buffer seen.
    pub largest_buffer: usize,
    header_len: usize,
    mergeable: bool,
    unfinished: VecDeque<(u16, Element)>,
}

impl NetModel {
    /// With every offload, mergeable buffers, link status, MTU, and one pair.
    pub fn new(mac: [u8; 6]) -> Self {
        let offloads = 1 << 0 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12;
        Self {
            mac,
            mtu: 1500,
            features: offloads | 1 << 5 | F_MTU | F_STATUS | F_MRG_RXBUF,
            pairs: 1,
            queue_size: 256,
            sent: Vec::new(),
            active_pairs: 1,
            up: true,
            echo: false,
            slow: false,
            largest_buffer: 0,
            header_len: 12,
            mergeable: false,
            unfinished: VecDeque::new(),
        }
    }

    /// Changed by `change`.
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// With `pairs` queue pairs and a control queue.
    pub fn with_pairs(mut self, pairs: u16) -> Self {
        self.pairs = pairs;
        self.features |= 1 << 17 | 1 << 22;
        self
    }

    /// Puts a frame into the receive buffers of `pair`. `false`: there are too few.
    pub fn receive(&mut self, rings: &mut Rings<'_>, pair: u16, flags: u8, frame: &[u8]) -> bool {
        self.receive_in(rings, pair, flags, frame, usize::MAX)
    }

    /// As [`NetModel::receive`], but shows only the first `shown` buffers to the driver at once, then the rest.
    pub fn receive_in(
        &mut self,
        rings: &mut Rings<'_>,
        pair: u16,
        flags: u8,
        frame: &[u8],
        shown: usize,
    ) -> bool {
        let queue = 2 * pair;
        let mut data = std::vec![0u8; self.header_len];
        data[0] = flags;
        data.extend_from_slice(frame);
        let mut elements: Vec<(Element, usize)> = Vec::new();
        let mut at = 0;
        while at < data.len() {
            let Some(element) = rings.pop(queue) else {
                rings.want_kick(queue);
                return false;
            };
            self.largest_buffer = self.largest_buffer.max(element.writable_len());
            let n = element.writable_len().min(data.len() - at);
            elements.push((element, n));
            at += n;
            if !self.mergeable {
                break;
            }
        }
        if self.mergeable {
            let mut count = elements.len() as u16;
            if rings.hostility() == Hostility::BadAnswer {
                count = if frame.len().is_multiple_of(2) { 0 } else { 0xffff };
            }
            data[10..12].copy_from_slice(&count.to_le_bytes());
        }
        let mut at = 0;
        for (i, (element, n)) in elements.iter().enumerate() {
            element.write_at(rings.arena(), 0, &data[at..at + n]);
            at += n;
            rings.push(queue, element, *n as u32);
            if i + 1 == shown {
                rings.flush(queue);
            }
        }
        rings.flush(queue);
        if rings.hostility() == Hostility::ChangesLater {
            for (element, _) in &elements {
                element.write_at(rings.arena(), 0, &std::vec![0xee; element.writable_len()]);
            }
        }
        true
    }

    /// Returns at most `count` transmit chains that a slow device kept.
    pub fn finish_sending(&mut self, rings: &mut Rings<'_>, count: usize) {
        for _ in 0..count {
            let Some((queue, element)) = self.unfinished.pop_front() else { break };
            rings.push(queue, &element, 0);
            rings.flush(queue);
        }
    }

    fn control(&mut self, queue: u16, rings: &mut Rings<'_>) {
        while let Some(element) = rings.pop(queue) {
            rings.want_kick(queue);
            let command = element.read_all(rings.arena());
            let answer = match command[..] {
                [4, 0, low, high] => {
                    let pairs = u16::from_le_bytes([low, high]);
                    let known = (1..=self.pairs).contains(&pairs);
                    if known {
                        self.active_pairs = pairs;
                    }
                    u8::from(!known || rings.hostility() == Hostility::BadAnswer)
                }
                _ => 1,
            };
            element.write_at(rings.arena(), 0, &[answer]);
            rings.push(queue, &element, 1);
        }
        rings.flush(queue);
    }
}

impl Model for NetModel {
    fn device_type(&self) -> u32 {
        1
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn negotiated(&mut self, features: u64) {
        self.mergeable = features & F_MRG_RXBUF != 0;
        self.header_len = if self.mergeable || features & F_VERSION_1 != 0 { 12 } else { 10 };
    }

    fn config(&self) -> Vec<u8> {
        let mut config = self.mac.to_vec();
        config.extend(u16::from(self.up).to_le_bytes());
        config.extend(self.pairs.to_le_bytes());
        config.extend(self.mtu.to_le_bytes());
        config
    }

    fn queues(&self) -> u16 {
        2 * self.pairs + u16::from(self.features & 1 << 17 != 0)
    }

    fn queue_size(&self) -> u16 {
        self.queue_size
    }

    fn process(&mut self, index: u16, rings: &mut Rings<'_>) {
        if index == 2 * self.pairs {
            self.control(index, rings);
            return;
        }
        if index.is_multiple_of(2) {
            // Receive buffers are used when a frame comes; until then no doorbell is of interest.
            return;
        }
        let mut echoes = Vec::new();
        loop {
            while let Some(element) = rings.pop(index) {
                let data = element.read_all(rings.arena());
                let (header, frame) = data.split_at(self.header_len.min(data.len()));
                if self.echo {
                    echoes.push(frame.to_vec());
                }
                self.sent.push(SentFrame { pair: index / 2, header: header.to_vec(), frame: frame.to_vec() });
                if self.slow {
                    self.unfinished.push_back((index, element));
                } else {
                    rings.push(index, &element, 0);
                }
            }
            if !rings.want_kick(index) {
                break;
            }
        }
        rings.flush(index);
        for frame in echoes {
            self.receive(rings, index / 2, 0, &frame);
        }
    }
}
