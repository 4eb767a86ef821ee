//! What we wrote, read by mtools and judged by fsck.fat.

use super::*;
use anykernel::fs::{FsError, Timestamp};
use std::sync::atomic::Ordering::Relaxed;

/// Creates what the path names; its directory exists.
fn create(root: &Arc<dyn Inode>, path: &str, kind: FileKind) -> Arc<dyn Inode> {
    let (dir, name) = path.rsplit_once('/').unwrap();
    walk(root, dir).unwrap().create(name.as_bytes(), kind, None).unwrap()
}

pub(super) fn write_tree(root: &Arc<dyn Inode>, tree: &Tree) {
    for (path, content) in tree {
        match content {
            None => drop(create(root, path, FileKind::Directory)),
            Some(content) => {
                let file = create(root, path, FileKind::File);
                for (index, part) in content.chunks(10_007).enumerate() {
                    assert_eq!(file.write_at(index as u64 * 10_007, part).unwrap(), part.len());
                }
            }
        }
    }
}

fn empty(shape: Shape) -> (Arc<MemoryDisk>, Arc<dyn FileSystem>) {
    let device = MemoryDisk::new(make(shape));
    let fs = mount(&device);
    (device, fs)
}

#[test]
fn every_width_and_cluster_size() {
    for (index, shape) in SHAPES.into_iter().enumerate() {
        let mut sample = sample((shape.bytes / 3).min(6 << 20) as usize);
        sample.insert(format!("/{}", "m".repeat(255)), Some(noise(7, 77)));
        let (device, fs) = empty(shape);
        let free = fs.stats().unwrap().free_blocks;
        write_tree(&fs.root().unwrap(), &sample);
        assert_same(&read_tree(&fs.root().unwrap()), &sample);
        assert!(fs.stats().unwrap().free_blocks < free);
        fs.sync().unwrap();
        let content = device.durable();
        assert_clean(&content);
        // Read by a new instance, from what was durable.
        let again = mount(&MemoryDisk::new(content.clone()));
        assert_same(&read_tree(&again.root().unwrap()), &sample);
        assert_eq!(again.stats().unwrap().free_blocks, fs.stats().unwrap().free_blocks);
        if index >= mtools_shapes().count() {
            continue;
        }
        let scratch = Scratch::new();
        let (image, tree) = (scratch.path("image"), scratch.path("tree"));
        write_image(&image, &content);
        std::fs::create_dir(&tree).unwrap();
        tool("mcopy", &["-s", "-n", "-i", text(&image), "::/*", text(&tree)]);
        assert_same(&read_host_tree(&tree), &sample);
    }
}

#[test]
fn removing_everything_gives_everything_back() {
    for shape in [SHAPES[0], SHAPES[2], SHAPES[4]] {
        let sample = sample(400_000);
        let (device, fs) = empty(shape);
        let root = fs.root().unwrap();
        let free = fs.stats().unwrap().free_blocks;
        write_tree(&root, &sample);
        for path in sample.keys().rev() {
            let (dir, name) = path.rsplit_once('/').unwrap();
            walk(&root, dir).unwrap().remove(name.as_bytes()).unwrap();
        }
        assert_eq!(list(&root).unwrap(), vec![]);
        fs.sync().unwrap();
        // The root of FAT32 does not shrink.
        let root_clusters = match shape.width {
            "32" => root.metadata().unwrap().allocated / u64::from(fs.stats().unwrap().block_size) - 1,
            _ => 0,
        };
        assert_eq!(fs.stats().unwrap().free_blocks, free - root_clusters);
        assert_clean(&device.durable());
    }
}

#[test]
fn holes_are_zeros_and_sizes_are_limited() {
    let (device, fs) = empty(SHAPES[4]);
    let root = fs.root().unwrap();
    let file = root.create(b"holes", FileKind::File, None).unwrap();
    // Free space that was used before, so that zeros are not there by chance.
    let old = root.create(b"old", FileKind::File, None).unwrap();
    old.write_at(0, &vec![0xff; 30 << 20]).unwrap();
    drop(old);
    root.remove(b"old").unwrap();
    fs.sync().unwrap();
    file.write_at(100_000, b"end").unwrap();
    let mut expected = vec![0; 100_000];
    expected.extend(b"end");
    assert!(read_all(&file).unwrap() == expected);
    file.truncate(50_001).unwrap();
    file.truncate(150_000).unwrap();
    assert!(read_all(&file).unwrap() == vec![0; 150_000]);
    assert_eq!(file.write_at(u64::from(u32::MAX), b"x"), Err(FsError::TooLarge));
    assert_eq!(file.write_at(u64::MAX, b"x"), Err(FsError::TooLarge));
    assert_eq!(file.truncate(1 << 32), Err(FsError::TooLarge));
    assert_eq!(file.truncate(u64::from(u32::MAX)), Err(FsError::NoSpace));
    assert_eq!(file.metadata().unwrap().size, 150_000);
    file.truncate(0).unwrap();
    assert_eq!(file.metadata().unwrap().allocated, 0);
    fs.sync().unwrap();
    assert_clean(&device.durable());
}

