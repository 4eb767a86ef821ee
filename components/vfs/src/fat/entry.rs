//! Directory entries: 32 bytes each; a name that is not 8.3 has up to 20 more in front of its entry.
//!
//! Source: fatgen103, "FAT Directory Structure" and "FAT Long Directory Entries".

use super::bytes::{le16, le32, put};
use super::name::{self, Basis, Short};
use super::time::DosTime;
use alloc::string::String;
use alloc::vec::Vec;
use anykernel::fs::{FileKind, FsError, Result};

/// Bytes per entry, here called a slot.
pub(super) const SLOT: usize = 32;
/// First byte of a slot that is free, with more behind it.
pub(super) const DELETED: u8 = 0xe5;
/// First byte of a slot that is free, as are all behind it.
const END: u8 = 0;

const ATTR_READ_ONLY: u8 = 0x01;
const ATTR_VOLUME: u8 = 0x08;
const ATTR_DIRECTORY: u8 = 0x10;
const ATTR_ARCHIVE: u8 = 0x20;
const ATTR_LONG: u8 = 0x0f;
/// The bits of the attribute that have a meaning.
const ATTR_MASK: u8 = 0x3f;

/// UTF-16 units in one long entry, and where they are.
const UNITS: usize = 13;
const UNIT_OFFSETS: [usize; UNITS] = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30];
/// Most long entries of a name.
const MAX_LONG: usize = 20;
/// Marks the long entry that comes first.
const LAST_LONG: u8 = 0x40;

/// A short entry: what a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry(pub(super) [u8; SLOT]);

impl Entry {
    pub(super) fn new(short: &Short, kind: FileKind, start: u32, now: DosTime) -> Self {
        let mut entry = Self([0; SLOT]);
        put(&mut entry.0, 0, short);
        put(&mut entry.0, 11, &[if kind == FileKind::Directory { ATTR_DIRECTORY } else { ATTR_ARCHIVE }]);
        put(&mut entry.0, 14, &now.time.to_le_bytes());
        put(&mut entry.0, 16, &now.date.to_le_bytes());
        entry.set_start(start);
        entry.set_modified(now);
        entry
    }

    pub(super) fn short(&self) -> Short {
        self.0.first_chunk().copied().unwrap_or_default()
    }

    /// Gives the entry another name.
    pub(super) fn set_short(&mut self, short: &Short) {
        put(&mut self.0, 0, short);
        // The name's case bits went with the old name.
        put(&mut self.0, 12, &[0]);
    }

    fn attributes(&self) -> u8 {
        self.0.get(11).copied().unwrap_or(0)
    }

    pub(super) fn case(&self) -> u8 {
        self.0.get(12).copied().unwrap_or(0)
    }

    pub(super) fn kind(&self) -> FileKind {
        if self.attributes() & ATTR_DIRECTORY != 0 { FileKind::Directory } else { FileKind::File }
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.attributes() & ATTR_READ_ONLY != 0
    }

    /// First cluster; 0: none.
    pub(super) fn start(&self) -> u32 {
        u32::from(le16(&self.0, 26)) | u32::from(le16(&self.0, 20)) << 16
    }

    pub(super) fn set_start(&mut self, start: u32) {
        let [a, b, c, d] = start.to_le_bytes();
        put(&mut self.0, 26, &[a, b]);
        put(&mut self.0, 20, &[c, d]);
    }

    pub(super) fn size(&self) -> u32 {
        le32(&self.0, 28)
    }

    pub(super) fn set_size(&mut self, size: u32) {
        put(&mut self.0, 28, &size.to_le_bytes());
    }

    pub(super) fn modified(&self) -> DosTime {
        DosTime { date: le16(&self.0, 24), time: le16(&self.0, 22) }
    }

    pub(super) fn accessed(&self) -> DosTime {
        DosTime { date: le16(&self.0, 18), time: 0 }
    }

    /// Also marks the entry as changed since the last backup.
    pub(super) fn set_modified(&mut self, time: DosTime) {
        put(&mut self.0, 22, &time.time.to_le_bytes());
        put(&mut self.0, 24, &time.date.to_le_bytes());
        put(&mut self.0, 18, &time.date.to_le_bytes());
        if self.kind() == FileKind::File {
            let attributes = self.attributes() | ATTR_ARCHIVE;
            put(&mut self.0, 11, &[attributes]);
        }
    }

