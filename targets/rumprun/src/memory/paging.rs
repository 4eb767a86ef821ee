//! Page tables (Intel SDM volume 3, 4.5). Mappings are added, never removed or changed, once several CPUs run: so no CPU
//! ever has to be told to forget one.

use super::frames;
use crate::boot::start_info::{Range, StartInfo};
use crate::cpu::regs;
use crate::sync::SpinLock;
use hypercall::{Error, Result};

/// Where RAM is seen.
pub(crate) const DIRECT_BASE: u64 = 0xffff_8000_0000_0000;
/// Where device registers are seen.
const DEVICE_BASE: u64 = 0xffff_a000_0000_0000;
/// Where the image is seen: physical address 0 of it.
pub(crate) const IMAGE_BASE: u64 = 0xffff_ffff_8000_0000;
/// Physical addresses below this are mapped from the first instruction on.
pub(crate) const EARLY_LIMIT: u64 = 1 << 30;
/// Physical addresses that can be mapped: what the distance between the areas above has room for.
const PHYS_LIMIT: u64 = 1 << 45;

const LARGE: u64 = 2 << 20;

bitflags::bitflags! {
    /// Bits of a page table entry.
    #[derive(Clone, Copy)]
    pub(crate) struct Flags: u64 {
        const PRESENT = 1;
        const WRITABLE = 1 << 1;
        const WRITE_THROUGH = 1 << 3;
        const UNCACHED = 1 << 4;
        const ACCESSED = 1 << 5;
        const DIRTY = 1 << 6;
        const LARGE = 1 << 7;
        const GLOBAL = 1 << 8;
        const NO_EXECUTE = 1 << 63;
    }
}

/// Constants.
pub(crate) const READ: Flags =
    Flags::PRESENT.union(Flags::NO_EXECUTE).union(Flags::ACCESSED).union(Flags::GLOBAL);
/// Data.
pub(crate) const WRITE: Flags = READ.union(Flags::WRITABLE).union(Flags::DIRTY);
/// Code.
pub(crate) const EXECUTE: Flags = Flags::PRESENT.union(Flags::ACCESSED).union(Flags::GLOBAL);
/// Device registers.
const DEVICE: Flags = WRITE.union(Flags::WRITE_THROUGH).union(Flags::UNCACHED);

const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Where a physical address of RAM is seen.
pub(crate) fn direct(phys: u64) -> *mut u8 {
    core::ptr::with_exposed_provenance_mut((DIRECT_BASE + phys) as usize)
}

/// Memory before there is an allocator.
pub(crate) struct EarlyFrames {
    pub(crate) next: u64,
    pub(crate) end: u64,
}

impl EarlyFrames {
    pub(crate) fn take(&mut self, bytes: u64) -> u64 {
        assert!(self.end - self.next >= bytes, "boot: too little memory: give the machine more (QEMU -m)");
        let frame = self.next;
        self.next += bytes;
        frame
    }
}

/// The root table, and the lock over all tables.
static TABLES: SpinLock<Tables> = SpinLock::new(Tables { root: 0 });

struct Tables {
    root: u64,
}

/// Where a page walk takes new tables from.
type TakeFrame<'a> = &'a mut dyn FnMut() -> Result<u64>;

/// The entry at `index` of the table at `table`.
///
/// # Safety
/// `table` is a page table, reached through the direct map, and the caller holds the lock or is alone.
unsafe fn entry<'a>(table: u64, index: u64) -> &'a mut u64 {
    // SAFETY: by the caller; 512 entries per table.
    unsafe { &mut *direct(table).cast::<u64>().add((index & 511) as usize) }
}

impl Tables {
    /// The entry that maps `virt` at `level` (1: 4 KiB, 2: 2 MiB), with tables made on the way.
    fn walk(&mut self, virt: u64, level: u32, take: TakeFrame<'_>) -> Result<&mut u64> {
        let mut table = self.root;
        for step in (level..=4).rev() {
            let shift = 12 + 9 * (step - 1);
            // SAFETY: `table` is the root or was found in a present entry below it; `&mut self` is the lock.
            let slot = unsafe { entry(table, virt >> shift) };
            if step == level {
                return Ok(slot);
            }
            if *slot & Flags::PRESENT.bits() == 0 {
                let frame = take()?;
                // SAFETY: a fresh frame of RAM.
                unsafe { direct(frame).write_bytes(0, 4096) };
                *slot = frame | (Flags::PRESENT | Flags::WRITABLE | Flags::ACCESSED).bits();
            } else if *slot & Flags::LARGE.bits() != 0 {
                return Err(Error::Busy);
            }
            table = *slot & ADDRESS;
        }
        Err(Error::Invalid)
    }

