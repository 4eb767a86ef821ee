//! Guest instructions from the first one to the application's main, with one NIC and one disk attached; and to the first
//! process of a Debian guest. Counted by QEMU (`-icount shift=0`: one instruction is one nanosecond of guest time). Guest
//! time also passes while everything waits for the host's disk, so the least of some runs is the count.

use super::guest::Guest;
use super::{Result, linux, net};
use crate::record::{Better, Record};
use anykernel_userspace::qemu::{Machine, rumprun};
use anykernel_userspace::{DiskSpec, NetSpec, RunSpec};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::time::Duration;

const COUNT: [&str; 6] = ["-accel", "tcg", "-icount", "shift=0,sleep=off", "-cpu", "max"];
const RUNS: usize = 5;
const MEMORY: u64 = 256 << 20;

fn least(counts: &[f64]) -> f64 {
    counts.iter().copied().fold(f64::INFINITY, f64::min)
}

/// Runs it.
pub fn bench(programs: &Path, dir: &Path) -> Result {
    let image = rumprun::image("httpd").map_err(|failure| failure.to_string())?;
    let disk = net::disk(dir)?;
    let config = dir.join("boot.json");
    let mount = json!({"source": "disk0", "target": "/", "read_only": true});
    let text = json!({"app": ["httpd"], "log": "debug", "mounts": [mount]});
    fs::write(&config, text.to_string()).map_err(|error| error.to_string())?;
    let peer = linux::prepare(dir, "10.0.2.15/24", &programs.join("netpeer"), &net::pages())?;

    let mut records = Vec::new();
    let spec = |disks| RunSpec { disks, net: NetSpec::User, ..RunSpec::new(Default::default()) };
    for name in ["microvm", "q35"] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            let spec_ours = spec(vec![DiskSpec { path: disk.clone(), writable: false }]);
            let mut machine = match name {
                "q35" => Machine::q35("httpd", &spec_ours, MEMORY),
                _ => Machine::microvm("httpd", &spec_ours, MEMORY),
            };
            machine.accelerator(COUNT).kernel(&image).arg("-initrd").arg(&config);
            let guest = Guest::start(&machine)?;
            let count = guest.line(Duration::from_secs(60), |line| {
                let (before, _) = line.split_once(" ticks from the first instruction to main")?;
                before.rsplit(' ').next()?.parse::<f64>().ok()
            });
            ours.push(count.ok_or_else(|| format!("the unikernel on {name} printed no count"))?);

            let mut machine = Machine::q35("Debian", &spec(Vec::new()), MEMORY);
            machine.accelerator(COUNT).kernel(&peer.kernel).arg("-initrd").arg(&peer.initrd);
            let guest = Guest::start(machine.args(["-append", "quiet console=ttyS0"]))?;
            let seconds = guest.line(Duration::from_secs(300), |line| {
                line.strip_prefix("uptime ")?.split(' ').next()?.parse::<f64>().ok()
            });
            theirs.push(seconds.ok_or("the Debian guest printed no uptime")? * 1e9);
        }
        records.push(
            Record::new(
                ("boot", format!("first instruction to main, {name}"), "rumprun"),
                "instructions",
                Better::Lower,
                &[least(&ours)],
                ("Debian 6.1 to its first process, q35", &[least(&theirs)]),
            )
            .at_most(1.5e6)
            .note(format!("the least of {RUNS} runs")),
        );
    }
    Ok(records)
}
