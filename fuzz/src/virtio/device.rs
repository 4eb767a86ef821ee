//! A virtio device that is honest until the input says otherwise, with the registers of virtio-mmio (VirtIO 1.2, 4.2).
//!
//! Its stream is a list of events: so many ticks from now, this lie. There is a tick at every hypercall and before every
//! look of the driver at shared memory, so anything may change between any two looks.

use super::pci::OnPci;
use crate::host::{Device, DmaMemory, FuzzHost};
use crate::input::Input;
use crate::watch;
use hypercall::Width;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

const QUEUES: usize = 3;
/// `VIRTIO_F_EVENT_IDX`.
const EVENT_IDX: u64 = 1 << 29;

#[derive(Debug, Clone, Copy, Default)]
struct Queue {
    size: u32,
    ready: bool,
    desc: u64,
    avail: u64,
    used: u64,
    taken: u16,
    returned: u16,
}

/// A chain that the device has: where its head is, and its segments as address, length, whether it may write.
#[derive(Debug, Clone, Default)]
struct Chain {
    queue: usize,
    head: u16,
    segments: Vec<(u64, u32, bool)>,
}

/// A word of shared memory that changes between looks: after so many ticks it is swapped with another, at each of so many
/// ticks.
#[derive(Debug, Clone, Copy)]
struct Change {
    wait: u8,
    swaps: u8,
    at: u64,
    other: [u8; 4],
}

/// What both sides of the harness know.
#[derive(Default)]
pub struct Shared {
    /// Something was said that is not true: data cannot be checked any more.
    pub lied: bool,
    /// Frames of a NIC that are to be received.
    pub frames: VecDeque<Vec<u8>>,
}

/// The device.
pub struct Hostile {
    input: Input,
    shared: Arc<Mutex<Shared>>,
    kind: u32,
    legacy: bool,
    features: u64,
    accepted: u64,
    feature_select: u32,
    driver_select: u32,
    status: u8,
    queue_select: usize,
    queue_max: u32,
    queues: [Queue; QUEUES],
    config: Vec<u8>,
    generation: u32,
    isr: u32,
    /// The driver asked for a reset and has not gone on.
    resetting: bool,
    interrupt: bool,
    wait: u16,
    held: bool,
    pending: Vec<Chain>,
    /// What the next register reads say instead.
    lie: Option<(u8, u32)>,
    /// A place that is put back: after so many ticks, where, what.
    restore: Option<(u8, u64, [u8; 4])>,
    /// What becomes of the entry that is given back next, or of its length.
    trap: Option<(Change, bool)>,
    change: Option<Change>,
}

/// What a sector of the disk holds.
pub fn sector_byte(sector: u64, at: usize) -> u8 {
    (sector as u8).wrapping_mul(31) ^ at as u8
}

/// Puts a device of type `kind` (1 network, 2 block) with this configuration space behind a host, on virtio-mmio or PCI.
pub fn plug(
    host: FuzzHost,
    on_pci: bool,
    mut input: Input,
    shared: Arc<Mutex<Shared>>,
    kind: u32,
    features: u64,
    config: Vec<u8>,
) {
    if on_pci {
        let device = |input| Hostile::new(input, true, shared, kind, features, config);
        host.set_device(OnPci::new(&mut input, kind, device));
    } else {
        host.set_device(Hostile::new(input, false, shared, kind, features, config));
    }
}

impl Hostile {
    fn new(
        mut input: Input,
        modern: bool,
        shared: Arc<Mutex<Shared>>,
        kind: u32,
        features: u64,
        mut config: Vec<u8>,
    ) -> Self {
        let how = input.u8();
        let legacy = how & 1 != 0 && !modern;
        let mut offered = features | 1 << 28 | EVENT_IDX | if legacy { 0 } else { 1 << 32 };
        // Features that are switched off one by one.
        offered &= !u64::from(input.u32());
        // What it holds back may come too late.
        let mut lied = how & 0x20 != 0;
        if how & 2 != 0 {
            for _ in 0..input.u8() & 7 {
                let at = input.below(config.len());
                config[at] = input.u8();
                lied = true;
            }
        }
        let queue_max =
            if how & 4 != 0 { input.u16().into() } else { [8, 16, 64, 256][usize::from(how >> 3 & 3)] };
        shared.lock().unwrap_or_else(PoisonError::into_inner).lied = lied;
        Self {
            shared,
            kind,
            legacy,
            features: offered,
            accepted: 0,
            feature_select: 0,
            driver_select: 0,
            status: 0,
            queue_select: 0,
            queue_max,
            queues: [Queue::default(); QUEUES],
            config,
            generation: 0,
            isr: 0,
            resetting: false,
            interrupt: false,
            wait: u16::from(input.u8()),
            held: how & 0x20 != 0,
            pending: Vec::new(),
            lie: None,
            restore: None,
            trap: None,
            change: None,
            input,
        }
    }

