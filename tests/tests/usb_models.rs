//! A FAT stick through mass storage, block cache and file system, on a modelled host controller with real threads.

use anykernel::Kernel;
use anykernel::config::{Config, Mount};
use anykernel::fs::{File, OpenOptions};
use anykernel_usb::testing::{Fault, HubModel, ModelBus, StorageModel, StorageState};
use anykernel_usb::{NodeState, Options, UsbStack};
use hypercall::testing::TestHost;
use sha2::{Digest, Sha256};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const LIMIT_NS: u64 = 30_000_000_000;

struct World {
    host: TestHost,
    kernel: Arc<Kernel<TestHost>>,
    bus: ModelBus,
    stack: Arc<UsbStack<TestHost>>,
}

impl World {
    fn new(plug: impl FnOnce(&ModelBus), mounts: Vec<Mount>) -> Self {
        let host = TestHost::new();
        let config = Config { mounts, ..Config::default() };
        let kernel = Kernel::new(host, config);
        let bus = ModelBus::new(host, 4, 32);
        plug(&bus);
        let (controller, signal) = bus.controller();
        let stack = UsbStack::start(&kernel, controller, signal, 1, Options::default()).unwrap();
        assert!(stack.settle(LIMIT_NS), "the bus did not settle: {:?}", stack.tree());
        anykernel_vfs::start(&kernel).unwrap();
        Self { host, kernel, bus, stack }
    }

