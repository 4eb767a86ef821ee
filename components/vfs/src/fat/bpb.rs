//! The boot sector: where everything is.
//!
//! Source: "Microsoft Extensible Firmware Initiative FAT32 File System Specification", version 1.03 (*fatgen103* here),
//! sections "Boot Sector and BPB" and "FAT Type Determination".

use super::bytes::{le16, le32};
use anykernel::fs::{FsError, Result};

/// Bytes of the boot sector that are looked at, on devices with any size of sector.
pub(super) const BOOT_BYTES: usize = 512;

/// Width of the entries of the allocation table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Width {
    Fat12,
    Fat16,
    Fat32,
}

/// Where the root directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Root {
    /// FAT12, FAT16: a fixed area. Byte offset and length in bytes.
    Fixed { offset: u64, bytes: u32 },
    /// FAT32: a chain that begins with this cluster.
    Chain(u32),
}

/// What the boot sector says, checked. Offsets and sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) width: Width,
    pub(super) sector_bytes: u32,
    pub(super) cluster_bytes: u32,
    /// Offset of the first allocation table.
    pub(super) fat_offset: u64,
    /// Size of each allocation table.
    pub(super) fat_bytes: u64,
    pub(super) fats: u8,
    /// `Some(n)`: only table n is kept up to date (FAT32 with mirroring off).
    pub(super) only_fat: Option<u8>,
    pub(super) root: Root,
    /// Offset of cluster 2.
    pub(super) data_offset: u64,
    /// Number of clusters; valid ones are `2 .. clusters + 2`.
    pub(super) clusters: u32,
    /// Offset of the FSInfo sector.
    pub(super) fs_info: Option<u64>,
    /// The label in the boot sector.
    pub(super) label: [u8; 11],
    /// Offset of the byte with the "not cleanly unmounted" bit.
    pub(super) state_offset: u64,
    /// That bit was set.
    pub(super) was_dirty: bool,
}

/// The other families that share the first bytes of the boot sector.
fn is_foreign(boot: &[u8]) -> bool {
    matches!(boot.get(3..11), Some(b"EXFAT   " | b"NTFS    "))
}