    /// Takes over everything but the name.
    pub(super) fn set_content(&mut self, from: &Entry) {
        let short = self.short();
        let case = self.case();
        *self = *from;
        self.set_short(&short);
        put(&mut self.0, 12, &[case]);
    }

    fn is_dot(&self) -> bool {
        matches!(&self.short(), b".          " | b"..         ")
    }
}

/// An entry with its name and place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// The slot of the short entry.
    pub(super) slot: u32,
    /// The first slot, of the first long entry if there is one.
    pub(super) first_slot: u32,
    pub(super) entry: Entry,
    /// As shown: the long name, or the short one if there is none that can be shown.
    pub(super) name: String,
}

/// What a slot turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// The end of the directory.
    End,
    /// Free.
    Free,
    /// Part of a name, or a dot entry.
    Part,
    /// The volume's label.
    Label(Short),
    /// An entry is complete.
    Entry(Found),
}

/// Puts names together while slots go by in order.
pub(super) struct Parser {
    units: [u16; MAX_LONG * UNITS],
    len: usize,
    /// The number of the next long entry to come; 0 when all were seen.
    next: u8,
    checksum: u8,
    first_slot: Option<u32>,
}

impl Parser {
    pub(super) fn new() -> Self {
        Self { units: [0; MAX_LONG * UNITS], len: 0, next: 0, checksum: 0, first_slot: None }
    }

    pub(super) fn feed(&mut self, slot: u32, bytes: &[u8; SLOT]) -> Seen {
        let [first, ..] = *bytes;
        let entry = Entry(*bytes);
        match first {
            END | DELETED => {
                self.first_slot = None;
                return if first == END { Seen::End } else { Seen::Free };
            }
            _ if entry.attributes() & ATTR_MASK == ATTR_LONG => {
                self.feed_long(slot, bytes);
                return Seen::Part;
            }
            _ => {}
        }
        let long = self.first_slot.take().filter(|_| self.next == 0);
        if entry.attributes() & ATTR_VOLUME != 0 {
            return Seen::Label(entry.short());
        }
        if entry.is_dot() {
            return Seen::Part;
        }
        let long = long.filter(|_| self.checksum == name::checksum(&entry.short()));
        let name = long.and_then(|_| self.name());
        Seen::Entry(Found {
            slot,
            first_slot: long.unwrap_or(slot),
            entry,
            name: name.unwrap_or_else(|| name::show_short(&entry.short(), entry.case())),
        })
    }

    fn feed_long(&mut self, slot: u32, bytes: &[u8; SLOT]) {
        let [order, ..] = *bytes;
        let checksum = bytes.get(13).copied().unwrap_or(0);
        let number = order & !LAST_LONG;
        if order & LAST_LONG != 0 {
            self.first_slot = Some(slot).filter(|_| (1..=MAX_LONG).contains(&usize::from(number)));
            self.checksum = checksum;
            self.len = usize::from(number).min(MAX_LONG) * UNITS;
        } else if self.next == 0 || number != self.next || checksum != self.checksum {
            self.first_slot = None;
        }
        self.next = number.saturating_sub(1);
        if self.first_slot.is_none() {
            return;
        }
        let place = self.units.iter_mut().skip(usize::from(self.next) * UNITS);
        for (unit, at) in place.zip(UNIT_OFFSETS) {
            *unit = le16(bytes, at);
        }
    }

    /// The long name, if it is one that can be shown and found again.
    fn name(&self) -> Option<String> {
        let units = self.units.get(..self.len)?;
        let len = units.iter().position(|unit| *unit == 0).unwrap_or(units.len());
        let name: String =
            char::decode_utf16(units.get(..len)?.iter().copied()).collect::<Result<_, _>>().ok()?;
        let bad = name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']);
        (!bad && len <= name::MAX_UNITS).then_some(name)
    }
}

