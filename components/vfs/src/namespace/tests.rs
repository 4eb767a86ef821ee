use super::*;
use crate::testing::MemoryDisk;
use crate::tmpfs::TmpFs;
use alloc::vec;
use anykernel::config::Config;
use anykernel::fs::Namespace;
use hypercall::testing::TestHost;

fn tree() -> (Arc<Kernel<TestHost>>, Arc<MountTree<TestHost>>) {
    let kernel = Kernel::new(TestHost::new(), Config::default());
    kernel.add_fs_type(Arc::new(TmpFs::new(kernel.host())));
    let tree = MountTree::new(&kernel);
    tree.mount("tmpfs", b"/", None, false).unwrap();
    (kernel, tree)
}

fn dir(tree: &MountTree<TestHost>, path: &str) {
    tree.create(path.as_bytes(), FileKind::Directory, None).unwrap();
}

fn link(tree: &MountTree<TestHost>, path: &str, target: &str) {
    tree.create(path.as_bytes(), FileKind::Symlink, Some(target.as_bytes())).unwrap();
}

fn write(tree: &MountTree<TestHost>, path: &str, text: &str) {
    let file = tree.open(path.as_bytes(), OpenOptions::CREATE).unwrap();
    assert_eq!(file.write_at(0, text.as_bytes()).unwrap(), text.len());
}

fn read(tree: &MountTree<TestHost>, path: &str) -> Result<String> {
    let file = tree.open(path.as_bytes(), OpenOptions::READ)?;
    let mut buf = vec![0; 100];
    let len = file.read_at(0, &mut buf)?;
    Ok(String::from_utf8_lossy(&buf[..len]).into_owned())
}

#[test]
fn follows_dots_slashes_and_links() {
    let (_kernel, tree) = tree();
    dir(&tree, "/a");
    dir(&tree, "/a/b/");
    write(&tree, "/a/b/file", "text");
    link(&tree, "/a/up", "../a/b/../b");
    link(&tree, "/absolute", "/a/up/file");
    link(&tree, "/a/b/dangling", "nowhere");
    link(&tree, "/loop", "loop");
    for path in [
        "/a/b/file",
        "//a///b//file",
        "/a/./b/../b/./file",
        "/../../a/b/file",
        "/a/up/file",
        "/a/up/../b/file",
        "/absolute",
        "/a/up/../../absolute",
    ] {
        assert_eq!(read(&tree, path).as_deref(), Ok("text"), "{path}");
    }
    let error = |path: &str| read(&tree, path).unwrap_err();
    assert_eq!(error(""), FsError::NotFound);
    assert_eq!(error("a/b/file"), FsError::Invalid);
    assert_eq!(error("/a/b/file/"), FsError::NotDirectory);
    assert_eq!(error("/a/b/file/.."), FsError::NotDirectory);
    assert_eq!(error("/absolute/"), FsError::NotDirectory);
    assert_eq!(error("/a/b/dangling"), FsError::NotFound);
    assert_eq!(error("/a/none/../b/file"), FsError::NotFound);
    assert_eq!(error("/loop"), FsError::Loop);
    assert_eq!(error(&std::format!("/{}", "a/".repeat(2048))), FsError::BadName);
    assert_eq!(error("/a\0"), FsError::BadName);
    assert_eq!(tree.resolve(b"/absolute", false).unwrap().read_link().unwrap(), b"/a/up/file");
    assert_eq!(tree.resolve(b"/a/up/", false).unwrap().metadata().unwrap().kind, FileKind::Directory);
    assert_eq!(tree.resolve(b"/loop", false).unwrap().metadata().unwrap().kind, FileKind::Symlink);
}

#[test]
fn forty_links_and_no_more() {
    let (_kernel, tree) = tree();
    write(&tree, "/0", "end");
    for number in 1..=41 {
        link(&tree, &std::format!("/{number}"), &std::format!("{}", number - 1));
    }
    assert_eq!(read(&tree, "/40").as_deref(), Ok("end"));
    assert_eq!(read(&tree, "/41"), Err(FsError::Loop));
}

