//! Boots images of the rumprun target in QEMU: machines, CPUs, protection of memory, last words, and the file server in a
//! small machine. Needs `qemu-system-x86_64` and the Rust target `x86_64-unknown-none`.

use anykernel_tests::{Running, free_port};
use anykernel_userspace::RunSpec;
use anykernel_userspace::qemu::{Accelerator, rumprun};
use object::{Object, ObjectSegment};
use sha2::{Digest, Sha256};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Far more than any of these needs on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

// Exit codes of QEMU for what the guest reports: twice the sum of 16 and the status, plus 1.
const SUCCESS: i32 = 33;
const FAILURE: i32 = 35;
const USAGE: i32 = 37;
const PANIC: i32 = 235;

fn hello() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| rumprun::image("hello").unwrap_or_else(|failure| panic!("{failure}")))
}

struct Guest {
    machine: &'static str,
    cpus: u32,
    memory: &'static str,
    accelerator: Vec<String>,
    config: String,
    more: Vec<String>,
}

struct End {
    console: String,
    code: Option<i32>,
}

impl Guest {
    fn new(machine: &'static str) -> Self {
        let accelerator = Accelerator::Tcg.args().iter().map(|arg| arg.to_string()).collect();
        Self { machine, cpus: 1, memory: "64M", accelerator, config: "{}".into(), more: Vec::new() }
    }

