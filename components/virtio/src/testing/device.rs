//! What every device model shares: status, features, queues, and the device's side of the split ring.

use super::arena::Arena;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};
use std::collections::VecDeque;

/// One way to break the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Hostility {
    /// Keeps them.
    #[default]
    None,
    /// Returns an id that is no descriptor.
    UsedIdRange,
    /// Returns a descriptor that is not in flight.
    UsedIdIdle,
    /// Returns every buffer twice.
    UsedTwice,
    /// Claims to have written more than fits.
    UsedLen,
    /// Moves the used index by more than there is.
    IndexJump,
    /// Changes what it wrote as soon as it has returned it.
    ChangesLater,
    /// Takes requests and never answers.
    NeverCompletes,
    /// Changes its configuration generation at every reading.
    ConfigNeverSettles,
    /// Clears FEATURES_OK.
    FeaturesRefused,
    /// Never finishes a reset.
    NoReset,
    /// Asks for a reset once it has got a request.
    NeedsReset,
    /// Says that its queues have a size that is no power of two.
    OddQueueSize,
    /// Answers that make no sense to the driver of this kind of device (a wrong status, a wrong number of buffers).
    BadAnswer,
    /// Claims to have written nothing.
    ShortLen,
}

/// Whether an access to registers is that of a driver that may see it change.
pub type Access = u64;

/// A chain taken from the available ring.
#[derive(Debug, Clone)]
pub struct Element {
    /// Its first descriptor.
    pub head: u16,
    /// Segments that the device reads, in order: address and length.
    pub readable: Vec<(u64, u32)>,
    /// Segments that the device writes, in order.
    pub writable: Vec<(u64, u32)>,
}

impl Element {
    /// All readable bytes.
    pub fn read_all(&self, arena: &Arena) -> Vec<u8> {
        let mut all = Vec::new();
        for &(addr, len) in &self.readable {
            all.extend(arena.read_vec(addr, len as usize).unwrap_or_default());
        }
        all
    }

    /// Scatters `bytes` over the writable segments from byte `skip` on; says how many fit.
    pub fn write_at(&self, arena: &Arena, mut skip: usize, mut bytes: &[u8]) -> usize {
        let mut written = 0;
        for &(addr, len) in &self.writable {
            let len = len as usize;
            if skip >= len {
                skip -= len;
                continue;
            }
            let n = (len - skip).min(bytes.len());
            arena.write(addr + skip as u64, &bytes[..n]);
            bytes = &bytes[n..];
            written += n;
            skip = 0;
        }
        written
    }

    /// How many bytes the device may write.
    pub fn writable_len(&self) -> usize {
        self.writable.iter().map(|&(_, len)| len as usize).sum()
    }
}

/// A queue as the device sees it.
#[derive(Debug, Clone, Default)]
pub(super) struct DeviceQueue {
    pub(super) size: u16,
    pub(super) ready: bool,
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
    pub(super) vector: u16,
    next_avail: u16,
    used_index: u16,
    /// Used index at the last decision about an interrupt.
    signalled: u16,
    /// Doorbells rung for it.
    pub(super) kicks: u64,
    /// Interrupts asked for.
    pub(super) interrupts: u64,
}

/// The queues of a device, for its model.
pub struct Rings<'a> {
    pub(super) queues: &'a mut [DeviceQueue],
    pub(super) arena: &'a Arena,
    pub(super) hostility: Hostility,
    pub(super) event_idx: bool,
    /// Queues that want to interrupt.
    pub(super) interrupt: &'a mut Vec<u16>,
    /// The driver set up a queue in a way that the specification forbids.
    pub(super) complaints: &'a mut Vec<std::string::String>,
}

