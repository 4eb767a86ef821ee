//! The unikernel beside a Debian cloud guest: same QEMU, accelerator, machine, one CPU each, virtio-net on a TAP each.
//!
//! Everything runs in a network namespace of its own (root). All guests are up at once and are loaded in turns.

use super::busy::{Busy, Shares};
use super::{Result, linux, run};
use crate::record::{Better, Record};
use anykernel_userspace::qemu::Accelerator;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

const NAMESPACE: &str = "anykernel-bench";
const RUNS: usize = 5;
const SECONDS: &str = "2";
const MEMORY: &str = "256M";

/// TAP, host address, guest address.
const BENCH: [&str; 3] = ["akbench0", "10.7.0.1", "10.7.0.2"];
const HTTP: [&str; 3] = ["akbench1", "10.7.1.1", "10.7.1.2"];
const LINUX: [&str; 3] = ["akbench2", "10.7.2.1", "10.7.2.2"];

struct Ends(Vec<Child>);

impl Drop for Ends {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // SIGTERM: the command then ends its QEMU.
            let _ = Command::new("kill").arg(child.id().to_string()).status();
        }
        for child in &mut self.0 {
            let _ = child.wait();
        }
        let _ = Command::new("ip").args(["netns", "delete", NAMESPACE]).status();
    }
}

fn ip(args: &str) -> Result<()> {
    run(Command::new("ip").args(args.split(' '))).map(drop)
}

fn inside(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", NAMESPACE]).arg(program);
    command
}

fn network() -> Result<()> {
    let _ = Command::new("ip").args(["netns", "delete", NAMESPACE]).stderr(Stdio::null()).status();
    ip(&format!("netns add {NAMESPACE}"))?;
    for [tap, host, _] in [BENCH, HTTP, LINUX] {
        ip(&format!("-n {NAMESPACE} tuntap add {tap} mode tap"))?;
        ip(&format!("-n {NAMESPACE} addr add {host}/24 dev {tap}"))?;
        ip(&format!("-n {NAMESPACE} link set {tap} up"))?;
    }
    Ok(())
}

/// What is served: `4k` and `64k`.
pub fn pages() -> Vec<(String, Vec<u8>)> {
    [("4k", 4 << 10), ("64k", 64 << 10)].map(|(name, size)| (name.to_string(), vec![b'x'; size])).into()
}

/// A disk with [`pages`].
pub fn disk(dir: &Path) -> Result<std::path::PathBuf> {
    let tree = dir.join("pages");
    fs::create_dir_all(&tree).map_err(|error| error.to_string())?;
    for (name, content) in pages() {
        fs::write(tree.join(name), content).map_err(|error| error.to_string())?;
    }
    let image = dir.join("pages.ext4");
    run(Command::new("/sbin/mkfs.ext4").args(["-q", "-F", "-d"]).arg(&tree).arg(&image).arg("8M"))?;
    Ok(image)
}

fn unikernel(anykernel: &Path, dir: &Path, app: &str, [tap, host, guest]: [&str; 3]) -> Result<Child> {
    let config = dir.join(format!("{app}.json"));
    let text = json!({"interfaces": [{"ipv4": format!("{guest}/24"), "ipv6": "none", "gateway": host}], "log": "warn"});
    fs::write(&config, text.to_string()).map_err(|error| error.to_string())?;
    let mut command = inside(anykernel);
    command.args(["run", app, "--on", "rumprun", "--machine", "q35", "--cpus", "1", "--memory", MEMORY]);
    command.args(["--net", &format!("tap:{tap}"), "--config"]).arg(config);
    if app == "httpd" {
        command.arg("--disk").arg(disk(dir)?);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().map_err(|error| error.to_string())
}

fn debian(guest: &linux::LinuxGuest, tap: &str) -> Result<Child> {
    let mut command = inside("qemu-system-x86_64");
    command.args(["-M", "q35"]).args(Accelerator::detect().args()).args(["-smp", "1", "-m", MEMORY]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "null"]);
    command.args(["-netdev", &format!("tap,id=net0,ifname={tap},script=no,downscript=no")]);
    command.args(["-device", "virtio-net-pci,netdev=net0"]);
    command.arg("-kernel").arg(&guest.kernel).arg("-initrd").arg(&guest.initrd);
    command.args(["-append", "quiet mitigations=off no_timer_check"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().map_err(|error| format!("QEMU: {error}"))
}

/// One measurement of `netload`, or of wrk for the HTTP cases.
fn load(netload: &Path, case: &str, address: &str) -> Result<f64> {
    if let Some(page) = case.strip_prefix("http-") {
        let url = format!("http://{address}/{page}");
        let text = run(inside("wrk").args(["-t1", "-c16", "-d", &format!("{SECONDS}s"), &url]))?;
        if text.contains("Non-2xx") {
            return Err(format!("{url}: wrong answers: {text}"));
        }
        let rate = text.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:"));
        return rate.and_then(|rate| rate.trim().parse().ok()).ok_or_else(|| format!("wrk said: {text}"));
    }
    let text = run(inside(netload).args([address, SECONDS, case]))?;
    let value: Value =
        serde_json::from_str(text.trim()).map_err(|error| format!("netload said {text}: {error}"))?;
    value["value"].as_f64().ok_or_else(|| format!("netload said {text}"))
}

fn wait_for(netload: &Path, case: &str, address: &str) -> Result<()> {
    for _ in 0..120 {
        if load(netload, case, address).is_ok() {
            return Ok(());
        }
        sleep(Duration::from_millis(500));
    }
    Err(format!("nothing answered at {address} for a minute"))
}

/// Runs it. `programs` holds `netload` and `netpeer`.
pub fn bench(anykernel: &Path, programs: &Path, dir: &Path) -> Result {
    let netload = programs.join("netload");
    network().map_err(|line| format!("{line}; the network namespace needs root"))?;
    let mut guests = Ends(Vec::new());
    let peer = linux::prepare(dir, &format!("{}/24", LINUX[2]), &programs.join("netpeer"), &pages())?;
    guests.0.push(debian(&peer, LINUX[0])?);
    guests.0.push(unikernel(anykernel, dir, "netbench", BENCH)?);
    guests.0.push(unikernel(anykernel, dir, "httpd", HTTP)?);
    for (case, address) in
        [("rr-64", BENCH[2]), ("http-4k", HTTP[2]), ("rr-64", LINUX[2]), ("http-4k", LINUX[2])]
    {
        wait_for(&netload, case, address)?;
    }

    let mut records = Vec::new();
    for (case, unit, goal) in [
        ("stream-in", "Mb/s", 0.7),
        ("stream-out", "Mb/s", 0.7),
        ("rr-64", "1/s", 1.0),
        ("rr-16k", "1/s", 1.0),
        ("udp-1k", "1/s", 1.0),
        ("http-4k", "1/s", 1.0),
        ("http-64k", "1/s", 1.0),
    ] {
        let [tap, _, ours_at] = if case.starts_with("http") { HTTP } else { BENCH };
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        let mut busy = Vec::new();
        for _ in 0..RUNS {
            let watched = Busy::watch(tap)?;
            ours.push(load(&netload, case, ours_at)?);
            busy.push(watched.shares()?);
            theirs.push(load(&netload, case, LINUX[2])?);
        }
        let peer = if case.starts_with("http") { "nginx on Debian 6.1" } else { "Debian 6.1" };
        let record = Record::new(("net", case, "rumprun"), unit, Better::Higher, &ours, (peer, &theirs));
        records.push(record.goal(goal).note(Shares::mean(&busy).to_string()));
    }
    Ok(records)
}
