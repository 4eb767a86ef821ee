//! The superblock ("The Super Block" in the kernel's ext4 documentation, `Documentation/filesystems/ext4/super.rst`).

use super::bytes::{join, le16, le32};
use super::checksum::crc32c;
use alloc::format;
use alloc::string::String;
use anykernel::fs::FsError;

/// Where it is on the device, in bytes, and how long.
pub(super) const OFFSET: u64 = 1024;
pub(super) const LEN: usize = 1024;

const MAGIC: u16 = 0xef53;

pub(super) mod incompat {
    pub(crate) const RECOVER: u32 = 0x4;
    pub(crate) const META_BG: u32 = 0x10;
    pub(crate) const BIT64: u32 = 0x80;
    pub(crate) const CSUM_SEED: u32 = 0x2000;
    pub(crate) const LARGEDIR: u32 = 0x4000;
}

pub(super) mod ro_compat {
    pub(crate) const SPARSE_SUPER: u32 = 0x1;
    pub(crate) const HUGE_FILE: u32 = 0x8;
    pub(crate) const GDT_CSUM: u32 = 0x10;
    pub(crate) const METADATA_CSUM: u32 = 0x400;
}

pub(super) mod compat {
    pub(crate) const DIR_INDEX: u32 = 0x20;
    pub(crate) const SPARSE_SUPER2: u32 = 0x200;
}

/// Incompatible features by bit: their name, and whether this reader understands an image that has them.
const INCOMPAT: [(u32, &str, bool); 16] = [
    (0x1, "compression", false),
    (0x2, "filetype", true),
    (0x4, "needs_recovery", true),
    (0x8, "journal_dev", false),
    (0x10, "meta_bg", true),
    (0x40, "extent", true),
    (0x80, "64bit", true),
    (0x100, "mmp", true),
    (0x200, "flex_bg", true),
    (0x400, "ea_inode", true),
    (0x1000, "dirdata", false),
    (0x2000, "metadata_csum_seed", true),
    (0x4000, "large_dir", true),
    (0x8000, "inline_data", true),
    (0x10000, "encrypt", true),
    (0x20000, "casefold", true),
];

/// Why a superblock is refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) error: FsError,
    pub(super) line: String,
}

fn corrupt(what: &str) -> Refused {
    Refused {
        error: FsError::Corrupt,
        line: format!("the ext4 superblock is corrupt ({what}): run e2fsck on the image"),
    }
}

/// A superblock whose numbers were checked against each other and the device.
#[derive(Debug, Clone)]
pub(super) struct Superblock {
    pub(super) block_size: u32,
    pub(super) blocks: u64,
    pub(super) free_blocks: u64,
    pub(super) inodes: u32,
    pub(super) first_data_block: u32,
    pub(super) blocks_per_group: u32,
    pub(super) inodes_per_group: u32,
    pub(super) inode_size: u16,
    pub(super) descriptor_size: u16,
    pub(super) first_meta_group: u32,
    pub(super) backup_groups: [u32; 2],
    pub(super) compat: u32,
    pub(super) incompat: u32,
    pub(super) ro_compat: u32,
    pub(super) uuid: [u8; 16],
    pub(super) checksum_seed: u32,
    pub(super) hash_seed: [u32; 4],
    /// Directory hashes take names as unsigned bytes.
    pub(super) unsigned_hash: bool,
    pub(super) journal_inode: u32,
    pub(super) external_journal: bool,
    pub(super) label: String,
}

impl Superblock {
    pub(super) fn is_ext4(bytes: &[u8]) -> bool {
        le16(bytes, 0x38) == Some(MAGIC)
    }

    pub(super) fn has(&self, feature: u32) -> bool {
        self.incompat & feature != 0
    }

    pub(super) fn has_ro(&self, feature: u32) -> bool {
        self.ro_compat & feature != 0
    }

    pub(super) fn metadata_checksums(&self) -> bool {
        self.has_ro(ro_compat::METADATA_CSUM)
    }

