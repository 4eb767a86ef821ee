//! Names for backtraces: a table of all functions, put into the image after linking.
//!
//! Layout, little endian: `u32` count; count times `u32` distance of the function from the start of the image and `u32`
//! offset of its name in the table, in order of distance; names, each a length byte and UTF-8.

use crate::boot::start_info::Range;
use core::sync::atomic::{AtomicU64, Ordering};

/// Start and end address of the table; 0 when the image was linked without. Filled in by whoever packs the image.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".data.symbols")]
static SYMBOL_TABLE: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

/// Where the table is, in whole pages.
pub(crate) fn range() -> Range {
    let [start, end] = [0, 1].map(|index: usize| SYMBOL_TABLE[index].load(Ordering::Relaxed));
    Range { start, end: end.next_multiple_of(4096) }
}

fn table() -> &'static [u8] {
    let [start, end] = [0, 1].map(|index: usize| SYMBOL_TABLE[index].load(Ordering::Relaxed) as usize);
    if start == 0 {
        return &[];
    }
    // SAFETY: the packer put the table there, as part of the loaded image.
    unsafe { core::slice::from_raw_parts(core::ptr::with_exposed_provenance(start), end - start) }
}

fn word(table: &[u8], at: usize) -> Option<usize> {
    let bytes = table.get(at..)?.first_chunk::<4>()?;
    Some(u32::from_le_bytes(*bytes) as usize)
}

/// The function at `distance` bytes after the image's start, and how far into it that is.
fn find(table: &[u8], distance: usize) -> Option<(&str, usize)> {
    let count = word(table, 0)?;
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = (low + high) / 2;
        if word(table, 4 + middle * 8)? <= distance {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    let index = low.checked_sub(1)?;
    let name = word(table, 8 + index * 8)?;
    let len = usize::from(*table.get(name)?);
    let name = core::str::from_utf8(table.get(name + 1..name + 1 + len)?).ok()?;
    Some((name, distance - word(table, 4 + index * 8)?))
}

/// The function that `address` is in, and how far into it.
pub(crate) fn lookup(address: usize) -> Option<(&'static str, usize)> {
    let [start, text_end, ..] = crate::memory::image();
    if !(start..text_end).contains(&address) {
        return None;
    }
    find(table(), address - start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn finds_the_function_before_an_address() {
        let mut table: Vec<u8> = Vec::new();
        for word in [2u32, 0x10, 20, 0x40, 24] {
            table.extend(word.to_le_bytes());
        }
        table.extend(b"\x03one\x03two");
        assert_eq!(find(&table, 0xf), None);
        assert_eq!(find(&table, 0x10), Some(("one", 0)));
        assert_eq!(find(&table, 0x3f), Some(("one", 0x2f)));
        assert_eq!(find(&table, 0x44), Some(("two", 4)));
        for len in 0..table.len() {
            // A cut table gives no answer, and no panic.
            find(&table[..len], 0x44);
        }
    }
}
