//! Blocks, also hostile ones.

use super::*;
use proptest::prelude::*;

#[test]
fn addresses() {
    assert_eq!(parse_mac("0200000000aF"), Some([2, 0, 0, 0, 0, 0xaf]));
    for wrong in ["", "02000000000", "0200000000000", "020000000g00", "010000000000", "000000000000"] {
        assert_eq!(parse_mac(wrong), None, "{wrong}");
    }
}

#[test]
fn tables_that_go_round() {
    let mut block = b"NCMH".to_vec();
    block.extend([12, 0, 1, 0, 32, 0, 12, 0]);
    block.extend(b"NCM0");
    // Its next table is itself.
    block.extend([16, 0, 12, 0]);
    block.extend([28, 0, 4, 0, 0, 0, 0, 0]);
    block.resize(32, 0);
    assert!(parse_ntb(&block, &mut |_| ()).is_err());
}

proptest! {
    /// What is built is parsed, whatever the device wants.
    #[test]
    fn round_trip(
        frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 14..1514), 1..12),
        divisor in 1u16..64, remainder in 0u16..64, alignment in 0u32..5, out_max in 2048u32..16_384,
    ) {
        let alignment = 4 << alignment;
        let parameters =
            NtbParameters { in_max: 16_384, out_max, divisor, remainder: remainder % divisor, alignment };
        let mut block = Builder::new(parameters);
        let kept: Vec<_> = frames.into_iter().take_while(|frame| block.add(frame)).collect();
        prop_assert!(!kept.is_empty());
        let bytes = block.finish(3);
        prop_assert!(bytes.len() <= out_max as usize);
        let mut got = Vec::new();
        prop_assert_eq!(parse_ntb(&bytes, &mut |frame| got.push(frame.to_vec())), Ok(kept.len()));
        prop_assert_eq!(got, kept);
    }

    #[test]
    fn hostile_blocks(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..600),
        sound in any::<bool>(),
        parameters in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        if sound && bytes.len() > 40 {
            let len = bytes.len() as u16;
            bytes[..12].copy_from_slice(&[b'N', b'C', b'M', b'H', 12, 0, 0, 0, len as u8, (len >> 8) as u8, 12, 0]);
            bytes[12..16].copy_from_slice(b"NCM0");
            bytes[17] = 0;
        }
        let mut total = 0;
        let _ = parse_ntb(&bytes, &mut |frame| total += frame.len());
        prop_assert!(total <= bytes.len());
        if let Some(found) = NtbParameters::parse(&parameters) {
            prop_assert!(Builder::new(found).add(&[0; 1514]));
        }
    }
}
