//! A model of a volume, operations on both, and what the model expects of them.

use super::*;
use anykernel::fs::FsError;
use proptest::prelude::*;

/// Names that differ in length, need of long entries, and alphabet; some share the alias.
const NAMES: [&str; 9] = [
    "FILE.TXT",
    "a",
    "some longer name.text",
    "some longer name too.text",
    "Ünïcödé",
    "архив с пробелами.tar",
    "日本語のとても長いファイル名、三つ以上の項目が要る.dat",
    "x.y.z",
    "a name so long that its entries do not fit into one sector of five hundred and twelve bytes, which \
     takes more than one hundred and ninety characters, because thirteen of them are in each entry of the name",
];

#[derive(Debug, Clone)]
pub(super) enum Op {
    Create { dir: u8, name: u8, capitals: bool, directory: bool },
    Write { file: u8, at: u16, len: u16, seed: u64 },
    Append { file: u8, len: u16, seed: u64 },
    Truncate { file: u8, size: u16 },
    Remove { dir: u8, name: u8 },
    Rename { dir: u8, name: u8, to: u8, new: u8, capitals: bool },
    SyncFile { file: u8 },
    Sync,
    Remount,
}

pub(super) fn ops(most: usize) -> impl Strategy<Value = Vec<Op>> {
    let name = 0..NAMES.len() as u8;
    let op = prop_oneof![
        6 => (any::<u8>(), name.clone(), any::<bool>(), prop::bool::weighted(0.3))
            .prop_map(|(dir, name, capitals, directory)| Op::Create { dir, name, capitals, directory }),
        4 => (any::<u8>(), any::<u16>(), any::<u16>(), any::<u64>())
            .prop_map(|(file, at, len, seed)| Op::Write { file, at, len: len % 20_000, seed }),
        4 => (any::<u8>(), any::<u16>(), any::<u64>())
            .prop_map(|(file, len, seed)| Op::Append { file, len: len % 6000, seed }),
        2 => (any::<u8>(), any::<u16>()).prop_map(|(file, size)| Op::Truncate { file, size }),
        3 => (any::<u8>(), name.clone()).prop_map(|(dir, name)| Op::Remove { dir, name }),
        4 => (any::<u8>(), name.clone(), any::<u8>(), name, any::<bool>())
            .prop_map(|(dir, name, to, new, capitals)| Op::Rename { dir, name, to, new, capitals }),
        1 => any::<u8>().prop_map(|file| Op::SyncFile { file }),
        1 => Just(Op::Sync),
        1 => Just(Op::Remount),
    ];
    prop::collection::vec(op, 1..most)
}

/// Directories (`None`) and files by their path in small letters, with the path as shown.
#[derive(Debug, Clone, Default)]
pub(super) struct Model(BTreeMap<String, (String, Option<Vec<u8>>)>);

