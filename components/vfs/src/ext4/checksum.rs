//! The checksums of ext4: CRC-32C without final inversion, and CRC-16 for old group descriptors.

/// CRC-32C (Castagnoli, reflected) tables for eight bytes at a time.
static TABLES: [[u32; 256]; 8] = tables();

#[expect(clippy::indexing_slicing, reason = "evaluated when compiled")]
const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut table = 1;
    while table < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[table - 1][byte];
            tables[table][byte] = before >> 8 ^ tables[0][(before & 0xff) as usize];
            byte += 1;
        }
        table += 1;
    }
    tables
}

fn entry(table: usize, value: u32) -> u32 {
    #[expect(clippy::indexing_slicing, reason = "a byte indexes 256 entries, and there are eight tables")]
    TABLES[table][(value & 0xff) as usize]
}

/// Goes on with a CRC-32C; begin with `!0`.
pub(super) fn crc32c(mut crc: u32, bytes: &[u8]) -> u32 {
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        let word = u64::from_le_bytes(*word);
        let low = crc ^ word as u32;
        let high = (word >> 32) as u32;
        crc = entry(7, low)
            ^ entry(6, low >> 8)
            ^ entry(5, low >> 16)
            ^ entry(4, low >> 24)
            ^ entry(3, high)
            ^ entry(2, high >> 8)
            ^ entry(1, high >> 16)
            ^ entry(0, high >> 24);
    }
    for byte in rest {
        crc = crc >> 8 ^ entry(0, crc ^ u32::from(*byte));
    }
    crc
}

/// Goes on with a CRC-16 (ANSI, reflected); begin with `!0`.
pub(super) fn crc16(mut crc: u16, bytes: &[u8]) -> u16 {
    for byte in bytes {
        crc ^= u16::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xa001 } else { crc >> 1 };
        }
    }
    crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        // RFC 3720, B.4.
        assert_eq!(!crc32c(!0, &[0; 32]), 0x8a91_36aa);
        assert_eq!(!crc32c(!0, b"123456789"), 0xe306_9283);
        let bytes: std::vec::Vec<u8> = (0..100).collect();
        assert_eq!(crc32c(crc32c(!0, &bytes[..13]), &bytes[13..]), crc32c(!0, &bytes));
        // CRC-16/MODBUS has this polynomial and start.
        assert_eq!(crc16(!0, b"123456789"), 0x4b37);
    }
}
