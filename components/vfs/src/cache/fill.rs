//! Reading from a device into the cache.

use super::batch::Batch;
use super::device::CachedDevice;
use super::shard::{Key, PageBits, allocate, page_bits};
use super::{BlockCache, PAGE};
use alloc::boxed::Box;
use alloc::sync::Arc;
use anykernel::block::{BlockDevice, BlockError, Complete, Op, Rejected, Request};
use anykernel::sync::Mutex;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use hypercall::Host;

/// How urgent a request is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Urgency {
    /// The submitter waits for it, and for nothing else.
    Now,
    /// Somebody waits for it.
    Demand,
    /// Nobody waits: not worth waiting for room in the queue.
    Ahead,
}

/// Some requests that were started together. The tag of each is the number of its first page.
pub(super) struct Fill<H: Host> {
    cache: Arc<BlockCache<H>>,
    device: u32,
    /// Bytes submitted.
    submitted: AtomicU64,
    /// No cluster was free for some of it.
    starved: AtomicBool,
    /// The first failure.
    error: Mutex<H, Option<BlockError>>,
}

impl<H: Host> Fill<H> {
    /// Asks for every missing page between the byte offsets `from` and `end`, or as much of it as the cache takes at
    /// once, but at least tries the first.
    pub(super) fn start(device: &CachedDevice<H>, from: u64, end: u64) -> Arc<Self> {
        Self::run(device, from, end, Urgency::Demand)
    }

    /// As [`Fill::start`], but gives up where it would have to wait.
    pub(super) fn start_ahead(device: &CachedDevice<H>, from: u64, end: u64) -> Arc<Self> {
        Self::run(device, from, end, Urgency::Ahead)
    }

    pub(super) fn submitted_bytes(&self) -> u64 {
        self.submitted.load(Ordering::Relaxed)
    }

    pub(super) fn starved(&self) -> bool {
        self.starved.load(Ordering::Relaxed)
    }

    pub(super) fn error(&self) -> Option<BlockError> {
        *self.error.lock()
    }

    fn fail(&self, error: BlockError) {
        self.error.lock().get_or_insert(error);
    }

    fn run(device: &CachedDevice<H>, from: u64, end: u64, urgency: Urgency) -> Arc<Self> {
        let cache = &device.cache;
        let fill = Arc::new(Self {
            cache: cache.clone(),
            device: device.id,
            submitted: AtomicU64::new(0),
            starved: AtomicBool::new(false),
            error: Mutex::new(cache.host, None),
        });
        let page = PAGE as u64;
        let per_cluster = cache.cluster_pages() as u64;
        let end = end.min(from.saturating_add(cache.window_bytes as u64)).min(device.bytes).div_ceil(page);
        let mut at = from / page;
        let mut batch = Batch::default();
        while at < end {
            let cluster = at / per_cluster;
            let stop = end.min((cluster + 1) * per_cluster);
            let wanted = page_bits((at % per_cluster) as usize, (stop - at) as usize);
            match fill.reserve(device, cluster, wanted) {
                Ok(Reserved::Nothing) => {}
                Ok(Reserved::Whole(memory)) => fill.add(device, &mut batch, at, memory, urgency),
                Ok(Reserved::Pages(missing)) => {
                    let base = cluster * per_cluster;
                    for (first, count) in runs(missing) {
                        let start = base + first as u64;
                        let len = (count * PAGE).min((device.bytes - start * page) as usize);
                        match allocate(len) {
                            Ok(memory) => fill.add(device, &mut batch, start, memory, urgency),
                            Err(error) => fill.give_up(cluster, page_bits(first, count), error),
                        }
                    }
                }
                Err(error) => {
                    match error {
                        Some(error) => fill.fail(error),
                        None => fill.starved.store(true, Ordering::Relaxed),
                    }
                    break;
                }
            }
            at = stop;
        }
        // Whoever wants this alone waits for it.
        let alone = urgency == Urgency::Demand && fill.submitted_bytes() == 0;
        if let Some(rest) = batch.take() {
            fill.submit(device, rest, if alone { Urgency::Now } else { urgency });
        }
        fill
    }

