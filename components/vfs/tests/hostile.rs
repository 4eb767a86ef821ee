//! Damaged ext4 images: mounting and reading everything ends soon, with typed errors at worst, and takes little memory.

mod common;

use anykernel::Kernel;
use anykernel::config::Config;
use anykernel::fs::{FileKind, FsType, Inode};
use anykernel_vfs::cache::{BlockCache, CacheCounters, CacheLimits};
use anykernel_vfs::ext4::Ext4;
use hypercall::testing::TestHost;
use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Counts what is allocated.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is done by the system's allocator; this only counts.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        MOST.fetch_max(now, Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const CACHE_BYTES: u64 = 2 << 20;
/// What mounting and reading a damaged image may take beside the image: the cache, and as much again.
const MEMORY_BOUND: usize = 8 << 20;
const TIME_BOUND: Duration = Duration::from_secs(20);
const CASES: u64 = 500;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

fn small_tree(dir: &Path) {
    std::fs::create_dir_all(dir.join("a/b/c")).unwrap();
    std::fs::create_dir(dir.join("many")).unwrap();
    for number in 0..150 {
        std::fs::write(dir.join(format!("many/a rather long file name {number}")), "x".repeat(number))
            .unwrap();
    }
    std::fs::write(dir.join("a/large"), vec![7; 300_000]).unwrap();
    std::fs::write(dir.join("a/b/c/small"), "small").unwrap();
    let sparse = std::fs::File::create(dir.join("a/sparse")).unwrap();
    for at in 0..20 {
        std::os::unix::fs::FileExt::write_at(&sparse, b"data", at * 50_000).unwrap();
    }
    std::os::unix::fs::symlink("../a/large", dir.join("a/link")).unwrap();
    std::os::unix::fs::symlink("x/".repeat(100), dir.join("a/slow")).unwrap();
}

/// Visits everything once; says how many names it saw.
fn visit(inode: &Arc<dyn Inode>, seen: &mut HashSet<u64>, names: &mut usize) {
    let Ok(metadata) = inode.metadata() else { return };
    if !seen.insert(metadata.inode) || *names > 3000 {
        return;
    }
    let mut buf = vec![0; 40_000];
    match metadata.kind {
        FileKind::Directory => {
            let mut entries = Vec::new();
            let mut cursor = 0;
            // Few at a time, so that going on is tested too.
            while let Ok(Some(next)) = inode.read_dir(cursor, &mut |entry| {
                entries.push(entry);
                entries.len() % 50 != 0
            }) {
                assert!(next > cursor, "listing goes forward");
                cursor = next;
                if entries.len() > 3000 {
                    break;
                }
            }
            *names += entries.len();
            let _ = inode.lookup(b"no such name");
            for entry in entries {
                if let Ok(child) = inode.lookup(&entry.name) {
                    visit(&child, seen, names);
                }
            }
        }
        FileKind::Symlink => {
            let _ = inode.read_link().map(|target| assert!(target.len() <= 4095));
        }
        _ => {
            for offset in [0, 40_000, 290_000, metadata.size / 2, metadata.size.saturating_sub(100), u64::MAX]
            {
                if let Ok(len) = inode.read_at(offset, &mut buf) {
                    assert!(offset.saturating_add(len as u64) <= metadata.size.max(offset));
                }
            }
        }
    }
}

/// Mounts and reads `image`; says how many names were seen.
fn use_image(image: Vec<u8>) -> usize {
    let host = TestHost::new();
    let kernel = Kernel::new(host, Config::default());
    let limits = CacheLimits { bytes: CACHE_BYTES, read_ahead_bytes: 64 << 10 };
    let kind = Ext4::new(&kernel, BlockCache::new(host, limits, CacheCounters::default()));
    let device = common::Image::device(image);
    let _ = kind.probe(&device);
    let mut names = 0;
    match kind.mount(Some(device.clone()), true) {
        Ok(fs) => {
            let _ = fs.stats();
            if let Ok(root) = fs.root() {
                visit(&root, &mut HashSet::new(), &mut names);
            }
        }
        Err(_) => drop(kind.explain(&device)),
    }
    names
}

