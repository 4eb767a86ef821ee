//! USB from end to end: the unikernel's own stack on xHCI, and libusb in a Debian guest. Needs `qemu-system-x86_64`,
//! `mkfs.fat`, `fsck.fat`, mtools and Debian's generic kernel (fetched without privileges).

mod usb_support;

use anykernel_tests::anykernel;
use anykernel_userspace::qemu::linux_module::{initramfs::Initramfs, kernel};
use anykernel_userspace::qemu::{Accelerator, Process};
use serde_json::Value;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use usb_support::{run, stick};

/// Far more than any of these needs on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

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

/// Has tshark decode a capture of what went over USB, of which the end may be missing, and checks it: no transfer is malformed,
/// what was completed was submitted, and a disk said who it is.
fn check_capture(mut bytes: &[u8]) {
    let (mut whole, mut at) = (0, 24);
    while let Some(len) = bytes.get(at + 8..at + 12) {
        whole = at;
        at += 16 + u32::from_le_bytes(len.try_into().unwrap()) as usize;
    }
    bytes = bytes.get(..at).unwrap_or(&bytes[..whole]);
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    let fields = ["usb.urb_type", "usb.transfer_type", "usb.urb_id", "_ws.malformed"];
    let mut tshark = Command::new("tshark");
    tshark.arg("-r").arg(file.path()).args(["-T", "fields", "-E", "separator=|"]);
    for field in fields {
        tshark.args(["-e", field]);
    }
    let output = tshark.output().expect("tshark runs: apt-get install tshark");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split('|').collect()).collect();
    let count =
        |column: usize, wanted: &str| lines.iter().filter(|line| line[column].contains(wanted)).count();
    // QEMU's disk has an answer that tshark takes for cut short; what is below it is whole.
    let whole = |line: &Vec<&str>| line[3].is_empty() || line[3].contains("Malformed Packet: SCSI");
    assert!(lines.len() > 20 && lines.iter().all(whole), "{text}");
    let (submitted, completed) = (count(0, "S"), count(0, "C"));
    assert!(completed > 10 && completed <= submitted, "{submitted} submitted, {completed} completed: {text}");
    // Control and bulk.
    assert!(count(1, "0x02") >= 2 && count(1, "0x03") > 8, "{text}");
    // In the bytes: of a device that was configured before, tshark does not know that it speaks SCSI.
    let product = b"QEMU HARDDISK";
    assert!(bytes.windows(product.len()).any(|part| part == product), "no disk said who it is: {text}");
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
    check_capture(&fs::read(&file).unwrap());
}

const GUEST: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
stty -F /dev/ttyS0 raw
for name in usb-common usbcore xhci-hcd xhci-pci; do
	[ -f /lib/$name.ko ] && insmod /lib/$name.ko
done
tries=0
while [ ! -e /dev/bus/usb/002/002 ] && [ $tries -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
anykernel usb list --json
anykernel ls usb:2-1:/ && echo listed
anykernel cp usb:2-1:/big.bin /tmp/big.bin && sha256sum /tmp/big.bin
head -c 3000000 /dev/urandom >/tmp/new.bin
anykernel cp /tmp/new.bin usb:2-1:/new.bin && anykernel cp usb:2-1:/new.bin /tmp/back.bin && cmp /tmp/new.bin /tmp/back.bin && echo written
anykernel ls usb:2-7:/
anykernel run usb list --net none --mount usb2-1:/ --usb-pcap /tmp/usb.pcap
echo capture begins
head -c 30000 /tmp/usb.pcap | od -An -v -tx1
echo capture ends
sync
poweroff -f
sleep 60
"#;

#[test]
fn a_debian_guest_reads_and_writes_a_stick_through_libusb() {
    let dir = tempfile::tempdir().unwrap();
    let (image, big) = stick(dir.path());
    let store = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("target/linux");
    let found =
        kernel::find("6.1", kernel::Flavour::Generic, &store).unwrap_or_else(|failure| panic!("{failure}"));
    let mut root = Initramfs::default();
    for directory in ["bin", "dev", "lib", "lib64", "proc", "sys", "tmp", "lib/x86_64-linux-gnu"] {
        root.directory(directory);
    }
    root.file("init", GUEST.as_bytes());
    root.file("bin/busybox", &fs::read(kernel::busybox(&store).unwrap()).unwrap());
    let program = dir.path().join("anykernel");
    run("strip", &["-o", program.to_str().unwrap(), anykernel().to_str().unwrap()]);
    root.file("bin/anykernel", &fs::read(&program).unwrap());
    let libraries = Command::new("ldd").arg(&program).output().unwrap();
    for word in
        String::from_utf8_lossy(&libraries.stdout).split_whitespace().filter(|word| word.starts_with('/'))
    {
        root.file(word.trim_start_matches('/'), &fs::read(word).unwrap());
    }
    for module in ["common/usb-common", "core/usbcore", "host/xhci-hcd", "host/xhci-pci"] {
        let name = Path::new(module).file_name().unwrap().to_str().unwrap();
        root.file(
            &format!("lib/{name}.ko"),
            &fs::read(found.modules.join(format!("drivers/usb/{module}.ko"))).unwrap(),
        );
    }
    let initrd = dir.path().join("initrd");
    fs::write(&initrd, root.finish()).unwrap();

    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "q35", "-smp", "2", "-m", "768"])
        .args(Accelerator::Tcg.args_for_self_modifying(2))
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"])
        .args(["-append", "console=ttyS0 quiet loglevel=1 panic=-1 oops=panic no_timer_check"])
        .arg("-kernel")
        .arg(&found.image)
        .arg("-initrd")
        .arg(&initrd)
        .arg("-drive")
        .arg(format!("if=none,id=stick,format=raw,file={}", image.display()))
        .args([
            "-device",
            "qemu-xhci,id=usb,p2=4,p3=4",
            "-device",
            "usb-storage,drive=stick,bus=usb.0,port=1",
        ])
        .args(["-device", "usb-hub,bus=usb.0,port=2", "-device", "usb-kbd,bus=usb.0,port=2.1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut qemu = Process::start(command).unwrap();
    let (_, stdout, _errors) = qemu.pipes();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        stdout.unwrap().read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    });
    let end = qemu.wait(Some(Instant::now() + PATIENCE), PATIENCE, || ()).unwrap();
    drop(qemu);
    let text = reader.join().unwrap();
    assert!(matches!(end, anykernel_userspace::qemu::End::Ended(_)), "it does not end:\n{text}");
    for path in ["usb1", "usb2", "1-2", "1-2.1", "2-1"] {
        assert!(text.contains(&format!(r#""path":"{path}""#)), "{path} is not listed:\n{text}");
    }
    assert!(text.contains("listed") && text.contains("written"), "{text}");
    assert!(text.contains(&big), "big.bin has another sum than {big}:\n{text}");
    assert!(text.contains("usb:2-7: no disk is there"), "{text}");
    run("fsck.fat", &["-n", image.to_str().unwrap()]);
    let (_, capture) = text.split_once("capture begins").expect("a capture");
    let (capture, _) = capture.split_once("capture ends").expect("a whole capture");
    let bytes: Vec<u8> =
        capture.split_whitespace().filter_map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    check_capture(&bytes);
}
