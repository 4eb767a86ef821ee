//! The file of a recording: [`MAGIC`], then chunks of length, checksum and bytes. The first holds a header, the others records,
//! cut anywhere. A file that ends anywhere is good up to its last whole chunk.

/// How a recording begins.
pub const MAGIC: &[u8; 8] = b"AKREC01\n";

/// A chunk whose checksum is wrong, and the byte where it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CorruptChunk(pub usize);

/// The chunk that begins at byte `at`, and where the next one does; `None` if it is cut, or there is none.
pub fn take_chunk(bytes: &[u8], at: usize) -> Result<Option<(&[u8], usize)>, CorruptChunk> {
    let Some((len, rest)) = bytes.get(at..).and_then(|rest| rest.split_first_chunk()) else {
        return Ok(None);
    };
    let Some((crc, rest)) = rest.split_first_chunk() else { return Ok(None) };
    let Some(content) = rest.get(..u32::from_le_bytes(*len) as usize) else { return Ok(None) };
    if crc32(content) != u32::from_le_bytes(*crc) {
        return Err(CorruptChunk(at));
    }
    Ok(Some((content, at + 8 + content.len())))
}

/// IEEE 802.3, 3.2.9, reflected.
pub fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let (mut table, mut index) = ([0; 256], 0);
        while index < 256 {
            let (mut value, mut bit) = (index as u32, 0);
            while bit < 8 {
                value = if value & 1 != 0 { value >> 1 ^ 0xedb8_8320 } else { value >> 1 };
                bit += 1;
            }
            table[index] = value;
            index += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc, byte| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ byte)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn the_checksum_is_ethernets() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn chunks_are_whole_cut_or_corrupt() {
        let mut file: Vec<u8> = MAGIC.to_vec();
        for content in [&b"header"[..], b""] {
            file.extend((content.len() as u32).to_le_bytes());
            file.extend(crc32(content).to_le_bytes());
            file.extend(content);
        }
        assert_eq!(take_chunk(&file, 8), Ok(Some((&b"header"[..], 22))));
        assert_eq!(take_chunk(&file, 22), Ok(Some((&b""[..], 30))));
        for at in [30, 31, usize::MAX] {
            assert_eq!(take_chunk(&file, at), Ok(None));
        }
        assert_eq!(take_chunk(&file[..21], 8), Ok(None));
        file[20] ^= 1;
        assert_eq!(take_chunk(&file, 8), Err(CorruptChunk(8)));
        file[8..12].fill(0xff);
        assert_eq!(take_chunk(&file, 8), Ok(None));
    }
}
