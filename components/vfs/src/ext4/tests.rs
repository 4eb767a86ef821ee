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

/// A directory that goes away again; in memory where that exists, because thousands of files take long on a disk.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// An image with the content of `tree`.
fn image(tree: Option<&Path>, options: &[&str], size: &str) -> Vec<u8> {
    let dir = scratch();
    let path = dir.path().join("image");
    let mut arguments = vec!["-q", "-F"];
    if !options.contains(&"-b") {
        // Small volumes would get blocks of 1 KiB.
        arguments.extend(["-b", "4096"]);
    }
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
    let dir = scratch();
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
        &[
            "-O",
            "bigalloc,large_dir,quota",
            "-C",
            "16384",
            "-E",
            "hash_seed=01234567-89ab-cdef-0123-456789abcdef",
        ],
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

/// As [`run`], for e2fsck, whose status 1 says that it repaired something.
fn repair(image: &Path) {
    let done = Command::new("/usr/sbin/e2fsck").args(["-f", "-y", "-D"]).arg(image).output().unwrap();
    assert!(matches!(done.status.code(), Some(0 | 1)), "{}", String::from_utf8_lossy(&done.stdout));
}

fn debugfs_write(image: &Path, commands: &[String]) {
    let script = tempfile::NamedTempFile::new_in(image.parent().unwrap()).unwrap();
    fs::write(&script, commands.join("\n")).unwrap();
    run("debugfs", &["-w", "-f", script.path().to_str().unwrap(), image.to_str().unwrap()]);
}

#[test]
fn finds_names_by_every_hash() {
    let tree = sample_tree(3400);
    for number in 0..300 {
        fs::write(tree.path().join(format!("many/\u{e9}\u{6f22}{number}")), "").unwrap();
    }
    let dir = scratch();
    let original = image(Some(tree.path()), &["-b", "1024"], "64M");
    for (hash, unsigned) in [("legacy", false), ("half_md4", false), ("half_md4", true), ("tea", true)] {
        let path = dir.path().join("image");
        fs::write(&path, &original).unwrap();
        run("tune2fs", &["-E", &format!("hash_alg={hash}"), path.to_str().unwrap()]);
        if unsigned {
            debugfs_write(&path, &["set_super_value flags 2".to_string()]);
        }
        // Makes the indexes anew.
        repair(&path);
        let shown = run("debugfs", &["-R", "htree_dump /many", path.to_str().unwrap()]);
        let shown = String::from_utf8_lossy(&shown);
        assert!(shown.contains("Indirect levels: 1"), "{shown:.500}");
        let fs = mount(fs::read(&path).unwrap()).unwrap();
        compare(&walk(&fs, "many").unwrap(), &tree.path().join("many"));
        for number in 0..300 {
            assert_eq!(walk(&fs, &format!("many/{number}")).err(), Some(FsError::NotFound));
        }
    }
}

#[test]
fn replays_the_journal_in_memory() {
    let tree = sample_tree(10);
    let dir = scratch();
    let path = dir.path().join("image");
    let at = |name: &str| dir.path().join(name).into_os_string().into_string().unwrap();
    for (options, open) in [
        (&[][..], "-c"),
        (&[], "-c -v 2"),
        (&["-O", "^metadata_csum"], ""),
        (&["-O", "^64bit,^metadata_csum"], ""),
        (&["-O", "^64bit"], "-c"),
        (&["-t", "ext3", "-b", "1024"], ""),
    ] {
        let clean = image(Some(tree.path()), options, "64M");
        fs::write(&path, &clean).unwrap();
        let block_size = if options.contains(&"1024") { 1024 } else { 4096 };
        let blocks = run("debugfs", &["-R", "blocks /large", path.to_str().unwrap()]);
        let blocks: Vec<String> =
            String::from_utf8(blocks).unwrap().split_whitespace().map(|block| block.to_string()).collect();
        for name in ["A", "B", "C", "D"] {
            fs::write(at(name), vec![name.as_bytes()[0]; block_size]).unwrap();
        }
        // A block that begins with the journal's own magic number is changed in the journal.
        let mut magic = vec![b'M'; block_size];
        magic[..4].copy_from_slice(&journal::MAGIC.to_be_bytes());
        fs::write(at("M"), &magic).unwrap();
        fs::write(
            at("ABC"),
            [fs::read(at("A")).unwrap(), fs::read(at("B")).unwrap(), fs::read(at("C")).unwrap()].concat(),
        )
        .unwrap();
        let transactions = [
            format!("jo {open}"),
            format!("jw -b {},{},{} {}", blocks[0], blocks[1], blocks[2], at("ABC")),
            format!("jw -b {} {}", blocks[0], at("D")),
            format!("jw -r {}", blocks[1]),
            format!("jw -b {} {}", blocks[3], at("M")),
            format!("jw -r {}", blocks[4]),
            format!("jw -b {} {}", blocks[4], at("B")),
            "jc".to_string(),
        ];
        debugfs_write(&path, &transactions);
        let dirty = fs::read(&path).unwrap();
        assert!(dirty[1024 + 0x60] & 4 != 0, "the image is dirty");
        let disk = MemoryDisk::new(dirty.clone());
        let fs_dirty = mount_disk(disk.clone()).unwrap_or_else(|error| panic!("{options:?} {open}: {error}"));
        let ours = content(&walk(&fs_dirty, "large").unwrap()).unwrap();
        let block = |number: usize| &ours[number * block_size..(number + 1) * block_size];
        assert!(block(0).iter().all(|byte| *byte == b'D'), "{options:?} {open}");
        assert!(block(1) == &pattern(5 << 20)[block_size..2 * block_size], "revoked, {options:?} {open}");
        assert!(block(2).iter().all(|byte| *byte == b'C'));
        assert!(block(3) == magic);
        assert!(block(4).iter().all(|byte| *byte == b'B'), "revoked before it was written");
        let mut part = [0; 6];
        walk(&fs_dirty, "large").unwrap().read_at(3 * block_size as u64 - 3, &mut part).unwrap();
        assert_eq!(part, [b'C', b'C', b'C', 0xc0, 0x3b, 0x39]);
        assert!(disk.content() == dirty, "nothing is written");
        // e2fsck replays it for good, and agrees.
        repair(&path);
        let repaired = mount(fs::read(&path).unwrap()).unwrap();
        assert!(content(&walk(&repaired, "large").unwrap()).unwrap() == ours, "{options:?} {open}");

        // The crash came before the last commit block was written: its transaction never happened.
        let mut torn = dirty;
        let journal = run("debugfs", &["-R", "blocks <8>", path.to_str().unwrap()]);
        let journal: Vec<usize> = String::from_utf8(journal)
            .unwrap()
            .split_whitespace()
            .map(|block| block.parse().unwrap())
            .collect();
        let is_commit = |image: &[u8], block: usize| {
            image[block * block_size..][..8] == [0xc0, 0x3b, 0x39, 0x98, 0, 0, 0, 2]
        };
        let last = journal.iter().rev().find(|block| is_commit(&torn, **block)).copied().unwrap();
        torn[last * block_size..][..block_size].fill(0);
        let fs_torn = mount(torn).unwrap();
        let ours = content(&walk(&fs_torn, "large").unwrap()).unwrap();
        assert!(ours[4 * block_size..5 * block_size] == pattern(5 << 20)[4 * block_size..5 * block_size]);
        assert!(ours[..block_size].iter().all(|byte| *byte == b'D'));
    }
}

#[test]
fn refuses_what_it_cannot_read_and_says_why() {
    let host = TestHost::new();
    let kernel = Kernel::new(host, Config::default());
    let cache = BlockCache::for_kernel(&kernel);
    let kind = Ext4::new(&kernel, cache);
    let refused = |content: Vec<u8>| {
        let disk: Arc<dyn BlockDevice> = MemoryDisk::new(content);
        let error = kind.mount(Some(disk.clone()), true).err().unwrap();
        (error, kind.probe(&disk).unwrap(), kind.explain(&disk).unwrap_or_default())
    };
    let good = image(None, &[], "4M");
    let (error, probe, line) = refused(vec![0; 4 << 20]);
    assert_eq!((error, probe), (FsError::NotAFileSystem, false));
    assert!(line.contains("no ext2"), "{line}");
    assert_eq!(refused(vec![0; 512]).0, FsError::NotAFileSystem);
    let (error, probe, line) = refused(good[..2 << 20].to_vec());
    assert_eq!((error, probe), (FsError::Corrupt, true));
    assert!(line.contains("truncated") && line.contains("4194304"), "{line}");
    let mut broken = good.clone();
    broken[1024 + 8] ^= 1;
    let (error, _, line) = refused(broken);
    assert_eq!(error, FsError::Corrupt);
    assert!(line.contains("checksum") && line.contains("e2fsck"), "{line}");
    let mut feature = good.clone();
    feature[1024 + 0x61] |= 0x10;
    let (error, _, line) = refused(feature);
    assert_eq!(error, FsError::Unsupported);
    assert!(line.contains("dirdata"), "{line}");
    let mut feature = good;
    feature[1024 + 0x63] |= 0x80;
    assert!(refused(feature).2.contains("0x80"));
}

#[test]
fn a_wrong_checksum_is_corrupt() {
    let tree = sample_tree(1500);
    let good = image(Some(tree.path()), &[], "64M");
    let dir = scratch();
    let path = dir.path().join("image");
    fs::write(&path, &good).unwrap();
    let ask = |request: &str| {
        let shown = run("debugfs", &["-R", request, path.to_str().unwrap()]);
        String::from_utf8(shown).unwrap()
    };
    let first_block = |file: &str| {
        ask(&format!("blocks {file}")).split_whitespace().next().unwrap().parse::<usize>().unwrap()
    };
    let broken = |at: usize, path: &str| {
        let mut image = good.clone();
        image[at] ^= 0x10;
        mount(image).and_then(|fs| walk(&fs, path)).err()
    };
    // Unused bytes, so that only the checksum can tell.
    let leaf = first_block("/dir") * 4096;
    assert_eq!(broken(leaf + 4096 - 20, "dir/fast"), Some(FsError::Corrupt));
    let index = first_block("/many") * 4096;
    assert_eq!(broken(index + 0x1f, "many/a file with number 7"), Some(FsError::Corrupt));
    // "located at block 39, offset 0x0e00"
    let place = ask("imap /one");
    let number = |after: &str| {
        let rest = place.split(after).nth(1).unwrap();
        let rest = rest.split([',', '\n']).next().unwrap().trim();
        rest.strip_prefix("0x").map_or_else(|| rest.parse(), |hex| usize::from_str_radix(hex, 16)).unwrap()
    };
    let inode = number("at block ") * 4096 + number("offset ");
    assert_eq!(broken(inode + 200, "one"), Some(FsError::Corrupt));
    // A field of the first group descriptor that this reader does not need.
    assert_eq!(broken(4096 + 0x18, "one"), Some(FsError::Corrupt));
}

#[test]
fn many_threads_read_at_once() {
    let tree = sample_tree(300);
    let fs = mount(image(Some(tree.path()), &[], "64M")).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| compare(&fs.root().unwrap(), tree.path()));
        }
    });
}

#[test]
fn agrees_with_ext4_view() {
    let tree = sample_tree(500);
    let image = image(Some(tree.path()), &[], "64M");
    let theirs = ext4_view::Ext4::load(std::boxed::Box::new(image.clone())).unwrap();
    let ours = mount(image).unwrap();
    for path in ["large", "odd", "sparse", "dir/sub/\u{fc}\u{6f22}", "many/a file with number 499"] {
        let inode = walk(&ours, path).unwrap();
        let shown = format!("/{path}");
        let metadata = theirs.metadata(shown.as_str()).unwrap();
        assert_eq!(inode.metadata().unwrap().size, metadata.len(), "{path}");
        assert_eq!(u32::from(inode.metadata().unwrap().mode), u32::from(metadata.mode()) & 0o7777);
        assert!(content(&inode).unwrap() == theirs.read(shown.as_str()).unwrap(), "{path}");
    }
    let seen: Vec<Vec<u8>> = theirs
        .read_dir("/many")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().as_ref().to_vec())
        .filter(|name| name != b"." && name != b"..")
        .collect();
    assert_eq!(seen.len(), names(&walk(&ours, "many").unwrap()).unwrap().len());
}
