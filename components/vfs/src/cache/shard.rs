//! A shard: some of the clusters, their hash table and their CLOCK hand, under one lock.

use super::{MAX_CLUSTER_PAGES, PAGE};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::block::BlockError;
use anykernel::counter::Counter;
use anykernel::sync::{Mutex, MutexGuard};
use core::sync::atomic::{AtomicU32, Ordering};
use hypercall::Threads;

const NONE: u32 = u32::MAX;

/// Which cluster of which device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Key {
    pub(super) device: u32,
    pub(super) cluster: u64,
}

impl Key {
    /// Upper bits of a Fibonacci hash: neighbours spread evenly, and so do equal strides.
    pub(super) fn hash(self) -> u32 {
        let mixed = (self.cluster ^ (u64::from(self.device) << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 32) as u32
    }
}

/// A set of pages of one cluster.
pub(super) type PageBits = u16;

/// The bits `first .. first + count`.
pub(super) fn page_bits(first: usize, count: usize) -> PageBits {
    debug_assert!(first + count <= MAX_CLUSTER_PAGES);
    (((1u32 << count) - 1) << first) as PageBits
}

/// Memory of one cluster, shared with readers that copy from it.
pub(super) type Data = Arc<Box<[u8]>>;

/// What is known of one cluster.
pub(super) struct Slot {
    pub(super) key: Key,
    next: u32,
    used: bool,
    /// Set at each hit, cleared by the hand.
    pub(super) referenced: bool,
    /// `None` until something is valid, and while the device has the memory.
    pub(super) data: Option<Data>,
    /// Pages whose content is the newest there is.
    pub(super) valid: PageBits,
    /// Valid pages that are newer than the device's.
    pub(super) dirty: PageBits,
    /// Pages asked of the device.
    pub(super) reading: PageBits,
    /// Pages on their way to the device.
    pub(super) writing: PageBits,
}

impl Slot {
    fn busy(&self) -> bool {
        self.dirty | self.reading | self.writing != 0
    }
}

pub(super) struct Shard {
    /// Chains by hash, linked through [`Slot::next`]. A power of two in length.
    heads: Vec<u32>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    hand: usize,
    capacity: usize,
    /// Memory of evicted clusters. With what slots have, never more than `capacity` pieces.
    spare: Vec<Box<[u8]>>,
    /// Threads that park on the shard's sequence number.
    pub(super) waiters: u32,
    evictions: Counter,
}

/// A shard with what its users wait on.
#[repr(align(64))]
pub(super) struct ShardCell<H> {
    host: H,
    /// Counts changes that somebody may wait for. Changed under the lock.
    sequence: AtomicU32,
    shard: Mutex<H, Shard>,
}

impl<H: Threads + Copy> ShardCell<H> {
    pub(super) fn new(host: H, capacity: usize, evictions: Counter) -> Self {
        let capacity = capacity.max(1);
        let shard = Shard {
            heads: Vec::new(),
            slots: Vec::new(),
            free: Vec::new(),
            hand: 0,
            capacity,
            spare: Vec::new(),
            waiters: 0,
            evictions,
        };
        Self { host, sequence: AtomicU32::new(0), shard: Mutex::new(host, shard) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, H, Shard> {
        self.shard.lock()
    }

    /// Unlocks and wakes whoever waits for a change.
    pub(super) fn changed(&self, guard: MutexGuard<'_, H, Shard>) {
        self.sequence.fetch_add(1, Ordering::Release);
        let waiters = guard.waiters;
        drop(guard);
        if waiters > 0 {
            self.host.unpark(&self.sequence, u32::MAX);
        }
    }

    /// The present sequence number, for [`ShardCell::wait_from`].
    pub(super) fn sequence(&self) -> u32 {
        self.sequence.load(Ordering::Acquire)
    }

    /// Sleeps until the sequence number differs from `seen`.
    pub(super) fn wait_from(&self, seen: u32) {
        let mut guard = self.lock();
        guard.waiters += 1;
        drop(guard);
        if self.sequence.load(Ordering::Acquire) == seen {
            self.host.park(&self.sequence, seen, None);
        }
        self.lock().waiters -= 1;
    }
}

impl Shard {
    /// Clusters that have or may have memory.
    pub(super) fn clusters(&self) -> usize {
        self.slots.len() - self.free.len() + self.spare.len()
    }

    fn head(&mut self, key: Key) -> Option<&mut u32> {
        // The low bits chose the shard; these are others.
        let index = (key.hash() >> 8) as usize & self.heads.len().wrapping_sub(1);
        self.heads.get_mut(index)
    }

    /// The slot of `key`.
    pub(super) fn find(&mut self, key: Key) -> Option<&mut Slot> {
        let mut at = *self.head(key)?;
        while let Some(slot) = self.slots.get(at as usize) {
            if slot.key == key {
                return self.slots.get_mut(at as usize);
            }
            at = slot.next;
        }
        None
    }

    /// The slot of `key`, a new one if need be. `None`: every cluster is dirty or on its way.
    pub(super) fn find_or_insert(&mut self, key: Key) -> Option<&mut Slot> {
        if self.find(key).is_some() {
            // Asked twice, because the borrow of a returned slot would last to the end.
            return self.find(key);
        }
        let index = self.free_slot()?;
        let head = self.head(key)?;
        let next = core::mem::replace(head, index);
        let slot = self.slots.get_mut(index as usize)?;
        *slot = Slot {
            key,
            next,
            used: true,
            referenced: false,
            data: None,
            valid: 0,
            dirty: 0,
            reading: 0,
            writing: 0,
        };
        Some(slot)
    }

    fn free_slot(&mut self) -> Option<u32> {
        if let Some(index) = self.free.pop() {
            return Some(index);
        }
        if self.slots.len() < self.capacity && self.grow().is_ok() {
            return u32::try_from(self.slots.len() - 1).ok();
        }
        self.evict()
    }

    fn grow(&mut self) -> Result<(), alloc::collections::TryReserveError> {
        if self.heads.is_empty() {
            let buckets = self.capacity.next_power_of_two();
            self.heads.try_reserve_exact(buckets)?;
            self.heads.resize(buckets, NONE);
        }
        self.slots.try_reserve(1)?;
        self.free.try_reserve(self.slots.len() + 1)?;
        self.spare.try_reserve(self.slots.len() + 1)?;
        self.slots.push(Slot {
            key: Key { device: NONE, cluster: 0 },
            next: NONE,
            used: false,
            referenced: false,
            data: None,
            valid: 0,
            dirty: 0,
            reading: 0,
            writing: 0,
        });
        Ok(())
    }

    /// CLOCK: the first cluster that was not used since the hand last passed.
    fn evict(&mut self) -> Option<u32> {
        for _ in 0..2 * self.slots.len() {
            let index = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = self.slots.get_mut(index)?;
            if !slot.used || slot.busy() {
                continue;
            }
            if core::mem::take(&mut slot.referenced) {
                continue;
            }
            self.evictions.increment();
            let index = u32::try_from(index).ok()?;
            self.unlink(index);
            return Some(index);
        }
        None
    }

    /// Takes a slot out of its chain and its memory to the spares.
    fn unlink(&mut self, index: u32) {
        let Some(slot) = self.slots.get_mut(index as usize) else { return };
        let (key, next) = (slot.key, slot.next);
        slot.used = false;
        slot.valid = 0;
        if let Some(memory) = slot.data.take().and_then(Arc::into_inner) {
            self.spare.push(memory);
        }
        let Some(head) = self.head(key) else { return };
        if *head == index {
            *head = next;
            return;
        }
        let mut at = *head;
        while let Some(slot) = self.slots.get_mut(at as usize) {
            if slot.next == index {
                slot.next = next;
                return;
            }
            at = slot.next;
        }
    }

    /// The slots in use.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.slots.iter_mut().filter(|slot| slot.used)
    }

    /// Drops everything that `device` has here, and the spares. Pages under way stay until the hand finds them.
    pub(super) fn purge(&mut self, device: u32) {
        for at in 0..self.slots.len() {
            if let (Some(slot), Ok(index)) = (self.slots.get_mut(at), u32::try_from(at))
                && slot.used
                && slot.key.device == device
            {
                slot.dirty = 0;
                if slot.reading | slot.writing == 0 {
                    self.unlink(index);
                    self.free.push(index);
                }
            }
        }
        self.spare = Vec::new();
    }

    /// Memory for a cluster: a spare one, or new and zeroed.
    pub(super) fn take_memory(&mut self, cluster_bytes: usize) -> Result<Box<[u8]>, BlockError> {
        match self.spare.pop() {
            Some(memory) => Ok(memory),
            None => allocate(cluster_bytes),
        }
    }

    /// Gives memory back that [`Shard::take_memory`] gave.
    pub(super) fn return_memory(&mut self, memory: Box<[u8]>) {
        if self.spare.len() < self.spare.capacity() {
            self.spare.push(memory);
        }
    }
}

/// A zeroed buffer for a device.
pub(super) fn allocate(len: usize) -> Result<Box<[u8]>, BlockError> {
    let mut memory = Vec::new();
    memory.try_reserve_exact(len).map_err(|_| BlockError::NoMemory)?;
    memory.resize(len, 0);
    Ok(memory.into_boxed_slice())
}

/// The pages that `range` of a cluster touches: first and count.
pub(super) fn pages_of(offset: usize, len: usize) -> (usize, usize) {
    let first = offset / PAGE;
    (first, (offset + len).div_ceil(PAGE) - first)
}
