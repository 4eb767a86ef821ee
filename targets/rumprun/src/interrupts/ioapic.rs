//! I/O APICs: interrupt lines (82093AA data sheet).

use crate::boot::start_info::Range;
use crate::memory::paging;
use crate::sync::SpinLock;
use hypercall::{Error, Result};

const VERSION: u32 = 1;
const REDIRECTION: u32 = 0x10;
const MASKED: u32 = 1 << 16;
const LEVEL: u32 = 1 << 15;
const ACTIVE_LOW: u32 = 1 << 13;
/// Most I/O APICs that are used.
const MAX: usize = 8;

#[derive(Clone, Copy)]
struct IoApic {
    at: u64,
    registers: usize,
    first_line: u32,
    lines: u32,
}

static ALL: SpinLock<[Option<IoApic>; MAX]> = SpinLock::new([None; MAX]);

impl IoApic {
    fn select(&self, register: u32) -> *mut u32 {
        // SAFETY: `add` mapped the registers; the lock is held.
        unsafe { core::ptr::with_exposed_provenance_mut::<u32>(self.registers).write_volatile(register) };
        core::ptr::with_exposed_provenance_mut(self.registers + 0x10)
    }

    fn read(&self, register: u32) -> u32 {
        // SAFETY: as in `select`.
        unsafe { self.select(register).read_volatile() }
    }

    fn write(&self, register: u32, value: u32) {
        // SAFETY: as in `select`.
        unsafe { self.select(register).write_volatile(value) }
    }
}

/// Adds the I/O APIC at a physical address, with all its lines masked.
pub(crate) fn add(at: u64, first_line: u32) -> Result<()> {
    let mut apic = IoApic { at, registers: paging::map_device(at, 4096)?, first_line, lines: 0 };
    let mut all = ALL.lock();
    let slot = all.iter_mut().find(|slot| slot.is_none()).ok_or(Error::NoMemory)?;
    let version = apic.read(VERSION);
    if version == u32::MAX {
        return Err(Error::NotFound);
    }
    apic.lines = (version >> 16 & 0xff) + 1;
    *slot = Some(apic);
    Ok(())
}

/// Does something to the entry of a line: with its I/O APIC and the number of the entry's low register.
fn with_line<R>(line: u32, act: impl FnOnce(&IoApic, u32) -> R) -> Result<R> {
    let all = ALL.lock();
    let apic = all
        .iter()
        .flatten()
        .find(|apic| line >= apic.first_line && line - apic.first_line < apic.lines)
        .ok_or(Error::NotFound)?;
    Ok(act(apic, REDIRECTION + 2 * (line - apic.first_line)))
}

/// Whether `range` holds registers of an I/O APIC.
pub(crate) fn owns(range: &Range) -> bool {
    let own = |apic: &IoApic| range.overlaps(&Range { start: apic.at, end: apic.at + 4096 });
    ALL.lock().iter().flatten().any(own)
}

/// Whether there is such a line.
pub(crate) fn has_line(line: u32) -> bool {
    with_line(line, |_, _| ()).is_ok()
}

/// Whether a line is edge-triggered: the 16 of the ISA bus, where virtio-mmio devices are as well, are; those above are PCI's,
/// level-triggered and active low. An edge does not come again by itself, so it need not be masked.
pub(crate) fn is_edge(line: u32) -> bool {
    line < 16
}

fn entry(line: u32, vector: u8) -> u32 {
    u32::from(vector) | if is_edge(line) { 0 } else { LEVEL | ACTIVE_LOW }
}

/// Delivers a line as `vector` of the CPU with that APIC id.
pub(crate) fn route(line: u32, vector: u8, apic_id: u32) -> Result<()> {
    with_line(line, |apic, low| {
        apic.write(low, entry(line, vector) | MASKED);
        apic.write(low + 1, apic_id << 24);
        apic.write(low, entry(line, vector));
    })
}

/// Masks a line, or lets it through.
pub(crate) fn set_mask(line: u32, vector: u8, masked: bool) {
    // A line that was routed is there.
    let _ =
        with_line(line, |apic, low| apic.write(low, entry(line, vector) | if masked { MASKED } else { 0 }));
}
