use super::*;
use crate::testing::MemoryDisk;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;
use hypercall::testing::TestHost;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn cache(bytes: u64) -> Arc<BlockCache<TestHost>> {
    let limits = CacheLimits { bytes, read_ahead_bytes: 128 << 10 };
    BlockCache::new(TestHost::new(), limits, CacheCounters::default())
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect()
}

#[test]
fn reads_any_range_and_coalesces() {
    for limit in [256 << 10, 8 * MIB, 80 * MIB] {
        let content = pattern((3 << 20) + 512);
        let disk = MemoryDisk::new(content.clone());
        let cache = cache(limit);
        let device = cache.open(disk.clone()).unwrap();
        let mut buf = vec![0; content.len()];
        device.read_at(0, &mut buf).unwrap();
        assert!(buf == content);
        let requests = disk.reads.load(Relaxed);
        assert!(requests <= 3 * 1024 / 16, "{requests} requests for 3 MiB in a cache of {limit}");
        for (at, len) in [(0, 1), (511, 2), (4095, 2), (65_535, 70_000), (content.len() - 513, 513)] {
            device.read_at(at as u64, &mut buf[..len]).unwrap();
            assert!(buf[..len] == content[at..at + len]);
        }
        assert!(cache.bytes_in_use() as u64 <= limit + MIB);
    }
}

#[test]
fn a_warm_read_asks_nothing_of_the_device() {
    let disk = MemoryDisk::new(pattern(1 << 20));
    let cache = cache(8 * MIB);
    let device = cache.open(disk.clone()).unwrap();
    let mut buf = vec![0; 1 << 20];
    device.read_at(0, &mut buf).unwrap();
    let cold = disk.reads.load(Relaxed);
    assert!(cold <= 5, "{cold} requests");
    device.read_at(0, &mut buf).unwrap();
    assert_eq!(disk.reads.load(Relaxed), cold);
    assert!(cache.counters.hits.get() > 0 && cache.counters.misses.get() > 0);
}

#[test]
fn refuses_what_is_outside() {
    let device = cache(MIB).open(MemoryDisk::zeroed(8192)).unwrap();
    assert_eq!(device.read_at(8192, &mut [0]), Err(BlockError::Invalid));
    assert_eq!(device.read_at(u64::MAX, &mut [0]), Err(BlockError::Invalid));
    assert_eq!(device.write_at(8191, &[0, 0]), Err(BlockError::Invalid));
    assert_eq!(device.zero(1, u64::MAX), Err(BlockError::Invalid));
    device.read_at(8192, &mut []).unwrap();
    let read_only = MemoryDisk::with_info(vec![0; 4096], |info| info.read_only = true);
    assert_eq!(cache(MIB).open(read_only).unwrap().write_at(0, &[1]), Err(BlockError::ReadOnly));
    let nonsense = MemoryDisk::with_info(vec![0; 4096], |info| info.sectors = u64::MAX);
    assert!(cache(MIB).open(nonsense).is_err());
}

#[test]
fn is_durable_after_sync_only() {
    let disk = MemoryDisk::zeroed(1 << 20);
    let cache = cache(8 * MIB);
    let device = cache.open(disk.clone()).unwrap();
    device.write_at(1000, &[7; 10_000]).unwrap();
    assert!(disk.content().iter().all(|byte| *byte == 0), "written back before it had to be");
    device.sync().unwrap();
    let durable = disk.durable();
    assert!(durable[1000..11_000].iter().all(|byte| *byte == 7));
    assert_eq!(durable.iter().filter(|byte| **byte != 0).count(), 10_000);
    let writes = disk.writes.load(Relaxed);
    device.sync().unwrap();
    assert_eq!(disk.writes.load(Relaxed), writes, "nothing was dirty");
    assert_eq!(cache.dirty_pages.load(Relaxed), 0);
}

