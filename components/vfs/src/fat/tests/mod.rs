//! Against the tools of other people: mkfs.fat and fsck.fat (dosfstools), mcopy and mdir (mtools).

mod hostile;
mod model;
mod power;
mod reading;
mod writing;

use super::VFat;
use crate::cache::{BlockCache, CacheCounters, CacheLimits};
use crate::testing::MemoryDisk;
use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::{format, vec, vec::Vec};
use anykernel::block::BlockDevice;
use anykernel::fs::{FileKind, FileSystem, FsType, Inode, Result};
use hypercall::testing::TestHost;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A kind of volume, as arguments for mkfs.fat.
#[derive(Debug, Clone, Copy)]
struct Shape {
    width: &'static str,
    bytes: u64,
    /// Sectors per cluster.
    cluster: &'static str,
    more: &'static [&'static str],
}

const SHAPES: [Shape; 8] = [
    Shape { width: "12", bytes: 1440 << 10, cluster: "1", more: &["-r", "224"] },
    Shape { width: "12", bytes: 16 << 20, cluster: "64", more: &[] },
    Shape { width: "16", bytes: 16 << 20, cluster: "4", more: &[] },
    Shape { width: "16", bytes: 64 << 20, cluster: "8", more: &["-S", "1024", "-f", "1"] },
    Shape { width: "32", bytes: 40 << 20, cluster: "1", more: &[] },
    Shape { width: "32", bytes: 136 << 20, cluster: "4", more: &[] },
    // Fewer clusters than FAT32 should have, as on many EFI system partitions.
    Shape { width: "32", bytes: 16 << 20, cluster: "8", more: &[] },
    Shape { width: "32", bytes: 34 << 20, cluster: "1", more: &["-S", "4096"] },
];

/// Those that mtools understands: it takes a FAT32 volume with few clusters for another kind.
fn mtools_shapes() -> impl Iterator<Item = Shape> {
    SHAPES.into_iter().take(6)
}

/// A directory that goes away again; in memory where that exists, because images are large.
struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap())
    }
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// Runs a tool and returns what it printed.
#[track_caller]
fn tool(name: &str, args: &[&str]) -> String {
    let (ok, text) = try_tool(name, args);
    assert!(ok, "{name} {args:?}: {text}");
    text
}

#[track_caller]
fn try_tool(name: &str, args: &[&str]) -> (bool, String) {
    let output = Command::new(name)
        .args(args)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin")
        .env("LC_ALL", "C.UTF-8")
        .env("MTOOLS_SKIP_CHECK", "1")
        .env("TZ", "UTC")
        .output()
        .unwrap_or_else(|error| panic!("{name}: {error}; install it: apt-get install dosfstools mtools"));
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// An empty volume.
fn make(shape: Shape) -> Vec<u8> {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    std::fs::File::create(&path).unwrap().set_len(shape.bytes).unwrap();
    let mut args = vec!["-F", shape.width, "-s", shape.cluster, "-n", "A LABEL", "-i", "12345678"];
    args.extend(shape.more);
    args.push(text(&path));
    tool("mkfs.fat", &args);
    std::fs::read(&path).unwrap()
}

/// Asserts that fsck.fat finds nothing to complain about.
#[track_caller]
fn assert_clean(content: &[u8]) {
    let (ok, text) = fsck(content);
    assert!(ok && !text.contains("Dirty bit"), "fsck.fat: {text}");
}

/// Writes an image as a file with holes.
fn write_image(path: &Path, content: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).unwrap();
    file.set_len(content.len() as u64).unwrap();
    for (index, part) in content.chunks(64 << 10).enumerate() {
        if part.iter().any(|byte| *byte != 0) {
            file.write_all_at(part, (index as u64) << 16).unwrap();
        }
    }
}

fn fsck(content: &[u8]) -> (bool, String) {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    write_image(&path, content);
    try_tool("fsck.fat", &["-n", text(&path)])
}

fn kind_of(device: &Arc<MemoryDisk>) -> (VFat<TestHost>, Arc<dyn BlockDevice>) {
    let host = TestHost::new();
    let limits = CacheLimits { bytes: 8 << 20, read_ahead_bytes: 256 << 10 };
    let cache = BlockCache::new(host, limits, CacheCounters::default());
    (VFat::new(host, cache), device.clone())
}