impl Rings<'_> {
    /// The memory that the device reaches.
    pub fn arena(&self) -> &Arena {
        self.arena
    }

    /// What is broken.
    pub fn hostility(&self) -> Hostility {
        self.hostility
    }

    /// Takes the next available chain.
    pub fn pop(&mut self, index: u16) -> Option<Element> {
        let queue = self.queues.get_mut(usize::from(index)).filter(|queue| queue.ready)?;
        let avail = self.arena.u16_at(queue.avail + 2)?.load(Ordering::Acquire);
        if avail == queue.next_avail {
            return None;
        }
        if avail.wrapping_sub(queue.next_avail) > queue.size {
            self.complaints.push(std::format!("available index of queue {index} jumped"));
            return None;
        }
        let slot = u64::from(queue.next_avail % queue.size);
        let head = self.arena.u16_at(queue.avail + 4 + 2 * slot)?.load(Ordering::Relaxed);
        queue.next_avail = queue.next_avail.wrapping_add(1);
        let element = walk(self.arena, queue, head);
        if element.is_none() {
            self.complaints.push(std::format!("queue {index} has a broken chain at {head}"));
        }
        element
    }

    /// Asks for a doorbell at the next chain after those taken so far. Says whether there is one already.
    pub fn want_kick(&mut self, index: u16) -> bool {
        let Some(queue) = self.queues.get(usize::from(index)).filter(|queue| queue.ready) else {
            return false;
        };
        if self.event_idx {
            let at = queue.used + 4 + 8 * u64::from(queue.size);
            if let Some(event) = self.arena.u16_at(at) {
                event.store(queue.next_avail, Ordering::Relaxed);
            }
        } else if let Some(flags) = self.arena.u16_at(queue.used) {
            flags.store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.arena
            .u16_at(queue.avail + 2)
            .is_some_and(|avail| avail.load(Ordering::Acquire) != queue.next_avail)
    }

    /// Returns a chain of which `len` bytes were written. The driver sees it at [`Rings::flush`].
    pub fn push(&mut self, index: u16, element: &Element, len: u32) {
        let (mut id, mut len, mut times) = (u32::from(element.head), len, 1);
        let queue = &mut self.queues[usize::from(index)];
        match self.hostility {
            Hostility::UsedIdRange => id = 0x1_0000 + u32::from(queue.size),
            Hostility::UsedIdIdle => id = u32::from((element.head + 1) % queue.size),
            Hostility::UsedTwice => times = 2,
            Hostility::UsedLen => len = element.writable_len() as u32 + 1,
            Hostility::ShortLen => len = 0,
            Hostility::NeverCompletes => times = 0,
            _ => {}
        }
        for _ in 0..times {
            let at = queue.used + 4 + 8 * u64::from(queue.used_index % queue.size);
            let mut entry = [0; 8];
            entry[..4].copy_from_slice(&id.to_le_bytes());
            entry[4..].copy_from_slice(&len.to_le_bytes());
            self.arena.write(at, &entry);
            queue.used_index = queue.used_index.wrapping_add(1);
        }
        if self.hostility == Hostility::IndexJump {
            queue.used_index = queue.used_index.wrapping_add(queue.size);
        }
    }

    /// Shows what was returned, and interrupts if the driver wants it.
    pub fn flush(&mut self, index: u16) {
        let queue = &mut self.queues[usize::from(index)];
        if let Some(used) = self.arena.u16_at(queue.used + 2) {
            used.store(queue.used_index, Ordering::Release);
        }
        fence(Ordering::SeqCst);
        let (old, new) = (queue.signalled, queue.used_index);
        queue.signalled = new;
        if old == new {
            return;
        }
        let wanted = if self.event_idx {
            let event = self
                .arena
                .u16_at(queue.avail + 4 + 2 * u64::from(queue.size))
                .map(|e| e.load(Ordering::Relaxed));
            // One of the indices old+1 ..= new passed event, written out.
            event.is_none_or(|event| {
                let mut at = old;
                let mut passed = false;
                while at != new {
                    passed |= at == event;
                    at = at.wrapping_add(1);
                }
                passed
            })
        } else {
            self.arena.u16_at(queue.avail).is_none_or(|flags| flags.load(Ordering::Relaxed) & 1 == 0)
        };
        if wanted {
            queue.interrupts += 1;
            self.interrupt.push(index);
        }
    }
}

