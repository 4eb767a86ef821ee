//! Pages that follow each other on the disk, on their way to become one request.

use super::{MAX_REQUEST_BUFFERS, PAGE};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::block::{BlockInfo, Complete, Op, Request};

#[derive(Default)]
pub(super) struct Batch {
    first_page: u64,
    next_page: u64,
    bytes: usize,
    buffers: Vec<Box<[u8]>>,
}

impl Batch {
    /// Adds the pages from `page` on. What cannot go into one request with them comes back and is to be submitted.
    pub(super) fn add(&mut self, page: u64, memory: Box<[u8]>, info: &BlockInfo) -> Option<Self> {
        let fits = self.next_page == page
            && self.bytes + memory.len() <= info.max_request_bytes
            && self.buffers.len() < info.max_buffers.min(MAX_REQUEST_BUFFERS);
        let full = if fits { None } else { self.take() };
        if self.buffers.is_empty() {
            self.first_page = page;
        }
        self.next_page = page + memory.len().div_ceil(PAGE) as u64;
        self.bytes += memory.len();
        self.buffers.push(memory);
        full
    }

    /// What was collected, if anything was.
    pub(super) fn take(&mut self) -> Option<Self> {
        if self.buffers.is_empty() { None } else { Some(core::mem::take(self)) }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// The request. Its tag is the number of the first page.
    pub(super) fn into_request(self, op: Op, info: &BlockInfo, done: Arc<dyn Complete>) -> Request {
        let sectors_per_page = (PAGE / info.sector_size as usize) as u64;
        let sector = self.first_page * sectors_per_page;
        Request { op, sector, buffers: self.buffers, done, tag: self.first_page }
    }
}
