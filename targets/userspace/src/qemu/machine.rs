//! A virtual machine: QEMU's arguments, and a run of it.

use super::process::{End, Process};
use super::watch::Watch;
use super::{Accelerator, DEBUG_EXIT_PORT, QEMU, STOP, backlog, build, status_of};
use crate::{Failure, NetSpec, RunSpec, UsbSpec};
use hypercall::ExitStatus;
use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The name of a machine that boots Linux.
pub(super) const LINUX: &str = "Linux";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bus {
    Mmio,
    Pci,
}

/// A virtual machine to be.
#[derive(Debug)]
pub struct Machine {
    bus: Bus,
    kind: &'static str,
    accelerator: Vec<&'static str>,
    args: Vec<OsString>,
    name: &'static str,
    limit: Option<Duration>,
    powers_off: bool,
    /// Where the console is written to instead of our standard output.
    console: Option<PathBuf>,
    memory: u64,
}

impl Machine {
    fn new(name: &'static str, bus: Bus, kind: &'static str, spec: &RunSpec, default_memory: u64) -> Self {
        let memory = spec.memory.unwrap_or(default_memory) & !0xfff;
        let accelerator = Accelerator::detect().args().into();
        let mut machine = Self {
            bus,
            kind,
            accelerator,
            args: Vec::new(),
            name,
            limit: None,
            powers_off: false,
            console: None,
            memory,
        };
        machine.args(["-smp", &spec.cpus.to_string(), "-m", &format!("{}k", memory >> 10)]);
        machine.args(["-device", &format!("isa-debug-exit,iobase={DEBUG_EXIT_PORT:#x},iosize=4")]);
        machine.disks(spec);
        machine.network(spec);
        machine.usb(spec);
        machine
    }

    /// QEMU's `microvm`: no PCI, no firmware, virtio-mmio of version 2. `name` is for messages.
    pub fn microvm(name: &'static str, spec: &RunSpec, default_memory: u64) -> Self {
        let kind = "microvm,acpi=off,x-option-roms=off,pit=off,pic=off,rtc=on,auto-kernel-cmdline=on";
        let mut machine = Self::new(name, Bus::Mmio, kind, spec, default_memory);
        machine.args(["-global", "virtio-mmio.force-legacy=false"]);
        machine
    }

    /// QEMU's `q35`: PCI Express, SeaBIOS.
    pub fn q35(name: &'static str, spec: &RunSpec, default_memory: u64) -> Self {
        Self::new(name, Bus::Pci, "q35", spec, default_memory)
    }

    /// The guest has so many CPUs and rewrites its own code, as Linux does: see [`Accelerator::args_for_self_modifying`].
    pub fn self_modifying(&mut self, cpus: u32) -> &mut Self {
        self.accelerator(Accelerator::detect().args_for_self_modifying(cpus))
    }

    /// The guest ends by turning the machine off. Of others that is a failure: QEMU cannot tell it from a reset.
    pub fn powers_off(&mut self) -> &mut Self {
        self.powers_off = true;
        self
    }

    /// Another accelerator than the fastest: QEMU's arguments.
    pub fn accelerator(&mut self, args: impl Into<Vec<&'static str>>) -> &mut Self {
        self.accelerator = args.into();
        self
    }

    /// The console is written to this file, and not to our standard output.
    pub fn console(&mut self, file: &Path) -> &mut Self {
        self.console = Some(file.into());
        self
    }

