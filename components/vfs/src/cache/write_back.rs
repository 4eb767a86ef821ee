//! Writing dirty pages to a device.

use super::batch::Batch;
use super::device::CachedDevice;
use super::fill::{Urgency, runs, submit};
use super::shard::{Key, PageBits, allocate, page_bits};
use super::{BlockCache, PAGE};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use anykernel::block::{BlockError, Complete, Op, Request};
use anykernel::sync::Mutex;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use hypercall::Host;

/// Most requests of one write-back in flight.
const IN_FLIGHT: u32 = 8;

/// One write-back under way. The tag of each request is the number of its first page.
struct WriteBack<H: Host> {
    cache: Arc<BlockCache<H>>,
    device: u32,
    dirty_pages: Arc<AtomicUsize>,
    in_flight: AtomicU32,
    error: Mutex<H, Option<BlockError>>,
}

impl<H: Host> BlockCache<H> {
    /// Writes back every device, because clusters are needed. Errors leave pages dirty.
    pub(super) fn relieve(&self) {
        let devices: Vec<_> = self.devices.lock().iter().filter_map(Weak::upgrade).collect();
        for device in devices {
            if device.dirty_pages.load(Ordering::Relaxed) != 0 {
                let _ = device.write_back();
            }
        }
    }
}

impl<H: Host> CachedDevice<H> {
    /// Writes every page that is dirty now and waits until the device has taken them; does not flush it. The first
    /// error is returned; what failed stays dirty.
    pub(super) fn write_back(&self) -> Result<(), BlockError> {
        let _alone = self.writing_back.lock();
        if self.dirty_pages.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        let run = Arc::new(WriteBack {
            cache: self.cache.clone(),
            device: self.id,
            dirty_pages: self.dirty_pages.clone(),
            in_flight: AtomicU32::new(0),
            error: Mutex::new(self.cache.host, None),
        });
        let mut batch = Batch::default();
        let mut outcome = Ok(());
        for cluster in self.dirty_clusters()? {
            outcome = run.add_cluster(self, &mut batch, cluster);
            if outcome.is_err() {
                break;
            }
        }
        if let Some(rest) = batch.take() {
            run.submit(self, rest);
        }
        run.wait(self, 0);
        let error = *run.error.lock();
        outcome.and(error.map_or(Ok(()), Err))
    }

    /// In disk order.
    fn dirty_clusters(&self) -> Result<Vec<u64>, BlockError> {
        let mut clusters = Vec::new();
        for cell in &self.cache.shards {
            let mut shard = cell.lock();
            for (number, _) in shard.of(self.id).filter(|(_, cluster)| cluster.dirty != 0) {
                clusters.try_reserve(1).map_err(|_| BlockError::NoMemory)?;
                clusters.push(number);
            }
        }
        clusters.sort_unstable();
        Ok(clusters)
    }
}

impl<H: Host> WriteBack<H> {
    /// Copies the dirty pages of a cluster: they may be written again while the device has the copy.
    fn add_cluster(
        self: &Arc<Self>,
        device: &CachedDevice<H>,
        batch: &mut Batch,
        cluster: u64,
    ) -> Result<(), BlockError> {
        let key = Key { device: self.device, cluster };
        let base = cluster * self.cache.cluster_pages() as u64;
        let most = device.info().max_request_bytes / PAGE;
        let dirty = match self.cache.shard(key).lock().find(key) {
            Some(cluster) => cluster.dirty,
            None => return Ok(()),
        };
        for (first, count) in runs(dirty) {
            let mut at = first;
            while at < first + count {
                let pages = (first + count - at).min(most);
                let start = base + at as u64;
                let len = (pages * PAGE).min((device.bytes - start * PAGE as u64) as usize);
                // Before the lock is taken again: allocation may take a while.
                let mut memory = allocate(len)?;
                self.take(key, at, pages, &mut memory);
                if let Some(full) = batch.add(start, memory, device.info()) {
                    self.submit(device, full);
                }
                at += pages;
            }
        }
        Ok(())
    }

    /// Copies pages out. Only [`CachedDevice::write_back`] makes pages clean, and it is alone, so they are still dirty.
    fn take(&self, key: Key, first: usize, count: usize, memory: &mut [u8]) {
        let pages = page_bits(first, count);
        let mut shard = self.cache.shard(key).lock();
        let Some(cluster) = shard.find(key) else { return };
        if let Some(from) = cluster.data.as_ref().and_then(|data| data.get(first * PAGE..))
            && let Some(from) = from.get(..memory.len())
        {
            memory.copy_from_slice(from);
        }
        self.set_clean((cluster.dirty & pages).count_ones());
        cluster.dirty &= !pages;
        cluster.writing |= pages;
    }

    fn set_clean(&self, pages: u32) {
        self.dirty_pages.fetch_sub(pages as usize, Ordering::Relaxed);
        self.cache.dirty_pages.fetch_sub(pages as usize, Ordering::Relaxed);
    }

    fn submit(self: &Arc<Self>, device: &CachedDevice<H>, batch: Batch) {
        self.wait(device, IN_FLIGHT - 1);
        self.cache.counters.write_requests.increment();
        self.cache.counters.written_bytes.add(batch.bytes());
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let request = batch.into_request(Op::Write, device.info(), self.clone());
        submit(self.cache.host, &*device.device, request, Urgency::Demand);
    }

    /// Until at most `most` requests are in flight.
    fn wait(&self, device: &CachedDevice<H>, most: u32) {
        loop {
            let now = self.in_flight.load(Ordering::Acquire);
            if now <= most {
                return;
            }
            device.device.poll();
            if self.in_flight.load(Ordering::Acquire) == now {
                self.cache.host.park(&self.in_flight, now, None);
            }
        }
    }

    fn written(&self, key: Key, pages: PageBits, ok: bool) {
        let cell = self.cache.shard(key);
        let mut shard = cell.lock();
        if let Some(cluster) = shard.find(key) {
            cluster.writing &= !pages;
            if !ok {
                let again = (pages & !cluster.dirty).count_ones() as usize;
                cluster.dirty |= pages;
                self.dirty_pages.fetch_add(again, Ordering::Relaxed);
                self.cache.dirty_pages.fetch_add(again, Ordering::Relaxed);
            }
        }
        cell.changed(shard);
    }
}

impl<H: Host> Complete for WriteBack<H> {
    fn complete(&self, request: Request, result: Result<(), BlockError>) {
        if let Err(error) = result {
            self.cache.counters.write_errors.increment();
            self.error.lock().get_or_insert(error);
        }
        let per_cluster = self.cache.cluster_pages() as u64;
        let mut page = request.tag;
        for memory in &request.buffers {
            let count = memory.len().div_ceil(PAGE);
            let key = Key { device: self.device, cluster: page / per_cluster };
            self.written(key, page_bits((page % per_cluster) as usize, count), result.is_ok());
            page += count as u64;
        }
        self.in_flight.fetch_sub(1, Ordering::Release);
        self.cache.host.unpark(&self.in_flight, u32::MAX);
    }
}