#[test]
fn a_write_error_is_told_by_sync_and_the_data_is_kept() {
    let disk = MemoryDisk::zeroed(1 << 20);
    let cache = cache(8 * MIB);
    let device = cache.open(disk.clone()).unwrap();
    device.write_at(0, &[9; 5000]).unwrap();
    disk.fail_writes.store(true, Relaxed);
    // A write-back for want of memory meets the error first; nobody hears of it...
    cache.relieve();
    // ...but sync does, as often as it fails.
    assert_eq!(device.sync(), Err(BlockError::Io));
    assert_eq!(device.sync(), Err(BlockError::Io));
    let mut buf = [0; 5000];
    device.read_at(0, &mut buf).unwrap();
    assert_eq!(buf, [9; 5000]);
    disk.fail_writes.store(false, Relaxed);
    disk.fail_flushes.store(true, Relaxed);
    assert_eq!(device.sync(), Err(BlockError::Io));
    disk.fail_flushes.store(false, Relaxed);
    device.sync().unwrap();
    assert_eq!(disk.durable()[..5000], [9; 5000]);
}

#[test]
fn a_cache_full_of_unwritable_pages_refuses_writes_and_still_reads() {
    let disk = MemoryDisk::new(pattern(4 << 20));
    let cache = cache(256 << 10);
    let device = cache.open(disk.clone()).unwrap();
    disk.fail_writes.store(true, Relaxed);
    let mut refused = 0;
    for page in 0..128 {
        refused += usize::from(device.write_at(page * 4096, &[1; 4096]).is_err());
    }
    assert!(refused > 0);
    let mut buf = vec![0; 100_000];
    device.read_at(2 << 20, &mut buf).unwrap();
    assert!(buf == pattern(4 << 20)[2 << 20..][..100_000]);
    assert!(cache.counters.bypasses.get() > 0);
    device.read_at(0, &mut buf[..4096]).unwrap();
    assert_eq!(buf[..4096], [1; 4096]);
}

#[test]
fn a_read_error_is_an_error_and_not_cached() {
    let disk = MemoryDisk::new(pattern(1 << 20));
    let device = cache(8 * MIB).open(disk.clone()).unwrap();
    disk.fail_reads.store(true, Relaxed);
    let mut buf = vec![0; 300_000];
    assert_eq!(device.read_at(5, &mut buf), Err(BlockError::Io));
    device.prefetch(0, 1 << 20);
    assert_eq!(device.read_at(5, &mut buf), Err(BlockError::Io));
    // Part of a page can be written only when the rest is known.
    assert_eq!(device.write_at(5, &[1]), Err(BlockError::Io));
    disk.fail_reads.store(false, Relaxed);
    device.read_at(5, &mut buf).unwrap();
    assert!(buf == pattern(1 << 20)[5..300_005]);
}

#[test]
fn prefetch_makes_the_read_warm() {
    let disk = MemoryDisk::new(pattern(1 << 20));
    let cache = cache(8 * MIB);
    let device = cache.open(disk.clone()).unwrap();
    device.prefetch(0, 256 << 10);
    device.prefetch(900 << 10, u64::MAX);
    anykernel::block::BlockDevice::poll(&*disk);
    let before = disk.reads.load(Relaxed);
    let mut buf = vec![0; 256 << 10];
    device.read_at(0, &mut buf).unwrap();
    device.read_at(900 << 10, &mut buf[..100 << 10]).unwrap();
    assert_eq!(disk.reads.load(Relaxed), before);
}

#[test]
fn the_same_device_is_opened_once_and_dropped_with_its_last_user() {
    let disk = MemoryDisk::zeroed(1 << 20);
    let cache = cache(8 * MIB);
    let one = cache.open(disk.clone()).unwrap();
    let two = cache.open(disk.clone()).unwrap();
    one.write_at(0, &[5]).unwrap();
    let mut buf = [0];
    two.read_at(0, &mut buf).unwrap();
    assert_eq!(buf, [5]);
    drop((one, two));
    assert_eq!(disk.durable()[0], 5);
    assert_eq!(cache.bytes_in_use(), 0);
    assert_eq!(Arc::strong_count(&disk), 1);
}