    /// Which target it is, in a recording.
    fn target(&self) -> &'static str {
        if self.name == LINUX { "linux-module" } else { "rumprun" }
    }

    /// What boots.
    pub fn kernel(&mut self, file: &Path) -> &mut Self {
        self.args([OsStr::new("-kernel"), file.as_os_str()])
    }

    /// One more argument of QEMU.
    pub fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.args.push(arg.as_ref().into());
        self
    }

    /// More arguments of QEMU.
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(&mut self, args: I) -> &mut Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().into()));
        self
    }

    /// Ends the machine after this long, as a failure; without it the guest may run for ever.
    pub fn limit(&mut self, limit: Duration) -> &mut Self {
        self.limit = Some(limit);
        self
    }

    fn device(&mut self, kind: &str, options: &str) {
        let bus = match self.bus {
            Bus::Mmio => "device",
            Bus::Pci => "pci",
        };
        self.args(["-device", &format!("{kind}-{bus},{options}")]);
    }

    fn disks(&mut self, spec: &RunSpec) {
        for (i, disk) in spec.disks.iter().enumerate() {
            let mode = if disk.writable { "file.locking=on" } else { "readonly=on" };
            let drive = option(&format!("if=none,id=disk{i},format=raw,{mode},file="), &disk.path);
            self.arg("-drive").arg(drive);
            self.device("virtio-blk", &format!("drive=disk{i}"));
        }
    }

    fn network(&mut self, spec: &RunSpec) {
        let backend = match &spec.net {
            NetSpec::None | NetSpec::Usb => return,
            NetSpec::Tap(name) => format!("tap,id=net0,ifname={name},script=no,downscript=no"),
            NetSpec::User => {
                let mut backend = String::from("user,id=net0");
                for publish in &spec.publish {
                    let (ip, port, guest) = (publish.host.ip(), publish.host.port(), publish.guest);
                    backend += &format!(",hostfwd=tcp:{ip}:{port}-:{guest}");
                }
                backend
            }
        };
        self.args(["-netdev", &backend]);
        if !spec.usb.contains(&UsbSpec::Net) {
            self.device("virtio-net", "netdev=net0");
        }
    }

    /// A host controller, if something is to be plugged in to it, on the PCI bus.
    fn usb(&mut self, spec: &RunSpec) {
        if spec.usb.is_empty() {
            return;
        }
        self.args(["-device", "qemu-xhci,id=usb,p2=8,p3=8"]);
        let (mut hub, mut next) = (String::new(), 1);
        for (i, device) in spec.usb.iter().enumerate() {
            let options = format!("id=usb{i},bus=usb.0,port={hub}{next}");
            next += 1;
            let kind = match device {
                UsbSpec::Keyboard => "usb-kbd",
                UsbSpec::Mouse => "usb-mouse",
                UsbSpec::Net => "usb-net,netdev=net0",
                UsbSpec::Host(place) => {
                    let ports: Vec<String> = place.ports().iter().map(u8::to_string).collect();
                    let place = format!("hostbus={},hostport={}", place.bus, ports.join("."));
                    self.args(["-device", &format!("usb-host,{place},{options}")]);
                    continue;
                }
                UsbSpec::Hub => {
                    hub += &format!("{}.", next - 1);
                    next = 1;
                    "usb-hub"
                }
                UsbSpec::Disk(disk) => {
                    let mode = if disk.writable { "file.locking=on" } else { "readonly=on" };
                    let drive = option(&format!("if=none,id=stick{i},format=raw,{mode},file="), &disk.path);
                    self.arg("-drive").arg(drive);
                    self.args(["-device", &format!("usb-storage,drive=stick{i},{options}")]);
                    continue;
                }
            };
            self.args(["-device", &format!("{kind},{options}")]);
        }
    }

    /// The command that starts it. Its standard input and output are the guest's console, unless that is a file.
    pub fn command(&self) -> Command {
        let mut command = Command::new(QEMU);
        command.args(["-M", self.kind]).args(&self.accelerator);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial"]);
        match &self.console {
            Some(file) => command.arg(option("file:", file)),
            None => command.arg("stdio"),
        };
        command.args(&self.args);
        command
    }

    /// Starts QEMU, streams the guest's console, and returns how the guest ended. Ctrl-C asks the guest to end, and ends
    /// the machine if it does not. Call it on the main thread: QEMU dies with the thread that started it.
    pub fn run(&self, spec: &RunSpec) -> Result<ExitStatus, Failure> {
        let watch = Watch::start(self.target(), spec, self.memory)?;
        let start = Instant::now();
        let mut command = self.command();
        command.args(watch.args());
        let stdin = if self.console.is_some() { Stdio::null() } else { Stdio::piped() };
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        log::debug!("{command:?}");
        let mut qemu =
            Process::start(command).map_err(|error| Failure::new(format!("cannot start {QEMU}: {error}")))?;
        let bar = build::spinner(format!("booting {}", self.name));
        let (mut keyboard, stdout, stderr) = qemu.pipes();
        let (json, to_stderr, booting) = (spec.json, spec.stderr, bar.clone());
        let console = std::thread::spawn(move || {
            if to_stderr {
                stream_console(stdout, std::io::stderr(), json, &booting);
            } else {
                stream_console(stdout, std::io::stdout(), json, &booting);
            }
        });
        let errors = std::thread::spawn(move || {
            let mut text = Vec::new();
            // What cannot be read cannot be shown.
            stderr.map(|mut from| from.read_to_end(&mut text));
            String::from_utf8_lossy(&text).into_owned()
        });
        let ended = AtomicBool::new(false);
        let end = std::thread::scope(|scope| {
            let addresses: Vec<_> = spec.publish.iter().map(|publish| publish.host).collect();
            let (child, over) = (qemu.id(), &ended);
            scope.spawn(move || backlog::widen(child, &addresses, over));
            scope.spawn(|| announce_server(spec, &bar, &ended));
            let ask = || {
                // It may not listen yet, or not any more.
                keyboard.as_mut().map(|keyboard| keyboard.write_all(&[STOP]));
            };
            let end = qemu.wait(self.limit.map(|limit| start + limit), grace(spec), ask);
            ended.store(true, Ordering::Release);
            end
        });
        let _ = console.join();
        let errors = errors.join().unwrap_or_default();
        watch.finish()?;
        match end {
            Ok(End::Ended(status)) if status.code() == Some(0) && !self.powers_off => {
                Err(Failure::new(format!(
                    "{} reset its machine without a word: it met a fault that it could not report",
                    self.name
                )))
            }
            Ok(End::Ended(status)) => match status_of(status.code()) {
                Some(status) => Ok(status),
                None => {
                    let why = errors.lines().last().unwrap_or("without a word");
                    Err(Failure::new(format!(
                        "QEMU ended with {status}: {}",
                        why.trim_start_matches("qemu-system-x86_64: ")
                    )))
                }
            },
            Ok(End::Late) => Err(Failure::new(format!(
                "the guest did not end within {} s and was stopped",
                self.limit.unwrap_or_default().as_secs()
            ))),
            Ok(End::Deaf) if writes(spec) => Err(Failure::new(format!(
                "the guest did not end within {} s and was stopped: what it had not yet written to its disks is lost",
                grace(spec).as_secs()
            ))),
            Ok(End::Deaf) => Ok(ExitStatus::Success),
            Err(error) => Err(Failure::new(format!("waiting for QEMU: {error}"))),
        }
    }
}

