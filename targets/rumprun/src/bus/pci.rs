//! PCI configuration space, by memory (ECAM) or I/O ports, and MSI-X tables (PCI Local Bus 3.0, 6.1, 6.7 and 6.8.2).

use super::Ecam;
use crate::cpu::regs::{inl, outl};
use crate::memory::paging;
use crate::sync::SpinLock;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};
use hypercall::{Error, PciAddress, Result, Width};

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;

const VENDOR: u16 = 0x00;
const STATUS: u16 = 0x06;
const HEADER_TYPE: u16 = 0x0e;
const BARS: u16 = 0x10;
const SECONDARY_BUS: u16 = 0x19;
const CAPABILITIES: u16 = 0x34;
const HAS_CAPABILITIES: u32 = 1 << 4;
const MSIX: u32 = 0x11;
const MSIX_ENABLE: u32 = 1 << 15;
const MSIX_MASK_ALL: u32 = 1 << 14;
const BRIDGE: u32 = 1;

struct Access {
    ecam: Option<Ecam>,
}

/// The lock also keeps the two ports of a configuration access together.
static ACCESS: SpinLock<Access> = SpinLock::new(Access { ecam: None });
static PRESENT: AtomicBool = AtomicBool::new(false);

impl Access {
    fn ecam_register(&self, function: PciAddress, offset: u16) -> Result<Option<usize>> {
        let Some(ecam) = self.ecam else { return Ok(None) };
        if !(ecam.first_bus..=ecam.last_bus).contains(&function.bus) {
            return Err(Error::NotFound);
        }
        let page = u64::from(function.bus) << 20
            | u64::from(function.device) << 15
            | u64::from(function.function) << 12;
        Ok(Some(paging::map_device(ecam.base + page, 4096)? + usize::from(offset & !3)))
    }

    fn port_address(function: PciAddress, offset: u16) -> u32 {
        1 << 31
            | u32::from(function.bus) << 16
            | u32::from(function.device) << 11
            | u32::from(function.function) << 8
            | u32::from(offset & !3)
    }

    fn read(&self, function: PciAddress, offset: u16) -> Result<u32> {
        if let Some(register) = self.ecam_register(function, offset)? {
            // SAFETY: a mapped, aligned register of configuration space.
            return Ok(unsafe { core::ptr::with_exposed_provenance::<u32>(register).read_volatile() });
        }
        if offset >= 256 {
            return Ok(u32::MAX);
        }
        // SAFETY: the ports of configuration space, used under the lock.
        unsafe {
            outl(ADDRESS, Self::port_address(function, offset));
            Ok(inl(DATA))
        }
    }

    fn write(&self, function: PciAddress, offset: u16, value: u32) -> Result<()> {
        if let Some(register) = self.ecam_register(function, offset)? {
            // SAFETY: as in `read`. What the device does then is its driver's business.
            unsafe { core::ptr::with_exposed_provenance_mut::<u32>(register).write_volatile(value) };
        } else if offset < 256 {
            // SAFETY: as in `read`.
            unsafe {
                outl(ADDRESS, Self::port_address(function, offset));
                outl(DATA, value);
            }
        }
        Ok(())
    }
}

/// Chooses the way to configuration space. Once.
pub(crate) fn init(ecam: Option<Ecam>) {
    ACCESS.lock().ecam = ecam;
    // A host bridge is at 0:0.0 wherever there is PCI.
    let first = PciAddress { segment: 0, bus: 0, device: 0, function: 0 };
    let vendor = ACCESS.lock().read(first, VENDOR);
    PRESENT.store(vendor.is_ok_and(|vendor| vendor as u16 != u16::MAX), Ordering::Relaxed);
}

fn check(function: PciAddress, offset: u16, width: Width) -> Result<()> {
    if function.segment != 0 || !PRESENT.load(Ordering::Relaxed) {
        return Err(Error::NotFound);
    }
    let fits = width != Width::U64 && offset.is_multiple_of(width.bytes() as u16) && offset < 4096;
    if fits && function.device < 32 && function.function < 8 { Ok(()) } else { Err(Error::Invalid) }
}

/// See [`hypercall::Pci::pci_read`].
pub(crate) fn read(function: PciAddress, offset: u16, width: Width) -> Result<u32> {
    check(function, offset, width)?;
    let word = ACCESS.lock().read(function, offset)? >> (8 * (offset & 3));
    Ok(match width {
        Width::U8 => word & 0xff,
        Width::U16 => word & 0xffff,
        _ => word,
    })
}

/// Writes a register whoever owns it.
fn write_any(function: PciAddress, offset: u16, width: Width, value: u32) -> Result<()> {
    check(function, offset, width)?;
    let access = ACCESS.lock();
    let (shift, mask) = match width {
        Width::U8 => (8 * (offset & 3), 0xff),
        Width::U16 => (8 * (offset & 3), 0xffff),
        _ => return access.write(function, offset, value),
    };
    if offset & !3 == 4 && offset & 2 == 0 {
        // Beside the command register is the status register, where writing ones clears bits: leave it alone.
        let command = access.read(function, offset)? & 0xffff & !(mask << shift) | (value & mask) << shift;
        return access.write(function, offset, command);
    }
    let word = access.read(function, offset)? & !(mask << shift) | (value & mask) << shift;
    access.write(function, offset, word)
}