/// Follows a chain; `None` if it is not one.
fn walk(arena: &Arena, queue: &DeviceQueue, head: u16) -> Option<Element> {
    let mut element = Element { head, readable: Vec::new(), writable: Vec::new() };
    let (mut table, mut entries, mut at) = (queue.desc, u32::from(queue.size), head);
    let mut budget = 0;
    loop {
        budget += 1;
        if u32::from(at) >= entries || budget > 4096 {
            return None;
        }
        let raw = arena.read_vec(table + 16 * u64::from(at), 16)?;
        let addr = u64::from_le_bytes(raw[0..8].try_into().ok()?);
        let len = u32::from_le_bytes(raw[8..12].try_into().ok()?);
        let flags = u16::from_le_bytes(raw[12..14].try_into().ok()?);
        let next = u16::from_le_bytes(raw[14..16].try_into().ok()?);
        if flags & 4 != 0 {
            // Not inside a table, not with a next, a whole number of entries (2.7.5.3).
            if table != queue.desc || flags & 3 != 0 || len == 0 || len % 16 != 0 {
                return None;
            }
            (table, entries, at) = (addr, len / 16, 0);
            continue;
        }
        if len == 0 {
            return None;
        }
        if flags & 2 != 0 {
            element.writable.push((addr, len));
        } else if element.writable.is_empty() {
            element.readable.push((addr, len));
        } else {
            return None;
        }
        if flags & 1 == 0 {
            return Some(element);
        }
        at = next;
    }
}

/// A kind of device.
pub trait Model: Send + 'static {
    /// Its type number.
    fn device_type(&self) -> u32;
    /// Features of its type that it offers; those of ring and transport are added.
    fn features(&self) -> u64;
    /// Told what the driver took.
    fn negotiated(&mut self, _features: u64) {}
    /// Its configuration space.
    fn config(&self) -> Vec<u8>;
    /// How many queues it has.
    fn queues(&self) -> u16;
    /// Most entries of a queue.
    fn queue_size(&self) -> u16 {
        128
    }
    /// Works on what is in queue `index`. Called for every doorbell.
    fn process(&mut self, index: u16, rings: &mut Rings<'_>);
}

/// A device, whatever is in front of it.
pub(super) struct Core {
    pub(super) device_type: u32,
    pub(super) legacy: bool,
    pub(super) offered: u64,
    pub(super) accepted: u64,
    pub(super) feature_select: u32,
    pub(super) driver_select: u32,
    pub(super) status: u8,
    pub(super) queue_select: u16,
    pub(super) queues: Vec<DeviceQueue>,
    pub(super) queue_size: u16,
    pub(super) config: Vec<u8>,
    pub(super) generation: u32,
    pub(super) isr: u8,
    pub(super) config_vector: u16,
    pub(super) hostility: Hostility,
    pub(super) complaints: Vec<std::string::String>,
    /// Queues to interrupt for, and whether the configuration changed.
    pub(super) interrupt: Vec<u16>,
    pub(super) config_changed: bool,
    /// Doorbells are only noted until the test says go.
    pub(super) held: bool,
    pub(super) pending: VecDeque<u16>,
    pub(super) resets: usize,
}

impl Core {
    pub(super) fn new(model: &dyn Model, legacy: bool, ring_features: u64, hostility: Hostility) -> Self {
        let version = if legacy { 1 << 27 } else { 1 << 32 };
        let queue_size = model.queue_size();
        Self {
            device_type: model.device_type(),
            legacy,
            offered: model.features() | ring_features | version,
            accepted: 0,
            feature_select: 0,
            driver_select: 0,
            status: 0,
            queue_select: 0,
            queues: std::vec![DeviceQueue { size: queue_size, ..DeviceQueue::default() }; usize::from(model.queues())],
            queue_size,
            config: model.config(),
            generation: 0,
            isr: 0,
            config_vector: 0xffff,
            hostility,
            complaints: Vec::new(),
            interrupt: Vec::new(),
            config_changed: false,
            held: false,
            pending: VecDeque::new(),
            resets: 0,
        }
    }

