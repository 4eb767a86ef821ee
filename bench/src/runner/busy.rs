//! Who was busy while a guest was loaded: what holds a row back.
//!
//! Times are those of `/proc/PID/stat` and `/proc/PID/task/TID/stat`, proc(5): `utime` and `stime`, in ticks of 10 ms.

use super::Result;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Ticks a second of `/proc`'s times (`USER_HZ`).
const TICKS: f64 = 100.0;
/// A thread that ran for this part of the time is what the others waited for.
const FULL: f64 = 0.9;

/// Times of a moment: the guest's CPU, the other threads of its QEMU, the load's processes that have ended; in seconds.
struct Times {
    cpu: f64,
    devices: f64,
    load: f64,
}

/// Watches the QEMU that serves a TAP.
pub(super) struct Busy {
    qemu: PathBuf,
    begun: Instant,
    before: Times,
}

/// Parts of the time, 1 for a whole host CPU.
#[derive(Clone, Copy)]
pub(super) struct Shares {
    cpu: f64,
    devices: f64,
    load: f64,
}

/// Fields `first` and the next after it, as proc(5) counts them, added up.
fn seconds(stat: &Path, first: usize) -> Result<f64> {
    let text = fs::read_to_string(stat).map_err(|error| format!("{}: {error}", stat.display()))?;
    // The second field is a name in parentheses, which may hold anything.
    let fields = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks =
        fields.split_whitespace().skip(first - 3).take(2).map(|field| field.parse::<f64>().unwrap_or(0.0));
    Ok(ticks.sum::<f64>() / TICKS)
}

fn times(qemu: &Path) -> Result<Times> {
    let main = seconds(&qemu.join("stat"), 14)?;
    let tasks = fs::read_dir(qemu.join("task")).map_err(|error| format!("{}: {error}", qemu.display()))?;
    let first = qemu.file_name();
    // One virtual CPU: the busiest thread beside the main loop is its.
    let others = tasks.flatten().filter(|task| Some(task.file_name().as_os_str()) != first);
    let cpu = others.filter_map(|task| seconds(&task.path().join("stat"), 14).ok()).fold(0.0, f64::max);
    Ok(Times { cpu, devices: (main - cpu).max(0.0), load: seconds(Path::new("/proc/self/stat"), 16)? })
}

impl Busy {
    /// Begins to watch.
    pub(super) fn watch(tap: &str) -> Result<Self> {
        let wanted = format!("ifname={tap},");
        let processes = fs::read_dir("/proc").map_err(|error| format!("/proc: {error}"))?;
        let qemu = processes.flatten().map(|process| process.path()).find(|process| {
            let line = fs::read(process.join("cmdline")).unwrap_or_default();
            line.starts_with(b"qemu") && String::from_utf8_lossy(&line).contains(&wanted)
        });
        let qemu = qemu.ok_or_else(|| format!("no QEMU has {tap}"))?;
        Ok(Self { before: times(&qemu)?, begun: Instant::now(), qemu })
    }

    /// What ran since.
    pub(super) fn shares(self) -> Result<Shares> {
        let (after, passed) = (times(&self.qemu)?, self.begun.elapsed().as_secs_f64());
        Ok(Shares {
            cpu: (after.cpu - self.before.cpu) / passed,
            devices: (after.devices - self.before.devices) / passed,
            load: (after.load - self.before.load) / passed,
        })
    }
}

impl Shares {
    /// The mean of some runs.
    pub(super) fn mean(runs: &[Self]) -> Self {
        let mean = |of: fn(&Self) -> f64| runs.iter().map(of).sum::<f64>() / runs.len() as f64;
        Self { cpu: mean(|run| run.cpu), devices: mean(|run| run.devices), load: mean(|run| run.load) }
    }
}

impl core::fmt::Display for Shares {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let limit = if self.cpu > FULL {
            "the guest's CPU"
        } else if self.devices > FULL {
            "QEMU's devices"
        } else if self.load > FULL {
            "the load"
        } else {
            "hand-overs between guest, QEMU and load"
        };
        let [cpu, devices, load] = [self.cpu, self.devices, self.load].map(|part| (part * 100.0).round());
        write!(
            f,
            "held back by {limit}: guest's CPU {cpu} %, QEMU's devices {devices} %, load {load} % of a host CPU"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fullest_is_what_holds_back() {
        let shares = |cpu, devices, load| Shares { cpu, devices, load }.to_string();
        assert!(shares(0.97, 0.5, 0.4).starts_with("held back by the guest's CPU: guest's CPU 97 %,"));
        assert!(shares(0.5, 0.95, 0.4).starts_with("held back by QEMU's devices:"));
        assert!(shares(0.5, 0.5, 0.92).starts_with("held back by the load:"));
        assert!(shares(0.6, 0.5, 0.3).starts_with("held back by hand-overs"));
    }

    #[test]
    fn a_name_with_parentheses_moves_no_field() {
        let file = std::env::temp_dir().join(format!("anykernel-bench-stat-{}", std::process::id()));
        fs::write(&file, "7 (a) b (c)) S 1 7 7 0 -1 0 1 0 1 0 150 50 300 100 20 0 1 0").unwrap();
        let got = (seconds(&file, 14), seconds(&file, 16));
        fs::remove_file(&file).unwrap();
        assert_eq!(got, (Ok(2.0), Ok(4.0)));
    }
}
