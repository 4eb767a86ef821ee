//! The block cache: what lies between file systems and block devices.
//!
//! One [`BlockCache`] serves all devices of an instance. Memory is divided into *clusters* (4 to 64 KiB, by the size of
//! the cache), each with a valid and a dirty bit for every 4 KiB page, so that a small read of cold data transfers
//! one page while a sequential read moves whole clusters without a copy between device and cache.
//!
//! * [`CachedDevice`] is a device seen through the cache: bytes at any offset, read, written, made durable.
//! * [`ReadAhead`] decides, for one file, what to fetch before it is asked for; [`CachedDevice::prefetch`] fetches it.
//!
//! Clusters are spread over shards by a hash; each shard has its own lock, hash table and CLOCK hand. A reader holds
//! the lock only to find the cluster and take a reference to its memory; it copies outside of it. A writer that
//! meets such a reader writes to a copy of the cluster. Nobody holds a shard's lock while it waits for a device.
//!
//! Written pages stay in the cache until memory gets short (a quarter of it dirty) or [`CachedDevice::sync`]. A page
//! whose write fails stays dirty: the next sync tries again and reports if it fails again, so an error is never lost.

mod batch;
mod device;
mod fill;
mod read_ahead;
mod shard;
mod write_back;

#[cfg(test)]
mod tests;

pub use device::CachedDevice;
pub use read_ahead::ReadAhead;

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::block::{BlockDevice, BlockError};
use anykernel::counter::Counter;
use anykernel::sync::Mutex;
use core::sync::atomic::{AtomicU32, AtomicUsize};
use hypercall::Host;
use shard::{Key, ShardCell};

/// Bytes in a page: the unit of validity, of dirtiness and of small transfers.
pub const PAGE: usize = 4096;

/// Most pages of a cluster; their bits fit `u16`.
const MAX_CLUSTER_PAGES: usize = 16;
/// Most buffers of one request, however many the device takes.
const MAX_REQUEST_BUFFERS: usize = 32;

/// How large the cache may grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheLimits {
    /// Most bytes of cached data. At least 64 KiB are used.
    pub bytes: u64,
    /// How far a sequential reader is read ahead, in bytes; 0: not at all. Cut to an eighth of the cache.
    pub read_ahead_bytes: u32,
}

impl CacheLimits {
    /// What the configuration says, or a share of the memory: a quarter, an eighth in domains below 64 MiB.
    pub fn for_kernel<H: Host>(kernel: &Kernel<H>) -> Self {
        let config = &kernel.config().cache;
        let bytes = match (config.bytes, kernel.host().memory_bytes()) {
            (0, memory) if memory < 64 << 20 => memory / 8,
            (0, memory) => memory / 4,
            (bytes, _) => bytes,
        };
        Self { bytes, read_ahead_bytes: config.read_ahead_bytes }
    }
}

/// What the cache counts; see [`Kernel::counters`].
#[derive(Debug, Clone, Default)]
pub struct CacheCounters {
    /// Cluster accesses answered from memory.
    pub hits: Counter,
    /// Cluster accesses that had to wait for the device.
    pub misses: Counter,
    /// Bytes asked of devices, on demand and ahead.
    pub read_bytes: Counter,
    /// Read requests submitted.
    pub read_requests: Counter,
    /// Bytes fetched ahead.
    pub read_ahead_bytes: Counter,
    /// Bytes written to devices.
    pub written_bytes: Counter,
    /// Write requests submitted.
    pub write_requests: Counter,
    /// Flushes submitted.
    pub flushes: Counter,
    /// Clusters given up for others.
    pub evictions: Counter,
    /// Failed read requests.
    pub read_errors: Counter,
    /// Failed write and flush requests.
    pub write_errors: Counter,
    /// Reads that went past the cache because no cluster could be freed.
    pub bypasses: Counter,
}

impl CacheCounters {
    /// The counters `vfs.cache_*` of an instance.
    pub fn for_kernel<H: Host>(kernel: &Kernel<H>) -> Self {
        Self {
            hits: kernel.counter("vfs.cache_hits"),
            misses: kernel.counter("vfs.cache_misses"),
            read_bytes: kernel.counter("vfs.cache_read_bytes"),
            read_requests: kernel.counter("vfs.cache_read_requests"),
            read_ahead_bytes: kernel.counter("vfs.cache_read_ahead_bytes"),
            written_bytes: kernel.counter("vfs.cache_written_bytes"),
            write_requests: kernel.counter("vfs.cache_write_requests"),
            flushes: kernel.counter("vfs.cache_flushes"),
            evictions: kernel.counter("vfs.cache_evictions"),
            read_errors: kernel.counter("vfs.cache_read_errors"),
            write_errors: kernel.counter("vfs.cache_write_errors"),
            bypasses: kernel.counter("vfs.cache_bypasses"),
        }
    }
}