/// All slots of an entry in order: the long entries, if the name needs them, then the entry.
pub(super) fn encode(name: &str, basis: &Basis, entry: &Entry) -> Result<Vec<[u8; SLOT]>> {
    let units: Vec<u16> = if basis.exact { Vec::new() } else { name.encode_utf16().collect() };
    let count = units.len().div_ceil(UNITS);
    if count > MAX_LONG {
        return Err(FsError::BadName);
    }
    let checksum = name::checksum(&entry.short());
    let mut slots = Vec::new();
    for number in (0..count).rev() {
        let mut slot = [0; SLOT];
        let mark = if number + 1 == count { LAST_LONG } else { 0 };
        put(&mut slot, 0, &[(number as u8 + 1) | mark]);
        put(&mut slot, 11, &[ATTR_LONG]);
        put(&mut slot, 13, &[checksum]);
        for (index, at) in UNIT_OFFSETS.iter().enumerate() {
            let position = number * UNITS + index;
            // One zero ends the name, then ones fill the entry.
            let filler = if position == units.len() { 0 } else { 0xffff };
            let unit = units.get(position).copied().unwrap_or(filler);
            put(&mut slot, *at, &unit.to_le_bytes());
        }
        slots.push(slot);
    }
    slots.push(entry.0);
    Ok(slots)
}

/// The two entries with which every directory but the root begins. `parent` is 0 for the root.
pub(super) fn dots(own: u32, parent: u32, now: DosTime) -> [u8; 2 * SLOT] {
    let mut slots = [0; 2 * SLOT];
    put(&mut slots, 0, &Entry::new(b".          ", FileKind::Directory, own, now).0);
    put(&mut slots, SLOT, &Entry::new(b"..         ", FileKind::Directory, parent, now).0);
    slots
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use proptest::prelude::*;

    fn now() -> DosTime {
        DosTime::from_seconds(1_700_000_000)
    }

    fn round_trip(name: &str) -> Found {
        let basis = Basis::new(name);
        let short = basis.pick(|_| Ok(false)).unwrap();
        let entry = Entry::new(&short, FileKind::File, 0x1234_5678, now());
        let slots = encode(name, &basis, &entry).unwrap();
        let mut parser = Parser::new();
        let last = slots.len() - 1;
        for (slot, bytes) in slots.iter().enumerate() {
            match parser.feed(slot as u32, bytes) {
                Seen::Entry(found) if slot == last => return found,
                Seen::Part => {}
                other => panic!("{other:?}"),
            }
        }
        unreachable!()
    }

    proptest! {
        #[test]
        fn names_come_back(name in "\\PC{1,255}") {
            if name::check(name.as_bytes()).is_ok() {
                let found = round_trip(&name);
                prop_assert_eq!(found.name, name);
                prop_assert_eq!(found.first_slot, 0);
                prop_assert_eq!(found.entry.start(), 0x1234_5678);
            }
        }

        #[test]
        fn any_bytes_are_parsed(slots in prop::collection::vec(any::<[u8; 32]>(), 0..64), long in any::<bool>()) {
            let mut parser = Parser::new();
            for (slot, mut bytes) in slots.into_iter().enumerate() {
                if long {
                    bytes[11] = 0x0f;
                    bytes[0] &= 0x5f;
                }
                if let Seen::Entry(found) = parser.feed(slot as u32, &bytes) {
                    prop_assert!(!found.name.contains(['/', '\0']));
                    prop_assert!(found.first_slot <= found.slot);
                }
            }
        }
    }

    #[test]
    fn a_broken_long_name_gives_way_to_the_short_one() {
        let name = "a name that takes three entries.txt";
        let basis = Basis::new(name);
        let entry = Entry::new(&basis.pick(|_| Ok(false)).unwrap(), FileKind::File, 0, now());
        let slots = encode(name, &basis, &entry).unwrap();
        assert_eq!(slots.len(), 4);
        let parse = |slots: &[[u8; 32]]| {
            let mut parser = Parser::new();
            slots.iter().enumerate().find_map(|(slot, bytes)| match parser.feed(slot as u32, bytes) {
                Seen::Entry(found) => Some((found.name, found.first_slot)),
                _ => None,
            })
        };
        assert_eq!(parse(&slots), Some((name.to_string(), 0)));
        let short = |slot| Some(("ANAMET~1.TXT".to_string(), slot));
        assert_eq!(parse(&[slots[1], slots[2], slots[3]]), short(2));
        assert_eq!(parse(&[slots[0], slots[2], slots[3]]), short(2));
        assert_eq!(parse(&[slots[0], slots[1], slots[3]]), short(2));
        let mut other = slots.clone();
        other[1][13] ^= 1;
        assert_eq!(parse(&other), short(3));
        // An unpaired surrogate cannot be shown.
        let mut other = slots;
        other[2][1..3].copy_from_slice(&0xd800_u16.to_le_bytes());
        assert_eq!(parse(&other), short(0).map(|(name, _)| (name, 0)));
    }
}
