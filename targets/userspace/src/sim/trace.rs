//! The trace hash.

const FACTOR: u64 = 0x9fb2_1c65_1e98_df25;

/// A running hash of everything that went over the contract. Not cryptographic; the same on every machine.
#[derive(Debug, Clone, Copy)]
pub(super) struct TraceHash(u64);

impl TraceHash {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed ^ FACTOR)
    }

    #[inline]
    pub(super) fn mix(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(23) ^ value).wrapping_mul(FACTOR);
        self.0 ^= self.0 >> 32;
    }

    pub(super) fn get(self) -> u64 {
        self.0
    }
}

/// A hash of data.
pub(super) fn digest(bytes: &[u8]) -> u64 {
    let mut hash = TraceHash::new(bytes.len() as u64);
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        hash.mix(u64::from_le_bytes(*word));
    }
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    hash.mix(u64::from_le_bytes(last));
    hash.get()
}
