//! Driver for disks that the host itself opens ([`hypercall::HostBlock`]): a blocking contract made asynchronous.
//!
//! Each disk has a queue and a few threads that work on it. Whoever waits for the disk works on the queue too
//! ([`BlockDevice::poll`]), so that a single read costs no switch of threads.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use anykernel::block::{BlockDevice, BlockError, BlockInfo, Op, Rejected, Request};
use anykernel::manifest::Capability;
use anykernel::sync::Mutex;
use anykernel::{Kernel, Manifest, StartError};
use hypercall::{ContractVersion, Host, HostBlock, Signal};

/// What the driver uses.
pub const MANIFEST: Manifest = Manifest {
    name: "hostblk",
    summary: "block devices on files and devices that the host opens",
    core: &[Capability::Threads],
    contracts: &[ContractVersion::CORE, ContractVersion::BLOCK],
};

/// Threads per disk: what a reader that waits leaves to be done ahead of it.
const THREADS: u32 = 2;
const QUEUE_DEPTH: usize = 64;
const MAX_REQUEST_BYTES: usize = 512 << 10;

struct HostDisk<H: Host> {
    host: H,
    disk: u32,
    info: BlockInfo,
    queue: Mutex<H, Queue>,
    /// One for each thread.
    signals: Vec<Arc<Signal>>,
}

struct Queue {
    requests: VecDeque<Request>,
    /// Threads that sleep.
    idle: Vec<usize>,
    /// Threads that serve the queue. When there are none left, pollers do all of it.
    threads: usize,
}

/// Registers each disk of the host as block device `diskN`, N as the host numbers them.
///
/// Errors: [`StartError::Refused`]; [`StartError::Other`] for a disk whose description makes no sense;
/// [`StartError::Host`] if it cannot be asked for or a thread cannot be started. Context: thread, before the
/// kernel's file systems start.
pub fn register<H: Host + HostBlock>(kernel: &Arc<Kernel<H>>) -> Result<(), StartError> {
    kernel.admit(MANIFEST)?;
    let host = kernel.host().of_component("hostblk");
    for disk in 0..host.disk_count() {
        let name = format!("disk{disk}");
        let info = host
            .disk_info(disk)
            .map_err(|error| StartError::Host { what: format!("opening {name}"), error })?;
        if !info.sector_size.is_power_of_two() || !(512..=4096).contains(&info.sector_size) {
            let line = format!(
                "{name}: sectors of {} bytes: the host must offer 512, 1024, 2048 or 4096",
                info.sector_size
            );
            return Err(StartError::Other(line));
        }
        let device = Arc::new(HostDisk {
            host,
            disk,
            info: BlockInfo {
                name,
                sector_size: info.sector_size,
                sectors: info.sectors,
                read_only: info.read_only,
                max_request_bytes: MAX_REQUEST_BYTES,
                max_buffers: usize::MAX,
                queue_depth: QUEUE_DEPTH,
                needs_flush: !info.read_only,
            },
            queue: Mutex::new(host, Queue { requests: VecDeque::new(), idle: Vec::new(), threads: 0 }),
            signals: (0..THREADS).map(|_| Arc::new(Signal::new())).collect(),
        });
        device.start(kernel)?;
        kernel.add_block_device(device);
    }
    Ok(())
}

impl<H: Host + HostBlock> HostDisk<H> {
    fn start(self: &Arc<Self>, kernel: &Arc<Kernel<H>>) -> Result<(), StartError> {
        for (index, signal) in self.signals.iter().enumerate() {
            kernel.raise_on_stop(signal.clone());
            let (device, signal, instance) = (self.clone(), signal.clone(), Arc::downgrade(kernel));
            self.queue.lock().threads += 1;
            let started = kernel.spawn(&format!("{}-io", self.info.name), None, move || {
                device.serve(index, &signal, &instance);
            });
            if let Err(error) = started {
                self.queue.lock().threads -= 1;
                return Err(error);
            }
        }
        Ok(())
    }

