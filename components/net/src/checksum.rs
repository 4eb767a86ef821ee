//! The Internet checksum (RFC 1071), eight bytes at a time.

use core::net::IpAddr;

/// A sum in progress. Addition of 16-bit words with end-around carry does not care about word size, so it is carried
/// in 64 bits and folded at the end; bytes are summed in memory order and swapped once.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sum(u64);

impl Sum {
    /// Adds bytes. Every part but the last must have even length.
    pub(crate) fn bytes(self, data: &[u8]) -> Self {
        let mut low = self.0;
        let mut high = 0u64;
        let (blocks, rest) = data.as_chunks::<16>();
        for block in blocks {
            let word = u128::from_ne_bytes(*block);
            // Both halves are added with their carry kept: 2^64 = 1 in this arithmetic.
            low = add(low, word as u64);
            high = add(high, (word >> 64) as u64);
        }
        let mut sum = add(low, high);
        let (words, rest) = rest.as_chunks::<2>();
        for word in words {
            sum = add(sum, u64::from(u16::from_ne_bytes(*word)));
        }
        if let [last] = rest {
            sum = add(sum, u64::from(u16::from_ne_bytes([*last, 0])));
        }
        Self(sum)
    }

    /// Adds a number in host order.
    pub(crate) fn word(self, word: u16) -> Self {
        Self(add(self.0, u64::from(word.to_be())))
    }

    /// Adds the pseudo-header (RFC 9293, 3.1; RFC 8200, 8.1). `len` is that of the transport header and payload.
    pub(crate) fn pseudo_header(self, src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> Self {
        let sum = match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => self.bytes(&src.octets()).bytes(&dst.octets()),
            (IpAddr::V6(src), IpAddr::V6(dst)) => self.bytes(&src.octets()).bytes(&dst.octets()),
            _ => self,
        };
        sum.word(u16::from(protocol)).word((len >> 16) as u16).word(len as u16)
    }

    /// The folded sum in host order, not complemented.
    pub(crate) fn fold(self) -> u16 {
        let mut sum = self.0;
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::from_be(sum as u16)
    }

    /// The value for the checksum field.
    pub(crate) fn finish(self) -> u16 {
        !self.fold()
    }

    /// Whether data that includes its checksum is good.
    pub(crate) fn is_valid(self) -> bool {
        self.fold() == 0xffff
    }
}

fn add(a: u64, b: u64) -> u64 {
    let (sum, carry) = a.overflowing_add(b);
    sum.wrapping_add(u64::from(carry))
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    fn plain(data: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in data.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    #[test]
    fn rfc_1071_example() {
        let data = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::default().bytes(&data).fold(), 0xddf2);
    }

    proptest! {
        #[test]
        fn agrees_with_the_plain_sum(data: Vec<u8>, split in 0usize..64) {
            let split = (split * 2).min(data.len() & !1);
            let whole = Sum::default().bytes(&data).fold();
            let parts = Sum::default().bytes(&data[..split]).bytes(&data[split..]).fold();
            // 0 and 0xffff are the same number here.
            prop_assert_eq!(whole % 0xffff, plain(&data) % 0xffff);
            prop_assert_eq!(whole, parts);
        }

        #[test]
        fn what_is_filled_in_verifies(mut data in proptest::collection::vec(any::<u8>(), 2..200)) {
            data[0] = 0;
            data[1] = 0;
            let field = Sum::default().bytes(&data).finish();
            data[..2].copy_from_slice(&field.to_be_bytes());
            prop_assert!(Sum::default().bytes(&data).is_valid());
        }
    }
}