    /// Maps `range` at `range.start + offset`, in large pages where alignment allows it.
    fn map(&mut self, range: Range, offset: u64, flags: Flags, take: TakeFrame<'_>) -> Result<()> {
        let mut phys = range.start;
        while phys < range.end {
            let virt = phys.wrapping_add(offset);
            let large = (phys | virt).is_multiple_of(LARGE) && range.end - phys >= LARGE;
            let (mut step, slot) =
                if large { (LARGE, self.walk(virt, 2, take)?) } else { (4096, self.walk(virt, 1, take)?) };
            *slot = phys | flags.bits() | if large { Flags::LARGE.bits() } else { 0 };
            if !large && step < range.end - phys {
                // The rest of this table needs no walk.
                let room = (511 - (virt >> 12 & 511)).min((range.end - phys) / 4096 - 1);
                let slots = core::ptr::from_mut(slot);
                for index in 1..=room {
                    // SAFETY: `room` entries follow in the same table.
                    unsafe { *slots.add(index as usize) = (phys + index * 4096) | flags.bits() };
                }
                step += room * 4096;
            }
            phys += step;
        }
        Ok(())
    }
}

/// Builds the final tables and goes over to them.
///
/// # Safety
/// Once, on the boot CPU, under the page tables of `entry.s`; `early` is unused memory below [`EARLY_LIMIT`].
pub(crate) unsafe fn init(info: &StartInfo, early: &mut EarlyFrames) {
    let mut tables = TABLES.lock();
    let mut take = || Ok(early.take(4096));
    let root = take().unwrap_or(0);
    // SAFETY: a fresh frame of RAM.
    unsafe { direct(root).write_bytes(0, 4096) };
    tables.root = root;
    let [start, text_end, rodata_end, end] = super::image().map(|address| address as u64 - IMAGE_BASE);
    let symbols = crate::symbols::range();
    let mut build = || -> Result<()> {
        let guard = super::boot_guard() as u64 - IMAGE_BASE;
        for (start, end, flags) in [
            (start, text_end, EXECUTE),
            (text_end, rodata_end, READ),
            (rodata_end, guard, WRITE),
            (guard + 4096, end, WRITE),
        ] {
            tables.map(Range { start, end }, IMAGE_BASE, flags, &mut take)?;
        }
        if symbols.start != 0 {
            let range = Range { start: symbols.start - IMAGE_BASE, end: symbols.end - IMAGE_BASE };
            tables.map(range, IMAGE_BASE, READ, &mut take)?;
        }
        for ram in info.ram() {
            // Not page 0, whose direct-map address a null pointer plus the base would give; and not writable where the
            // image is not.
            let ram = Range { start: ram.start.next_multiple_of(4096).max(4096), end: ram.end & !0xfff };
            let fixed = Range { start, end: rodata_end };
            let parts = if ram.overlaps(&fixed) {
                [
                    (Range { start: ram.start, end: fixed.start }, WRITE),
                    (fixed, READ),
                    (Range { start: fixed.end, end: ram.end }, WRITE),
                ]
            } else {
                [(ram, WRITE), (Range::default(), WRITE), (Range::default(), WRITE)]
            };
            for (part, flags) in parts {
                tables.map(part, DIRECT_BASE, flags, &mut take)?;
            }
        }
        Ok(())
    };
    if let Err(error) = build() {
        panic!("boot: page tables: {error}");
    }
    // SAFETY: the tables map the image, the boot stack within it and RAM, all at the places in use.
    unsafe { enable(root) };
}

/// Turns on what protects memory on this CPU and goes over to the tables at `root`.
///
/// # Safety
/// `root` is the root of the final tables.
unsafe fn enable(root: u64) {
    const GLOBAL_PAGES: u64 = 1 << 7;
    const USER_INSTRUCTIONS: u64 = 1 << 11;
    const SUPERVISOR_EXECUTE: u64 = 1 << 20;
    let leaf = regs::cpuid(7, 0);
    let mut bits = GLOBAL_PAGES;
    if leaf.ebx & (1 << 7) != 0 {
        bits |= SUPERVISOR_EXECUTE;
    }
    if leaf.ecx & (1 << 2) != 0 {
        bits |= USER_INSTRUCTIONS;
    }
    // SAFETY: the features were asked for; nothing here executes user pages.
    unsafe {
        regs::set_page_tables(root);
        regs::set_cr4(bits);
    }
}