    /// Marks what is missing of `wanted` as on its way. `Err(None)`: no cluster is free.
    fn reserve(
        &self,
        device: &CachedDevice<H>,
        cluster: u64,
        wanted: PageBits,
    ) -> Result<Reserved, Option<BlockError>> {
        let key = Key { device: self.device, cluster };
        let cluster_bytes = self.cache.cluster_bytes;
        let all = page_bits(0, self.cache.cluster_pages());
        let inside = (cluster + 1).checked_mul(cluster_bytes as u64).is_some_and(|end| end <= device.bytes);
        let mut guard = self.cache.shard(key).lock();
        let shard = &mut *guard;
        let cluster = shard.find_or_insert(key).ok_or(None)?;
        let missing = wanted & !cluster.valid & !cluster.reading;
        if missing == 0 {
            return Ok(Reserved::Nothing);
        }
        cluster.reading |= missing;
        if missing != all || !inside {
            return Ok(Reserved::Pages(missing));
        }
        // The device fills the cluster itself.
        let memory = match cluster.data.take().and_then(Arc::into_inner) {
            Some(memory) => Ok(memory),
            None => shard.take_memory(cluster_bytes),
        };
        memory.map(Reserved::Whole).map_err(|error| {
            if let Some(cluster) = shard.find(key) {
                cluster.reading &= !missing;
            }
            Some(error)
        })
    }

    /// Takes a reservation back.
    fn give_up(&self, cluster: u64, pages: PageBits, error: BlockError) {
        self.fail(error);
        let key = Key { device: self.device, cluster };
        let cell = self.cache.shard(key);
        let mut shard = cell.lock();
        if let Some(cluster) = shard.find(key) {
            cluster.reading &= !pages;
        }
        cell.changed(shard);
    }

    fn add(
        self: &Arc<Self>,
        device: &CachedDevice<H>,
        batch: &mut Batch,
        page: u64,
        memory: Box<[u8]>,
        urgency: Urgency,
    ) {
        let most = device.info().max_request_bytes;
        // A cluster may be larger than the device's largest request; then it goes in pieces of pages.
        if memory.len() > most {
            return self.add_in_pieces(device, batch, page, &memory, urgency);
        }
        if let Some(full) = batch.add(page, memory, device.info()) {
            self.submit(device, full, urgency);
        }
    }

    fn add_in_pieces(
        self: &Arc<Self>,
        device: &CachedDevice<H>,
        batch: &mut Batch,
        page: u64,
        memory: &[u8],
        urgency: Urgency,
    ) {
        let most = device.info().max_request_bytes / PAGE * PAGE;
        let per_cluster = self.cache.cluster_pages() as u64;
        for (index, piece) in memory.chunks(most).enumerate() {
            let start = page + (index * most / PAGE) as u64;
            match allocate(piece.len()) {
                Ok(memory) => self.add(device, batch, start, memory, urgency),
                Err(error) => {
                    let pages = page_bits((start % per_cluster) as usize, piece.len().div_ceil(PAGE));
                    self.give_up(start / per_cluster, pages, error);
                }
            }
        }
    }

    fn submit(self: &Arc<Self>, device: &CachedDevice<H>, batch: Batch, urgency: Urgency) {
        let counters = &self.cache.counters;
        counters.read_requests.increment();
        counters.read_bytes.add(batch.bytes());
        self.submitted.fetch_add(batch.bytes(), Ordering::Relaxed);
        let request = batch.into_request(Op::Read, device.info(), self.clone());
        submit(self.cache.host, &*device.device, request, urgency);
    }
}

