//! Disks that a guest reads for the command line: the same output on every target. Needs `qemu-system-x86_64`, `mkfs.fat`, `fsck.fat`,
//! mtools and Debian's generic kernel (fetched without privileges).

mod usb_support;

use anykernel_tests::anykernel;
use std::ffi::OsStr;
use std::fs;
use std::process::Command;
use usb_support::{run, stick, sum};

/// What the command says, of which nothing else is on standard output.
fn said<S: AsRef<OsStr>>(args: &[S]) -> String {
    let output = Command::new(anykernel()).args(args).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// A stick in each guest, and an image: listed, read and written as this process does it.
#[test]
fn every_target_shows_the_same_files() {
    let dir = tempfile::tempdir().unwrap();
    let (image, big) = stick(dir.path());
    let image = image.to_str().unwrap();
    let plugged = format!("disk:{image}");
    let here = said(&["ls", "-lR", &format!("{image}:/")]);
    assert!(here.contains("big.bin"), "{here}");
    for (target, place) in [("rumprun", "usb:1-1:/"), ("linux-module", "usb:2-1:/")] {
        let there = |args: &[&str]| said(&[args, &["--on", target, "--usb", &plugged]].concat());
        assert_eq!(there(&["ls", "-lR", place]), here, "{target}");
        let (new, back) = (dir.path().join(target), dir.path().join("back"));
        fs::write(&new, target.repeat(100_000)).unwrap();
        there(&["cp", new.to_str().unwrap(), place]);
        run("fsck.fat", &["-n", image]);
        said(&["cp", &format!("{image}:/{target}"), back.to_str().unwrap()]);
        assert!(fs::read(&new).unwrap() == fs::read(&back).unwrap(), "what {target} wrote is something else");
        fs::remove_file(&back).unwrap();
        // What was there before is, too.
        run("mdel", &["-i", image, &format!("::/{target}")]);
    }
    let copy = dir.path().join("copy");
    let place = format!("{image}:/big.bin");
    said(&["cp", &place, copy.to_str().unwrap(), "--on", "rumprun"]);
    assert_eq!(sum(&fs::read(&copy).unwrap()), big);
}

#[test]
fn what_is_not_there_is_said_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = stick(dir.path());
    let plugged = format!("disk:{}", image.display());
    let fails = |args: &[&str], wanted: &str| {
        let output = Command::new(anykernel()).args(args).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && output.stdout.is_empty(), "{text}");
        assert!(text.contains(wanted), "{wanted} is not in {text}");
    };
    fails(&["ls", "usb:1-1:/none", "--on", "rumprun", "--usb", &plugged], "usb:1-1:/none: no such file");
    fails(&["ls", "usb:1-7:/", "--on", "rumprun", "--usb", &plugged], "no disk is there");
    fails(&["ls", "usb:1-1:/", "--usb", &plugged], "add --on rumprun");
}