#[test]
fn many_threads_see_what_they_wrote() {
    let disk = MemoryDisk::zeroed(4 << 20);
    let cache = cache(512 << 10);
    let device = cache.open(disk.clone()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let device = &device;
            scope.spawn(move || {
                let base = thread << 20;
                let mut buf = vec![0; 3000];
                for round in 1..=200u64 {
                    let at = base + (round * 7919 * 13) % ((1 << 20) - 3000);
                    device.write_at(at, &[round as u8; 3000]).unwrap();
                    device.prefetch(base, 64 << 10);
                    device.read_at(at, &mut buf).unwrap();
                    assert_eq!(buf, [round as u8; 3000]);
                    if round % 50 == 0 {
                        device.sync().unwrap();
                    }
                }
            });
        }
    });
    device.sync().unwrap();
    assert_eq!(cache.dirty_pages.load(Relaxed), 0);
}

#[derive(Debug, Clone)]
enum Step {
    Read(u64, usize),
    Write(u64, usize, u8),
    Zero(u64, u64),
    Prefetch(u64, u64),
    Sync,
    FailOnce,
}

fn step() -> impl Strategy<Value = Step> {
    let at = 0..(1u64 << 20);
    prop_oneof![
        4 => (at.clone(), 1..200_000usize).prop_map(|(at, len)| Step::Read(at, len)),
        4 => (at.clone(), 1..20_000usize, any::<u8>()).prop_map(|(at, len, byte)| Step::Write(at, len, byte)),
        1 => (at.clone(), 1..20_000u64).prop_map(|(at, len)| Step::Zero(at, len)),
        1 => (at, 1..300_000u64).prop_map(|(at, len)| Step::Prefetch(at, len)),
        1 => Just(Step::Sync),
        1 => Just(Step::FailOnce),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Against a plain array, in caches from too small to ample.
    #[test]
    fn behaves_as_an_array(
        steps in prop::collection::vec(step(), 1..60),
        size_kib in prop::sample::select(vec![64u64, 300, 2048, 70_000]),
        most in prop::sample::select(vec![4096usize, 24_576, 262_144]),
        sector_size in prop::sample::select(vec![512u32, 2048, 4096]),
    ) {
        let mut model = pattern((1 << 20) + 4096 * 3 + 512);
        let disk = MemoryDisk::with_info(model.clone(), |info| {
            info.max_request_bytes = most;
            info.sector_size = sector_size;
        });
        model.resize(disk.content().len(), 0);
        let cache = cache(size_kib << 10);
        let device = cache.open(disk.clone()).unwrap();
        for step in steps {
            match step {
                Step::Read(at, len) => {
                    let len = len.min(model.len() - at as usize);
                    let mut buf = vec![0; len];
                    device.read_at(at, &mut buf).unwrap();
                    prop_assert!(buf == model[at as usize..][..len]);
                }
                Step::Write(at, len, byte) => {
                    let len = len.min(model.len() - at as usize);
                    device.write_at(at, &vec![byte; len]).unwrap();
                    model[at as usize..][..len].fill(byte);
                }
                Step::Zero(at, len) => {
                    let len = len.min(model.len() as u64 - at);
                    device.zero(at, len).unwrap();
                    model[at as usize..][..len as usize].fill(0);
                }
                Step::Prefetch(at, len) => device.prefetch(at, len),
                Step::Sync => {
                    device.sync().unwrap();
                    prop_assert!(disk.durable() == model);
                }
                Step::FailOnce => {
                    disk.fail_writes.store(true, Relaxed);
                    cache.relieve();
                    disk.fail_writes.store(false, Relaxed);
                }
            }
        }
        device.sync().unwrap();
        prop_assert!(disk.durable() == model);
    }
}
