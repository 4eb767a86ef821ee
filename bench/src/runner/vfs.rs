//! Reading ext4: our vfs in a process beside the kernel's, through a loop mount of the same image. Needs root for the
//! mount.
//!
//! *Cold*: freshly mounted, nothing cached anywhere. *Warm*: read once before, each from its own cache. The sides take
//! turns in being first, and each has the memory to itself: what the other had cached is dropped before.

mod image;
mod side;

use super::{Result, progress};
use crate::record::{Better, Record};
use image::{BIG_BYTES, SMALL_FILES};
use side::{Side, Whose};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

const RUNS: usize = 9;
/// Bytes of a sequential read, by both sides.
const CHUNK: usize = 1 << 20;
const SMALL: usize = 4096;
const RANDOM_COLD: usize = 4_000;
const RANDOM_WARM: usize = 200_000;
const THREADS: usize = 4;

const DD: &str = "dd bs=1M from a kernel loop mount";
const KERNEL: &str = "the same calls on a kernel loop mount";

/// What is measured, in the order of a run.
const CASES: [(&str, &str, &str); 9] = [
    ("1 GiB sequential, cold", "MB/s", DD),
    ("1 GiB sequential, warm", "MB/s", DD),
    ("1 GiB by 4 threads, warm", "MB/s", KERNEL),
    ("random 4 KiB, warm", "reads/s", KERNEL),
    ("random 4 KiB by 4 threads, warm", "reads/s", KERNEL),
    ("random 4 KiB, cold", "reads/s", KERNEL),
    ("10,000 small files, cold", "files/s", KERNEL),
    ("10,000 small files, warm", "files/s", KERNEL),
    ("10,000 small files by 4 threads, warm", "files/s", KERNEL),
];

fn seconds(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64())
}

/// dd's own figure, without the time it takes to start.
fn dd(file: &Path) -> Result<f64> {
    let mut command = Command::new("dd");
    command.arg(format!("if={}", file.display())).args(["of=/dev/null", "bs=1M"]).env("LC_ALL", "C");
    let output = command.output().map_err(|error| format!("dd: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    let time = text.rsplit(", ").nth(1).and_then(|time| time.strip_suffix(" s"));
    time.and_then(|time| time.parse().ok()).ok_or_else(|| format!("dd said: {}", text.trim()))
}

/// One pass over the large file, from its start to its end.
fn sequential(side: &Side) -> Result<f64> {
    if let Side::Kernels { mount } = side {
        return dd(&mount.join("big"));
    }
    seconds(|| stretch(side, 0, BIG_BYTES))
}

/// Reads a part of the large file in order.
fn stretch(side: &Side, from: u64, to: u64) -> Result<()> {
    let file = side.open("/big")?;
    let mut buffer = vec![0; CHUNK];
    let mut at = from;
    while at < to {
        match file.read_at(at, &mut buffer)? {
            0 => return Err(format!("the file ends at {at}")),
            n => at += n as u64,
        }
    }
    Ok(())
}

/// Reads `count` pages of the large file, the same ones on both sides.
fn random(side: &Side, count: usize, seed: u64) -> Result<()> {
    let file = side.open("/big")?;
    let mut buffer = vec![0; SMALL];
    let mut state = seed * 2 + 1;
    for _ in 0..count {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let page = (state >> 33) % (BIG_BYTES / SMALL as u64);
        if file.read_at(page * SMALL as u64, &mut buffer)? != SMALL {
            return Err("a short read".into());
        }
    }
    Ok(())
}

/// Walks the tree of small files and reads all of each; of the directories, those whose number is `part` of `parts`.
fn walk(side: &Side, part: usize, parts: usize) -> Result<()> {
    let mut buffer = vec![0; 64 << 10];
    let mut seen = 0;
    let directories = side.list("/small")?;
    for (directory, _) in directories.iter().skip(part).step_by(parts) {
        let directory = format!("/small/{directory}");
        for (name, _) in side.list(&directory)? {
            let file = side.open(&format!("{directory}/{name}"))?;
            let mut at = 0;
            loop {
                match file.read_at(at, &mut buffer)? {
                    0 => break,
                    n => at += n as u64,
                }
            }
            seen += 1;
        }
    }
    if seen * parts == SMALL_FILES { Ok(()) } else { Err(format!("only {seen} small files were found")) }
}

fn threads(work: impl Fn(usize) -> Result<()> + Sync) -> Result<f64> {
    seconds(|| {
        std::thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || work(thread))).collect();
            threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a reader panicked")?)
        })
    })
}

/// One run of one side: a figure for each of [`CASES`].
fn measure(whose: Whose, image: &Path, mount: &Path) -> Result<[f64; CASES.len()]> {
    let megabytes = |seconds: f64| BIG_BYTES as f64 / 1e6 / seconds;
    let side = Side::mount(whose, image, mount)?;
    let cold = sequential(&side)?;
    let warm = sequential(&side)?;
    let quarter = BIG_BYTES / THREADS as u64;
    let parallel = threads(|thread| stretch(&side, quarter * thread as u64, quarter * (thread as u64 + 1)))?;
    let random_warm = seconds(|| random(&side, RANDOM_WARM, 0))?;
    let random_parallel = threads(|thread| random(&side, RANDOM_WARM, thread as u64))?;
    drop(side);
    let side = Side::mount(whose, image, mount)?;
    let random_cold = seconds(|| random(&side, RANDOM_COLD, 7))?;
    drop(side);
    let side = Side::mount(whose, image, mount)?;
    let walk_cold = seconds(|| walk(&side, 0, 1))?;
    let walk_warm = seconds(|| walk(&side, 0, 1))?;
    let walk_parallel = threads(|thread| walk(&side, thread, THREADS))?;
    Ok([
        megabytes(cold),
        megabytes(warm),
        megabytes(parallel),
        RANDOM_WARM as f64 / random_warm,
        (RANDOM_WARM * THREADS) as f64 / random_parallel,
        RANDOM_COLD as f64 / random_cold,
        SMALL_FILES as f64 / walk_cold,
        SMALL_FILES as f64 / walk_warm,
        SMALL_FILES as f64 / walk_parallel,
    ])
}

/// Runs it in `dir`, which has 2.5 GiB of room.
pub fn bench(dir: &Path) -> Result {
    let image = image::make(dir)?;
    let mount = dir.join("mount");
    std::fs::create_dir_all(&mount).map_err(|error| error.to_string())?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for turn in 0..RUNS {
        progress("vfs", turn, RUNS);
        let mut sides = [(Whose::Ours, &mut ours), (Whose::Kernels, &mut theirs)];
        if turn % 2 == 1 {
            sides.reverse();
        }
        for (whose, figures) in sides {
            figures.push(measure(whose, &image, &mount)?);
        }
    }
    let _ = std::fs::remove_file(&image);
    let column =
        |figures: &[[f64; CASES.len()]], case| figures.iter().map(|run| run[case]).collect::<Vec<_>>();
    let records = CASES.iter().enumerate().map(|(case, (name, unit, peer))| {
        let id = ("vfs", format!("ext4 {name}"), "userspace");
        let (ours, theirs) = (column(&ours, case), column(&theirs, case));
        let record = Record::new(id, unit, Better::Higher, &ours, (*peer, &theirs));
        if *peer == DD { record.goal(1.0 / 1.3) } else { record }
    });
    Ok(records.collect())
}