impl Layout {
    /// Reads a boot sector on a device of `device_bytes`.
    ///
    /// Errors: [`FsError::Unsupported`] for exFAT, NTFS and unknown FAT32 versions, [`FsError::NotAFileSystem`] if this
    /// is no boot sector of a FAT volume, [`FsError::Corrupt`] if it is one that contradicts itself or the device.
    pub(super) fn parse(boot: &[u8; BOOT_BYTES], device_bytes: u64) -> Result<Self> {
        let byte = |at: usize| boot.get(at).copied().unwrap_or(0);
        if is_foreign(boot) {
            return Err(FsError::Unsupported);
        }
        let sector_bytes = u32::from(le16(boot, 11));
        let sectors_per_cluster = u32::from(byte(13));
        let reserved = u32::from(le16(boot, 14));
        let fats = byte(16);
        let root_entries = u32::from(le16(boot, 17));
        let media = byte(21);
        let small_fat = u32::from(le16(boot, 22));
        let plausible = le16(boot, 510) == 0xaa55
            && sector_bytes.is_power_of_two()
            && (512..=4096).contains(&sector_bytes)
            && sectors_per_cluster.is_power_of_two()
            && reserved != 0
            && (1..=4).contains(&fats)
            && (media == 0xf0 || media >= 0xf8);
        if !plausible {
            return Err(FsError::NotAFileSystem);
        }
        let wide = small_fat == 0;
        let fat_sectors = if wide { le32(boot, 36) } else { small_fat };
        let total = match le16(boot, 19) {
            0 => le32(boot, 32),
            small => u32::from(small),
        };
        if fat_sectors == 0 || total == 0 || (wide != (root_entries == 0)) {
            return Err(FsError::NotAFileSystem);
        }
        if !(root_entries * 32).is_multiple_of(sector_bytes) {
            return Err(FsError::Corrupt);
        }
        let in_bytes = |sectors: u64| sectors * u64::from(sector_bytes);
        let root_sectors = u64::from(root_entries * 32 / sector_bytes);
        let root_sector = u64::from(reserved) + u64::from(fats) * u64::from(fat_sectors);
        let data_sector = root_sector + root_sectors;
        let data_sectors = u64::from(total).checked_sub(data_sector).ok_or(FsError::Corrupt)?;
        if in_bytes(u64::from(total)) > device_bytes {
            return Err(FsError::Corrupt);
        }
        // Fits: both are at most 32 bits wide.
        let clusters = u32::try_from(data_sectors / u64::from(sectors_per_cluster)).unwrap_or(0);
        // The count of clusters decides. But where the sector is laid out for FAT32 (no small table, no fixed root), a
        // smaller count is a small FAT32 volume, as mkfs.fat -F 32 makes them and all systems read them.
        let width = match clusters {
            0 => return Err(FsError::Corrupt),
            _ if wide => Width::Fat32,
            1..4085 => Width::Fat12,
            4085..65525 => Width::Fat16,
            _ => return Err(FsError::Corrupt),
        };
        if clusters > 0x0fff_fff5 {
            return Err(FsError::Corrupt);
        }
        let fat_bytes = in_bytes(u64::from(fat_sectors));
        let needed = match width {
            Width::Fat12 => (u64::from(clusters) + 2) * 3 / 2 + (u64::from(clusters) & 1),
            Width::Fat16 => (u64::from(clusters) + 2) * 2,
            Width::Fat32 => (u64::from(clusters) + 2) * 4,
        };
        if fat_bytes < needed {
            return Err(FsError::Corrupt);
        }
        let mut layout = Self {
            width,
            sector_bytes,
            cluster_bytes: sector_bytes * sectors_per_cluster,
            fat_offset: in_bytes(u64::from(reserved)),
            fat_bytes,
            fats,
            only_fat: None,
            root: Root::Fixed { offset: in_bytes(root_sector), bytes: root_entries * 32 },
            data_offset: in_bytes(data_sector),
            clusters,
            fs_info: None,
            label: *b"NO NAME    ",
            state_offset: if wide { 65 } else { 37 },
            was_dirty: byte(if wide { 65 } else { 37 }) & 1 != 0,
        };
        if byte(if wide { 66 } else { 38 }) == 0x29 {
            let at = if wide { 71 } else { 43 };
            if let Some(label) = boot.get(at..at + 11).and_then(|label| label.try_into().ok()) {
                layout.label = label;
            }
        }
        if wide {
            layout.finish_wide(boot, reserved)?;
        }
        Ok(layout)
    }

    /// What only FAT32 has.
    fn finish_wide(&mut self, boot: &[u8], reserved: u32) -> Result<()> {
        let flags = le16(boot, 40);
        if le16(boot, 42) != 0 {
            return Err(FsError::Unsupported);
        }
        if flags & 0x80 != 0 {
            let active = (flags & 0xf) as u8;
            if active >= self.fats {
                return Err(FsError::Corrupt);
            }
            self.only_fat = Some(active);
        }
        let root = le32(boot, 44);
        if !self.is_cluster(root) {
            return Err(FsError::Corrupt);
        }
        self.root = Root::Chain(root);
        let info = u32::from(le16(boot, 48));
        if (1..reserved).contains(&info) {
            self.fs_info = Some(u64::from(info) * u64::from(self.sector_bytes));
        }
        Ok(())
    }

    /// Whether `cluster` is one with data.
    pub(super) fn is_cluster(&self, cluster: u32) -> bool {
        // No overflow: `clusters` is below 2^28.
        (2..self.clusters + 2).contains(&cluster)
    }