/// The cache of one instance.
pub struct BlockCache<H: Host> {
    host: H,
    /// Bytes per cluster: a power of two, 4 KiB to 64 KiB.
    cluster_bytes: usize,
    shards: Vec<ShardCell<H>>,
    /// What is open, to share it and to write it back when memory gets short.
    devices: Mutex<H, Vec<Weak<CachedDevice<H>>>>,
    next_device: AtomicU32,
    /// Dirty pages of all devices.
    dirty_pages: AtomicUsize,
    /// More dirty pages than this, and writers write back.
    dirty_limit: usize,
    /// Most bytes that one fill or one read-ahead reserves.
    window_bytes: usize,
    read_ahead_bytes: u32,
    counters: CacheCounters,
}

impl<H: Host> BlockCache<H> {
    /// An empty cache. Memory is taken as it fills.
    pub fn new(host: H, limits: CacheLimits, counters: CacheCounters) -> Arc<Self> {
        let bytes = usize::try_from(limits.bytes).unwrap_or(usize::MAX).max(64 << 10);
        // About a thousand clusters or more, unless pages get too small.
        let cluster_bytes = match bytes >> 20 {
            64.. => 64 << 10,
            16.. => 32 << 10,
            4.. => 16 << 10,
            1.. => 8 << 10,
            _ => PAGE,
        };
        let clusters = bytes / cluster_bytes;
        let shard_count = (clusters / 64).next_power_of_two().clamp(1, 64);
        let capacity = clusters / shard_count;
        let window_bytes = (bytes / 8).clamp(cluster_bytes, 4 << 20);
        Arc::new(Self {
            host,
            cluster_bytes,
            shards: (0..shard_count)
                .map(|_| ShardCell::new(host, capacity, counters.evictions.clone()))
                .collect(),
            devices: Mutex::new(host, Vec::new()),
            next_device: AtomicU32::new(0),
            dirty_pages: AtomicUsize::new(0),
            dirty_limit: bytes / PAGE / 4,
            window_bytes,
            read_ahead_bytes: limits.read_ahead_bytes.min(u32::try_from(window_bytes).unwrap_or(u32::MAX)),
            counters,
        })
    }

    /// The cache of an instance, by its configuration, memory and counters.
    pub fn for_kernel(kernel: &Kernel<H>) -> Arc<Self> {
        Self::new(
            kernel.host().of_component("cache"),
            CacheLimits::for_kernel(kernel),
            CacheCounters::for_kernel(kernel),
        )
    }

    /// `device` seen through this cache. Opening the same device again gives the same `CachedDevice` while that is in
    /// use, so all users see each other's writes. When its last user drops it, what is dirty is written back (call
    /// [`CachedDevice::sync`] before, to learn of errors) and its pages are dropped.
    ///
    /// Errors: [`BlockError::Invalid`] if the device's description makes no sense (sector size not a power of two
    /// between 512 and 4096, capacity beyond 2^63 bytes, no room for a sector in a request).
    pub fn open(self: &Arc<Self>, device: Arc<dyn BlockDevice>) -> Result<Arc<CachedDevice<H>>, BlockError> {
        let mut devices = self.devices.lock();
        devices.retain(|open| open.strong_count() > 0);
        let known = devices.iter().filter_map(Weak::upgrade).find(|open| open.is(&device));
        if let Some(open) = known {
            return Ok(open);
        }
        let opened = Arc::new(CachedDevice::new(self.clone(), device)?);
        devices.push(Arc::downgrade(&opened));
        Ok(opened)
    }

    /// The host.
    pub fn host(&self) -> H {
        self.host
    }

    /// Bytes per cluster.
    pub fn cluster_bytes(&self) -> usize {
        self.cluster_bytes
    }

    /// How far a sequential reader is read ahead, in bytes: the limit for [`ReadAhead::new`].
    pub fn read_ahead_bytes(&self) -> u32 {
        self.read_ahead_bytes
    }

    /// Bytes of data in memory now.
    pub fn bytes_in_use(&self) -> usize {
        self.shards.iter().map(|cell| cell.lock().clusters() * self.cluster_bytes).sum()
    }

    fn cluster_pages(&self) -> usize {
        self.cluster_bytes / PAGE
    }

    fn shard(&self, key: Key) -> &ShardCell<H> {
        // The table is a power of two in length and never empty, so the masked index exists.
        #[expect(clippy::indexing_slicing, reason = "masked by the length")]
        &self.shards[key.hash() as usize & (self.shards.len() - 1)]
    }
}
