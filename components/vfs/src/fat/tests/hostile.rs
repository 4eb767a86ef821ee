//! Volumes that lie.

use super::*;
use anykernel::fs::FsError;
use proptest::prelude::*;

/// Lists and reads what can be reached, then writes, renames and removes. Only typed errors may come of it. A corrupt
/// tree can be endless, so depth and number are limited here.
fn exercise(content: Vec<u8>) {
    let device = MemoryDisk::new(content);
    let Ok(fs) = try_mount(&device, false) else { return };
    let _ = fs.stats();
    let Ok(root) = fs.root() else { return };
    let mut todo = vec![(root.clone(), 0)];
    let mut found = Vec::new();
    while let Some((dir, depth)) = todo.pop() {
        for (name, kind) in list(&dir).unwrap_or_default() {
            let Ok(inode) = dir.lookup(name.as_bytes()) else { continue };
            let _ = inode.metadata();
            if found.len() > 200 {
                break;
            }
            if kind == FileKind::Directory && depth < 8 {
                todo.push((inode.clone(), depth + 1));
            }
            found.push((dir.clone(), name, inode));
        }
    }
    let mut buf = vec![0; 70_000];
    for (_, _, inode) in &found {
        let size = inode.metadata().map_or(0, |metadata| metadata.size);
        for offset in [0, 4096, size / 2, size.saturating_sub(5), u64::from(u32::MAX)] {
            let _ = inode.read_at(offset, &mut buf);
        }
    }
    for (index, (dir, name, inode)) in found.iter().enumerate().take(60) {
        let _ = match index % 7 {
            0 => inode.write_at(3000, &buf[..9000]).map(|_| ()),
            1 => inode.truncate(5000),
            2 => dir.rename(name.as_bytes(), &root, b"moved to the root"),
            3 => root.rename(b"moved to the root", dir, b"and back"),
            4 => dir.remove(name.as_bytes()),
            5 => inode.create(b"a new one", FileKind::Directory, None).map(|_| ()),
            _ => inode.truncate(0),
        };
    }
    for i in 0..20 {
        let _ = root
            .create(format!("new file number {i}").as_bytes(), FileKind::File, None)
            .and_then(|file| file.write_at(0, &buf[..i * 1000]));
    }
    let _ = fs.sync();
}

fn filled(shape: Shape) -> Vec<u8> {
    let device = MemoryDisk::new(make(shape));
    let fs = mount(&device);
    super::writing::write_tree(&fs.root().unwrap(), &sample(300_000));
    drop(fs);
    device.durable()
}

/// The bytes that matter: boot sector, FSInfo, tables, directories.
fn structure(image: &[u8]) -> Vec<usize> {
    let layout = super::super::bpb::Layout::parse(image.first_chunk().unwrap(), image.len() as u64).unwrap();
    let fat = layout.fat_offset as usize;
    let mut places: Vec<usize> = (11..90).chain(510..512).collect();
    if let Some(info) = layout.fs_info {
        places.extend(info as usize + 484..info as usize + 496);
    }
    // The first clusters are where everything is.
    for copy in 0..usize::from(layout.fats) {
        places.extend((fat..fat + 4000).map(|at| at + copy * layout.fat_bytes as usize));
    }
    let data = layout.data_offset as usize;
    let root = data - if layout.fats == 2 && layout.fs_info.is_none() { 7168 } else { 0 };
    places.extend(root..root + 6000);
    // Slots anywhere: 32-byte records with an attribute of a directory or a long name.
    places.extend(
        (data..image.len() - 32)
            .step_by(32)
            .filter(|at| matches!(image[at + 11], 0x10 | 0x0f | 0x20))
            .take(400)
            .flat_map(|at| at..at + 32),
    );
    places.retain(|at| *at < image.len());
    places
}

fn images() -> &'static [(Vec<u8>, Vec<usize>)] {
    static IMAGES: std::sync::OnceLock<Vec<(Vec<u8>, Vec<usize>)>> = std::sync::OnceLock::new();
    IMAGES.get_or_init(|| {
        [
            SHAPES[0],
            Shape { bytes: 9 << 20, ..SHAPES[2] },
            Shape { width: "32", bytes: 3 << 20, cluster: "1", more: &[] },
        ]
        .into_iter()
        .map(|shape| {
            let image = filled(shape);
            let places = structure(&image);
            (image, places)
        })
        .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, max_shrink_iters: 100, ..ProptestConfig::default() })]

    #[test]
    fn damage_ends_in_typed_errors(
        which in 0..3_usize,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..40)
    ) {
        let (image, places) = &images()[which];
        let mut image = image.clone();
        for (place, value, flip) in edits {
            let place = places[place.index(places.len())];
            image[place] = if flip { image[place] ^ (1 << (value % 8)) } else { value };
        }
        exercise(image);
    }
}