    /// Reads the 1,024 bytes of a superblock on a device of `device_bytes`.
    pub(super) fn parse(bytes: &[u8], device_bytes: u64) -> Result<Self, Refused> {
        if !Self::is_ext4(bytes) {
            let line = "there is no ext2, ext3 or ext4 file system on it: check the image";
            return Err(Refused { error: FsError::NotAFileSystem, line: line.into() });
        }
        let u16_at = |at| le16(bytes, at).ok_or_else(|| corrupt("it is cut short"));
        let u32_at = |at| le32(bytes, at).ok_or_else(|| corrupt("it is cut short"));
        let revision = u32_at(0x4c)?;
        let (compat, incompat, ro_compat) =
            if revision == 0 { (0, 0, 0) } else { (u32_at(0x5c)?, u32_at(0x60)?, u32_at(0x64)?) };
        // Before anything else: a feature may change what the other fields mean.
        check_features(incompat)?;
        if ro_compat & ro_compat::METADATA_CSUM != 0 {
            let stored = u32_at(0x3fc)?;
            if bytes.get(..0x3fc).map(|covered| crc32c(!0, covered)) != Some(stored) {
                return Err(corrupt("its checksum is wrong"));
            }
        }
        let log_block_size = u32_at(0x18)?;
        if log_block_size > 6 {
            return Err(corrupt("block size"));
        }
        let block_size = 1024u32 << log_block_size;
        let bit64 = incompat & incompat::BIT64 != 0;
        let high = |at| if bit64 { u32_at(at) } else { Ok(0) };
        let blocks = join(high(0x150)?, u32_at(0x4)?);
        let free_blocks = join(high(0x158)?, u32_at(0xc)?);
        let first_data_block = u32_at(0x14)?;
        let blocks_per_group = u32_at(0x20)?;
        let inodes_per_group = u32_at(0x28)?;
        let inodes = u32_at(0x0)?;
        let (inode_size, descriptor_size) = match revision {
            0 => (128, 32),
            _ => (u16_at(0x58)?, if bit64 { u16_at(0xfe)? } else { 32 }),
        };
        if first_data_block > 1 || u64::from(first_data_block) >= blocks {
            return Err(corrupt("first block"));
        }
        let bytes_needed = blocks
            .checked_mul(u64::from(block_size))
            .filter(|needed| *needed < 1 << 62)
            .ok_or_else(|| corrupt("number of blocks"))?;
        if bytes_needed > device_bytes {
            let line = format!(
                "the image is truncated: its ext4 file system has {bytes_needed} bytes, the device only {device_bytes}: copy the whole image"
            );
            return Err(Refused { error: FsError::Corrupt, line });
        }
        // A bitmap of one block covers a group (of clusters, with bigalloc).
        let cluster_ratio = u32_at(0x1c)?.saturating_sub(log_block_size).min(16);
        if blocks_per_group == 0 || u64::from(blocks_per_group) > u64::from(8 * block_size) << cluster_ratio {
            return Err(corrupt("blocks per group"));
        }
        if inodes_per_group == 0 || inodes_per_group > 8 * block_size {
            return Err(corrupt("inodes per group"));
        }
        let groups = (blocks - u64::from(first_data_block)).div_ceil(u64::from(blocks_per_group));
        let groups = u32::try_from(groups).map_err(|_| corrupt("number of groups"))?;
        if u64::from(inodes) != u64::from(groups) * u64::from(inodes_per_group) {
            return Err(corrupt("number of inodes"));
        }
        if !inode_size.is_power_of_two() || inode_size < 128 || u32::from(inode_size) > block_size {
            return Err(corrupt("inode size"));
        }
        let least = if bit64 { 64 } else { 32 };
        if !descriptor_size.is_power_of_two() || !(least..=1024).contains(&descriptor_size) {
            return Err(corrupt("group descriptor size"));
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(bytes.get(0x68..0x78).ok_or_else(|| corrupt("it is cut short"))?);
        if ro_compat & ro_compat::METADATA_CSUM != 0 && bytes.get(0x175) != Some(&1) {
            let line = "its checksums are of an unknown kind: use crc32c (mkfs.ext4's default)";
            return Err(Refused { error: FsError::Unsupported, line: line.into() });
        }
        let checksum_seed =
            if incompat & incompat::CSUM_SEED != 0 { u32_at(0x270)? } else { crc32c(!0, &uuid) };
        let label = bytes.get(0x78..0x88).unwrap_or_default();
        let label = label.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(Self {
            block_size,
            blocks,
            free_blocks,
            inodes,
            first_data_block,
            blocks_per_group,
            inodes_per_group,
            inode_size,
            descriptor_size,
            first_meta_group: u32_at(0x104)?,
            backup_groups: [u32_at(0x24c)?, u32_at(0x250)?],
            compat,
            incompat,
            ro_compat,
            uuid,
            checksum_seed,
            hash_seed: [u32_at(0xec)?, u32_at(0xf0)?, u32_at(0xf4)?, u32_at(0xf8)?],
            unsigned_hash: u32_at(0x160)? & 2 != 0,
            journal_inode: u32_at(0xe0)?,
            external_journal: u32_at(0xe4)? != 0,
            label: String::from_utf8_lossy(label).into_owned(),
        })
    }
}

fn check_features(incompat: u32) -> Result<(), Refused> {
    let unknown = incompat & !INCOMPAT.iter().fold(0, |all, (bit, _, _)| all | bit);
    let refused = INCOMPAT.iter().find(|(bit, _, known)| !known && incompat & bit != 0);
    let line = match refused {
        Some((_, name, _)) => format!(
            "it has the ext4 feature {name}, which is not supported: make the image without it (mkfs.ext4 -O ^{name})"
        ),
        None if unknown != 0 => format!(
            "it has ext4 features that are not known here (incompat 0x{unknown:x}): make the image without them"
        ),
        None => return Ok(()),
    };
    Err(Refused { error: FsError::Unsupported, line })
}
