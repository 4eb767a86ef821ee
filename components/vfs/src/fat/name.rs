//! Names: what is allowed, how they compare, and the short alias of a long one.
//!
//! Source: fatgen103, "Short Directory Entries" and "Long File Name Limits and Character Sets".

use alloc::string::String;
use alloc::vec::Vec;
use anykernel::fs::{FsError, Result};

/// Longest name in UTF-16 units.
pub(super) const MAX_UNITS: usize = 255;
/// Most bytes of UTF-8 that those can become.
pub(super) const MAX_BYTES: u32 = 3 * MAX_UNITS as u32;

/// An 8.3 name as stored: padded with spaces, without the dot.
pub(super) type Short = [u8; 11];

/// Code page 437 from 0x80: what short names are written in where nothing else is known (as Linux assumes).
const CP437: &str = concat!(
    "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»",
    "░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}"
);

/// Whether a long name may contain it.
fn is_allowed(c: char) -> bool {
    c >= ' ' && !matches!(c, '"' | '*' | '/' | ':' | '<' | '>' | '?' | '\\' | '|')
}

/// Whether a short name may contain this byte, among ASCII.
fn is_short_ascii(byte: u8) -> bool {
    byte.is_ascii_uppercase() || byte.is_ascii_digit() || b"$%'-_@~`!(){}^#&".contains(&byte)
}

/// Checks a name for a new entry. [`FsError::BadName`]: not UTF-8, too long, forbidden characters, or a dot or space at
/// the end (other systems drop those silently, so that two names would become one).
pub(super) fn check(name: &[u8]) -> Result<&str> {
    let name = core::str::from_utf8(name).map_err(|_| FsError::BadName)?;
    let good = !name.is_empty()
        && !name.ends_with(['.', ' '])
        && name.chars().all(is_allowed)
        && name.encode_utf16().count() <= MAX_UNITS;
    if good { Ok(name) } else { Err(FsError::BadName) }
}

/// A name in capitals, character by character (Unicode's simple mapping: what becomes more than one stays as it is).
pub(super) fn upcase(name: &str) -> impl Iterator<Item = char> {
    name.chars().map(|c| {
        let mut upper = c.to_uppercase();
        match (upper.next(), upper.next()) {
            (Some(upper), None) => upper,
            _ => c,
        }
    })
}

/// Whether two names mean the same entry.
pub(super) fn same(a: &str, b: &str) -> bool {
    upcase(a).eq(upcase(b))
}

