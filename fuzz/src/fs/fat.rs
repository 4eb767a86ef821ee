//! FAT: a damaged volume is used as far as it goes; a whole one is used like a model, checked, unmounted, checked by
//! [`super::fsck`], mounted and checked again.

use super::disk::{Changes, Overlay, patch, peek};
use super::{fsck, images};
use crate::host::FuzzHost;
use crate::input::Input;
use crate::watch;
use anykernel::block::BlockDevice;
use anykernel::fs::{FileKind, FileSystem, FsError, FsType, Inode};
use anykernel_vfs::fat::VFat;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Bits of a table's entry, by image.
const WIDTHS: [usize; 3] = [12, 16, 32];

const NAMES: [&str; 14] = [
    "A.TXT",
    "b.txt",
    "longer name.html",
    "ÄÖÜ",
    "x",
    "a.b.c",
    "NO EXTENSION",
    "日本語.txt",
    "readme.md",
    "README~1.MD",
    "+[=].;",
    "d1",
    "d2",
    "a name that is so long that it needs several entries of a directory to be kept.txt",
];

/// What ought to be there: by path in lower case.
#[derive(Default, Clone)]
struct Model(BTreeMap<String, Option<Vec<u8>>>);

fn byte_at(seed: u8, at: usize) -> u8 {
    seed.wrapping_mul(89) ^ (at ^ at >> 8) as u8
}

struct Machine {
    host: FuzzHost,
    disk: Arc<Overlay>,
    fs: Option<Arc<dyn FileSystem>>,
    /// `None`: the volume is damaged, and anything may fail.
    model: Option<Model>,
}

fn walk(top: Arc<dyn Inode>, path: &str) -> Result<Arc<dyn Inode>, FsError> {
    path.split('/').filter(|part| !part.is_empty()).try_fold(top, |at, part| at.lookup(part.as_bytes()))
}

impl Machine {
    fn mount(&mut self) -> bool {
        self.fs = None;
        let kind = VFat::new(self.host, super::cache(self.host));
        let device: Arc<dyn BlockDevice> = self.disk.clone();
        match kind.mount(Some(device.clone()), false) {
            Ok(fs) => self.fs = Some(fs),
            Err(error) => {
                assert!(self.model.is_none(), "a good volume does not mount: {error}");
                let _ = (kind.probe(&device), kind.explain(&device));
            }
        }
        self.fs.is_some()
    }

    fn root(&self) -> Option<Arc<dyn Inode>> {
        self.fs.as_ref()?.root().ok()
    }

    /// A directory that is there: the root, or one below it.
    fn directory(&self, input: &mut Input) -> String {
        let choice = input.u8();
        let Some(model) = &self.model else {
            return ["", "/d1", "/d1/d2", "/d2"][usize::from(choice) % 4].into();
        };
        let mut known = vec![String::new()];
        known.extend(model.0.iter().filter(|(_, content)| content.is_none()).map(|(path, _)| path.clone()));
        known.swap_remove(usize::from(choice) % known.len())
    }

    fn path(&self, input: &mut Input) -> String {
        let directory = self.directory(input);
        format!("{directory}/{}", input.pick(&NAMES))
    }

    /// Compares what an operation did with what it should have done. `false`: it did not happen.
    fn judge<T>(&self, did: &Result<T, FsError>, expected: Result<(), FsError>, what: &str) -> bool {
        if self.model.is_some() && did.as_ref().err() != Some(&FsError::NoSpace) {
            assert_eq!(did.as_ref().map(|_| ()).map_err(|error| *error), expected, "{what}");
        }
        did.is_ok()
    }

    fn known(&self, path: &str) -> Option<Option<usize>> {
        let model = self.model.as_ref()?;
        model.0.get(&path.to_lowercase()).map(|content| content.as_ref().map(Vec::len))
    }

    fn is_empty(&self, path: &str) -> bool {
        let below = format!("{}/", path.to_lowercase());
        self.model.as_ref().is_some_and(|model| !model.0.keys().any(|key| key.starts_with(&below)))
    }

    fn apply(&mut self, input: &mut Input) {
        let Some(root) = self.root() else { return };
        match input.u8() & 15 {
            0..3 => self.create(input, root, FileKind::File),
            3 => self.create(input, root, FileKind::Directory),
            4..8 => self.write(input, root),
            8 => self.truncate(input, root),
            9 | 10 => self.remove(input, root),
            11 => self.rename(input, root),
            12 => {
                let done = self.fs.as_ref().map(|fs| fs.sync());
                assert!(self.model.is_none() || matches!(done, Some(Ok(()))), "sync: {done:?}");
            }
            13 => {
                // Everything is closed; the new instance reads what the old one left.
                drop(root);
                self.mount();
            }
            14 => self.compare(input, root),
            _ => {
                if self.model.is_none() {
                    super::visit(root);
                }
            }
        }
    }

