//! Power cuts: a node writes files on a FAT volume, its power fails at some write, and it comes up again on what is left.
//! What was synced must be there, whole; everything else may be there or not.

use super::faults::differs;
use super::{Options, Report, image, patterned, with_address, with_kernel};
use crate::sim::{DiskId, DiskModel, Failure, NodeSetup, PowerCut, SECOND, SimConfig, SimHost, Simulation};
use anykernel::config::{Config, Mount};
use anykernel::fs::{FileKind, FsError, Namespace, OpenOptions};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Files and what is in them since the last sync.
type Synced = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;

const MOUNT: &str = "/data";

fn config() -> Config {
    let mount =
        Mount { source: "disk0".into(), target: MOUNT.into(), kind: Some("vfat".into()), read_only: false };
    Config { mounts: vec![mount], interfaces: Vec::new(), ..with_address("none") }
}

/// Files come, grow, are renamed and go; every few steps all is synced.
fn work(namespace: &dyn Namespace, seed: u64, synced: &Synced) -> Result<(), FsError> {
    let mut random = crate::sim::Random::new(seed, 9);
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    // What a step since the last sync touched is in nobody's promise.
    let touch = |path: &str| drop(synced.lock().expect("one thread").remove(path));
    for dir in 0..2 {
        namespace.create(format!("/data/d{dir}").as_bytes(), FileKind::Directory, None)?;
    }
    namespace.sync()?;
    for step in 0..24u64 {
        let path = format!("/data/d{}/f{}", random.below(2), random.below(4));
        touch(&path);
        match random.below(5) {
            0 if files.contains_key(&path) => {
                namespace.remove(path.as_bytes())?;
                files.remove(&path);
            }
            1 if files.contains_key(&path) => {
                let to = format!("/data/d{}/g{step}", random.below(2));
                touch(&to);
                namespace.rename(path.as_bytes(), to.as_bytes())?;
                let content = files.remove(&path).unwrap_or_default();
                files.insert(to, content);
            }
            _ => {
                let content = patterned(seed ^ step, random.below(6000) as usize);
                let file = namespace.open(path.as_bytes(), OpenOptions::CREATE)?;
                let mut at = 0;
                while at < content.len() {
                    at += file.write_at(at as u64, &content[at..])?;
                }
                files.insert(path, content);
            }
        }
        if random.below(3) == 0 {
            namespace.sync()?;
            synced.lock().expect("one thread").clone_from(&files);
        }
    }
    Ok(())
}

struct World {
    sim: Simulation,
    disk: DiskId,
    node: SimHost,
}

fn world(options: &Options, image: Vec<u8>, cut: PowerCut) -> World {
    let config = SimConfig { time_limit_ns: 3_600 * SECOND, ..options.sim_config() };
    let sim = Simulation::new(config);
    let disk = sim.disk(image, DiskModel { latency_ns: 10_000, ..DiskModel::default() });
    sim.set_power_cut(disk, cut);
    let node = sim.node(NodeSetup { cpus: options.cpus, disks: vec![disk], ..NodeSetup::named("node") });
    World { sim, disk, node }
}

/// Runs until the power fails at write `at` (0: it does not), and says what was synced by then.
fn until_cut(
    options: &Options,
    image: Vec<u8>,
    at: u64,
    cut: PowerCut,
    report: &mut Report,
) -> (World, BTreeMap<String, Vec<u8>>) {
    let world = world(options, image, cut);
    let World { sim, disk, node } = &world;
    let (disk, node) = (*disk, *node);
    if at > 0 {
        sim.cut_power_at(disk, at);
    }
    let synced = Synced::default();
    let (its, seed) = (synced.clone(), options.seed);
    let result = sim.run(node, "main", move || {
        with_kernel(node, config(), |kernel| {
            kernel.namespace().map(|namespace| work(&*namespace, seed, &its))
        })
    });
    let when = when(at, cut);
    match result {
        Err(Failure::Down) => {}
        Ok((Ok(Some(Ok(()))), 0)) => {}
        Ok((result, held)) => report.find(format!("{when}: {result:?}, the kernel is held {held} times")),
        Err(failure) => report.find(format!("{when}: {failure}")),
    }
    sim.crash(node);
    let synced = synced.lock().expect("one thread").clone();
    (world, synced)
}

