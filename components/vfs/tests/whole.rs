//! The whole component over a host's disks: drivers, partitions, mounts of the configuration, and a tree of more than
//! 10,000 files, each compared with what debugfs takes out of the image.

mod common;

use anykernel::Kernel;
use anykernel::config::{Config, Mount};
use anykernel::fs::{FileKind, FsError, Namespace, OpenOptions};
use hypercall::testing::TestHost;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

fn mount(source: &str, target: &str) -> Mount {
    Mount { source: source.into(), target: target.into(), kind: None, read_only: true }
}

fn start(host: TestHost, mounts: Vec<Mount>) -> Result<Arc<Kernel<TestHost>>, String> {
    let kernel = Kernel::new(host, Config { mounts, ..Config::default() });
    anykernel_vfs::hostblk::register(&kernel).map_err(|error| error.to_string())?;
    let started = anykernel_vfs::start(&kernel).map_err(|error| error.to_string());
    if started.is_err() {
        kernel.shutdown();
    }
    started.map(|()| kernel)
}

/// What is known of a file: the hash of its content, or the target of a link.
type Tree = BTreeMap<String, String>;

fn ours(names: &dyn Namespace, path: &str, tree: &mut Tree) {
    let directory = names.resolve(if path.is_empty() { b"/" } else { path.as_bytes() }, false).unwrap();
    let mut entries = Vec::new();
    let mut cursor = 0;
    while let Some(next) = directory
        .read_dir(cursor, &mut |entry| {
            entries.push(entry);
            entries.len() % 100 != 0
        })
        .unwrap()
    {
        cursor = next;
    }
    for entry in entries {
        let path = format!("{path}/{}", String::from_utf8(entry.name).unwrap());
        match entry.kind {
            FileKind::Directory => {
                tree.insert(path.clone(), "directory".into());
                ours(names, &path, tree);
            }
            FileKind::Symlink => {
                let target = names.resolve(path.as_bytes(), false).unwrap().read_link().unwrap();
                tree.insert(path, String::from_utf8(target).unwrap());
            }
            _ => {
                let file = names.open(path.as_bytes(), OpenOptions::READ).unwrap();
                let (mut hash, mut buf, mut at) = (Sha256::new(), vec![0; 65_536], 0);
                loop {
                    let len = file.read_at(at, &mut buf).unwrap();
                    if len == 0 {
                        break;
                    }
                    hash.update(&buf[..len]);
                    at += len as u64;
                }
                assert_eq!(at, file.metadata().unwrap().size);
                tree.insert(path, format!("{:x}", hash.finalize()));
            }
        }
    }
}

fn theirs(directory: &Path, path: &str, tree: &mut Tree) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let path = format!("{path}/{}", entry.file_name().into_string().unwrap());
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            tree.insert(path.clone(), "directory".into());
            theirs(&entry.path(), &path, tree);
        } else if kind.is_symlink() {
            tree.insert(
                path,
                std::fs::read_link(entry.path()).unwrap().into_os_string().into_string().unwrap(),
            );
        } else {
            let content = std::fs::read(entry.path()).unwrap();
            tree.insert(path, format!("{:x}", Sha256::digest(content)));
        }
    }
}

#[test]
fn ten_thousand_files_have_the_hashes_that_debugfs_gives() {
    let dir = common::scratch();
    let tree = dir.path().join("tree");
    std::fs::create_dir_all(tree.join("one directory")).unwrap();
    for number in 0..10_000u32 {
        let text = format!("file {number}\n").repeat(number as usize % 400);
        std::fs::write(tree.join(format!("one directory/{number:x}-{}", number * 7919)), text).unwrap();
    }
    for number in 0..40 {
        let below = tree.join(format!("deep/{}/{number}", "d/".repeat(number)));
        std::fs::create_dir_all(&below).unwrap();
        std::fs::write(below.join("text"), vec![number as u8; number * 10_007]).unwrap();
        std::os::unix::fs::symlink("text", below.join("link")).unwrap();
    }
    let path = dir.path().join("image");
    // The defaults of mkfs.ext4, with the block size of larger volumes.
    common::make_image(&path, &tree, &["-b", "4096"], "128M");
    let linear = std::fs::read(&path).unwrap();
    common::run("e2fsck", &["-f", "-y", "-D", path.to_str().unwrap()]);
    let indexed = std::fs::read(&path).unwrap();
    let dump = dir.path().join("dump");
    std::fs::create_dir(&dump).unwrap();
    common::run("debugfs", &["-R", &format!("rdump / {}", dump.display()), path.to_str().unwrap()]);
    let mut expected = Tree::new();
    theirs(&dump, "", &mut expected);
    assert!(expected.len() > 10_000);
    for image in [linear, indexed] {
        let host = TestHost::new();
        host.add_disk(image, 512, true);
        let kernel = start(host, vec![mount("disk0", "/")]).unwrap();
        let mut seen = Tree::new();
        ours(&*kernel.namespace().unwrap(), "", &mut seen);
        assert_eq!(seen.len(), expected.len());
        for (path, hash) in &expected {
            assert_eq!(seen.get(path), Some(hash), "{path}");
        }
        assert_eq!(host.disk_calls(0).writes, 0);
        kernel.shutdown();
    }
}

