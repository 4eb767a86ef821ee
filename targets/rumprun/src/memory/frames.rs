//! Page frames: a buddy allocator that gives runs of any number of frames, contiguous in physical memory and in the
//! direct map. What a power of two is too much is given back at once.

use super::paging;
use crate::sync::SpinLock;
use hypercall::{Error, PAGE_SIZE, Result};

/// Runs are at most `1 << (ORDERS - 1)` frames: 1 GiB.
const ORDERS: usize = 19;
/// Mark of the first frame of a free block; the order is beside it.
const FREE: u8 = 0x80;
/// End of a list. Frame 0 is never given out.
const NONE: u64 = 0;

/// The allocator. Frames are counted from physical address 0.
struct Buddy {
    /// One byte per frame: `FREE | order` for the first frame of a free block, else 0.
    table: &'static mut [u8],
    /// First block of each order.
    heads: [u64; ORDERS],
    /// How many frames are free.
    free: u64,
    /// Frame `n` is at `base + n * 4096`. Free blocks hold their list's links: next and previous.
    base: *mut u8,
}

// SAFETY: the allocator owns its table and the free frames; nothing in it is tied to a CPU.
unsafe impl Send for Buddy {}

impl Buddy {
    /// The links of a free block.
    fn links(&mut self, frame: u64) -> &mut [u64; 2] {
        // SAFETY: only called for frames of free blocks, which belong to the allocator, and for one at a time.
        unsafe { &mut *self.base.add(frame as usize * PAGE_SIZE).cast() }
    }

    fn push(&mut self, frame: u64, order: usize) {
        let next = self.heads[order];
        *self.links(frame) = [next, NONE];
        if next != NONE {
            self.links(next)[1] = frame;
        }
        self.heads[order] = frame;
        self.table[frame as usize] = FREE | order as u8;
    }

    fn remove(&mut self, frame: u64, order: usize) {
        let [next, previous] = *self.links(frame);
        if next != NONE {
            self.links(next)[1] = previous;
        }
        if previous == NONE {
            self.heads[order] = next;
        } else {
            self.links(previous)[0] = next;
        }
        self.table[frame as usize] = 0;
    }

    /// Frees one aligned block, joined with its free neighbours.
    fn free_block(&mut self, mut frame: u64, mut order: usize) {
        while order + 1 < ORDERS {
            let buddy = frame ^ (1 << order);
            if self.table.get(buddy as usize) != Some(&(FREE | order as u8)) {
                break;
            }
            self.remove(buddy, order);
            frame &= !(1 << order);
            order += 1;
        }
        self.push(frame, order);
    }

    /// Frees any run of frames.
    fn free_run(&mut self, mut frame: u64, count: u64) {
        let end = frame + count;
        self.free += count;
        while frame < end {
            let fits = 63 - (end - frame).leading_zeros();
            let order = frame.trailing_zeros().min(fits).min(ORDERS as u32 - 1);
            self.free_block(frame, order as usize);
            frame += 1 << order;
        }
    }

    /// Takes `count` frames whose first is a multiple of `align` (a power of two).
    fn allocate(&mut self, count: u64, align: u64) -> Option<u64> {
        let wanted = count.max(align).checked_next_power_of_two()?.trailing_zeros() as usize;
        let order = (wanted..ORDERS).find(|order| self.heads[*order] != NONE)?;
        let frame = self.heads[order];
        self.remove(frame, order);
        let got = 1 << order;
        self.free -= got;
        if got > count {
            self.free_run(frame + count, got - count);
        }
        Some(frame)
    }
}

static BUDDY: SpinLock<Buddy> =
    SpinLock::new(Buddy { table: &mut [], heads: [NONE; ORDERS], free: 0, base: core::ptr::null_mut() });

/// Hands over the table, one zero byte per frame of the highest RAM address.
pub(crate) fn init(table: &'static mut [u8]) {
    let mut buddy = BUDDY.lock();
    buddy.table = table;
    buddy.base = paging::direct(0);
}

