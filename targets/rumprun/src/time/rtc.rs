//! The battery-backed clock (Motorola MC146818), which keeps UTC in virtual machines.

use crate::cpu::regs::{inb, outb};

const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const UPDATING: u8 = 0x80;
const BINARY: u8 = 0x04;
const HOURS_24: u8 = 0x02;
const AFTERNOON: u8 = 0x80;
const CENTURY: u8 = 0x32;

fn read(register: u8) -> u8 {
    // SAFETY: selects and reads a register of the clock; bit 7 keeps NMIs as they are.
    unsafe {
        outb(0x70, register);
        inb(0x71)
    }
}

/// Days from 1970-01-01 to a date of the Gregorian calendar.
fn days(year: u64, month: u64, day: u64) -> u64 {
    // Years begin in March, so that the leap day is the last of a year.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1 - 719_468
}

/// Nanoseconds since 1970 of a date and time, if they can be one: second, minute, hour, day, month, year.
fn since_1970([second, minute, hour, day, month, year]: [u64; 6]) -> Option<u64> {
    if second > 60 || minute > 59 || hour > 23 || !(1..=31).contains(&day) || !(1..=12).contains(&month) {
        return None;
    }
    let seconds = ((days(year, month, day) * 24 + hour) * 60 + minute) * 60 + second;
    Some(seconds * 1_000_000_000)
}

/// Makes numbers of the registers: second, minute, hour, day, month, year, century.
fn decode(mut raw: [u8; 7], status: u8) -> [u64; 6] {
    let afternoon = status & HOURS_24 == 0 && raw[2] & AFTERNOON != 0;
    if status & HOURS_24 == 0 {
        raw[2] &= !AFTERNOON;
    }
    let [second, minute, mut hour, day, month, year, century] = raw
        .map(|value| u64::from(if status & BINARY != 0 { value } else { (value >> 4) * 10 + (value & 15) }));
    if status & HOURS_24 == 0 {
        hour = hour % 12 + if afternoon { 12 } else { 0 };
    }
    let century = if (19..=30).contains(&century) { century } else { 20 };
    [second, minute, hour, day, month, century * 100 + year]
}

/// Nanoseconds since 1970, to the second; `None` without such a clock.
pub(super) fn now_ns() -> Option<u64> {
    let status = read(STATUS_B);
    if status == 0xff {
        return None;
    }
    let all = || [0, 2, 4, 7, 8, 9, CENTURY].map(read);
    let mut last = all();
    // The same twice in a row, with no update under way, was not read across a change.
    for _ in 0..1000 {
        if read(STATUS_A) & UPDATING != 0 {
            continue;
        }
        let now = all();
        if now == last {
            return since_1970(decode(now, status));
        }
        last = now;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_the_calendar() {
        assert_eq!(since_1970([0, 0, 0, 1, 1, 1970]), Some(0));
        assert_eq!(since_1970([40, 46, 1, 9, 9, 2001]), Some(1_000_000_000_000_000_000));
        assert_eq!(since_1970([0, 0, 0, 1, 3, 2024]), Some(1_709_251_200_000_000_000));
        assert_eq!(since_1970([0, 0, 0, 0, 3, 2024]), None);
    }

    #[test]
    fn decodes_both_forms() {
        let expected = [58, 59, 23, 21, 11, 2026];
        assert_eq!(decode([0x58, 0x59, 0x23, 0x21, 0x11, 0x26, 0x20], HOURS_24), expected);
        assert_eq!(decode([58, 59, 23, 21, 11, 26, 20], HOURS_24 | BINARY), expected);
        assert_eq!(decode([0x58, 0x59, 0x91, 0x21, 0x11, 0x26, 0x20], 0), expected);
        // Twelve at night.
        assert_eq!(decode([0, 0, 0x12, 1, 1, 0x26, 0x20], 0)[2], 0);
    }
}
