//! The block device: a queue that the storage task empties.

use crate::engine::{Awaited, Engine};
use crate::stack::Owner;
use alloc::collections::VecDeque;
use alloc::sync::{Arc, Weak};
use anykernel::block::{BlockDevice, BlockError, BlockInfo, Op, Rejected, Request};
use anykernel::sync::Mutex;
use core::task::Waker;
use hypercall::Host;

const QUEUE_DEPTH: usize = 64;

struct Queue {
    requests: VecDeque<Request>,
    /// One is with the task.
    busy: bool,
    gone: bool,
    task: Option<Waker>,
}

/// One medium.
pub(super) struct Disk<H: Host> {
    engine: Arc<Engine<H>>,
    pub(super) info: BlockInfo,
    max_buffers: usize,
    queue: Mutex<H, Queue>,
}

/// What the registry holds: keeps the stack alive as long as somebody uses the disk.
pub(super) struct Registered<H: Host> {
    pub(super) disk: Arc<Disk<H>>,
    pub(super) _owner: Arc<Owner<H>>,
}

impl<H: Host> Disk<H> {
    pub(super) fn new(engine: Arc<Engine<H>>, mut info: BlockInfo, max_buffers: usize) -> Arc<Self> {
        info.queue_depth = QUEUE_DEPTH;
        let queue = Queue { requests: VecDeque::new(), busy: false, gone: false, task: None };
        let queue = Mutex::new(engine.host, queue);
        let disk = Arc::new(Self { engine, info, max_buffers, queue });
        let awaited: Weak<Self> = Arc::downgrade(&disk);
        disk.engine.add_awaited(awaited);
        disk
    }

    /// The next request, which is in work then; otherwise `waker` is told when there is one.
    pub(super) fn next(&self, waker: &Waker) -> Option<Request> {
        let mut queue = self.queue.lock();
        let request = queue.requests.pop_front();
        queue.busy = request.is_some();
        if request.is_none() {
            queue.task = Some(waker.clone());
        }
        request
    }

    /// The request in work is over.
    pub(super) fn over(&self, request: Request, result: Result<(), BlockError>) {
        self.queue.lock().busy = false;
        request.done.clone().complete(request, result);
    }

    /// Nothing works any more.
    pub(super) fn set_gone(&self) {
        let mut queue = self.queue.lock();
        queue.gone = true;
        let left = core::mem::take(&mut queue.requests);
        drop(queue);
        for request in left {
            request.done.clone().complete(request, Err(BlockError::Gone));
        }
    }

    fn check(&self, request: &Request) -> Result<(), BlockError> {
        if request.op == Op::Flush {
            return if request.buffers.is_empty() { Ok(()) } else { Err(BlockError::Invalid) };
        }
        if request.op == Op::Write && self.info.read_only {
            return Err(BlockError::ReadOnly);
        }
        let sector_size = self.info.sector_size as usize;
        let whole =
            request.buffers.iter().all(|one| !one.is_empty() && one.len().is_multiple_of(sector_size));
        let bytes = request.bytes();
        let end = request.sector.checked_add((bytes / sector_size) as u64);
        let sound = whole
            && bytes > 0
            && bytes <= self.info.max_request_bytes
            && request.buffers.len() <= self.max_buffers
            && end.is_some_and(|end| end <= self.info.sectors);
        if sound { Ok(()) } else { Err(BlockError::Invalid) }
    }

    fn add(&self, request: Request) -> Result<(), Rejected> {
        let mut queue = self.queue.lock();
        let reason = if queue.gone { Err(BlockError::Gone) } else { self.check(&request) };
        if let Err(reason) = reason {
            return Err(Rejected { request, reason: Some(reason) });
        }
        if queue.requests.len() >= QUEUE_DEPTH {
            return Err(Rejected { request, reason: None });
        }
        queue.requests.push_back(request);
        let task = queue.task.take();
        drop(queue);
        task.into_iter().for_each(Waker::wake);
        Ok(())
    }
}

impl<H: Host> Awaited for Disk<H> {
    fn idle(&self) -> bool {
        let queue = self.queue.lock();
        !queue.busy && queue.requests.is_empty()
    }
}

impl<H: Host> Drop for Disk<H> {
    fn drop(&mut self) {
        self.set_gone();
    }
}

impl<H: Host> BlockDevice for Registered<H> {
    fn info(&self) -> &BlockInfo {
        &self.disk.info
    }

    fn submit(&self, request: Request) -> Result<(), Rejected> {
        self.disk.add(request)?;
        self.disk.engine.kick();
        Ok(())
    }

    fn submit_and_poll(&self, request: Request) -> Result<(), Rejected> {
        self.disk.add(request)?;
        self.poll();
        Ok(())
    }

    fn poll(&self) {
        let engine = &self.disk.engine;
        engine.poll();
        // Every transfer has a time-out, so this ends.
        while engine.polled() && !self.disk.idle() {
            engine.host.yield_now();
            engine.poll();
        }
    }
}
