//! Sizes as people write them.

/// `64M`, `1G`, `512K`, or bytes; binary multiples.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        _ => return Err("write a size as in 64M or 1G".into()),
    };
    let number: u64 = digits.parse().map_err(|_| "write a size as in 64M or 1G")?;
    number.checked_mul(1 << shift).ok_or_else(|| "that is more than there is".into())
}

/// A size with at most three digits, as in `1.4M`.
pub(super) fn human(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["", "K", "M", "G", "T"] {
        if value < 1024.0 {
            return if unit.is_empty() || value >= 10.0 {
                format!("{value:.0}{unit}")
            } else {
                format!("{value:.1}{unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.0}P")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse("64M"), Ok(64 << 20));
        assert_eq!(parse("1g"), Ok(1 << 30));
        assert_eq!(parse("4096"), Ok(4096));
        for bad in ["", "M", "-1", "1X", "99999999999G"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert_eq!((human(999), human(1536), human(64 << 20)), ("999".into(), "1.5K".into(), "64M".into()));
    }
}
