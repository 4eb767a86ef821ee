//! A Debian guest whose USB devices come and go while its script runs: it asks, the test plugs.

use crate::anykernel;
use crate::module::PATIENCE;
use anykernel_userspace::qemu::linux_module::guest::{DebianGuest, PARAMETERS};
use anykernel_userspace::qemu::qmp::Qmp;
use anykernel_userspace::qemu::{Accelerator, End, Process};
use serde_json::json;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What every script begins with. Lines that begin with `@` ask the test to plug.
const BEGIN: &str = r#"
check() { name=$1; shift; if "$@"; then echo "ok $name"; else echo "bad $name"; fi; }
there() { n=0; while [ ! -e /sys/bus/usb/devices/$1/bConfigurationValue ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done; }
gone() { n=0; while [ -e /sys/bus/usb/devices/$1 ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done; }
not() { ! "$@"; }
"#;

/// A guest that runs `script`, with the command that users run and these drivers of Linux.
pub fn guest(script: &str, drivers: &[&str]) -> DebianGuest {
    let mut guest =
        DebianGuest::new(&format!("{BEGIN}{script}")).unwrap_or_else(|failure| panic!("{failure}"));
    guest.program(anykernel(), "bin/anykernel").expect("the command");
    guest.drivers(drivers).unwrap_or_else(|failure| panic!("{failure}"));
    guest
}

/// Boots the guest with `args`, four ports of USB 3 and four of USB 2, and returns what it said. `asked` is called for each line that begins with
/// `@`. Panics if the guest does not end, or says that something is bad.
pub fn boot(dir: &Path, guest: DebianGuest, args: &[&str], mut asked: impl FnMut(&mut Qmp, &str)) -> String {
    let (initrd, socket) = (dir.join("initrd"), dir.join("qmp"));
    let kernel = guest.finish(&initrd).expect("an initrd");
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "q35", "-smp", "2", "-m", "768"])
        .args(Accelerator::Tcg.args_for_self_modifying(2))
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"])
        .args(["-append", PARAMETERS])
        .arg("-kernel")
        .arg(&kernel)
        .arg("-initrd")
        .arg(&initrd)
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .args(["-device", "qemu-xhci,id=usb,p2=4,p3=4"])
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut qemu = Process::start(command).expect("QEMU starts");
    let (_, stdout, _errors) = qemu.pipes();
    let mut qmp = Qmp::connect(&socket, PATIENCE).expect("QEMU listens");
    let (send, lines) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut lines = BufReader::new(stdout.expect("standard output was piped"));
        let (mut all, mut line) = (String::new(), Vec::new());
        while lines.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            all += &text;
            all.push('\n');
            // It is not heard any more once the guest is late.
            let _ = send.send(text);
            line.clear();
        }
        all
    });
    let start = Instant::now();
    while let Ok(line) = lines.recv_timeout(PATIENCE.saturating_sub(start.elapsed())) {
        if let Some(wish) = line.strip_prefix('@') {
            asked(&mut qmp, wish);
        }
    }
    let end = qemu.wait(Some(Instant::now() + Duration::from_secs(10)), PATIENCE, || ()).expect("a child");
    drop(qemu);
    let text = reader.join().expect("what it said");
    assert!(matches!(end, End::Ended(_)), "it does not end:\n{text}");
    assert!(!text.contains("bad "), "{text}");
    text
}

/// Panics unless every one of these checks was ok.
pub fn all_ok(text: &str, checks: &[&str]) {
    for check in checks {
        assert!(text.lines().any(|line| line == format!("ok {check}")), "{check} is not ok in:\n{text}");
    }
}

/// Pulls a device out.
pub fn pull(qmp: &mut Qmp, id: &str) {
    qmp.ask("device_del", json!({ "id": id })).unwrap_or_else(|failure| panic!("{failure}"));
}

/// Plugs a device in, as soon as what was there before is gone.
pub fn plug(qmp: &mut Qmp, device: serde_json::Value) {
    let start = Instant::now();
    while let Err(failure) = qmp.ask("device_add", device.clone()) {
        assert!(start.elapsed() < PATIENCE, "{failure}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Plugs in a stick with the content of the block node of the same name.
pub fn plug_stick(qmp: &mut Qmp, id: &str, port: &str) {
    plug(qmp, json!({ "driver": "usb-storage", "id": id, "drive": id, "bus": "usb.0", "port": port }));
}
