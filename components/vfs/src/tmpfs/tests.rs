use super::*;
use alloc::{collections::BTreeMap, format, vec, vec::Vec};
use anykernel::fs::{FileKind, Timestamp};
use hypercall::testing::TestHost;
use proptest::prelude::*;

fn mount() -> Arc<dyn FileSystem> {
    TmpFs::new(TestHost::new()).mount(None, false).unwrap()
}

fn names(dir: &Arc<dyn Inode>) -> Vec<Vec<u8>> {
    let mut names = Vec::new();
    let end = dir.read_dir(0, &mut |entry| {
        names.push(entry.name);
        true
    });
    assert_eq!(end, Ok(None));
    names
}

fn read_all(file: &Arc<dyn Inode>) -> Vec<u8> {
    let mut buf = vec![0xaa; file.metadata().unwrap().size as usize];
    assert_eq!(file.read_at(0, &mut buf).unwrap(), buf.len());
    buf
}

#[test]
fn holes_read_as_zeros_and_take_no_memory() {
    let fs = mount();
    let file = fs.root().unwrap().create(b"f", FileKind::File, None).unwrap();
    let before = fs.stats().unwrap().free_blocks;
    file.write_at(1 << 40, b"end").unwrap();
    assert!(before - fs.stats().unwrap().free_blocks <= 2);
    assert_eq!(file.metadata().unwrap().size, (1 << 40) + 3);
    let mut buf = [1; 16];
    assert_eq!(file.read_at((1 << 40) - 8, &mut buf).unwrap(), 11);
    assert_eq!(&buf[..11], b"\0\0\0\0\0\0\0\0end");
    assert_eq!(file.read_at(u64::MAX, &mut buf), Ok(0));
    assert_eq!(file.write_at(u64::MAX - 1, b"xyz"), Err(FsError::TooLarge));
    assert_eq!(file.write_at(1 << 63, b"x"), Err(FsError::TooLarge));
}

#[test]
fn what_was_cut_off_is_zero_when_the_file_grows_again() {
    let fs = mount();
    let file = fs.root().unwrap().create(b"f", FileKind::File, None).unwrap();
    file.write_at(0, &[7; 10_000]).unwrap();
    file.truncate(5_000).unwrap();
    file.truncate(10_000).unwrap();
    let content = read_all(&file);
    assert!(content[..5_000].iter().all(|byte| *byte == 7));
    assert!(content[5_000..].iter().all(|byte| *byte == 0));
}

#[test]
fn memory_is_bounded_and_comes_back() {
    let fs = mount();
    let root = fs.root().unwrap();
    let free = fs.stats().unwrap().free_blocks;
    let file = root.create(b"big", FileKind::File, None).unwrap();
    let chunk = vec![1; 1 << 20];
    let mut at = 0;
    let error = loop {
        match file.write_at(at, &chunk) {
            Ok(n) => at += n as u64,
            Err(error) => break error,
        }
        assert!(at <= 64 << 20, "half of 64 MiB is the limit");
    };
    assert_eq!(error, FsError::NoSpace);
    // A write that failed changed nothing.
    assert_eq!(file.metadata().unwrap().size, at);
    // Names and inodes are bounded too.
    let error = (0..).find_map(|i: u32| root.create(format!("{i}").as_bytes(), FileKind::File, None).err());
    assert_eq!(error, Some(FsError::NoSpace));
    root.remove(b"big").unwrap();
    // Open still: the memory is in use until the last user is gone.
    assert_eq!(read_all(&file).len() as u64, at);
    assert_eq!(file.metadata().unwrap().links, 0);
    drop(file);
    for name in names(&root) {
        root.remove(&name).unwrap();
    }
    assert_eq!(fs.stats().unwrap().free_blocks, free);
}

