//! Network transfer blocks (CDC NCM 1.0, chapter 3), 16-bit form. Pure functions of bytes.

use alloc::vec::Vec;

/// Most datagrams of a block that is taken.
pub(super) const MAX_DATAGRAMS: usize = 1024;
/// Most tables of a block.
const MAX_TABLES: usize = 32;
const HEADER_LEN: usize = 12;
const CRC_LEN: usize = 4;

/// What is wrong with a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NtbError {
    /// No header, or one that contradicts the block's length.
    Header,
    /// A table outside the block, unaligned, or too many.
    Table,
    /// A datagram outside the block.
    Datagram,
    /// Datagrams that overlap, or too many.
    TooMuch,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_le_bytes([*bytes.get(at)?, *bytes.get(at.checked_add(1)?)?])))
}

/// Hands every datagram of a block to `sink`, and says how many there were. What came before an error was handed over.
pub fn parse(block: &[u8], sink: &mut dyn FnMut(&[u8])) -> Result<usize, NtbError> {
    if !block.starts_with(b"NCMH") || u16_at(block, 4) != Some(HEADER_LEN) {
        return Err(NtbError::Header);
    }
    // 0: as long as the transfer.
    let len = match u16_at(block, 8).ok_or(NtbError::Header)? {
        0 => block.len(),
        len => len,
    };
    let block = block.get(..len).ok_or(NtbError::Header)?;
    let mut table = u16_at(block, 10).ok_or(NtbError::Header)?;
    let (mut count, mut bytes) = (0, 0);
    for _ in 0..MAX_TABLES {
        if table == 0 {
            return Ok(count);
        }
        let head = block.get(table..).and_then(|rest| rest.first_chunk::<8>()).ok_or(NtbError::Table)?;
        let crc = match head {
            _ if !table.is_multiple_of(4) => return Err(NtbError::Table),
            [b'N', b'C', b'M', b'0', ..] => 0,
            [b'N', b'C', b'M', b'1', ..] => CRC_LEN,
            _ => return Err(NtbError::Table),
        };
        let &[.., l0, l1, n0, n1] = head;
        let (len, next) = (u16::from_le_bytes([l0, l1]), u16::from_le_bytes([n0, n1]));
        let end = table.checked_add(usize::from(len)).ok_or(NtbError::Table)?;
        let entries = block.get(table + 8..end).ok_or(NtbError::Table)?;
        for entry in entries.as_chunks::<4>().0 {
            let [i0, i1, l0, l1] = *entry;
            let (at, len) =
                (usize::from(u16::from_le_bytes([i0, i1])), usize::from(u16::from_le_bytes([l0, l1])));
            if at == 0 || len == 0 {
                break;
            }
            let datagram = block.get(at..at + len).ok_or(NtbError::Datagram)?;
            let datagram = datagram.get(..len.saturating_sub(crc)).unwrap_or_default();
            count += 1;
            bytes += len;
            if count > MAX_DATAGRAMS || bytes > block.len() {
                return Err(NtbError::TooMuch);
            }
            sink(datagram);
        }
        table = usize::from(next);
    }
    Err(NtbError::Table)
}

/// How a device wants its blocks (GET_NTB_PARAMETERS, 6.2.1), made sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NtbParameters {
    /// Largest block from the device, in bytes: 2048 to 65,535.
    pub in_max: u32,
    /// Largest block to the device: 2048 to 16,384 are used.
    pub out_max: u32,
    /// Datagrams begin at multiples of this, plus `remainder`.
    pub divisor: u16,
    /// See `divisor`.
    pub remainder: u16,
    /// Tables begin at multiples of this.
    pub alignment: u16,
}

impl NtbParameters {
    /// Parses the 28 bytes. `None`: too short, or blocks too small for a frame.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let half = |at: usize| u16_at(bytes, at).map(|value| value as u16);
        let (in_max, out_max) = (word(4)?, word(16)?);
        if in_max < 2048 || out_max < 2048 {
            return None;
        }
        let power = |value: u16, least: u16| {
            if value.is_power_of_two() && (least..=1024).contains(&value) { value } else { least }
        };
        let divisor = half(20)?.clamp(1, 1024);
        Some(Self {
            in_max: in_max.min(65_535),
            out_max: out_max.min(16_384),
            divisor,
            remainder: half(22)? % divisor,
            alignment: power(half(24)?, 4),
        })
    }
}

/// A block that is being filled with frames.
pub struct Builder {
    parameters: NtbParameters,
    bytes: Vec<u8>,
    entries: Vec<(u16, u16)>,
}

impl Builder {
    /// An empty block.
    pub fn new(parameters: NtbParameters) -> Self {
        Self { parameters, bytes: alloc::vec![0; HEADER_LEN], entries: Vec::new() }
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Adds a frame; `false`: it does not fit any more.
    pub fn add(&mut self, frame: &[u8]) -> bool {
        let NtbParameters { divisor, remainder, out_max, alignment, .. } = self.parameters;
        let (divisor, remainder) = (usize::from(divisor), usize::from(remainder));
        let len = self.bytes.len();
        let mut at = len.next_multiple_of(divisor) + remainder;
        if at >= len + divisor {
            at -= divisor;
        }
        // The table behind it: its head, an entry for each datagram, and an empty one.
        let table =
            (at + frame.len()).next_multiple_of(usize::from(alignment)) + 8 + 4 * (self.entries.len() + 2);
        if table > out_max as usize || frame.is_empty() || self.entries.len() >= MAX_DATAGRAMS {
            return false;
        }
        self.bytes.resize(at, 0);
        self.bytes.extend_from_slice(frame);
        self.entries.push((at as u16, frame.len() as u16));
        true
    }

    /// The finished block.
    pub fn finish(mut self, sequence: u16) -> Vec<u8> {
        let table = self.bytes.len().next_multiple_of(usize::from(self.parameters.alignment));
        self.bytes.resize(table, 0);
        self.bytes.extend_from_slice(b"NCM0");
        let len = 8 + 4 * (self.entries.len() + 1);
        for half in [len as u16, 0] {
            self.bytes.extend_from_slice(&half.to_le_bytes());
        }
        for (at, len) in self.entries.iter().copied().chain([(0, 0)]) {
            self.bytes.extend_from_slice(&at.to_le_bytes());
            self.bytes.extend_from_slice(&len.to_le_bytes());
        }
        let total = self.bytes.len() as u16;
        let mut header = b"NCMH".to_vec();
        for half in [HEADER_LEN as u16, sequence, total, table as u16] {
            header.extend_from_slice(&half.to_le_bytes());
        }
        self.bytes.iter_mut().zip(header).for_each(|(to, from)| *to = from);
        self.bytes
    }
}
