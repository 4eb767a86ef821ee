//! A unikernel with USB whose devices come and go while it runs, by QEMU's machine protocol. Needs `qemu-system-x86_64`,
//! `mkfs.fat` and mtools.

mod usb_support;

use anykernel_tests::{fetch, free_port};
use anykernel_userspace::qemu::qmp::Qmp;
use anykernel_userspace::qemu::{Accelerator, End, Process, STOP, rumprun};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use usb_support::{stick, sum};

/// Far more than any of these needs on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// A running unikernel: eight ports on its root hub, four of USB 3 (1 to 4) and four of USB 2 (5 to 8). QEMU calls both
/// kinds by 1 to 4.
struct Guest {
    qemu: Process,
    keyboard: Option<ChildStdin>,
    said: Arc<Mutex<String>>,
    reader: JoinHandle<()>,
    qmp: Qmp,
}

impl Guest {
    fn boot(image: &str, feature: Option<&str>, dir: &Path, config: &Value, more: &[&str]) -> Self {
        let kernel = rumprun::image_with(image, feature).unwrap_or_else(|failure| panic!("{failure}"));
        let (socket, file) = (dir.join("qmp"), dir.join("config"));
        fs::write(&file, config.to_string()).unwrap();
        let mut command = Command::new("qemu-system-x86_64");
        command
            // Without the keyboard that every PC has: what is typed is for USB.
            .args(["-M", "q35,i8042=off", "-smp", "2", "-m", "128"])
            .args(Accelerator::Tcg.args())
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-device", "qemu-xhci,id=usb,p2=4,p3=4"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .arg("-kernel")
            .arg(&kernel)
            .arg("-initrd")
            .arg(&file)
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        let mut qemu = Process::start(command).unwrap();
        let (keyboard, stdout, _) = qemu.pipes();
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
        let qmp = Qmp::connect(&socket, PATIENCE).unwrap();
        Self { qemu, keyboard, said, reader, qmp }
    }

    fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    /// The JSON objects that it printed.
    fn objects(&self) -> Vec<Value> {
        self.said().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits until `found` finds something in what it said.
    #[track_caller]
    fn until<T>(&self, what: &str, mut found: impl FnMut(&Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = found(self) {
                return found;
            }
            assert!(start.elapsed() < PATIENCE, "{what}:\n{}", self.said());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Plugs a device in, as soon as QEMU has let go of what another one had.
    fn plug(&mut self, device: Value) {
        let start = Instant::now();
        while let Err(error) = self.qmp.ask("device_add", device.clone()) {
            assert!(error.line.contains("ermission conflict") && start.elapsed() < PATIENCE, "{error}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn unplug(&mut self, id: &str) {
        self.qmp.ask("device_del", json!({ "id": id })).unwrap();
    }

    /// Asks it to end, as Ctrl-C does; everything that it said.
    fn stop(mut self) -> String {
        self.keyboard.as_mut().unwrap().write_all(&[STOP]).unwrap();
        let end = self.qemu.wait(Some(Instant::now() + PATIENCE), PATIENCE, || ()).unwrap();
        let End::Ended(status) = end else { panic!("it does not stop:\n{}", self.said()) };
        self.reader.join().unwrap();
        let text = self.said.lock().unwrap().clone();
        assert_eq!(status.code(), Some(33), "{text}");
        text
    }
}

/// A sequence that is the same each time.
fn sequence(mut seed: u32) -> impl FnMut(u32) -> u32 {
    move |below| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 16) % below
    }
}

fn key(code: &str, down: bool) -> Value {
    json!({ "type": "key", "data": { "down": down, "key": { "type": "qcode", "data": code } } })
}

fn button(name: &str, down: bool) -> Value {
    json!({ "type": "btn", "data": { "down": down, "button": name } })
}

fn motion(axis: &str, value: i32) -> Value {
    json!({ "type": "rel", "data": { "axis": axis, "value": value } })
}

#[test]
fn typed_keys_and_a_mouse_reach_the_application() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({ "log": "warn", "app": ["usb", "keys"] });
    let devices = ["-device", "usb-kbd,id=kbd,bus=usb.0,port=1", "-device", "usb-mouse,bus=usb.0,port=2"];
    let mut guest = Guest::boot("usb-app", None, dir.path(), &config, &devices);
    for name in ["usb1-5i0", "usb1-6i0"] {
        guest.until(name, |guest| guest.objects().iter().find(|one| one["input"] == name).map(drop));
    }
    let keys = |guest: &Guest| -> Vec<(u64, bool)> {
        let all = guest.objects().into_iter().filter(|one| one["device"] == "usb1-5i0");
        all.filter_map(|one| Some((one["key"].as_u64()?, one["pressed"].as_bool()?))).collect()
    };
    let mut random = sequence(7);
    let mut expected = Vec::new();
    let mut text = String::new();
    for _ in 0..40 {
        // QEMU's keyboard keeps 16 events: a burst of at most that many, and the next when it has arrived.
        let mut events = Vec::new();
        for _ in 0..1 + random(3) {
            let letter = random(26) as u8;
            let (name, usage) = (char::from(b'a' + letter).to_string(), u64::from(4 + letter));
            let shift = random(3) == 0;
            let strokes = [(name.as_str(), usage, true), (name.as_str(), usage, false)];
            let around = |down| shift.then_some(("shift", 225, down));
            for (name, usage, down) in around(true).into_iter().chain(strokes).chain(around(false)) {
                events.push(key(name, down));
                expected.push((usage, down));
            }
            text.push(char::from(if shift { b'A' } else { b'a' } + letter));
        }
        guest.qmp.ask("input-send-event", json!({ "events": events })).unwrap();
        let count = expected.len();
        guest.until("what was typed does not arrive", |guest| (keys(guest).len() >= count).then_some(()));
    }
    let typed: String = guest
        .objects()
        .iter()
        .filter(|one| one["pressed"] == true)
        .filter_map(|one| Some(one["char"].as_str()?.to_owned()))
        .collect();
    assert_eq!(typed, text);

    let (mut moved, mut clicks) = ([0i64; 2], Vec::new());
    let mouse = |guest: &Guest| {
        let objects = guest.objects();
        let sum = |axis: &str| -> i64 {
            objects.iter().filter(|one| one["axis"] == axis).filter_map(|one| one["delta"].as_i64()).sum()
        };
        let buttons =
            objects.iter().filter_map(|one| Some((one["button"].as_u64()?, one["pressed"].as_bool()?)));
        ([sum("x"), sum("y")], buttons.collect::<Vec<_>>())
    };
    for turn in 0..20 {
        // 500 is more than a report can say at once.
        let (x, y) = (random(1001) as i32 - 500, random(201) as i32 - 100);
        let (name, number) = [("left", 1), ("right", 2), ("middle", 3)][turn % 3];
        // What comes at once is one report, in which a button cannot go down and up.
        for events in
            [vec![motion("x", x), motion("y", y)], vec![button(name, true)], vec![button(name, false)]]
        {
            guest.qmp.ask("input-send-event", json!({ "events": events })).unwrap();
        }
        moved = [moved[0] + i64::from(x), moved[1] + i64::from(y)];
        clicks.extend([(number, true), (number, false)]);
        guest.until("the mouse", |guest| (mouse(guest) == (moved, clicks.clone())).then_some(()));
    }
    assert_eq!(keys(&guest), expected);

    // Pulled out with a key down: it is let go.
    guest.qmp.ask("input-send-event", json!({ "events": [key("z", true)] })).unwrap();
    expected.push((29, true));
    guest.until("the last key", |guest| (keys(guest) == expected).then_some(()));
    guest.unplug("kbd");
    expected.push((29, false));
    guest.until("what was down is let go", |guest| (keys(guest) == expected).then_some(()));
    guest.plug(json!({ "driver": "usb-kbd", "id": "other", "bus": "usb.0", "port": "3" }));
    guest.until("another keyboard", |guest| {
        guest.objects().iter().find(|one| one["input"] == "usb1-7i0").map(drop)
    });
    guest.stop();
}

#[test]
fn a_disk_of_uas_alone_is_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = stick(dir.path());
    let config = json!({ "log": "warn", "app": ["usb", "list", "--json"] });
    let drive = format!("driver=file,node-name=stick,read-only=on,filename={}", image.display());
    let devices = ["-blockdev", &drive, "-device", "usb-uas,id=uas,bus=usb.0,port=1"];
    let disk = ["-device", "scsi-hd,bus=uas.0,drive=stick", "-device", "usb-kbd,bus=usb.0,port=2"];
    let guest = Guest::boot("usb-app", None, dir.path(), &config, &[&devices[..], &disk[..]].concat());
    let all = guest.until("the list", |guest| Some(guest.objects()).filter(|all| all.len() == 2));
    let uas = all.iter().find(|one| one["path"] == "1-1").unwrap();
    assert_eq!((&uas["state"], &uas["drivers"][0]["failed"]), (&json!("configured"), &json!(true)), "{uas}");
    assert!(uas["drivers"][0]["note"].as_str().unwrap().contains("UAS only"), "{uas}");
    assert_eq!(all.iter().find(|one| one["path"] == "1-6").unwrap()["drivers"][0]["failed"], false);
}

/// The server finds its network after it started, loses it in the middle of a file, and gets it again.
#[test]
fn a_server_on_a_network_device_that_comes_and_goes() {
    let dir = tempfile::tempdir().unwrap();
    let (image, big) = stick(dir.path());
    let mounts = [json!({ "source": "usb1-1", "target": "/", "read_only": true })];
    let config = json!({ "log": "info", "app": ["httpd"], "mounts": mounts });
    let port = free_port();
    let drive = format!("driver=file,node-name=stick,read-only=on,filename={}", image.display());
    let net = format!("user,id=net0,hostfwd=tcp:127.0.0.1:{port}-:80");
    let devices =
        ["-blockdev", &drive, "-device", "usb-storage,bus=usb.0,port=1,drive=stick", "-netdev", &net];
    let mut guest = Guest::boot("httpd", Some("usb"), dir.path(), &config, &devices);
    guest.until("the stack starts", |guest| guest.said().contains("httpd").then_some(()));
    for (round, id) in ["first", "second"].into_iter().enumerate() {
        guest.plug(json!({ "driver": "usb-net", "id": id, "bus": "usb.0", "port": "2", "netdev": "net0" }));
        guest.until("the network", |guest| {
            (guest.said().matches("from DHCP server").count() > round).then_some(())
        });
        let found = guest.until("the file", |_| fetch(port, "/big.bin").ok());
        assert_eq!(sum(&found), big);
        let sums = String::from_utf8(fetch(port, "/SHA256SUMS").unwrap()).unwrap();
        for (wanted, name) in sums.lines().filter_map(|line| line.split_once("  ./")) {
            assert_eq!(sum(&fetch(port, &format!("/{name}")).unwrap()), wanted, "{name}");
        }
        // In the middle of a file, which the client takes slowly.
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        write!(stream, "GET /big.bin HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let mut part = vec![0; 100_000];
        stream.read_exact(&mut part).unwrap();
        guest.unplug(id);
        guest.until("its users are told", |guest| {
            (guest.said().matches("unplugged; connections over it fail").count() > round).then_some(())
        });
    }
    guest.stop();
}

/// Pulled out while it is written to: the writer is told, the mount fails, what was synced is there when it is plugged in
/// again, and nothing hangs.
#[test]
fn a_stick_is_pulled_out_during_a_write() {
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = stick(dir.path());
    let mounts =
        [json!({ "source": "tmpfs", "target": "/" }), json!({ "source": "usb1-1", "target": "/stick" })];
    let config = json!({ "log": "error", "app": ["usb", "fill", "usb1-1", "/stick"], "mounts": mounts });
    let drive = format!("driver=file,node-name=stick,filename={}", image.display());
    let devices = ["-blockdev", &drive, "-device", "usb-storage,id=stick-0,bus=usb.0,port=1,drive=stick"];
    let mut guest = Guest::boot("usb-app", None, dir.path(), &config, &devices);
    let mut random = sequence(11);
    let last = |guest: &Guest, name: &str| -> Vec<u64> {
        guest.objects().iter().filter_map(|one| one[name].as_u64()).collect()
    };
    for round in 0..3 {
        let before = last(&guest, "synced").last().copied().unwrap_or(0);
        guest.until("it writes", |guest| {
            last(guest, "synced").last().is_some_and(|now| *now >= before + 16).then_some(())
        });
        std::thread::sleep(Duration::from_micros(random(30_000).into()));
        guest.unplug(&format!("stick-{round}"));
        guest.until("the writer is told", |guest| {
            let told = guest.objects().iter().filter(|one| one["error"].is_string()).count();
            (told > round).then_some(())
        });
        guest.plug(json!({
            "driver": "usb-storage", "id": format!("stick-{}", round + 1), "bus": "usb.0", "port": "1", "drive": "stick"
        }));
        guest.until("it works again", |guest| (last(guest, "verified").len() > round).then_some(()));
    }
    let text = guest.stop();
    assert!(!text.contains("wrong"), "{text}");
}

/// 200 plugs and unplugs at random moments, on random ports, among them hubs with something behind them, while every disk is
/// read: some end before the device is noticed, some while it is enumerated, some when it works. Then everything that is
/// plugged in works, and the memory is what it was.
#[test]
fn two_hundred_hot_plugs() {
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = stick(dir.path());
    let config = json!({ "log": "warn", "app": ["usb", "watch", "600", "--read"] });
    let drive = format!("driver=file,node-name=stick,read-only=on,filename={}", image.display());
    let mut guest = Guest::boot("usb-app", None, dir.path(), &config, &["-blockdev", &drive]);
    // How much is free once nothing is plugged in and nothing happens.
    let free = |guest: &Guest| -> u64 {
        guest.said.lock().unwrap().clear();
        let found = |guest: &Guest| -> Option<u64> {
            let text = guest.said();
            let (_, line) = text.rsplit_once("= 0 devices, ")?;
            line.split_once(" bytes free\n")?.0.parse().ok()
        };
        guest.until("it does not come to rest", found)
    };
    let mut random = sequence(4);
    let kinds = ["usb-storage", "usb-kbd", "usb-mouse", "usb-hub", "usb-storage"];
    let (mut plugged, mut turn, mut at_first): (Vec<Option<String>>, _, _) = (vec![None; 4], 0, 0);
    // The heap keeps what it once needed: a first part shows how much that is.
    for turns in [60, 140] {
        for _ in 0..turns {
            turn += 1;
            let port = random(4) as usize;
            match plugged[port].take() {
                Some(id) => guest.unplug(&id),
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
                    guest.plug(device);
                    if kind == "usb-hub" {
                        guest.plug(
                            json!({ "driver": "usb-mouse", "id": format!("behind-{turn}"), "bus": "usb.0",
                            "port": format!("{}.1", port + 1) }),
                        );
                    }
                    plugged[port] = Some(id);
                }
            }
            // Enumeration begins after 100 ms and takes about as long.
            let longest_ms = [10, 60, 250, 500][random(4) as usize];
            std::thread::sleep(Duration::from_micros(random(longest_ms * 60).into()) * 16);
        }
        for id in plugged.iter_mut().filter_map(Option::take) {
            guest.unplug(&id);
        }
        let now = free(&guest);
        // One device takes more than that, and 140 were plugged in meanwhile.
        assert!(now + (256 << 10) >= at_first, "{at_first} bytes were free, then {now}");
        at_first = now;
    }
    guest.plug(json!({ "driver": "usb-hub", "id": "last-hub", "bus": "usb.0", "port": "3" }));
    guest.plug(json!({ "driver": "usb-kbd", "id": "last-kbd", "bus": "usb.0", "port": "3.2" }));
    guest.plug(
        json!({ "driver": "usb-storage", "id": "last", "bus": "usb.0", "port": "2", "drive": "stick" }),
    );
    guest.until("what was plugged in last is not there", |guest| {
        let text = guest.said();
        let line = |wanted: &[&str]| text.lines().any(|line| wanted.iter().all(|word| line.contains(word)));
        (line(&["1-2 ", "[storage usb1-2 "]) && line(&["1-7 ", "[hub "]) && line(&["1-7.2 ", "[hid "]))
            .then_some(())
    });
    let text = guest.stop();
    assert!(text.contains("watched"), "{text}");
}
