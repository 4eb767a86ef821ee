//! Report descriptors (HID 1.11, 6.2.2) and the reports that they describe. Pure functions of bytes.
//!
//! The crates for this panic on descriptors that lie about themselves, so this is ours. Everything is bounded: fields,
//! values, nesting, the length of a report.

use alloc::vec::Vec;

/// Most fields of a device.
pub(super) const MAX_FIELDS: usize = 256;
/// Most values of all fields together.
pub(super) const MAX_VALUES: usize = 2048;
/// Longest report, in bits.
const MAX_BITS: u32 = 8 * 4096;
const MAX_USAGES: usize = 256;
const MAX_DEPTH: u32 = 32;
const MAX_STACK: usize = 8;

/// A usage: page in the upper half.
type Usage = u32;

/// An input field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// Which report it is in; 0: reports have no numbers.
    pub report: u8,
    /// First bit, behind the report's number.
    pub bit: u32,
    /// Bits of each value: 1 to 32.
    pub bits: u32,
    /// How many values.
    pub count: u32,
    /// Each value is the index of a usage that is on, instead of a usage's value.
    pub array: bool,
    /// Values are changes.
    pub relative: bool,
    /// Least and greatest value.
    pub logical: (i32, i32),
    /// What the values (or the indices from the least one on) mean; the last is that of all further ones.
    pub usages: Vec<Usage>,
}

/// What a report descriptor says of the reports that come in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Layout {
    /// Fields with a meaning, in the order of the descriptor.
    pub fields: Vec<Field>,
    /// Reports begin with their number.
    pub numbered: bool,
    /// Length of the longest report, in bytes, its number included.
    pub longest: usize,
}

/// Why a report descriptor is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReportError {
    /// It ends in the middle of an item.
    Short,
    /// Too many fields or values, or too much nesting.
    TooMuch,
    /// A field of no or too many bits.
    Size,
    /// No input at all.
    Empty,
}

#[derive(Clone, Copy, Default)]
struct Globals {
    page: u16,
    logical: (i32, i32),
    /// The greatest value as it would be without a sign.
    unsigned_max: u32,
    size: u32,
    count: u32,
    report: u8,
}

#[derive(Default)]
struct Locals {
    usages: Vec<Usage>,
    min: Option<Usage>,
}

impl Locals {
    fn add(&mut self, usage: Usage) -> Result<(), ReportError> {
        if self.usages.len() >= MAX_USAGES {
            return Err(ReportError::TooMuch);
        }
        self.usages.push(usage);
        Ok(())
    }
}

/// Walks over the items: tag and type, value, and how many bytes that took.
struct Items<'a>(&'a [u8]);

impl Iterator for Items<'_> {
    type Item = Result<(u8, u32, i32, usize), ReportError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (&prefix, rest) = self.0.split_first()?;
        // A long item (6.2.2.3): its length, its tag, its data.
        if prefix == 0xfe {
            let Some(rest) = rest.first().and_then(|len| rest.get(usize::from(*len) + 2..)) else {
                self.0 = &[];
                return Some(Err(ReportError::Short));
            };
            self.0 = rest;
            return Some(Ok((0xfe, 0, 0, 0)));
        }
        let len = [0, 1, 2, 4].get(usize::from(prefix & 3)).copied().unwrap_or(0);
        let Some((bytes, rest)) = rest.split_at_checked(len) else {
            self.0 = &[];
            return Some(Err(ReportError::Short));
        };
        self.0 = rest;
        let (unsigned, signed) = match *bytes {
            [a] => (u32::from(a), i32::from(a as i8)),
            [a, b] => (u32::from(u16::from_le_bytes([a, b])), i32::from(i16::from_le_bytes([a, b]))),
            [a, b, c, d] => (u32::from_le_bytes([a, b, c, d]), i32::from_le_bytes([a, b, c, d])),
            _ => (0, 0),
        };
        Some(Ok((prefix & 0xfc, unsigned, signed, len)))
    }
}

