//! Bulk-only transport (USB Mass Storage Class, Bulk-Only Transport 1.0): its wrappers, and what a status wrapper means.
//! Pure functions of bytes.

use alloc::boxed::Box;

/// Length of a command block wrapper.
pub const CBW_LEN: usize = 31;
/// Length of a command status wrapper.
pub const CSW_LEN: usize = 13;

/// Which way the data of a command goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To the host, or there is none.
    In,
    /// To the device.
    Out,
}

/// A command block wrapper (5.1). `command` is cut to 16 bytes.
pub fn command_wrapper(tag: u32, data_len: u32, direction: Direction, lun: u8, command: &[u8]) -> Box<[u8]> {
    let command = command.get(..16).unwrap_or(command);
    let flags = if direction == Direction::In { 0x80 } else { 0 };
    let mut bytes = alloc::vec::Vec::with_capacity(CBW_LEN);
    bytes.extend_from_slice(b"USBC");
    bytes.extend_from_slice(&tag.to_le_bytes());
    bytes.extend_from_slice(&data_len.to_le_bytes());
    bytes.extend_from_slice(&[flags, lun & 15, command.len() as u8]);
    bytes.extend_from_slice(command);
    bytes.resize(CBW_LEN, 0);
    bytes.into_boxed_slice()
}

/// What a status wrapper says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The command was carried out; of its data, `residue` bytes were not.
    Passed {
        /// In bytes, at most the length of the data.
        residue: u32,
    },
    /// It was not; REQUEST SENSE says why.
    Failed,
    /// The device asks for a reset recovery (phase error).
    Phase,
    /// Not valid or not meaningful (6.3): reset recovery.
    Invalid,
}

/// Judges a status wrapper of the command `tag` with `data_len` bytes of data (6.3).
pub fn judge_status(bytes: &[u8], tag: u32, data_len: u32) -> Verdict {
    let Ok(&[b'U', b'S', b'B', b'S', t0, t1, t2, t3, r0, r1, r2, r3, status]) =
        <&[u8; CSW_LEN]>::try_from(bytes)
    else {
        return Verdict::Invalid;
    };
    if u32::from_le_bytes([t0, t1, t2, t3]) != tag {
        return Verdict::Invalid;
    }
    let residue = u32::from_le_bytes([r0, r1, r2, r3]);
    match status {
        0 if residue <= data_len => Verdict::Passed { residue },
        1 if residue <= data_len => Verdict::Failed,
        2 => Verdict::Phase,
        _ => Verdict::Invalid,
    }
}