#[test]
fn hostile_links_cost_little() {
    let (_kernel, tree) = tree();
    dir(&tree, "/d");
    // Each link leads through 2,000 components to the next.
    for number in 0..40 {
        link(&tree, &std::format!("/d/{number}"), &std::format!("{}{}", "./".repeat(1000), number + 1));
    }
    assert_eq!(read(&tree, "/d/0"), Err(FsError::NotFound));
}

#[test]
fn create_open_and_exist() {
    let (_kernel, tree) = tree();
    let exclusive = OpenOptions { write: true, create_new: true, ..OpenOptions::default() };
    tree.open(b"/new", exclusive).unwrap();
    assert_eq!(tree.open(b"/new", exclusive).err(), Some(FsError::Exists));
    assert_eq!(tree.create(b"/new", FileKind::Directory, None), Err(FsError::Exists));
    link(&tree, "/link", "made");
    // Through a dangling link the file is made where it points; not so if it must be new.
    assert_eq!(tree.open(b"/link", exclusive).err(), Some(FsError::Exists));
    write(&tree, "/link", "through");
    assert_eq!(read(&tree, "/made").as_deref(), Ok("through"));
    write(&tree, "/link", "x");
    assert_eq!(read(&tree, "/made").as_deref(), Ok("x"), "cut to nothing first");
    assert_eq!(tree.open(b"/", OpenOptions::CREATE).err(), Some(FsError::IsDirectory));
    assert_eq!(tree.open(b"/no/", OpenOptions::CREATE).err(), Some(FsError::IsDirectory));
    assert_eq!(tree.open(b"/no", OpenOptions::default()).err(), Some(FsError::Invalid));
    let reader = tree.open(b"/made", OpenOptions::READ).unwrap();
    assert_eq!(reader.write_at(0, b"no"), Err(FsError::Invalid));
    tree.open(b"/", OpenOptions::READ).unwrap();
}

#[test]
fn names_that_change_are_not_remembered() {
    let (_kernel, tree) = tree();
    dir(&tree, "/d");
    assert_eq!(read(&tree, "/d/x"), Err(FsError::NotFound));
    write(&tree, "/d/x", "1");
    assert_eq!(read(&tree, "/d/x").as_deref(), Ok("1"));
    assert_eq!(read(&tree, "/d/y"), Err(FsError::NotFound));
    tree.rename(b"/d/x", b"/d/y").unwrap();
    assert_eq!(read(&tree, "/d/x"), Err(FsError::NotFound));
    assert_eq!(read(&tree, "/d/y").as_deref(), Ok("1"));
    tree.rename(b"/d", b"/e").unwrap();
    assert_eq!(read(&tree, "/d/y"), Err(FsError::NotFound));
    assert_eq!(read(&tree, "/e/y").as_deref(), Ok("1"));
    assert_eq!(tree.rename(b"/e", b"/e/sub"), Err(FsError::CrossDevice));
    assert_eq!(tree.remove(b"/e"), Err(FsError::NotEmpty));
    tree.remove(b"/e/y").unwrap();
    assert_eq!(read(&tree, "/e/y"), Err(FsError::NotFound));
    tree.remove(b"/e").unwrap();
    dir(&tree, "/e");
    assert_eq!(read(&tree, "/e/y"), Err(FsError::NotFound));
    // Changes through an inode count as well.
    let parent = tree.resolve(b"/e", true).unwrap();
    parent.create(b"y", FileKind::File, None).unwrap();
    assert_eq!(read(&tree, "/e/y").as_deref(), Ok(""));
    parent.rename(b"y", &parent, b"z").unwrap();
    assert_eq!(read(&tree, "/e/y"), Err(FsError::NotFound));
    parent.remove(b"z").unwrap();
    assert_eq!(read(&tree, "/e/z"), Err(FsError::NotFound));
    assert_eq!(tree.remove(b"/"), Err(FsError::Busy));
    assert_eq!(tree.remove(b"/e/."), Err(FsError::Invalid));
}