fn key(path: &str) -> String {
    path.to_lowercase()
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

impl Model {
    pub(super) fn tree(&self) -> Tree {
        self.0.values().map(|(shown, content)| (shown.clone(), content.clone())).collect()
    }

    fn pick(&self, directories: bool, number: u8) -> Option<String> {
        let mut paths: Vec<_> = self
            .0
            .values()
            .filter(|(_, content)| content.is_none() == directories)
            .map(|(path, _)| path)
            .collect();
        let root = String::new();
        if directories {
            paths.push(&root);
        }
        let count = paths.len();
        (count > 0).then(|| paths[usize::from(number) % count].clone())
    }

    fn get(&self, path: &str) -> Option<&Option<Vec<u8>>> {
        self.0.get(&key(path)).map(|(_, content)| content)
    }

    fn is_empty(&self, path: &str) -> bool {
        let inside = key(path) + "/";
        !self.0.keys().any(|other| other.starts_with(&inside))
    }

    fn insert(&mut self, path: &str, content: Option<Vec<u8>>) {
        self.0.insert(key(path), (path.to_string(), content));
    }

    /// What rename(2) would say, and do.
    fn rename(&mut self, from: &str, to: &str) -> Result<()> {
        let Some(moved) = self.get(from).cloned() else { return Err(FsError::NotFound) };
        let shown = self.0[&key(from)].0.clone();
        let mut new = to.to_string();
        if key(from) == key(to) {
            if shown == to {
                return Ok(());
            }
        } else {
            // Into oneself comes before what is there; what is there, if it is the own ancestor, is not empty.
            if moved.is_none() && (key(parent(to)) + "/").starts_with(&(key(from) + "/")) {
                return Err(FsError::Invalid);
            }
            if let Some(there) = self.get(to) {
                match (moved.is_none(), there.is_none()) {
                    (true, false) => return Err(FsError::NotDirectory),
                    (false, true) => return Err(FsError::IsDirectory),
                    (true, true) if !self.is_empty(to) => return Err(FsError::NotEmpty),
                    _ => {}
                }
                // The name that is there stays as it is written.
                new = self.0[&key(to)].0.clone();
            }
        }
        self.0.remove(&key(to));
        self.0.remove(&key(from));
        self.insert(&new, moved);
        let inside = key(from) + "/";
        let below: Vec<_> = self.0.keys().filter(|path| path.starts_with(&inside)).cloned().collect();
        for old in below {
            if let Some((path, content)) = self.0.remove(&old) {
                self.insert(&format!("{new}{}", &path[shown.len()..]), content);
            }
        }
        Ok(())
    }
}

/// A volume and its model.
pub(super) struct Machine {
    pub(super) fs: Option<Arc<dyn FileSystem>>,
    pub(super) model: Model,
    /// Paths (in small letters) that were changed since the last sync, or whose place was.
    pub(super) touched: Vec<String>,
    pub(super) remount: fn(&Arc<dyn BlockDevice>) -> Arc<dyn FileSystem>,
    pub(super) device: Arc<dyn BlockDevice>,
}

impl Machine {
    pub(super) fn new(
        device: Arc<dyn BlockDevice>,
        remount: fn(&Arc<dyn BlockDevice>) -> Arc<dyn FileSystem>,
    ) -> Self {
        Self { fs: Some(remount(&device)), model: Model::default(), touched: Vec::new(), remount, device }
    }

    fn root(&self) -> Arc<dyn Inode> {
        self.fs.as_ref().unwrap().root().unwrap()
    }

    fn touch(&mut self, path: &str) {
        self.touched.push(key(path));
    }

    fn path(dir: &str, name: u8, capitals: bool) -> String {
        let name = NAMES[usize::from(name)];
        format!("{dir}/{}", if capitals { name.to_uppercase() } else { name.to_string() })
    }

    /// Does `op`; whether it made everything durable.
    pub(super) fn apply(&mut self, op: &Op) -> bool {
        match op {
            Op::Create { dir, name, capitals, directory } => {
                let dir = self.model.pick(true, *dir).unwrap();
                let path = Self::path(&dir, *name, *capitals);
                let kind = if *directory { FileKind::Directory } else { FileKind::File };
                let leaf = path.rsplit_once('/').unwrap().1;
                self.touch(&path);
                match walk(&self.root(), &dir).unwrap().create(leaf.as_bytes(), kind, None) {
                    Ok(_) => {
                        assert!(self.model.get(&path).is_none(), "{path} was there");
                        let content = if *directory { None } else { Some(Vec::new()) };
                        self.model.insert(&path, content);
                    }
                    Err(FsError::NoSpace) => {}
                    Err(error) => {
                        assert_eq!(error, FsError::Exists);
                        assert!(self.model.get(&path).is_some());
                    }
                }
            }
            Op::Write { file, at, len, seed } => self.write(*file, Some((*at).into()), (*len).into(), *seed),
            Op::Append { file, len, seed } => self.write(*file, None, (*len).into(), *seed),
            Op::Truncate { file, size } => {
                let Some(path) = self.model.pick(false, *file) else { return false };
                self.touch(&path);
                match walk(&self.root(), &path).unwrap().truncate((*size).into()) {
                    Ok(()) => self.content(&path).resize((*size).into(), 0),
                    Err(error) => assert_eq!(error, FsError::NoSpace),
                }
            }
            Op::Remove { dir, name } => {
                let dir = self.model.pick(true, *dir).unwrap();
                let path = Self::path(&dir, *name, false);
                let leaf = path.rsplit_once('/').unwrap().1;
                self.touch(&path);
                let expected = match self.model.get(&path) {
                    None => Err(FsError::NotFound),
                    Some(None) if !self.model.is_empty(&path) => Err(FsError::NotEmpty),
                    Some(_) => Ok(()),
                };
                assert_eq!(walk(&self.root(), &dir).unwrap().remove(leaf.as_bytes()), expected, "{path}");
                if expected.is_ok() {
                    self.model.0.remove(&key(&path));
                }
            }
            Op::Rename { dir, name, to, new, capitals } => {
                let (dir, to) = (self.model.pick(true, *dir).unwrap(), self.model.pick(true, *to).unwrap());
                let (from, target) = (Self::path(&dir, *name, false), Self::path(&to, *new, *capitals));
                self.touch(&from);
                self.touch(&target);
                let names = [&from, &target].map(|path| path.rsplit_once('/').unwrap().1.as_bytes());
                let root = self.root();
                let done = walk(&root, &dir).unwrap().rename(names[0], &walk(&root, &to).unwrap(), names[1]);
                if done == Err(FsError::NoSpace) {
                    return false;
                }
                let mut after = self.model.clone();
                assert_eq!(done, after.rename(&from, &target), "{from} to {target}");
                self.model = after;
            }
            Op::SyncFile { file } => {
                let Some(path) = self.model.pick(false, *file) else { return false };
                walk(&self.root(), &path).unwrap().sync().unwrap();
                self.touched.clear();
                return true;
            }
            Op::Sync => {
                self.fs.as_ref().unwrap().sync().unwrap();
                self.touched.clear();
                return true;
            }
            Op::Remount => {
                // The old instance writes what it has when it goes; then the new one reads.
                self.fs = None;
                self.fs = Some((self.remount)(&self.device));
                self.touched.clear();
                return true;
            }
        }
        false
    }

    fn content(&mut self, path: &str) -> &mut Vec<u8> {
        self.model.0.get_mut(&key(path)).unwrap().1.as_mut().unwrap()
    }

    fn write(&mut self, file: u8, at: Option<usize>, len: usize, seed: u64) {
        let Some(path) = self.model.pick(false, file) else { return };
        self.touch(&path);
        let inode = walk(&self.root(), &path).unwrap();
        let content = self.content(&path);
        let at = at.unwrap_or(content.len());
        let data = noise(seed, len);
        match inode.write_at(at as u64, &data) {
            Ok(written) => {
                assert_eq!(written, len);
                if len > 0 {
                    content.resize(content.len().max(at + len), 0);
                    content[at..at + len].copy_from_slice(&data);
                }
            }
            Err(error) => assert_eq!(error, FsError::NoSpace),
        }
    }
}

fn remount(device: &Arc<dyn BlockDevice>) -> Arc<dyn FileSystem> {
    let host = TestHost::new();
    // Small, so that much is written back early.
    let limits = CacheLimits { bytes: 512 << 10, read_ahead_bytes: 64 << 10 };
    let cache = BlockCache::new(host, limits, CacheCounters::default());
    VFat::new(host, cache).mount(Some(device.clone()), false).unwrap()
}

fn check(shape: Shape, ops: &[Op]) {
    let device = MemoryDisk::new(make(shape));
    let mut machine = Machine::new(device.clone(), remount);
    for op in ops {
        machine.apply(op);
    }
    assert_same(&read_tree(&machine.root()), &machine.model.tree());
    machine.fs.as_ref().unwrap().sync().unwrap();
    assert_clean(&device.durable());
    machine.apply(&Op::Remount);
    assert_same(&read_tree(&machine.root()), &machine.model.tree());
    machine.fs = None;
    assert_clean(&device.durable());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 25, max_shrink_iters: 400, ..ProptestConfig::default() })]

    #[test]
    fn fat12(ops in ops(120)) {
        check(SHAPES[0], &ops);
    }

    #[test]
    fn fat16(ops in ops(120)) {
        check(Shape { bytes: 9 << 20, cluster: "4", ..SHAPES[2] }, &ops);
    }

    #[test]
    fn fat32(ops in ops(120)) {
        check(Shape { width: "32", bytes: 4 << 20, cluster: "1", more: &[] }, &ops);
    }
}