    fn create(&mut self, input: &mut Input, root: Arc<dyn Inode>, kind: FileKind) {
        let path = self.path(input);
        let (parent, leaf) = path.rsplit_once('/').expect("absolute");
        let Ok(parent) = walk(root, parent) else { return };
        let expected = if self.known(&path).is_some() { Err(FsError::Exists) } else { Ok(()) };
        let did = parent.create(leaf.as_bytes(), kind, None);
        // An alias may be what another file's short name is: it exists, though nobody made it.
        if leaf.contains('~') && did.as_ref().err() == Some(&FsError::Exists) {
            return;
        }
        if self.judge(&did, expected, &path)
            && let Some(model) = &mut self.model
        {
            model.0.insert(path.to_lowercase(), (kind == FileKind::File).then(Vec::new));
        }
    }

    fn write(&mut self, input: &mut Input, root: Arc<dyn Inode>) {
        let path = self.path(input);
        let (seed, how, len) = (input.u8(), input.u8(), usize::from(input.u16()) % 6000);
        let Ok(inode) = walk(root, &path) else { return };
        if inode.metadata().is_ok_and(|metadata| metadata.kind != FileKind::File)
            || leaf_is_alias(self, &path)
        {
            return;
        }
        let size = self.known(&path).flatten().unwrap_or(0);
        let at = match how & 3 {
            0 => size,
            1 => 0,
            2 => usize::from(how) * 16,
            _ => size / 2,
        };
        let data: Vec<u8> = (0..len).map(|at| byte_at(seed, at)).collect();
        let did = inode.write_at(at as u64, &data);
        if self.judge(&did, Ok(()), &path) {
            if let Some(Some(content)) =
                self.model.as_mut().and_then(|model| model.0.get_mut(&path.to_lowercase()))
            {
                assert_eq!(did, Ok(len), "{path}");
                if len > 0 {
                    content.resize(content.len().max(at + len), 0);
                    content[at..at + len].copy_from_slice(&data);
                }
            }
        } else if let Some(model) = &mut self.model {
            // It is full; how much of a failed write is there is nobody's promise.
            let size = inode.metadata().expect("metadata").size as usize;
            let mut now = vec![0; size];
            inode.read_at(0, &mut now).expect("read");
            model.0.insert(path.to_lowercase(), Some(now));
        }
    }

    fn truncate(&mut self, input: &mut Input, root: Arc<dyn Inode>) {
        let path = self.path(input);
        let size = usize::from(input.u16()) % 20_000;
        let Ok(inode) = walk(root, &path) else { return };
        if inode.metadata().is_ok_and(|metadata| metadata.kind != FileKind::File)
            || leaf_is_alias(self, &path)
        {
            return;
        }
        let did = inode.truncate(size as u64);
        if self.judge(&did, Ok(()), &path)
            && let Some(Some(content)) =
                self.model.as_mut().and_then(|model| model.0.get_mut(&path.to_lowercase()))
        {
            content.resize(size, 0);
        }
    }

    fn remove(&mut self, input: &mut Input, root: Arc<dyn Inode>) {
        let path = self.path(input);
        let (parent, leaf) = path.rsplit_once('/').expect("absolute");
        let Ok(parent) = walk(root, parent) else { return };
        if leaf_is_alias(self, &path) {
            return;
        }
        let expected = match self.known(&path) {
            None => Err(FsError::NotFound),
            Some(None) if !self.is_empty(&path) => Err(FsError::NotEmpty),
            Some(_) => Ok(()),
        };
        if self.judge(&parent.remove(leaf.as_bytes()), expected, &path)
            && let Some(model) = &mut self.model
        {
            model.0.remove(&path.to_lowercase());
        }
    }