    fn open(&self, path: &str, write: bool) -> File {
        let options = OpenOptions { read: true, write, create: write, ..OpenOptions::default() };
        self.kernel
            .namespace()
            .unwrap()
            .open(path.as_bytes(), options)
            .unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn wait(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let until = Instant::now() + Duration::from_secs(30);
        while !done(self) {
            assert!(Instant::now() < until, "{what}: {:?}", self.stack.tree());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn has_disk(&self, name: &str) -> bool {
        self.kernel.block_devices().iter().any(|one| one.info().name == name)
    }
}

fn mount(source: &str, target: &str) -> Mount {
    Mount { source: source.into(), target: target.into(), kind: None, read_only: false }
}

/// What another program says of an image.
fn fsck(image: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fat.img");
    std::fs::write(&path, image).unwrap();
    let output = Command::new("fsck.fat").arg("-n").arg(&path).output().expect("apt-get install dosfstools");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// A FAT16 file system with `content` in `/hello`.
fn fat_image(content: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (image, file) = (dir.path().join("fat.img"), dir.path().join("hello"));
    std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    std::fs::write(&file, content).unwrap();
    let made =
        Command::new("mkfs.fat").args(["-F", "16"]).arg(&image).output().expect("apt-get install dosfstools");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let copied = Command::new("mcopy").arg("-i").arg(&image).arg(&file).arg("::/hello").status();
    assert!(copied.expect("apt-get install mtools").success());
    std::fs::read(&image).unwrap()
}

fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9u32;
    let step = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(step).take(len).collect()
}

fn read_all(file: &File) -> Vec<u8> {
    let mut content = Vec::new();
    let mut piece = vec![0; 65_536];
    loop {
        let n = file.inode.read_at(content.len() as u64, &mut piece).unwrap();
        if n == 0 {
            return content;
        }
        content.extend_from_slice(&piece[..n]);
    }
}

/// Behind a hub, on a stick that stalls, sends short and loses tags now and then: what is read is right, what is written
/// is there, and another program finds nothing wrong.
#[test]
fn a_fat_stick_is_read_and_written() {
    let content = noise(3 << 20);
    let (model, state) = StorageModel::new(fat_image(&content));
    state.lock().unwrap().faults = vec![Fault::StallData(23), Fault::ShortData(37), Fault::WrongTag(101)];
    let world = World::new(
        |bus| {
            let hub = HubModel::new(TestHost::new(), bus, 2);
            hub.plug(2, model);
            hub.plug_into_root(3);
        },
        vec![mount("tmpfs", "/"), mount("usb1-3.2", "/stick")],
    );
    let read = read_all(&world.open("/stick/hello", false));
    assert_eq!(Sha256::digest(&read), Sha256::digest(&content));
    let written = noise(1 << 20);
    let file = world.open("/stick/written", true);
    for (index, piece) in written.chunks(40_000).enumerate() {
        assert_eq!(file.inode.write_at(index as u64 * 40_000, piece).unwrap(), piece.len());
    }
    file.inode.sync().unwrap();
    drop(file);
    world.kernel.namespace().unwrap().unmount(b"/stick").unwrap();
    world.kernel.shutdown();
    let image = state.lock().unwrap().medium.clone().unwrap();
    fsck(&image);
    // A second look, by another instance.
    let (model, again) = StorageModel::new(image);
    let world = World::new(|bus| bus.plug(1, model), vec![mount("usb1-1", "/")]);
    assert_eq!(read_all(&world.open("/written", false)), written);
    assert!(again.lock().unwrap().commands > 0);
    world.kernel.shutdown();
}

/// Pulled out during a write: an error to the writer, no hang; the mount goes, and plugged in again it works.
#[test]
fn pulled_out_during_a_write() {
    let (model, state): (_, Arc<Mutex<StorageState>>) = StorageModel::new(fat_image(b"still here"));
    let world = World::new(|bus| bus.plug(1, model), vec![mount("tmpfs", "/"), mount("usb1-1", "/stick")]);
    let bus = world.bus.clone();
    let puller = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        bus.unplug(1);
    });
    let file = world.open("/stick/big", true);
    let piece = noise(64 << 10);
    let failed = (0..200u64).find_map(|index| {
        let offset = (index % 100) * piece.len() as u64;
        file.inode.write_at(offset, &piece).err().or_else(|| file.inode.sync().err())
    });
    puller.join().unwrap();
    let failed = failed.or_else(|| file.inode.sync().err());
    assert!(failed.is_some(), "nobody told the writer");
    drop(file);
    world.wait("the disk stays", |world| !world.has_disk("usb1-1"));
    assert!(world.stack.tree().is_empty());
    let names = world.kernel.namespace().unwrap();
    // What was in the cache may still be read; what was not is an error.
    assert!(names.open(b"/stick/nowhere", OpenOptions { read: true, ..OpenOptions::default() }).is_err());
    names.unmount(b"/stick").unwrap();
    world.bus.plug(1, StorageModel::around(&state));
    world.wait("it is not taken in again", |world| world.has_disk("usb1-1"));
    names.mount("usb1-1", b"/stick", None, true).unwrap();
    assert_eq!(read_all(&world.open("/stick/hello", false)), b"still here");
    names.unmount(b"/stick").unwrap();
    world.kernel.shutdown();
}

/// A disk with partitions that comes when everything runs already.
#[test]
fn partitions_of_a_late_disk() {
    let fat = fat_image(b"in a partition");
    let mut disk = vec![0; 2048 * 512];
    disk[446..462].copy_from_slice(&[0, 0, 0, 0, 6, 0, 0, 0, 0, 8, 0, 0, 0, 0x80, 0, 0]);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk.extend(fat);
    let world = World::new(|_| (), vec![mount("tmpfs", "/")]);
    let names = world.kernel.namespace().unwrap();
    names.create(b"/stick", anykernel::fs::FileKind::Directory, None).unwrap();
    assert!(names.mount("usb1-2p1", b"/stick", None, true).is_err());
    world.bus.plug(2, StorageModel::new(disk).0);
    world.wait("it is not taken in", |world| world.has_disk("usb1-2"));
    names.mount("usb1-2p1", b"/stick", None, true).unwrap();
    assert_eq!(read_all(&world.open("/stick/hello", false)), b"in a partition");
    names.unmount(b"/stick").unwrap();
    world.bus.unplug(2);
    world.wait("its partition stays", |world| world.kernel.block_devices().is_empty());
    assert!(world.stack.tree().iter().all(|one| one.node.state == NodeState::Configured));
    drop(names);
    world.kernel.shutdown();
    let _ = world.host;
}
