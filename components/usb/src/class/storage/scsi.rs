//! The few SCSI commands that a disk needs (SPC-4, SBC-3), as bytes. Pure functions.

use alloc::string::String;

/// Length of the INQUIRY data that is asked for.
pub const INQUIRY_LEN: u8 = 36;
/// Length of the sense data that is asked for.
pub const SENSE_LEN: u8 = 18;

/// TEST UNIT READY (SPC-4, 6.47).
pub const TEST_UNIT_READY: [u8; 6] = [0; 6];
/// REQUEST SENSE (SPC-4, 6.39), fixed format.
pub const REQUEST_SENSE: [u8; 6] = [0x03, 0, 0, 0, SENSE_LEN, 0];
/// INQUIRY (SPC-4, 6.6), standard data.
pub const INQUIRY: [u8; 6] = [0x12, 0, 0, 0, INQUIRY_LEN, 0];
/// READ CAPACITY (10) (SBC-3, 5.15).
pub const READ_CAPACITY_10: [u8; 10] = [0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// READ CAPACITY (16) (SBC-3, 5.16), 32 bytes.
pub const READ_CAPACITY_16: [u8; 16] = [0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0];
/// SYNCHRONIZE CACHE (10) (SBC-3, 5.22), all of it.
pub const SYNCHRONIZE_CACHE: [u8; 10] = [0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// MODE SENSE (6) (SPC-4, 6.11), all pages; the first four bytes are what is wanted.
pub const MODE_SENSE: [u8; 6] = [0x1a, 0, 0x3f, 0, 192, 0];

/// READ (10) or WRITE (10), or the forms with 16 bytes where the numbers need them.
pub fn transfer(write: bool, lba: u64, sectors: u32) -> ([u8; 16], usize) {
    let mut command = [0; 16];
    match (u32::try_from(lba), u16::try_from(sectors)) {
        (Ok(lba), Ok(sectors)) => {
            let ([a, b, c, d], [e, f]) = (lba.to_be_bytes(), sectors.to_be_bytes());
            let bytes = [if write { 0x2a } else { 0x28 }, 0, a, b, c, d, 0, e, f, 0];
            command.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
            (command, 10)
        }
        _ => {
            let opcode = [if write { 0x8a } else { 0x8a - 2 }, 0];
            let bytes = opcode.into_iter().chain(lba.to_be_bytes()).chain(sectors.to_be_bytes());
            command.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
            (command, 16)
        }
    }
}

/// What INQUIRY tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inquiry {
    /// Peripheral qualifier and device type: 0 is a disk that is there.
    pub peripheral: u8,
    /// The medium can be taken out.
    pub removable: bool,
    /// Vendor, product and revision, without the blanks.
    pub name: String,
}

impl Inquiry {
    /// Parses standard data; `None`: too short.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let &[peripheral, flags, ..] = bytes.get(..5)? else { return None };
        let mut name = String::new();
        for field in [8..16, 16..32, 32..36] {
            let field = bytes.get(field).unwrap_or_default();
            for word in field.split(|byte| !byte.is_ascii_graphic()).filter(|word| !word.is_empty()) {
                if !name.is_empty() {
                    name.push(' ');
                }
                name.extend(word.iter().copied().map(char::from));
            }
        }
        Some(Self { peripheral, removable: flags & 0x80 != 0, name })
    }
}

/// Size of a medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// How many sectors.
    pub sectors: u64,
    /// Bytes in each.
    pub sector_size: u32,
}

/// The answer to READ CAPACITY (10): the last sector and the sector size. `None`: too short. A last sector of `u32::MAX` asks for the
/// command with 16 bytes.
pub fn capacity_10(bytes: &[u8]) -> Option<(u32, u32)> {
    let &[a, b, c, d, e, f, g, h] = bytes.first_chunk()?;
    Some((u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h])))
}

/// The answer to READ CAPACITY (16), likewise.
pub fn capacity_16(bytes: &[u8]) -> Option<(u64, u32)> {
    let (last, rest) = bytes.split_first_chunk()?;
    Some((u64::from_be_bytes(*last), u32::from_be_bytes(*rest.first_chunk()?)))
}

/// A capacity that a block device can have.
pub fn checked_capacity(last: u64, sector_size: u32) -> Option<Capacity> {
    let sectors = last.checked_add(1)?;
    let sound = sector_size.is_power_of_two() && (512..=4096).contains(&sector_size);
    (sound && sectors.checked_mul(u64::from(sector_size)).is_some())
        .then_some(Capacity { sectors, sector_size })
}

/// Whether MODE SENSE (6) says that the medium is write-protected (SBC-3, 6.4.1). Short data says no.
pub fn write_protected(bytes: &[u8]) -> bool {
    bytes.get(2).is_some_and(|byte| byte & 0x80 != 0)
}

/// What sense data means for the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sense {
    /// Nothing was wrong, or the device recovered by itself.
    Fine,
    /// Not ready yet: ask again soon.
    NotYet,
    /// No medium.
    NoMedium,
    /// Not ready, and will not be by waiting.
    NotReady,
    /// Something changed (a reset, perhaps the medium): ask again.
    Attention {
        /// The medium may be another one.
        medium: bool,
    },
    /// The command or a field of it is not known.
    Illegal,
    /// Write-protected.
    Protected,
    /// Aborted: ask again.
    Aborted,
    /// These sectors, or the device, failed.
    Failed,
}

/// Reads sense data (SPC-4, 4.5), fixed or descriptor format.
pub fn sense(bytes: &[u8]) -> Sense {
    let (key, asc, ascq) = match bytes {
        [0x72 | 0x73 | 0xf2 | 0xf3, key, asc, ascq, ..] => (*key, *asc, *ascq),
        [_, _, key, _, _, _, _, _, _, _, _, _, asc, ascq, ..] => (*key, *asc, *ascq),
        [_, _, key, ..] => (*key, 0, 0),
        _ => return Sense::Failed,
    };
    match (key & 15, asc, ascq) {
        (0 | 1, _, _) => Sense::Fine,
        (2, 0x3a, _) => Sense::NoMedium,
        (2, 0x04, 0x00 | 0x01 | 0x07) => Sense::NotYet,
        (2, _, _) => Sense::NotReady,
        (6, 0x3a, _) => Sense::NoMedium,
        (6, 0x28, _) => Sense::Attention { medium: true },
        (6, _, _) => Sense::Attention { medium: false },
        (5, _, _) => Sense::Illegal,
        (7, _, _) => Sense::Protected,
        (11, _, _) => Sense::Aborted,
        _ => Sense::Failed,
    }
}