#[test]
fn mounts_are_crossed_both_ways_and_busy_while_used() {
    let (_kernel, tree) = tree();
    dir(&tree, "/m");
    write(&tree, "/m/hidden", "below");
    write(&tree, "/outside", "out");
    tree.mount("tmpfs", b"/m/", None, false).unwrap();
    assert_eq!(read(&tree, "/m/hidden"), Err(FsError::NotFound));
    write(&tree, "/m/inside", "in");
    dir(&tree, "/m/deep");
    assert_eq!(read(&tree, "/m/deep/../../outside").as_deref(), Ok("out"));
    assert_eq!(read(&tree, "/m/../m/inside").as_deref(), Ok("in"));
    link(&tree, "/m/back", "../outside");
    assert_eq!(read(&tree, "/m/back").as_deref(), Ok("out"));
    assert_eq!(tree.mount("tmpfs", b"/m", None, false), Err(FsError::Busy));
    assert_eq!(tree.mount("tmpfs", b"/outside", None, false), Err(FsError::NotDirectory));
    assert_eq!(tree.mount("tmpfs", b"/none", None, false), Err(FsError::NotFound));
    assert_eq!(tree.remove(b"/m"), Err(FsError::Busy));
    assert_eq!(tree.rename(b"/m", b"/n"), Err(FsError::Busy));
    assert_eq!(tree.rename(b"/m/inside", b"/inside"), Err(FsError::CrossDevice));
    tree.mount("tmpfs", b"/m/deep", None, false).unwrap();
    assert_eq!(tree.mounts(), [b"/".to_vec(), b"/m".to_vec(), b"/m/deep".to_vec()]);
    assert_eq!(tree.unmount(b"/m"), Err(FsError::Busy));
    tree.unmount(b"/m/deep").unwrap();
    let open = tree.open(b"/m/inside", OpenOptions::READ).unwrap();
    assert_eq!(tree.unmount(b"/m"), Err(FsError::Busy));
    assert_eq!(tree.unmount(b"/m/inside"), Err(FsError::Invalid));
    drop(open);
    tree.unmount(b"/m").unwrap();
    assert_eq!(read(&tree, "/m/hidden").as_deref(), Ok("below"));
}

#[test]
fn failures_to_mount_say_what_to_do() {
    let (kernel, tree) = tree();
    dir(&tree, "/m");
    let line = |source: &str, kind| tree.mount_or_explain(source, b"/m", kind, true).unwrap_err().line;
    assert_eq!(
        line("disk7", None),
        "mount disk7 at /m: no such block device (there are none): attach it, or correct the name"
    );
    kernel.add_block_device(MemoryDisk::zeroed(1 << 20));
    assert!(line("disk7", None).contains("there are disk0"));
    assert!(line("disk0", Some("zfs")).contains("unknown file system kind zfs: known are tmpfs"));
    assert!(line("disk0", None).contains("no file system that is known here"), "{}", line("disk0", None));
}

#[test]
fn many_threads_walk_while_names_change() {
    let (_kernel, tree) = tree();
    dir(&tree, "/d");
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let tree = &tree;
            scope.spawn(move || {
                for round in 0..300 {
                    let (one, two) = (std::format!("/d/{thread}a"), std::format!("/d/{thread}b"));
                    write(tree, &one, "x");
                    assert_eq!(read(tree, &one).as_deref(), Ok("x"), "round {round}");
                    tree.rename(one.as_bytes(), two.as_bytes()).unwrap();
                    assert_eq!(read(tree, &one), Err(FsError::NotFound), "round {round}");
                    assert_eq!(read(tree, &two).as_deref(), Ok("x"), "round {round}");
                    tree.remove(two.as_bytes()).unwrap();
                    assert_eq!(read(tree, &two), Err(FsError::NotFound), "round {round}");
                }
            });
        }
    });
}