    /// What each thread does until the kernel stops and the queue is empty.
    fn serve(&self, index: usize, signal: &Signal, instance: &Weak<Kernel<H>>) {
        loop {
            let seen = signal.count();
            let stopping = instance.upgrade().is_none_or(|kernel| kernel.stopping());
            let mut queue = self.queue.lock();
            if let Some(request) = queue.requests.pop_front() {
                drop(queue);
                self.perform(request);
                continue;
            }
            if stopping {
                queue.threads -= 1;
                return;
            }
            queue.idle.push(index);
            drop(queue);
            signal.wait(&self.host, seen, None);
            self.queue.lock().idle.retain(|idle| *idle != index);
        }
    }

    fn perform(&self, mut request: Request) {
        let result = self.transfer(&mut request).map_err(|error| match error {
            hypercall::Error::Invalid => BlockError::Invalid,
            hypercall::Error::Denied => BlockError::ReadOnly,
            hypercall::Error::Gone | hypercall::Error::NotFound => BlockError::Gone,
            hypercall::Error::NoMemory => BlockError::NoMemory,
            _ => BlockError::Io,
        });
        let done = request.done.clone();
        done.complete(request, result);
    }

    fn transfer(&self, request: &mut Request) -> hypercall::Result<()> {
        let mut sector = request.sector;
        let sector_size = self.info.sector_size as usize;
        if request.op == Op::Flush {
            return self.host.disk_flush(self.disk);
        }
        for buffer in &mut request.buffers {
            match request.op {
                Op::Read => self.host.disk_read(self.disk, sector, buffer)?,
                _ => self.host.disk_write(self.disk, sector, buffer)?,
            }
            sector += (buffer.len() / sector_size) as u64;
        }
        Ok(())
    }

    fn acceptable(&self, request: &Request) -> Result<(), BlockError> {
        let sector_size = self.info.sector_size as usize;
        let whole = request.buffers.iter().all(|buffer| buffer.len().is_multiple_of(sector_size));
        let sectors = (request.bytes() / sector_size) as u64;
        let inside = request.sector.checked_add(sectors).is_some_and(|end| end <= self.info.sectors);
        if !whole || !inside || request.bytes() > MAX_REQUEST_BYTES {
            return Err(BlockError::Invalid);
        }
        if request.op == Op::Write && self.info.read_only {
            return Err(BlockError::ReadOnly);
        }
        Ok(())
    }
}

impl<H: Host + HostBlock> BlockDevice for HostDisk<H> {
    fn info(&self) -> &BlockInfo {
        &self.info
    }

    fn submit(&self, request: Request) -> Result<(), Rejected> {
        if let Err(reason) = self.acceptable(&request) {
            return Err(Rejected { request, reason: Some(reason) });
        }
        let mut queue = self.queue.lock();
        if queue.requests.len() >= QUEUE_DEPTH {
            return Err(Rejected { request, reason: None });
        }
        if queue.requests.try_reserve(1).is_err() {
            return Err(Rejected { request, reason: Some(BlockError::NoMemory) });
        }
        queue.requests.push_back(request);
        let wake = queue.idle.pop().and_then(|index| self.signals.get(index));
        drop(queue);
        if let Some(signal) = wake {
            signal.raise(&self.host);
        }
        Ok(())
    }

    fn submit_and_poll(&self, request: Request) -> Result<(), Rejected> {
        if let Err(reason) = self.acceptable(&request) {
            return Err(Rejected { request, reason: Some(reason) });
        }
        // No thread is woken, and none can be faster.
        self.perform(request);
        Ok(())
    }

    /// Does one queued request on the calling thread, all of them when no other thread would.
    fn poll(&self) {
        loop {
            let mut queue = self.queue.lock();
            let Some(request) = queue.requests.pop_front() else { return };
            let alone = queue.threads == 0;
            drop(queue);
            self.perform(request);
            if !alone {
                return;
            }
        }
    }
}
