//! Power is cut at any moment: what was not flushed may be on the disk or not, sector by sector.

use super::model::{Machine, Op, ops};
use super::*;
use alloc::collections::VecDeque;
use anykernel::block::{BlockInfo, Rejected, Request};
use proptest::prelude::*;
use std::sync::Mutex;

const SECTOR: usize = 512;

enum Event {
    Write(usize, Vec<u8>),
    Flush,
}

/// A disk that remembers everything that was done to it.
struct Recorder {
    info: BlockInfo,
    state: Mutex<State>,
}

struct State {
    content: Vec<u8>,
    queue: VecDeque<Request>,
    events: Vec<Event>,
}

impl Recorder {
    fn new(content: Vec<u8>) -> Arc<Self> {
        let info = BlockInfo {
            name: "disk0".into(),
            sector_size: SECTOR as u32,
            sectors: (content.len() / SECTOR) as u64,
            read_only: false,
            max_request_bytes: 128 << 10,
            max_buffers: usize::MAX,
            queue_depth: 8,
            needs_flush: true,
        };
        Arc::new(Self {
            info,
            state: Mutex::new(State { content, queue: VecDeque::new(), events: Vec::new() }),
        })
    }

    fn events(&self) -> usize {
        self.state.lock().unwrap().events.len()
    }

    /// What the disk holds if power fails before event `at`, given what it held at the start. Of what was written since
    /// the last flush, each sector is there or not.
    fn cut(&self, start: &[u8], at: usize, seed: u64) -> Vec<u8> {
        let state = self.state.lock().unwrap();
        let events = &state.events[..at];
        let flushed = events.iter().rposition(|event| matches!(event, Event::Flush)).unwrap_or(0);
        let mut content = start.to_vec();
        // All, none, or any.
        let mode = seed % 4;
        let mut dice = noise(seed, 4096).into_iter().cycle();
        for (index, event) in events.iter().enumerate() {
            let Event::Write(offset, data) = event else { continue };
            for (sector, bytes) in data.chunks(SECTOR).enumerate() {
                let there = match mode {
                    0 => true,
                    1 => false,
                    _ => dice.next().unwrap() & 1 == 0,
                };
                if index < flushed || there {
                    let offset = offset + sector * SECTOR;
                    content[offset..offset + bytes.len()].copy_from_slice(bytes);
                }
            }
        }
        content
    }
}

impl BlockDevice for Recorder {
    fn info(&self) -> &BlockInfo {
        &self.info
    }
    fn submit(&self, request: Request) -> Result<(), Rejected> {
        self.state.lock().unwrap().queue.push_back(request);
        Ok(())
    }
    fn poll(&self) {
        loop {
            let mut guard = self.state.lock().unwrap();
            let state = &mut *guard;
            let Some(mut request) = state.queue.pop_front() else { return };
            let mut at = request.sector as usize * SECTOR;
            use anykernel::block::Op::*;
            match request.op {
                Read => {
                    for buffer in &mut request.buffers {
                        buffer.copy_from_slice(&state.content[at..at + buffer.len()]);
                        at += buffer.len();
                    }
                }
                Write => {
                    for buffer in &request.buffers {
                        state.content[at..at + buffer.len()].copy_from_slice(buffer);
                        state.events.push(Event::Write(at, buffer.to_vec()));
                        at += buffer.len();
                    }
                }
                Flush => state.events.push(Event::Flush),
            }
            drop(guard);
            let done = request.done.clone();
            done.complete(request, Ok(()));
        }
    }
}

fn remount(device: &Arc<dyn BlockDevice>) -> Arc<dyn FileSystem> {
    let host = TestHost::new();
    // Small, so that the cache writes on its own when it likes.
    let limits = CacheLimits { bytes: 128 << 10, read_ahead_bytes: 16 << 10 };
    let cache = BlockCache::new(host, limits, CacheCounters::default());
    VFat::new(host, cache).mount(Some(device.clone()), false).unwrap()
}

/// A moment at which everything was durable, and what was changed (or tried) until the next one.
struct Durable {
    event: usize,
    tree: Tree,
    touched: Vec<String>,
}

/// What fsck.fat may find: clusters of nobody, chains longer than the file, a name that lost its short entry or the other
/// way round, copies of the table that differ, and that nobody unmounted.
fn assert_harmless(content: &[u8]) {
    let (_, text) = fsck(content);
    for bad in [
        "share clusters",
        "Circular",
        "Contains a",
        "cluster chain length is 0 bytes",
        "Start",
        "Bad start",
        "Bad FAT32",
        "Duplicate directory",
        "Expected a valid",
        "Invalid '",
        "Bad short file name",
        "non-zero size",
        "reserved",
    ] {
        assert!(!text.contains(bad), "{bad}: {text}");
    }
    for line in text.lines().filter(|line| line.contains("cluster chain length is")) {
        assert!(line.contains("chain length is >"), "a file lost clusters: {text}");
    }
}

