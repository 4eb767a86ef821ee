//! Sequential reading of a 1 GiB file from ext4: our vfs in a process beside `dd` from a kernel loop mount of the same
//! image, cold (nothing cached anywhere) and warm (each in its own cache). Needs root for the mount.

use super::Result;
use crate::record::{Better, Record};
use anykernel::config::{Cache, Config, Mount};
use anykernel::fs::OpenOptions;
use anykernel_userspace::{HostDisk, Instance};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const FILE_BYTES: u64 = 1 << 30;
const RUNS: usize = 5;
const READ_BYTES: usize = 1 << 20;

struct Loop(PathBuf);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }
}

fn image(dir: &Path) -> Result<PathBuf> {
    let io = |error: std::io::Error| format!("{}: {error}", dir.display());
    let (tree, image) = (dir.join("tree"), dir.join("bench.ext4"));
    fs::create_dir_all(&tree).map_err(io)?;
    // Not zeros, and not sparse: a hole needs no reading.
    let block: Vec<u8> = (0..1 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut file = fs::File::create(tree.join("big")).map_err(io)?;
    for _ in 0..FILE_BYTES >> 20 {
        std::io::Write::write_all(&mut file, &block).map_err(io)?;
    }
    drop(file);
    run(Command::new("/sbin/mkfs.ext4").args(["-q", "-F", "-d"]).arg(&tree).arg(&image).arg("1200M"))?;
    fs::remove_dir_all(&tree).map_err(io)?;
    Ok(image)
}

fn drop_caches() -> Result<()> {
    run(&mut Command::new("sync"))?;
    fs::write("/proc/sys/vm/drop_caches", "3")
        .map_err(|error| format!("dropping the page cache needs root: {error}"))
}

fn dd(file: &Path) -> Result<f64> {
    let start = Instant::now();
    run(Command::new("dd").arg(format!("if={}", file.display())).args(["of=/dev/null", "bs=1M"]))?;
    Ok(start.elapsed().as_secs_f64())
}

fn instance(image: &Path) -> Result<Instance> {
    let mount = Mount { source: "disk0".into(), target: "/".into(), kind: None, read_only: true };
    let cache = Cache { bytes: FILE_BYTES + (128 << 20), ..Cache::default() };
    let config = Config { log: "warn".into(), mounts: vec![mount], cache, ..Config::default() };
    let disk = HostDisk::open(image, false).map_err(|failure| failure.to_string())?;
    Instance::builder().memory(2 << 30).config(config).disk(disk).start().map_err(|error| error.to_string())
}

fn read(instance: &Instance) -> Result<f64> {
    let namespace = instance.kernel().namespace().ok_or("no vfs")?;
    let file = namespace.open(b"/big", OpenOptions::READ).map_err(|error| error.to_string())?;
    let mut buffer = vec![0; READ_BYTES];
    let start = Instant::now();
    let mut offset = 0;
    loop {
        match file.read_at(offset, &mut buffer).map_err(|error| error.to_string())? {
            0 => break,
            n => offset += n as u64,
        }
    }
    let time = start.elapsed().as_secs_f64();
    if offset == FILE_BYTES { Ok(time) } else { Err(format!("only {offset} bytes were read")) }
}

/// Runs it in `dir`, which has 2.5 GiB of room.
pub fn bench(dir: &Path) -> Result {
    let image = image(dir)?;
    let mount = dir.join("mount");
    fs::create_dir_all(&mount).map_err(|error| error.to_string())?;
    run(Command::new("mount").args(["-o", "loop,ro"]).arg(&image).arg(&mount))
        .map_err(|line| format!("{line}; the loop mount of the peer needs root"))?;
    let _unmount = Loop(mount.clone());
    let big = mount.join("big");
    let (mut ours, mut theirs) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for _ in 0..RUNS {
        drop_caches()?;
        theirs[0].push(dd(&big)?);
        theirs[1].push(dd(&big)?);
        drop_caches()?;
        let instance = instance(&image)?;
        ours[0].push(read(&instance)?);
        ours[1].push(read(&instance)?);
    }
    let _ = fs::remove_file(&image);
    let rate = |times: &[f64]| times.iter().map(|time| FILE_BYTES as f64 / 1e6 / time).collect::<Vec<_>>();
    Ok(["cold", "warm"]
        .iter()
        .enumerate()
        .map(|(i, case)| {
            Record::new(
                ("vfs", format!("ext4 1 GiB sequential, {case}"), "userspace"),
                "MB/s",
                Better::Higher,
                &rate(&ours[i]),
                ("dd bs=1M from a kernel loop mount", &rate(&theirs[i])),
            )
            .note("asked for: at least 0.77 (within 1.3x)")
        })
        .collect())
}