fn try_mount(device: &Arc<MemoryDisk>, read_only: bool) -> Result<Arc<dyn FileSystem>> {
    let (kind, device) = kind_of(device);
    kind.mount(Some(device), read_only)
}

fn mount(device: &Arc<MemoryDisk>) -> Arc<dyn FileSystem> {
    try_mount(device, false).unwrap()
}

/// Bytes that look like nothing else, from a number.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

fn walk(root: &Arc<dyn Inode>, path: &str) -> Result<Arc<dyn Inode>> {
    path.split('/')
        .filter(|part| !part.is_empty())
        .try_fold(root.clone(), |at, part| at.lookup(part.as_bytes()))
}

fn list(dir: &Arc<dyn Inode>) -> Result<Vec<(String, FileKind)>> {
    let mut names = Vec::new();
    dir.read_dir(0, &mut |entry| {
        names.push((String::from_utf8(entry.name).unwrap(), entry.kind));
        true
    })?;
    Ok(names)
}

fn read_all(file: &Arc<dyn Inode>) -> Result<Vec<u8>> {
    let mut buf = vec![0xaa; file.metadata()?.size as usize];
    let len = file.read_at(0, &mut buf)?;
    assert_eq!(len, buf.len());
    Ok(buf)
}

/// What is in a volume: files with content, directories without, by path.
type Tree = BTreeMap<String, Option<Vec<u8>>>;

fn read_tree(root: &Arc<dyn Inode>) -> Tree {
    let mut tree = Tree::new();
    let mut todo = vec![(String::new(), root.clone())];
    while let Some((path, dir)) = todo.pop() {
        for (name, kind) in list(&dir).unwrap() {
            let inode = dir.lookup(name.as_bytes()).unwrap();
            let path = format!("{path}/{name}");
            assert_eq!(inode.metadata().unwrap().kind, kind);
            if kind == FileKind::Directory {
                todo.push((path.clone(), inode));
                tree.insert(path, None);
            } else {
                tree.insert(path, Some(read_all(&inode).unwrap()));
            }
        }
    }
    tree
}

/// What the host's file system has below `path`.
fn read_host_tree(top: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut todo = vec![top.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let name = format!("/{}", path.strip_prefix(top).unwrap().to_str().unwrap());
            if path.is_dir() {
                tree.insert(name, None);
                todo.push(path);
            } else {
                tree.insert(name, Some(std::fs::read(&path).unwrap()));
            }
        }
    }
    tree
}

/// Names, lengths and depths of all sorts; about `bytes` in all.
fn sample(bytes: usize) -> Tree {
    let mut tree = Tree::new();
    let dirs =
        ["", "/SHORT", "/a directory with a long name", "/deep", "/deep/er", "/deep/er/Ünïcödé", "/日本語"];
    for dir in dirs.iter().skip(1) {
        tree.insert(dir.to_string(), None);
    }
    let names = [
        "README.TXT",
        "readme.md",
        "a long name, with commas; and more.html",
        "naïve café.txt",
        "архив.tar.gz",
        "snowman ☃ of the first plane.dat",
        ".hidden",
        "many.dots.in.a.name",
        "x",
        "UPPER.lower",
        "+[=],;.plus",
    ];
    let long = "n".repeat(150);
    let lens = [0, 1, 511, 512, 513, 2048, 4095, 4096, 4097, 32768, 32769, 100_000, 300_000];
    let mut total = 0;
    for (round, dir) in dirs.iter().cycle().take(dirs.len() * 3).enumerate() {
        for (index, name) in names.iter().chain([&long.as_str()]).enumerate() {
            let len = lens[(round * 5 + index * 3) % lens.len()];
            if total + len > bytes || round % 3 != index % 3 {
                continue;
            }
            total += len;
            tree.insert(format!("{dir}/{name}"), Some(noise((round * 100 + index) as u64, len)));
        }
    }
    tree
}

#[track_caller]
fn assert_same(ours: &Tree, theirs: &Tree) {
    let (a, b): (Vec<_>, Vec<_>) = (ours.keys().collect(), theirs.keys().collect());
    assert_eq!(a, b);
    for (path, content) in ours {
        assert!(content == &theirs[path], "{path} differs");
    }
}