    fn rename(&mut self, input: &mut Input, root: Arc<dyn Inode>) {
        let (from, to) = (self.path(input), self.path(input));
        if leaf_is_alias(self, &from) || leaf_is_alias(self, &to) {
            return;
        }
        let ((a, x), (b, y)) =
            (from.rsplit_once('/').expect("absolute"), to.rsplit_once('/').expect("absolute"));
        let (Ok(a), Ok(b)) = (walk(root.clone(), a), walk(root, b)) else { return };
        let (low, high) = (from.to_lowercase(), to.to_lowercase());
        let source = self.known(&from);
        let target = self.known(&to);
        let did = a.rename(x.as_bytes(), &b, y.as_bytes());
        let Some(model) = &mut self.model else { return };
        let expected = match (source, target) {
            (None, _) => Err(FsError::NotFound),
            (Some(None), _) if high.starts_with(&format!("{low}/")) => Err(FsError::Invalid),
            (Some(None), Some(Some(_))) if low != high => Err(FsError::NotDirectory),
            (Some(Some(_)), Some(None)) => Err(FsError::IsDirectory),
            (Some(None), Some(None))
                if low != high && model.0.keys().any(|key| key.starts_with(&format!("{high}/"))) =>
            {
                Err(FsError::NotEmpty)
            }
            _ => Ok(()),
        };
        if did == Err(FsError::NoSpace) {
            return;
        }
        assert_eq!(did, expected, "{from} to {to}");
        if did.is_ok() && low != high {
            let moved: Vec<String> = model
                .0
                .keys()
                .filter(|key| **key == low || key.starts_with(&format!("{low}/")))
                .cloned()
                .collect();
            for key in moved {
                let content = model.0.remove(&key).expect("it is there");
                model.0.insert(format!("{high}{}", &key[low.len()..]), content);
            }
        }
    }

    /// Reads one file and compares it.
    fn compare(&self, input: &mut Input, root: Arc<dyn Inode>) {
        let path = self.path(input);
        if leaf_is_alias(self, &path) {
            return;
        }
        let found = walk(root, &path);
        let Some(model) = &self.model else { return };
        match (model.0.get(&path.to_lowercase()), found) {
            (None, found) => assert_eq!(found.err(), Some(FsError::NotFound), "{path}"),
            (Some(None), found) => {
                assert_eq!(
                    found.expect("it is there").metadata().expect("metadata").kind,
                    FileKind::Directory
                );
            }
            (Some(Some(content)), found) => same(&path, &found.expect("it is there"), content),
        }
    }

    /// Everything, against the model.
    fn compare_all(&self) {
        let (Some(model), Some(root)) = (&self.model, self.root()) else { return };
        let (mut todo, mut seen) = (vec![(String::new(), root)], 0);
        while let Some((path, inode)) = todo.pop() {
            watch::step();
            let mut names = Vec::new();
            inode
                .read_dir(0, &mut |entry| {
                    names.push(String::from_utf8(entry.name).expect("UTF-8"));
                    true
                })
                .expect("a listing");
            for name in names {
                let child = inode.lookup(name.as_bytes()).expect("what is listed is found");
                let path = format!("{path}/{name}").to_lowercase();
                seen += 1;
                match model.0.get(&path) {
                    None => panic!("{path} ought not to be there"),
                    Some(None) => todo.push((path, child)),
                    Some(Some(content)) => same(&path, &child, content),
                }
            }
        }
        assert_eq!(seen, model.0.len(), "something is missing");
    }
}

/// A name that may also be the alias of another file is not followed by the model.
fn leaf_is_alias(machine: &Machine, path: &str) -> bool {
    machine.model.is_some() && path.contains('~') && machine.known(path).is_none()
}

fn same(path: &str, inode: &Arc<dyn Inode>, content: &[u8]) {
    let size = inode.metadata().expect("metadata").size;
    assert_eq!(size, content.len() as u64, "the length of {path}");
    let mut now = vec![0; content.len()];
    assert_eq!(inode.read_at(0, &mut now), Ok(content.len()), "{path}");
    assert!(now == content, "the content of {path}");
}

/// Clusters of a volume that belong to something.
fn used_clusters(base: &[u8], width: usize, fat: usize, fat_bytes: usize) -> Vec<u32> {
    let links = (fat_bytes * 8 / width) as u32;
    (2..links).filter(|cluster| link(base, &Changes::new(), width, fat, *cluster) != 0).collect()
}

/// The entry of a cluster in the table at `fat`, whose entries have `width` bits.
fn link(base: &[u8], changes: &Changes, width: usize, fat: usize, cluster: u32) -> u32 {
    let bit = cluster as usize * width;
    let mut raw = [0; 4];
    peek(base, changes, fat + bit / 8, &mut raw);
    (u32::from_le_bytes(raw) >> (bit % 8)) & (u32::MAX >> (32 - width))
}

/// Gives a cluster another entry.
fn relink(base: &[u8], changes: &mut Changes, width: usize, fat: usize, cluster: u32, to: u32) {
    let bit = cluster as usize * width;
    let mask = (u32::MAX >> (32 - width)) << (bit % 8);
    let mut raw = [0; 4];
    peek(base, changes, fat + bit / 8, &mut raw);
    let value = u32::from_le_bytes(raw) & !mask | to << (bit % 8) & mask;
    patch(base, changes, fat + bit / 8, &value.to_le_bytes());
}

