//! A device seen through the cache.

use super::fill::Fill;
use super::shard::{Data, Key, page_bits, pages_of};
use super::{BlockCache, PAGE};
use alloc::sync::Arc;
use alloc::vec;
use anykernel::block::{BlockDevice, BlockError, BlockInfo, Op};
use anykernel::sync::Mutex;
use core::sync::atomic::{AtomicUsize, Ordering};
use hypercall::Host;

/// Requests beyond this size are no faster.
const LARGE_REQUEST: usize = 1 << 20;
/// How often a page may be evicted between its arrival and its use before we stop caching this read.
const MAX_REFILLS: u32 = 16;

/// A block device whose content goes through the [`BlockCache`]. Every method may be called from many threads at once.
///
/// Two reads or writes that overlap are ordered page by page (4 KiB), not as a whole.
pub struct CachedDevice<H: Host> {
    pub(super) cache: Arc<BlockCache<H>>,
    pub(super) device: Arc<dyn BlockDevice>,
    /// Never used twice in the life of the cache.
    pub(super) id: u32,
    /// Capacity.
    pub(super) bytes: u64,
    /// Dirty pages of this device.
    pub(super) dirty_pages: Arc<AtomicUsize>,
    /// Held by the one thread that writes back, so that two writes of one page cannot overtake each other.
    pub(super) writing_back: Mutex<H, ()>,
}

/// A part of a request that lies in one cluster.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) key: Key,
    /// First byte in the cluster.
    pub(super) at: usize,
    pub(super) len: usize,
}

enum Found {
    Here(Data),
    /// On its way.
    Coming,
    Missing,
}

impl<H: Host> CachedDevice<H> {
    pub(super) fn new(cache: Arc<BlockCache<H>>, device: Arc<dyn BlockDevice>) -> Result<Self, BlockError> {
        let info = device.info();
        let sector = info.sector_size as usize;
        if !sector.is_power_of_two() || !(512..=PAGE).contains(&sector) || info.max_request_bytes < PAGE {
            return Err(BlockError::Invalid);
        }
        let bytes = info.bytes().filter(|bytes| *bytes < 1 << 63).ok_or(BlockError::Invalid)?;
        let id = cache.next_device.fetch_add(1, Ordering::Relaxed);
        let host = cache.host;
        Ok(Self {
            cache,
            device,
            id,
            bytes,
            dirty_pages: Arc::new(AtomicUsize::new(0)),
            writing_back: Mutex::new(host, ()),
        })
    }

    pub(super) fn is(&self, device: &Arc<dyn BlockDevice>) -> bool {
        Arc::ptr_eq(&self.device, device)
    }

    /// What the device is.
    pub fn info(&self) -> &BlockInfo {
        self.device.info()
    }

    /// Capacity in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The cache behind it.
    pub fn cache(&self) -> &Arc<BlockCache<H>> {
        &self.cache
    }

    /// How far a sequential reader of this device is read ahead, in bytes: what the configuration says, but at least two large
    /// requests, so that the device has one to work on while the other is being used. 0: not at all.
    pub fn read_ahead_bytes(&self) -> u32 {
        let least =
            self.info().max_request_bytes.min(LARGE_REQUEST).saturating_mul(2).min(self.cache.window_bytes);
        match self.cache.read_ahead_bytes {
            0 => 0,
            bytes => bytes.max(u32::try_from(least).unwrap_or(u32::MAX)),
        }
    }