/// An option of QEMU with a file name in it: a comma in that is written twice.
fn option(before: &str, file: &Path) -> OsString {
    let mut option = OsString::from(before);
    option.push(file.to_string_lossy().replace(',', ",,"));
    option
}

/// Whether the guest may have something to write before it ends.
fn writes(spec: &RunSpec) -> bool {
    let writable = |one: &UsbSpec| matches!(one, UsbSpec::Disk(disk) if disk.writable);
    spec.disks.iter().any(|disk| disk.writable) || spec.usb.iter().any(writable)
}

/// How long a guest may take to end after Ctrl-C.
fn grace(spec: &RunSpec) -> Duration {
    Duration::from_secs(if writes(spec) { 15 } else { 3 })
}

/// Says when the file server answers on its published port. QEMU accepts connections before the guest does, so only an
/// answer shows that it is there; of other applications we do not know what they answer to.
fn announce_server(spec: &RunSpec, bar: &indicatif::ProgressBar, ended: &AtomicBool) {
    let web = spec.config.app.first().is_some_and(|app| app == "httpd");
    let Some(publish) = spec.publish.iter().find(|publish| web && publish.guest == 80) else { return };
    if spec.quiet {
        return;
    }
    while !ended.load(Ordering::Acquire) {
        if answers(publish.host) {
            bar.finish_and_clear();
            crate::runner::announce_port(spec, publish.host.into(), publish.guest);
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Whether an HTTP server answers there.
fn answers(mut address: SocketAddrV4) -> bool {
    if address.ip().is_unspecified() {
        address.set_ip(Ipv4Addr::LOCALHOST);
    }
    let ask = || -> std::io::Result<usize> {
        let mut stream = TcpStream::connect_timeout(&address.into(), Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        stream.read(&mut [0; 64])
    };
    ask().is_ok_and(|len| len > 0)
}

fn stream_console(from: Option<impl Read>, mut to: impl Write, json: bool, bar: &indicatif::ProgressBar) {
    let Some(mut from) = from else { return };
    let mut buf = [0; 8192];
    let mut console = crate::spec::ConsoleLines::new(json);
    while let Ok(n) = from.read(&mut buf) {
        if n == 0 {
            break;
        }
        bar.finish_and_clear();
        console.write(&mut to, &buf[..n]);
    }
    bar.finish_and_clear();
    console.finish(&mut to);
    // A standard output that is gone swallows it.
    let _ = to.flush();
}