/// The same for a CPU that came up later.
///
/// # Safety
/// Once on each such CPU, from code in the image.
pub(crate) unsafe fn enable_on_this_cpu() {
    let root = TABLES.lock().root;
    // SAFETY: the root is that of the final tables.
    unsafe { enable(root) }
}

/// Maps frames at a chosen virtual address, for stacks.
///
/// # Safety
/// The frames are the caller's, and nothing else is at `virt`.
pub(crate) unsafe fn map_at(virt: u64, phys: u64, bytes: u64, flags: Flags) -> Result<()> {
    let range = Range { start: phys, end: phys + bytes };
    TABLES.lock().map(range, virt.wrapping_sub(phys), flags, &mut || frames::allocate(1))
}

/// Maps device registers and says where they are seen. The same registers are always seen at the same place.
pub(crate) fn map_device(at: u64, len: usize) -> Result<usize> {
    let end = at.checked_add(len as u64).filter(|end| *end <= PHYS_LIMIT && len > 0).ok_or(Error::Invalid)?;
    let range = Range { start: at & !0xfff, end: end.next_multiple_of(4096) };
    let mut tables = TABLES.lock();
    let mut phys = range.start;
    while phys < range.end {
        let slot = tables.walk(DEVICE_BASE + phys, 1, &mut || frames::allocate(1))?;
        *slot = phys | DEVICE.bits();
        phys += 4096;
    }
    Ok((DEVICE_BASE + at) as usize)
}

/// Makes firmware tables readable (they lie in memory that is not ours) and says where they are seen.
pub(crate) fn map_firmware(at: u64, len: usize) -> Result<*const u8> {
    let end = at.checked_add(len as u64).filter(|end| *end <= PHYS_LIMIT).ok_or(Error::Invalid)?;
    let range = Range { start: at & !0xfff, end: end.next_multiple_of(4096) };
    let mut tables = TABLES.lock();
    let mut phys = range.start;
    while phys < range.end {
        match tables.walk(DIRECT_BASE + phys, 1, &mut || frames::allocate(1)) {
            Ok(slot) if *slot & Flags::PRESENT.bits() == 0 => *slot = phys | READ.bits(),
            // Mapped already, as RAM or by an earlier call.
            Ok(_) | Err(Error::Busy) => {}
            Err(error) => return Err(error),
        }
        phys += 4096;
    }
    Ok(direct(at))
}

/// The physical address behind a virtual one that is mapped.
pub(crate) fn translate(virt: usize) -> Option<u64> {
    let virt = virt as u64;
    let mut at = regs::page_tables();
    for step in (1..=4).rev() {
        let shift = 12 + 9 * (step - 1);
        // SAFETY: `at` is a table. Entries go from absent to present once and stay, so no lock is needed.
        let slot = unsafe { direct(at).cast::<u64>().add((virt >> shift & 511) as usize).read_volatile() };
        if slot & Flags::PRESENT.bits() == 0 {
            return None;
        }
        if step == 1 || slot & Flags::LARGE.bits() != 0 {
            let mask = (1u64 << shift) - 1;
            return Some((slot & ADDRESS & !mask) | (virt & mask));
        }
        at = slot & ADDRESS;
    }
    None
}

/// Tables for the other CPUs' first instructions: ours, and page `page` at its physical address, executable.
/// Returns the root (below 4 GiB) and the frames to free when all CPUs are up.
pub(crate) fn trampoline_tables(page: u64) -> Result<[u64; 4]> {
    let frames = [frames::allocate_low()?, frames::allocate(1)?, frames::allocate(1)?, frames::allocate(1)?];
    let tables = TABLES.lock();
    let down = (Flags::PRESENT | Flags::WRITABLE).bits();
    // SAFETY: fresh frames, all of which fit a table; the root is a table and the lock is held.
    unsafe {
        for frame in frames {
            direct(frame).write_bytes(0, 4096);
        }
        for index in 256..512 {
            *entry(frames[0], index) = *entry(tables.root, index);
        }
        *entry(frames[0], 0) = frames[1] | down;
        *entry(frames[1], 0) = frames[2] | down;
        *entry(frames[2], 0) = frames[3] | down;
        *entry(frames[3], page >> 12) = page | EXECUTE.difference(Flags::GLOBAL).bits();
    }
    Ok(frames)
}
