//! What mtools wrote, read by us.

use super::*;
use anykernel::fs::FsError;

/// Fills a volume with the sample by mtools.
fn fill(shape: Shape, sample: &Tree) -> Vec<u8> {
    let scratch = Scratch::new();
    let (image, tree) = (scratch.path("image"), scratch.path("tree"));
    std::fs::create_dir(&tree).unwrap();
    for (path, content) in sample {
        let path = tree.join(&path[1..]);
        match content {
            None => std::fs::create_dir(path).unwrap(),
            Some(content) => std::fs::write(path, content).unwrap(),
        }
    }
    write_image(&image, &make(shape));
    for entry in std::fs::read_dir(&tree).unwrap() {
        tool("mcopy", &["-s", "-m", "-i", text(&image), text(&entry.unwrap().path()), "::/"]);
    }
    std::fs::read(&image).unwrap()
}

fn bytes_for(shape: Shape) -> usize {
    (shape.bytes / 3).min(6 << 20) as usize
}

#[test]
fn every_width_and_cluster_size() {
    for shape in mtools_shapes() {
        let mut sample = sample(bytes_for(shape));
        if shape.cluster != "1" {
            // Directories that mcopy must make larger by more than one cluster for a name are beyond it.
            sample.insert(format!("/{}", "m".repeat(255)), Some(noise(7, 77)));
        }
        let image = fill(shape, &sample);
        let device = MemoryDisk::new(image.clone());
        let fs = try_mount(&device, true).unwrap();
        assert_same(&read_tree(&fs.root().unwrap()), &sample);
        let stats = fs.stats().unwrap();
        assert_eq!((stats.kind, stats.read_only, stats.label.as_str()), ("vfat", true, "A LABEL"));
        drop(fs);
        // Read-only means that nothing was written.
        assert_eq!(device.writes.load(std::sync::atomic::Ordering::Relaxed), 0, "{shape:?}");
        assert!(device.content() == image);
    }
}

#[test]
fn a_mount_without_changes_writes_nothing() {
    let shape = SHAPES[4];
    let image = fill(shape, &sample(1 << 20));
    let device = MemoryDisk::new(image.clone());
    let fs = mount(&device);
    read_tree(&fs.root().unwrap());
    fs.stats().unwrap();
    fs.sync().unwrap();
    drop(fs);
    assert!(device.content() == image);
}

#[test]
fn random_reads_agree() {
    let mut sample = Tree::new();
    let content = noise(1, 3_000_000);
    sample.insert("/big".to_string(), Some(content.clone()));
    let device = MemoryDisk::new(fill(SHAPES[2], &sample));
    let fs = mount(&device);
    let file = walk(&fs.root().unwrap(), "/BIG").unwrap();
    let places = noise(2, 3000);
    for place in places.chunks(6) {
        let number = |bytes: &[u8]| bytes.iter().fold(0, |sum, byte| sum * 256 + usize::from(*byte));
        let (offset, len) = (number(&place[..3]) % 3_100_000, number(&place[3..]) % 20_000);
        let mut buf = vec![0; len];
        let got = file.read_at(offset as u64, &mut buf).unwrap();
        let expected = content.get(offset..).unwrap_or(&[]);
        assert_eq!(got, len.min(expected.len()));
        assert!(buf[..got] == expected[..got]);
    }
    assert_eq!(file.read_at(u64::MAX, &mut [0; 4]), Ok(0));
}

#[test]
fn lookups_ignore_case_and_know_aliases() {
    let device = MemoryDisk::new(fill(SHAPES[4], &sample(1 << 20)));
    let root = mount(&device).root().unwrap();
    for path in ["/Readme.Txt", "/A DIRECTORY WITH A LONG NAME", "/ADIREC~1", "/DEEP/ER/üNÏCÖDÉ", "/日本語"]
    {
        assert!(walk(&root, path).is_ok(), "{path}");
    }
    for path in ["/no such", "/README.TXT.", "/README", "/deep/README.TX"] {
        assert_eq!(walk(&root, path).err(), Some(FsError::NotFound), "{path}");
    }
    assert_eq!(walk(&root, "/README.TXT/x").err(), Some(FsError::NotDirectory));
    assert_eq!(root.lookup(b"\xff\xfe").err(), Some(FsError::NotFound));
}

#[test]
fn times_and_numbers() {
    let device = MemoryDisk::new(fill(SHAPES[2], &sample(1 << 20)));
    let root = mount(&device).root().unwrap();
    let file = root.lookup(b"README.TXT").unwrap().metadata().unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    assert!((now - file.modified.seconds).abs() < 600, "{file:?}");
    let mut inode = 0;
    root.read_dir(0, &mut |entry| {
        inode = entry.inode;
        entry.name != b"README.TXT"
    })
    .unwrap();
    assert_eq!(inode, file.inode);
    assert_eq!(root.metadata().unwrap().inode, 1);
}

#[test]
fn what_is_not_fat_is_refused() {
    let probe = |content: Vec<u8>| {
        let device = MemoryDisk::new(content);
        let (kind, device) = kind_of(&device);
        (kind.probe(&device).unwrap(), kind.mount(Some(device), true).err())
    };
    assert_eq!(probe(vec![0; 1 << 20]), (false, Some(FsError::NotAFileSystem)));
    assert_eq!(probe(noise(1, 1 << 20)), (false, Some(FsError::NotAFileSystem)));
    assert_eq!(probe(vec![0; 512]), (false, Some(FsError::NotAFileSystem)));
    let image = make(SHAPES[4]);
    assert_eq!(probe(image.clone()), (true, None));
    // Cut short.
    assert_eq!(probe(image[..image.len() - 4096].to_vec()), (true, Some(FsError::Corrupt)));
    for name in [b"EXFAT   ", b"NTFS    "] {
        let mut image = image.clone();
        image[3..11].copy_from_slice(name);
        assert_eq!(probe(image), (false, Some(FsError::Unsupported)));
    }
}
