//! The table in the first sector, and the chain of tables in an extended partition.

use super::{Extent, Reader, le32};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use anykernel::block::BlockError;
use hypercall::Host;

const PROTECTIVE: u8 = 0xee;
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// Logical partitions are numbered from here.
const FIRST_LOGICAL: u32 = 5;
/// More tables than this are a loop.
const MAX_LOGICAL: u32 = 128;

#[derive(Clone, Copy)]
struct Entry {
    kind: u8,
    first: u32,
    count: u32,
}

pub(super) struct Table {
    /// There is a GPT, and this table only keeps old programs away from it.
    pub(super) protective: bool,
    entries: [Entry; 4],
}

fn entries(sector: &[u8]) -> Option<[Entry; 4]> {
    if sector.get(510..512)? != [0x55, 0xaa] {
        return None;
    }
    let mut entries = [Entry { kind: 0, first: 0, count: 0 }; 4];
    for (index, entry) in entries.iter_mut().enumerate() {
        let bytes = sector.get(446 + index * 16..462 + index * 16)?;
        // Anything else is not a table: boot sectors of FAT have the same signature.
        if bytes.first()? & 0x7f != 0 {
            return None;
        }
        *entry = Entry { kind: *bytes.get(4)?, first: le32(bytes, 8)?, count: le32(bytes, 12)? };
    }
    Some(entries)
}

/// Reads the first sector of a disk. `None`: that is no partition table.
pub(super) fn parse(sector: &[u8], sectors: u64) -> Option<Table> {
    let entries = entries(sector)?;
    let used = || entries.iter().filter(|entry| entry.kind != 0);
    if used().any(|entry| entry.first == 0 || u64::from(entry.first) >= sectors) {
        return None;
    }
    Some(Table { protective: used().any(|entry| entry.kind == PROTECTIVE), entries })
}

/// The partitions of a table, logical ones after the others.
pub(super) fn read<H: Host>(
    reader: &Reader<'_, H>,
    table: &Table,
    refused: &mut Vec<String>,
) -> Result<Vec<Extent>, BlockError> {
    let mut found = Vec::new();
    for (number, entry) in (1..).zip(table.entries) {
        if entry.kind != 0 && !EXTENDED.contains(&entry.kind) {
            found.push(Extent { number, first: u64::from(entry.first), count: u64::from(entry.count) });
        }
    }
    if let Some(extended) = table.entries.iter().find(|entry| EXTENDED.contains(&entry.kind)) {
        logical(reader, *extended, &mut found, refused)?;
    }
    Ok(found)
}

fn logical<H: Host>(
    reader: &Reader<'_, H>,
    extended: Entry,
    found: &mut Vec<Extent>,
    refused: &mut Vec<String>,
) -> Result<(), BlockError> {
    let base = u64::from(extended.first);
    let end = (base + u64::from(extended.count)).min(reader.sectors());
    let mut table = base;
    for number in FIRST_LOGICAL..FIRST_LOGICAL + MAX_LOGICAL {
        if table >= end {
            refused.push(format!("the table of partition {number} is outside the extended partition"));
            return Ok(());
        }
        let Some([part, link, ..]) = entries(&reader.read(table, 1)?) else {
            refused.push(format!("the table of partition {number} is damaged"));
            return Ok(());
        };
        if part.kind != 0 {
            // Counted from its own table; the link from the first.
            let first = table + u64::from(part.first);
            if part.first == 0 || first + u64::from(part.count) > end {
                refused.push(format!("partition {number} is not inside the extended partition"));
            } else {
                found.push(Extent { number, first, count: u64::from(part.count) });
            }
        }
        if !EXTENDED.contains(&link.kind) {
            return Ok(());
        }
        table = base + u64::from(link.first);
    }
    refused.push(format!("more than {MAX_LOGICAL} logical partitions, or a loop"));
    Ok(())
}
