//! Setting a disk up (VirtIO 1.2, 5.2.5): features, limits, queues, interrupts.

use super::{Blk, BlkQueue};
use crate::dma::DmaSlot;
use crate::error::{Error, Result};
use crate::queue::{Queue, QueueOptions};
use crate::spec::{blk as spec, feature};
use crate::transport::{Acknowledger, Attached, Place, Transport};
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::block::BlockInfo;
use anykernel::counter::Counter;
use anykernel::sync::Mutex;
use core::sync::atomic::AtomicBool;
use hypercall::{CpuId, DeviceHost, Signal, Width};

/// What a driver may count on without `VIRTIO_BLK_F_SEG_MAX` is one segment.
const DEFAULT_SEGMENTS: u32 = 1;
/// Requests are planned in pieces of a page of the block cache.
const PAGE: usize = 4096;
const MAX_REQUEST_BYTES: usize = 1 << 20;

/// Ring size and segments of a request, by the memory of the domain.
fn budget(memory_bytes: u64) -> (u16, u16) {
    match memory_bytes >> 20 {
        0..24 => (16, 32),
        24..96 => (64, 64),
        _ => (128, 128),
    }
}

/// A device that is set up, all but the last step.
pub(super) struct Parts<H: DeviceHost> {
    host: H,
    place: Place,
    info: BlockInfo,
    max_segments: usize,
    max_segment: usize,
    queues: Vec<BlkQueue<H>>,
    signals: Vec<Arc<Signal>>,
    attached: Vec<Attached>,
    acknowledger: Option<Acknowledger<H>>,
    errors: Counter,
    timeouts: Counter,
}

impl<H: DeviceHost> Parts<H> {
    pub(super) fn finish(self, mut transport: Transport<H>) -> Result<Blk<H>> {
        let started = transport.driver_ok();
        let host = self.host;
        let polled = self.attached.len() < self.queues.len();
        let device = Blk {
            host,
            place: self.place,
            info: self.info,
            max_segments: self.max_segments,
            max_segment: self.max_segment,
            legacy: transport.is_legacy(),
            queues: self.queues.into_iter().map(|queue| Mutex::new(host, Some(queue))).collect(),
            transport: Mutex::new(host, transport),
            signals: self.signals,
            attached: self.attached,
            acknowledger: self.acknowledger,
            instant: Mutex::new(host, Vec::new()),
            gone: AtomicBool::new(false),
            polled: AtomicBool::new(polled),
            errors: self.errors,
            timeouts: self.timeouts,
        };
        // On failure the drop of `device` undoes the rest.
        started.map(|()| device)
    }
}

