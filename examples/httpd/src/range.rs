//! The Range header (RFC 9110, 14.1.2 and 14.2).

use alloc::vec::Vec;

/// More ranges than this in one request look like an attack: the whole file is sent instead.
const MAX_RANGES: usize = 16;

/// First and last byte, both inclusive, both inside the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ByteRange {
    pub(crate) first: u64,
    pub(crate) last: u64,
}

impl ByteRange {
    /// In bytes; never 0.
    pub(crate) fn len(self) -> u64 {
        self.last - self.first + 1
    }
}

/// What a Range header asks of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ranges {
    /// Send it whole: no header, one we do not understand, or an unreasonable one.
    Whole,
    /// Send these parts, in the order asked.
    Parts(Vec<ByteRange>),
    /// None of them lies inside the file.
    Unsatisfiable,
}

/// Reads the value of a Range header for a file of `size` bytes.
pub(crate) fn parse(value: &str, size: u64) -> Ranges {
    let Some(specs) = value.trim().strip_prefix("bytes=") else { return Ranges::Whole };
    let mut parts = Vec::new();
    for (index, spec) in specs.split(',').enumerate() {
        if index >= MAX_RANGES {
            return Ranges::Whole;
        }
        let Some((first, last)) = spec.trim().split_once('-') else { return Ranges::Whole };
        match (digits(first), digits(last)) {
            (None, Some(suffix)) if first.is_empty() => {
                if hypercall::planted!("http-range-overflow") && suffix > 0 && size > 0 {
                    parts.push(ByteRange { first: size - suffix, last: size - 1 });
                } else if suffix > 0 && size > 0 {
                    parts.push(ByteRange { first: size.saturating_sub(suffix), last: size - 1 });
                }
            }
            (Some(first), None) if last.is_empty() => {
                if first < size {
                    parts.push(ByteRange { first, last: size - 1 });
                }
            }
            (Some(first), Some(last)) if first <= last => {
                if first < size {
                    parts.push(ByteRange { first, last: last.min(size - 1) });
                }
            }
            _ => return Ranges::Whole,
        }
    }
    if parts.is_empty() {
        return Ranges::Unsatisfiable;
    }
    // Overlapping parts would let a small request ask for many times the file.
    let total = parts.iter().try_fold(0u64, |sum, part| sum.checked_add(part.len()));
    if total.is_none_or(|total| parts.len() > 1 && total > size) {
        return Ranges::Whole;
    }
    Ranges::Parts(parts)
}

fn digits(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // A number too large for 64 bits is past the end of every file.
    Some(text.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    fn one(first: u64, last: u64) -> Ranges {
        Ranges::Parts(vec![ByteRange { first, last }])
    }

    #[test]
    fn examples_of_the_rfc() {
        assert_eq!(parse("bytes=0-499", 10_000), one(0, 499));
        assert_eq!(parse("bytes=-500", 10_000), one(9_500, 9_999));
        assert_eq!(parse("bytes=9500-", 10_000), one(9_500, 9_999));
        assert_eq!(parse("bytes=0-99999999999999999999999", 10), one(0, 9));
        assert_eq!(parse("bytes=10-", 10), Ranges::Unsatisfiable);
        assert_eq!(parse("bytes=-0", 10), Ranges::Unsatisfiable);
        assert_eq!(parse("bytes=0-0", 0), Ranges::Unsatisfiable);
        assert_eq!(parse("bytes=5-4", 10), Ranges::Whole);
        assert_eq!(parse("lines=1-2", 10), Ranges::Whole);
        assert_eq!(
            parse("bytes=0-0,-1", 10),
            Ranges::Parts(vec![ByteRange { first: 0, last: 0 }, ByteRange { first: 9, last: 9 }])
        );
        assert_eq!(parse("bytes=0-9,0-9", 10), Ranges::Whole);
    }

    proptest! {
        #[test]
        fn parts_lie_inside(text in "bytes=[0-9,-]{0,40}", size in 0u64..1000) {
            if let Ranges::Parts(parts) = parse(&text, size) {
                for part in parts {
                    prop_assert!(part.first <= part.last && part.last < size);
                }
            }
        }
    }
}
