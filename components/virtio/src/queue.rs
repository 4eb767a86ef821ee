//! The split virtqueue, driver side (VirtIO 1.2, 2.7).
//!
//! [`Queue::add`] writes descriptors, [`Queue::publish`] shows a whole batch to the device and says whether it wants a
//! doorbell, [`Queue::pop`] takes back what the device is done with.
//!
//! The device is not trusted: links between descriptors, which heads are in flight and how much they can take are
//! kept in private memory, and everything the device says is checked against that. A device that says something
//! impossible breaks its queue for good; nothing more is read from it.
#![expect(unsafe_code, reason = "decides when the device is done with memory")]

use crate::dma::{Chain, Lent, not_lent};
use crate::error::{Error, Fault, Result};
use crate::spec::ring;
use alloc::vec::Vec;
use anykernel::driver::{DmaMemory, Quiet};
use core::mem::ManuallyDrop;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use core::sync::atomic::fence;
use hypercall::Dma;

/// Whether the move of an index from `old` to `new` passed `event` (2.7.10, `vring_need_event`).
///
/// All three count modulo 2^16, so all arithmetic wraps.
pub(crate) const fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// How often silence is renewed, in used entries: a power of two, and less than 2^16 by the largest queue.
const SILENCE_MASK: u16 = (1 << 14) - 1;

/// How often the device's side is looked at before it counts as quiet: some hundred nanoseconds. A fence alone does not order
/// our store before our load where QEMU emulates a machine with one CPU: it leaves fences out then, although the device
/// is another thread. The store is done by the time of a later look, and the wake-up that both missed is found.
const LOOKS: u32 = 100;

/// How a queue is to be made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QueueOptions {
    /// Entries: a power of two, at most 32,768.
    pub(crate) size: u16,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub(crate) event_idx: bool,
    /// Entries of an indirect table, of which each chain of more than one segment gets one; 0: none.
    pub(crate) indirect: u16,
    /// No segment is longer.
    pub(crate) max_segment: u32,
}

/// Where the parts of a ring are in its memory. One layout serves legacy devices too (2.7.2).
#[derive(Debug, Clone, Copy)]
struct Layout {
    avail: usize,
    used: usize,
    tables: usize,
    bytes: usize,
}

impl Layout {
    fn new(size: u16, indirect: u16) -> Self {
        let n = usize::from(size);
        let avail = n * ring::DESC_BYTES;
        let used = (avail + 6 + 2 * n).next_multiple_of(ring::LEGACY_ALIGN);
        let tables = (used + 6 + ring::USED_ELEM_BYTES * n).next_multiple_of(64);
        Self { avail, used, tables, bytes: tables + n * usize::from(indirect) * ring::DESC_BYTES }
    }
}

/// Device addresses of the three parts of a ring.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RingAddresses {
    pub(crate) descriptors: u64,
    pub(crate) driver: u64,
    pub(crate) device: u64,
}

/// Why a chain was not added; it comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AddError {
    /// Not now: too few free descriptors.
    Full,
    /// Never: more segments than this queue can take, or none.
    Segments,
    /// The queue is broken.
    Broken,
}

struct InFlight<H: Dma, T> {
    lent: Lent<H>,
    token: T,
    /// Ring descriptors in use: 1 with an indirect table.
    descriptors: u16,
    last: u16,
    /// Its place in the available ring.
    avail: u16,
    writable: u64,
}

/// A chain that the device returned.
pub(crate) struct Returned<H: Dma, T> {
    pub(crate) token: T,
    pub(crate) chain: Chain<H>,
    /// How many bytes the device says it wrote; at most the writable bytes of the chain.
    pub(crate) len: u32,
}

/// A split virtqueue whose chains carry a `T`.
pub(crate) struct Queue<H: Dma, T> {
    // Not dropped by itself once the device was told of it, as it may still use it. `dismantle` frees it.
    memory: ManuallyDrop<DmaMemory<H>>,
    layout: Layout,
    options: QueueOptions,
    mask: u16,
    /// Links of the free list and of the chains in flight.
    next: Vec<u16>,
    heads: Vec<Option<InFlight<H, T>>>,
    free: u16,
    free_count: u16,
    in_flight: u16,
    /// Where the next chain goes in the available ring.
    avail: u16,
    /// What the device was told.
    published: u16,
    /// How many of the last entries it was told of without a doorbell, at most the ring's size: an older wish is granted
    /// already, and a count that could reach 2^16 would pass for none.
    unrung: u16,
    /// The next used entry to look at.
    used: u16,
    /// The last `used.idx` seen, so that a batch reads it once.
    used_seen: u16,
    interrupts: bool,
    fault: Option<Fault>,
    /// The device may know where the ring is, or its memory was given back.
    told: AtomicBool,
}