#[test]
fn rename_follows_rename_2() {
    let fs = mount();
    let root = fs.root().unwrap();
    let a = root.create(b"a", FileKind::Directory, None).unwrap();
    let b = a.create(b"b", FileKind::Directory, None).unwrap();
    let file = root.create(b"f", FileKind::File, None).unwrap();
    assert_eq!(root.rename(b"a", &b, b"x"), Err(FsError::Invalid));
    assert_eq!(root.rename(b"a", &a, b"x"), Err(FsError::Invalid));
    assert_eq!(root.rename(b"a", &root, b"f"), Err(FsError::NotDirectory));
    assert_eq!(root.rename(b"f", &root, b"a"), Err(FsError::IsDirectory));
    assert_eq!(a.rename(b"b", &root, b"a"), Err(FsError::NotEmpty));
    assert_eq!(root.rename(b"none", &root, b"a"), Err(FsError::NotFound));
    assert_eq!(root.rename(b"f", &file, b"a"), Err(FsError::NotDirectory));
    assert_eq!(root.rename(b"f", &root, b"a/b"), Err(FsError::BadName));
    let other = mount().root().unwrap();
    assert_eq!(root.rename(b"f", &other, b"f"), Err(FsError::CrossDevice));
    root.create(b"empty", FileKind::Directory, None).unwrap();
    b.create(b"deep", FileKind::File, None).unwrap();
    assert_eq!(root.rename(b"empty", &a, b"b"), Err(FsError::NotEmpty));
    // A directory over an empty one, and across directories.
    a.rename(b"b", &root, b"empty").unwrap();
    assert_eq!(names(&a), Vec::<Vec<u8>>::new());
    assert!(root.lookup(b"empty").unwrap().lookup(b"deep").is_ok());
    // What was replaced lives on for whoever has it open.
    let old = root.create(b"old", FileKind::File, None).unwrap();
    old.write_at(0, b"old").unwrap();
    file.write_at(0, b"new").unwrap();
    root.rename(b"f", &root, b"old").unwrap();
    assert_eq!(read_all(&old), b"old");
    assert_eq!(read_all(&root.lookup(b"old").unwrap()), b"new");
    root.rename(b"old", &root, b"old").unwrap();
    assert!(root.lookup(b"old").is_ok());
    // b is below root now, so a can go into it.
    root.rename(b"a", &b, b"a").unwrap();
    assert_eq!(b.rename(b"a", &a, b"a"), Err(FsError::Invalid));
}

#[test]
fn a_removed_directory_takes_no_new_names() {
    let fs = mount();
    let root = fs.root().unwrap();
    let dir = root.create(b"d", FileKind::Directory, None).unwrap();
    assert_eq!(root.metadata().unwrap().links, 3);
    dir.create(b"f", FileKind::File, None).unwrap();
    assert_eq!(root.remove(b"d"), Err(FsError::NotEmpty));
    dir.remove(b"f").unwrap();
    root.remove(b"d").unwrap();
    assert_eq!(dir.create(b"f", FileKind::File, None).err(), Some(FsError::NotFound));
    let file = root.create(b"f", FileKind::File, None).unwrap();
    assert_eq!(root.rename(b"f", &dir, b"f"), Err(FsError::NotFound));
    assert_eq!(file.lookup(b"x").err(), Some(FsError::NotDirectory));
    assert_eq!(dir.write_at(0, b"x"), Err(FsError::IsDirectory));
}

#[test]
fn bad_names_and_kinds_are_refused() {
    let fs = mount();
    let root = fs.root().unwrap();
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'x'; 256]] {
        assert_eq!(root.create(name, FileKind::File, None).err(), Some(FsError::BadName));
    }
    assert_eq!(root.create(b"s", FileKind::Special, None).err(), Some(FsError::Unsupported));
    assert_eq!(root.create(b"s", FileKind::Symlink, None).err(), Some(FsError::Invalid));
    let link = root.create(&[b'x'; 255], FileKind::Symlink, Some(b"to/there")).unwrap();
    assert_eq!(link.read_link().unwrap(), b"to/there");
    assert_eq!(root.create(&[b'x'; 255], FileKind::File, None).err(), Some(FsError::Exists));
    assert_eq!(root.read_link(), Err(FsError::Invalid));
    let time = Timestamp { seconds: -5, nanos: 7 };
    link.set_modified(time).unwrap();
    assert_eq!(link.metadata().unwrap().modified, time);
}

#[test]
fn read_only_stays_empty() {
    let fs = TmpFs::new(TestHost::new()).mount(None, true).unwrap();
    let root = fs.root().unwrap();
    assert_eq!(root.create(b"f", FileKind::File, None).err(), Some(FsError::ReadOnly));
    assert!(fs.stats().unwrap().read_only);
}

#[test]
fn listing_goes_on_while_names_come_and_go() {
    let fs = mount();
    let root = fs.root().unwrap();
    for i in 0..300 {
        root.create(format!("{i:03}").as_bytes(), FileKind::File, None).unwrap();
    }
    let mut seen = Vec::new();
    let mut cursor = 0;
    for round in 0.. {
        let mut left = 7;
        let next = root
            .read_dir(cursor, &mut |entry| {
                seen.push(entry.name);
                left -= 1;
                left > 0
            })
            .unwrap();
        // Remove one behind and one ahead, add one.
        if round < 20 {
            root.remove(format!("{:03}", round * 7).as_bytes()).unwrap();
            root.remove(format!("{:03}", 299 - round).as_bytes()).unwrap();
            root.create(format!("new{round}").as_bytes(), FileKind::File, None).unwrap();
        }
        match next {
            Some(next) => cursor = next,
            None => break,
        }
    }
    let unique: alloc::collections::BTreeSet<_> = seen.iter().collect();
    assert_eq!(unique.len(), seen.len(), "no name twice");
    for i in 0..280 {
        assert!(seen.contains(&format!("{i:03}").into_bytes()), "{i} was never removed before it was seen");
    }
}