    /// Fills `buf` from `offset` (bytes, any alignment). Uncached parts are read with few large requests, all of them in
    /// flight together.
    ///
    /// Errors: [`BlockError::Invalid`] if any of it lies outside the device (nothing is read); what the device reports
    /// (`buf` is then unspecified). Context: thread. Blocks.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.check(offset, buf.len())?;
        let end = offset + buf.len() as u64;
        let mut rest = buf;
        let mut at = offset;
        let mut fill = None;
        while !rest.is_empty() {
            let piece = self.piece(at, rest.len());
            let (part, after) = rest.split_at_mut(piece.len);
            match self.obtain(piece, at, end, &mut fill)? {
                Some(data) => {
                    part.copy_from_slice(data.get(piece.at..piece.at + piece.len).ok_or(BlockError::Gone)?);
                }
                None => self.read_past_cache(at, part)?,
            }
            at += piece.len as u64;
            rest = after;
        }
        Ok(())
    }

    /// Writes `data` at `offset` (bytes, any alignment) into the cache. It reaches the device later, and is durable
    /// after [`CachedDevice::sync`] only. Reads see it at once.
    ///
    /// Errors: [`BlockError::Invalid`] outside the device, [`BlockError::ReadOnly`]; [`BlockError::NoMemory`] or a
    /// device error if the cache is full of pages that cannot be written back, or if the rest of a partly written
    /// page cannot be read. Part of the data may be in the cache then. Context: thread. May block.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.check(offset, data.len())?;
        if self.info().read_only {
            return Err(BlockError::ReadOnly);
        }
        let mut rest = data;
        let mut at = offset;
        while !rest.is_empty() {
            let piece = self.piece(at, rest.len());
            let (part, after) = rest.split_at(piece.len);
            self.write_piece(piece, at, part)?;
            at += piece.len as u64;
            rest = after;
        }
        if self.cache.dirty_pages.load(Ordering::Relaxed) > self.cache.dirty_limit {
            // An error leaves the pages dirty; it is sync's to tell.
            let _ = self.write_back();
        }
        Ok(())
    }

    /// As [`CachedDevice::write_at`] with `len` zeros.
    pub fn zero(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        static ZEROS: [u8; PAGE] = [0; PAGE];
        let end = offset.checked_add(len).filter(|end| *end <= self.bytes).ok_or(BlockError::Invalid)?;
        let mut at = offset;
        while at < end {
            // Page by page: no page is read only to be overwritten.
            let len = (PAGE as u64 - at % PAGE as u64).min(end - at);
            self.write_at(at, ZEROS.get(..len as usize).ok_or(BlockError::Invalid)?)?;
            at += len;
        }
        Ok(())
    }

    /// Writes every page that was dirty when it was called, and flushes the device. On `Ok` all writes that returned
    /// before this call are durable. On an error, pages that could not be written stay dirty and the next sync tries
    /// again. Context: thread. Blocks.
    pub fn sync(&self) -> Result<(), BlockError> {
        if self.info().read_only {
            return Ok(());
        }
        self.write_back()?;
        if self.info().needs_flush && !hypercall::planted!("missing-flush") {
            self.cache.counters.flushes.increment();
            let flushed = anykernel::block::transfer(self.cache.host, &*self.device, Op::Flush, 0, vec![]);
            if flushed.is_err() {
                self.cache.counters.write_errors.increment();
            }
            if !hypercall::planted!("swallowed-error") {
                flushed?;
            }
        }
        Ok(())
    }

    /// Starts to read `len` bytes from `offset` into the cache and does not wait. Best effort: what lies outside the
    /// device, or finds no room in the cache or the device's queue, is left out. Errors show when the data is read.
    /// Context: thread. Blocks only where the device's `submit` does.
    pub fn prefetch(&self, offset: u64, len: u64) {
        // A cluster that is begun is worth reading to its end: without a copy, and in one request with those before it.
        let cluster_bytes = self.cache.cluster_bytes as u64;
        let end = offset.saturating_add(len).min(self.bytes);
        let whole = end.next_multiple_of(cluster_bytes).min(self.bytes);
        let end = if len < 4 * cluster_bytes { end } else { whole };
        if offset < end {
            let fill = Fill::start_ahead(self, offset, end);
            self.cache.counters.read_ahead_bytes.add(fill.submitted_bytes());
        }
    }

    fn check(&self, offset: u64, len: usize) -> Result<(), BlockError> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.bytes => Ok(()),
            _ => Err(BlockError::Invalid),
        }
    }

    /// The part of `len` bytes at `offset` that lies in the first cluster.
    pub(super) fn piece(&self, offset: u64, len: usize) -> Piece {
        let cluster_bytes = self.cache.cluster_bytes as u64;
        let at = (offset % cluster_bytes) as usize;
        let len = len.min(self.cache.cluster_bytes - at);
        Piece { key: Key { device: self.id, cluster: offset / cluster_bytes }, at, len }
    }

    fn look(&self, piece: Piece) -> Found {
        let (first, count) = pages_of(piece.at, piece.len);
        let wanted = page_bits(first, count);
        let mut shard = self.cache.shard(piece.key).lock();
        let Some(cluster) = shard.touch(piece.key) else { return Found::Missing };
        match &cluster.data {
            Some(data) if wanted & !cluster.valid == 0 => Found::Here(data.clone()),
            _ if wanted & !cluster.valid & !cluster.reading != 0 => Found::Missing,
            _ => Found::Coming,
        }
    }

    /// The cluster of `piece` with all its pages valid. What is missing up to `end` is fetched along. `None`: there is
    /// no room for it in the cache.
    fn obtain(
        &self,
        piece: Piece,
        offset: u64,
        end: u64,
        fill: &mut Option<Arc<Fill<H>>>,
    ) -> Result<Option<Data>, BlockError> {
        let cell = self.cache.shard(piece.key);
        let counters = &self.cache.counters;
        let mut refills = 0;
        let mut waited = false;
        loop {
            let seen = cell.sequence();
            match self.look(piece) {
                Found::Here(data) => {
                    if waited {
                        counters.misses.increment()
                    } else {
                        counters.hits.increment()
                    }
                    return Ok(Some(data));
                }
                Found::Coming => {
                    self.device.poll();
                    if cell.sequence() == seen {
                        cell.wait_from(seen);
                    }
                }
                Found::Missing => {
                    if let Some(error) = fill.as_ref().and_then(|fill| fill.error()) {
                        return Err(error);
                    }
                    refills += 1;
                    if refills > MAX_REFILLS {
                        counters.bypasses.increment();
                        return Ok(None);
                    }
                    let started = Fill::start(self, offset, end);
                    if started.starved() && started.submitted_bytes() == 0 {
                        // No cluster is free: those on their way will be, dirty ones must be written.
                        self.cache.relieve();
                        self.device.poll();
                        self.cache.host.yield_now();
                    }
                    *fill = Some(started);
                }
            }
            waited = true;
        }
    }

    /// Reads whole sectors into memory of our own; dirty pages are in the cache and were found there.
    fn read_past_cache(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        let sector = u64::from(self.info().sector_size);
        for (index, part) in buf.chunks_mut(PAGE).enumerate() {
            let at = offset + (index * PAGE) as u64;
            let first = at / sector;
            let count = (at + part.len() as u64).div_ceil(sector) - first;
            let memory = super::shard::allocate((count * sector) as usize)?;
            let buffers =
                anykernel::block::transfer(self.cache.host, &*self.device, Op::Read, first, vec![memory])?;
            let memory = buffers.first().ok_or(BlockError::Gone)?;
            let skip = (at - first * sector) as usize;
            part.copy_from_slice(memory.get(skip..skip + part.len()).ok_or(BlockError::Gone)?);
        }
        Ok(())
    }

    /// Pages of `piece` that are not written whole, and whose rest must therefore be known.
    fn edge_pages(&self, piece: Piece, offset: u64) -> u16 {
        let (first, count) = pages_of(piece.at, piece.len);
        let mut edges = 0;
        if !piece.at.is_multiple_of(PAGE) {
            edges |= page_bits(first, 1);
        }
        // The last page of the device ends where the device does.
        if !(piece.at + piece.len).is_multiple_of(PAGE) && offset + (piece.len as u64) < self.bytes {
            edges |= page_bits(first + count - 1, 1);
        }
        edges
    }

    fn write_piece(&self, piece: Piece, offset: u64, part: &[u8]) -> Result<(), BlockError> {
        let (first, count) = pages_of(piece.at, piece.len);
        let pages = page_bits(first, count);
        let edges = self.edge_pages(piece, offset);
        let cell = self.cache.shard(piece.key);
        for _ in 0..=MAX_REFILLS {
            let mut guard = cell.lock();
            let shard = &mut *guard;
            let missing = match shard.find_or_insert(piece.key) {
                Some(cluster) => edges & !cluster.valid,
                None => {
                    drop(guard);
                    self.cache.relieve();
                    self.device.poll();
                    self.cache.host.yield_now();
                    continue;
                }
            };
            if missing != 0 {
                drop(guard);
                // Fetch the page by reading a byte of it; both edges, if both are missing, come one after the other.
                let page = missing.trailing_zeros() as usize;
                let base = offset - piece.at as u64;
                self.read_at(base + (page * PAGE) as u64, &mut [0])?;
                continue;
            }
            let memory = match shard.find(piece.key) {
                Some(cluster) if cluster.data.is_none() => Some(shard.take_memory(self.cache.cluster_bytes)?),
                _ => None,
            };
            let cluster = shard.touch(piece.key).ok_or(BlockError::Gone)?;
            if let Some(memory) = memory {
                cluster.data = Some(Arc::new(memory));
            }
            let data = Arc::make_mut(cluster.data.as_mut().ok_or(BlockError::Gone)?);
            data.get_mut(piece.at..piece.at + piece.len).ok_or(BlockError::Gone)?.copy_from_slice(part);
            let newly = (pages & !cluster.dirty).count_ones() as usize;
            cluster.valid |= pages;
            cluster.dirty |= pages;
            self.dirty_pages.fetch_add(newly, Ordering::Relaxed);
            self.cache.dirty_pages.fetch_add(newly, Ordering::Relaxed);
            cell.changed(guard);
            return Ok(());
        }
        // Every cluster that could take it is dirty and cannot be written.
        self.write_back()?;
        Err(BlockError::NoMemory)
    }
}

impl<H: Host> Drop for CachedDevice<H> {
    fn drop(&mut self) {
        if self.dirty_pages.load(Ordering::Relaxed) != 0
            && let Err(error) = self.sync()
        {
            log::error!("{}: written data is lost: {error}", self.info().name);
        }
        for cell in &self.cache.shards {
            cell.lock().purge(self.id);
        }
        let left = self.dirty_pages.load(Ordering::Relaxed);
        self.cache.dirty_pages.fetch_sub(left, Ordering::Relaxed);
    }
}
