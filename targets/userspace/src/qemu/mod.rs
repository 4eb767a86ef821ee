//! Running a guest in QEMU: process, devices, console, exit status. Shared by the targets that boot.
//!
//! # What a target provides
//! One file, [`rumprun`] or [`linux_module`], with `run(&RunSpec) -> Result<ExitStatus, Failure>`, which
//! 1. builds what boots, with [`build::cargo`] or [`build::step`] (spinner, Ctrl-C and error output are theirs);
//! 2. makes a [`Machine`]: [`Machine::microvm`] or [`Machine::q35`], [`Machine::kernel`], [`Machine::arg`] for the rest.
//!    CPUs, memory, disks and the network come from the [`RunSpec`], already checked, as virtio devices in order
//!    (disks first), on virtio-mmio for microvm and PCI for q35;
//! 3. hands the guest `spec.config.to_json()` by a way of its own (`-append`, a second module, fw_cfg);
//! 4. calls [`Machine::run`], which streams the first serial port as the console until QEMU ends.
//!
//! # Exit status
//! The guest ends the machine by writing [`exit_value`] as one byte to port [`DEBUG_EXIT_PORT`]; QEMU then ends with twice
//! that plus one. QEMU's own failures (exit code 1) cannot be mistaken for it. A guest that powers off counts as success.

pub mod accel;
mod backlog;
pub mod build;
pub mod linux_module;
pub mod rumprun;
pub mod symbols;

pub use accel::Accelerator;

use crate::{Failure, NetSpec, RunSpec, interrupt};
use hypercall::ExitStatus;
use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// I/O port of the isa-debug-exit device (4 bytes long).
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// What a guest writes to [`DEBUG_EXIT_PORT`] to end with `status`: 16 more than its exit code.
pub const fn exit_value(status: ExitStatus) -> u8 {
    status.code() + 16
}

fn status_of(code: Option<i32>) -> Option<ExitStatus> {
    let all = [ExitStatus::Success, ExitStatus::Failure, ExitStatus::Usage, ExitStatus::Panic];
    match code? {
        0 => Some(ExitStatus::Success),
        code => all.into_iter().find(|status| i32::from(exit_value(*status)) * 2 + 1 == code),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bus {
    Mmio,
    Pci,
}

/// A virtual machine to be.
#[derive(Debug)]
pub struct Machine {
    bus: Bus,
    args: Vec<OsString>,
    name: &'static str,
    limit: Option<Duration>,
}

impl Machine {
    fn new(name: &'static str, bus: Bus, machine: &str, spec: &RunSpec, default_memory: u64) -> Self {
        let memory = spec.memory.unwrap_or(default_memory);
        let mut machine = Self { bus, args: vec!["-M".into(), machine.into()], name, limit: None };
        machine.args(Accelerator::detect().args());
        machine.args(["-smp", &spec.cpus.to_string(), "-m", &format!("{}k", memory >> 10)]);
        machine.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ]);
        machine.args(["-device", &format!("isa-debug-exit,iobase={DEBUG_EXIT_PORT:#x},iosize=4")]);
        machine.disks(spec);
        machine.network(spec);
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
            let mut drive = OsString::from(format!("if=none,id=disk{i},format=raw,"));
            drive.push(if disk.writable { "file.locking=on,file=" } else { "readonly=on,file=" });
            // A comma in a file name is written twice.
            drive.push(disk.path.to_string_lossy().replace(',', ",,"));
            self.arg("-drive").arg(drive);
            self.device("virtio-blk", &format!("drive=disk{i}"));
        }
    }

    fn network(&mut self, spec: &RunSpec) {
        let backend = match &spec.net {
            NetSpec::None => return,
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
        self.device("virtio-net", "netdev=net0");
        if let Some(file) = &spec.pcap {
            let mut filter = OsString::from("filter-dump,id=dump0,netdev=net0,file=");
            filter.push(file.to_string_lossy().replace(',', ",,"));
            self.arg("-object").arg(filter);
        }
    }

    /// Starts QEMU, streams the guest's console, and returns how the guest ended. Ctrl-C ends the machine.
    /// Call it on the main thread: QEMU dies with the thread that started it.
    pub fn run(&self, spec: &RunSpec) -> Result<ExitStatus, Failure> {
        if spec.net == NetSpec::User {
            ports_are_free(spec)?;
        }
        let start = Instant::now();
        let mut command = Command::new("qemu-system-x86_64");
        command.args(&self.args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        log::debug!("{command:?}");
        let mut qemu = Process::start(command).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Failure::new(
                "qemu-system-x86_64 is not installed: install it (Debian: apt-get install qemu-system-x86), or use \
                 --on userspace",
            ),
            _ => Failure::new(format!("cannot start qemu-system-x86_64: {error}")),
        })?;
        let bar = build::spinner(format!("booting {}", self.name));
        let json = spec.json;
        let stdout = qemu.child.stdout.take();
        let booting = bar.clone();
        let console = std::thread::spawn(move || stream_console(stdout, json, &booting));
        let stderr = qemu.child.stderr.take();
        let errors = std::thread::spawn(move || {
            let mut text = Vec::new();
            // What cannot be read cannot be shown.
            stderr.map(|mut from| from.read_to_end(&mut text));
            String::from_utf8_lossy(&text).into_owned()
        });
        let ended = AtomicBool::new(false);
        let status = std::thread::scope(|scope| {
            let addresses: Vec<_> = spec.publish.iter().map(|publish| publish.host).collect();
            let (child, over) = (qemu.child.id(), &ended);
            scope.spawn(move || backlog::widen(child, &addresses, over));
            scope.spawn(|| announce_server(spec, &bar, &ended));
            let status = qemu.wait(self.limit.map(|limit| start + limit));
            ended.store(true, Ordering::Release);
            status
        });
        let _ = console.join();
        let errors = errors.join().unwrap_or_default();
        match status {
            _ if interrupt::interrupted() => Ok(ExitStatus::Success),
            Ok(Some(status)) => match status_of(status.code()) {
                Some(status) => Ok(status),
                None => {
                    let why = errors.lines().last().unwrap_or("without a word");
                    Err(Failure::new(format!(
                        "QEMU ended with {status}: {}",
                        why.trim_start_matches("qemu-system-x86_64: ")
                    )))
                }
            },
            Ok(None) => Err(Failure::new(format!(
                "the guest did not end within {} s and was stopped",
                self.limit.unwrap_or_default().as_secs()
            ))),
            Err(error) => Err(Failure::new(format!("waiting for QEMU: {error}"))),
        }
    }
}

