//! Randomness: ChaCha20 with fast key erasure, seeded by the CPU's generator (RDSEED, RDRAND) or, where there is none, by the
//! jitter of the time stamp counter.

use crate::cpu::regs;
use crate::sync::SpinLock;
use core::arch::asm;

/// Bytes of a block of ChaCha20.
const BLOCK: usize = 64;
/// Words of jitter that a seed is made of where the CPU has no generator: 16 times as many as its bits.
const JITTER_ROUNDS: usize = 4096;

struct Generator {
    key: [u32; 8],
    seeded: bool,
}

static GENERATOR: SpinLock<Generator> = SpinLock::new(Generator { key: [0; 8], seeded: false });

/// One block of ChaCha20 (RFC 8439, 2.3).
fn chacha20(key: &[u32; 8], counter: u32, nonce: [u32; 3]) -> [u32; 16] {
    let mut start = [0; 16];
    // "expand 32-byte k"
    start[..4].copy_from_slice(&[0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574]);
    start[4..12].copy_from_slice(key);
    start[12] = counter;
    start[13..].copy_from_slice(&nonce);
    let mut state = start;
    for _ in 0..10 {
        for [a, b, c, d] in [
            [0, 4, 8, 12],
            [1, 5, 9, 13],
            [2, 6, 10, 14],
            [3, 7, 11, 15],
            [0, 5, 10, 15],
            [1, 6, 11, 12],
            [2, 7, 8, 13],
            [3, 4, 9, 14],
        ] {
            for (x, y, z, turn) in [(a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)] {
                state[x] = u32::wrapping_add(state[x], state[y]);
                state[z] = (state[z] ^ state[x]).rotate_left(turn);
            }
        }
    }
    for (word, start) in state.iter_mut().zip(start) {
        *word = word.wrapping_add(start);
    }
    state
}

/// A word of the CPU's generator.
fn hardware() -> Option<u64> {
    let has_seed = regs::cpuid(7, 0).ebx & (1 << 18) != 0;
    let has_rand = regs::cpuid(1, 0).ecx & (1 << 30) != 0;
    // Both may be empty for a while; Intel says ten tries for RDRAND.
    for _ in 0..16 {
        let (value, good): (u64, u8);
        if has_seed {
            // SAFETY: the CPU has the instruction.
            unsafe {
                asm!("rdseed {}", "setc {}", out(reg) value, out(reg_byte) good, options(nomem, nostack))
            };
        } else if has_rand {
            // SAFETY: as above.
            unsafe {
                asm!("rdrand {}", "setc {}", out(reg) value, out(reg_byte) good, options(nomem, nostack))
            };
        } else {
            return None;
        }
        if good != 0 {
            return Some(value);
        }
        core::hint::spin_loop();
    }
    None
}

/// Stirs timings of memory accesses and device reads into a key. Slow, and as good as the timings are noisy.
fn jitter(key: &mut [u32; 8]) {
    let mut pool = [0u64; 64];
    let mut last = regs::rdtsc();
    for round in 0..JITTER_ROUNDS {
        let now = regs::rdtsc();
        let slot = (now as usize ^ round) % pool.len();
        pool[slot] = pool[slot].rotate_left(7) ^ now.wrapping_sub(last) ^ now.rotate_right(11);
        if round % 64 == 0 {
            // SAFETY: reading the delay port has no effect but time.
            pool[round / 64 % 64] ^= u64::from(unsafe { regs::inb(0x80) });
        }
        last = now;
    }
    for (round, word) in pool.iter().enumerate() {
        key[round % 8] ^= *word as u32;
        key[(round + 3) % 8] ^= (*word >> 32) as u32;
        let mixed = chacha20(key, round as u32, [0; 3]);
        key.copy_from_slice(&mixed[..8]);
    }
}

impl Generator {
    fn seed(&mut self) -> bool {
        let mut from_hardware = true;
        let mut key = [0; 8];
        for pair in key.chunks_exact_mut(2) {
            match hardware() {
                Some(word) => pair.copy_from_slice(&[word as u32, (word >> 32) as u32]),
                None => from_hardware = false,
            }
        }
        if !from_hardware {
            jitter(&mut key);
        }
        // Both clocks go in as well: no two runs begin alike, whatever the hardware gives.
        let mixed = chacha20(&key, regs::rdtsc() as u32, [crate::time::realtime_ns() as u32, 0, 1]);
        self.key.copy_from_slice(&mixed[..8]);
        self.seeded = true;
        from_hardware
    }

    fn block(&mut self) -> [u8; BLOCK] {
        let next = chacha20(&self.key, 0, [0; 3]);
        self.key.copy_from_slice(&next[..8]);
        let words = chacha20(&self.key, 1, [0; 3]);
        let mut bytes = [0; BLOCK];
        for (part, word) in bytes.chunks_exact_mut(4).zip(words) {
            part.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// Fills `buf`.
pub(crate) fn fill(buf: &mut [u8]) {
    for part in buf.chunks_mut(BLOCK) {
        let mut generator = GENERATOR.lock();
        let weak = !generator.seeded && !generator.seed();
        let block = generator.block();
        drop(generator);
        if weak {
            log::warn!("the CPU has no random number generator: seeded by timing jitter");
        }
        part.copy_from_slice(&block[..part.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chacha20_as_in_rfc_8439() {
        // 2.3.2: the key is 00 01 .. 1f, the counter 1.
        let key = core::array::from_fn(|word| {
            u32::from_le_bytes(core::array::from_fn(|byte| (word * 4 + byte) as u8))
        });
        let block = chacha20(&key, 1, [0x0900_0000, 0x4a00_0000, 0]);
        assert_eq!(block[..4], [0xe4e7_f110, 0x1559_3bd1, 0x1fdd_0f50, 0xc471_20a3]);
        assert_eq!(block[15], 0x4e3c_50a2);
    }

    #[test]
    fn blocks_differ() {
        let mut generator = Generator { key: [7; 8], seeded: true };
        assert_ne!(generator.block(), generator.block());
    }
}