    fn shared(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on nothing can be expected of the data.
    pub(super) fn lied(&self) {
        self.shared().lied = true;
    }

    pub(super) fn is_honest(&self) -> bool {
        !self.shared().lied
    }

    /// What a register says: the value, or the lie that is told now.
    pub(super) fn or_lie(&mut self, value: u64) -> u64 {
        let Some((times, lie)) = &mut self.lie else { return value };
        *times -= 1;
        let lie = *lie;
        if *times == 0 {
            self.lie = None;
        }
        lie.into()
    }

    /// Takes what the driver offered on a queue.
    fn take(&mut self, dma: &mut DmaMemory, index: usize) {
        let Some(queue) = self.queues.get_mut(index).filter(|queue| queue.ready && queue.size > 0) else {
            return;
        };
        for _ in 0..queue.size {
            let Some(avail) = read16(dma, queue.avail + 2) else { return };
            if avail == queue.taken {
                break;
            }
            let slot = u64::from(queue.taken) % u64::from(queue.size);
            let Some(head) = read16(dma, queue.avail + 4 + 2 * slot) else { return };
            queue.taken = queue.taken.wrapping_add(1);
            let mut chain = Chain { queue: index, head, segments: Vec::new() };
            let walked = walk(dma, queue, head, &mut chain.segments);
            self.pending.push(chain);
            // Who lied may have changed it himself.
            let honest = !self.shared.lock().unwrap_or_else(PoisonError::into_inner).lied;
            if let (true, Err(wrong)) = (honest, walked) {
                panic!("the driver offers a chain that {wrong}");
            }
        }
        if self.accepted & EVENT_IDX != 0 {
            // It wants to be told of the next one (2.7.10).
            let event = queue.used + 4 + 8 * u64::from(queue.size);
            if let Some(place) = dma.at(event, 2) {
                place.copy_from_slice(&queue.taken.to_le_bytes());
            }
        }
    }

    /// Gives a chain back, with what it should say and what it says.
    fn give(&mut self, dma: &mut DmaMemory, chain: &Chain, id: u32, len: u32) {
        let Some(queue) = self.queues.get_mut(chain.queue).filter(|queue| queue.size > 0) else { return };
        let at = queue.used + 4 + 8 * (u64::from(queue.returned) % u64::from(queue.size));
        if let Some(entry) = dma.at(at, 8) {
            entry[..4].copy_from_slice(&id.to_le_bytes());
            entry[4..].copy_from_slice(&len.to_le_bytes());
        }
        queue.returned = queue.returned.wrapping_add(1);
        if let Some(index) = dma.at(queue.used + 2, 2) {
            index.copy_from_slice(&queue.returned.to_le_bytes());
        }
        if let Some((change, in_length)) = self.trap.take() {
            self.change = Some(Change { at: at + if in_length { 4 } else { 0 }, ..change });
        }
        self.isr |= 1;
        self.interrupt = true;
    }

    /// Does the work of a chain honestly; says how many bytes were written.
    fn serve(&mut self, dma: &mut DmaMemory, chain: &Chain) -> u32 {
        match self.kind {
            2 => serve_disk(dma, chain),
            _ if chain.queue == 0 => {
                let frame = self.shared().frames.pop_front().unwrap_or_default();
                let mut data = vec![0; if self.legacy && self.accepted & 1 << 15 == 0 { 10 } else { 12 }];
                if let Some(count) = data.get_mut(10..12) {
                    count.copy_from_slice(&1u16.to_le_bytes());
                }
                data.extend(frame);
                let mut written = 0;
                for &(addr, len, write) in &chain.segments {
                    let n = (len as usize).min(data.len() - written);
                    if write && let Some(place) = dma.at(addr, n) {
                        place.copy_from_slice(&data[written..written + n]);
                        written += n;
                    }
                }
                written as u32
            }
            _ => {
                // Transmitted, or a command that is acknowledged.
                let Some(&(addr, len, _)) = chain.segments.iter().rfind(|segment| segment.2) else {
                    return 0;
                };
                if let Some(place) = dma.at(addr, len.min(1) as usize) {
                    place.fill(0);
                }
                len.min(1)
            }
        }
    }

    fn serve_all(&mut self, dma: &mut DmaMemory) {
        let all = core::mem::take(&mut self.pending);
        for chain in all {
            // Receive buffers wait for frames.
            if self.kind == 1 && chain.queue == 0 && self.shared().frames.is_empty() {
                self.pending.push(chain);
                continue;
            }
            let len = self.serve(dma, &chain);
            self.give(dma, &chain, chain.head.into(), len);
        }
    }

    /// What the input does next.
    fn event(&mut self, dma: &mut DmaMemory) {
        let kind = self.input.u8();
        let index = self.input.below(QUEUES);
        let queue = self.queues[index];
        match kind & 15 {
            0 | 1 if !self.pending.is_empty() => {
                let which = usize::from(kind >> 4) % self.pending.len();
                let chain = self.pending.remove(which);
                let len = self.serve(dma, &chain);
                self.give(dma, &chain, chain.head.into(), len);
            }
            2 if !self.pending.is_empty() => {
                let chain = self.pending.remove(0);
                let honest = self.serve(dma, &chain);
                let len = self.input.pick(&[
                    0,
                    1,
                    honest + 1,
                    honest.wrapping_sub(1),
                    0x7fff_ffff,
                    u32::MAX,
                    513,
                    4096,
                ]);
                self.lied();
                self.give(dma, &chain, chain.head.into(), len);
            }
            3 => {
                let chain = Chain { queue: index, ..Chain::default() };
                let id = if kind & 0x80 != 0 { self.input.u32() } else { self.input.u8().into() };
                let len = self.input.u16();
                self.lied();
                self.give(dma, &chain, id, len.into());
            }
            4 => {
                // The used index says something else for a while, or for good.
                let value = queue.returned.wrapping_add(if kind & 0x80 != 0 {
                    self.input.u16()
                } else {
                    i16::from(self.input.u8().cast_signed()).cast_unsigned()
                });
                let ticks = if kind & 0x40 != 0 { 1 + (kind >> 4 & 3) } else { 0 };
                self.put(dma, queue.used + 2, &value.to_le_bytes(), ticks);
            }
            5 => {
                // Somewhere in the rings.
                let base = [queue.used, queue.avail, queue.desc][usize::from(kind >> 4) % 3];
                let at = base + u64::from(self.input.u16() % 4096);
                let bytes = self.input.u16().to_le_bytes();
                self.put(dma, at, &bytes, kind >> 6);
            }
            6 => {
                // Anywhere in what the driver shares, headers and answers among it.
                let at = crate::host::DMA_BASE + self.input.below(dma.used().max(1)) as u64;
                let bytes = self.input.u32().to_le_bytes();
                self.put(dma, at, &bytes[..1 + usize::from(kind >> 4 & 3)], kind >> 6);
            }
            7 => {
                self.lied();
                let value =
                    if kind & 0x80 != 0 { self.input.u32() } else { [0, u32::MAX, 1, 0x8000_0000][index] };
                self.lie = Some((1 + (kind >> 4 & 7), value));
            }
            8 => {
                self.lied();
                let at = self.input.below(self.config.len());
                self.config[at] = self.input.u8();
                self.generation += 1;
                self.isr |= 2;
                self.interrupt = true;
            }
            9 => {
                self.lied();
                self.status = if kind & 0x80 != 0 { 0 } else { self.status | 0x40 };
            }
            10 => (self.interrupt, self.isr) = (true, self.isr | 1),
            11 => {
                self.lied();
                self.held = kind & 0x10 != 0;
            }
            12 => {
                self.lied();
                self.features = self.input.u64();
            }
            13 => {
                self.lied();
                self.queue_max = self.input.u16().into();
            }
            14 => {
                // One buffer given back twice.
                if let Some(chain) = self.pending.first().cloned() {
                    self.lied();
                    self.give(dma, &chain, chain.head.into(), 1);
                }
            }
            15 => {
                let value = self.input.pick(&[u32::MAX, 0, 1, 2, queue.size, 0x1_0000, 512, 0x8000_0000]);
                self.lied();
                let swaps = if kind & 0x80 != 0 { 1 } else { 16 };
                let change = Change { wait: kind >> 5 & 3, swaps, at: 0, other: value.to_le_bytes() };
                self.trap = Some((change, kind & 0x10 != 0));
            }
            _ => {}
        }
    }

    /// What a register holds.
    fn look(&self, offset: usize, width: Width) -> u64 {
        if offset >= 0x100 {
            let byte = |at: usize| u64::from(self.config.get(offset - 0x100 + at).copied().unwrap_or(0));
            return (0..width.bytes()).rev().fold(0, |value, at| value << 8 | byte(at));
        }
        let queue = self.queues.get(self.queue_select).copied().unwrap_or_default();
        let value = match offset {
            0x00 => 0x7472_6976,
            0x04 => 1 + u32::from(!self.legacy),
            0x08 => self.kind,
            0x0c => 0x554d_4551,
            0x10 if self.feature_select < 2 => (self.features >> (32 * self.feature_select)) as u32,
            0x34 if self.queue_select < QUEUES => self.queue_max,
            0x40 => (queue.desc >> 12) as u32,
            0x44 => queue.ready.into(),
            0x60 => self.isr,
            0x70 => self.status.into(),
            0xfc => self.generation,
            _ => 0,
        };
        value.into()
    }

    fn put(&mut self, dma: &mut DmaMemory, at: u64, bytes: &[u8], ticks: u8) {
        self.lied();
        let Some(place) = dma.at(at, bytes.len()) else { return };
        if ticks > 0 && self.restore.is_none() {
            let mut old = [0; 4];
            old[..bytes.len()].copy_from_slice(place);
            self.restore = Some((ticks, at, old));
            place.copy_from_slice(bytes);
            if bytes.len() < 4
                && let (Some(rest), Some((_, _, old))) = (dma.at(at, 4), &mut self.restore)
            {
                old[bytes.len()..].copy_from_slice(&rest[bytes.len()..]);
            }
            return;
        }
        place.copy_from_slice(bytes);
    }
}

fn read16(dma: &mut DmaMemory, at: u64) -> Option<u16> {
    Some(u16::from_le_bytes(dma.at(at, 2)?.try_into().ok()?))
}

/// Walks a chain (2.7.5), as far as it goes. The error says what is wrong with it.
fn walk(
    dma: &mut DmaMemory,
    queue: &Queue,
    head: u16,
    segments: &mut Vec<(u64, u32, bool)>,
) -> Result<(), &'static str> {
    let (mut table, mut entries, mut at) = (queue.desc, queue.size, u32::from(head));
    let mut direct = true;
    // More than any table has, so that a loop ends.
    for _ in 0..300 {
        if at >= entries {
            return Err("leaves its table");
        }
        let raw = dma.at(table + 16 * u64::from(at), 16).ok_or("is not in shared memory")?;
        let addr = u64::from_le_bytes(raw[..8].try_into().expect("8 bytes"));
        let len = u32::from_le_bytes(raw[8..12].try_into().expect("4 bytes"));
        let (flags, next) = (raw[12], u16::from_le_bytes([raw[14], raw[15]]));
        if !dma.is_shared(addr, len as usize) {
            segments.push((addr, len, flags & 2 != 0));
            return Err("names memory that is not shared");
        }
        if flags & 4 != 0 && direct {
            (table, entries, at, direct) = (addr, len / 16, 0, false);
            continue;
        }
        if flags & 2 == 0 && segments.last().is_some_and(|segment| segment.2) {
            return Err("is to be read after what is to be written");
        }
        segments.push((addr, len, flags & 2 != 0));
        if flags & 1 == 0 {
            return Ok(());
        }
        at = next.into();
    }
    Err("has no end")
}