/// QEMU says it in a way that only QEMU's friends understand, so we look first.
fn ports_are_free(spec: &RunSpec) -> Result<(), Failure> {
    for publish in &spec.publish {
        TcpListener::bind(publish.host).map_err(|error| crate::spec::port_failure(publish.host, &error))?;
    }
    Ok(())
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

fn stream_console(from: Option<impl Read>, json: bool, bar: &indicatif::ProgressBar) {
    let Some(mut from) = from else { return };
    let mut buf = [0; 8192];
    let mut console = crate::spec::ConsoleLines::new(json);
    while let Ok(n) = from.read(&mut buf) {
        if n == 0 {
            break;
        }
        bar.finish_and_clear();
        console.write(&mut std::io::stdout().lock(), &buf[..n]);
    }
    bar.finish_and_clear();
    console.finish(&mut std::io::stdout().lock());
    // A standard output that is gone swallows it.
    let _ = std::io::stdout().flush();
}

/// A child that ends with us: on drop, on Ctrl-C, and by the kernel should we be killed.
pub struct Process {
    child: Child,
    _guard: interrupt::Guard,
}

impl Process {
    /// Starts it.
    pub fn start(mut command: Command) -> std::io::Result<Self> {
        die_with_parent(&mut command);
        let child = command.spawn()?;
        let pid = child.id();
        Ok(Self { child, _guard: interrupt::on_interrupt(move || kill(pid)) })
    }

    /// Waits for its end; `None` if the deadline came first, and it was killed.
    pub fn wait(&mut self, deadline: Option<Instant>) -> std::io::Result<Option<std::process::ExitStatus>> {
        let Some(deadline) = deadline else { return self.child.wait().map(Some) };
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.child.kill()?;
        self.child.wait()?;
        Ok(None)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks a child of ours to end. It must not have been waited for yet, else the number may be somebody else's.
fn kill(pid: u32) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid.cast_signed()) {
        // Fails only if it has ended already.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
}

/// The kernel ends the child when the thread that starts it ends, however that comes about; and the terminal's Ctrl-C
/// reaches only us, who then end it.
#[expect(unsafe_code, reason = "runs between fork and exec")]
fn die_with_parent(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    command.process_group(0);
    // SAFETY: the closure makes one system call and touches no memory of the parent.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
                .map_err(Into::into)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_come_back() {
        for status in [ExitStatus::Success, ExitStatus::Failure, ExitStatus::Usage, ExitStatus::Panic] {
            assert_eq!(status_of(Some(i32::from(exit_value(status)) * 2 + 1)), Some(status));
        }
        assert_eq!(status_of(Some(0)), Some(ExitStatus::Success));
        assert_eq!(status_of(Some(1)), None);
        assert_eq!(status_of(None), None);
    }

    #[test]
    fn a_process_ends_when_dropped_or_late() {
        let mut sleep = Command::new("sleep");
        sleep.arg("1000");
        let mut process = Process::start(sleep).unwrap();
        let pid = process.child.id();
        assert_eq!(process.wait(Some(Instant::now() + Duration::from_millis(20))).unwrap(), None);
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
}
