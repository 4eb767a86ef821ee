//! Against real images: made by mkfs.ext4, compared with debugfs and with the tree that they were made from.

use super::*;
use crate::cache::{CacheCounters, CacheLimits};
use crate::testing::MemoryDisk;
use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;
use anykernel::config::Config;
use hypercall::testing::TestHost;
use std::format;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::string::ToString;

/// Runs a program of e2fsprogs, which `cargo xtask test` installs; without it the test fails.
fn run(program: &str, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .env("DEBUGFS_PAGER", "cat")
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; apt-get install e2fsprogs"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    output.stdout
}

/// An image with the content of `tree`.
fn image(tree: Option<&Path>, options: &[&str], size: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut arguments = vec!["-q", "-F"];
    arguments.extend(options);
    if let Some(tree) = tree {
        arguments.extend(["-d", tree.to_str().unwrap()]);
    }
    arguments.extend([path.to_str().unwrap(), size]);
    run("mkfs.ext4", &arguments);
    fs::read(path).unwrap()
}

fn mount_disk(disk: Arc<MemoryDisk>) -> Result<Arc<dyn FileSystem>> {
    let host = TestHost::new();
    let kernel = Kernel::new(host, Config::default());
    let limits = CacheLimits { bytes: 16 << 20, read_ahead_bytes: 128 << 10 };
    let cache = BlockCache::new(host, limits, CacheCounters::default());
    let kind = Ext4::new(&kernel, cache);
    kind.mount(Some(disk), true)
}

fn mount(image: Vec<u8>) -> Result<Arc<dyn FileSystem>> {
    mount_disk(MemoryDisk::new(image))
}

fn walk(fs: &Arc<dyn FileSystem>, path: &str) -> Result<Arc<dyn Inode>> {
    path.split('/')
        .filter(|name| !name.is_empty())
        .try_fold(fs.root()?, |at, name| at.lookup(name.as_bytes()))
}

fn content(inode: &Arc<dyn Inode>) -> Result<Vec<u8>> {
    let mut content = vec![0; inode.metadata()?.size as usize + 1];
    let len = inode.read_at(0, &mut content)?;
    content.truncate(len);
    Ok(content)
}

fn names(inode: &Arc<dyn Inode>) -> Result<BTreeMap<Vec<u8>, FileKind>> {
    let mut names = BTreeMap::new();
    let mut cursor = 0;
    loop {
        let mut room = 7;
        let next = inode.read_dir(cursor, &mut |entry| {
            assert!(names.insert(entry.name, entry.kind).is_none(), "seen twice");
            room -= 1;
            room > 0
        })?;
        match next {
            Some(next) => cursor = next,
            None => return Ok(names),
        }
    }
}

/// Compares a directory and all below it with a directory of the host; says how many files it saw.
fn compare(ours: &Arc<dyn Inode>, theirs: &Path) -> usize {
    let mut files = 0;
    let mut expected = BTreeMap::new();
    for entry in fs::read_dir(theirs).unwrap() {
        let entry = entry.unwrap();
        expected.insert(entry.file_name().into_encoded_bytes(), entry.path());
    }
    let mut seen = names(ours).unwrap();
    seen.remove(b"lost+found".as_slice());
    assert!(seen.keys().eq(expected.keys()), "names in {}", theirs.display());
    for (name, path) in expected {
        let inode = ours.lookup(&name).unwrap();
        let (metadata, real) = (inode.metadata().unwrap(), fs::symlink_metadata(&path).unwrap());
        assert_eq!(metadata.kind, seen[&name]);
        let shown = path.display();
        assert_eq!(u32::from(metadata.mode), real.permissions().mode() & 0o7777, "{shown}");
        assert_eq!((metadata.uid, metadata.gid), (real.uid(), real.gid()), "{shown}");
        assert_eq!(metadata.modified.seconds, real.mtime(), "{shown}");
        if real.is_dir() {
            assert_eq!(metadata.kind, FileKind::Directory, "{shown}");
            files += compare(&inode, &path);
        } else if real.is_symlink() {
            assert_eq!(metadata.kind, FileKind::Symlink, "{shown}");
            let target = fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes();
            assert_eq!(inode.read_link().unwrap(), target, "{shown}");
        } else {
            assert_eq!(metadata.kind, FileKind::File, "{shown}");
            assert_eq!(metadata.size, real.len(), "{shown}");
            assert!(content(&inode).unwrap() == fs::read(&path).unwrap(), "content of {shown}");
            files += 1;
        }
    }
    files
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect()
}

