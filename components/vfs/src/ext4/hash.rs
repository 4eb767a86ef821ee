//! Hashes of names in indexed directories: the "legacy" hash, half MD4 and TEA, over names as signed or unsigned bytes.
//!
//! Half MD4 is MD4 (RFC 1320) with eight steps a round on eight words of input; TEA is Wheeler's and Needham's cipher with
//! sixteen rounds as a compression function.

#[cfg(test)]
use super::bytes::le32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Function {
    Legacy,
    HalfMd4,
    Tea,
}

/// How an index hashes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HashKind {
    function: Function,
    unsigned: bool,
}

impl HashKind {
    /// By the version in the index; `unsigned` as the superblock says for the older versions. `None`: not known here.
    pub(super) fn new(version: u8, unsigned: bool) -> Option<Self> {
        let function = match version % 3 {
            0 => Function::Legacy,
            1 => Function::HalfMd4,
            _ => Function::Tea,
        };
        (version < 6).then_some(Self { function, unsigned: unsigned || version >= 3 })
    }
}

/// The hash of `name`, its lowest bit zero.
pub(super) fn hash(kind: HashKind, seed: &[u32; 4], name: &[u8]) -> u32 {
    // A seed of zeros stands for MD4's own start.
    let mut state =
        if *seed == [0; 4] { [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476] } else { *seed };
    let value = match kind.function {
        Function::Legacy => legacy(name, kind.unsigned),
        Function::HalfMd4 => {
            let mut rest = name;
            loop {
                half_md4(&mut state, &words(rest, kind.unsigned));
                rest = rest.get(32..).unwrap_or_default();
                if rest.is_empty() {
                    break;
                }
            }
            state[1]
        }
        Function::Tea => {
            let mut rest = name;
            loop {
                tea(&mut state, &words(rest, kind.unsigned));
                rest = rest.get(16..).unwrap_or_default();
                if rest.is_empty() {
                    break;
                }
            }
            state[0]
        }
    };
    let value = value & !1;
    // The largest value marks the end of a directory.
    if value == 0xffff_fffe { 0xffff_fffc } else { value }
}

fn widen(byte: u8, unsigned: bool) -> u32 {
    if unsigned { u32::from(byte) } else { i32::from(byte.cast_signed()).cast_unsigned() }
}

fn legacy(name: &[u8], unsigned: bool) -> u32 {
    let (mut before, mut now) = (0x37ab_e8f9u32, 0x12a3_fe2du32);
    for byte in name {
        let mut next = before.wrapping_add(now ^ widen(*byte, unsigned).wrapping_mul(7_152_373));
        if next & 0x8000_0000 != 0 {
            next = next.wrapping_sub(0x7fff_ffff);
        }
        before = now;
        now = next;
    }
    now << 1
}

/// The first `N` words of a name, most significant byte first, filled up with its length.
fn words<const N: usize>(name: &[u8], unsigned: bool) -> [u32; N] {
    let len = name.len() as u32;
    let fill = len | len << 8;
    let fill = fill | fill << 16;
    let name = name.get(..N * 4).unwrap_or(name);
    let mut words = [fill; N];
    for (word, bytes) in words.iter_mut().zip(name.chunks(4)) {
        *word = bytes.iter().fold(fill, |word, byte| widen(*byte, unsigned).wrapping_add(word << 8));
    }
    words
}

fn half_md4(state: &mut [u32; 4], input: &[u32; 8]) {
    const ORDER: [[usize; 8]; 3] =
        [[0, 1, 2, 3, 4, 5, 6, 7], [1, 3, 5, 7, 0, 2, 4, 6], [3, 7, 2, 6, 1, 5, 0, 4]];
    const SHIFTS: [[u32; 4]; 3] = [[3, 7, 11, 19], [3, 5, 9, 13], [3, 9, 11, 15]];
    const ADD: [u32; 3] = [0, 0x5a82_7999, 0x6ed9_eba1];
    let [mut a, mut b, mut c, mut d] = *state;
    for (round, (order, (shifts, add))) in ORDER.iter().zip(SHIFTS.iter().zip(ADD)).enumerate() {
        for (at, shift) in order.iter().zip(shifts.iter().cycle()) {
            let mixed = match round {
                0 => d ^ (b & (c ^ d)),
                1 => (b & c).wrapping_add((b ^ c) & d),
                _ => b ^ c ^ d,
            };
            let word = input.get(*at).copied().unwrap_or(0);
            let sum = a.wrapping_add(mixed).wrapping_add(word).wrapping_add(add).rotate_left(*shift);
            (a, b, c, d) = (d, sum, b, c);
        }
    }
    for (word, value) in state.iter_mut().zip([a, b, c, d]) {
        *word = word.wrapping_add(value);
    }
}

fn tea(state: &mut [u32; 4], key: &[u32; 4]) {
    let [mut x, mut y, ..] = *state;
    let [k0, k1, k2, k3] = *key;
    let mut sum = 0u32;
    for _ in 0..16 {
        sum = sum.wrapping_add(0x9e37_79b9);
        let mix = (y << 4).wrapping_add(k0) ^ y.wrapping_add(sum) ^ (y >> 5).wrapping_add(k1);
        x = x.wrapping_add(mix);
        let mix = (x << 4).wrapping_add(k2) ^ x.wrapping_add(sum) ^ (x >> 5).wrapping_add(k3);
        y = y.wrapping_add(mix);
    }
    state[0] = state[0].wrapping_add(x);
    state[1] = state[1].wrapping_add(y);
}

/// The hash as debugfs prints it, for the tests.
#[cfg(test)]
pub(super) fn of(version: u8, seed: &[u8; 16], name: &[u8]) -> u32 {
    let mut words = [0; 4];
    for (at, word) in words.iter_mut().enumerate() {
        *word = le32(seed, at * 4).unwrap();
    }
    hash(HashKind::new(version, false).unwrap(), &words, name)
}