#[test]
fn a_full_volume_stays_sound() {
    for shape in [SHAPES[0], SHAPES[2], SHAPES[4]] {
        let (device, fs) = empty(shape);
        let root = fs.root().unwrap();
        let file = root.create(b"filler", FileKind::File, None).unwrap();
        let chunk = noise(3, 300_000);
        let mut size = 0;
        let error = loop {
            match file.write_at(size, &chunk) {
                Ok(len) => size += len as u64,
                Err(error) => break error,
            }
        };
        assert_eq!(error, FsError::NoSpace);
        assert_eq!(file.metadata().unwrap().size, size);
        // Byte by cluster, to the last one.
        let step = fs.stats().unwrap().block_size as usize;
        while file.write_at(size, &chunk[..step]).is_ok() {
            size += step as u64;
        }
        assert_eq!(fs.stats().unwrap().free_blocks, 0);
        assert_eq!(root.create(b"dir", FileKind::Directory, None).err(), Some(FsError::NoSpace));
        // Without clusters for a larger directory, names run out.
        let mut made = 0;
        let error = loop {
            match root.create(format!("name number {made}").as_bytes(), FileKind::File, None) {
                Ok(_) => made += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(error, FsError::NoSpace);
        fs.sync().unwrap();
        assert_clean(&device.durable());
        // What is removed can be used at once.
        drop(file);
        root.remove(b"filler").unwrap();
        let again = root.create(b"A", FileKind::File, None);
        let again = again.or_else(|_| root.lookup(b"name number 0")).unwrap();
        again.write_at(0, &vec![1; size as usize / 2]).unwrap();
        fs.sync().unwrap();
        assert_clean(&device.durable());
    }
}

#[test]
fn an_open_file_outlives_its_name() {
    let (device, fs) = empty(SHAPES[2]);
    let root = fs.root().unwrap();
    let free = fs.stats().unwrap().free_blocks;
    let file = root.create(b"gone", FileKind::File, None).unwrap();
    let content = noise(9, 200_000);
    file.write_at(0, &content).unwrap();
    root.remove(b"gone").unwrap();
    assert_eq!(root.lookup(b"gone").err(), Some(FsError::NotFound));
    // A new file of the same name, in the same slot, is another one.
    let other = root.create(b"gone", FileKind::File, None).unwrap();
    other.write_at(0, &noise(10, 200_000)).unwrap();
    fs.sync().unwrap();
    assert!(read_all(&file).unwrap() == content);
    assert_eq!(file.metadata().unwrap().links, 0);
    file.write_at(200_000, b"more").unwrap();
    assert_eq!(file.metadata().unwrap().size, 200_004);
    assert!(read_all(&other).unwrap() == noise(10, 200_000));
    fs.sync().unwrap();
    // The last user goes while nothing else is changed.
    drop(file);
    fs.sync().unwrap();
    assert_clean(&device.durable());
    root.remove(b"gone").unwrap();
    drop(other);
    fs.sync().unwrap();
    assert_eq!(fs.stats().unwrap().free_blocks, free);
    assert_clean(&device.durable());
}

#[test]
fn rename_follows_rename_2() {
    for shape in [SHAPES[0], SHAPES[4]] {
        let (device, fs) = empty(shape);
        let root = fs.root().unwrap();
        let a = root.create(b"a", FileKind::Directory, None).unwrap();
        let b = a.create(b"b", FileKind::Directory, None).unwrap();
        let file = root.create(b"file", FileKind::File, None).unwrap();
        file.write_at(0, b"content").unwrap();
        assert_eq!(root.rename(b"a", &b, b"x"), Err(FsError::Invalid));
        assert_eq!(root.rename(b"a", &a, b"x"), Err(FsError::Invalid));
        assert_eq!(root.rename(b"a", &root, b"file"), Err(FsError::NotDirectory));
        assert_eq!(root.rename(b"file", &root, b"a"), Err(FsError::IsDirectory));
        assert_eq!(root.rename(b"none", &root, b"a"), Err(FsError::NotFound));
        assert_eq!(a.rename(b"b", &root, b"a"), Err(FsError::NotEmpty));
        assert_eq!(root.rename(b"file", &file, b"a"), Err(FsError::NotDirectory));
        assert_eq!(root.rename(b"file", &root, b"a/b"), Err(FsError::BadName));
        // Only the case changes.
        root.rename(b"file", &root, b"File").unwrap();
        assert!(list(&root).unwrap().contains(&("File".into(), FileKind::File)));
        root.rename(b"FILE", &root, b"File").unwrap();
        // Into a directory, under a long name, while it is open.
        root.rename(b"File", &b, b"a long name for this").unwrap();
        file.write_at(7, b" and more").unwrap();
        assert_eq!(
            read_all(&walk(&root, "/a/b/a long name for this").unwrap()).unwrap(),
            b"content and more"
        );
        // Over a file that is open.
        let old = root.create(b"old", FileKind::File, None).unwrap();
        old.write_at(0, b"old").unwrap();
        b.rename(b"a long name for this", &root, b"OLD").unwrap();
        assert_eq!(read_all(&old).unwrap(), b"old");
        old.write_at(3, b"er").unwrap();
        file.write_at(0, b"CONTENT").unwrap();
        assert_eq!(read_all(&root.lookup(b"old").unwrap()).unwrap(), b"CONTENT and more");
        // A directory elsewhere: its .. follows (fsck looks).
        a.rename(b"b", &root, b"b").unwrap();
        let c = b.create(b"c", FileKind::Directory, None).unwrap();
        c.create(b"in c", FileKind::File, None).unwrap();
        root.rename(b"b", &a, b"b again").unwrap();
        assert!(walk(&root, "/a/b again/c/in c").is_ok());
        // Over an empty directory, which somebody has open.
        let empty = root.create(b"empty", FileKind::Directory, None).unwrap();
        b.rename(b"c", &root, b"empty").unwrap();
        assert!(walk(&root, "/empty/in c").is_ok());
        assert_eq!(empty.create(b"x", FileKind::File, None).err(), Some(FsError::NotFound));
        assert_eq!(list(&empty).unwrap(), vec![]);
        assert_eq!(root.rename(b"a", &root, b"empty"), Err(FsError::NotEmpty));
        drop((old, file));
        fs.sync().unwrap();
        assert_clean(&device.durable());
    }
}

#[test]
fn names_and_kinds_are_checked() {
    let (device, fs) = empty(SHAPES[2]);
    let root = fs.root().unwrap();
    let long = "x".repeat(256);
    for name in ["", ".", "..", "a/b", "a.", "a ", "a:b", "?", "a\0b", &long] {
        assert_eq!(
            root.create(name.as_bytes(), FileKind::File, None).err(),
            Some(FsError::BadName),
            "{name}"
        );
    }
    assert_eq!(root.create(b"\xff", FileKind::File, None).err(), Some(FsError::BadName));
    let symlink = root.create(b"link", FileKind::Symlink, Some(b"target"));
    assert_eq!(symlink.err(), Some(FsError::Unsupported));
    root.create("Grüße 😀".as_bytes(), FileKind::File, None).unwrap();
    for name in ["Grüße 😀", "GRÜßE 😀", "GR__E_~1"] {
        assert_eq!(root.create(name.as_bytes(), FileKind::File, None).err(), Some(FsError::Exists), "{name}");
    }
    let dir = root.create(b"dir", FileKind::Directory, None).unwrap();
    dir.create(b"f", FileKind::File, None).unwrap();
    assert_eq!(root.remove(b"dir"), Err(FsError::NotEmpty));
    assert_eq!(root.remove(b"none"), Err(FsError::NotFound));
    assert_eq!(dir.write_at(0, b"x"), Err(FsError::IsDirectory));
    dir.remove(b"F").unwrap();
    root.remove(b"DIR").unwrap();
    assert_eq!(dir.create(b"f", FileKind::File, None).err(), Some(FsError::NotFound));
    let file = root.lookup("grüße 😀".as_bytes()).unwrap();
    let time = Timestamp { seconds: 1_000_000_000, nanos: 0 };
    file.set_modified(time).unwrap();
    drop(file);
    fs.sync().unwrap();
    assert_clean(&device.durable());
    let again = mount(&MemoryDisk::new(device.durable()));
    let file = again.root().unwrap().lookup("Grüße 😀".as_bytes()).unwrap();
    assert_eq!(file.metadata().unwrap().modified, time);
}

#[test]
fn the_dirty_bit_is_set_while_changes_are_under_way() {
    for shape in [SHAPES[0], SHAPES[2], SHAPES[4]] {
        let (device, fs) = empty(shape);
        let root = fs.root().unwrap();
        let file = root.create(b"f", FileKind::File, None).unwrap();
        file.write_at(0, b"content").unwrap();
        file.sync().unwrap();
        let (_, text) = fsck(&device.durable());
        assert!(text.contains("Dirty bit is set"), "{text}");
        fs.sync().unwrap();
        assert_clean(&device.durable());
        file.write_at(0, b"CONTENT").unwrap();
        file.sync().unwrap();
        assert!(fsck(&device.durable()).1.contains("Dirty bit is set"));
        // Unmounted without a sync: the last user writes what is left.
        file.write_at(7, b"!").unwrap();
        drop((root, file, fs));
        assert_clean(&device.durable());
        // Whoever finds a volume dirty leaves it so: nobody checked it.
        let mut content = device.durable();
        content[if shape.width == "32" { 65 } else { 37 }] |= 1;
        let device = MemoryDisk::new(content);
        let fs = mount(&device);
        assert_eq!(read_all(&fs.root().unwrap().lookup(b"f").unwrap()).unwrap(), b"CONTENT!");
        fs.root().unwrap().create(b"g", FileKind::File, None).unwrap();
        drop(fs);
        assert!(fsck(&device.durable()).1.contains("Dirty bit is set"));
    }
}

#[test]
fn a_device_has_one_writer() {
    let device = MemoryDisk::new(make(SHAPES[2]));
    let (kind, device) = kind_of(&device);
    let mount = |read_only| kind.mount(Some(device.clone()), read_only);
    let reader = mount(true).unwrap();
    assert!(mount(true).is_ok());
    assert_eq!(mount(false).err(), Some(FsError::Busy));
    drop(reader);
    let writer = mount(false).unwrap();
    assert_eq!(mount(true).err(), Some(FsError::Busy));
    let file = writer.root().unwrap().create(b"f", FileKind::File, None).unwrap();
    drop(writer);
    // Unmounted, but a file is open.
    assert_eq!(mount(false).err(), Some(FsError::Busy));
    drop(file);
    assert!(mount(false).unwrap().root().unwrap().lookup(b"f").is_ok());
}

#[test]
fn a_wrong_hint_of_free_space_is_not_believed() {
    let mut image = make(SHAPES[4]);
    let info = usize::from(u16::from_le_bytes([image[48], image[49]])) * 512;
    image[info + 488..info + 492].copy_from_slice(&3_u32.to_le_bytes());
    let device = MemoryDisk::new(image);
    let fs = mount(&device);
    let file = fs.root().unwrap().create(b"f", FileKind::File, None).unwrap();
    file.write_at(0, &[1; 100_000]).unwrap();
    fs.sync().unwrap();
    assert_clean(&device.durable());
}

#[test]
fn a_directory_knows_when_it_changed() {
    let (_, fs) = empty(SHAPES[2]);
    let dir = fs.root().unwrap().create(b"d", FileKind::Directory, None).unwrap();
    let old = Timestamp { seconds: 1_000_000_000, nanos: 0 };
    let changes: [&dyn Fn(); 3] = [
        &|| drop(dir.create(b"a", FileKind::File, None).unwrap()),
        &|| dir.rename(b"a", &dir, b"b").unwrap(),
        &|| dir.remove(b"b").unwrap(),
    ];
    for change in changes {
        dir.set_modified(old).unwrap();
        assert_eq!(dir.metadata().unwrap().modified, old);
        change();
        assert!(dir.metadata().unwrap().modified > old);
    }
}

#[test]
fn read_only_refuses_every_change() {
    let image = make(SHAPES[4]);
    let device = MemoryDisk::with_info(image.clone(), |info| info.read_only = true);
    let by_device = try_mount(&device, false).unwrap();
    let other = MemoryDisk::new(image);
    let by_mount = try_mount(&other, true).unwrap();
    for fs in [&by_device, &by_mount] {
        assert!(fs.stats().unwrap().read_only);
        let root = fs.root().unwrap();
        assert_eq!(root.create(b"f", FileKind::File, None).err(), Some(FsError::ReadOnly));
        assert_eq!(root.remove(b"f"), Err(FsError::ReadOnly));
        assert_eq!(root.rename(b"f", &root, b"g"), Err(FsError::ReadOnly));
        assert_eq!(root.set_modified(Timestamp::default()), Err(FsError::ReadOnly));
        fs.sync().unwrap();
    }
    drop((by_device, by_mount));
    assert_eq!(device.writes.load(Relaxed) + other.writes.load(Relaxed), 0);
    assert_eq!(device.flushes.load(Relaxed) + other.flushes.load(Relaxed), 0);
}

#[test]
fn sequential_transfers_take_few_requests() {
    let (device, fs) = empty(SHAPES[4]);
    let content = noise(5, 4 << 20);
    let file = fs.root().unwrap().create(b"f", FileKind::File, None).unwrap();
    let before = device.writes.load(Relaxed);
    for (index, part) in content.chunks(64 << 10).enumerate() {
        file.write_at((index << 16) as u64, part).unwrap();
    }
    file.sync().unwrap();
    let writes = device.writes.load(Relaxed) - before;
    // Clusters are 512 bytes; 4 MiB in requests of up to 128 KiB, the tables and the directory.
    assert!(writes < 80, "{writes} writes");
    drop((file, fs));
    let device = MemoryDisk::new(device.durable());
    let fs = mount(&device);
    let file = fs.root().unwrap().lookup(b"f").unwrap();
    let before = device.reads.load(Relaxed);
    let mut buf = vec![0; 64 << 10];
    for (index, part) in content.chunks(64 << 10).enumerate() {
        assert_eq!(file.read_at((index << 16) as u64, &mut buf).unwrap(), part.len());
        assert!(buf == part);
    }
    let reads = device.reads.load(Relaxed) - before;
    assert!(reads < 120, "{reads} reads");
}

#[test]
fn a_large_directory_costs_no_quadratic_work() {
    let (device, fs) = empty(SHAPES[4]);
    let root = fs.root().unwrap();
    let dir = root.create(b"dir", FileKind::Directory, None).unwrap();
    let (reads, writes) = (device.reads.load(Relaxed), device.writes.load(Relaxed));
    for i in 0..1500 {
        let name = format!("a file with quite a long name, number {i}.text");
        dir.create(name.as_bytes(), FileKind::File, None).unwrap();
    }
    fs.sync().unwrap();
    let reads = device.reads.load(Relaxed) - reads;
    let writes = device.writes.load(Relaxed) - writes;
    // 1,500 names in 5 slots each: 240 kB, 59 pages of the cache.
    assert!(reads < 200 && writes < 200, "{reads} reads, {writes} writes");
    assert_eq!(list(&dir).unwrap().len(), 1500);
    assert_clean(&device.durable());
}

#[test]
fn many_threads() {
    let (device, fs) = empty(SHAPES[4]);
    let root = fs.root().unwrap();
    let dirs: Vec<_> =
        (0..3).map(|i| root.create(format!("d{i}").as_bytes(), FileKind::Directory, None).unwrap()).collect();
    std::thread::scope(|scope| {
        for thread in 0..4_usize {
            let (root, dirs, fs) = (root.clone(), dirs.clone(), fs.clone());
            scope.spawn(move || {
                for i in 0..150_usize {
                    let (from, to) = (&dirs[(i + thread) % 3], &dirs[(i * 7 + thread) % 3]);
                    let name = format!("the file of thread {thread}");
                    let content = noise((thread * 1000 + i) as u64, 3000);
                    let file = from.create(name.as_bytes(), FileKind::File, None).unwrap();
                    file.write_at(0, &content).unwrap();
                    from.rename(name.as_bytes(), to, b"shared").unwrap();
                    // Another thread may have taken or removed it by now.
                    let _ = to.remove(b"shared");
                    let _ = root.rename(b"d0", &dirs[1], b"sub");
                    let _ = dirs[1].rename(b"sub", &root, b"d0");
                    let _ = list(&root).unwrap();
                    assert!(read_all(&file).unwrap() == content);
                    if i % 50 == 49 {
                        fs.sync().unwrap();
                    }
                }
            });
        }
    });
    fs.sync().unwrap();
    assert_clean(&device.durable());
}