fn check(shape: Shape, ops: &[Op], cuts: &[(prop::sample::Index, u64)]) {
    let start = make(shape);
    let recorder = Recorder::new(start.clone());
    let mut machine = Machine::new(recorder.clone(), remount);
    let mut durable = vec![Durable { event: 0, tree: Tree::new(), touched: Vec::new() }];
    for op in ops {
        let before = machine.touched.clone();
        let synced = machine.apply(op);
        if synced {
            let touched = before;
            durable.last_mut().unwrap().touched = touched;
            durable.push(Durable {
                event: recorder.events(),
                tree: machine.model.tree(),
                touched: Vec::new(),
            });
        }
    }
    durable.last_mut().unwrap().touched = machine.touched.clone();
    let events = recorder.events();
    for (at, seed) in cuts {
        let at = at.index(events + 1);
        let content = recorder.cut(&start, at, *seed);
        assert_harmless(&content);
        let device: Arc<dyn BlockDevice> = MemoryDisk::new(content);
        let fs = remount(&device);
        // Every file can be read to its end, whatever it holds.
        let tree = read_tree(&fs.root().unwrap());
        let last = durable.iter().rev().find(|moment| moment.event <= at).unwrap();
        for (path, content) in &last.tree {
            let lower = path.to_lowercase();
            let touched = last
                .touched
                .iter()
                .any(|touched| lower == *touched || lower.starts_with(&format!("{touched}/")));
            if !touched {
                assert!(tree.get(path) == Some(content), "{path} was durable");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn fat12(ops in ops(80), cuts in prop::collection::vec(any::<(prop::sample::Index, u64)>(), 12)) {
        check(SHAPES[0], &ops, &cuts);
    }

    #[test]
    fn fat32(ops in ops(80), cuts in prop::collection::vec(any::<(prop::sample::Index, u64)>(), 12)) {
        check(Shape { width: "32", bytes: 4 << 20, cluster: "1", more: &[] }, &ops, &cuts);
    }
}

/// Does `change` and a sync, cuts power at every event of that, and shows what is found then to `judge`.
fn at_every_cut(
    prepare: impl FnOnce(&Arc<dyn Inode>),
    change: impl FnOnce(&Arc<dyn Inode>),
    judge: impl Fn(&Tree),
) {
    let start = make(SHAPES[0]);
    let recorder = Recorder::new(start.clone());
    let device: Arc<dyn BlockDevice> = recorder.clone();
    let fs = remount(&device);
    let root = fs.root().unwrap();
    prepare(&root);
    fs.sync().unwrap();
    let first = recorder.events();
    change(&root);
    fs.sync().unwrap();
    for at in first..=recorder.events() {
        for seed in 0..4 {
            let content = recorder.cut(&start, at, seed * 31 + at as u64);
            assert_harmless(&content);
            let device: Arc<dyn BlockDevice> = MemoryDisk::new(content);
            judge(&read_tree(&remount(&device).root().unwrap()));
        }
    }
}

fn put(dir: &Arc<dyn Inode>, name: &str, content: &[u8]) {
    dir.create(name.as_bytes(), FileKind::File, None).unwrap().write_at(0, content).unwrap();
}

#[test]
fn a_file_that_moves_is_never_in_two_places() {
    let content = noise(1, 5000);
    at_every_cut(
        |root| {
            for name in ["a", "b"] {
                let dir = root.create(name.as_bytes(), FileKind::Directory, None).unwrap();
                put(&dir, "neighbour", &content);
            }
            put(&root.lookup(b"a").unwrap(), "file", &content);
        },
        |root| {
            root.lookup(b"a").unwrap().rename(b"file", &root.lookup(b"b").unwrap(), b"a new name").unwrap()
        },
        |tree| {
            let places = ["/a/file", "/b/a new name"].iter().filter(|path| tree.contains_key(**path)).count();
            assert!(places <= 1);
            assert_eq!(tree["/a/neighbour"].as_ref(), Some(&content));
            assert_eq!(tree["/b/neighbour"].as_ref(), Some(&content));
        },
    );
}

#[test]
fn a_file_that_is_replaced_is_there_in_old_or_new() {
    let (old, new) = (noise(1, 9000), noise(2, 7000));
    at_every_cut(
        |root| {
            put(root, "config", &old);
            // So that the entries are in different sectors.
            for i in 0..20 {
                put(root, &format!("something else {i}"), b"x");
            }
        },
        |root| {
            put(root, "config.new", &new);
            root.lookup(b"config.new").unwrap().sync().unwrap();
            root.rename(b"config.new", root, b"config").unwrap();
        },
        |tree| {
            let found = tree["/config"].as_ref().unwrap();
            assert!(*found == old || *found == new);
        },
    );
}

#[test]
fn clusters_change_hands_only_when_their_owner_is_gone() {
    let (old, new) = (noise(1, 900_000), noise(2, 900_000));
    at_every_cut(
        |root| put(root, "old", &old),
        |root| {
            root.remove(b"old").unwrap();
            // Does not fit beside the old one.
            put(root, "new", &new);
        },
        |tree| {
            if let Some(Some(found)) = tree.get("/old") {
                assert!(*found == old);
            }
            if let Some(Some(found)) = tree.get("/new") {
                assert!(found.is_empty() || *found == new);
            }
        },
    );
}

#[test]
fn a_file_that_is_cut_and_grows_again_keeps_to_itself() {
    let content = noise(1, 50_000);
    at_every_cut(
        |root| put(root, "file", &content),
        |root| {
            let file = root.lookup(b"file").unwrap();
            file.truncate(10_000).unwrap();
            put(root, "other", &noise(2, 60_000));
            file.write_at(10_000, &noise(3, 80_000)).unwrap();
        },
        |tree| {
            let found = tree["/file"].as_ref().unwrap();
            assert!(found[..10_000] == content[..10_000]);
        },
    );
}