impl Layout {
    /// Parses a report descriptor.
    pub fn parse(bytes: &[u8]) -> Result<Self, ReportError> {
        let mut layout = Self::default();
        let (mut globals, mut locals) = (Globals::default(), Locals::default());
        let mut stack: Vec<Globals> = Vec::new();
        let mut depth = 0u32;
        // Bits so far, by report.
        let mut bits: Vec<(u8, u32)> = Vec::new();
        let mut values = 0u32;
        for item in Items(bytes) {
            let (tag, value, signed, len) = item?;
            match tag {
                // Input.
                0x80 => {
                    let at = match bits.iter_mut().find(|one| one.0 == globals.report) {
                        Some(one) => &mut one.1,
                        None => {
                            bits.push((globals.report, 0));
                            let Some(last) = bits.last_mut() else { return Err(ReportError::TooMuch) };
                            &mut last.1
                        }
                    };
                    let first = *at;
                    let total = globals.size.checked_mul(globals.count).ok_or(ReportError::Size)?;
                    let end = first.checked_add(total).filter(|end| *end <= MAX_BITS);
                    *at = end.ok_or(ReportError::Size)?;
                    // Constants are padding.
                    if value & 1 == 0 && total > 0 && !locals.usages.is_empty() {
                        if !(1..=32).contains(&globals.size) {
                            return Err(ReportError::Size);
                        }
                        values = values.saturating_add(globals.count);
                        if layout.fields.len() >= MAX_FIELDS || values > MAX_VALUES as u32 {
                            return Err(ReportError::TooMuch);
                        }
                        let (low, high) = globals.logical;
                        // Without a sign where the least value has none.
                        let high =
                            if low >= 0 { globals.unsigned_max.min(i32::MAX as u32) as i32 } else { high };
                        layout.fields.push(Field {
                            report: globals.report,
                            bit: first,
                            bits: globals.size,
                            count: globals.count,
                            array: value & 2 == 0,
                            relative: value & 4 != 0,
                            logical: (low, high),
                            usages: core::mem::take(&mut locals.usages),
                        });
                    }
                    locals = Locals::default();
                }
                // Output, feature.
                0x90 | 0xb0 => locals = Locals::default(),
                // Collection, and its end.
                0xa0 => {
                    depth += 1;
                    if depth > MAX_DEPTH {
                        return Err(ReportError::TooMuch);
                    }
                    locals = Locals::default();
                }
                0xc0 => {
                    depth = depth.saturating_sub(1);
                    locals = Locals::default();
                }
                0x04 => globals.page = value as u16,
                0x14 => globals.logical.0 = signed,
                0x24 => (globals.logical.1, globals.unsigned_max) = (signed, value),
                0x74 => globals.size = value,
                0x94 => globals.count = value,
                0x84 => {
                    globals.report = value as u8;
                    layout.numbered = true;
                }
                0xa4 => {
                    if stack.len() >= MAX_STACK {
                        return Err(ReportError::TooMuch);
                    }
                    stack.push(globals);
                }
                0xb4 => globals = stack.pop().unwrap_or(globals),
                // Usage, least usage, greatest usage: with a page of their own if they have four bytes.
                0x08 | 0x18 | 0x28 => {
                    let usage = if len == 4 { value } else { u32::from(globals.page) << 16 | value };
                    match (tag, locals.min.take()) {
                        (0x08, min) => {
                            locals.min = min;
                            locals.add(usage)?;
                        }
                        (0x18, _) => locals.min = Some(usage),
                        (_, Some(min)) => {
                            if usage < min || usage - min >= MAX_USAGES as u32 {
                                return Err(ReportError::TooMuch);
                            }
                            for one in min..=usage {
                                locals.add(one)?;
                            }
                        }
                        (_, None) => {}
                    }
                }
                _ => {}
            }
        }
        if layout.fields.is_empty() {
            return Err(ReportError::Empty);
        }
        let longest = bits.iter().map(|one| one.1).max().unwrap_or(0).div_ceil(8) as usize;
        layout.longest = longest + usize::from(layout.numbered);
        Ok(layout)
    }

    /// What the boot protocol of a keyboard looks like (HID 1.11, B.1).
    pub fn boot_keyboard() -> Self {
        let field = |bit, bits, count, array, logical, usages: core::ops::RangeInclusive<u32>| Field {
            report: 0,
            bit,
            bits,
            count,
            array,
            relative: false,
            logical,
            usages: usages.map(|usage| 7 << 16 | usage).collect(),
        };
        let fields = alloc::vec![
            field(0, 1, 8, false, (0, 1), 0xe0..=0xe7),
            field(16, 8, 6, true, (0, 255), 0..=255),
        ];
        Self { fields, numbered: false, longest: 8 }
    }

    /// What the boot protocol of a mouse looks like (HID 1.11, B.2).
    pub fn boot_mouse() -> Self {
        let field = |bit, bits, count, relative, logical, usages: &[Usage]| Field {
            report: 0,
            bit,
            bits,
            count,
            array: false,
            relative,
            logical,
            usages: usages.to_vec(),
        };
        let fields = alloc::vec![
            field(0, 1, 3, false, (0, 1), &[9 << 16 | 1, 9 << 16 | 2, 9 << 16 | 3]),
            field(8, 8, 2, true, (-127, 127), &[1 << 16 | 0x30, 1 << 16 | 0x31]),
        ];
        Self { fields, numbered: false, longest: 4 }
    }
}

impl Field {
    /// The value at `index`; `None`: the report ends before it.
    pub fn value(&self, report: &[u8], index: u32) -> Option<i32> {
        let first = self.bit.checked_add(self.bits.checked_mul(index)?)?;
        let mut value = 0u64;
        for (position, byte) in (first / 8..=(first + self.bits - 1) / 8).enumerate() {
            value |= u64::from(*report.get(byte as usize)?) << (8 * position);
        }
        let value = (value >> (first % 8)) & (u64::MAX >> (64 - self.bits));
        if self.logical.0 < 0 && self.bits < 32 && value >> (self.bits - 1) != 0 {
            return Some((value as i64 - (1i64 << self.bits)) as i32);
        }
        Some(value as u32 as i32)
    }

    /// What value number `index` is about.
    pub fn usage(&self, index: u32) -> u32 {
        self.usages.get(index as usize).or(self.usages.last()).copied().unwrap_or(0)
    }

    /// The usage that an array's value says is on.
    pub fn selected(&self, value: i32) -> Option<u32> {
        let index = i64::from(value) - i64::from(self.logical.0);
        let inside = value >= self.logical.0 && value <= self.logical.1;
        self.usages.get(usize::try_from(index).ok()?).copied().filter(|_| inside)
    }
}