impl<H: Dma, T> Queue<H, T> {
    /// An empty queue; interrupts are off.
    pub(crate) fn new(host: H, options: QueueOptions) -> Result<Self> {
        let size = options.size;
        if !size.is_power_of_two() || size > 1 << 15 || options.max_segment == 0 {
            return Err(Error::BadDevice("queue size is not a power of two"));
        }
        let layout = Layout::new(size, options.indirect);
        let memory = DmaMemory::new(host, layout.bytes, ring::LEGACY_ALIGN)
            .map_err(|error| Error::Host("allocating a virtqueue", error))?;
        let no_memory = |_| Error::Host("allocating a virtqueue", hypercall::Error::NoMemory);
        let mut next = Vec::new();
        next.try_reserve_exact(usize::from(size)).map_err(no_memory)?;
        next.extend((0..size).map(|i| i.wrapping_add(1)));
        let mut heads = Vec::new();
        heads.try_reserve_exact(usize::from(size)).map_err(no_memory)?;
        heads.extend((0..size).map(|_| None));
        let mut queue = Self {
            memory: ManuallyDrop::new(memory),
            layout,
            options,
            mask: size - 1,
            next,
            heads,
            free: 0,
            free_count: size,
            in_flight: 0,
            avail: 0,
            published: 0,
            unrung: 0,
            used: 0,
            used_seen: 0,
            interrupts: true,
            fault: None,
            told: AtomicBool::new(false),
        };
        queue.disable_interrupts();
        Ok(queue)
    }

    /// Where its memory begins for a device.
    pub(crate) fn begins_at(&self) -> u64 {
        self.memory.device_addr(0)
    }

    /// Where the device finds it; from now on its memory is freed by [`Queue::dismantle`] only.
    pub(crate) fn addresses(&self) -> RingAddresses {
        self.told.store(true, Relaxed);
        RingAddresses {
            descriptors: self.memory.device_addr(0),
            driver: self.memory.device_addr(self.layout.avail),
            device: self.memory.device_addr(self.layout.used),
        }
    }

    /// Entries.
    pub(crate) fn size(&self) -> u16 {
        self.options.size
    }

    /// Chains that the device has.
    pub(crate) fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// What the device did, if it broke the queue.
    pub(crate) fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// Breaks the queue for a reason that its user found.
    pub(crate) fn set_fault(&mut self, fault: Fault) {
        self.fault.get_or_insert(fault);
    }

    /// All tokens in flight.
    pub(crate) fn tokens(&self) -> impl Iterator<Item = &T> {
        self.heads.iter().flatten().map(|entry| &entry.token)
    }

    fn write_descriptor(&self, offset: usize, segment: Segment16) {
        self.memory.write64(offset, segment.addr);
        self.memory.write32(offset + 8, segment.len);
        self.memory.write16(offset + 12, segment.flags);
        self.memory.write16(offset + 14, segment.next);
    }

