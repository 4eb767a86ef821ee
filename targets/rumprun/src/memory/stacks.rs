//! Stacks, each above a guard page that is never mapped. A stack that is no longer used waits for its next user: its
//! mapping is never undone, so no CPU has to be interrupted for it.

use super::{frames, paging};
use crate::sync::SpinLock;
use core::sync::atomic::{AtomicU64, Ordering};
use hypercall::{PAGE_SIZE, Result};

const BASE: u64 = 0xffff_c000_0000_0000;
/// Address space per stack: the stack at the top of it, nothing below.
const SLOT: u64 = 128 << 10;

/// Stack of a thread, in pages.
pub(crate) const THREAD_PAGES: usize = 16;
/// Stack for reporting a fault, in pages: formatting and a backtrace fit.
pub(crate) const FAULT_PAGES: usize = 4;
/// Stack of an idle thread, in pages: interrupts run on it.
pub(crate) const IDLE_PAGES: usize = 4;

/// A stack.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stack {
    slot: u64,
    pages: usize,
}

impl Stack {
    /// One past its highest byte; aligned to 16.
    pub(crate) fn top(&self) -> usize {
        (BASE + (self.slot + 1) * SLOT) as usize
    }

    /// Its lowest byte.
    pub(crate) fn bottom(&self) -> usize {
        self.top() - self.pages * PAGE_SIZE
    }

    /// Whether `address` is so close below the stack that overflowing it would touch it.
    pub(crate) fn guards(&self, address: usize) -> bool {
        (self.top() - SLOT as usize..self.bottom()).contains(&address)
    }
}

static NEXT_SLOT: AtomicU64 = AtomicU64::new(0);

/// Thread stacks without a thread. Linked through their top word: slot number plus 1, 0 ends.
static POOL: SpinLock<u64> = SpinLock::new(0);

/// The word at the top of a pooled stack.
fn link(stack: Stack) -> *mut u64 {
    core::ptr::with_exposed_provenance_mut::<u64>(stack.top()).wrapping_sub(1)
}

/// A stack of `pages` pages (at most 31).
pub(crate) fn allocate(pages: usize) -> Result<Stack> {
    if pages == THREAD_PAGES {
        let mut pool = POOL.lock();
        if *pool != 0 {
            let stack = Stack { slot: *pool - 1, pages };
            // SAFETY: a pooled stack belongs to the pool.
            *pool = unsafe { link(stack).read() };
            return Ok(stack);
        }
    }
    let phys = frames::allocate(pages)?;
    let stack = Stack { slot: NEXT_SLOT.fetch_add(1, Ordering::Relaxed), pages };
    let bytes = (pages * PAGE_SIZE) as u64;
    // SAFETY: fresh frames at the end of a slot that nobody else has.
    let mapped = unsafe { paging::map_at(stack.bottom() as u64, phys, bytes, paging::WRITE) };
    if let Err(error) = mapped {
        // SAFETY: nothing refers to them: a partial mapping is in a slot that is not used again.
        unsafe { frames::free(phys, pages) };
        return Err(error);
    }
    Ok(stack)
}

/// Takes a thread's stack back.
///
/// # Safety
/// It came from [`allocate`] with [`THREAD_PAGES`], and no CPU runs on it.
pub(crate) unsafe fn free(stack: Stack) {
    let mut pool = POOL.lock();
    // SAFETY: the stack is nobody's any more.
    unsafe { link(stack).write(*pool) };
    *pool = stack.slot + 1;
}
