//! Times as directories keep them: local time without a zone, here UTC; from 1980 to 2107 in steps of 2 s.
//!
//! Source: fatgen103, "Date and Time Formats".

use anykernel::calendar;
use anykernel::fs::Timestamp;

const DAY: i64 = 86_400;
/// 1980-01-01 00:00:00.
const FIRST: i64 = 315_532_800;
/// 2107-12-31 23:59:58.
const LAST: i64 = 4_354_819_198;

/// A date and a time of day, as stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DosTime {
    pub(super) date: u16,
    pub(super) time: u16,
}

impl DosTime {
    /// Rounded down to what can be stored, and moved into the range that can.
    pub(super) fn from_seconds(seconds: i64) -> Self {
        let seconds = seconds.clamp(FIRST, LAST);
        let (days, second) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
        let (year, month, day) = calendar::date(days);
        Self {
            date: ((year - 1980) << 9) as u16 | (month << 5 | day) as u16,
            time: (((second / 3600) << 11) | ((second / 60 % 60) << 5) | (second % 60 / 2)) as u16,
        }
    }

    /// The moment. Fields out of range (month 13, hour 31) count on; they do no harm.
    pub(super) fn timestamp(self) -> Timestamp {
        let (date, time) = (u32::from(self.date), i64::from(self.time));
        let (year, month, day) = (1980 + i64::from(date >> 9), (date >> 5 & 15).max(1), (date & 31).max(1));
        let days = calendar::days(year, month, day);
        let seconds = days * DAY + (time >> 11) * 3600 + (time >> 5 & 63) * 60 + (time & 31) * 2;
        Timestamp { seconds, nanos: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments() {
        for (seconds, date, time) in [
            (FIRST, 0x0021, 0),
            // 2000-02-29 12:34:56 and 2024-12-31 23:59:58.
            (951_827_696, (20 << 9) | (2 << 5) | 29, (12 << 11) | (34 << 5) | 28),
            (1_735_689_598, (44 << 9) | (12 << 5) | 31, (23 << 11) | (59 << 5) | 29),
            (LAST, (127 << 9) | (12 << 5) | 31, (23 << 11) | (59 << 5) | 29),
        ] {
            let dos = DosTime { date, time };
            assert_eq!(DosTime::from_seconds(seconds), dos);
            assert_eq!(dos.timestamp().seconds, seconds);
        }
        assert_eq!(DosTime::from_seconds(0).timestamp().seconds, FIRST);
        assert_eq!(DosTime::from_seconds(i64::MAX).timestamp().seconds, LAST);
    }

    #[test]
    fn every_day_and_any_bits() {
        for day in FIRST / DAY..=LAST / DAY {
            assert_eq!(DosTime::from_seconds(day * DAY).timestamp().seconds, day * DAY);
        }
        for bits in 0..=u16::MAX {
            DosTime { date: bits, time: bits }.timestamp();
        }
    }
}
