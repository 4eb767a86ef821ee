//! What the machine consists of: CPUs, interrupt controllers and buses, as firmware or the hypervisor describes them.

pub(crate) mod acpi;
mod fw_cfg;
mod mp_table;
pub(crate) mod pci;

use crate::boot::start_info::StartInfo;
use crate::memory::paging;
use alloc::vec::Vec;

/// Where PCI's configuration space is seen in memory (PCI Express ECAM).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ecam {
    /// Of bus 0.
    pub(crate) base: u64,
    pub(crate) first_bus: u8,
    pub(crate) last_bus: u8,
}

/// The machine.
#[derive(Debug, Default)]
pub(crate) struct Platform {
    /// Local APICs of all CPUs that may be started.
    pub(crate) cpus: Vec<u32>,
    /// Physical address and first line of each I/O APIC.
    pub(crate) io_apics: Vec<(u64, u32)>,
    pub(crate) ecam: Option<Ecam>,
    /// I/O port of ACPI's timer.
    pub(crate) pm_timer: Option<u16>,
    /// I/O port and value that turn the machine off.
    pub(crate) power_off: Option<(u16, u16)>,
}

const DEFAULT_IO_APIC: u64 = 0xfec0_0000;

/// Firmware's memory, mapped for reading. Nothing writes it any more, so the bytes stay as they are.
fn firmware(at: u64, len: usize) -> Option<&'static [u8]> {
    let start = paging::map_firmware(at, len).ok()?;
    // SAFETY: mapped for good, and nobody's to write.
    Some(unsafe { core::slice::from_raw_parts(start, len) })
}

/// Asks, in this order: ACPI, the MultiProcessor table, QEMU's configuration device. A machine that nothing describes
/// has one CPU and one I/O APIC at the usual place.
pub(crate) fn discover(info: &StartInfo) -> Platform {
    let mut platform = acpi::read(info.rsdp, &firmware).unwrap_or_default();
    if platform.cpus.is_empty()
        && let Some((cpus, io_apics)) = mp_table::read(&firmware)
    {
        platform.cpus = cpus;
        platform.io_apics = io_apics;
    }
    if platform.cpus.is_empty() {
        platform.cpus = (0..fw_cfg::cpu_count().unwrap_or(1)).map(u32::from).collect();
    }
    if platform.io_apics.is_empty() {
        platform.io_apics.push((DEFAULT_IO_APIC, 0));
    }
    platform
}
