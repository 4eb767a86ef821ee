//! Physical memory, page tables, stacks and the heap.
//!
//! | virtual address        | what                                                                       |
//! | ---------------------- | -------------------------------------------------------------------------- |
//! | 0                      | nothing: null pointers fault                                               |
//! | 0xffff_8000_0000_0000  | direct map of RAM, not executable; the image's read-only parts read-only   |
//! | 0xffff_a000_0000_0000  | device registers at the same distance, uncached, mapped when asked for     |
//! | 0xffff_c000_0000_0000  | stacks, each above an unmapped guard page                                  |
//! | 0xffff_ffff_8000_0000  | the image: text executable, constants read-only, data writable             |

pub(crate) mod frames;
pub(crate) mod heap;
pub(crate) mod paging;
pub(crate) mod stacks;

use crate::boot::start_info::{Range, StartInfo};
use crate::cpu::regs;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Below it is firmware, the start info and the trampoline of the other CPUs: not given out.
const LOW_MEMORY: u64 = 0x10_0000;

/// Long copies use the CPU's string instructions: set where no emulator runs them.
static STRING_INSTRUCTIONS: AtomicBool = AtomicBool::new(false);

#[cfg(target_os = "none")]
core::arch::global_asm!(include_str!("copy.s"), rep = sym STRING_INSTRUCTIONS);

/// Chooses the way to copy memory: string instructions where the CPU says that they are fast, and is a real one.
fn choose_copy() {
    const FAST_STRINGS: u32 = 1 << 9;
    let emulated = regs::cpuid(0x4000_0000, 0).ebx.to_le_bytes() == *b"TCGT";
    let fast = regs::cpuid(7, 0).ebx & FAST_STRINGS != 0;
    STRING_INSTRUCTIONS.store(fast && !emulated, Ordering::Relaxed);
}

static TOTAL: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" {
    static image_start: u8;
    static text_end: u8;
    static rodata_end: u8;
    static image_end: u8;
    static boot_stack_guard: u8;
}

/// The page below the boot stack, which is not mapped.
pub(crate) fn boot_guard() -> usize {
    (&raw const boot_stack_guard).addr()
}

/// Virtual addresses of the image: start, end of text, end of constants, end of data.
pub(crate) fn image() -> [usize; 4] {
    [&raw const image_start, &raw const text_end, &raw const rodata_end, &raw const image_end]
        .map(|symbol| symbol.addr())
}

/// How many bytes of RAM there are.
pub(crate) fn total_bytes() -> u64 {
    TOTAL.load(Ordering::Relaxed)
}

/// Calls `each` for the parts of RAM that are neither low memory, nor the image, nor the module, in whole pages.
fn usable(info: &StartInfo, mut each: impl FnMut(Range)) {
    let symbols = crate::symbols::range();
    let image = Range {
        start: image()[0] as u64 - paging::IMAGE_BASE,
        end: (image()[3] as u64).max(symbols.end) - paging::IMAGE_BASE,
    };
    let mut taken = [image, info.module];
    taken.sort_unstable_by_key(|range| range.start);
    for ram in info.ram() {
        let mut start = ram.start.max(LOW_MEMORY);
        let end = ram.end & !0xfff;
        for hole in taken {
            let hole = Range { start: hole.start & !0xfff, end: hole.end.next_multiple_of(4096) };
            if hole.start < end && hole.end > start {
                if hole.start > start {
                    each(Range { start, end: hole.start });
                }
                start = hole.end;
            }
        }
        start = start.next_multiple_of(4096);
        if start < end {
            each(Range { start, end });
        }
    }
}

/// Builds the page tables and hands memory to the allocators.
///
/// # Safety
/// Once, on the boot CPU, under the page tables of `entry.s`.
pub(crate) unsafe fn init(info: &StartInfo) {
    choose_copy();
    let end = info.ram().iter().map(|range| range.end).max().unwrap_or(0);
    TOTAL.store(info.ram().iter().map(|range| range.end - range.start).sum(), Ordering::Relaxed);

    // The largest usable range below the early limit gives the page tables and the frame table; the rest of it, and
    // all others, go to the frame allocator.
    let mut first = Range::default();
    usable(info, |range| {
        let range = Range { start: range.start, end: range.end.min(paging::EARLY_LIMIT) };
        if range.start < range.end && range.end - range.start > first.end - first.start {
            first = range;
        }
    });
    let mut early = paging::EarlyFrames { next: first.start, end: first.end };
    // SAFETY: as the caller promises; the frames are unused memory.
    unsafe { paging::init(info, &mut early) };
    let table_bytes = (end / 4096).next_multiple_of(4096);
    let table = early.take(table_bytes);
    // SAFETY: the frame table's memory belongs to nobody else and is mapped now.
    unsafe {
        let table = core::slice::from_raw_parts_mut(paging::direct(table), table_bytes as usize);
        table.fill(0);
        frames::init(table);
    }
    let taken = Range { start: first.start, end: early.next };
    usable(info, |range| {
        let start = if range.overlaps(&taken) { taken.end } else { range.start };
        if start < range.end {
            // SAFETY: usable memory that nothing else uses.
            unsafe { frames::give(start, range.end) };
        }
    });
}

/// The first boot module, if it lies in RAM.
pub(crate) fn module() -> Option<&'static [u8]> {
    let info = crate::boot::start_info::get();
    let module = info.module;
    if !info.ram().iter().any(|ram| ram.start <= module.start && module.end <= ram.end) {
        return None;
    }
    // SAFETY: RAM, seen through the direct map, and kept out of the frame allocator for good.
    Some(unsafe {
        core::slice::from_raw_parts(paging::direct(module.start), (module.end - module.start) as usize)
    })
}