    pub(super) fn set_status(&mut self, status: u8) {
        if status == 0 {
            self.resets += 1;
            if self.hostility != Hostility::NoReset {
                self.status = 0;
            }
            self.accepted = 0;
            self.isr = 0;
            self.pending.clear();
            let size = self.queue_size;
            for queue in &mut self.queues {
                let (kicks, interrupts) = (queue.kicks, queue.interrupts);
                *queue = DeviceQueue { size, kicks, interrupts, ..DeviceQueue::default() };
            }
            return;
        }
        let before = self.status;
        self.status |= status;
        let missing = status & 4 != 0 && !self.legacy && self.status & 8 == 0;
        if missing || self.status & 3 != 3 && status & 0x0c != 0 {
            self.complaints.push(std::format!("status went from {before:#x} to {status:#x}"));
        }
        if self.hostility == Hostility::FeaturesRefused || self.accepted & !self.offered != 0 {
            self.status &= !8;
        }
    }

    pub(super) fn queue_max(&self) -> u32 {
        let known = usize::from(self.queue_select) < self.queues.len();
        match self.hostility {
            _ if !known => 0,
            Hostility::OddQueueSize => 100,
            _ => u32::from(self.queue_size),
        }
    }

    pub(super) fn features_half(&self) -> u32 {
        if self.feature_select < 2 { (self.offered >> (32 * self.feature_select)) as u32 } else { 0 }
    }

    pub(super) fn accept_half(&mut self, value: u32) {
        if self.driver_select < 2 {
            let shift = 32 * self.driver_select;
            self.accepted = self.accepted & !(0xffff_ffff << shift) | u64::from(value) << shift;
        }
    }

    pub(super) fn selected(&mut self) -> Option<&mut DeviceQueue> {
        self.queues.get_mut(usize::from(self.queue_select))
    }

    pub(super) fn next_generation(&mut self) -> u32 {
        if self.hostility == Hostility::ConfigNeverSettles {
            self.generation = self.generation.wrapping_add(1) & 0xff;
        }
        self.generation
    }

    pub(super) fn read_config(&mut self, offset: usize, bytes: usize) -> u64 {
        if self.hostility == Hostility::ConfigNeverSettles && self.legacy {
            let first = &mut self.config[0];
            *first = first.wrapping_add(1);
        }
        let mut value = [0; 8];
        for (i, byte) in value.iter_mut().enumerate().take(bytes) {
            *byte = self.config.get(offset + i).copied().unwrap_or(0);
        }
        u64::from_le_bytes(value)
    }

    /// Checks a queue that the driver calls ready.
    pub(super) fn check_queue(&mut self) {
        let index = self.queue_select;
        if let Some(queue) = self.selected()
            && (!queue.size.is_power_of_two()
                || queue.desc % 16 != 0
                || queue.avail % 2 != 0
                || queue.used % 4 != 0)
        {
            let complaint = std::format!("queue {index} is set up badly: {queue:?}");
            self.complaints.push(complaint);
        }
    }

    pub(super) fn kick(&mut self, index: u16) {
        if self.status & 4 == 0 {
            self.complaints.push(std::format!("doorbell {index} before DRIVER_OK"));
        }
        if let Some(queue) = self.queues.get_mut(usize::from(index)) {
            queue.kicks += 1;
            self.pending.push_back(index);
        }
        if self.hostility == Hostility::NeedsReset {
            self.status |= 64;
        }
    }

    /// Lets the model work on what is pending.
    pub(super) fn run(&mut self, model: &mut dyn Model, arena: &Arena) {
        while let Some(index) = self.pending.pop_front() {
            self.with_rings(arena, |rings| model.process(index, rings));
        }
    }

    pub(super) fn with_rings<R>(&mut self, arena: &Arena, f: impl FnOnce(&mut Rings<'_>) -> R) -> R {
        let mut interrupt = core::mem::take(&mut self.interrupt);
        let mut rings = Rings {
            queues: &mut self.queues,
            arena,
            hostility: self.hostility,
            event_idx: self.accepted & (1 << 29) != 0,
            interrupt: &mut interrupt,
            complaints: &mut self.complaints,
        };
        let result = f(&mut rings);
        if !interrupt.is_empty() {
            self.isr |= 1;
        }
        self.interrupt = interrupt;
        result
    }
}
