//! What the loader tells: `hvm_start_info` of the PVH boot protocol
//! (Xen `public/arch-x86/hvm/start_info.h`, also what QEMU, Firecracker and Cloud Hypervisor fill in).

use crate::memory::paging::EARLY_LIMIT;
use core::sync::atomic::{AtomicPtr, Ordering};

/// Most ranges of the memory map that are kept.
const MAX_RANGES: usize = 32;
/// Longest kernel command line, in bytes.
const MAX_CMDLINE: usize = 4096;

const MAGIC: u32 = 0x336e_c578;
const TYPE_RAM: u32 = 1;

/// A range of physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Range {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Range {
    pub(crate) fn overlaps(&self, other: &Range) -> bool {
        self.start < other.end && other.start < self.end
    }
}

/// A copy of what matters in the start info.
pub(crate) struct StartInfo {
    ranges: [Range; MAX_RANGES],
    range_count: usize,
    /// The first boot module, which holds the configuration; empty if there is none.
    pub(crate) module: Range,
    /// Physical address of the ACPI root pointer, or 0.
    pub(crate) rsdp: u64,
    cmdline: [u8; MAX_CMDLINE],
    cmdline_len: usize,
}

impl StartInfo {
    /// RAM, in the loader's order.
    pub(crate) fn ram(&self) -> &[Range] {
        &self.ranges[..self.range_count]
    }

    /// The kernel command line; what is not UTF-8 ends it.
    pub(crate) fn cmdline(&self) -> &str {
        let bytes = &self.cmdline[..self.cmdline_len];
        core::str::from_utf8(bytes).unwrap_or_else(|error| {
            // The part before the error is valid.
            core::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or("")
        })
    }
}

/// Static, because it is larger than a boot stack likes.
static INFO: crate::sync::SpinLock<StartInfo> = crate::sync::SpinLock::new(StartInfo {
    ranges: [Range { start: 0, end: 0 }; MAX_RANGES],
    range_count: 0,
    module: Range { start: 0, end: 0 },
    rsdp: 0,
    cmdline: [0; MAX_CMDLINE],
    cmdline_len: 0,
});

static SHARED: AtomicPtr<StartInfo> = AtomicPtr::new(core::ptr::null_mut());

/// Reads a little-endian word of early memory.
///
/// # Safety
/// `at .. at + N` is memory.
unsafe fn bytes<const N: usize>(at: u64) -> Result<[u8; N], &'static str> {
    if at == 0 || at.checked_add(N as u64).is_none_or(|end| end > EARLY_LIMIT) {
        return Err("the loader's start info points outside the first GiB");
    }
    // SAFETY: the first GiB is mapped here during boot, and the caller vouches that this is memory.
    Ok(unsafe { crate::memory::paging::direct(at).cast::<[u8; N]>().read_unaligned() })
}

/// Copies what the loader left at `at`.
///
/// # Safety
/// `at` is what the PVH loader passed in ebx, and memory is as the loader left it.
pub(crate) unsafe fn read(at: u64) -> Result<&'static StartInfo, &'static str> {
    let mut info = INFO.lock();
    // SAFETY: the loader's structures, at the offsets that the protocol gives.
    let u32_at = |at| unsafe { bytes::<4>(at) }.map(u32::from_le_bytes);
    // SAFETY: as above.
    let u64_at = |at| unsafe { bytes::<8>(at) }.map(u64::from_le_bytes);
    if u32_at(at)? != MAGIC {
        return Err("not started by a PVH loader (use QEMU -kernel, Firecracker or Cloud Hypervisor)");
    }
    let version = u32_at(at + 4)?;
    if u32_at(at + 12)? > 0 {
        let list = u64_at(at + 16)?;
        let start = u64_at(list)?;
        info.module = Range { start, end: start.saturating_add(u64_at(list + 8)?) };
    }
    let cmdline = u64_at(at + 24)?;
    if cmdline != 0 {
        for index in 0..MAX_CMDLINE {
            // SAFETY: as above; the command line ends with 0.
            let [byte] = unsafe { bytes::<1>(cmdline + index as u64) }?;
            if byte == 0 {
                break;
            }
            info.cmdline[index] = byte;
            info.cmdline_len = index + 1;
        }
    }
    info.rsdp = u64_at(at + 32)?;
    if version == 0 {
        return Err("the loader's start info has no memory map (version 0)");
    }
    let (map, entries) = (u64_at(at + 40)?, u32_at(at + 48)?);
    for index in 0..u64::from(entries.min(128)) {
        let entry = map + index * 24;
        let (start, size) = (u64_at(entry)?, u64_at(entry + 8)?);
        if u32_at(entry + 16)? == TYPE_RAM && info.range_count < MAX_RANGES {
            let range = Range { start, end: start.saturating_add(size) };
            let count = info.range_count;
            info.ranges[count] = range;
            info.range_count += 1;
        }
    }
    if info.range_count == 0 {
        return Err("the loader's memory map names no memory");
    }
    let info = info.keep();
    SHARED.store(core::ptr::from_ref(info).cast_mut(), Ordering::Release);
    Ok(info)
}

/// What [`read`] returned. Panics before.
pub(crate) fn get() -> &'static StartInfo {
    let info = SHARED.load(Ordering::Acquire);
    assert!(!info.is_null(), "the start info was read");
    // SAFETY: `read` stored a reference to a static that does not change any more.
    unsafe { &*info }
}
