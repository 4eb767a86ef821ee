//! What a block device is: requests go in with their buffer and come back with it, many in flight.

use alloc::{boxed::Box, string::String, sync::Arc, vec::Vec};
use core::fmt;
use hypercall::Threads;
use hypercall::atomic::{AtomicU32, Ordering};

/// Everything a user needs to know of a device. Constant while it exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockInfo {
    /// Registry name: `disk0`, `disk1`; partitions are `disk0p1`.
    pub name: String,
    /// Bytes per sector: 512 to 4096, a power of two. All offsets in requests count these.
    pub sector_size: u32,
    /// How many sectors.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Most bytes one request may carry; a multiple of `sector_size`.
    pub max_request_bytes: usize,
    /// Most buffers one request may have, at least 1. `usize::MAX`: any number.
    pub max_buffers: usize,
    /// How many requests the device can have in flight.
    pub queue_depth: usize,
    /// Whether there is a volatile cache, so that [`Op::Flush`] matters.
    pub needs_flush: bool,
}

impl BlockInfo {
    /// Capacity in bytes, if that fits 64 bits.
    pub fn bytes(&self) -> Option<u64> {
        self.sectors.checked_mul(u64::from(self.sector_size))
    }
}

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Fill the buffers from the device.
    Read,
    /// Write the buffers to the device.
    Write,
    /// Make every write completed before this request was submitted durable. No buffers.
    Flush,
}

/// Why a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BlockError {
    /// Outside the device, not whole sectors, too large.
    Invalid,
    /// A write to a read-only device.
    ReadOnly,
    /// The device reports an error for these sectors.
    Io,
    /// The device is gone or broke the protocol; nothing will work any more.
    Gone,
    /// No memory for the request.
    NoMemory,
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BlockError::Invalid => "request outside the device",
            BlockError::ReadOnly => "device is read-only",
            BlockError::Io => "device input/output error",
            BlockError::Gone => "device is gone",
            BlockError::NoMemory => "out of memory",
        })
    }
}

impl core::error::Error for BlockError {}

/// One transfer. The device owns the buffers while it is in flight.
pub struct Request {
    /// What to do.
    pub op: Op,
    /// First sector.
    pub sector: u64,
    /// Scatter list; each a whole number of sectors, at least 16-byte aligned. Order is disk order.
    pub buffers: Vec<Box<[u8]>>,
    /// Told when it is over.
    pub done: Arc<dyn Complete>,
    /// For the owner of `done`; the device only carries it.
    pub tag: u64,
}

impl Request {
    /// Sum of the buffers' lengths.
    pub fn bytes(&self) -> usize {
        self.buffers.iter().map(|buffer| buffer.len()).sum()
    }
}

/// Takes finished requests back.
pub trait Complete: Send + Sync {
    /// Called once for every accepted request, from [`BlockDevice::poll`] on some thread (never inside `submit`, never
    /// in interrupt context). Must not block; may take short locks and wake threads. On failure the content of read
    /// buffers is unspecified.
    fn complete(&self, request: Request, result: Result<(), BlockError>);
}

/// A request that was not accepted, with its buffers.
pub struct Rejected {
    /// As it was.
    pub request: Request,
    /// `None`: the queue is full now; poll and try again. Else it will never be accepted.
    pub reason: Option<BlockError>,
}

/// A block device (virtio-blk, a host's disk, a partition).
pub trait BlockDevice: Send + Sync {
    /// What it is.
    fn info(&self) -> &BlockInfo;

    /// Starts a request. Devices without asynchronous hardware may do the work here, and then complete it in `poll`.
    /// Context: thread. Takes short locks; may block only on hosts whose disk contract blocks.
    fn submit(&self, request: Request) -> Result<(), Rejected>;

    /// As [`BlockDevice::submit`] and then [`BlockDevice::poll`], for someone who waits for this request: a device
    /// without asynchronous hardware does it at once on the calling thread, and may complete it inside this call.
    fn submit_and_poll(&self, request: Request) -> Result<(), Rejected> {
        self.submit(request)?;
        self.poll();
        Ok(())
    }

    /// Completes what has finished. Called by the driver's own thread after an interrupt, and by whoever waits.
    /// Context: thread; not from inside [`Complete::complete`].
    fn poll(&self);
}

/// What came back of a request.
type Outcome = (Request, Result<(), BlockError>);

struct Wait<H> {
    host: H,
    finished: AtomicU32,
    outcome: crate::sync::Mutex<H, Option<Outcome>>,
}

impl<H: Threads + Copy + Send + Sync + 'static> Complete for Wait<H> {
    fn complete(&self, request: Request, result: Result<(), BlockError>) {
        *self.outcome.lock() = Some((request, result));
        self.finished.store(1, Ordering::Release);
        self.host.unpark(&self.finished, u32::MAX);
    }
}

/// Submits one request, waits for it and returns its buffers. Context: thread. Blocks.
pub fn transfer<H: Threads + Copy + Send + Sync + 'static>(
    host: H,
    device: &dyn BlockDevice,
    op: Op,
    sector: u64,
    buffers: Vec<Box<[u8]>>,
) -> Result<Vec<Box<[u8]>>, BlockError> {
    let wait =
        Arc::new(Wait { host, finished: AtomicU32::new(0), outcome: crate::sync::Mutex::new(host, None) });
    let mut request = Request { op, sector, buffers, done: wait.clone(), tag: 0 };
    loop {
        match device.submit_and_poll(request) {
            Ok(()) => break,
            Err(Rejected { reason: Some(error), .. }) => return Err(error),
            Err(Rejected { request: back, reason: None }) => {
                request = back;
                device.poll();
                host.yield_now();
            }
        }
    }
    loop {
        device.poll();
        if wait.finished.load(Ordering::Acquire) != 0 {
            break;
        }
        host.park(&wait.finished, 0, None);
    }
    let (request, result) = wait.outcome.lock().take().ok_or(BlockError::Gone)?;
    result.map(|()| request.buffers)
}