/// A tree with something of everything.
fn sample_tree(many: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("dir")).unwrap();
    fs::create_dir(at("dir/sub")).unwrap();
    fs::create_dir(at("empty")).unwrap();
    fs::create_dir(at("many")).unwrap();
    for number in 0..many {
        fs::write(at(&format!("many/a file with number {number}")), number.to_string()).unwrap();
    }
    for (name, len) in [("none", 0), ("one", 1), ("block", 4096), ("odd", 12_345), ("large", 5 << 20)] {
        fs::write(at(name), pattern(len)).unwrap();
    }
    fs::write(at("dir/sub/\u{fc}\u{6f22}"), "name in UTF-8").unwrap();
    fs::write(at(&format!("dir/{}", "n".repeat(255))), "longest name").unwrap();
    let sparse = fs::File::create(at("sparse")).unwrap();
    std::os::unix::fs::FileExt::write_at(&sparse, b"middle", 3 << 20).unwrap();
    std::os::unix::fs::FileExt::write_at(&sparse, b"end", (40 << 20) - 3).unwrap();
    symlink("../one", at("dir/fast")).unwrap();
    symlink("long/".repeat(100), at("slow")).unwrap();
    symlink("x".repeat(59), at("fast59")).unwrap();
    symlink("x".repeat(60), at("slow60")).unwrap();
    fs::set_permissions(at("odd"), fs::Permissions::from_mode(0o4751)).unwrap();
    dir
}

#[test]
fn reads_every_variant() {
    let tree = sample_tree(1500);
    let variants: [&[&str]; 14] = [
        &[],
        &["-b", "1024"],
        &["-b", "2048"],
        &["-O", "^64bit"],
        &["-O", "^metadata_csum"],
        &["-O", "^metadata_csum,uninit_bg"],
        &["-O", "^metadata_csum,^64bit,uninit_bg", "-b", "1024"],
        &["-t", "ext3"],
        &["-t", "ext2"],
        &["-t", "ext2", "-b", "1024", "-I", "128"],
        &["-O", "^dir_index"],
        &["-O", "inline_data"],
        &["-O", "meta_bg,^resize_inode,metadata_csum_seed"],
        &["-O", "bigalloc,large_dir,quota", "-E", "hash_seed=01234567-89ab-cdef-0123-456789abcdef"],
    ];
    for options in variants {
        let fs = mount(image(Some(tree.path()), options, "96M"))
            .unwrap_or_else(|error| panic!("{options:?}: {error}"));
        let files = compare(&fs.root().unwrap(), tree.path());
        assert!(files >= 1500, "{options:?}");
        let sparse = walk(&fs, "sparse").unwrap().metadata().unwrap();
        assert!(sparse.allocated < 1 << 20, "{options:?}");
        assert_eq!(walk(&fs, "many/none").err(), Some(FsError::NotFound), "{options:?}");
        assert_eq!(walk(&fs, "one/none").err(), Some(FsError::NotDirectory), "{options:?}");
        assert_eq!(walk(&fs, &"n".repeat(256)).err(), Some(FsError::BadName));
    }
}

#[test]
fn reads_at_any_offset() {
    let tree = sample_tree(0);
    for options in [&["-b", "1024"][..], &["-t", "ext2", "-b", "1024"], &[]] {
        let fs = mount(image(Some(tree.path()), options, "64M")).unwrap();
        for name in ["large", "sparse", "odd"] {
            let inode = walk(&fs, name).unwrap();
            let expected = fs::read(tree.path().join(name)).unwrap();
            let mut buf = vec![0xaa; 70_000];
            for step in 0..200 {
                let offset = step * 7_919_111 % (expected.len() + 5000);
                let len = step * 977 % buf.len();
                let read = inode.read_at(offset as u64, &mut buf[..len]).unwrap();
                let there = expected.get(offset..).unwrap_or_default();
                assert_eq!(read, there.len().min(len), "{name} {offset} {len}");
                assert!(buf[..read] == there[..read], "{name} {offset} {len}");
            }
            assert_eq!(inode.read_at(u64::MAX, &mut buf).unwrap(), 0);
        }
    }
}

#[test]
fn hashes_as_debugfs_does() {
    let seed = "01234567-89ab-cdef-0123-456789abcdef";
    let bytes: Vec<u8> =
        (0..16).map(|at| u8::from_str_radix(&seed.replace('-', "")[at * 2..][..2], 16).unwrap()).collect();
    let long = "n".repeat(255);
    for (version, name) in [(0, "legacy"), (1, "half_md4"), (2, "tea")] {
        for file in ["a", "abcd", "some file name", "sixteen bytes ok", "\u{e9}\u{fc} not ASCII", &long] {
            let shown =
                run("debugfs", &["-R", &format!("dx_hash -h {name} -s {seed} \"{file}\""), "/dev/null"]);
            let shown = String::from_utf8(shown).unwrap();
            let theirs = shown.split("0x").nth(1).unwrap().split(' ').next().unwrap();
            let ours = hash::of(version, bytes.as_slice().try_into().unwrap(), file.as_bytes());
            assert_eq!(format!("{ours:x}"), theirs, "{name} of {file:?}: {shown}");
        }
    }
}
