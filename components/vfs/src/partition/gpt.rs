//! GUID partition tables: the primary, or the backup at the end of the disk if that is damaged.

use super::{Extent, Reader, le32, le64};
use alloc::string::String;
use alloc::vec::Vec;
use anykernel::block::BlockError;
use hypercall::Host;

const HEADER_LEN: usize = 92;
const MAX_ENTRIES: u32 = 1024;
const MAX_ENTRY_SIZE: u32 = 4096;
/// What the table of [`MAX_ENTRIES`] may take at most.
const MAX_TABLE: usize = 1 << 20;

/// CRC-32 (IEEE 802.3, reflected).
fn crc32(parts: &[&[u8]]) -> u32 {
    let mut crc = !0u32;
    for byte in parts.iter().flat_map(|part| part.iter()) {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    !crc
}

/// Where the entries are, after the header's checksum was found right.
struct Header {
    backup: u64,
    first_usable: u64,
    last_usable: u64,
    table: u64,
    entries: u32,
    entry_size: u32,
    table_crc: u32,
}

fn header(sector: &[u8], at: u64) -> Option<Header> {
    let len = le32(sector, 12)? as usize;
    if sector.get(..8)? != b"EFI PART" || len < HEADER_LEN {
        return None;
    }
    let crc = crc32(&[sector.get(..16)?, &[0; 4], sector.get(20..len)?]);
    if le32(sector, 16)? != crc || le64(sector, 24)? != at {
        return None;
    }
    let header = Header {
        backup: le64(sector, 32)?,
        first_usable: le64(sector, 40)?,
        last_usable: le64(sector, 48)?,
        table: le64(sector, 72)?,
        entries: le32(sector, 80)?,
        entry_size: le32(sector, 84)?,
        table_crc: le32(sector, 88)?,
    };
    let sane = header.entries <= MAX_ENTRIES
        && (128..=MAX_ENTRY_SIZE).contains(&header.entry_size)
        && header.entry_size.is_power_of_two();
    sane.then_some(header)
}

/// The partitions of the table whose header is in sector `at`. `None`: that table is damaged.
fn table<H: Host>(reader: &Reader<'_, H>, at: u64) -> Result<Option<(Vec<Extent>, u64)>, BlockError> {
    let Some(header) = header(&reader.read(at, 1)?, at) else { return Ok(None) };
    let len = header.entries as usize * header.entry_size as usize;
    let sectors = len.div_ceil(reader.sector_size());
    let inside = header.table.checked_add(sectors as u64).is_some_and(|end| end <= reader.sectors());
    if len > MAX_TABLE || !inside || header.table < 2 {
        return Ok(None);
    }
    let content = reader.read(header.table, sectors)?;
    let entries = content.get(..len).unwrap_or_default();
    if crc32(&[entries]) != header.table_crc {
        return Ok(None);
    }
    let mut found = Vec::new();
    for (number, entry) in (1..).zip(entries.chunks(header.entry_size as usize)) {
        if entry.iter().take(16).all(|byte| *byte == 0) {
            continue;
        }
        let (Some(first), Some(last)) = (le64(entry, 32), le64(entry, 40)) else { continue };
        let usable = first >= header.first_usable && last <= header.last_usable;
        // A count of zero is refused, with its number, by whoever asked.
        let count = if usable { last.wrapping_sub(first).wrapping_add(1) } else { 0 };
        found.push(Extent { number, first, count: if last < first { 0 } else { count } });
    }
    Ok(Some((found, header.backup)))
}

/// The partitions of a disk with a protective MBR.
pub(super) fn read<H: Host>(
    reader: &Reader<'_, H>,
    refused: &mut Vec<String>,
) -> Result<Vec<Extent>, BlockError> {
    if let Some((found, _)) = table(reader, 1)? {
        return Ok(found);
    }
    let last = reader.sectors() - 1;
    if let Some((found, primary)) = table(reader, last)?
        && primary == 1
    {
        refused.push("its GPT is damaged; the backup at its end is used: repair it (sgdisk -e)".into());
        return Ok(found);
    }
    refused.push("its GPT is damaged, and so is the backup at its end: no partition can be used".into());
    Ok(Vec::new())
}

#[cfg(test)]
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    crc32(&[bytes])
}
