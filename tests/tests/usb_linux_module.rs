//! USB in the Linux module: Debian's generic kernels in QEMU, whose USB core hands its devices to our stack. Needs
//! `qemu-system-x86_64`, `mkfs.fat`, `fsck.fat`, mtools and Debian's packages of those kernels (fetched without privileges).

mod usb_support;

use anykernel_tests::module::{self, of};
use anykernel_userspace::{DiskSpec, RunSpec, UsbSpec};
use serde_json::Value;
use std::path::Path;
use usb_support::{run, stick};

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
