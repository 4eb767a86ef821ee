//! USB from end to end: the unikernel's own stack on xHCI, by the command that users run. Needs `qemu-system-x86_64`,
//! `mkfs.fat`, `fsck.fat`, mtools and tshark.

mod usb_support;

use anykernel_tests::{anykernel, usb_capture};
use serde_json::Value;
use std::fs;
use std::process::Command;
use usb_support::{run, stick};

#[test]
fn the_unikernel_reads_and_writes_a_stick() {
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = stick(dir.path());
    let disk = format!("disk:{}:rw", image.display());
    let output = Command::new(anykernel())
        .args(["run", "selftest", "--on", "rumprun", "--net", "none", "--cpus", "2"])
        .args(["--usb", &disk, "--usb", "hub", "--usb", "keyboard", "--usb", "mouse"])
        .args(["--mount", "usb1-1:/fat:rw", "--", "fat"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for check in ["fat/checksums", "fat/write"] {
        let line = format!(r#"{{"check":"{check}","status":"pass""#);
        assert!(text.contains(&line), "{check} in:\n{text}");
    }
    run("fsck.fat", &["-n", image.to_str().unwrap()]);
}

#[test]
fn the_unikernel_lists_what_is_plugged_in() {
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = stick(dir.path());
    let output = Command::new(anykernel())
        .args(["usb", "list", "--json", "--on", "rumprun", "--usb", &format!("disk:{}", image.display())])
        .args(["--usb", "keyboard", "--usb", "hub", "--usb", "mouse", "--usb", "hub", "--usb", "keyboard"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let devices: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let at = |path: &str| devices.iter().find(|one| one["path"] == path);
    // USB 3 ports are 1 to 8, those of USB 2 9 to 16.
    for path in ["1-1", "1-10", "1-11", "1-11.1", "1-11.2", "1-11.2.1"] {
        let device = at(path).unwrap_or_else(|| panic!("nothing at {path} in:\n{text}"));
        assert_eq!(device["state"], "configured", "{device}");
    }
    assert_eq!(devices.len(), 6, "{text}");
    let stick = at("1-1").unwrap();
    assert_eq!(stick["speed"], "5000M");
    assert_eq!(stick["drivers"][0]["driver"], "storage");
    assert!(stick["drivers"][0]["note"].as_str().unwrap().starts_with("usb1-1"), "{stick}");
}

#[test]
fn what_goes_over_usb_is_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = stick(dir.path());
    let file = dir.path().join("usb.pcap");
    let output = Command::new(anykernel())
        .args(["usb", "list", "--on", "rumprun", "--usb", &format!("disk:{}", image.display())])
        .args(["--usb", "keyboard", "--usb-pcap"])
        .arg(&file)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    usb_capture::check(&fs::read(&file).unwrap());
}
