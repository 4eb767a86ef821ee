//! USB in the Linux module: Debian's generic kernels in QEMU, whose USB core hands its devices to our stack. Needs
//! `qemu-system-x86_64`, `mkfs.fat`, `fsck.fat`, mtools, tshark and Debian's packages of those kernels (fetched without privileges).

mod usb_support;

use anykernel_tests::module::{self, of};
use anykernel_tests::plugged::{self, plug, plug_stick, pull};
use anykernel_tests::{anykernel, fetch, free_port, usb_capture};
use anykernel_userspace::qemu::qmp::Qmp;
use anykernel_userspace::{DiskSpec, RunSpec, UsbSpec};
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use usb_support::{run, stick, sum};

/// Functions of every script, beside those of [`module::run_script`].
const PRELUDE: &str = r#"
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

fn boot(series: &str, image: &Path, script: &str) -> Vec<String> {
    let disk = UsbSpec::Disk(DiskSpec { path: image.into(), writable: true });
    let usb = vec![disk, UsbSpec::Hub, UsbSpec::Keyboard];
    let spec = RunSpec { usb, cpus: 2, ..RunSpec::new(Default::default()) };
    let (lines, said) = module::run_script(&spec, series, &format!("{PRELUDE}\n{script}"));
    for bad in ["left", "not unloaded", "WARNING", "BUG", "Call Trace"] {
        assert!(!lines.iter().any(|line| line.contains(bad)), "{bad} in {lines:#?}\n{}", said.last_words());
    }
    lines
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
    let said = boot(series, &image, script);
    let [storage, ours, hub] = ["usb-storage", "anykernel", "hub"];
    assert_eq!(of(&said, "driver"), [storage, storage, storage, ours, hub, storage], "{said:#?}");
    let objects = objects(&said);
    let with = |status: &str| -> Vec<&str> {
        let of_it = objects.iter().filter(|object| object["status"] == status);
        of_it.filter_map(|object| object["check"].as_str()).collect()
    };
    let passed = with("pass");
    // QEMU's keyboard stalls CLEAR_FEATURE(ENDPOINT_HALT); its stick does not.
    let failed = with("fail");
    assert!(failed.iter().all(|check| *check == "conformance/usb/clear-halt"), "{failed:?} in {said:#?}");
    let conformance = if failed.is_empty() { "ended 0" } else { "ended 1" };
    assert_eq!(of(&said, "status"), [conformance, "ended 0", "ended 0"], "{said:#?}");
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

/// What is listed by the command that users run, and captured meanwhile.
#[test]
fn the_command_lists_what_the_module_finds_and_records_it() {
    let dir = tempfile::tempdir().unwrap();
    let ((image, _), file) = (stick(dir.path()), dir.path().join("usb.pcap"));
    let output = Command::new(anykernel())
        .args(["usb", "list", "--json", "--on", "linux-module", "--usb"])
        .arg(format!("disk:{}", image.display()))
        .args(["--usb", "hub", "--usb", "keyboard", "--usb-pcap"])
        .arg(&file)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let devices: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    // Linux has the hub.
    for (path, driver) in
        [("usb1", None), ("usb2", None), ("2-1", Some("storage")), ("1-2", None), ("1-2.1", Some("hid"))]
    {
        let device = devices.iter().find(|one| one["path"] == path);
        let device = device.unwrap_or_else(|| panic!("nothing at {path} in:\n{text}"));
        assert_eq!(device["drivers"][0]["driver"].as_str(), driver, "{device}");
        assert_eq!(device["state"], "configured", "{device}");
    }
    assert_eq!(devices.len(), 5, "{text}");
    usb_capture::check(&fs::read(&file).unwrap());
}

/// What is typed: as a word, and key by key with the keyboard's usages (HID usage tables, 10).
const TYPED: &str = "the quick brown fox 1234567890 JUMPS over the LAZY dog";

/// A stroke of a key: QEMU's name of it, its usage, and whether Shift is held.
fn stroke(typed: char) -> (String, u64, bool) {
    let usage = match typed.to_ascii_lowercase() {
        ' ' => 44,
        '0' => 39,
        digit @ '1'..='9' => 30 + u64::from(digit as u8 - b'1'),
        letter => 4 + u64::from(letter as u8 - b'a'),
    };
    let name = if typed == ' ' { "spc".into() } else { typed.to_ascii_lowercase().to_string() };
    (name, usage, typed.is_ascii_uppercase())
}

/// What QEMU is told of [`TYPED`], in parts of at most 16 events, which is what its keyboard keeps; and what must arrive.
fn strokes() -> (Vec<Vec<Value>>, Vec<(u64, bool)>) {
    let (mut events, mut expected) = (Vec::new(), Vec::new());
    for (name, usage, shift) in TYPED.chars().map(stroke) {
        let key = [(name.as_str(), usage, true), (name.as_str(), usage, false)];
        let around = |down| shift.then_some(("shift", 225, down));
        for (name, usage, down) in around(true).into_iter().chain(key).chain(around(false)) {
            events.push(key_event(name, down));
            expected.push((usage, down));
        }
    }
    (events.chunks(16).map(<[Value]>::to_vec).collect(), expected)
}

fn key_event(name: &str, down: bool) -> Value {
    json!({ "type": "key", "data": { "down": down, "key": { "type": "qcode", "data": name } } })
}

/// Functions of the scripts in which devices come and go.
const TAKES: &str = r#"
echo 1 >/proc/sys/kernel/softlockup_panic
echo 60 >/proc/sys/kernel/hung_task_timeout_secs
echo 1 >/proc/sys/kernel/hung_task_panic
load() { insmod /lib/anykernel.ko links=0 config="$1" || echo "bad insmod"; }
# Waits until it was said so often since the last unload.
said() { n=0; while [ "$(dmesg | grep -c "$2")" -lt "$1" ] && [ $n -lt 1200 ]; do sleep 0.1; n=$((n + 1)); done; check "said $2" [ $n -lt 1200 ]; }
say() { echo "$*"; }
# All of it goes: threads, the driver, and what the module counts, of which it would say that it is left behind.
unload() {
	rmmod anykernel || echo "bad rmmod"
	for left in /sys/module/anykernel /sys/bus/usb/drivers/anykernel; do [ -e $left ] && echo "bad $left"; done
	ps | grep -E '\[(ak-|usb-host|usb[0-9]|httpd|net[0-9]|vfs|disk)' | sed 's/^/bad thread /'
	dmesg -c | sed 's/^\[[^]]*\] //' | sed -e 's/^anykernel: /log /' -e t -e 's/^/kernel /'
	echo unloaded
}
# Who has interface 0 of the device at $1.
driver() { echo "driver $1 $(basename "$(readlink /sys/bus/usb/devices/$1:1.0/driver)")"; }
"#;

/// In one guest, because a boot is dear: the list that a process has, too; keys; the network; a stick; and unloading under all of it.
const COMES_AND_GOES: &str = r#"
for path in 2-1 1-2 1-3 2-4; do there $path; done
dmesg -c >/dev/null
anykernel usb list --json | sed 's/^/process /'
load '{"log":"warn","app":["usb","list","--json"]}'
status
unload

load '{"log":"warn","app":["usb","keys"],"usb":["class:03"]}'
said 1 '"input"'
driver 1-2
for count in COUNTS; do echo @type; said $count '"key"'; done
echo @hold
said $((count + 1)) '"key"'
echo @pull keyboard
said $((count + 2)) '"key"'
gone 1-2
echo @plug keyboard
said 2 '"input"'
echo @hold
said $((count + 3)) '"key"'
unload

load '{"app":["httpd"],"mounts":[{"source":"usb2-1","target":"/","read_only":true}],"usb":["class:02"]}'
for round in 1 2; do
	said $round 'from DHCP server'
	driver 1-3
	echo @fetch
	gone 1-3
	said $round 'unplugged; connections over it fail'
	echo @plug net
	there 1-3
done
said 3 'from DHCP server'
unload

load '{"log":"error","app":["usb","fill","usb2-4","/fat"],"mounts":[{"source":"usb2-4","target":"/fat"}]}'
for round in 1 2; do
	said $((round * 2)) '"synced"'
	echo @pull stick
	gone 2-4
	said $round '"error"'
	echo @plug stick
	said $round '"verified"'
	driver 2-4
done
unload

for round in 1 2 3 4 5 6; do
	load '{"log":"error","app":["usb","fill","usb2-4","/fat"],"mounts":[{"source":"usb2-4","target":"/fat"}],"usb":["class:02","class:03"]}'
	said 1 '"synced"'
	echo @hold
	sleep 0.$round
	[ $round = 5 ] && echo @pull stick
	unload
	if [ $round = 5 ]; then
		gone 2-4
		echo @plug stick
		there 2-4
	fi
done
sleep 1
for path in 2-1 2-4 1-2 1-3; do driver $path; done
"#;

/// The devices of that guest, by name.
fn device(name: &str) -> Value {
    match name {
        "keyboard" => json!({ "driver": "usb-kbd", "id": name, "bus": "usb.0", "port": "2" }),
        _ => json!({ "driver": "usb-net", "id": name, "netdev": "network", "bus": "usb.0", "port": "3" }),
    }
}

/// A server that was read from: every file has its sum, and then its network is pulled out in the middle of one.
fn fetch_all_and_pull(qmp: &mut Qmp, port: u16, big: &str) {
    assert_eq!(sum(&fetch(port, "/big.bin").unwrap()), big);
    let sums = String::from_utf8(fetch(port, "/SHA256SUMS").unwrap()).unwrap();
    for (wanted, name) in sums.lines().filter_map(|line| line.split_once("  ./")) {
        assert_eq!(sum(&fetch(port, &format!("/{name}")).unwrap()), wanted, "{name}");
    }
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "GET /big.bin HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    stream.read_exact(&mut vec![0; 100_000]).unwrap();
    pull(qmp, "net");
}

#[test]
fn devices_come_and_go_under_the_module() {
    let dir = tempfile::tempdir().unwrap();
    let (first, big) = stick(dir.path());
    let second = dir.path().join("second.img");
    fs::copy(&first, &second).unwrap();
    let (parts, mut expected) = strokes();
    let mut counts: Vec<usize> = Vec::new();
    for part in &parts {
        counts.push(counts.last().copied().unwrap_or(0) + part.len());
    }
    let counts: Vec<String> = counts.iter().map(usize::to_string).collect();
    let script = format!("{TAKES}{}{}", module::STATUS, COMES_AND_GOES.replace("COUNTS", &counts.join(" ")));
    let mut guest = plugged::guest(&script, &["xhci-pci", "usb-storage"]);
    guest.module().unwrap_or_else(|failure| panic!("{failure}"));
    let port = free_port();
    let node = |name: &str, path: &Path| {
        format!("driver=raw,node-name={name},file.driver=file,file.filename={}", path.display())
    };
    let (first, second) = (node("first", &first), node("stick", &second));
    let net = format!("user,id=network,hostfwd=tcp:127.0.0.1:{port}-:80");
    let args = [
        // Without the keyboard that every PC has: what is typed is for USB.
        ["-machine", "i8042=off"],
        ["-blockdev", &first],
        ["-device", "usb-storage,drive=first,bus=usb.0,port=1"],
        ["-device", "usb-kbd,id=keyboard,bus=usb.0,port=2"],
        ["-netdev", &net],
        ["-device", "usb-net,id=net,netdev=network,bus=usb.0,port=3"],
        ["-blockdev", &second],
        ["-device", "usb-storage,id=stick,drive=stick,bus=usb.0,port=4"],
    ];
    let mut parts = parts.into_iter();
    let text = plugged::boot(dir.path(), guest, &args.concat(), |qmp, wish| {
        let mut send = |events: Vec<Value>| {
            qmp.ask("input-send-event", json!({ "events": events })).unwrap();
        };
        match wish.split_once(' ').unwrap_or((wish, "")) {
            ("type", _) => send(parts.next().unwrap()),
            ("hold", _) => send(vec![key_event("z", true)]),
            ("fetch", _) => fetch_all_and_pull(qmp, port, &big),
            ("pull", name) => pull(qmp, name),
            ("plug", "stick") => plug_stick(qmp, "stick", "4"),
            ("plug", name) => plug(qmp, device(name)),
            other => panic!("{other:?}"),
        }
    });
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();

    let listed = of(&lines, "process");
    let mut logged = of(&lines, "log");
    logged.retain(|line| line.starts_with('{'));
    assert!(
        listed.len() >= 6 && logged.starts_with(&listed),
        "a process lists\n{listed:#?}\nand the module\n{logged:#?}"
    );

    let objects = objects(&lines);
    let keys = objects.iter().filter(|one| one["device"] == "usb1-2i0");
    let keys: Vec<(u64, bool)> =
        keys.filter_map(|one| Some((one["key"].as_u64()?, one["pressed"].as_bool()?))).collect();
    // Held, let go because the keyboard was pulled out, and held again on the next.
    expected.extend([(29, true), (29, false), (29, true)]);
    assert_eq!(keys, expected);
    let pressed = objects.iter().filter(|one| one["pressed"] == true);
    let characters: String = pressed.filter_map(|one| one["char"].as_str()).collect();
    assert_eq!(characters, format!("{TYPED}zz"));

    let has = |key: &str| objects.iter().filter(|object| object.get(key).is_some()).count();
    assert_eq!((has("verified"), has("wrong")), (2, 0), "{text}");
    assert!(has("error") >= 2, "{text}");
    assert_eq!(lines.iter().filter(|line| *line == "unloaded").count(), 10, "{text}");
    assert!(!text.contains("left behind"), "{text}");
    let drivers = of(&lines, "driver");
    let ours = ["1-2 anykernel", "1-3 anykernel", "1-3 anykernel", "2-4 anykernel", "2-4 anykernel"];
    assert_eq!(
        drivers,
        [&ours[..], &["2-1 usb-storage", "2-4 usb-storage", "1-2", "1-3"]].concat(),
        "{text}"
    );
    // Of Linux itself only what it says of every plugging.
    let usual = |line: &&str| {
        let told = ["usb ", "usb-storage ", "scsi ", "usbcore: "].iter().any(|who| line.starts_with(who));
        let slow =
            ["interrupt took", "clocksource", "tsc:", "sched_clock"].iter().any(|word| line.contains(word));
        told || slow
    };
    let kernel = of(&lines, "kernel");
    assert!(kernel.iter().all(usual), "{:#?}", kernel.iter().filter(|line| !usual(line)).collect::<Vec<_>>());
}