/// Offsets of the first table, the root directory and the slot of `name` in it.
fn places(image: &[u8], short: &[u8; 11]) -> (usize, usize) {
    let layout = super::super::bpb::Layout::parse(image.first_chunk().unwrap(), image.len() as u64).unwrap();
    let slot = image.windows(11).position(|window| window == short).unwrap();
    (layout.fat_offset as usize, slot)
}

#[test]
fn chains_that_make_no_sense() {
    let device = MemoryDisk::new(make(SHAPES[4]));
    let fs = mount(&device);
    let root = fs.root().unwrap();
    let file = root.create(b"FILE", FileKind::File, None).unwrap();
    file.write_at(0, &noise(1, 100 * 512)).unwrap();
    root.create(b"DIR", FileKind::Directory, None).unwrap().create(b"F", FileKind::File, None).unwrap();
    drop((root, file, fs));
    let image = device.durable();
    let (fat, slot) = places(&image, b"FILE       ");
    let start = usize::from(u16::from_le_bytes(image[slot + 26..slot + 28].try_into().unwrap()));
    let entry = |cluster: usize| fat + cluster * 4;
    // The tenth cluster leads back to the fifth; to itself; to a free one; outside; to bad; ends early.
    for value in [start as u32 + 5, start as u32 + 10, 0, 0x0fff_fff0, 0x0fff_fff7, 1, 0x0fff_ffff] {
        let mut image = image.clone();
        let at = entry(start + 10);
        image[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let fs = mount(&MemoryDisk::new(image));
        let root = fs.root().unwrap();
        let file = root.lookup(b"FILE").unwrap();
        let mut buf = vec![0; 100 * 512];
        assert_eq!(file.read_at(0, &mut buf[..512]), Ok(512), "the start is sound");
        assert_eq!(file.read_at(0, &mut buf), Err(FsError::Corrupt), "{value:x}");
        if value != 0x0fff_ffff {
            assert_eq!(file.write_at(100 * 512, b"more"), Err(FsError::Corrupt), "{value:x}");
        }
        // It can be removed, and other files are none the worse.
        drop(file);
        root.remove(b"FILE").unwrap();
        root.create(b"other", FileKind::File, None).unwrap().write_at(0, &buf).unwrap();
        fs.sync().unwrap();
    }
    // A directory in itself; one that is the root; one without clusters.
    let (_, dir) = places(&image, b"DIR        ");
    let (_, inner) = places(&image, b"F          ");
    for (slot, start) in [(inner, &image[dir + 26..dir + 28]), (dir, &[2, 0]), (dir, &[0, 0])] {
        let mut image = image.clone();
        image[slot + 11] = 0x10;
        let start = start.to_vec();
        image[slot + 26..slot + 28].copy_from_slice(&start);
        let root = mount(&MemoryDisk::new(image)).root().unwrap();
        let (at, name) = match slot == inner {
            true => (root.lookup(b"DIR").unwrap(), &b"F"[..]),
            false => (root, &b"DIR"[..]),
        };
        assert_eq!(at.lookup(name).err(), Some(FsError::Corrupt));
        assert_eq!(at.remove(name), Err(FsError::Corrupt));
        assert_eq!(at.rename(name, &at, b"X"), Err(FsError::Corrupt));
    }
}

#[test]
fn errors_of_the_device_are_told_and_lose_nothing() {
    use core::sync::atomic::Ordering::Relaxed;
    let device = MemoryDisk::new(make(SHAPES[2]));
    let fs = mount(&device);
    let root = fs.root().unwrap();
    let file = root.create(b"f", FileKind::File, None).unwrap();
    file.write_at(0, b"content").unwrap();
    device.fail_writes.store(true, Relaxed);
    assert!(matches!(fs.sync(), Err(FsError::Device(_))));
    device.fail_writes.store(false, Relaxed);
    device.fail_flushes.store(true, Relaxed);
    assert!(matches!(file.sync(), Err(FsError::Device(_))));
    device.fail_flushes.store(false, Relaxed);
    fs.sync().unwrap();
    assert_clean(&device.durable());
    let again = mount(&MemoryDisk::new(device.durable()));
    assert_eq!(read_all(&again.root().unwrap().lookup(b"f").unwrap()).unwrap(), b"content");
}
