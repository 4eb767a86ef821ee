//! A block device in memory, for the tests of this crate.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use anykernel::block::{BlockDevice, BlockError, BlockInfo, Op, Rejected, Request};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A disk in memory. Requests are done in `poll`. What was written is durable after a flush only: see
/// [`MemoryDisk::durable`].
pub(crate) struct MemoryDisk {
    info: BlockInfo,
    state: Mutex<State>,
    pub(crate) fail_reads: AtomicBool,
    pub(crate) fail_writes: AtomicBool,
    pub(crate) fail_flushes: AtomicBool,
    pub(crate) reads: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) flushes: AtomicU64,
}

struct State {
    content: Vec<u8>,
    durable: Vec<u8>,
    /// Where the two differ.
    unflushed: Vec<core::ops::Range<usize>>,
    queue: VecDeque<Request>,
}

impl MemoryDisk {
    /// A disk with this content, in sectors of 512 bytes.
    pub(crate) fn new(content: Vec<u8>) -> Arc<Self> {
        Self::with_info(content, |_| {})
    }

    /// As `new`, with changes to its description.
    pub(crate) fn with_info(mut content: Vec<u8>, change: impl FnOnce(&mut BlockInfo)) -> Arc<Self> {
        let mut info = BlockInfo {
            name: String::from("disk0"),
            sector_size: 512,
            sectors: 0,
            read_only: false,
            max_request_bytes: 256 << 10,
            max_buffers: usize::MAX,
            queue_depth: 16,
            needs_flush: true,
        };
        change(&mut info);
        content.resize(content.len().next_multiple_of(info.sector_size as usize), 0);
        if info.sectors == 0 {
            info.sectors = content.len() as u64 / u64::from(info.sector_size);
        }
        let state =
            State { durable: content.clone(), content, unflushed: Vec::new(), queue: VecDeque::new() };
        Arc::new(Self {
            info,
            state: Mutex::new(state),
            fail_reads: AtomicBool::new(false),
            fail_writes: AtomicBool::new(false),
            fail_flushes: AtomicBool::new(false),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
        })
    }

    /// A disk of `bytes` zeros.
    pub(crate) fn zeroed(bytes: usize) -> Arc<Self> {
        Self::new(vec![0; bytes])
    }

    /// What is on the disk, flushed or not.
    pub(crate) fn content(&self) -> Vec<u8> {
        self.state.lock().unwrap().content.clone()
    }

    /// What a power failure would leave: what was written before the last flush.
    pub(crate) fn durable(&self) -> Vec<u8> {
        self.state.lock().unwrap().durable.clone()
    }

    fn perform(&self, state: &mut State, request: &mut Request) -> Result<(), BlockError> {
        let mut at = request.sector as usize * self.info.sector_size as usize;
        let end = at + request.bytes();
        assert!(end <= state.content.len(), "the cache asks outside the device");
        assert_eq!(request.bytes() % self.info.sector_size as usize, 0);
        match request.op {
            Op::Read => {
                self.reads.fetch_add(1, Ordering::Relaxed);
                if self.fail_reads.load(Ordering::Relaxed) {
                    return Err(BlockError::Io);
                }
                for buffer in &mut request.buffers {
                    buffer.copy_from_slice(&state.content[at..at + buffer.len()]);
                    at += buffer.len();
                }
            }
            Op::Write => {
                self.writes.fetch_add(1, Ordering::Relaxed);
                if self.fail_writes.load(Ordering::Relaxed) {
                    return Err(BlockError::Io);
                }
                for buffer in &request.buffers {
                    state.content[at..at + buffer.len()].copy_from_slice(buffer);
                    state.unflushed.push(at..at + buffer.len());
                    at += buffer.len();
                }
            }
            Op::Flush => {
                self.flushes.fetch_add(1, Ordering::Relaxed);
                if self.fail_flushes.load(Ordering::Relaxed) {
                    return Err(BlockError::Io);
                }
                for range in core::mem::take(&mut state.unflushed) {
                    state.durable[range.clone()].copy_from_slice(&state.content[range]);
                }
            }
        }
        Ok(())
    }
}

impl BlockDevice for MemoryDisk {
    fn info(&self) -> &BlockInfo {
        &self.info
    }

    fn submit(&self, request: Request) -> Result<(), Rejected> {
        let mut state = self.state.lock().unwrap();
        if request.bytes() > self.info.max_request_bytes {
            return Err(Rejected { request, reason: Some(BlockError::Invalid) });
        }
        if state.queue.len() == self.info.queue_depth {
            return Err(Rejected { request, reason: None });
        }
        state.queue.push_back(request);
        Ok(())
    }

    fn poll(&self) {
        loop {
            let mut state = self.state.lock().unwrap();
            let Some(mut request) = state.queue.pop_front() else { return };
            let result = self.perform(&mut state, &mut request);
            drop(state);
            if result.is_err() && request.op == Op::Read {
                // Nobody may use what a failed read left.
                request.buffers.iter_mut().for_each(|buffer: &mut Box<[u8]>| buffer.fill(0xee));
            }
            let done = request.done.clone();
            done.complete(request, result);
        }
    }
}
