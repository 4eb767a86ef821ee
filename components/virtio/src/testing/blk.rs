//! A virtio-blk device model (5.2) over bytes in memory.

use super::device::{Element, Hostility, Model, Rings};
use alloc::vec::Vec;

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;

/// A disk.
pub struct BlkModel {
    /// Its content: whole sectors of 512 bytes.
    pub image: Vec<u8>,
    /// Features of its type.
    pub features: u64,
    /// Logical block size, told by `VIRTIO_BLK_F_BLK_SIZE`.
    pub block_size: u32,
    /// Told by `VIRTIO_BLK_F_SEG_MAX`.
    pub seg_max: u32,
    /// Told by `VIRTIO_BLK_F_SIZE_MAX` if not 0.
    pub size_max: u32,
    /// Request queues, told by `VIRTIO_BLK_F_MQ` if more than 1.
    pub queues: u16,
    /// Entries of each queue.
    pub queue_size: u16,
    /// Requests done, by queue.
    pub served: Vec<u64>,
    /// Flushes done.
    pub flushes: u64,
    /// Most segments of data that a request had.
    pub most_segments: usize,
    /// Longest segment of data.
    pub longest_segment: u32,
    /// Sectors (of 512 bytes) that answer with an error.
    pub bad_sector: Option<u64>,
    /// What it returned, for a device that changes it later.
    returned: Vec<Element>,
}

impl BlkModel {
    /// A writable disk with a cache, 128 segments a request, one queue.
    pub fn new(image: Vec<u8>) -> Self {
        assert!(image.len().is_multiple_of(512));
        Self {
            image,
            features: F_SEG_MAX | F_BLK_SIZE | F_FLUSH,
            block_size: 512,
            seg_max: 126,
            size_max: 0,
            queues: 1,
            queue_size: 128,
            served: Vec::new(),
            flushes: 0,
            most_segments: 0,
            longest_segment: 0,
            bad_sector: None,
            returned: Vec::new(),
        }
    }

    /// Makes it read-only.
    pub fn read_only(mut self) -> Self {
        self.features |= F_RO;
        self
    }

    fn serve(&mut self, element: &Element, rings: &Rings<'_>) -> (u8, usize) {
        let arena = rings.arena();
        let input = element.read_all(arena);
        let (Some(header), true) = (input.get(..16), element.writable_len() >= 1) else { return (1, 0) };
        let kind = u32::from_le_bytes(header[0..4].try_into().unwrap());
        let sector = u64::from_le_bytes(header[8..16].try_into().unwrap());
        let segments = if kind == 0 { &element.writable } else { &element.readable };
        self.most_segments = self.most_segments.max(segments.len() - 1);
        for &(_, len) in segments {
            self.longest_segment = self.longest_segment.max(len);
        }
        let room = element.writable_len() - 1;
        let bytes = if kind == 0 { room } else { input.len() - 16 };
        let start = usize::try_from(sector).ok().and_then(|sector| sector.checked_mul(512));
        let range = start.and_then(|start| Some(start..start.checked_add(bytes)?));
        if let (Some(bad), Some(range)) = (self.bad_sector, &range)
            && range.contains(&((bad * 512) as usize))
        {
            return (1, 0);
        }
        match kind {
            0 => match range.and_then(|range| self.image.get(range)) {
                Some(data) => (0, element.write_at(arena, 0, data)),
                None => (1, 0),
            },
            1 if self.features & F_RO == 0 => match range.and_then(|range| self.image.get_mut(range)) {
                Some(place) => {
                    place.copy_from_slice(&input[16..]);
                    (0, 0)
                }
                None => (1, 0),
            },
            4 => {
                self.flushes += 1;
                (0, 0)
            }
            _ => (2, 0),
        }
    }
}

impl Model for BlkModel {
    fn device_type(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        let size_max = if self.size_max > 0 { F_SIZE_MAX } else { 0 };
        self.features | size_max | if self.queues > 1 { F_MQ } else { 0 }
    }

    fn config(&self) -> Vec<u8> {
        let mut config = std::vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.image.len() as u64 / 512).to_le_bytes());
        put(8, &self.size_max.to_le_bytes());
        put(12, &self.seg_max.to_le_bytes());
        put(20, &self.block_size.to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        config
    }

    fn queues(&self) -> u16 {
        self.queues
    }

    fn queue_size(&self) -> u16 {
        self.queue_size
    }

    fn process(&mut self, index: u16, rings: &mut Rings<'_>) {
        self.served.resize(usize::from(self.queues), 0);
        loop {
            while let Some(element) = rings.pop(index) {
                let (mut status, written) = self.serve(&element, rings);
                if rings.hostility() == Hostility::BadAnswer {
                    status = 0x77;
                }
                element.write_at(rings.arena(), element.writable_len().saturating_sub(1), &[status]);
                self.served[usize::from(index)] += 1;
                rings.push(index, &element, written as u32 + 1);
                if rings.hostility() == Hostility::ChangesLater {
                    self.returned.push(element);
                }
            }
            if !rings.want_kick(index) {
                break;
            }
        }
        rings.flush(index);
        for element in &self.returned {
            element.write_at(rings.arena(), 0, &std::vec![0xee; element.writable_len()]);
        }
    }
}