impl<H: DeviceHost> Blk<H> {
    /// Asks the device what it is and makes its queues. On an error nothing of it is left.
    pub(super) fn set_up(
        kernel: &Arc<Kernel<H>>,
        place: Place,
        transport: &mut Transport<H>,
    ) -> Result<Parts<H>> {
        let host = kernel.host().of_component("virtblk");
        let features = transport.negotiate(|_| {
            spec::F_SIZE_MAX | spec::F_SEG_MAX | spec::F_RO | spec::F_BLK_SIZE | spec::F_FLUSH | spec::F_MQ
        })?;
        let has = |bit: u64| features & bit != 0;
        let config32 = |offset| transport.config(offset, Width::U32).map(|v| v as u32);

        let sector_size = if has(spec::F_BLK_SIZE) { config32(spec::CONFIG_BLK_SIZE)? } else { 512 };
        if !sector_size.is_power_of_two() || !(512..=4096).contains(&sector_size) {
            return Err(Error::Unsupported("its block size is not 512, 1024, 2048 or 4096 bytes"));
        }
        let capacity = transport.config_u64(spec::CONFIG_CAPACITY)?;
        if capacity.checked_mul(spec::SECTOR).is_none() {
            return Err(Error::BadDevice("its capacity does not fit 64 bits"));
        }
        let max_segment = if has(spec::F_SIZE_MAX) { config32(spec::CONFIG_SIZE_MAX)? } else { u32::MAX };
        let segments = if has(spec::F_SEG_MAX) { config32(spec::CONFIG_SEG_MAX)? } else { DEFAULT_SEGMENTS };
        let offered_queues =
            if has(spec::F_MQ) { transport.config(spec::CONFIG_NUM_QUEUES, Width::U16)? as u16 } else { 1 };

        let (most_entries, most_segments) = budget(host.memory_bytes());
        let wanted = u32::from(offered_queues).min(host.cpu_count()).max(1) as u16;
        let vectors = transport.choose_interrupts(wanted);
        let queue_count = if vectors == 0 { 1 } else { wanted.min(vectors) };

        let mut segments = segments.clamp(1, u32::from(most_segments)) as usize;
        let indirect = has(feature::INDIRECT_DESC);
        let mut queues = Vec::new();
        let mut make = || {
            for index in 0..queue_count {
                let offered = transport.queue_max(index);
                if offered < 4 {
                    return Err(Error::BadDevice("its request queue is missing or too small"));
                }
                let size = 1 << offered.min(most_entries).ilog2();
                if !indirect {
                    segments = segments.min(usize::from(size) - 2);
                }
                let options = QueueOptions {
                    size,
                    event_idx: has(feature::EVENT_IDX),
                    indirect: if indirect { segments as u16 + 2 } else { 0 },
                    max_segment,
                };
                let queue = Queue::new(host, options)?;
                let depth = usize::from(size) / if indirect { 1 } else { 3 };
                let headers = DmaSlot::pool(host, spec::HEADER_BYTES + 1, depth)
                    .map_err(|error| Error::Host("allocating request headers", error))?;
                let doorbell = transport.enable_queue(index, &queue, index)?;
                queues.push(BlkQueue { queue, doorbell, headers });
            }
            request_limit(segments, max_segment as usize, sector_size as usize)
        };
        let made = make();
        let max_request_bytes = match made {
            Ok(bytes) => bytes,
            Err(error) => {
                // The device knows those that were made. Without a reset their memory stays lent.
                if let Some(proof) = transport.reset() {
                    queues.into_iter().for_each(|BlkQueue { queue, .. }| queue.dismantle(&proof, |_, _| ()));
                }
                return Err(error);
            }
        };

        let mut signals = Vec::new();
        let mut attached = Vec::new();
        for vector in 0..queue_count {
            let signal = Arc::new(Signal::new());
            // There are no more queues than CPUs.
            match transport.attach(vector, CpuId(u32::from(vector)), signal.clone()) {
                Ok(interrupt) => attached.push(interrupt),
                // A line that is somebody else's, for example. Those who wait then look at the device themselves.
                Err(error) => log::warn!("{place}: attaching an interrupt: {error}; polling instead"),
            }
            signals.push(signal);
        }
        let acknowledger =
            attached.first().map(|interrupt| transport.acknowledger(*interrupt)).filter(Acknowledger::needed);

        let name = alloc::format!("disk{}", kernel.block_devices().len());
        let queue_depth = queues.iter().map(|queue| queue.headers.len()).sum();
        let counter = |what: &str| kernel.counter(&alloc::format!("{name}.{what}"));
        let (errors, timeouts) = (counter("errors"), counter("timeouts"));
        Ok(Parts {
            host,
            place,
            info: BlockInfo {
                name,
                sector_size,
                sectors: capacity / (u64::from(sector_size) / spec::SECTOR),
                read_only: has(spec::F_RO),
                max_request_bytes,
                max_buffers: segments,
                queue_depth,
                needs_flush: has(spec::F_FLUSH),
            },
            max_segments: segments,
            max_segment: max_segment as usize,
            queues,
            signals,
            attached,
            acknowledger,
            errors,
            timeouts,
        })
    }
}

/// Most bytes of a request, so that any scatter list of at most so many buffers of whole pages fits.
fn request_limit(segments: usize, max_segment: usize, sector_size: usize) -> Result<usize> {
    if max_segment < 512 {
        return Err(Error::BadDevice("it takes no segments as large as a sector"));
    }
    if max_segment >= MAX_REQUEST_BYTES {
        // One buffer is one segment, so only their number is limited.
        return Ok(MAX_REQUEST_BYTES);
    }
    let pages = segments / PAGE.div_ceil(max_segment);
    let bytes = if pages > 0 { pages * PAGE } else { segments.saturating_mul(max_segment) };
    let bytes = bytes.min(MAX_REQUEST_BYTES);
    if bytes < sector_size {
        return Err(Error::BadDevice("it takes no requests as large as a sector"));
    }
    Ok(bytes - bytes % sector_size)
}
