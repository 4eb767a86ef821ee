//! USB in the Linux module: Debian's generic kernels in QEMU, whose USB core hands its devices to our stack. Needs
//! `qemu-system-x86_64`, `mkfs.fat`, `fsck.fat`, mtools, curl and Debian's packages of those kernels (fetched without privileges).

mod usb_support;

use anykernel_tests::{Running, anykernel, free_port};
use anykernel_userspace::qemu::linux_module::{self, Said};
use anykernel_userspace::qemu::qmp::Qmp;
use anykernel_userspace::{DiskSpec, RunSpec, UsbSpec};
use hypercall::ExitStatus;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use usb_support::{run, stick, sum};

/// Longer than any script takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(400);

/// Functions of every script. What is said goes to the second serial port, which the test reads.
const PRELUDE: &str = r#"
say() { echo "$*" >/dev/ttyS1; }
status() {
	while read -r state code </sys/module/anykernel/parameters/status; do
		case $state in ended | dead) break ;; esac
		sleep 0.2
	done
	say "status $state $code"
}
load() { insmod /lib/anykernel.ko links=0 config="$1" || say "insmod failed"; }
unload() {
	rmmod anykernel && say "unloaded" || say "not unloaded"
	[ -e /sys/bus/usb/drivers/anykernel ] && say "the driver is left"
	ps | grep -E '\[(ak-|usb-host|usb-poll|vfs)' && say "threads are left"
	dmesg -c | sed -n -e 's/^.*\] anykernel: /log /p' -e '/WARNING\|BUG\|Call Trace/p' >/dev/ttyS1
}
# Who has interface 0 of the device at $1.
driver() { say "driver $(basename "$(readlink /sys/bus/usb/devices/$1:1.0/driver)")"; }
"#;

fn boot(series: &str, image: &Path, script: &str, args: &[&str]) -> Vec<String> {
    let disk = UsbSpec::Disk(DiskSpec { path: image.into(), writable: true });
    let usb = vec![disk, UsbSpec::Hub, UsbSpec::Keyboard];
    let spec = RunSpec { usb, cpus: 2, ..RunSpec::new(Default::default()) };
    let script = format!("{PRELUDE}\n{script}\nsay complete\nend 0\n");
    let said: Said = linux_module::run_script(&spec, series, &script, PATIENCE, args)
        .unwrap_or_else(|error| panic!("{error}"));
    let lines: Vec<String> = said.lines.lines().map(|line| line.trim_end().to_owned()).collect();
    assert!(
        said.ended == Ok(ExitStatus::Success) && lines.iter().any(|line| line == "complete"),
        "Linux {series} stopped early ({:?}), after {lines:#?}, with these last words:\n{}",
        said.ended,
        said.last_words()
    );
    for bad in ["left", "not unloaded", "WARNING", "BUG", "Call Trace"] {
        assert!(!lines.iter().any(|line| line.contains(bad)), "{bad} in {lines:#?}\n{}", said.last_words());
    }
    lines
}

/// Those lines that begin with `key`, without it.
fn of<'a>(lines: &'a [String], key: &str) -> Vec<&'a str> {
    lines.iter().filter_map(|line| line.strip_prefix(key)?.strip_prefix(' ')).collect()
}