/// Damages a volume as the input says: bytes of its structures, and where the chains of its files lead.
fn damage(base: &'static [u8], width: usize, input: &mut Input) -> Changes {
    let mut changes = Changes::new();
    let word = |at: usize| usize::from(u16::from_le_bytes([base[at], base[at + 1]]));
    let fat = word(14) * 512;
    let fat_bytes = if word(22) == 0 { word(36) } else { word(22) } * 512;
    let root = fat + fat_bytes * usize::from(base[16]);
    let regions = [
        (0, 96),
        (fat, 512),
        (fat + fat_bytes, 512),
        (root, 2048),
        (root, 16_384),
        (512, 512),
        (fat, fat_bytes),
        (0, 512),
    ];
    let count = input.u8();
    if count & 0x80 != 0 {
        let used = used_clusters(base, width, fat, fat_bytes);
        for _ in 0..1 + (count >> 3 & 3) {
            let (from, how) = (input.pick(&used), input.u8());
            let to = match how >> 6 {
                0 => [0, 1, u32::MAX, u32::MAX - 8][usize::from(how & 3)],
                1 => from.wrapping_add(u32::from(how & 15)).wrapping_sub(8),
                _ => input.pick(&used),
            };
            relink(base, &mut changes, width, fat, from, to);
        }
        return changes;
    }
    for _ in 0..1 + (count & 7) {
        let (start, len) = input.pick(&regions);
        let at = start + input.below(len);
        let how = input.u8();
        let value: u32 = match how & 7 {
            0 => 0,
            1 => u32::MAX,
            2 => input.u8().into(),
            3 => input.u16().into(),
            4 => 2 + u32::from(input.u8() & 7),
            5 => 0xfff8_fff8,
            6 => 0x10,
            _ => input.u32(),
        };
        patch(base, &mut changes, at, &value.to_le_bytes()[..1 + usize::from(how >> 3 & 3)]);
    }
    changes
}

/// One execution.
pub fn run(data: &[u8]) {
    execute(data);
}

/// One execution; the volume as it was left, if it has to be whole.
pub fn execute(data: &[u8]) -> Option<Vec<u8>> {
    let mut input = Input::new(data);
    let how = input.u8();
    let all = images::fat();
    let which = usize::from(how) % all.len();
    let base: &'static [u8] = &all[which];
    let whole = how & 0x80 == 0;
    let changes = if whole { Changes::new() } else { damage(base, WIDTHS[which], &mut input) };
    let host = FuzzHost::fresh();
    let disk = Overlay::new(base, changes, false);
    let mut machine = Machine { host, disk: disk.clone(), fs: None, model: None };
    if whole {
        machine.model = Some(Model::default());
        machine.mount();
        machine.adopt();
    } else if machine.mount()
        && let Some(root) = machine.root()
    {
        super::visit(root);
    }
    let mut count = 0;
    while !input.is_empty() && machine.fs.is_some() && count < 100 {
        count += 1;
        machine.apply(&mut input);
    }
    if !whole {
        let _ = machine.fs.take().map(|fs| fs.sync());
        return None;
    }
    machine.compare_all();
    machine.fs.as_ref().expect("mounted").sync().expect("sync");
    machine.fs = None;
    let content = disk.content();
    if let Err(what) = fsck::check(&content) {
        panic!("the volume is not whole: {what}");
    }
    machine.mount();
    machine.compare_all();
    Some(content)
}

impl Machine {
    /// Takes what is on the volume at the start into the model.
    fn adopt(&mut self) {
        let mut model = Model::default();
        let mut todo: Vec<(String, Arc<dyn Inode>)> =
            self.root().into_iter().map(|root| (String::new(), root)).collect();
        while let Some((path, inode)) = todo.pop() {
            let mut names = Vec::new();
            let _ = inode.read_dir(0, &mut |entry| {
                names.push(entry);
                true
            });
            for entry in names {
                let path = format!("{path}/{}", String::from_utf8_lossy(&entry.name)).to_lowercase();
                let child = inode.lookup(&entry.name).expect("what is listed is found");
                let content = (entry.kind == FileKind::File).then(|| {
                    let mut content = vec![0; child.metadata().expect("metadata").size as usize];
                    child.read_at(0, &mut content).expect("read");
                    content
                });
                if content.is_none() {
                    todo.push((path.clone(), child));
                }
                model.0.insert(path, content);
            }
        }
        self.model = Some(model);
    }
}
