//! USB from end to end: the unikernel's own stack on xHCI, and libusb in a Debian guest. Needs `qemu-system-x86_64`,
//! `mkfs.fat`, `fsck.fat`, mtools and Debian's generic kernel (fetched without privileges).

use anykernel_tests::anykernel;
use anykernel_userspace::qemu::linux_module::{initramfs::Initramfs, kernel};
use anykernel_userspace::qemu::{Accelerator, Process, rumprun};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Far more than any of these needs on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

fn run(program: &str, args: &[&str]) {
    let status = Command::new(program).args(args).stdout(Stdio::null()).status();
    assert!(status.unwrap_or_else(|error| panic!("{program}: {error}")).success(), "{program} {args:?}");
}

fn noise(len: usize, mut seed: u32) -> Vec<u8> {
    let next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 24) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A stick with FAT32, some files, and their checksums. Returns the sum of `/big.bin`.
fn stick(dir: &Path) -> (PathBuf, String) {
    let image = dir.join("stick.img");
    fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let shown = image.to_str().unwrap();
    run("mkfs.fat", &["-F", "32", shown]);
    let mut sums = String::new();
    let mut big = String::new();
    for (seed, (name, len)) in (1..).zip([("big.bin", 6 << 20), ("odd.bin", 12_345), ("empty", 0)]) {
        let (content, file) = (noise(len, seed), dir.join(name));
        fs::write(&file, &content).unwrap();
        run("mcopy", &["-i", shown, file.to_str().unwrap(), "::/"]);
        sums += &format!("{}  ./{name}\n", sum(&content));
        if name == "big.bin" {
            big = sum(&content);
        }
    }
    let file = dir.join("SHA256SUMS");
    fs::write(&file, sums).unwrap();
    run("mcopy", &["-i", shown, file.to_str().unwrap(), "::/"]);
    (image, big)
}

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

/// QEMU's machine protocol.
struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn connect(path: &Path) -> Self {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(start.elapsed() < PATIENCE, "QMP: {error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut this = Self(BufReader::new(stream));
        this.read();
        this.ask("qmp_capabilities", json!({})).unwrap();
        this
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        assert!(self.0.read_line(&mut line).unwrap() > 0, "QEMU has ended");
        serde_json::from_str(&line).unwrap()
    }

    /// The answer; events in front of it are skipped.
    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let text = json!({ "execute": command, "arguments": arguments });
        self.0.get_mut().write_all(format!("{text}\n").as_bytes()).unwrap();
        loop {
            let answer = self.read();
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                return Err(error.to_string());
            }
        }
    }
}

/// 200 plugs and unplugs at random moments, on random ports, among them hubs with something behind them; then everything
/// that is plugged in works.
#[test]
fn two_hundred_hot_plugs() {
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = stick(dir.path());
    let (socket, config) = (dir.path().join("qmp"), dir.path().join("config"));
    fs::write(&config, r#"{"log":"warn","app":["usb","watch","600"]}"#).unwrap();
    let kernel = rumprun::image("usb-app").unwrap_or_else(|failure| panic!("{failure}"));
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "q35", "-smp", "2", "-m", "128"])
        .args(Accelerator::Tcg.args())
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-device", "qemu-xhci,id=usb,p2=4,p3=4"])
        .arg("-blockdev")
        .arg(format!("driver=file,node-name=stick,read-only=on,filename={}", image.display()))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .arg("-kernel")
        .arg(&kernel)
        .arg("-initrd")
        .arg(&config)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut qemu = Process::start(command).unwrap();
    let (mut keyboard, stdout, _errors) = qemu.pipes();
    let said = Arc::new(Mutex::new(String::new()));
    let sink = said.clone();
    let reader = std::thread::spawn(move || {
        let mut lines = BufReader::new(stdout.unwrap());
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            sink.lock().unwrap().push_str(&String::from_utf8_lossy(&line));
            line.clear();
        }
    });
    let mut qmp = Qmp::connect(&socket);

    let mut seed = 4u32;
    let mut random = |below: u32| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 16) % below
    };
    let kinds = ["usb-storage", "usb-kbd", "usb-mouse", "usb-hub", "usb-storage"];
    let mut plugged: Vec<Option<String>> = vec![None; 4];
    for turn in 0..200 {
        let port = random(4) as usize;
        match plugged[port].take() {
            Some(id) => drop(qmp.ask("device_del", json!({ "id": id })).unwrap()),
            None => {
                // A stick is plugged in once at a time: its image has one user.
                let kind = kinds[random(kinds.len() as u32) as usize];
                let taken = plugged.iter().flatten().any(|id| id.starts_with("usb-storage"));
                let kind = if kind == "usb-storage" && taken { "usb-kbd" } else { kind };
                let id = format!("{kind}-{turn}");
                let mut device =
                    json!({ "driver": kind, "id": id, "bus": "usb.0", "port": format!("{}", port + 1) });
                if kind == "usb-storage" {
                    device["drive"] = json!("stick");
                }
                qmp.ask("device_add", device).unwrap();
                if kind == "usb-hub" {
                    let behind = json!({ "driver": "usb-mouse", "id": format!("behind-{turn}"), "bus": "usb.0",
                        "port": format!("{}.1", port + 1) });
                    qmp.ask("device_add", behind).unwrap();
                }
                plugged[port] = Some(id);
            }
        }
        std::thread::sleep(Duration::from_millis(random(60).into()));
    }
    for id in plugged.into_iter().flatten() {
        qmp.ask("device_del", json!({ "id": id })).unwrap();
    }
    std::thread::sleep(Duration::from_millis(500));
    said.lock().unwrap().clear();
    qmp.ask("device_add", json!({ "driver": "usb-hub", "id": "last-hub", "bus": "usb.0", "port": "3" }))
        .unwrap();
    qmp.ask("device_add", json!({ "driver": "usb-kbd", "id": "last-kbd", "bus": "usb.0", "port": "3.2" }))
        .unwrap();
    qmp.ask(
        "device_add",
        json!({ "driver": "usb-storage", "id": "last", "bus": "usb.0", "port": "2", "drive": "stick" }),
    )
    .unwrap();
    let start = Instant::now();
    loop {
        let text = said.lock().unwrap().clone();
        let there = |what: &str| {
            text.lines().any(|line| line.trim_start_matches("+ ").trim_start().starts_with(what))
        };
        let disk = text.lines().any(|line| line.contains("1-2 ") && line.contains("[storage usb1-2 "));
        if disk && there("1-7 ") && there("1-7.2 ") {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "what was plugged in last is not there:\n{text}");
        std::thread::sleep(Duration::from_millis(50));
    }
    keyboard.as_mut().unwrap().write_all(&[anykernel_userspace::qemu::STOP]).unwrap();
    let end = qemu.wait(Some(Instant::now() + PATIENCE), PATIENCE, || ()).unwrap();
    let anykernel_userspace::qemu::End::Ended(status) = end else {
        panic!("it does not stop:\n{}", said.lock().unwrap())
    };
    let text = {
        reader.join().unwrap();
        said.lock().unwrap().clone()
    };
    assert_eq!(status.code(), Some(33), "{text}");
    assert!(text.contains("watched"), "{text}");
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
        .args(Accelerator::Tcg.args_for_self_modifying())
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
}