/// See [`hypercall::Pci::pci_write`].
pub(crate) fn write(function: PciAddress, offset: u16, width: Width, value: u32) -> Result<()> {
    if offset >= 0x40
        && let Some(msix) = capability(function, MSIX)?
        && (msix..msix + 12).contains(&offset)
    {
        return Err(Error::Denied);
    }
    write_any(function, offset, width, value)
}

/// Where a function's capability is.
fn capability(function: PciAddress, id: u32) -> Result<Option<u16>> {
    if read(function, STATUS, Width::U16)? & HAS_CAPABILITIES == 0 {
        return Ok(None);
    }
    let mut at = read(function, CAPABILITIES, Width::U8)? as u16 & !3;
    // At most 48 fit; a device that links them in a circle is left.
    for _ in 0..48 {
        if at < 0x40 {
            break;
        }
        let header = read(function, at, Width::U16)?;
        if header & 0xff == id {
            return Ok(Some(at));
        }
        at = (header >> 8) as u16 & !3;
    }
    Ok(None)
}

/// See [`hypercall::Pci::pci_functions`].
pub(crate) fn functions(found: &mut dyn FnMut(PciAddress)) {
    if !PRESENT.load(Ordering::Relaxed) {
        return;
    }
    let mut buses = alloc::vec![0u8];
    let mut seen = Vec::new();
    while let Some(bus) = buses.pop() {
        for device in 0..32 {
            let first = PciAddress { segment: 0, bus, device, function: 0 };
            let kind = match read(first, VENDOR, Width::U16) {
                Ok(0xffff) | Err(_) => continue,
                Ok(_) => read(first, HEADER_TYPE, Width::U8).unwrap_or(0),
            };
            for function in 0..if kind & 0x80 != 0 { 8 } else { 1 } {
                let address = PciAddress { function, ..first };
                if !matches!(read(address, VENDOR, Width::U16), Ok(vendor) if vendor != 0xffff) {
                    continue;
                }
                seen.push(address);
                let kind = read(address, HEADER_TYPE, Width::U8).unwrap_or(0) & 0x7f;
                // Buses are numbered so that those behind a bridge are higher: no circles.
                if kind == BRIDGE
                    && let Ok(behind) = read(address, SECONDARY_BUS, Width::U8)
                    && behind as u8 > bus
                    && !buses.contains(&(behind as u8))
                {
                    buses.push(behind as u8);
                }
            }
        }
    }
    seen.sort_unstable();
    seen.dedup();
    seen.into_iter().for_each(found);
}

/// Physical address of the memory that a base address register describes.
fn bar(function: PciAddress, index: u16) -> Result<u64> {
    let low = read(function, BARS + 4 * index, Width::U32)?;
    if low & 1 != 0 {
        return Err(Error::Invalid);
    }
    let high = if low & 6 == 4 && index < 5 { read(function, BARS + 4 * index + 4, Width::U32)? } else { 0 };
    let address = u64::from(high) << 32 | u64::from(low & !15);
    if address == 0 { Err(Error::NotFound) } else { Ok(address) }
}

/// An entry of a function's MSI-X table: where its four words are seen.
fn msix_entry(function: PciAddress, entry: u16) -> Result<(u16, *mut u32)> {
    let at = capability(function, MSIX)?.ok_or(Error::NotFound)?;
    let control = read(function, at + 2, Width::U16)?;
    if u32::from(entry) > control & 0x7ff {
        return Err(Error::NotFound);
    }
    let place = read(function, at + 4, Width::U32)?;
    let table = bar(function, (place & 7) as u16)? + u64::from(place & !7);
    let registers = paging::map_device(table + 16 * u64::from(entry), 16)?;
    Ok((at, core::ptr::with_exposed_provenance_mut(registers)))
}

/// Delivers an MSI-X entry as `vector` of the CPU with that APIC id, and turns MSI-X on.
pub(crate) fn msix_route(function: PciAddress, entry: u16, vector: u8, apic_id: u32) -> Result<()> {
    if apic_id > 0xff {
        // The address has room for 8 bits without interrupt remapping.
        return Err(Error::Invalid);
    }
    let (at, words) = msix_entry(function, entry)?;
    let control = read(function, at + 2, Width::U16)?;
    if control & MSIX_ENABLE == 0 {
        // Entries are masked after a reset, so nothing comes from the others.
        write_any(function, at + 2, Width::U16, (control | MSIX_ENABLE) & !MSIX_MASK_ALL)?;
    }
    // SAFETY: the four words of the entry; the address is that of local APICs, so that the device interrupts and does
    // not write memory.
    unsafe {
        words.add(3).write_volatile(1);
        words.write_volatile(0xfee0_0000 | apic_id << 12);
        words.add(1).write_volatile(0);
        words.add(2).write_volatile(u32::from(vector));
        words.add(3).write_volatile(0);
    }
    Ok(())
}

/// Masks an MSI-X entry.
pub(crate) fn msix_mask(function: PciAddress, entry: u16) {
    if let Ok((_, words)) = msix_entry(function, entry) {
        // SAFETY: the entry's control word.
        unsafe { words.add(3).write_volatile(1) };
    }
}
