//! A disk over an image that never changes: what differs is kept beside it.

use crate::watch;
use anykernel::block::{BlockDevice, BlockError, BlockInfo, Op, Rejected, Request};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const SECTOR: usize = 512;

/// Sectors that differ from the image.
pub type Changes = BTreeMap<usize, [u8; SECTOR]>;

struct State {
    changes: Changes,
    queue: VecDeque<Request>,
}

/// The disk. Requests are done when they are polled for.
pub struct Overlay {
    base: &'static [u8],
    info: BlockInfo,
    state: Mutex<State>,
}

/// Changes `bytes` at `at` of an image with changes.
pub fn patch(base: &[u8], changes: &mut Changes, mut at: usize, mut bytes: &[u8]) {
    while !bytes.is_empty() && at < base.len() {
        let (sector, skip) = (at / SECTOR, at % SECTOR);
        let content = changes.entry(sector).or_insert_with(|| original(base, sector));
        let n = bytes.len().min(SECTOR - skip);
        content[skip..skip + n].copy_from_slice(&bytes[..n]);
        (at, bytes) = (at + n, &bytes[n..]);
    }
}

/// Reads an image with changes.
pub fn peek(base: &[u8], changes: &Changes, at: usize, out: &mut [u8]) {
    let same = base.get(at..).unwrap_or_default();
    let (inside, outside) = out.split_at_mut(out.len().min(same.len()));
    inside.copy_from_slice(&same[..inside.len()]);
    outside.fill(0);
    let end = at + out.len();
    for (sector, content) in changes.range(at / SECTOR..end.div_ceil(SECTOR)) {
        let start = sector * SECTOR;
        let (from, to) = (start.max(at), (start + SECTOR).min(end));
        out[from - at..to - at].copy_from_slice(&content[from - start..to - start]);
    }
}

fn original(base: &[u8], sector: usize) -> [u8; SECTOR] {
    let mut content = [0; SECTOR];
    let from = base.get(sector * SECTOR..).unwrap_or_default();
    let n = from.len().min(SECTOR);
    content[..n].copy_from_slice(&from[..n]);
    content
}

impl Overlay {
    /// A disk that begins as `base` with `changes`.
    pub fn new(base: &'static [u8], changes: Changes, read_only: bool) -> Arc<Self> {
        let info = BlockInfo {
            name: "disk0".into(),
            sector_size: SECTOR as u32,
            sectors: (base.len() / SECTOR) as u64,
            read_only,
            max_request_bytes: 64 << 10,
            max_buffers: usize::MAX,
            queue_depth: 16,
            needs_flush: true,
        };
        let state = State { changes, queue: VecDeque::new() };
        Arc::new(Self { base, info, state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it as it is now.
    pub fn content(&self) -> Vec<u8> {
        let mut content = self.base.to_vec();
        for (sector, bytes) in &self.lock().changes {
            content[sector * SECTOR..][..SECTOR].copy_from_slice(bytes);
        }
        content
    }

    fn perform(&self, changes: &mut Changes, request: &mut Request) -> Result<(), BlockError> {
        let mut at = request.sector as usize * SECTOR;
        assert!(at + request.bytes() <= self.base.len(), "a request outside the device");
        assert_eq!(request.bytes() % SECTOR, 0, "a request of part of a sector");
        for buffer in &mut request.buffers {
            match request.op {
                Op::Read => peek(self.base, changes, at, buffer),
                Op::Write if self.info.read_only => panic!("a write to a read-only device"),
                Op::Write => {
                    for (index, part) in buffer.chunks_exact(SECTOR).enumerate() {
                        changes.insert(at / SECTOR + index, part.try_into().expect("a sector"));
                    }
                }
                Op::Flush => {}
            }
            at += buffer.len();
        }
        Ok(())
    }
}

impl BlockDevice for Overlay {
    fn info(&self) -> &BlockInfo {
        &self.info
    }

    fn submit(&self, request: Request) -> Result<(), Rejected> {
        watch::step();
        let mut state = self.lock();
        if state.queue.len() == self.info.queue_depth {
            return Err(Rejected { request, reason: None });
        }
        state.queue.push_back(request);
        Ok(())
    }

    fn poll(&self) {
        loop {
            let mut state = self.lock();
            let Some(mut request) = state.queue.pop_front() else { return };
            let result = self.perform(&mut state.changes, &mut request);
            drop(state);
            request.done.clone().complete(request, result);
        }
    }
}
