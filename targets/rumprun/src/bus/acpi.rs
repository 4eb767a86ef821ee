//! The static ACPI tables (ACPI 6.5, 5.2): processors and interrupt controllers (MADT), PCI's configuration space (MCFG), the
//! timer and the way to turn off (FADT). Everything in them is checked; what is wrong is left out.

use super::{Ecam, Platform};
use alloc::vec::Vec;

/// Reads memory of the firmware: address and length. `None` where there can be none.
pub(crate) type Firmware<'a> = &'a dyn Fn(u64, usize) -> Option<&'static [u8]>;

/// Longest table that is read: firmware's DSDT is some 10 KiB.
const MAX_TABLE: usize = 1 << 20;

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let part = bytes.get(at..at.checked_add(N)?)?;
    Some(part.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

/// A table whose header has the right length; with `check`, also the right sum.
fn table(at: u64, firmware: Firmware<'_>, check: bool) -> Option<&'static [u8]> {
    let len = number::<4>(firmware(at, 36)?, 4)? as usize;
    let table = firmware(at, Some(len).filter(|len| (36..=MAX_TABLE).contains(len))?)?;
    (!check || sum(table) == 0).then_some(table)
}

/// The addresses in the root table.
fn root(rsdp: u64, firmware: Firmware<'_>) -> Option<Vec<u64>> {
    let pointer = firmware(rsdp, 36)?;
    if !pointer.starts_with(b"RSD PTR ") || sum(&pointer[..20]) != 0 {
        return None;
    }
    let extended = pointer[15] >= 2 && sum(pointer) == 0;
    let xsdt = number::<8>(pointer, 24).filter(|at| extended && *at != 0);
    let (at, width) = match xsdt {
        Some(at) => (at, 8),
        None => (number::<4>(pointer, 16)?, 4),
    };
    let table = table(at, firmware, true)?;
    Some(
        table[36..]
            .chunks_exact(width)
            .map(|entry| entry.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
            .collect(),
    )
}

fn madt(table: &[u8], platform: &mut Platform) {
    let mut rest = table.get(44..).unwrap_or_default();
    while let [kind, len, ..] = *rest {
        let Some((entry, after)) = rest.split_at_checked(usize::from(len)) else { return };
        if len < 2 {
            return;
        }
        rest = after;
        let (id, flags) = match kind {
            // Processor with a local APIC, and with a local x2APIC.
            0 => (number::<1>(entry, 3), number::<4>(entry, 4)),
            9 => (number::<4>(entry, 4), number::<4>(entry, 8)),
            1 => {
                if let (Some(at), Some(line)) = (number::<4>(entry, 4), number::<4>(entry, 8)) {
                    platform.io_apics.push((at, line as u32));
                }
                continue;
            }
            _ => continue,
        };
        if let (Some(id), Some(flags)) = (id, flags)
            && flags & 1 != 0
            && !platform.cpus.contains(&(id as u32))
        {
            platform.cpus.push(id as u32);
        }
    }
}

fn mcfg(table: &[u8]) -> Option<Ecam> {
    // The first entry is enough: one segment.
    let (base, segment) = (number::<8>(table, 44)?, number::<2>(table, 52)?);
    let (first_bus, last_bus) = (*table.get(54)?, *table.get(55)?);
    (segment == 0 && base != 0 && first_bus <= last_bus).then_some(Ecam { base, first_bus, last_bus })
}

/// The value that the control register takes to turn off: the package named `_S5_` in the DSDT, which is the one thing
/// that we want of AML.
fn sleep_type(dsdt: &[u8]) -> Option<u16> {
    const PACKAGE: u8 = 0x12;
    const BYTE: u8 = 0x0a;
    const SLEEP_ENABLE: u16 = 1 << 13;
    let at = dsdt.windows(5).position(|window| window == [b'_', b'S', b'5', b'_', PACKAGE])?;
    let rest = dsdt.get(at + 5..)?;
    // The package's length takes up to 4 bytes; then comes the number of elements.
    let elements = rest.get(usize::from(rest.first()? >> 6) + 2..)?;
    let value = match *elements {
        [BYTE, value, ..] => value,
        // ZeroOp and OneOp.
        [value @ (0 | 1), ..] => value,
        _ => return None,
    };
    Some(u16::from(value & 7) << 10 | SLEEP_ENABLE)
}

fn fadt(table_: &[u8], firmware: Firmware<'_>, platform: &mut Platform) {
    let port =
        |at| number::<4>(table_, at).and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0);
    platform.pm_timer = port(76);
    let dsdt = number::<4>(table_, 40).and_then(|at| table(at, firmware, false));
    if let (Some(port), Some(value)) = (port(64), dsdt.and_then(sleep_type)) {
        platform.power_off = Some((port, value));
    }
}

/// Reads the tables that the root pointer at `rsdp` leads to.
pub(super) fn read(rsdp: u64, firmware: Firmware<'_>) -> Option<Platform> {
    if rsdp == 0 {
        return None;
    }
    let mut platform = Platform::default();
    for at in root(rsdp, firmware)? {
        let Some(table) = table(at, firmware, true) else { continue };
        match &table[..4] {
            b"APIC" => madt(table, &mut platform),
            b"MCFG" => platform.ecam = mcfg(table),
            b"FACP" => fadt(table, firmware, &mut platform),
            _ => {}
        }
    }
    Some(platform)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory at address 0x1000 on.
    fn firmware(memory: Vec<u8>) -> impl Fn(u64, usize) -> Option<&'static [u8]> {
        let memory: &'static [u8] = memory.leak();
        move |at, len| memory.get((at as usize).checked_sub(0x1000)?..)?.get(..len)
    }

    fn with_header(name: &[u8; 4], body: &[u8]) -> Vec<u8> {
        let mut table = name.to_vec();
        table.extend((36 + body.len() as u32).to_le_bytes());
        table.resize(36, 0);
        table.extend(body);
        table[9] = 0u8.wrapping_sub(sum(&table));
        table
    }

    fn machine() -> Vec<u8> {
        let mut madt = std::vec![0; 8];
        for (id, flags) in [(0, 1), (1, 1), (2, 0)] {
            madt.extend([0, 8, id, id, flags, 0, 0, 0]);
        }
        madt.extend([1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        madt.extend([9, 16, 0, 0, 0x10, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        let mut mcfg = std::vec![0; 8];
        mcfg.extend(0xb000_0000u64.to_le_bytes());
        mcfg.extend([0, 0, 0, 255, 0, 0, 0, 0]);
        let mut fadt = std::vec![0; 100];
        fadt[4..8].copy_from_slice(&0x1600u32.to_le_bytes());
        fadt[28..32].copy_from_slice(&0x604u32.to_le_bytes());
        fadt[40..44].copy_from_slice(&0x608u32.to_le_bytes());
        let dsdt = [8, b'_', b'S', b'5', b'_', 0x12, 6, 4, 0x0a, 5, 0, 0, 0];

        let mut memory = b"RSD PTR \0BOCHS \0".to_vec();
        memory.extend(0x1100u32.to_le_bytes());
        memory[8] = 0u8.wrapping_sub(sum(&memory));
        let mut put = |at: usize, bytes: Vec<u8>| {
            memory.resize(memory.len().max(at + bytes.len()), 0);
            memory[at..at + bytes.len()].copy_from_slice(&bytes);
        };
        let addresses = [0x1200u32, 0x1300, 0x1400].map(u32::to_le_bytes);
        put(0x100, with_header(b"RSDT", addresses.as_flattened()));
        put(0x200, with_header(b"APIC", &madt));
        put(0x300, with_header(b"MCFG", &mcfg));
        put(0x400, with_header(b"FACP", &fadt));
        put(0x600, with_header(b"DSDT", &dsdt));
        memory
    }

    #[test]
    fn reads_a_machine() {
        let platform = read(0x1000, &firmware(machine())).unwrap();
        assert_eq!(platform.cpus, [0, 1, 0x110]);
        assert_eq!(platform.io_apics, [(0xfec0_0000, 0)]);
        assert_eq!(platform.ecam, Some(Ecam { base: 0xb000_0000, first_bus: 0, last_bus: 255 }));
        assert_eq!(platform.pm_timer, Some(0x608));
        assert_eq!(platform.power_off, Some((0x604, 5 << 10 | 1 << 13)));
    }

    #[test]
    fn survives_damage() {
        let good = machine();
        for at in 0..good.len() {
            for flip in [0xff, 0x80, 1] {
                let mut bad = good.clone();
                bad[at] ^= flip;
                read(0x1000, &firmware(bad));
            }
            read(0x1000, &firmware(good[..at].to_vec()));
        }
    }
}
