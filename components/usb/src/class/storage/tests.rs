//! Wrappers and SCSI answers, also hostile ones.

use super::bot::*;
use super::scsi::*;
use proptest::prelude::*;

#[test]
fn commands() {
    assert_eq!(transfer(false, 0x0102_0304, 0x0506).0[..10], [0x28, 0, 1, 2, 3, 4, 0, 5, 6, 0]);
    assert_eq!(transfer(true, 1, 2).1, 10);
    let (command, len) = transfer(true, 1 << 32, 8);
    assert_eq!((command, len), ([0x8a, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0], 16));
    assert_eq!(transfer(false, 0, 65_536).0[0], 0x88);
    let wrapper = command_wrapper(0x1122_3344, 512, Direction::In, 3, &TEST_UNIT_READY);
    assert_eq!(wrapper[..15], [b'U', b'S', b'B', b'C', 0x44, 0x33, 0x22, 0x11, 0, 2, 0, 0, 0x80, 3, 6]);
    assert_eq!(wrapper.len(), CBW_LEN);
}

#[test]
fn statuses() {
    let status =
        |tag: u8, residue: u8, status| [b'U', b'S', b'B', b'S', tag, 0, 0, 0, residue, 0, 0, 0, status];
    assert_eq!(judge_status(&status(1, 5, 0), 1, 10), Verdict::Passed { residue: 5 });
    assert_eq!(judge_status(&status(1, 11, 0), 1, 10), Verdict::Invalid);
    assert_eq!(judge_status(&status(2, 0, 0), 1, 10), Verdict::Invalid);
    assert_eq!(judge_status(&status(1, 0, 1), 1, 10), Verdict::Failed);
    assert_eq!(judge_status(&status(1, 99, 2), 1, 10), Verdict::Phase);
    assert_eq!(judge_status(&status(1, 0, 3), 1, 10), Verdict::Invalid);
    assert_eq!(judge_status(&status(1, 0, 0)[..12], 1, 10), Verdict::Invalid);
}

proptest! {
    #[test]
    fn hostile_answers(bytes in proptest::collection::vec(any::<u8>(), 0..64), tag in any::<u32>(), len in any::<u32>()) {
        if let Verdict::Passed { residue } = judge_status(&bytes, tag, len) {
            prop_assert!(residue <= len);
        }
        if let Some(inquiry) = Inquiry::parse(&bytes) {
            prop_assert!(inquiry.name.is_ascii() && inquiry.name.len() <= 31);
        }
        sense(&bytes);
        write_protected(&bytes);
        for (last, size) in capacity_16(&bytes).into_iter().chain(capacity_10(&bytes).map(|(a, b)| (u64::from(a), b))) {
            if let Some(capacity) = checked_capacity(last, size) {
                prop_assert!(capacity.sectors.checked_mul(u64::from(capacity.sector_size)).is_some());
            }
        }
    }
}
