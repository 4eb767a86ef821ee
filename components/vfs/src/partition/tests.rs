use super::*;
use crate::testing::MemoryDisk;
use hypercall::testing::TestHost;
use proptest::prelude::*;

const SECTORS: usize = 4096;

fn mbr_entry(disk: &mut [u8], table: usize, index: usize, kind: u8, first: u32, count: u32) {
    let at = table * 512 + 446 + index * 16;
    disk[at + 4] = kind;
    disk[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
    disk[at + 12..at + 16].copy_from_slice(&count.to_le_bytes());
    disk[table * 512 + 510..table * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
}

fn found(content: Vec<u8>) -> (Vec<(u32, u64, u64)>, Vec<String>) {
    let disk: Arc<dyn BlockDevice> = MemoryDisk::new(content);
    let mut refused = Vec::new();
    let extents = find(&Reader { host: TestHost::new(), disk: &disk }, &mut refused).unwrap();
    (extents.iter().map(|extent| (extent.number, extent.first, extent.count)).collect(), refused)
}

/// A disk with an MBR: two primary partitions and an extended one with two logical ones.
fn mbr_disk() -> Vec<u8> {
    let mut disk = vec![0; SECTORS * 512];
    mbr_entry(&mut disk, 0, 0, 0x83, 64, 1000);
    mbr_entry(&mut disk, 0, 2, 0x0c, 1064, 36);
    mbr_entry(&mut disk, 0, 3, 0x0f, 2000, 2000);
    mbr_entry(&mut disk, 2000, 0, 0x83, 10, 90);
    mbr_entry(&mut disk, 2000, 1, 0x05, 500, 600);
    mbr_entry(&mut disk, 2500, 0, 0x83, 10, 90);
    disk
}

fn gpt_header(disk: &mut [u8], at: usize, other: usize, table: usize) {
    let entries = checksum_of(disk, table);
    let header = &mut disk[at * 512..at * 512 + 512];
    header[..8].copy_from_slice(b"EFI PART");
    header[8..12].copy_from_slice(&0x10000u32.to_le_bytes());
    header[12..16].copy_from_slice(&92u32.to_le_bytes());
    header[16..20].fill(0);
    for (field, value) in [(24, at), (32, other), (40, 34), (48, SECTORS - 34), (72, table)] {
        header[field..field + 8].copy_from_slice(&(value as u64).to_le_bytes());
    }
    header[80..84].copy_from_slice(&128u32.to_le_bytes());
    header[84..88].copy_from_slice(&128u32.to_le_bytes());
    header[88..92].copy_from_slice(&entries.to_le_bytes());
    let crc = gpt::checksum(&header[..92]);
    header[16..20].copy_from_slice(&crc.to_le_bytes());
}

fn checksum_of(disk: &[u8], table: usize) -> u32 {
    gpt::checksum(&disk[table * 512..table * 512 + 128 * 128])
}

fn gpt_disk(partitions: &[(usize, u64, u64)]) -> Vec<u8> {
    let mut disk = vec![0; SECTORS * 512];
    mbr_entry(&mut disk, 0, 0, 0xee, 1, u32::MAX);
    for table in [2, SECTORS - 33] {
        for (index, first, last) in partitions {
            let at = table * 512 + index * 128;
            disk[at..at + 16].fill(7);
            disk[at + 32..at + 40].copy_from_slice(&first.to_le_bytes());
            disk[at + 40..at + 48].copy_from_slice(&last.to_le_bytes());
        }
    }
    gpt_header(&mut disk, 1, SECTORS - 1, 2);
    gpt_header(&mut disk, SECTORS - 1, 1, SECTORS - 33);
    disk
}

#[test]
fn mbr_with_logical_partitions() {
    let (extents, refused) = found(mbr_disk());
    assert_eq!(extents, [(1, 64, 1000), (3, 1064, 36), (5, 2010, 90), (6, 2510, 90)]);
    assert_eq!(refused, [""; 0]);
}

#[test]
fn no_table_no_partitions() {
    assert_eq!(found(vec![0; SECTORS * 512]).0, []);
    let mut fat = vec![0; SECTORS * 512];
    fat[510..512].copy_from_slice(&[0x55, 0xaa]);
    fat[446..510].copy_from_slice(&[b'x'; 64]);
    assert_eq!(found(fat).0, []);
}

#[test]
fn mbr_lies_are_refused() {
    let mut disk = mbr_disk();
    mbr_entry(&mut disk, 0, 0, 0x83, 64, u32::MAX);
    mbr_entry(&mut disk, 0, 1, 0x83, 1090, 20);
    let (extents, refused) = found(disk);
    assert_eq!(extents.iter().map(|extent| extent.0).collect::<Vec<_>>(), [2, 5, 6]);
    assert_eq!(refused.len(), 2, "{refused:?}");
    // The chain of tables goes round in circles.
    let mut disk = mbr_disk();
    mbr_entry(&mut disk, 2500, 1, 0x05, 500, 600);
    let (extents, refused) = found(disk);
    assert_eq!(extents.len(), 4);
    assert!(refused.iter().any(|line| line.contains("loop")), "{refused:?}");
}

#[test]
fn gpt_and_its_backup() {
    let partitions = [(0, 40, 99), (1, 100, 1000), (5, 2000, 2000)];
    let expected = [(1, 40, 60), (2, 100, 901), (6, 2000, 1)];
    assert_eq!(found(gpt_disk(&partitions)), (expected.to_vec(), vec![]));
    for damage in [512 + 60, 1024 + 40] {
        let mut disk = gpt_disk(&partitions);
        disk[damage] ^= 1;
        let (extents, refused) = found(disk.clone());
        assert_eq!(extents, expected);
        assert!(refused[0].contains("backup"), "{refused:?}");
        disk[(SECTORS - 1) * 512 + 60] ^= 1;
        let (extents, refused) = found(disk);
        assert_eq!(extents, []);
        assert!(refused[0].contains("no partition can be used"), "{refused:?}");
    }
}

#[test]
fn gpt_lies_are_refused() {
    let outside = SECTORS as u64;
    let (extents, refused) = found(gpt_disk(&[
        (0, 40, 99),
        (1, 90, 120),
        (2, 0, 50),
        (3, 200, 199),
        (4, 3000, outside),
        (5, 1, u64::MAX),
    ]));
    assert_eq!(extents, [(1, 40, 60)]);
    assert_eq!(refused.len(), 5, "{refused:?}");
}

#[test]
fn a_partition_is_a_device_of_its_own() {
    let host = TestHost::new();
    let kernel = Kernel::new(host, anykernel::config::Config::default());
    let disk = MemoryDisk::new(mbr_disk());
    kernel.add_block_device(disk.clone());
    scan(&kernel);
    let names: Vec<_> = kernel.block_devices().iter().map(|device| device.info().name.clone()).collect();
    assert_eq!(names, ["disk0", "disk0p1", "disk0p3", "disk0p5", "disk0p6"]);
    // Nothing is found twice, and a disk that comes later is found then.
    scan(&kernel);
    assert_eq!(kernel.block_devices().len(), 5);
    kernel.remove_block_device("disk0");
    assert!(kernel.block_devices().is_empty());
    kernel.add_block_device(disk.clone());
    scan(&kernel);
    assert_eq!(kernel.block_devices().len(), 5);
    let part = kernel.block_devices()[1].clone();
    assert_eq!(part.info().sectors, 1000);
    transfer(host, &*part, Op::Write, 999, vec![vec![7; 512].into_boxed_slice()]).unwrap();
    transfer(host, &*part, Op::Flush, 0, vec![]).unwrap();
    assert_eq!(disk.durable()[(64 + 999) * 512], 7);
    for sector in [1000, u64::MAX, u64::MAX - 63] {
        let outside = transfer(host, &*part, Op::Read, sector, vec![vec![0; 512].into_boxed_slice()]);
        assert_eq!(outside.err(), Some(BlockError::Invalid));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Whatever is on the disk, what is found is inside it and apart.
    #[test]
    fn hostile_tables(
        gpt in any::<bool>(),
        damage in prop::collection::vec((0..SECTORS * 512, any::<u8>()), 0..40),
        near in prop::collection::vec((440..1600usize, any::<u8>()), 0..40),
    ) {
        let mut disk = if gpt { gpt_disk(&[(0, 40, 99), (1, 100, 1000)]) } else { mbr_disk() };
        for (at, byte) in damage.into_iter().chain(near) {
            disk[at] = byte;
        }
        if gpt {
            // Damage under a right checksum reaches further.
            gpt_header(&mut disk, 1, SECTORS - 1, 2);
        }
        let (extents, _) = found(disk);
        for (index, (_, first, count)) in extents.iter().enumerate() {
            prop_assert!(*count > 0 && first + count <= SECTORS as u64);
            for (_, other, other_count) in &extents[..index] {
                prop_assert!(first + count <= *other || other + other_count <= *first);
            }
        }
    }
}
