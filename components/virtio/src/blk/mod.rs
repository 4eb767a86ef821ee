//! virtio-blk (VirtIO 1.2, 5.2): a [`BlockDevice`] with many requests in flight on one or several queues.
//!
//! Buffers are mapped for the device while their request is in flight. Each queue has a thread that waits for its
//! interrupts and polls; whoever waits for a request polls too. With several queues each belongs to a CPU: who submits
//! there is interrupted and woken there. Once the threads have ended with their kernel, [`BlockDevice::poll`] itself waits
//! for the device, so that file systems can still write back at shutdown.

mod setup;

use crate::dma::{Chain, DmaSlot, Mapped};
use crate::error::{Error, Fault, Result};
use crate::queue::{AddError, Queue, Returned};
use crate::spec::blk as spec;
use crate::transport::{Acknowledger, Attached, Doorbell, Place, Transport};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::block::{BlockDevice, BlockError, BlockInfo, Op, Rejected, Request};
use anykernel::counter::Counter;
use anykernel::sync::Mutex;
use core::sync::atomic::{AtomicBool, Ordering};
use hypercall::{CpuId, DeviceHost, DmaDirection, Signal};

/// A request without an answer for this long means that the device is gone.
const REQUEST_TIMEOUT_NS: u64 = 30_000_000_000;
/// How long a late device is watched before it is given up.
const GRACE_NS: u64 = 2_000_000_000;
/// The same for a clock that stands still.
const GRACE_TRIES: u32 = 10_000_000;
/// How often a quiet device is looked at.
const WATCH_NS: u64 = 5_000_000_000;
/// Completions taken under one hold of the queue lock.
const BATCH: usize = 16;
/// What the driver writes where the device puts its status, to see that it did.
const NO_STATUS: u8 = 0xff;

struct Pending {
    request: Request,
    bytes: u32,
    submitted_ns: u64,
}

struct BlkQueue<H: DeviceHost> {
    queue: Queue<H, Pending>,
    doorbell: Doorbell<H>,
    /// Headers not in use.
    headers: Vec<DmaSlot<H>>,
}

struct Finished {
    request: Request,
    result: Result<(), BlockError>,
}

/// A virtio block device.
pub(crate) struct Blk<H: DeviceHost> {
    host: H,
    place: Place,
    info: BlockInfo,
    max_segments: usize,
    max_segment: usize,
    legacy: bool,
    /// `None` once the device was given up.
    queues: Vec<Mutex<H, Option<BlkQueue<H>>>>,
    transport: Mutex<H, Transport<H>>,
    /// What the interrupt of each queue raises.
    signals: Vec<Arc<Signal>>,
    attached: Vec<Attached>,
    acknowledger: Option<Acknowledger<H>>,
    /// Flushes of a device without a cache: done, and handed back at the next poll.
    instant: Mutex<H, Vec<Request>>,
    gone: AtomicBool,
    /// Nobody waits for interrupts (any more): whoever polls waits himself.
    polled: AtomicBool,
    errors: Counter,
    timeouts: Counter,
}

impl<H: DeviceHost> Blk<H> {
    /// Sets the device up, registers it as `diskN` and starts its thread.
    pub(crate) fn start(kernel: &Arc<Kernel<H>>, place: Place, mut transport: Transport<H>) -> Result<()> {
        let device = match Self::set_up(kernel, place, &mut transport) {
            Ok(parts) => parts.finish(transport),
            Err(error) => {
                transport.fail();
                return Err(error);
            }
        };
        let device = Arc::new(device?);
        let info = &device.info;
        log::info!(
            "{}: {place}, {} sectors of {} bytes, {} queue(s) of {}{}",
            info.name,
            info.sectors,
            info.sector_size,
            device.queues.len(),
            info.queue_depth,
            if info.read_only { ", read-only" } else { "" },
        );
        kernel.add_block_device(device.clone());
        for (index, signal) in device.signals.iter().enumerate() {
            kernel.raise_on_stop(signal.clone());
            let cpu = (device.signals.len() > 1).then_some(CpuId(index as u32));
            let name = alloc::format!("{}.{index}", info.name);
            let (thread_kernel, thread_device) = (kernel.clone(), device.clone());
            if let Err(error) = kernel.spawn(&name, cpu, move || thread_device.run(&thread_kernel, index)) {
                // It works without, only that waiters burn their time.
                log::warn!("{name}: {error}; polling instead");
                device.polled.store(true, Ordering::Release);
            }
        }
        Ok(())
    }

