//! USB beside a Debian guest: same QEMU, accelerator, machine, host controller and devices, one CPU each.
//!
//! * Reading: a stick with FAT32, one large file from its first byte to its last. The peer is `dd iflag=direct` through that
//!   guest's own usb-storage. The process runs in that guest too, and reads the same stick through libusb.
//! * Enumeration: eight devices behind two hubs. QEMU counts the instructions that a guest has executed when it turns itself
//!   off, with the devices and without (`-icount`, recorded: what is idle counts for nothing); the difference is what they
//!   cost. The peer has no driver but for hubs.

use super::guest::Guest;
use super::{Result, progress};
use crate::record::{Better, Record};
use anykernel_userspace::qemu::linux_module::guest::{DebianGuest, PARAMETERS};
use anykernel_userspace::qemu::qmp::Qmp;
use anykernel_userspace::qemu::{Accelerator, Machine, rumprun};
use anykernel_userspace::{DiskSpec, Failure, RunSpec, UsbSpec};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const RUNS: usize = 5;
/// A count is nearly the same each time.
const COUNTS: usize = 2;
/// Of the Debian guest; ours has what it has by default.
const LINUX_MEMORY: u64 = 512 << 20;
const MEMORY: u64 = 128 << 20;
const FILE: usize = 256 << 20;
const PATIENCE: Duration = Duration::from_secs(120);

/// Reads as the guest's own drivers do, then as the process does.
const READ: &str = r#"
tries=0
while [ ! -b /dev/sda ] && [ $tries -lt 600 ]; do sleep 0.05; tries=$((tries + 1)); done
mount -t vfat -o ro /dev/sda /mnt
/usr/bin/dd if=/mnt/big.bin of=/dev/null bs=1M iflag=direct 2>&1 | sed 's/^/dd: /'
umount /mnt
anykernel run usb --net none --memory 128M --mount usb2-1:/fat -- read /fat/big.bin
"#;

/// Gives everything time to be taken in; a script that looked would be counted.
const IDLE: &str = "sleep 10\n";

/// For both guests. Without an accelerator QEMU moves a string a byte at a time where the CPU says that this is fast; every
/// Linux moves data so.
fn accelerator() -> Vec<&'static str> {
    let args = Accelerator::detect().args_for_self_modifying(1);
    args.into_iter().map(|arg| if arg == "max" { "max,-erms,-fsrm" } else { arg }).collect()
}

fn line(failure: Failure) -> String {
    failure.to_string()
}

fn told(path: &Path) -> impl Fn(std::io::Error) -> String + '_ {
    move |error| format!("{}: {error}", path.display())
}

/// A stick with one large file in the root directory.
fn stick(dir: &Path) -> Result<PathBuf> {
    let (image, file) = (dir.join("stick.img"), dir.join("big.bin"));
    let mut seed = 1u64;
    let noise = std::iter::repeat_with(|| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed.to_le_bytes()
    });
    fs::write(&file, noise.take(FILE / 8).flatten().collect::<Vec<u8>>()).map_err(told(&file))?;
    fs::File::create(&image).and_then(|made| made.set_len(FILE as u64 + (64 << 20))).map_err(told(&image))?;
    super::run(Command::new("mkfs.fat").args(["-F", "32"]).arg(&image))?;
    super::run(Command::new("mcopy").arg("-i").arg(&image).arg(&file).arg("::/"))?;
    fs::remove_file(&file).map_err(told(&file))?;
    Ok(image)
}

/// Megabytes a second, from what the application `usb read` prints.
fn rate(line: &str) -> Option<f64> {
    let value: Value = serde_json::from_str(line).ok()?;
    Some(value["bytes"].as_f64()? / value["ns"].as_f64()? * 1e3)
}

/// The same from "268435456 bytes (268 MB, 256 MiB) copied, 0.512 s, 524 MB/s".
fn dd_rate(line: &str) -> Option<f64> {
    let (bytes, rest) = line.strip_prefix("dd: ")?.split_once(" bytes")?;
    let seconds = rest.split_once("copied, ")?.1.split_once(" s,")?.0;
    Some(bytes.parse::<f64>().ok()? / seconds.parse::<f64>().ok()? / 1e6)
}

