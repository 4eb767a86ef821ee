//! Executions per second of the fuzz targets on one core: the harness alone beside a process for each execution, and under
//! libFuzzer with coverage.

use super::Result;
use crate::record::{Better, Record};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const RUNS: usize = 5;
/// Of each measurement.
const SECONDS: u64 = 5;
/// Processes started to measure a process for each execution.
const PROCESSES: u32 = 40;

/// Target, what its inputs are, the seeds, and how many executions a second were asked for.
const CASES: [(&str, &str, &str, f64); 3] = [
    ("tcp", "frames against a connection", "state-", 10_000.0),
    ("ext4", "mount and walk 1 MiB, 50 files", "good-0", 3_000.0),
    ("virtio_blk", "virtio-blk, hostile device", "how-", 3_000.0),
];

fn fuzz_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(1).unwrap_or(Path::new("/")).join("fuzz")
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.output().map_err(|error| format!("{}: {error}", command.get_program().display()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    Err(format!(
        "{} failed: {}",
        command.get_program().display(),
        String::from_utf8_lossy(&output.stderr).trim_end()
    ))
}

fn seeds(target: &str, prefix: &str) -> Result<Vec<PathBuf>> {
    let folder = fuzz_folder().join("corpus").join(target);
    let entries = std::fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)));
    files.sort();
    if files.is_empty() { Err(format!("{}: no seeds {prefix}*", folder.display())) } else { Ok(files) }
}

/// Runs it with the given command binary.
pub fn bench(anykernel: &Path) -> Result {
    let folder = fuzz_folder();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.current_dir(&folder).args(["build", "--quiet", "--release", "--no-default-features", "--examples"]);
    output(build.env("CARGO_TARGET_DIR", folder.join("target")))?;
    let programs = folder.join("target/release/examples");
    let mut records = Vec::new();
    for (target, case, prefix, asked) in CASES {
        let files = seeds(target, prefix)?;
        let note = format!("asked for: {asked} executions/s on one core");
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            let mut speed = Command::new(programs.join("speed"));
            speed.arg(SECONDS.to_string()).arg(target).args(&files);
            ours.push(output(&mut speed)?.parse::<f64>().map_err(|error| error.to_string())?);
            let start = Instant::now();
            for (_, file) in (0..PROCESSES).zip(files.iter().cycle()) {
                output(Command::new(programs.join("reproduce")).args(["--target", target]).arg(file))?;
            }
            theirs.push(f64::from(PROCESSES) / start.elapsed().as_secs_f64());
        }
        let id = ("fuzz", case, "userspace");
        let peer = ("a process for each execution", theirs.as_slice());
        records.push(Record::new(id, "executions/s", Better::Higher, &ours, peer).note(note.clone()));
        let mut guided = Vec::new();
        for _ in 0..RUNS {
            guided.push(under_libfuzzer(anykernel, target)?);
        }
        let id = ("fuzz", format!("{case}, libFuzzer"), "userspace");
        records.push(Record::new(id, "executions/s", Better::Higher, &guided, peer).note(note));
    }
    Ok(records)
}

/// With coverage, on inputs that grow.
fn under_libfuzzer(anykernel: &Path, target: &str) -> Result<f64> {
    let seconds = SECONDS.to_string();
    let text = output(Command::new(anykernel).args([
        "fuzz",
        target,
        "--workers",
        "1",
        "--json",
        "--seconds",
        &seconds,
    ]))?;
    let last =
        text.lines().last().and_then(|line| serde_json::from_str::<Value>(line).ok()).unwrap_or_default();
    let number = |key: &str| last[key].as_f64().filter(|value| *value > 0.0);
    number("executions")
        .zip(number("seconds"))
        .map(|(executions, seconds)| executions / seconds)
        .ok_or_else(|| format!("anykernel fuzz {target} said nothing: {text}"))
}