    /// The thread of a queue: waits for interrupts, polls; that of the first queue also watches over time.
    fn run(&self, kernel: &Kernel<H>, index: usize) {
        let (Some(signal), Some(queue)) = (self.signals.get(index), self.queues.get(index)) else { return };
        let mut watched_ns = self.host.monotonic_ns();
        loop {
            let seen = signal.count();
            if kernel.stopping() || self.gone.load(Ordering::Acquire) {
                break;
            }
            if let Some(acknowledger) = &self.acknowledger {
                acknowledger.acknowledge();
            }
            self.poll_queue(queue);
            let mut deadline_ns = None;
            if index == 0 {
                if self.host.monotonic_ns().saturating_sub(watched_ns) >= WATCH_NS {
                    watched_ns = self.host.monotonic_ns();
                    self.watch();
                }
                deadline_ns = Some(watched_ns.saturating_add(WATCH_NS));
            }
            let ready = queue.lock().as_mut().is_some_and(|queue| queue.queue.enable_interrupts(0));
            if !ready {
                signal.wait(&self.host, seen, deadline_ns);
            }
        }
        self.polled.store(true, Ordering::Release);
        // Whoever went to sleep counting on this thread is served before it ends.
        self.poll();
    }

    /// Whether the device let a request wait too long.
    fn is_late(&self) -> bool {
        let limit = self.host.monotonic_ns().saturating_sub(REQUEST_TIMEOUT_NS);
        self.queues.iter().any(|queue| {
            queue.lock().as_ref().is_some_and(|queue| queue.queue.tokens().any(|p| p.submitted_ns < limit))
        })
    }

    /// Gives the device up if it asks for it or let a request wait too long.
    fn watch(&self) {
        if self.is_late() {
            // The clock of a machine that was paused jumps, and an emulator may let idle time pass at once: then the
            // device had no time at all. So it gets some while we are awake.
            let until_ns = self.host.monotonic_ns().saturating_add(GRACE_NS);
            for _ in 0..GRACE_TRIES {
                self.poll_queues();
                if !self.is_late() {
                    return;
                }
                if self.host.monotonic_ns() >= until_ns {
                    break;
                }
                self.host.yield_now();
            }
            self.timeouts.increment();
            self.give_up(&Fault::Timeout.into());
        } else if self.transport.lock().needs_reset() {
            self.give_up(&Error::BadDevice("it asks for a reset"));
        }
    }

    fn poll_queues(&self) {
        let instant = core::mem::take(&mut *self.instant.lock());
        for request in instant {
            request.done.clone().complete(request, Ok(()));
        }
        for queue in &self.queues {
            self.poll_queue(queue);
        }
    }

    /// Completes what the device returned on one queue.
    fn poll_queue(&self, queue: &Mutex<H, Option<BlkQueue<H>>>) {
        loop {
            let mut batch = [const { None }; BATCH];
            let mut fault = None;
            {
                let mut guard = queue.lock();
                let Some(queue) = guard.as_mut() else { return };
                for place in &mut batch {
                    match queue.queue.pop() {
                        Ok(Some(returned)) => *place = Some(self.finish(returned, &mut queue.headers)),
                        Ok(None) => break,
                        Err(error) => {
                            fault = Some(error);
                            break;
                        }
                    }
                }
            }
            let full = batch.last().is_some_and(Option::is_some);
            for Finished { request, result } in batch.into_iter().flatten() {
                if result.is_err() {
                    self.errors.increment();
                }
                request.done.clone().complete(request, result);
            }
            if let Some(fault) = fault {
                self.give_up(&fault.into());
            } else if full {
                continue;
            }
            return;
        }
    }

