//! Reading a file of an ext4 image through the vfs component, in a process: sequential, random, and looking paths up.
//!
//! Prints one JSON object a line. The peer of each row runs in turn with it: `memcpy` from memory to a buffer of the same
//! size for what the cache has, `pread` of the image by the same calls for what it has not.
//! Options: `--mib N` (size of the file, 1024), `--runs N` (5), `--case TEXT` (only cases with that in their name).
#![expect(unsafe_code, reason = "the host hands out pages")]

mod host;

use anykernel::Kernel;
use anykernel::config::{Config, Mount};
use anykernel::fs::{File, Namespace, OpenOptions};
use host::BenchHost;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

struct Instance {
    kernel: Arc<Kernel<BenchHost>>,
    names: Arc<dyn Namespace>,
}

impl Instance {
    fn new(image: &Path, cache_bytes: u64) -> Self {
        let mount = Mount { source: "disk0".into(), target: "/".into(), kind: None, read_only: true };
        let mut config = Config { mounts: vec![mount], ..Config::default() };
        config.cache.bytes = cache_bytes;
        let kernel =
            Kernel::new(BenchHost::with_disk(std::fs::File::open(image).expect("the image")), config);
        anykernel_vfs::hostblk::register(&kernel).expect("the disk driver");
        anykernel_vfs::start(&kernel).expect("the vfs component");
        let names = kernel.namespace().expect("a namespace");
        Self { kernel, names }
    }

    fn file(&self) -> File {
        self.names.open(b"/dir/sub/file", OpenOptions::READ).expect("the file")
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.kernel.shutdown();
    }
}

/// Runs ours and theirs in turn and prints a row; both give the value of one run, in `unit`, more is better.
fn row(
    case: &str,
    unit: &str,
    peer: &str,
    runs: usize,
    mut ours: impl FnMut() -> f64,
    mut theirs: impl FnMut() -> f64,
) {
    if std::env::args()
        .skip_while(|argument| argument != "--case")
        .nth(1)
        .is_some_and(|only| !case.contains(&only))
    {
        return;
    }
    let mut pairs: Vec<(f64, f64)> = (0..runs).map(|_| (ours(), theirs())).collect();
    pairs.sort_by(|one, two| (one.0 / one.1).total_cmp(&(two.0 / two.1)));
    let ratio = |pair: &(f64, f64)| pair.0 / pair.1;
    let median = &pairs[runs / 2];
    let spread = (ratio(&pairs[runs - 1]) - ratio(&pairs[0])) / ratio(median);
    println!(
        "{{\"bench\":\"vfs\",\"case\":\"{case}\",\"target\":\"userspace\",\"unit\":\"{unit}\",\"ours\":{:.1},\"peer\":\"{peer}\",\"theirs\":{:.1},\"ratio\":{:.3},\"runs\":{runs},\"spread\":{spread:.3}}}",
        median.0,
        median.1,
        ratio(median)
    );
}

/// MB/s of `work`, which says how many bytes it moved.
fn rate(work: impl FnOnce() -> u64) -> f64 {
    let start = Instant::now();
    let bytes = work();
    bytes as f64 / start.elapsed().as_secs_f64() / 1e6
}

fn on_threads(count: usize, work: impl Fn(usize) -> u64 + Sync) -> u64 {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..count)
            .map(|index| {
                let work = &work;
                scope.spawn(move || work(index))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a thread")).sum()
    })
}

/// Reads all of a file in pieces of `piece` bytes.
fn sequential(piece: usize, read: impl Fn(u64, &mut [u8]) -> usize) -> u64 {
    let mut buf = vec![0; piece];
    let mut at = 0;
    loop {
        let len = read(at, &mut buf);
        std::hint::black_box(&mut buf);
        if len == 0 {
            return at;
        }
        at += len as u64;
    }
}

/// Reads `count` pieces of 4 KiB at pseudo-random places.
fn random(count: u64, size: u64, seed: usize, read: impl Fn(u64, &mut [u8]) -> usize) -> u64 {
    let mut buf = [0; 4096];
    let mut state = 0x9e37_79b9_7f4a_7c15 ^ (seed as u64) << 17;
    for _ in 0..count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        read(state % (size / 4096) * 4096, &mut buf);
        std::hint::black_box(&mut buf);
    }
    count
}

