//! HTTP dates (RFC 9110, 5.6.7): written as IMF-fixdate, read in all three forms.

use alloc::format;
use alloc::string::String;
use anykernel::calendar;

const DAYS: [&str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];
const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// `Sun, 06 Nov 1994 08:49:37 GMT`. Years outside 0 to 9999 are clamped.
pub(crate) fn format_http(seconds: i64) -> String {
    let seconds = seconds.clamp(-62_167_219_200, 253_402_300_799);
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = calendar::date(days);
    // 1970-01-01 was a Thursday.
    let weekday = DAYS.get((days + 3).rem_euclid(7) as usize).copied().unwrap_or("Mon");
    let month = MONTHS.get(month as usize - 1).copied().unwrap_or("Jan");
    format!(
        "{weekday}, {day:02} {month} {year:04} {:02}:{:02}:{:02} GMT",
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

/// Reads a date in any of the three forms; `None` if it is none.
pub(crate) fn parse_http(text: &str) -> Option<i64> {
    let mut words = text.split_ascii_whitespace();
    let first = words.next()?;
    let (day, month, year, time);
    if let Some(weekday) = first.strip_suffix(',') {
        let second = words.next()?;
        if second.contains('-') {
            // RFC 850: Sunday, 06-Nov-94 08:49:37 GMT
            let mut parts = second.split('-');
            day = parts.next()?;
            month = parts.next()?;
            let short: i64 = parts.next().filter(|year| year.len() == 2)?.parse().ok()?;
            year = if short < 70 { short + 2000 } else { short + 1900 };
        } else {
            // IMF-fixdate: Sun, 06 Nov 1994 08:49:37 GMT
            DAYS.iter().find(|known| **known == weekday)?;
            day = second;
            month = words.next()?;
            year = words.next().filter(|year| year.len() == 4)?.parse().ok()?;
        }
        time = words.next()?;
        (words.next()? == "GMT").then_some(())?;
    } else {
        // asctime: Sun Nov  6 08:49:37 1994
        DAYS.iter().find(|known| **known == first)?;
        month = words.next()?;
        day = words.next()?;
        time = words.next()?;
        year = words.next().filter(|year| year.len() == 4)?.parse().ok()?;
    }
    if words.next().is_some() {
        return None;
    }
    let day: u32 = day.parse().ok().filter(|day| (1..=31).contains(day))?;
    let month = MONTHS.iter().position(|known| *known == month)? as u32 + 1;
    let mut parts = time.split(':').map(|part| part.parse::<i64>().ok().filter(|_| part.len() == 2));
    let (hour, minute, second) = (parts.next()??, parts.next()??, parts.next()??);
    if parts.next().is_some() || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    Some(calendar::days(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_the_three_forms_of_the_rfc() {
        for text in
            ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"]
        {
            assert_eq!(parse_http(text), Some(784_111_777), "{text}");
        }
        assert_eq!(format_http(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(parse_http("yesterday"), None);
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(seconds in -62_167_219_200i64..253_402_300_800) {
            prop_assert_eq!(parse_http(&format_http(seconds)), Some(seconds));
        }

        #[test]
        fn garbage_does_not_panic(text in ".{0,60}") {
            let _ = parse_http(&text);
        }
    }
}