    /// Queues `chain`. The device sees it after the next [`Queue::publish`].
    pub(crate) fn add(&mut self, chain: Chain<H>, token: T) -> Result<(), (Chain<H>, T, AddError)> {
        if self.fault.is_some() {
            return Err((chain, token, AddError::Broken));
        }
        let max_segment = self.options.max_segment;
        let (mut count, mut writable) = (0usize, 0u64);
        chain.for_each(max_segment, &mut |segment| {
            count += 1;
            writable += if segment.write { u64::from(segment.len) } else { 0 };
        });
        let indirect = count > 1 && count <= usize::from(self.options.indirect);
        let most = usize::from(self.options.size.max(self.options.indirect));
        if count == 0 || count > most {
            return Err((chain, token, AddError::Segments));
        }
        let descriptors = if indirect { 1 } else { count as u16 };
        if descriptors > self.free_count {
            let never = descriptors > self.options.size;
            return Err((chain, token, if never { AddError::Segments } else { AddError::Full }));
        }

        let head = self.free;
        let mut last = head;
        if indirect {
            let table = self.layout.tables
                + usize::from(head) * usize::from(self.options.indirect) * ring::DESC_BYTES;
            let mut i = 0usize;
            chain.for_each(max_segment, &mut |segment| {
                let more = if i + 1 < count { ring::DESC_NEXT } else { 0 };
                let flags = more | if segment.write { ring::DESC_WRITE } else { 0 };
                let entry = Segment16 { addr: segment.addr, len: segment.len, flags, next: (i + 1) as u16 };
                self.write_descriptor(table + i * ring::DESC_BYTES, entry);
                i += 1;
            });
            let entry = Segment16 {
                addr: self.memory.device_addr(table),
                len: (count * ring::DESC_BYTES) as u32,
                flags: ring::DESC_INDIRECT,
                next: 0,
            };
            self.write_descriptor(usize::from(head) * ring::DESC_BYTES, entry);
        } else {
            let (mut at, mut i) = (head, 0usize);
            chain.for_each(max_segment, &mut |segment| {
                i += 1;
                let next = self.link(at);
                let end = if hypercall::planted!("descriptor-off-by-one") { count + 1 } else { count };
                let more = if i < end { ring::DESC_NEXT } else { 0 };
                let flags = more | if segment.write { ring::DESC_WRITE } else { 0 };
                let entry = Segment16 { addr: segment.addr, len: segment.len, flags, next };
                self.write_descriptor(usize::from(at) * ring::DESC_BYTES, entry);
                last = at;
                at = next;
            });
        }
        self.free = self.link(last);
        self.free_count -= descriptors;
        self.in_flight += 1;
        let slot = self.layout.avail + 4 + 2 * usize::from(self.avail & self.mask);
        self.memory.write16(slot, head);
        if let Some(entry) = self.heads.get_mut(usize::from(head)) {
            let (lent, avail) = (chain.lend(), self.avail);
            *entry = Some(InFlight { lent, token, descriptors, last, avail, writable });
        }
        self.avail = self.avail.wrapping_add(1);
        Ok(())
    }

    /// The private link of a descriptor. Indices come from the free list, so they are in range.
    fn link(&self, descriptor: u16) -> u16 {
        self.next.get(usize::from(descriptor)).copied().unwrap_or(0)
    }

    /// Shows everything added to the device. `true`: ring the doorbell, also for what was shown before if the device's wish
    /// came too late then.
    pub(crate) fn publish(&mut self) -> bool {
        if self.fault.is_some() {
            return false;
        }
        let is_new = self.avail != self.published;
        if is_new {
            // Release: the descriptors and the ring entries are there before the index.
            self.memory.write16(self.layout.avail + 2, self.avail);
            // The device writes its wish, then reads our index; we write the index, then read its wish. Both need the
            // store done before the load, or both may miss the other (2.7.13.4.1).
            fence(SeqCst);
            let added = self.avail.wrapping_sub(self.published);
            self.unrung = self.unrung.saturating_add(added).min(self.options.size);
            self.published = self.avail;
        }
        let needed = if self.options.event_idx {
            let looks = if is_new { LOOKS } else { 1 };
            let rung = self.published.wrapping_sub(self.unrung);
            (0..looks).any(|_| {
                let at = self.layout.used + 4 + ring::USED_ELEM_BYTES * usize::from(self.options.size);
                need_event(self.memory.read16(at), self.published, rung)
            })
        } else {
            let wish = || self.memory.read16(self.layout.used) & ring::USED_NO_NOTIFY == 0;
            is_new && (0..LOOKS).any(|_| wish())
        };
        if needed {
            self.unrung = 0;
        }
        needed
    }

