//! What was probably meant, for messages about names that do not exist.

use alloc::vec::Vec;

/// The candidate that `word` was probably meant to be: at most half of its letters are wrong, of an odd number one more if
/// the first is right. Case matters.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let near = candidates.into_iter().filter_map(|candidate| {
        let distance = distance(word, candidate);
        let begins = candidate.chars().next() == word.chars().next();
        let most = (candidate.len().max(word.len()) + usize::from(begins)) / 2;
        (distance <= most).then_some((distance, !begins, candidate))
    });
    near.min().map(|(.., candidate)| candidate)
}

/// How many letters must be inserted, removed or replaced to make one word from the other (Levenshtein's distance). Of
/// words longer than 32 bytes only the beginning counts.
fn distance(one: &str, other: &str) -> usize {
    const MOST: usize = 32;
    let (one, other) = (one.as_bytes(), other.as_bytes());
    let one = one.get(..one.len().min(MOST)).unwrap_or(one);
    let other = other.get(..other.len().min(MOST)).unwrap_or(other);
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (index, a) in (1..).zip(one) {
        // What was in the row above, to the left; and what is to the left in this row.
        let (mut diagonal, mut left) = (index - 1, index);
        for (cell, b) in row.iter_mut().skip(1).zip(other) {
            let best = (diagonal + usize::from(a != b)).min(*cell + 1).min(left + 1);
            diagonal = core::mem::replace(cell, best);
            left = best;
        }
        if let Some(first) = row.first_mut() {
            *first = index;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_was_meant() {
        let names = || ["httpd", "selftest", "log"];
        assert_eq!(nearest("htpd", names()), Some("httpd"));
        assert_eq!(nearest("self-test", names()), Some("selftest"));
        assert_eq!(nearest("lgo", names()), Some("log"));
        assert_eq!(nearest("vsf", ["net", "usb", "vfs"]), Some("vfs"));
        assert_eq!(nearest("zzz", names()), None);
        assert_eq!(nearest("foo", names()), None);
        assert_eq!(nearest("", names()), None);
        assert_eq!(nearest("a", []), None);
    }

    #[test]
    fn distances() {
        for (one, other, expected) in [
            ("", "", 0),
            ("ipv5", "ipv4", 1),
            ("kitten", "sitting", 3),
            ("", "abc", 3),
            ("abc", "", 3),
            ("dns", "sdn", 2),
        ] {
            assert_eq!(distance(one, other), expected, "{one} {other}");
        }
    }
}