fn when(at: u64, cut: PowerCut) -> String {
    format!("power cut at write {at} ({cut:?})")
}

/// What a power failure left on a disk, and what must be there.
#[derive(Debug)]
pub struct Wreck {
    /// The disk.
    pub image: Vec<u8>,
    /// Files that were synced and not touched since, by path on the volume, and what is in them.
    pub synced: BTreeMap<String, Vec<u8>>,
    /// Writes and flushes until then.
    pub writes: u64,
    /// What went wrong before the power failed.
    pub findings: Vec<String>,
}

/// The disk as the power failure at write `at` (0: there is none) leaves it, for other tools to look at. It begins as `image`,
/// a FAT volume.
pub fn wreck(options: &Options, image: Vec<u8>, at: u64, cut: PowerCut) -> Wreck {
    let mut report = Report::new(options);
    let (World { sim, disk, .. }, synced) = until_cut(options, image, at, cut, &mut report);
    let on_volume = |(path, content): (String, _)| (path.replacen(MOUNT, "", 1), content);
    Wreck {
        image: sim.durable_image(disk),
        synced: synced.into_iter().map(on_volume).collect(),
        writes: sim.disk_writes(disk),
        findings: report.findings,
    }
}

/// Runs until the power fails, comes up again, and checks.
fn one(options: &Options, at: u64, cut: PowerCut, report: &mut Report) -> u64 {
    let (World { sim, disk, node }, synced) = until_cut(options, image::fat(), at, cut, report);
    let when = when(at, cut);
    let writes = sim.disk_writes(disk);
    report.count("files_checked", synced.len() as u64);
    let node = sim.reboot(node);
    let check = sim.run(node, "check", move || {
        with_kernel(node, config(), |kernel| match kernel.namespace() {
            Some(namespace) => {
                let lost = synced.iter().filter_map(|(path, content)| differs(&*namespace, path, content));
                lost.chain(walk(&*namespace)).collect()
            }
            None => vec!["no file system".to_string()],
        })
    });
    match check {
        Ok((Ok(lines), 0)) => report.findings.extend(lines.iter().map(|line| format!("{when}: {line}"))),
        Ok((Ok(_), held)) => report.find(format!("{when}: the kernel is held {held} times")),
        Ok((Err(error), _)) => report.find(format!("{when}: the volume does not mount any more: {error}")),
        Err(failure) => report.find(format!("{when}: while reading back: {failure}")),
    }
    report.close(&sim);
    writes
}

/// Reads everything there is: nothing may be in the way of it.
fn walk(namespace: &dyn Namespace) -> Vec<String> {
    let mut bad = Vec::new();
    for dir in ["/data", "/data/d0", "/data/d1"] {
        let Ok(inode) = namespace.resolve(dir.as_bytes(), true) else { continue };
        let (mut names, mut cursor) = (Vec::new(), Some(0));
        while let Some(at) = cursor {
            match inode.read_dir(at, &mut |entry| {
                names.push(entry.name);
                true
            }) {
                Ok(next) => cursor = next,
                Err(error) => {
                    bad.push(format!("{dir} cannot be read: {error}"));
                    break;
                }
            }
        }
        for name in names {
            let path = [dir.as_bytes(), b"/", &name].concat();
            let file = namespace.open(&path, OpenOptions::READ);
            let read = file.and_then(|file| {
                if file.metadata()?.kind == FileKind::File {
                    file.read_at(0, &mut vec![0; 16 << 10])?;
                }
                Ok(())
            });
            if let Err(error) = read {
                bad.push(format!("{} cannot be read: {error}", String::from_utf8_lossy(&path)));
            }
        }
    }
    bad
}

/// The power fails at every `stride`-th write, each time with three kinds of loss.
pub fn sweep(options: &Options, stride: u64) -> Report {
    let mut report = Report::new(options);
    let writes = one(options, 0, PowerCut::Random, &mut report);
    report.count("writes", writes);
    for at in (1..=writes).step_by(stride.max(1) as usize) {
        for cut in [PowerCut::Random, PowerCut::LoseAll, PowerCut::KeepAll] {
            one(options, at, cut, &mut report);
            report.count("power_cuts", 1);
        }
    }
    report
}

/// The scenario.
pub(super) fn run(options: &Options) -> Report {
    sweep(options, 1)
}