/// Gives memory to the allocator.
///
/// # Safety
/// `start .. end` (whole pages) is RAM that nobody else uses, inside the table.
pub(crate) unsafe fn give(start: u64, end: u64) {
    BUDDY.lock().free_run(start / PAGE_SIZE as u64, (end - start) / PAGE_SIZE as u64);
}

/// How many frames are free.
pub(crate) fn free_count() -> u64 {
    BUDDY.lock().free
}

/// Takes `count` contiguous frames and returns their physical address. Their content is arbitrary.
pub(crate) fn allocate(count: usize) -> Result<u64> {
    allocate_aligned(count, 1)
}

/// The same, aligned to `align` frames (a power of two).
pub(crate) fn allocate_aligned(count: usize, align: usize) -> Result<u64> {
    let frame = BUDDY.lock().allocate(count as u64, align as u64).ok_or(Error::NoMemory)?;
    Ok(frame * PAGE_SIZE as u64)
}

/// Takes one frame below 4 GiB.
pub(crate) fn allocate_low() -> Result<u64> {
    // Blocks of low addresses come out whenever there is one; look through a few.
    let mut others = [0; 8];
    let mut count = 0;
    let mut found = Err(Error::NoMemory);
    while count < others.len() {
        let frame = allocate(1)?;
        if frame < 1 << 32 {
            found = Ok(frame);
            break;
        }
        others[count] = frame;
        count += 1;
    }
    for frame in &others[..count] {
        // SAFETY: taken above and not used.
        unsafe { free(*frame, 1) };
    }
    found
}

/// Gives frames back: any part of any run.
///
/// # Safety
/// The frames came from here and nothing refers to them any more.
pub(crate) unsafe fn free(phys: u64, count: usize) {
    BUDDY.lock().free_run(phys / PAGE_SIZE as u64, count as u64);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn buddy(frames: usize) -> Buddy {
        let layout = std::alloc::Layout::from_size_align(frames * PAGE_SIZE, PAGE_SIZE).unwrap();
        // SAFETY: the layout is not empty; the memory is leaked, as tests are short.
        let base = unsafe { std::alloc::alloc(layout) };
        let table = Vec::leak(std::vec![0; frames]);
        Buddy { table, heads: [NONE; ORDERS], free: 0, base }
    }

    #[test]
    fn gives_disjoint_aligned_runs_and_takes_all_back() {
        let mut buddy = buddy(1024);
        buddy.free_run(3, 1000);
        let mut seed = 12345u64;
        let mut live: Vec<(u64, u64)> = Vec::new();
        let mut used = [false; 1024];
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let count = (seed >> 33) % 40 + 1;
            let align = 1 << ((seed >> 50) % 4);
            if (seed >> 60) < 9
                && let Some(frame) = buddy.allocate(count, align)
            {
                assert!(frame >= 3 && frame + count <= 1003 && frame % align == 0);
                for one in frame..frame + count {
                    assert!(!core::mem::replace(&mut used[one as usize], true), "given twice");
                }
                live.push((frame, count));
            } else if !live.is_empty() {
                let (frame, count) = live.swap_remove(seed as usize % live.len());
                for one in frame..frame + count {
                    used[one as usize] = false;
                }
                buddy.free_run(frame, count);
            }
        }
        for (frame, count) in live {
            buddy.free_run(frame, count);
        }
        assert_eq!(buddy.free, 1000);
        // All joined again: both blocks of 256 that fit are there.
        let both = [buddy.allocate(256, 256), buddy.allocate(256, 256)];
        assert!(both == [Some(256), Some(512)] || both == [Some(512), Some(256)]);
    }

    #[test]
    fn refuses_what_it_has_not() {
        let mut buddy = buddy(64);
        buddy.free_run(1, 63);
        assert_eq!(buddy.allocate(64, 1), None);
        assert_eq!(buddy.allocate(u64::MAX, 1), None);
        assert!(buddy.allocate(32, 1).is_some());
    }
}