fn small_image(dir: &Path) -> Vec<u8> {
    let tree = dir.join("small");
    std::fs::create_dir_all(tree.join("dir")).unwrap();
    std::fs::write(tree.join("dir/file"), "content").unwrap();
    std::fs::write(tree.join("dir/long"), vec![1; 300_000]).unwrap();
    let path = dir.join("small-image");
    common::make_image(&path, &tree, &[], "2M");
    std::fs::read(path).unwrap()
}

#[test]
fn partitions_and_several_mounts() {
    let dir = common::scratch();
    let image = small_image(dir.path());
    let mut disk = vec![0; 1 << 20];
    disk.extend(&image);
    disk[446 + 4] = 0x83;
    disk[446 + 8..446 + 12].copy_from_slice(&2048u32.to_le_bytes());
    disk[446 + 12..446 + 16].copy_from_slice(&4096u32.to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let host = TestHost::new();
    host.add_disk(disk, 512, false);
    host.add_disk(image, 512, false);
    // The root is a tmpfs, where mount points are made.
    let kernel = start(host, vec![mount("disk0p1", "/srv/one"), mount("disk1", "/srv/two")]).unwrap();
    let names = kernel.namespace().unwrap();
    for path in ["/srv/one/dir/file", "/srv/two/dir/../../one/dir/file"] {
        let mut buf = [0; 20];
        let len = names.open(path.as_bytes(), OpenOptions::READ).unwrap().read_at(0, &mut buf).unwrap();
        assert_eq!(&buf[..len], b"content");
    }
    assert_eq!(names.mounts(), [b"/".to_vec(), b"/srv/one".to_vec(), b"/srv/two".to_vec()]);
    assert_eq!(names.stats(b"/srv/one/dir").unwrap().kind, "ext4");
    assert_eq!(names.open(b"/srv/one/new", OpenOptions::CREATE).err(), Some(FsError::ReadOnly));
    // A disk is not used as a whole while a part of it is.
    names.create(b"/three", FileKind::Directory, None).unwrap();
    assert_eq!(names.mount("disk0", b"/three", None, true), Err(FsError::Busy));
    assert_eq!(names.mount("disk1", b"/three", None, true), Err(FsError::Busy));
    names.unmount(b"/srv/two").unwrap();
    names.mount("disk1", b"/three", Some("ext4"), true).unwrap();
    drop(names);
    kernel.shutdown();
    assert_eq!(host.disk_calls(0).writes + host.disk_calls(1).writes, 0);
}

#[test]
fn every_failure_is_one_line_that_says_what_to_do() {
    let dir = common::scratch();
    let image = small_image(dir.path());
    let fails = |disk: Option<Vec<u8>>, source: &str| {
        let host = TestHost::new();
        if let Some(disk) = disk {
            host.add_disk(disk, 512, true);
        }
        let line = start(host, vec![mount(source, "/")]).map(drop).unwrap_err();
        assert!(!line.contains('\n') && line.starts_with(&format!("mount {source} at /: ")), "{line}");
        line
    };
    assert!(fails(None, "disk0").contains("there are none"));
    assert!(fails(Some(image.clone()), "disk1").contains("there are disk0"));
    assert!(fails(Some(vec![0; 1 << 20]), "disk0").contains("no file system that is known here"));
    assert!(fails(Some(image[..1 << 20].to_vec()), "disk0").contains("truncated"));
    let mut corrupt = image.clone();
    corrupt[1024 + 200] ^= 1;
    assert!(fails(Some(corrupt), "disk0").contains("e2fsck"));
    // The inode table is damaged, the superblock is not.
    let mut corrupt = image.clone();
    corrupt[4096..400_000].fill(0xee);
    assert!(fails(Some(corrupt), "disk0").contains("corrupt"));
    let host = TestHost::new();
    host.add_disk(image, 512, true);
    host.fail_disk(0, Some(hypercall::Error::Io));
    let line = start(host, vec![mount("disk0", "/")]).map(drop).unwrap_err();
    assert!(line.contains("device input/output error"), "{line}");
}

#[test]
fn a_disk_that_fails_later_is_an_error_of_the_read() {
    let dir = common::scratch();
    let host = TestHost::new();
    host.add_disk(small_image(dir.path()), 512, true);
    let kernel = start(host, vec![mount("disk0", "/")]).unwrap();
    let file = kernel.namespace().unwrap().open(b"/dir/long", OpenOptions::READ).unwrap();
    host.fail_disk(0, Some(hypercall::Error::Gone));
    assert!(matches!(file.read_at(250_000, &mut [0; 10]), Err(FsError::Device(_))));
    host.fail_disk(0, None);
    assert_eq!(file.read_at(250_000, &mut [0; 10]), Ok(10));
    drop(file);
    kernel.shutdown();
}

#[test]
fn nothing_is_left_behind() {
    let dir = common::scratch();
    let host = TestHost::new();
    host.add_disk(small_image(dir.path()), 512, true);
    let kernel = start(host, vec![mount("disk0", "/")]).unwrap();
    let names = kernel.namespace().unwrap();
    ours(&*names, "", &mut Tree::new());
    let device = Arc::downgrade(&kernel.block_devices()[0]);
    let root = Arc::downgrade(&names.resolve(b"/dir", true).unwrap());
    assert!(root.upgrade().is_none(), "a handle that nobody has");
    let weak = (Arc::downgrade(&kernel), Arc::downgrade(&names));
    drop(names);
    kernel.shutdown();
    drop(kernel);
    assert!(weak.1.upgrade().is_none(), "the namespace");
    assert!(weak.0.upgrade().is_none(), "the kernel");
    assert!(device.upgrade().is_none(), "the device");
}