/// Equal for names that are the [`same`]. FNV-1a; whoever constructs collisions only slows down lookups in that directory.
pub(super) fn hash(name: &str) -> u64 {
    upcase(name).fold(0xcbf2_9ce4_8422_2325, |hash, c| {
        (hash ^ u64::from(u32::from(c))).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The checksum by which long entries name their short one.
pub(super) fn checksum(short: &Short) -> u8 {
    short.iter().fold(0, |sum: u8, byte| sum.rotate_right(1).wrapping_add(*byte))
}

/// A short name as shown. `case` are the two bits by which Windows NT says that base or extension is in small letters.
pub(super) fn show_short(short: &Short, case: u8) -> String {
    let mut shown = String::new();
    let (base, extension) = short.split_at(8);
    for (part, small) in [(base, case & 0x08 != 0), (extension, case & 0x10 != 0)] {
        let len = part.iter().rposition(|byte| *byte != b' ').map_or(0, |last| last + 1);
        if len > 0 && part.len() == 3 {
            shown.push('.');
        }
        for (index, byte) in part.iter().take(len).enumerate() {
            // 0xe5 at the start would mean "deleted", so 0x05 stands for it.
            let byte = if index == 0 && part.len() == 8 && *byte == 0x05 { 0xe5 } else { *byte };
            let c = match byte {
                0..0x20 | b'/' => '_',
                0x20..0x80 => char::from(byte),
                _ => CP437.chars().nth(usize::from(byte) - 0x80).unwrap_or('_'),
            };
            shown.push(if small { c.to_ascii_lowercase() } else { c });
        }
    }
    shown
}

/// What a long name becomes in 8.3, before it is made unique.
pub(super) struct Basis {
    base: Vec<u8>,
    extension: Vec<u8>,
    /// The long name is exactly this short one: no long entries are needed.
    pub(super) exact: bool,
    hash: u64,
}

impl Basis {
    pub(super) fn new(name: &str) -> Self {
        let (stem, suffix) = match name.rsplit_once('.') {
            // A leading dot starts no extension.
            Some((stem, suffix)) if !stem.trim_matches(['.', ' ']).is_empty() => (stem, suffix),
            _ => (name, ""),
        };
        let convert = |part: &str, most: usize| -> Vec<u8> {
            upcase(part)
                .filter(|c| !matches!(c, ' ' | '.'))
                .map(|c| u8::try_from(c).ok().filter(|byte| is_short_ascii(*byte)).unwrap_or(b'_'))
                .take(most)
                .collect()
        };
        let (mut base, extension) = (convert(stem, 8), convert(suffix, 3));
        if base.is_empty() {
            base.push(b'_');
        }
        let exact = {
            let dot = if extension.is_empty() { 0 } else { 1 };
            name.len() == base.len() + dot + extension.len()
                && name.bytes().all(|byte| byte == b'.' || is_short_ascii(byte))
                && name.bytes().filter(|byte| *byte == b'.').count() == dot
                && name.as_bytes().starts_with(&base)
        };
        Self { base, extension, exact, hash: hash(name) }
    }

    fn with_base(&self, base: &[u8]) -> Short {
        let mut short = [b' '; 11];
        short.iter_mut().zip(base.iter().take(8)).for_each(|(place, byte)| *place = *byte);
        short.iter_mut().skip(8).zip(&self.extension).for_each(|(place, byte)| *place = *byte);
        short
    }

    /// The first alias that `taken` does not know: the exact name if it is one, else NAME~1 to NAME~9, then two
    /// characters and a hash, so that thousands of similar names do not try each other's numbers.
    pub(super) fn pick(&self, mut taken: impl FnMut(&Short) -> Result<bool>) -> Result<Short> {
        if self.exact {
            return Ok(self.with_base(&self.base));
        }
        for number in 1..=9_u8 {
            let mut base: Vec<u8> = self.base.iter().copied().take(6).collect();
            base.extend([b'~', b'0' + number]);
            let short = self.with_base(&base);
            if !taken(&short)? {
                return Ok(short);
            }
        }
        let mut hash = self.hash;
        for _ in 0..0x1_0000 {
            let mut base: Vec<u8> = self.base.iter().copied().take(2).collect();
            for digit in 0..4 {
                let value = (hash >> (4 * digit) & 0xf) as u8;
                base.push(if value < 10 { b'0' + value } else { b'A' + value - 10 });
            }
            base.extend(b"~1");
            let short = self.with_base(&base);
            if !taken(&short)? {
                return Ok(short);
            }
            hash = (hash >> 16 ^ hash).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23).wrapping_add(1);
        }
        Err(FsError::NoSpace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeSet;
    use alloc::format;
    use proptest::prelude::*;

    fn alias(name: &str) -> String {
        let basis = Basis::new(name);
        show_short(&basis.pick(|_| Ok(false)).unwrap(), 0)
    }

    #[test]
    fn aliases() {
        for (name, short) in [
            ("README.TXT", "README.TXT"),
            ("A", "A"),
            ("readme.txt", "README~1.TXT"),
            ("a long name.html", "ALONGN~1.HTM"),
            ("archive.tar.gz", "ARCHIV~1.GZ"),
            (".profile", "PROFIL~1"),
            ("..a.b", "A~1.B"),
            ("naïve.txt", "NA_VE~1.TXT"),
            ("+", "_~1"),
            ("日本", "__~1"),
        ] {
            assert_eq!(alias(name), short, "{name}");
            assert_eq!(Basis::new(name).exact, name == short, "{name}");
        }
    }

    #[test]
    fn thousands_of_similar_names_get_aliases() {
        let mut taken = BTreeSet::new();
        let mut tries = 0;
        for i in 0..5000 {
            let short = Basis::new(&format!("a rather long name, number {i}.data"))
                .pick(|short| {
                    tries += 1;
                    Ok(taken.contains(short))
                })
                .unwrap();
            assert!(taken.insert(short));
        }
        assert!(tries < 5000 * 12, "{tries} tries");
    }

    #[test]
    fn names_are_checked() {
        let long = "x".repeat(255);
        for name in ["a", ".hidden", "a b", "ü", &long, &"😀".repeat(127)] {
            assert_eq!(check(name.as_bytes()), Ok(name));
        }
        let too_long = "x".repeat(256);
        for name in ["", ".", "..", "a.", "a ", "a/b", "a:b", "a\0", "a\n", "a?", "a\\b", &too_long] {
            assert_eq!(check(name.as_bytes()), Err(FsError::BadName), "{name}");
        }
        assert_eq!(check(&"😀".repeat(128).into_bytes()), Err(FsError::BadName));
        assert_eq!(check(b"\xff"), Err(FsError::BadName));
    }

    #[test]
    fn comparison_ignores_case() {
        assert!(same("Straße", "STRAßE"));
        assert!(same("ÄÖÜ.ТЕКСТ", "äöü.текст"));
        assert!(!same("a", "b"));
        assert_eq!(hash("Ünï"), hash("üNÏ"));
    }

    #[test]
    fn short_names_are_shown_in_their_code_page() {
        assert_eq!(show_short(b"\x05BC\x80    T T", 0), "σBCÇ.T T");
        assert_eq!(show_short(b"README  TXT", 0x18), "readme.txt");
        assert_eq!(show_short(b"A/B\x01       ", 0), "A_B_");
        assert_eq!(CP437.chars().count(), 128);
    }

    proptest! {
        #[test]
        fn every_good_name_has_a_legal_alias(name in ".{1,40}") {
            if check(name.as_bytes()).is_ok() {
                let short = Basis::new(&name).pick(|_| Ok(false)).unwrap();
                prop_assert!(short.iter().all(|byte| *byte == b' ' || is_short_ascii(*byte)));
                prop_assert!(short[0] != b' ');
                if Basis::new(&name).exact {
                    prop_assert_eq!(show_short(&short, 0), name);
                }
            }
        }
    }
}
