//! Keyed randomness: one secret of the host's entropy, stretched by SipHash.

use core::hash::Hasher;
use core::net::IpAddr;
use siphasher::sip::{SipHasher13, SipHasher24};

/// Secrets of one stack; the same in all shards, because they must agree on hashes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Secret(pub(crate) [u64; 4]);

impl Secret {
    /// Hash of a connection: the same from both ends, so that a connection to ourselves stays in one shard.
    pub(crate) fn tuple_hash(&self, a: (IpAddr, u16), b: (IpAddr, u16)) -> u64 {
        let (first, second) = if a <= b { (a, b) } else { (b, a) };
        let mut hasher = SipHasher13::new_with_keys(self.0[0], self.0[1]);
        for (addr, port) in [first, second] {
            match addr {
                IpAddr::V4(v4) => hasher.write_u64(u64::from(u32::from(v4)) << 16 | u64::from(port)),
                IpAddr::V6(v6) => {
                    let bits = u128::from(v6);
                    hasher.write_u64(bits as u64);
                    hasher.write_u64((bits >> 64) as u64);
                    hasher.write_u64(u64::from(port));
                }
            }
        }
        hasher.finish()
    }
}

/// Numbers that nobody outside can guess: sequence numbers, ports, identifiers.
#[derive(Debug)]
pub(crate) struct Prf {
    secret: Secret,
    stream: u64,
    counter: u64,
}

impl Prf {
    pub(crate) fn new(secret: Secret, stream: u64) -> Self {
        Self { secret, stream, counter: 0 }
    }

    pub(crate) fn next_u64(&mut self) -> u64 {
        self.counter = self.counter.wrapping_add(1);
        let mut hasher = SipHasher24::new_with_keys(self.secret.0[2], self.secret.0[3]);
        hasher.write_u64(self.stream);
        hasher.write_u64(self.counter);
        hasher.finish()
    }
}