fn reading(anykernel: &Path, dir: &Path, image: &Path) -> Result {
    let stick = stick(dir)?;
    let config = dir.join("usb-read.json");
    let mount = json!({ "source": "usb1-1", "target": "/fat", "read_only": true });
    let text = json!({ "app": ["usb", "read", "/fat/big.bin"], "mounts": [mount] });
    fs::write(&config, text.to_string()).map_err(told(&config))?;
    let mut files = DebianGuest::new(READ).map_err(line)?;
    files.drivers(&["xhci-pci", "usb-storage", "sd_mod", "vfat", "nls_cp437", "nls_ascii"]).map_err(line)?;
    files.program(anykernel, "bin/anykernel").map_err(line)?;
    files.program(Path::new("/usr/bin/dd"), "usr/bin/dd").map_err(line)?;
    let initrd = dir.join("usb-read.cpio");
    let kernel = files.finish(&initrd).map_err(line)?;
    let usb = vec![UsbSpec::Disk(DiskSpec { path: stick.clone(), writable: false })];
    let spec = RunSpec { usb, ..RunSpec::new(Default::default()) };

    let (mut unikernel, mut process, mut linux) = (Vec::new(), Vec::new(), Vec::new());
    for turn in 0..RUNS {
        progress("usb", turn, RUNS);
        let mut machine = Machine::q35("usb", &spec, MEMORY);
        machine.accelerator(accelerator()).kernel(image).arg("-initrd").arg(&config);
        let guest = Guest::start(&machine)?;
        unikernel.push(guest.line(PATIENCE, rate).ok_or("the unikernel did not read its file")?);
        drop(guest);
        let mut machine = Machine::q35("Debian", &spec, LINUX_MEMORY);
        machine.accelerator(accelerator()).kernel(&kernel).arg("-initrd").arg(&initrd);
        machine.args(["-append", PARAMETERS]);
        let guest = Guest::start(&machine)?;
        linux.push(guest.line(PATIENCE, dd_rate).ok_or("the Debian guest did not read its file")?);
        process.push(guest.line(PATIENCE, rate).ok_or("the process did not read its file")?);
    }
    fs::remove_file(&stick).map_err(told(&stick))?;
    let case = "mass storage and FAT32, 256 MiB sequential";
    let peer = || ("dd iflag=direct, usb-storage of Debian 6.1", linux.as_slice());
    Ok(vec![
        Record::new(("usb", case, "rumprun"), "MB/s", Better::Higher, &unikernel, peer()).goal(1.0),
        Record::new(("usb", case, "userspace"), "MB/s", Better::Higher, &process, peer()).goal(0.8).note(
            "in that guest, through libusb and usbfs: each byte is copied twice, with direct I/O never",
        ),
    ])
}

/// A QEMU that is ended when dropped.
struct Counted(Child);

impl Drop for Counted {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Instructions that a guest executes until it turns itself off.
fn count(dir: &Path, kernel: &Path, initrd: &Path, devices: bool) -> Result<f64> {
    let (socket, events) = (dir.join("usb-qmp"), dir.join("usb-rr"));
    let _ = fs::remove_file(&socket);
    let mut command = Command::new("qemu-system-x86_64");
    let count = format!("shift=0,sleep=off,rr=record,rrfile={}", events.display());
    command.args(["-M", "q35", "-m", "256", "-accel", "tcg", "-cpu", "max", "-icount", &count]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "null", "-no-reboot"]);
    command.args(["-action", "shutdown=pause"]);
    command.arg("-qmp").arg(format!("unix:{},server=on,wait=on", socket.display()));
    command.args(["-append", PARAMETERS]).arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
    command.args(["-device", "qemu-xhci,id=usb,p2=8,p3=8"]);
    for hub in ["1", "2"].into_iter().filter(|_| devices) {
        command.args(["-device", &format!("usb-hub,bus=usb.0,port={hub}")]);
        for (port, kind) in (1..).zip(["usb-kbd", "usb-mouse", "usb-kbd", "usb-mouse"]) {
            command.args(["-device", &format!("{kind},bus=usb.0,port={hub}.{port}")]);
        }
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let guest = Counted(command.spawn().map_err(|error| format!("qemu-system-x86_64: {error}"))?);
    let mut qmp = Qmp::connect(&socket, PATIENCE).map_err(line)?;
    qmp.event("SHUTDOWN").map_err(line)?;
    let counted = qmp.ask("query-replay", json!({})).map_err(line)?;
    drop(guest);
    let _ = fs::remove_file(&events);
    counted["icount"].as_f64().ok_or_else(|| format!("QEMU did not count: {counted}"))
}

fn enumeration(dir: &Path, image: &Path) -> Result<Record> {
    let config = dir.join("usb-list.json");
    fs::write(&config, json!({ "app": ["usb", "watch", "0"] }).to_string()).map_err(told(&config))?;
    let mut files = DebianGuest::new(IDLE).map_err(line)?;
    files.drivers(&["xhci-pci"]).map_err(line)?;
    let initrd = dir.join("usb-idle.cpio");
    let kernel = files.finish(&initrd).map_err(line)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..COUNTS {
        for (kernel, initrd, counts) in
            [(image, config.as_path(), &mut ours), (kernel.as_path(), initrd.as_path(), &mut theirs)]
        {
            let without = count(dir, kernel, initrd, false)?;
            counts.push(count(dir, kernel, initrd, true)? - without);
        }
    }
    let id = ("usb", "enumeration of 8 devices behind 2 hubs", "rumprun");
    let peer = ("Debian 6.1, hubs only", theirs.as_slice());
    Ok(Record::new(id, "instructions", Better::Lower, &ours, peer)
        .goal(1.0)
        .note("ours also starts the drivers of its keyboards and mice"))
}

/// Runs it.
pub fn bench(anykernel: &Path, dir: &Path) -> Result {
    let image = rumprun::image("usb-app").map_err(line)?;
    let mut records = reading(anykernel, dir, &image)?;
    records.push(enumeration(dir, &image)?);
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_is_printed() {
        let line = "dd: 268435456 bytes (268 MB, 256 MiB) copied, 0.5 s, 537 MB/s";
        assert_eq!(dd_rate(line), Some(536.870912));
        assert_eq!(dd_rate("dd: 256+0 records in"), None);
        assert_eq!(rate(r#"{"bytes":1000,"ns":2000}"#), Some(500.0));
        assert_eq!(rate("ready"), None);
    }
}