    /// Judges a request that the device returned.
    fn finish(&self, returned: Returned<H, Pending>, headers: &mut Vec<DmaSlot<H>>) -> Finished {
        let Returned { token: Pending { mut request, bytes, .. }, chain, len } = returned;
        let mut status = [NO_STATUS];
        let _ = chain.slot().copy_out(spec::HEADER_BYTES, &mut status);
        let (header, data) = chain.into_parts();
        headers.push(header);
        request.buffers.extend(data.into_iter().map(Mapped::into_inner));
        // Legacy devices are known to report wrong lengths (2.7.8.2).
        let short = request.op == Op::Read && !self.legacy && len <= bytes;
        let result = if status == [spec::S_OK] && !short { Ok(()) } else { Err(BlockError::Io) };
        Finished { request, result }
    }

    /// Resets the device for good and completes what is in flight with [`BlockError::Gone`].
    fn give_up(&self, why: &Error) {
        if self.gone.swap(true, Ordering::AcqRel) {
            return;
        }
        log::error!("{}: {}: {why}; giving the device up", self.info.name, self.place);
        self.errors.increment();
        self.end();
        for signal in &self.signals {
            signal.raise(&self.host);
        }
    }

    /// Resets the device and ends every queue.
    fn end(&self) {
        let quiet = self.transport.lock().reset();
        for queue in &self.queues {
            let Some(BlkQueue { queue, headers, .. }) = queue.lock().take() else { continue };
            let mut requests = Vec::new();
            match &quiet {
                Some(proof) => queue.dismantle(proof, |Pending { mut request, .. }, chain| {
                    let (_, data) = chain.into_parts();
                    request.buffers.extend(data.into_iter().map(Mapped::into_inner));
                    requests.push(request);
                }),
                // The device may still write to the buffers: they are lost.
                None => queue.abandon(|Pending { request, .. }| requests.push(request)),
            }
            drop(headers);
            for request in requests {
                request.done.clone().complete(request, Err(BlockError::Gone));
            }
        }
    }

    /// Whether the device can do `request` at all.
    fn check(&self, request: &Request) -> Result<(), BlockError> {
        if self.gone.load(Ordering::Acquire) {
            return Err(BlockError::Gone);
        }
        if request.op == Op::Flush {
            return if request.buffers.is_empty() { Ok(()) } else { Err(BlockError::Invalid) };
        }
        if request.op == Op::Write && self.info.read_only {
            return Err(BlockError::ReadOnly);
        }
        let sector_size = self.info.sector_size as usize;
        let (mut bytes, mut segments) = (0usize, 0usize);
        for buffer in &request.buffers {
            if buffer.is_empty() || buffer.len() % sector_size != 0 {
                return Err(BlockError::Invalid);
            }
            bytes = bytes.checked_add(buffer.len()).ok_or(BlockError::Invalid)?;
            segments += buffer.len().div_ceil(self.max_segment);
        }
        let end = request.sector.checked_add((bytes / sector_size) as u64);
        if bytes == 0
            || bytes > self.info.max_request_bytes
            || segments > self.max_segments
            || end.is_none_or(|end| end > self.info.sectors)
        {
            return Err(BlockError::Invalid);
        }
        Ok(())
    }

    /// Maps the buffers of `request`, which has none meanwhile.
    fn map(&self, request: &mut Request) -> Result<Vec<Mapped<H>>, BlockError> {
        let direction =
            if request.op == Op::Read { DmaDirection::FromDevice } else { DmaDirection::ToDevice };
        let mut mapped: Vec<Mapped<H>> = Vec::new();
        mapped.try_reserve_exact(request.buffers.len()).map_err(|_| BlockError::NoMemory)?;
        let mut failed = None;
        let mut left: Vec<Box<[u8]>> = Vec::new();
        for buffer in request.buffers.drain(..) {
            if failed.is_some() {
                left.push(buffer);
                continue;
            }
            match Mapped::new(self.host, buffer, direction) {
                Ok(buffer) => mapped.push(buffer),
                Err((buffer, error)) => {
                    left.push(buffer);
                    failed = Some(match error {
                        hypercall::Error::NoMemory => BlockError::NoMemory,
                        _ => BlockError::Invalid,
                    });
                }
            }
        }
        match failed {
            None => Ok(mapped),
            Some(error) => {
                request.buffers.extend(mapped.into_iter().map(Mapped::into_inner));
                request.buffers.append(&mut left);
                Err(error)
            }
        }
    }
}