fn make_image(dir: &Path, mib: u64) -> PathBuf {
    let tree = dir.join("tree");
    std::fs::create_dir_all(tree.join("dir/sub")).expect("a directory");
    let mut content = vec![0u8; 1 << 20];
    let file = std::fs::File::create(tree.join("dir/sub/file")).expect("a file");
    for index in 0..mib {
        content.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at as u64 * 31 + index * 7) as u8);
        file.write_all_at(&content, index << 20).expect("room in the temporary directory");
    }
    let image = dir.join("image");
    let made = Command::new("/usr/sbin/mkfs.ext4")
        .args(["-q", "-F", "-b", "4096", "-d"])
        .args([tree.as_os_str(), image.as_os_str()])
        .arg(format!("{}M", mib + mib / 8 + 64))
        .status();
    assert!(made.is_ok_and(|status| status.success()), "mkfs.ext4 failed: apt-get install e2fsprogs");
    std::fs::remove_dir_all(tree).expect("the tree");
    image
}

fn option(name: &str, default: u64) -> u64 {
    let mut arguments = std::env::args();
    arguments.find(|argument| argument == name);
    arguments.next().map_or(default, |value| value.parse().expect("a number"))
}

fn main() {
    let (mib, runs) = (option("--mib", 1024), option("--runs", 5) as usize);
    let dir = tempfile::tempdir().expect("a temporary directory");
    let image = make_image(dir.path(), mib);
    let size = mib << 20;
    let raw = std::fs::File::open(&image).expect("the image");
    sequential(1 << 20, |at, buf| raw.read_at(buf, at).expect("a read"));

    let memory = vec![1u8; size as usize];
    let copy = |at: u64, buf: &mut [u8]| {
        let there = memory.get(at as usize..).unwrap_or_default();
        let len = there.len().min(buf.len());
        buf[..len].copy_from_slice(&there[..len]);
        len
    };
    let pread = |at: u64, buf: &mut [u8]| {
        let len = buf.len().min(size.saturating_sub(at) as usize);
        raw.read_at(&mut buf[..len], at).expect("a read")
    };

    // The cache is empty, the operating system's is not: what the way through the driver and the cache costs.
    row(
        "sequential 1 MiB, cold",
        "MB/s",
        "pread",
        runs,
        || {
            let instance = Instance::new(&image, 64 << 20);
            let file = instance.file();
            rate(|| sequential(1 << 20, |at, buf| file.read_at(at, buf).expect("a read")))
        },
        || rate(|| sequential(1 << 20, pread)),
    );
    row(
        "sequential 4 KiB, cold",
        "MB/s",
        "pread",
        runs,
        || {
            let instance = Instance::new(&image, 64 << 20);
            let file = instance.file();
            rate(|| sequential(4096, |at, buf| file.read_at(at, buf).expect("a read")))
        },
        || rate(|| sequential(4096, pread)),
    );
    let instance = Instance::new(&image, 64 << 20);
    let file = instance.file();
    row(
        "random 4 KiB, cold",
        "reads/s",
        "pread",
        runs,
        || rate(|| random(20_000, size, 0, |at, buf| file.read_at(at, buf).expect("a read"))) * 1e6,
        || rate(|| random(20_000, size, 0, pread)) * 1e6,
    );
    drop((file, instance));

    let instance = Instance::new(&image, size + size / 4);
    let file = instance.file();
    let read = |at: u64, buf: &mut [u8]| file.read_at(at, buf).expect("a read");
    sequential(1 << 20, read);
    for threads in [1, 2] {
        for (shown, piece) in [("1 MiB", 1 << 20), ("64 KiB", 64 << 10), ("4 KiB", 4096)] {
            row(
                &format!("sequential {shown}, warm, threads={threads}"),
                "MB/s",
                "memcpy",
                runs,
                || rate(|| on_threads(threads, |_| sequential(piece, read))),
                || rate(|| on_threads(threads, |_| sequential(piece, copy))),
            );
        }
        row(
            &format!("random 4 KiB, warm, threads={threads}"),
            "reads/s",
            "memcpy",
            runs,
            || rate(|| on_threads(threads, |seed| random(500_000, size, seed, read))) * 1e6,
            || rate(|| on_threads(threads, |seed| random(500_000, size, seed, copy))) * 1e6,
        );
        let names = &instance.names;
        let host_path = dir.path().join("a/b");
        std::fs::create_dir_all(&host_path).expect("a directory");
        let host_path = host_path.join("file");
        std::fs::write(&host_path, "").expect("a file");
        row(
            &format!("resolve /dir/sub/file, threads={threads}"),
            "lookups/s",
            "stat",
            runs,
            || {
                rate(|| {
                    on_threads(threads, |_| {
                        for _ in 0..500_000 {
                            std::hint::black_box(names.resolve(b"/dir/sub/file", true).expect("the file"));
                        }
                        500_000
                    })
                }) * 1e6
            },
            || {
                rate(|| {
                    on_threads(threads, |_| {
                        for _ in 0..100_000 {
                            std::hint::black_box(std::fs::metadata(&host_path).expect("the file"));
                        }
                        100_000
                    })
                }) * 1e6
            },
        );
    }
}