    /// Takes back the next chain that the device is done with.
    pub(crate) fn pop(&mut self) -> Result<Option<Returned<H, T>>, Fault> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        match self.try_pop() {
            Err(fault) => {
                self.fault = Some(fault);
                Err(fault)
            }
            popped => popped,
        }
    }

    fn try_pop(&mut self) -> Result<Option<Returned<H, T>>, Fault> {
        if self.used == self.used_seen {
            // Acquire: the entries and the buffers are read after the index.
            let index = self.memory.read16(self.layout.used + 2);
            if index == self.used {
                return Ok(None);
            }
            if index.wrapping_sub(self.used) > self.in_flight {
                return Err(Fault::UsedIndex(index));
            }
            self.used_seen = index;
        }
        let at = self.layout.used + 4 + ring::USED_ELEM_BYTES * usize::from(self.used & self.mask);
        let id = self.memory.read32(at);
        if hypercall::planted!("ring-toctou") {
            self.check_and_read_again(at, id);
        }
        let len = self.memory.read32(at + 4);
        let unpublished = self.avail.wrapping_sub(self.published);
        let entry = usize::try_from(id)
            .ok()
            .and_then(|id| self.heads.get_mut(id))
            // Not what the device was never told of: such an entry is among the last `unpublished` ones.
            .and_then(|head| {
                head.take_if(|entry| self.avail.wrapping_sub(entry.avail).wrapping_sub(1) >= unpublished)
            })
            .ok_or(Fault::UsedId(id))?;
        if u64::from(len) > entry.writable {
            // It stays lent, as what such a device does with the buffer is anybody's guess.
            if let Some(head) = usize::try_from(id).ok().and_then(|id| self.heads.get_mut(id)) {
                *head = Some(entry);
            }
            return Err(Fault::UsedLen(len));
        }
        let head = id as u16;
        if let Some(link) = self.next.get_mut(usize::from(entry.last)) {
            *link = self.free;
        }
        self.free = head;
        self.free_count += entry.descriptors;
        self.in_flight -= 1;
        self.used = self.used.wrapping_add(1);
        if !self.interrupts && self.options.event_idx && self.used & SILENCE_MASK == 0 {
            // Long before the index comes round to the event that silence was asked for with.
            self.used_event(self.used.wrapping_sub(1));
        }
        // SAFETY: the device returned this head, which was in flight.
        let chain = unsafe { entry.lent.reclaim() };
        Ok(Some(Returned { token: entry.token, chain, len }))
    }

    /// The planted bug: what was checked is read again, and used unchecked.
    fn check_and_read_again(&self, at: usize, id: u32) {
        if (id as usize) < self.heads.len() {
            let again = self.memory.read32(at);
            #[expect(clippy::indexing_slicing, reason = "planted")]
            let known = self.heads[again as usize].is_some();
            log::trace!("{again} is in flight: {known}");
        }
    }

    fn used_event(&self, event: u16) {
        let at = self.layout.avail + 4 + 2 * usize::from(self.options.size);
        self.memory.write16(at, event);
    }

    fn avail_flags(&self, flags: u16) {
        self.memory.write16(self.layout.avail, flags);
    }

    /// Asks the device for silence. It may still interrupt now and then.
    pub(crate) fn disable_interrupts(&mut self) {
        if core::mem::replace(&mut self.interrupts, false) {
            if self.options.event_idx {
                // An index that was passed already is passed again in 65,535 entries only; `pop` renews it before.
                self.used_event(self.used.wrapping_sub(1));
            } else {
                self.avail_flags(ring::AVAIL_NO_INTERRUPT);
            }
        }
    }

    /// Asks for an interrupt once more than `skip` further chains are done. `true`: they are already, poll now; else
    /// the interrupt will come.
    pub(crate) fn enable_interrupts(&mut self, skip: u16) -> bool {
        if self.fault.is_some() {
            return true;
        }
        self.interrupts = true;
        if self.options.event_idx {
            self.used_event(self.used.wrapping_add(skip));
        } else {
            self.avail_flags(0);
        }
        // Our wish is written before we look, as in `publish`.
        fence(SeqCst);
        let skip = if self.options.event_idx { skip } else { 0 };
        (0..LOOKS).any(|_| {
            let index = self.memory.read16(self.layout.used + 2);
            index.wrapping_sub(self.used) > skip
        })
    }

    /// How many returned chains wait to be popped.
    #[cfg(test)]
    pub(crate) fn pending_for_test(&self) -> u16 {
        self.memory.read16(self.layout.used + 2).wrapping_sub(self.used)
    }

    /// Ends the queue after the device was reset: every token in flight comes back with its chain.
    pub(crate) fn dismantle(mut self, proof: &Quiet, mut each: impl FnMut(T, Chain<H>)) {
        for entry in self.heads.drain(..).flatten() {
            // SAFETY: the proof says that the device does not touch memory any more.
            each(entry.token, unsafe { entry.lent.reclaim() });
        }
        self.told.store(true, Relaxed);
        // SAFETY: taken once: `self` is not used afterwards, and its drop leaves alone what was told.
        unsafe { ManuallyDrop::take(&mut self.memory) }.free(proof);
    }

    /// Ends the queue of a device that cannot be reset: tokens come back, the memory stays lent for ever.
    pub(crate) fn abandon(mut self, mut each: impl FnMut(T)) {
        for entry in self.heads.drain(..).flatten() {
            each(entry.token);
        }
    }
}

impl<H: Dma, T> Drop for Queue<H, T> {
    fn drop(&mut self) {
        if !*self.told.get_mut() {
            // SAFETY: taken once: `dismantle` has not run, and this is the end of `self`.
            unsafe { ManuallyDrop::take(&mut self.memory) }.free(&not_lent());
        }
    }
}

/// A descriptor (2.7.5).
#[derive(Clone, Copy)]
struct Segment16 {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}
