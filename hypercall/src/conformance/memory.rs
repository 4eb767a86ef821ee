//! [`crate::Memory`].
#![expect(unsafe_code, reason = "looks at pages, and gives them back")]

use super::support::{Stop, ensure, helper};
use crate::{Error, Host, PAGE_SIZE, Pages};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

/// Pages that are given back when dropped.
struct Owned<H: Host>(H, Option<Pages>);

impl<H: Host> Owned<H> {
    fn new(host: H, count: usize) -> Result<Self, Stop> {
        match host.alloc_pages(count) {
            Ok(pages) => {
                let same = pages.count == count;
                let owned = Self(host, Some(pages));
                ensure!(same, "alloc_pages({count}) returned another number of pages");
                Ok(owned)
            }
            Err(error) => Err(Stop::Fail(alloc::format!("alloc_pages({count}) failed: {error}"))),
        }
    }

    fn base(&self) -> usize {
        self.1.as_ref().map_or(0, |pages| pages.base.as_ptr().addr())
    }

    /// The content. As atomics, because on a wrong host it may be shared.
    fn words(&self) -> &[AtomicU64] {
        match &self.1 {
            // SAFETY: by the contract the pages are valid for reads and writes of their length until they are freed,
            // which takes `self`. Misaligned ones, which a wrong host may give, are not looked at.
            Some(pages) if pages.base.as_ptr().addr().is_multiple_of(align_of::<AtomicU64>()) => unsafe {
                core::slice::from_raw_parts(pages.base.as_ptr().cast(), pages.count * PAGE_SIZE / 8)
            },
            _ => &[],
        }
    }

    fn fill(&self, value: u64) {
        self.words().iter().for_each(|word| word.store(value, Relaxed));
    }

    /// The first word that is not `value`.
    fn other_than(&self, value: u64) -> Option<usize> {
        self.words().iter().position(|word| word.load(Relaxed) != value)
    }
}

impl<H: Host> Drop for Owned<H> {
    fn drop(&mut self) {
        if let Some(pages) = self.1.take() {
            // SAFETY: they came from this host, and the borrows of `words` are over.
            unsafe { self.0.free_pages(pages) }
        }
    }
}

pub(super) fn refuses_zero<H: Host>(host: H) -> Result<(), Stop> {
    let result = host.alloc_pages(0).map(|pages| pages.count);
    ensure!(result == Err(Error::Invalid), "alloc_pages(0) returned {result:?} instead of Invalid");
    Ok(())
}

pub(super) fn refuses_too_much<H: Host>(host: H) -> Result<(), Stop> {
    // Byte counts that overflow, and that no machine has.
    for count in [usize::MAX, usize::MAX / PAGE_SIZE, usize::MAX / PAGE_SIZE + 1, 1 << 48] {
        // Out of the optimiser's sight, which may otherwise spare itself the allocation and say that it went well.
        let result =
            host.alloc_pages(count).map(|pages| core::hint::black_box(Owned(host, Some(pages)).base()));
        let refused = matches!(result, Err(Error::NoMemory | Error::Invalid));
        ensure!(refused, "alloc_pages({count}) returned {result:x?} instead of NoMemory or Invalid");
    }
    Ok(())
}

pub(super) fn aligned<H: Host>(host: H) -> Result<(), Stop> {
    for count in [1, 2, 3, 16] {
        let pages = Owned::new(host, count)?;
        let base = pages.base();
        ensure!(
            base.is_multiple_of(PAGE_SIZE),
            "{count} pages at {base:#x}: not aligned to {PAGE_SIZE} bytes"
        );
    }
    Ok(())
}

pub(super) fn zeroed<H: Host>(host: H) -> Result<(), Stop> {
    for round in 0..8 {
        // Two at a time, so that what was freed dirty comes back in another place.
        let both = [Owned::new(host, 1)?, Owned::new(host, 4)?];
        for pages in &both {
            let dirty = pages.other_than(0);
            ensure!(dirty.is_none(), "in round {round}: not zeroed at word {}", dirty.unwrap_or(0));
            pages.fill(0xa5a5_a5a5_a5a5_a5a5);
        }
    }
    Ok(())
}

pub(super) fn exclusive<H: Host>(host: H) -> Result<(), Stop> {
    let mut all = Vec::new();
    for index in 0..16u64 {
        let pages = Owned::new(host, 1 + index as usize % 3)?;
        pages.fill(index + 1);
        all.push(pages);
    }
    for (mark, pages) in (1..).zip(&all) {
        ensure!(pages.other_than(mark).is_none(), "what was written to one allocation shows in another");
    }
    Ok(())
}

pub(super) fn size<H: Host>(host: H) -> Result<(), Stop> {
    let bytes = host.memory_bytes();
    ensure!(bytes >= 1 << 20, "memory_bytes is {bytes}, less than any domain runs in");
    ensure!(host.memory_bytes() == bytes, "memory_bytes changes");
    Ok(())
}

pub(super) fn from_threads<H: Host>(host: H) -> Result<(), Stop> {
    let bad = Arc::new(AtomicU32::new(0));
    let churn = |mark: u64| {
        let bad = bad.clone();
        move || {
            for round in 0..100 {
                let Ok(pages) = Owned::new(host, 1 + round % 4) else {
                    bad.fetch_or(1, Release);
                    return;
                };
                if pages.other_than(0).is_some() {
                    bad.fetch_or(2, Release);
                }
                pages.fill(mark);
                host.yield_now();
                if pages.other_than(mark).is_some() {
                    bad.fetch_or(4, Release);
                }
            }
        }
    };
    let both = [helper(host, None, churn(1))?, helper(host, None, churn(2))?];
    for thread in both {
        thread.finish()?;
    }
    let bad = bad.load(Acquire);
    ensure!(bad & 1 == 0, "alloc_pages failed on one of two threads at once");
    ensure!(bad & 2 == 0, "two threads at once: pages were not zeroed");
    ensure!(bad & 4 == 0, "two threads at once: pages were shared");
    Ok(())
}
