//! A shard: some of the clusters, found by key and evicted by CLOCK, under one lock.

use super::{MAX_CLUSTER_PAGES, PAGE};
use crate::clock_map::ClockMap;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::block::BlockError;
use anykernel::counter::Counter;
use anykernel::sync::{Mutex, MutexGuard};
use core::sync::atomic::{AtomicU32, Ordering};
use hypercall::Threads;

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

    /// Of the bits that did not choose the shard.
    fn hash_in_shard(self) -> u32 {
        self.hash() >> 8
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
#[derive(Default)]
pub(super) struct Cluster {
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

impl Cluster {
    fn busy(&self) -> bool {
        self.dirty | self.reading | self.writing != 0
    }
}

pub(super) struct Shard {
    clusters: ClockMap<Key, Cluster>,
    capacity: usize,
    /// Memory of evicted clusters. Each made room for a cluster without, which takes it from here.
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
        let shard =
            Shard { clusters: ClockMap::new(capacity), capacity, spare: Vec::new(), waiters: 0, evictions };
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
        self.clusters.len() + self.spare.len()
    }

    /// The cluster of `key`, for its keeper: this does not count as a use.
    pub(super) fn find(&mut self, key: Key) -> Option<&mut Cluster> {
        self.clusters.peek(key.hash_in_shard(), |known| *known == key)
    }

    /// The cluster of `key`, for a reader or writer: used clusters stay longer.
    pub(super) fn touch(&mut self, key: Key) -> Option<&mut Cluster> {
        self.clusters.get(key.hash_in_shard(), |known| *known == key)
    }

    /// The cluster of `key`, a new one if need be. `None`: every cluster is dirty or on its way.
    pub(super) fn find_or_insert(&mut self, key: Key) -> Option<&mut Cluster> {
        // Asked again in the end, because the borrow of a returned cluster would last until there.
        if self.find(key).is_none() {
            let new = Cluster::default();
            let evicted = self.clusters.insert_beside(key.hash_in_shard(), key, new, Cluster::busy).ok()?;
            if let Some((_, cluster)) = evicted {
                self.evictions.increment();
                if let Some(memory) = cluster.data.and_then(Arc::into_inner) {
                    self.return_memory(memory);
                }
            }
        }
        self.find(key)
    }

    /// The clusters of `device`, by number.
    pub(super) fn of(&mut self, device: u32) -> impl Iterator<Item = (u64, &mut Cluster)> {
        self.clusters
            .iter_mut()
            .filter(move |(key, _)| key.device == device)
            .map(|(key, it)| (key.cluster, it))
    }

    /// Drops everything that `device` has here, and the spares. Pages under way stay until the hand finds them.
    pub(super) fn purge(&mut self, device: u32) {
        self.clusters.retain(|key, cluster| {
            if key.device != device {
                return true;
            }
            cluster.dirty = 0;
            cluster.busy()
        });
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
        if self.spare.len() < self.capacity && self.spare.try_reserve(1).is_ok() {
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