    /// Where a valid cluster is on the device.
    pub(super) fn cluster_offset(&self, cluster: u32) -> u64 {
        self.data_offset + u64::from(cluster.saturating_sub(2)) * u64::from(self.cluster_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A FAT16 volume of 20,000 sectors with clusters of 2 KiB.
    fn boot() -> [u8; BOOT_BYTES] {
        let mut boot = [0; BOOT_BYTES];
        boot[..3].copy_from_slice(&[0xeb, 0x3c, 0x90]);
        boot[11..13].copy_from_slice(&512_u16.to_le_bytes());
        boot[13] = 4;
        boot[14] = 1;
        boot[16] = 2;
        boot[17..19].copy_from_slice(&512_u16.to_le_bytes());
        boot[19..21].copy_from_slice(&20_000_u16.to_le_bytes());
        boot[21] = 0xf8;
        boot[22] = 20;
        boot[510..].copy_from_slice(&[0x55, 0xaa]);
        boot
    }

    const BYTES: u64 = 20_000 * 512;

    #[test]
    fn a_small_volume_is_understood() {
        let layout = Layout::parse(&boot(), BYTES).unwrap();
        assert_eq!(layout.width, Width::Fat16);
        assert_eq!(layout.fat_offset, 512);
        assert_eq!(layout.root, Root::Fixed { offset: 41 * 512, bytes: 16384 });
        assert_eq!(layout.data_offset, 73 * 512);
        assert_eq!(layout.clusters, (20_000 - 73) / 4);
        assert!(!layout.is_cluster(1) && layout.is_cluster(2) && !layout.is_cluster(layout.clusters + 2));
    }

    #[test]
    fn the_cluster_count_decides_the_width() {
        for (clusters, width) in [(4084, Width::Fat12), (4085, Width::Fat16), (65524, Width::Fat16)] {
            let mut boot = boot();
            boot[19..21].fill(0);
            boot[22..24].copy_from_slice(&256_u16.to_le_bytes());
            let total: u32 = 1 + 512 + 32 + clusters * 4;
            boot[32..36].copy_from_slice(&total.to_le_bytes());
            let layout = Layout::parse(&boot, u64::from(total) * 512).unwrap();
            assert_eq!((layout.clusters, layout.width), (clusters, width));
            let total = 1 + 512 + 32 + 65525_u32 * 4;
            boot[32..36].copy_from_slice(&total.to_le_bytes());
            assert_eq!(Layout::parse(&boot, 1 << 40), Err(FsError::Corrupt));
        }
    }

    #[test]
    fn contradictions_are_refused() {
        let change = |at: usize, bytes: &[u8]| {
            let mut boot = boot();
            boot[at..at + bytes.len()].copy_from_slice(bytes);
            Layout::parse(&boot, BYTES).map(|layout| layout.width)
        };
        assert_eq!(change(0, &[]), Ok(Width::Fat16));
        assert_eq!(change(3, b"EXFAT   "), Err(FsError::Unsupported));
        assert_eq!(change(3, b"NTFS    "), Err(FsError::Unsupported));
        assert_eq!(change(510, &[0, 0]), Err(FsError::NotAFileSystem));
        assert_eq!(change(11, &[0, 0]), Err(FsError::NotAFileSystem));
        assert_eq!(change(11, &[1, 2]), Err(FsError::NotAFileSystem));
        assert_eq!(change(13, &[0]), Err(FsError::NotAFileSystem));
        assert_eq!(change(13, &[3]), Err(FsError::NotAFileSystem));
        assert_eq!(change(14, &[0, 0]), Err(FsError::NotAFileSystem));
        assert_eq!(change(16, &[0]), Err(FsError::NotAFileSystem));
        assert_eq!(change(17, &[1, 0]), Err(FsError::Corrupt));
        // More sectors than the device has; fewer than the tables take; a table too small for the clusters.
        assert_eq!(change(19, &20_001_u16.to_le_bytes()), Err(FsError::Corrupt));
        assert_eq!(change(19, &[50, 0]), Err(FsError::Corrupt));
        assert_eq!(change(22, &[19, 0]), Err(FsError::Corrupt));
    }

    proptest! {
        #[test]
        fn any_sector_ends_in_a_layout_inside_the_device_or_an_error(
            edits in prop::collection::vec((0..90_usize, any::<u8>()), 0..12), bytes in any::<u32>()
        ) {
            let mut boot = boot();
            for (at, value) in edits {
                boot[at] = value;
            }
            if let Ok(layout) = Layout::parse(&boot, u64::from(bytes)) {
                let last = layout.cluster_offset(layout.clusters + 1) + u64::from(layout.cluster_bytes);
                prop_assert!(last <= u64::from(bytes));
                prop_assert!(layout.fat_offset + layout.fat_bytes * u64::from(layout.fats) <= layout.data_offset);
            }
        }
    }
}