/// A request of virtio-blk (5.2.6) for a disk of patterned sectors.
fn serve_disk(dma: &mut DmaMemory, chain: &Chain) -> u32 {
    let Some(&(header, 16.., false)) = chain.segments.first() else { return 0 };
    let Some(header) = dma.at(header, 16) else { return 0 };
    let read = header[0] == 0;
    let mut sector = u64::from_le_bytes(header[8..16].try_into().expect("8 bytes"));
    let mut written = 0;
    let count = chain.segments.len();
    for &(addr, len, write) in &chain.segments[1..count] {
        let Some(place) = dma.at(addr, len as usize) else { continue };
        if write && len == 1 {
            place[0] = 0;
            written += 1;
        } else if write && read {
            for (at, byte) in place.iter_mut().enumerate() {
                *byte = sector_byte(sector + at as u64 / 512, at % 512);
            }
            sector += u64::from(len) / 512;
            written += len;
        }
    }
    written
}

impl Device for Hostile {
    fn read(&mut self, _: &mut DmaMemory, offset: usize, width: Width) -> u64 {
        let value = self.look(offset, width);
        let value = self.or_lie(value);
        if offset == 0x70 && self.resetting && value & 0xff != 0 {
            // It may still write to what it was given: the driver must never use that memory again.
            watch::allow_leak();
        }
        value
    }

