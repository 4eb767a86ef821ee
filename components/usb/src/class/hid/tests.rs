//! Report descriptors, also hostile ones.

use super::*;
use crate::testing::{KEYBOARD, MOUSE};
use alloc::vec::Vec;
use proptest::prelude::*;

#[test]
fn a_keyboard_describes_what_the_boot_protocol_has() {
    let layout = Layout::parse(KEYBOARD).unwrap();
    let boot = Layout::boot_keyboard();
    assert_eq!(layout.fields[0], boot.fields[0]);
    let (keys, boot_keys) = (&layout.fields[1], &boot.fields[1]);
    assert_eq!((keys.bit, keys.bits, keys.count, keys.array), (boot_keys.bit, 8, 6, true));
    assert_eq!(keys.selected(0x65), Some(7 << 16 | 0x65));
    assert_eq!(keys.selected(0x66), None);
    assert_eq!((layout.longest, layout.numbered), (8, false));
    let mouse = Layout::parse(MOUSE).unwrap();
    assert_eq!((mouse.longest, mouse.numbered, mouse.fields.len()), (5, true, 2));
    assert_eq!(mouse.fields[1].value(&[0, 0x80, 0x7f, 0xff], 0), Some(-128));
    assert_eq!(mouse.fields[1].value(&[0, 0x80, 0x7f, 0xff], 2), Some(-1));
    assert_eq!(mouse.fields[1].value(&[0, 0x80], 1), None);
}

/// Items that devices are made of, with values near and far.
fn items() -> impl Strategy<Value = Vec<u8>> {
    let tags = proptest::sample::select(alloc::vec![
        0x04u8, 0x08, 0x14, 0x18, 0x24, 0x28, 0x74, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0xb4, 0xc0
    ]);
    let values = prop_oneof![0u32..8, 0u32..256, any::<u32>(), Just(u32::MAX)];
    proptest::collection::vec((tags, 0usize..4, values), 0..80).prop_map(|items| {
        let mut bytes = Vec::new();
        for (tag, len, value) in items {
            bytes.push(tag | len as u8);
            bytes.extend(&value.to_le_bytes()[..[0, 1, 2, 4][len]]);
        }
        bytes
    })
}

proptest! {
    #[test]
    fn hostile_descriptors_and_reports(
        descriptor in prop_oneof![items(), proptest::collection::vec(any::<u8>(), 0..200)],
        reports in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..64), 0..8),
    ) {
        let Ok(layout) = Layout::parse(&descriptor) else { return Ok(()) };
        prop_assert!(layout.fields.len() <= 256 && layout.longest <= 4097);
        let mut decoder = Decoder::new(layout);
        let mut events = 0usize;
        for report in &reports {
            decoder.report(report, &mut |_| events += 1);
        }
        decoder.release(&mut |_| events += 1);
        prop_assert!(events <= 2 * 2048 * (reports.len() + 1));
    }
}
