//! What single devices need done differently: a table of data, and entries that a user adds.

use alloc::vec::Vec;

bitflags::bitflags! {
    /// Deviations from the specifications, and the letter by which each is written (those that Linux's `usb-storage.quirks` has
    /// too are the same there).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Quirks: u32 {
        /// `c`: READ CAPACITY tells one sector too many.
        const CAPACITY_TOO_LARGE = 1;
        /// `r`: the residue in status wrappers is garbage.
        const IGNORE_RESIDUE = 2;
        /// `s`: at most 64 sectors in one command.
        const SMALL_TRANSFERS = 4;
        /// `l`: only unit 0 is real, and asking for more does harm.
        const SINGLE_LUN = 8;
        /// `i`: no driver shall take it.
        const IGNORE_DEVICE = 16;
        /// `t`: asking for strings does harm.
        const NO_STRINGS = 32;
    }
}

/// An entry of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuirkEntry {
    /// `idVendor`.
    pub vendor: u16,
    /// `idProduct`.
    pub product: u16,
    /// What is different.
    pub quirks: Quirks,
}

const fn entry(vendor: u16, product: u16, quirks: Quirks) -> QuirkEntry {
    QuirkEntry { vendor, product, quirks }
}

/// Known devices, by vendor and product.
pub const TABLE: &[QuirkEntry] = &[
    // Alcor flash drives.
    entry(0x058f, 0x6387, Quirks::SMALL_TRANSFERS),
    // Apple iPods.
    entry(0x05ac, 0x1202, Quirks::CAPACITY_TOO_LARGE),
    entry(0x05ac, 0x1203, Quirks::CAPACITY_TOO_LARGE),
    entry(0x05ac, 0x1204, Quirks::CAPACITY_TOO_LARGE),
    entry(0x05ac, 0x1205, Quirks::CAPACITY_TOO_LARGE),
    // Genesys Logic USB-IDE bridges.
    entry(0x05e3, 0x0701, Quirks::SMALL_TRANSFERS.union(Quirks::IGNORE_RESIDUE)),
    entry(0x05e3, 0x0702, Quirks::SMALL_TRANSFERS.union(Quirks::IGNORE_RESIDUE)),
    // A Feiya card reader.
    entry(0x090c, 0x1132, Quirks::CAPACITY_TOO_LARGE),
    // JMicron USB-ATA bridges.
    entry(0x152d, 0x2329, Quirks::IGNORE_RESIDUE),
];

/// What the entries say of a device, all together.
pub fn quirks_of(entries: &[QuirkEntry], vendor: u16, product: u16) -> Quirks {
    let matching = entries.iter().filter(|one| (one.vendor, one.product) == (vendor, product));
    matching.fold(Quirks::empty(), |all, one| all.union(one.quirks))
}

/// Reads entries as a user writes them: `vvvv:pppp:letters`, separated by commas. `Err`: the one that is none.
pub fn parse(text: &str) -> Result<Vec<QuirkEntry>, &str> {
    let one = |text: &str| {
        let mut parts = text.split(':');
        let vendor = u16::from_str_radix(parts.next()?, 16).ok()?;
        let product = u16::from_str_radix(parts.next()?, 16).ok()?;
        let mut quirks = Quirks::empty();
        for letter in parts.next()?.chars() {
            quirks |= match letter {
                'c' => Quirks::CAPACITY_TOO_LARGE,
                'r' => Quirks::IGNORE_RESIDUE,
                's' => Quirks::SMALL_TRANSFERS,
                'l' => Quirks::SINGLE_LUN,
                'i' => Quirks::IGNORE_DEVICE,
                't' => Quirks::NO_STRINGS,
                _ => return None,
            };
        }
        parts.next().is_none().then_some(QuirkEntry { vendor, product, quirks })
    };
    text.split(',').filter(|part| !part.is_empty()).map(|part| one(part).ok_or(part)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_add_up() {
        let mine = parse("05e3:0701:l,1234:abcd:irt").unwrap();
        assert_eq!(mine.len(), 2);
        let all: Vec<_> = TABLE.iter().chain(&mine).copied().collect();
        let found = quirks_of(&all, 0x05e3, 0x0701);
        assert_eq!(found, Quirks::SMALL_TRANSFERS | Quirks::IGNORE_RESIDUE | Quirks::SINGLE_LUN);
        let found = quirks_of(&all, 0x1234, 0xabcd);
        assert_eq!(found, Quirks::IGNORE_DEVICE | Quirks::IGNORE_RESIDUE | Quirks::NO_STRINGS);
        assert_eq!(quirks_of(&all, 1, 1), Quirks::empty());
        for wrong in ["1", "1:2", "1:2:z", "12345:1:r", "1:2:r:4"] {
            assert_eq!(parse(wrong), Err(wrong));
        }
        assert_eq!(parse(""), Ok(Vec::new()));
    }

    #[test]
    fn the_table_is_sorted_and_names_nobody_twice() {
        assert!(TABLE.is_sorted_by(|a, b| (a.vendor, a.product) < (b.vendor, b.product)));
    }
}
