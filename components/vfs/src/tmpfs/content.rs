//! What a file holds: pages by number, with holes.

use super::Shared;
use alloc::{boxed::Box, collections::BTreeMap, vec::Vec};
use anykernel::fs::{FsError, Result};
use hypercall::Host;

/// Bytes per page.
pub(super) const PAGE: usize = 4096;

/// What one page takes from the budget: itself and its place in the map.
const PAGE_COST: u64 = PAGE as u64 + 32;

/// The largest file: offsets of files are signed in every system that programs know.
const MAX_SIZE: u64 = i64::MAX as u64;

/// The bytes of a file. Its owner calls [`Content::free`] before it drops it.
#[derive(Default)]
pub(super) struct Content {
    size: u64,
    pages: BTreeMap<u64, Box<[u8]>>,
}

/// Page number and offset within it.
fn split(offset: u64) -> (u64, usize) {
    (offset / PAGE as u64, (offset % PAGE as u64) as usize)
}

fn new_page<H: Host>(shared: &Shared<H>) -> Result<Box<[u8]>> {
    shared.charge(PAGE_COST)?;
    let mut page = Vec::new();
    if page.try_reserve_exact(PAGE).is_err() {
        shared.release(PAGE_COST);
        return Err(FsError::NoMemory);
    }
    page.resize(PAGE, 0);
    Ok(page.into_boxed_slice())
}

impl Content {
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of memory in pages.
    pub(super) fn allocated(&self) -> u64 {
        self.pages.len() as u64 * PAGE as u64
    }

    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> usize {
        let left = self.size.saturating_sub(offset);
        let len = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let Some(buf) = buf.get_mut(..len) else { return 0 };
        let mut rest = &mut *buf;
        let (mut number, mut start) = split(offset);
        while !rest.is_empty() {
            let (piece, after) = rest.split_at_mut(rest.len().min(PAGE - start));
            match self.pages.get(&number).and_then(|page| page.get(start..start + piece.len())) {
                Some(bytes) => piece.copy_from_slice(bytes),
                None => piece.fill(0),
            }
            rest = after;
            start = 0;
            number += 1;
        }
        len
    }

    /// Writes all of `data`, or nothing if memory runs out.
    pub(super) fn write<H: Host>(&mut self, shared: &Shared<H>, offset: u64, data: &[u8]) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let end =
            offset.checked_add(data.len() as u64).filter(|end| *end <= MAX_SIZE).ok_or(FsError::TooLarge)?;
        let (first, mut start) = split(offset);
        let mut added = Vec::new();
        for number in first..=(end - 1) / PAGE as u64 {
            if self.pages.contains_key(&number) {
                continue;
            }
            let page = match added.try_reserve(1) {
                Ok(()) => new_page(shared),
                Err(_) => Err(FsError::NoMemory),
            };
            match page {
                Ok(page) => added.push((number, page)),
                Err(error) => {
                    shared.release(added.len() as u64 * PAGE_COST);
                    return Err(error);
                }
            }
        }
        self.pages.extend(added);
        let mut rest = data;
        let mut number = first;
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rest.len().min(PAGE - start));
            if let Some(bytes) =
                self.pages.get_mut(&number).and_then(|page| page.get_mut(start..start + piece.len()))
            {
                bytes.copy_from_slice(piece);
            }
            rest = after;
            start = 0;
            number += 1;
        }
        self.size = self.size.max(end);
        Ok(())
    }

    pub(super) fn truncate<H: Host>(&mut self, shared: &Shared<H>, size: u64) -> Result<()> {
        if size > MAX_SIZE {
            return Err(FsError::TooLarge);
        }
        if size < self.size {
            let (last, start) = split(size);
            let cut = self.pages.split_off(&size.div_ceil(PAGE as u64));
            shared.release(cut.len() as u64 * PAGE_COST);
            // What is beyond the end must read as zeros when the file grows again.
            if let Some(bytes) = self.pages.get_mut(&last).and_then(|page| page.get_mut(start..)) {
                bytes.fill(0);
            }
        }
        self.size = size;
        Ok(())
    }

    /// Gives all pages back to the budget.
    pub(super) fn free<H: Host>(&mut self, shared: &Shared<H>) {
        shared.release(self.pages.len() as u64 * PAGE_COST);
        self.pages.clear();
        self.size = 0;
    }
}