    fn write(&mut self, dma: &mut DmaMemory, offset: usize, _: Width, value: u64) {
        let value = value as u32;
        let (legacy, max) = (self.legacy, self.queue_max);
        let queue = self.queues.get_mut(self.queue_select);
        let half = |field: &mut u64| {
            let shift = if offset & 4 != 0 { 32 } else { 0 };
            *field = *field & !(0xffff_ffff << shift) | u64::from(value) << shift;
        };
        match (offset, queue) {
            (0x14, _) => self.feature_select = value,
            (0x20, _) if self.driver_select < 2 => {
                let shift = 32 * self.driver_select;
                self.accepted = self.accepted & !(0xffff_ffff << shift) | u64::from(value) << shift;
            }
            (0x24, _) => self.driver_select = value,
            (0x30, _) => self.queue_select = value as usize,
            (0x38, Some(queue)) => queue.size = value,
            (0x40, Some(queue)) if legacy => {
                queue.size = if queue.size == 0 { max } else { queue.size };
                let n = u64::from(queue.size);
                queue.desc = u64::from(value) << 12;
                queue.avail = queue.desc + 16 * n;
                queue.used = (queue.avail + 6 + 2 * n).next_multiple_of(4096);
                queue.ready = value != 0;
            }
            (0x44, Some(queue)) if !legacy => queue.ready = value == 1,
            (0x50, _) => {
                self.take(dma, value as usize);
                if !self.held {
                    self.serve_all(dma);
                }
            }
            (0x64, _) => self.isr &= !value,
            (0x70, _) if value == 0 => {
                self.resetting = true;
                self.status = 0;
                self.pending.clear();
                (self.restore, self.change) = (None, None);
                self.queues = [Queue::default(); QUEUES];
            }
            (0x70, _) => {
                self.resetting = false;
                self.status = value as u8;
            }
            (0x80 | 0x84, Some(queue)) => half(&mut queue.desc),
            (0x90 | 0x94, Some(queue)) => half(&mut queue.avail),
            (0xa0 | 0xa4, Some(queue)) => half(&mut queue.used),
            _ => {}
        }
    }

    fn tick(&mut self, dma: &mut DmaMemory) {
        if let Some((ticks, at, old)) = self.restore {
            if ticks > 1 {
                self.restore = Some((ticks - 1, at, old));
            } else {
                self.restore = None;
                if let Some(place) = dma.at(at, 2) {
                    place.copy_from_slice(&old[..2]);
                }
            }
        }
        match &mut self.change {
            Some(change) if change.wait > 0 => change.wait -= 1,
            Some(change) if change.swaps > 0 => {
                change.swaps -= 1;
                if let Some(place) = dma.at(change.at, 4) {
                    place.swap_with_slice(&mut change.other);
                }
            }
            _ => self.change = None,
        }
        if self.wait > 0 {
            self.wait -= 1;
            return;
        }
        if self.input.is_empty() {
            return;
        }
        self.event(dma);
        let wait = self.input.u8();
        self.wait = if wait < 128 { wait / 4 } else { wait }.into();
    }

    fn interrupt(&mut self) -> bool {
        core::mem::take(&mut self.interrupt)
    }
}