#[test]
fn a_deep_tree_is_freed_without_deep_recursion() {
    let fs = TmpFs::new(TestHost::new()).mount(None, false).unwrap();
    let mut at = fs.root().unwrap();
    for _ in 0..50_000 {
        at = at.create(b"d", FileKind::Directory, None).unwrap();
    }
    drop(at);
    drop(fs);
}

#[test]
fn many_threads() {
    let fs = mount();
    let root = fs.root().unwrap();
    let dirs: Vec<_> =
        (0..3).map(|i| root.create(format!("d{i}").as_bytes(), FileKind::Directory, None).unwrap()).collect();
    // Never empty, so that nobody can remove it.
    dirs[0].create(b"stays", FileKind::File, None).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4_usize {
            let (root, dirs) = (root.clone(), dirs.clone());
            scope.spawn(move || {
                for i in 0..500_usize {
                    let (from, to) = (&dirs[(i + thread) % 3], &dirs[(i * 7 + thread) % 3]);
                    let name = format!("t{thread}");
                    let file = from.create(name.as_bytes(), FileKind::File, None).unwrap();
                    file.write_at(0, name.as_bytes()).unwrap();
                    from.rename(name.as_bytes(), to, b"shared").unwrap();
                    // Another thread may have taken or removed it by now.
                    let _ = to.remove(b"shared");
                    let _ = root.rename(b"d0", &dirs[1], b"sub");
                    let _ = dirs[1].rename(b"sub", &root, b"d0");
                    assert!(dirs[1].remove(b"sub").is_err());
                    assert_eq!(read_all(&file), name.as_bytes());
                }
            });
        }
    });
    assert_eq!(root.lookup(b"d1").unwrap().metadata().unwrap().kind, FileKind::Directory);
}

#[derive(Debug, Clone)]
enum Step {
    Write { file: u8, offset: u16, len: u16, value: u8 },
    Truncate { file: u8, size: u16 },
    Remove(u8),
    Rename(u8, u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..4_u8, any::<u16>(), 0..9000_u16, 1..=255_u8)
            .prop_map(|(file, offset, len, value)| Step::Write { file, offset, len, value }),
        2 => (0..4_u8, any::<u16>()).prop_map(|(file, size)| Step::Truncate { file, size }),
        1 => (0..4_u8).prop_map(Step::Remove),
        1 => (0..4_u8, 0..4_u8).prop_map(|(a, b)| Step::Rename(a, b)),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #[test]
    fn behaves_as_a_map_of_byte_strings(steps in steps()) {
        let fs = mount();
        let root = fs.root().unwrap();
        let free = fs.stats().unwrap().free_blocks;
        let mut model: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Write { file, offset, len, value } => {
                    let inode = root.lookup(&[b'a' + file])
                        .or_else(|_| root.create(&[b'a' + file], FileKind::File, None)).unwrap();
                    let data = vec![value; usize::from(len)];
                    inode.write_at(offset.into(), &data).unwrap();
                    let content = model.entry(vec![b'a' + file]).or_default();
                    if !data.is_empty() {
                        content.resize(content.len().max(usize::from(offset) + data.len()), 0);
                        content[usize::from(offset)..][..data.len()].copy_from_slice(&data);
                    }
                }
                Step::Truncate { file, size } => {
                    let done = root.lookup(&[b'a' + file]).and_then(|inode| inode.truncate(size.into()));
                    let known = model.get_mut(&vec![b'a' + file]);
                    prop_assert_eq!(done.is_ok(), known.is_some());
                    if let Some(content) = known {
                        content.resize(size.into(), 0);
                    }
                }
                Step::Remove(file) => {
                    prop_assert_eq!(root.remove(&[b'a' + file]).is_ok(), model.remove(&vec![b'a' + file]).is_some());
                }
                Step::Rename(a, b) => {
                    let done = root.rename(&[b'a' + a], &root, &[b'a' + b]).is_ok();
                    match model.remove(&vec![b'a' + a]) {
                        Some(content) => {
                            prop_assert!(done);
                            model.insert(vec![b'a' + b], content);
                        }
                        None => prop_assert!(!done),
                    }
                }
            }
        }
        let mut listed = names(&root);
        listed.sort();
        prop_assert_eq!(&listed, &model.keys().cloned().collect::<Vec<_>>());
        for (name, content) in &model {
            prop_assert_eq!(&read_all(&root.lookup(name).unwrap()), content);
        }
        for name in listed {
            root.remove(&name).unwrap();
        }
        prop_assert_eq!(fs.stats().unwrap().free_blocks, free);
    }
}