/// Submits; waits for room in the queue if somebody waits for the request. A request that is refused is completed with
/// the reason.
pub(super) fn submit<H: Host>(host: H, device: &dyn BlockDevice, mut request: Request, urgency: Urgency) {
    loop {
        let submitted = match urgency {
            Urgency::Now => device.submit_and_poll(request),
            Urgency::Demand | Urgency::Ahead => device.submit(request),
        };
        match submitted {
            Ok(()) => return,
            Err(Rejected { request: back, reason: None }) if urgency != Urgency::Ahead => {
                request = back;
                device.poll();
                host.yield_now();
            }
            Err(Rejected { request, reason }) => {
                let done = request.done.clone();
                done.complete(request, Err(reason.unwrap_or(BlockError::NoMemory)));
                return;
            }
        }
    }
}

enum Reserved {
    /// All of it is there or on its way.
    Nothing,
    /// The memory of the whole cluster, for the device.
    Whole(Box<[u8]>),
    /// These pages are to be read into memory of their own.
    Pages(PageBits),
}

/// The runs of set bits: first and count.
pub(super) fn runs(bits: PageBits) -> impl Iterator<Item = (usize, usize)> {
    let mut rest = u32::from(bits);
    core::iter::from_fn(move || {
        if rest == 0 {
            return None;
        }
        let first = rest.trailing_zeros();
        let count = (rest >> first).trailing_ones();
        rest &= !(((1u32 << count) - 1) << first);
        Some((first as usize, count as usize))
    })
}

impl<H: Host> Complete for Fill<H> {
    fn complete(&self, request: Request, result: Result<(), BlockError>) {
        if let Err(error) = result {
            self.cache.counters.read_errors.increment();
            self.fail(error);
        }
        let per_cluster = self.cache.cluster_pages() as u64;
        let mut page = request.tag + request.bytes().div_ceil(PAGE) as u64;
        // From the end, because a reader waits for what comes first: woken once, it finds everything.
        for memory in request.buffers.into_iter().rev() {
            let count = memory.len().div_ceil(PAGE);
            page -= count as u64;
            let first = (page % per_cluster) as usize;
            let key = Key { device: self.device, cluster: page / per_cluster };
            self.arrived(key, first, count, memory, result.is_ok());
        }
    }
}

impl<H: Host> Fill<H> {
    fn arrived(&self, key: Key, first: usize, count: usize, memory: Box<[u8]>, ok: bool) {
        let cluster_bytes = self.cache.cluster_bytes;
        let pages = page_bits(first, count);
        let cell = self.cache.shard(key);
        let mut guard = cell.lock();
        let shard = &mut *guard;
        let Some(cluster) = shard.find(key) else { return };
        cluster.reading &= !pages;
        // What was written meanwhile is newer than what we bring.
        let fresh = pages & !cluster.valid;
        if !ok {
            if memory.len() == cluster_bytes {
                shard.return_memory(memory);
            }
        } else if memory.len() == cluster_bytes && cluster.data.is_none() {
            cluster.data = Some(Arc::new(memory));
            cluster.valid |= fresh;
        } else {
            let room = if cluster.data.is_none() { Some(shard.take_memory(cluster_bytes)) } else { None };
            if let Some(cluster) = shard.find(key) {
                match room {
                    Some(Ok(room)) => cluster.data = Some(Arc::new(room)),
                    Some(Err(error)) => self.fail(error),
                    None => {}
                }
                if let Some(data) = &mut cluster.data {
                    let data = Arc::make_mut(data);
                    for (at, run) in runs(fresh) {
                        copy(data, at * PAGE, &memory, (at - first) * PAGE, run * PAGE);
                    }
                    cluster.valid |= fresh;
                }
            }
        }
        cell.changed(guard);
    }
}

/// Copies `len` bytes, or fewer where the device ends within a page.
fn copy(to: &mut [u8], to_at: usize, from: &[u8], from_at: usize, len: usize) {
    let from = from.get(from_at..from.len().min(from_at + len)).unwrap_or_default();
    if let Some(to) = to.get_mut(to_at..to_at + from.len()) {
        to.copy_from_slice(from);
    }
}
