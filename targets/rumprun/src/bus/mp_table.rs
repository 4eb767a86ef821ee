//! The MultiProcessor table (Intel MultiProcessor Specification 1.4, chapter 4), which machines without ACPI have.

use super::acpi::Firmware;
use alloc::vec::Vec;

/// Where the pointer to the table may be: the last KiB of base memory, and the BIOS.
const PLACES: [(u64, usize); 2] = [(0x9_fc00, 0x400), (0xf_0000, 0x1_0000)];

const PROCESSOR: u8 = 0;
const IO_APIC: u8 = 2;
const ENABLED: u8 = 1;
/// Lines of an I/O APIC, where the table does not tell.
const LINES: u32 = 24;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

fn table_address(place: &[u8]) -> Option<u64> {
    place.chunks_exact(16).find_map(|pointer| {
        let address = pointer.get(4..8)?;
        (pointer.starts_with(b"_MP_") && sum(pointer) == 0)
            .then(|| u64::from(u32::from_le_bytes([address[0], address[1], address[2], address[3]])))
    })
}

/// APIC ids of CPUs; addresses and first lines of I/O APICs.
type Found = (Vec<u32>, Vec<(u64, u32)>);

fn parse(table: &[u8]) -> Option<Found> {
    if !table.starts_with(b"PCMP") || sum(table) != 0 {
        return None;
    }
    let (mut cpus, mut io_apics) = (Vec::new(), Vec::new());
    let mut rest = table.get(44..)?;
    while let Some(kind) = rest.first() {
        let len = if *kind == PROCESSOR { 20 } else { 8 };
        let (entry, after) = rest.split_at_checked(len)?;
        rest = after;
        match *kind {
            PROCESSOR if entry[3] & ENABLED != 0 => cpus.push(u32::from(entry[1])),
            IO_APIC if entry[3] & ENABLED != 0 => {
                let address = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
                io_apics.push((u64::from(address), io_apics.len() as u32 * LINES));
            }
            _ => {}
        }
    }
    Some((cpus, io_apics))
}

/// Finds and reads the table.
pub(super) fn read(firmware: Firmware<'_>) -> Option<Found> {
    let at = PLACES.iter().find_map(|(at, len)| table_address(firmware(*at, *len)?))?;
    let header = firmware(at, 44)?;
    let len = u16::from_le_bytes([header[4], header[5]]);
    parse(firmware(at, usize::from(len))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Vec<u8> {
        let mut table = std::vec![0; 44];
        table[..4].copy_from_slice(b"PCMP");
        for id in [0, 1] {
            let mut cpu = [0; 20];
            cpu[1] = id;
            cpu[3] = 1;
            table.extend(cpu);
        }
        table.extend([1, 0, b'I', b'S', b'A', 0, 0, 0]);
        table.extend([2, 0, 0x20, 1, 0, 0, 0xc0, 0xfe]);
        table[7] = 0u8.wrapping_sub(sum(&table));
        table
    }

    #[test]
    fn reads_cpus_and_io_apics() {
        assert_eq!(parse(&table()), Some((std::vec![0, 1], std::vec![(0xfec0_0000, 0)])));
    }

    #[test]
    fn refuses_damage() {
        let good = table();
        for len in 0..good.len() {
            assert_eq!(parse(&good[..len]).filter(|(cpus, io)| cpus.len() + io.len() == 3), None);
        }
        let mut bad = good;
        bad[50] ^= 1;
        assert_eq!(parse(&bad), None);
    }
}