fn objects(lines: &[String]) -> Vec<Value> {
    of(lines, "log").iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// The contract's suite on a stick that Linux's own driver has, and on a keyboard, which keeps silent; the list; files by checksum, and writing. Each time the
/// module takes what it was told to, and nothing else, and gives it back.
fn works(series: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = stick(dir.path());
    let script = r#"
for name in scsi_common scsi_mod usb_storage; do
	[ -f /lib/$name.ko ] && insmod /lib/$name.ko
done
sleep 1
driver 2-1
load '{"app":["conformance","usb:2-1","usb:1-2.1"]}'
status
unload
driver 2-1
load '{"log":"warn","app":["usb","list","--json"]}'
status
driver 2-1
unload
load '{"app":["selftest","fat"],"mounts":[{"source":"usb2-1","target":"/fat"}]}'
driver 2-1
driver 1-2
status
unload
driver 2-1
sync
"#;
    let said = boot(series, &image, script, &[]);
    assert_eq!(of(&said, "status"), ["ended 0"; 3], "{said:#?}");
    let [storage, ours, hub] = ["usb-storage", "anykernel", "hub"];
    assert_eq!(of(&said, "driver"), [storage, storage, storage, ours, hub, storage], "{said:#?}");
    let objects = objects(&said);
    let passed: Vec<&str> = objects
        .iter()
        .filter(|object| object["status"] == "pass")
        .filter_map(|object| object["check"].as_str())
        .collect();
    for (contract, checks) in hypercall::conformance::SUITES {
        for check in checks.iter().filter(|_| *contract == "usb") {
            let check = format!("conformance/{check}");
            assert!(passed.contains(&check.as_str()), "{check} did not pass on Linux {series}: {said:#?}");
        }
    }
    for path in ["usb1", "usb2", "1-2", "1-2.1", "2-1"] {
        assert!(objects.iter().any(|object| object["path"] == path), "{path} is not listed: {said:#?}");
    }
    for check in ["fat/checksums", "fat/write"] {
        assert!(passed.contains(&check), "{check} did not pass on Linux {series}: {said:#?}");
    }
    run("fsck.fat", &["-n", image.to_str().unwrap()]);
}

#[test]
fn a_stick_works_in_6_1() {
    works("6.1");
}

#[test]
fn a_stick_works_in_6_12() {
    works("6.12");
}

/// The whole of it by one command: the disk and the network are both USB devices of the guest's Linux.
#[test]
fn the_command_serves_a_stick_over_a_usb_network_device() {
    let dir = tempfile::tempdir().unwrap();
    let ((image, big), port) = (stick(dir.path()), free_port());
    let server = Command::new(anykernel())
        .args(["run", "httpd", "--on", "linux-module", "--usb", "net", "--usb"])
        .arg(format!("disk:{}", image.display()))
        .args(["--mount", "usb2-2:/", "--publish", &format!("{port}:80")])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let mut server = Running(server);
    let (start, fetched) = (Instant::now(), dir.path().join("fetched"));
    let fetch = || {
        let mut curl = Command::new("curl");
        curl.args(["-sf", "--max-time", "60", "-o"]).arg(&fetched);
        curl.arg(format!("http://127.0.0.1:{port}/big.bin")).status().unwrap().success()
    };
    while !fetch() {
        assert!(server.0.try_wait().unwrap().is_none(), "the run ended");
        assert!(start.elapsed() < PATIENCE, "nothing answers");
        std::thread::sleep(Duration::from_millis(300));
    }
    assert_eq!(sum(&fs::read(&fetched).unwrap()), big);
    server.interrupt();
    assert!(server.end(Duration::from_secs(60)).success());
}

/// Bytes that were written to all disks.
fn written(qmp: &mut Qmp) -> u64 {
    let stats = qmp.ask("query-blockstats", json!({})).unwrap();
    let disks = stats.as_array().unwrap().iter();
    disks.filter_map(|disk| disk["stats"]["wr_bytes"].as_u64()).sum()
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What is typed arrives. While a stick is written to it is pulled out, plugged in again and written to again; what was synced
/// is there. The module is unloaded in the middle of that.
#[test]
fn keys_are_typed_and_a_stick_is_pulled_out_while_it_is_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let ((image, _), socket) = (stick(dir.path()), dir.path().join("qmp"));
    let script = r#"
load '{"log":"warn","app":["usb","keys","6"],"usb":["class:03"]}'
driver 1-2.1
status
unload
load '{"app":["usb","fill","usb2-1","/fat"],"mounts":[{"source":"usb2-1","target":"/fat"}]}'
tries=0
while ! dmesg | grep -q '"verified"' && [ $tries -lt 600 ]; do
	sleep 0.2
	tries=$((tries + 1))
done
sleep 1
unload
sync
"#;
    let (path, file) = (socket.clone(), image.clone());
    let hand = std::thread::spawn(move || {
        let mut qmp = Qmp::connect(&path, PATIENCE).unwrap();
        let stroke = |down: bool| json!({ "type": "key", "data": { "down": down, "key": { "type": "qcode", "data": "k" } } });
        until("writing", || {
            // Typed again until somebody listens, and then for nobody.
            qmp.ask("input-send-event", json!({ "events": [stroke(true), stroke(false)] })).unwrap();
            std::thread::sleep(Duration::from_millis(100));
            written(&mut qmp) > 2 << 20
        });
        qmp.ask("device_del", json!({ "id": "usb0" })).unwrap();
        let again = json!({ "driver": "raw", "node-name": "again",
            "file": { "driver": "file", "filename": file } });
        qmp.ask("blockdev-add", again).unwrap();
        let stick =
            json!({ "driver": "usb-storage", "id": "back", "bus": "usb.0", "port": "1", "drive": "again" });
        until("letting go of the image", || qmp.ask("device_add", stick.clone()).is_ok());
    });
    // Without the keyboard that every PC has: what is typed is for USB.
    let qmp = format!("unix:{},server=on,wait=off", socket.display());
    let args = ["-qmp", &qmp, "-machine", "i8042=off"];
    let said = boot("6.1", &image, script, &args);
    hand.join().unwrap();
    let objects = objects(&said);
    assert_eq!(of(&said, "driver"), ["anykernel"]);
    assert_eq!(of(&said, "status"), ["ended 0"], "{said:#?}");
    // HID usage tables, keyboard page: k.
    let keys = objects.iter().filter(|one| one["key"] == 14 && one["device"] == "usb1-2.1i0");
    assert_eq!(keys.filter(|one| one["pressed"] == false || one["char"] == "k").count(), 6, "{said:#?}");
    let has = |key: &str| objects.iter().any(|object| object.get(key).is_some());
    assert!(has("synced") && has("error") && has("verified") && !has("wrong"), "{said:#?}");
    assert_eq!(said.iter().filter(|line| *line == "unloaded").count(), 2, "{said:#?}");
}
