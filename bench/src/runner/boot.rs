//! Guest instructions from the first one to the application's main, with one NIC and one disk attached; and to the first
//! process of a Debian guest. Counted by QEMU (`-icount shift=0`: one instruction is one nanosecond of guest time). Guest
//! time also passes while everything waits for the host's disk, so the least of some runs is the count.

use super::guest::Guest;
use super::{Result, linux, net};
use crate::record::{Better, Record};
use anykernel_userspace::qemu::rumprun;
use serde_json::json;
use std::fs;
use std::path::Path;
use std::time::Duration;

const COUNT: [&str; 6] = ["-accel", "tcg", "-icount", "shift=0,sleep=off", "-cpu", "max"];
const RUNS: usize = 5;

fn least(counts: &[f64]) -> f64 {
    counts.iter().copied().fold(f64::INFINITY, f64::min)
}

/// Runs it.
pub fn bench(programs: &Path, dir: &Path) -> Result {
    let image = rumprun::image("httpd").map_err(|failure| failure.to_string())?;
    let drive = format!("if=none,id=disk0,format=raw,readonly=on,file={}", net::disk(dir)?.display());
    let config = dir.join("boot.json");
    let mount = json!({"source": "disk0", "target": "/", "read_only": true});
    let text = json!({"app": ["httpd"], "log": "debug", "mounts": [mount]});
    fs::write(&config, text.to_string()).map_err(|error| error.to_string())?;
    let peer = linux::prepare(dir, "10.0.2.15/24", &programs.join("netpeer"), &net::pages())?;

    let mut records = Vec::new();
    let microvm = "microvm,acpi=off,x-option-roms=off,pit=off,pic=off,rtc=off,auto-kernel-cmdline=on";
    for (machine, kind) in [(microvm, "device"), ("q35", "pci")] {
        let name = machine.split(',').next().unwrap_or(machine);
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            let (blk, nic) =
                (format!("virtio-blk-{kind},drive=disk0"), format!("virtio-net-{kind},netdev=net0"));
            let mut args =
                vec!["-M", machine, "-smp", "1", "-m", "128M", "-netdev", "user,id=net0", "-drive", &drive];
            args.extend(COUNT);
            args.extend(["-device", &blk, "-device", &nic, "-global", "virtio-mmio.force-legacy=false"]);
            let guest = Guest::start(&args, &image, &config)?;
            let count = guest.line(Duration::from_secs(60), |line| {
                let (before, _) = line.split_once(" ticks from the first instruction to main")?;
                before.rsplit(' ').next()?.parse::<f64>().ok()
            });
            ours.push(count.ok_or_else(|| format!("the unikernel on {name} printed no count"))?);

            let mut args = vec!["-M", "q35", "-smp", "1", "-m", "256M", "-netdev", "user,id=net0"];
            args.extend(COUNT);
            args.extend(["-device", "virtio-net-pci,netdev=net0", "-append", "quiet console=ttyS0"]);
            let guest = Guest::start(&args, &peer.kernel, &peer.initrd)?;
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