    /// What the image `hello` is asked for.
    fn request(mut self, word: &str) -> Self {
        self.config = format!(r#"{{"app":["hello","{word}"]}}"#);
        self
    }

    fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    fn start(&self, image: &Path) -> (Child, tempfile::NamedTempFile) {
        let mut config = tempfile::NamedTempFile::new().unwrap();
        config.write_all(self.config.as_bytes()).unwrap();
        let machine = match self.machine {
            "microvm" => "microvm,acpi=off,x-option-roms=off,pit=off,pic=off,rtc=on",
            other => other,
        };
        let child = Command::new("qemu-system-x86_64")
            .args(["-M", machine, "-m", self.memory, "-smp", &self.cpus.to_string()])
            .args(&self.accelerator)
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
            .args(["-global", "virtio-mmio.force-legacy=false"])
            .arg("-kernel")
            .arg(image)
            .arg("-initrd")
            .arg(config.path())
            .args(&self.more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("qemu-system-x86_64 starts (Debian: apt-get install qemu-system-x86)");
        (child, config)
    }

    /// Boots it and waits for its end.
    fn run(&self, image: &Path) -> End {
        let (mut child, _config) = self.start(image);
        let mut stdout = child.stdout.take().unwrap();
        let reader = std::thread::spawn(move || {
            let mut console = Vec::new();
            stdout.read_to_end(&mut console).unwrap();
            String::from_utf8_lossy(&console).into_owned()
        });
        let start = Instant::now();
        let code = loop {
            match child.try_wait().unwrap() {
                Some(status) => break status.code(),
                None if start.elapsed() > PATIENCE => {
                    child.kill().unwrap();
                    break None;
                }
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        child.wait().unwrap();
        End { console: reader.join().unwrap(), code }
    }
}

impl End {
    #[track_caller]
    fn expect(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{}", self.console);
        for word in words {
            assert!(self.console.contains(word), "no {word:?} in:\n{}", self.console);
        }
    }
}

#[test]
fn every_cpu_of_every_machine_runs_threads() {
    for machine in ["microvm", "q35"] {
        for cpus in [1, 2, 4] {
            // The greeters wait for each other, so all run at the same time.
            let end = Guest::new(machine).cpus(cpus).run(hello());
            end.expect(SUCCESS, &[&format!("{cpus} CPUs, ")]);
            for cpu in 0..cpus {
                end.expect(SUCCESS, &[&format!("hello from CPU {cpu}\n")]);
            }
        }
    }
}

#[test]
fn a_panic_names_the_functions_it_came_through() {
    for cpus in [1, 2] {
        let end = Guest::new("microvm").cpus(cpus).request("panic").run(hello());
        end.expect(
            PANIC,
            &[
                "panic: thread 'main' on CPU ",
                "hello.rs:",
                "as requested",
                "backtrace:",
                "fail_on_request+0x",
            ],
        );
    }
}

#[test]
fn a_stack_that_overflows_hits_its_guard_page() {
    let end = Guest::new("microvm").request("overflow").run(hello());
    end.expect(PANIC, &["panic: stack overflow in thread 'main'", "overflow+0x"]);
}

#[test]
fn memory_is_protected() {
    for (request, words) in [
        ("write-text", "page fault: write to read-only memory"),
        ("write-constant", "page fault: write to read-only memory"),
        ("execute-data", "page fault: execution of memory that is not code"),
        ("null", "page fault: write to a null pointer"),
    ] {
        Guest::new("microvm").request(request).run(hello()).expect(PANIC, &[words, "rip ", "backtrace:"]);
    }
}

#[test]
fn the_exit_status_tells_how_it_ended() {
    Guest::new("microvm").request("fail").run(hello()).expect(FAILURE, &[]);
    Guest::new("q35").request("fail").run(hello()).expect(FAILURE, &[]);
    Guest::new("microvm").request("nonsense").run(hello()).expect(USAGE, &["unknown request"]);
}

#[test]
fn a_wrong_configuration_is_refused_in_one_line() {
    let mut guest = Guest::new("microvm");
    for (config, word) in [("{\"ap\":[]}", "ap"), ("{", "configuration"), ("\u{fffd}", "configuration")] {
        guest.config = config.into();
        let end = guest.run(hello());
        end.expect(USAGE, &["ERROR", word]);
        assert_eq!(end.console.lines().count(), 1, "{}", end.console);
    }
    guest.config = r#"{"log":"loud"}"#.into();
    guest.run(hello()).expect(USAGE, &["loud"]);
}

#[test]
fn the_machine_keeps_the_contract() {
    for (machine, cpus) in [("microvm", 2), ("q35", 4), ("microvm", 1)] {
        let mut guest = Guest::new(machine).cpus(cpus).request("conformance");
        guest.more = ["-netdev", "user,id=n"].map(Into::into).into();
        let device = if machine == "q35" { "virtio-net-pci,netdev=n" } else { "virtio-net-device,netdev=n" };
        guest.more.extend(["-device".into(), device.into()]);
        let end = guest.run(hello());
        end.expect(
            SUCCESS,
            &[
                "memory/copy: pass",
                "park/no-lost-wakeup: pass",
                "dma/aligned: pass",
                "irq/detach: pass",
                "conformance: 0 failed",
            ],
        );
    }
}

#[test]
fn the_clock_runs_at_the_right_speed() {
    for machine in ["microvm", "q35"] {
        let (mut child, _config) = Guest::new(machine).request("clock").start(hello());
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let _running = Running(child);
        let readings: Vec<(Instant, u64)> = stdout
            .lines()
            .map_while(Result::ok)
            .filter_map(|line| Some((Instant::now(), line.strip_prefix("clock ")?.parse().ok()?)))
            .collect();
        let [(first, first_ns), _, (last, last_ns)] = readings[..] else { panic!("{readings:?}") };
        let (ours, theirs) = (Duration::from_nanos(last_ns - first_ns), last - first);
        // The line may be late on a busy machine; a wrong frequency is off by far more.
        assert!(
            ours.abs_diff(theirs) < ours / 10,
            "{machine}: {ours:?} passed in the guest, {theirs:?} here"
        );
        println!("{machine}: {ours:?} in the guest, {theirs:?} here");
    }
}

/// QEMU ends with 0 then, as after a good end.
#[test]
fn a_machine_that_resets_is_a_failure() {
    let mut image = std::fs::read(hello()).unwrap();
    // The first instruction becomes an invalid one, for which there is no handler yet.
    let at = {
        let elf = object::File::parse(&*image).unwrap();
        let text = elf.segments().find(|segment| segment.address() == elf.entry()).unwrap();
        usize::try_from(text.file_range().0).unwrap()
    };
    image[at..at + 2].copy_from_slice(&[0x0f, 0x0b]);
    let dir = tempfile::tempdir().unwrap();
    let broken = dir.path().join("broken.elf");
    std::fs::write(&broken, image).unwrap();
    let failure = rumprun::boot(&RunSpec::new(Default::default()), &broken).unwrap_err();
    assert!(failure.line.contains("reset"), "{failure}");
}

#[test]
fn it_boots_under_kvm() {
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        // Not through print!, which the test harness keeps to itself.
        let _ = writeln!(std::io::stderr(), "NOT RUN: it_boots_under_kvm: /dev/kvm cannot be opened here");
        return;
    }
    let mut guest = Guest::new("microvm").cpus(2);
    guest.accelerator = Accelerator::Kvm.args().map(Into::into).into();
    let end = guest.run(hello());
    end.expect(SUCCESS, &["hello from CPU 0", "hello from CPU 1"]);
    // Copies take another way there.
    guest.request("copies").run(hello()).expect(SUCCESS, &["memory/copy: pass"]);
}

/// An ext4 image with some files, and what is in them.
fn disk(dir: &Path) -> (PathBuf, Vec<(String, Vec<u8>)>) {
    let tree = dir.join("tree");
    std::fs::create_dir_all(tree.join("sub")).unwrap();
    let files: Vec<(String, Vec<u8>)> = [("small.txt", 11), ("sub/page", 4096), ("sub/large.bin", 700_001)]
        .into_iter()
        .map(|(name, len)| {
            (name.into(), (0..len).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect())
        })
        .collect();
    for (name, content) in &files {
        std::fs::write(tree.join(name), content).unwrap();
    }
    let image = dir.join("disk.ext4");
    std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let made = Command::new("/sbin/mkfs.ext4").arg("-q").arg("-d").arg(&tree).arg(&image).status();
    assert!(made.expect("mkfs.ext4 (Debian: apt-get install e2fsprogs)").success());
    (image, files)
}

/// The body of a response, or nothing while the server is not there.
fn fetch(port: u16, name: &str) -> Option<Vec<u8>> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    write!(stream, "GET /{name} HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n").ok()?;
    let mut response = Vec::new();
    stream.read_to_end(&mut response).ok()?;
    let end = response.windows(4).position(|window| window == b"\r\n\r\n")?;
    assert!(response.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&response[..end]));
    Some(response.split_off(end + 4))
}

fn serves(machine: &'static str, cpus: u32, memory: &'static str) {
    let image = rumprun::image("httpd").unwrap_or_else(|failure| panic!("{failure}"));
    let dir = tempfile::tempdir().unwrap();
    let (disk, files) = disk(dir.path());
    let port = free_port();
    let bus = if machine == "q35" { "pci" } else { "device" };
    let mut guest = Guest::new(machine).cpus(cpus);
    guest.memory = memory;
    guest.config =
        r#"{"app":["httpd"],"log":"warn","mounts":[{"source":"disk0","target":"/","read_only":true}],
        "interfaces":[{"ipv4":"10.0.2.15/24","gateway":"10.0.2.2"}]}"#
            .into();
    guest.more = vec![
        "-drive".into(),
        format!("if=none,id=disk0,format=raw,readonly=on,file={}", disk.display()),
        "-device".into(),
        format!("virtio-blk-{bus},drive=disk0"),
        "-netdev".into(),
        format!("user,id=net0,hostfwd=tcp:127.0.0.1:{port}-:80"),
        "-device".into(),
        format!("virtio-net-{bus},netdev=net0"),
    ];
    let (child, _config) = guest.start(&image);
    let mut child = Running(child);
    let start = Instant::now();
    let mut first = None;
    while first.is_none() && start.elapsed() < PATIENCE {
        if let Some(status) = child.0.try_wait().unwrap() {
            let mut console = String::new();
            child.0.stdout.take().unwrap().read_to_string(&mut console).unwrap();
            panic!("the guest ended with {status}:\n{console}");
        }
        first = fetch(port, &files[0].0);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(first.as_ref(), Some(&files[0].1));
    // Several at once, each whole.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for (name, content) in &files {
                    let got = fetch(port, name).unwrap_or_else(|| panic!("no answer for {name}"));
                    assert_eq!(Sha256::digest(&got), Sha256::digest(content), "{name}, {} bytes", got.len());
                }
            });
        }
    });
}

#[test]
fn the_file_server_runs_in_8_mib() {
    serves("microvm", 1, "8M");
}

#[test]
fn the_file_server_runs_on_a_pc_with_two_cpus() {
    serves("q35", 2, "64M");
}