/// Changes some of what is not empty, and says where.
fn damage(image: &mut [u8], random: &mut Random, used: &[usize]) {
    for _ in 0..1 + random.below(12) {
        // Most structures are small and at the front of their block: the superblock gets its share.
        let chunk =
            if random.below(8) == 0 { 1024 + random.below(40) * 16 } else { used[random.below(used.len())] };
        let at = chunk + random.below(16);
        match random.below(5) {
            0 => image[at] ^= 1 << random.below(8),
            1 => image[at] = random.next() as u8,
            2 => {
                let values = [0u32, 1, 2, 0x7fff_ffff, 0x8000_0000, u32::MAX, random.next() as u32, 12, 64];
                let value = values[random.below(values.len())];
                image[at & !3..][..4].copy_from_slice(&value.to_le_bytes());
            }
            3 => {
                let value = [0u16, 1, 0x7fff, 0x8000, u16::MAX, 0xf30a, 8, 12][random.below(8)];
                image[at & !1..][..2].copy_from_slice(&value.to_le_bytes());
            }
            _ => {
                let from = used[random.below(used.len())];
                image.copy_within(from..from + 16, chunk);
            }
        }
    }
}

/// Prints which case failed.
struct Case<'a>(&'a [&'a str], u64);

impl Drop for Case<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("options {:?}, seed {}", self.0, self.1);
        }
    }
}

#[test]
fn damaged_images_are_only_errors() {
    let dir = common::scratch();
    let tree = dir.path().join("tree");
    small_tree(&tree);
    let path = dir.path().join("image");
    let variants: [&[&str]; 6] = [
        &["-b", "1024", "-N", "256", "-J", "size=1"],
        &["-b", "1024", "-N", "256", "-O", "^metadata_csum", "-J", "size=1"],
        &["-b", "4096", "-N", "256", "-O", "^metadata_csum,^has_journal"],
        &["-b", "1024", "-N", "256", "-t", "ext2"],
        &["-b", "1024", "-N", "256", "-O", "^metadata_csum,inline_data,^has_journal"],
        &["-b", "1024", "-N", "256", "-O", "^metadata_csum,dirty", "-J", "size=1"],
    ];
    for options in variants {
        let dirty = options.iter().any(|option| option.ends_with("dirty"));
        let cleaned: Vec<String> = options.iter().map(|option| option.replace(",dirty", "")).collect();
        let cleaned: Vec<&str> = cleaned.iter().map(String::as_str).collect();
        common::make_image(&path, &tree, &cleaned, "4M");
        // Gives directories their index.
        common::run("e2fsck", &["-f", "-y", "-D", path.to_str().unwrap()]);
        if dirty {
            let script = dir.path().join("script");
            let content = dir.path().join("content");
            std::fs::write(&content, vec![0; 3 * 1024]).unwrap();
            let content = content.display();
            let commands = format!(
                "jo\njw -b 1500,1501,1502 {content}\njw -r 1501\njw -b 1502,1503,1504 {content}\njc\n"
            );
            std::fs::write(&script, commands).unwrap();
            common::run("debugfs", &["-w", "-f", script.to_str().unwrap(), path.to_str().unwrap()]);
        }
        let image = std::fs::read(&path).unwrap();
        assert!(use_image(image.clone()) > 150, "{options:?}: the sound image is read");
        let used: Vec<usize> = (0..image.len())
            .step_by(16)
            .filter(|at| image[*at..at + 16].iter().any(|byte| *byte != 0))
            .collect();
        // File content tells nothing about the reader, so take what is not the large file's.
        let used: Vec<usize> = used.into_iter().filter(|at| image[*at..at + 16] != [7; 16]).collect();
        let mut read = 0;
        for seed in 1..=CASES {
            let case = Case(options, seed);
            let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let mut damaged = image.clone();
            damage(&mut damaged, &mut random, &used);
            let start = Instant::now();
            let before = NOW.load(Relaxed);
            MOST.store(before, Relaxed);
            read += usize::from(use_image(damaged) > 0);
            let taken = MOST.load(Relaxed).saturating_sub(before);
            assert!(taken < MEMORY_BOUND, "{taken} bytes");
            assert!(start.elapsed() < TIME_BOUND, "{:?}", start.elapsed());
            drop(case);
        }
        // Else this would test little more than the superblock.
        assert!(read > CASES as usize / 8, "{options:?}: only {read} were read at all");
    }
}