impl<H: DeviceHost> BlockDevice for Blk<H> {
    fn info(&self) -> &BlockInfo {
        &self.info
    }

    fn submit(&self, mut request: Request) -> Result<(), Rejected> {
        if let Err(error) = self.check(&request) {
            return Err(Rejected { request, reason: Some(error) });
        }
        if request.op == Op::Flush && !self.info.needs_flush {
            self.instant.lock().push(request);
            return Ok(());
        }
        let cpu = self.host.current_cpu().0 as usize;
        let Some(queue) = self.queues.get(cpu % self.queues.len().max(1)) else {
            return Err(Rejected { request, reason: Some(BlockError::Gone) });
        };
        let bytes = request.bytes();
        let data = match self.map(&mut request) {
            Ok(data) => data,
            Err(error) => return Err(Rejected { request, reason: Some(error) }),
        };
        let mut guard = queue.lock();
        let Some(queue) = guard.as_mut() else {
            return Err(reject(request, data, Some(BlockError::Gone)));
        };
        let Some(mut header) = queue.headers.pop() else {
            return Err(reject(request, data, None));
        };
        write_header(&mut header, &request, self.info.sector_size);
        let chain = Chain::new(header, spec::HEADER_BYTES, 1, data);
        let pending = Pending { request, bytes: bytes as u32, submitted_ns: self.host.monotonic_ns() };
        if let Err((chain, pending, error)) = queue.queue.add(chain, pending) {
            let (header, data) = chain.into_parts();
            queue.headers.push(header);
            let reason = match error {
                AddError::Full => None,
                AddError::Segments => Some(BlockError::Invalid),
                AddError::Broken => Some(BlockError::Gone),
            };
            return Err(reject(pending.request, data, reason));
        }
        let (wanted, doorbell) = (queue.queue.publish(), queue.doorbell);
        // The doorbell takes long, and needs no lock.
        drop(guard);
        if wanted {
            doorbell.ring();
        }
        Ok(())
    }

    fn poll(&self) {
        self.poll_queues();
        if !self.polled.load(Ordering::Acquire) {
            return;
        }
        // Bounded by the request timeout, in the end.
        while self.queues.iter().any(|queue| queue.lock().as_ref().is_some_and(|q| q.queue.in_flight() > 0)) {
            self.host.yield_now();
            self.poll_queues();
            self.watch();
        }
    }
}

fn write_header<H: DeviceHost>(slot: &mut DmaSlot<H>, request: &Request, sector_size: u32) {
    let (kind, sector) = match request.op {
        Op::Read => (spec::T_IN, request.sector),
        Op::Write => (spec::T_OUT, request.sector),
        Op::Flush => (spec::T_FLUSH, 0),
    };
    // Checked against the capacity before, so this does not overflow.
    let sector = sector.wrapping_mul(u64::from(sector_size) / spec::SECTOR);
    let mut header = [0; spec::HEADER_BYTES + 1];
    let parts = kind.to_le_bytes().into_iter().chain([0; 4]).chain(sector.to_le_bytes()).chain([NO_STATUS]);
    for (byte, value) in header.iter_mut().zip(parts) {
        *byte = value;
    }
    for (byte, value) in slot.bytes_mut().iter_mut().zip(header) {
        *byte = value;
    }
}

fn reject<H: DeviceHost>(mut request: Request, data: Vec<Mapped<H>>, reason: Option<BlockError>) -> Rejected {
    request.buffers.extend(data.into_iter().map(Mapped::into_inner));
    Rejected { request, reason }
}

impl<H: DeviceHost> Drop for Blk<H> {
    fn drop(&mut self) {
        self.end();
        let transport = self.transport.lock();
        for interrupt in self.attached.drain(..) {
            transport.detach(interrupt);
        }
    }
}
