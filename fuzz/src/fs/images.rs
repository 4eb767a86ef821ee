//! The images that mutations start from, made by `seeds` with the tools of other people and kept packed.
//!
//! Packed: a 32-bit length in bytes, then runs: a 32-bit count of units of 16 bytes, little-endian, and the units. With the
//! high bit of the count there is one unit only, which is repeated.

use std::sync::OnceLock;

const UNIT: usize = 16;
const REPEATED: u32 = 1 << 31;

/// Packs an image.
pub fn pack(image: &[u8]) -> Vec<u8> {
    let mut packed = (image.len() as u32).to_le_bytes().to_vec();
    let mut padded = image.to_vec();
    padded.resize(image.len().next_multiple_of(UNIT), 0);
    let units: Vec<&[u8]> = padded.chunks(UNIT).collect();
    let repeats = |at: usize| units[at..].iter().take_while(|unit| **unit == units[at]).count();
    let mut at = 0;
    while at < units.len() {
        let same = repeats(at);
        if same > 2 {
            packed.extend((same as u32 | REPEATED).to_le_bytes());
            packed.extend(units[at]);
            at += same;
        } else {
            let end = (at + 1..units.len()).find(|next| repeats(*next) > 2).unwrap_or(units.len());
            packed.extend(((end - at) as u32).to_le_bytes());
            packed.extend(units[at..end].concat());
            at = end;
        }
    }
    packed
}

/// Undoes it.
pub fn unpack(packed: &[u8]) -> Vec<u8> {
    let word = |at: usize| u32::from_le_bytes(packed[at..at + 4].try_into().expect("4 bytes"));
    let (mut image, mut at) = (Vec::new(), 4);
    while at < packed.len() {
        let count = (word(at) & !REPEATED) as usize;
        let (times, units) = if word(at) & REPEATED != 0 { (count, 1) } else { (1, count) };
        at += 4;
        image.extend(packed[at..at + units * UNIT].repeat(times));
        at += units * UNIT;
    }
    image.truncate(word(0) as usize);
    image
}

macro_rules! images {
    ($name:ident: $($file:literal),*) => {
        /// Unpacked once.
        pub fn $name() -> &'static [Vec<u8>] {
            static IMAGES: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
            IMAGES.get_or_init(|| vec![$(unpack(include_bytes!(concat!("../../images/", $file)))),*])
        }
    };
}

images!(ext4: "ext4.img", "ext4-nocsum.img", "ext2.img", "ext4-inline.img", "ext4-dirty.img", "ext4-htree.img");
images!(fat: "fat12.img", "fat16.img", "fat32.img");
images!(tables: "mbr.img", "gpt.img");

#[cfg(test)]
mod tests {
    #[test]
    fn packing_loses_nothing() {
        for image in [vec![], vec![0; 100], vec![1; 33], [vec![0; 40], vec![2; 40], vec![0; 7]].concat()] {
            assert_eq!(super::unpack(&super::pack(&image)), image);
        }
    }
}
