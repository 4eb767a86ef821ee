//! `--on linux-module`: a Debian kernel booted in QEMU, which loads the module.
//!
//! The guest's Linux bridges its virtio-net interface with the module's `ak0`, so our stack is on QEMU's network with an
//! address of its own, and Linux has none. Disks are virtio-blk devices of Linux, opened by the module.

pub mod guest;
pub mod initramfs;
pub mod kernel;

use super::{Machine, build};
use crate::{Failure, RunSpec, UsbSpec};
use anykernel::config::Config;
use hypercall::ExitStatus;
use kernel::Flavour;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Which kernel to boot unless the environment variable `ANYKERNEL_LINUX` says another series.
const SERIES: &str = "6.1";

const DEFAULT_MEMORY: u64 = 512 << 20;

/// Less, and Linux does not start.
const LEAST_MEMORY: u64 = 128 << 20;

/// What the guest's own drivers are, in the order of loading. Which of them are built in differs between kernels.
pub const MODULES: [&str; 16] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "llc",
    "stp",
    "bridge",
    "usb_common",
    "usbcore",
    "xhci_hcd",
    "xhci_pci",
];

/// Linux's own driver for USB disks and what it needs: in the guest, for tests that load it.
const STORAGE: [&str; 3] = ["scsi_common", "scsi_mod", "usb_storage"];

/// Builds the module if it is not up to date, boots the kernel, loads the module and waits until it ends.
///
/// Errors are lines for a person. The guest's own end is an `Ok`.
pub fn run(spec: &RunSpec) -> Result<ExitStatus, Failure> {
    let series = std::env::var("ANYKERNEL_LINUX").unwrap_or_else(|_| SERIES.into());
    let (ended, code, _) = boot(spec, &series, None)?;
    let ended = ended?;
    if ended != ExitStatus::Success {
        return Ok(ended);
    }
    status_of(code.trim())
        .or_else(|| crate::interrupt::interrupted().then_some(ended))
        .ok_or_else(|| Failure::new("Linux stopped before the application ended: see its last words above"))
}

/// What a test's guest left.
#[derive(Debug)]
pub struct Said {
    /// How QEMU ended.
    pub ended: Result<ExitStatus, Failure>,
    /// What the script wrote to `/dev/ttyS1`.
    pub lines: String,
    /// The console: the kernel's messages, and its last words if it died.
    pub console: String,
}

impl Said {
    /// The console's last 40 lines, for whoever has to find out why a guest stopped; if it panicked, those before the panic
    /// and all that it said of it, which is as long as its stack was deep.
    pub fn last_words(&self) -> String {
        const LINES: usize = 40;
        let lines: Vec<&str> = self.console.lines().collect();
        let panic = lines.iter().position(|line| line.contains("Kernel panic")).unwrap_or(lines.len());
        lines[panic.saturating_sub(LINES)..].join("\n")
    }
}

/// Boots a kernel of `series` ("6.1" or "6.12") for a test: `script` is run by its shell, as the first process, with the
/// module at `/lib/anykernel.ko`. The kernel is told to panic, and so to say why, of what it would only warn on other
/// days: an oops, a CPU or a task that is stuck. A guest that takes longer than `limit` is stopped.
///
/// The script ends with `end STATUS`, which turns the machine off. Errors: it could not be started at all.
pub fn run_script(spec: &RunSpec, series: &str, script: &str, limit: Duration) -> Result<Said, Failure> {
    let (ended, lines, console) = boot(spec, series, Some((script, limit)))?;
    Ok(Said { ended, lines, console })
}

/// The kernel's parameters. Of the kernel itself only a panic is said on the console (level 1: with 0 not even that), the
/// module's messages are passed on by init.
const QUIET: &str = "console=ttyS0 quiet loglevel=1 panic=-1 oops=panic no_timer_check";

/// As [`QUIET`] for tests, whose guests must not stop without a word.
const LOUD: &str = "console=ttyS0 loglevel=7 panic=-1 oops=panic no_timer_check softlockup_panic=1 \
    rcupdate.rcu_cpu_stall_timeout=30 sysctl.kernel.panic_on_rcu_stall=1 \
    sysctl.kernel.hung_task_timeout_secs=60 sysctl.kernel.hung_task_panic=1";

/// Where kernels are kept.
fn store() -> Result<PathBuf, Failure> {
    Ok(build::workspace()?.join("target/linux"))
}

/// The module, which nobody builds anew while the lock is held.
fn built(kernel: &kernel::GuestKernel, feature: Option<String>) -> Result<(PathBuf, fs::File), Failure> {
    let workspace = build::workspace()?;
    let exclusive = build::exclusive(&workspace.join("target/linux-module"))?;
    let plan = module_build::Build { workspace, kernel: kernel.headers.clone(), feature };
    Ok((module_build::build::<Failure>(&plan, &mut build::step)?.path, exclusive))
}

/// Builds the module for Debian's kernel of a series if it is not up to date, and says where it is.
pub fn module(series: &str) -> Result<PathBuf, Failure> {
    Ok(built(&kernel::find(series, Flavour::Cloud, &store()?)?, None)?.0)
}

/// How QEMU ended, what came out of the second serial port, and out of the first, if there was a script.
type Booted = (Result<ExitStatus, Failure>, String, String);

fn boot(spec: &RunSpec, series: &str, script: Option<(&str, Duration)>) -> Result<Booted, Failure> {
    if spec.memory.is_some_and(|memory| memory < LEAST_MEMORY) {
        return Err(Failure::usage(format!(
            "Linux needs at least {} MiB: give --memory more, or use --on userspace",
            LEAST_MEMORY >> 20
        )));
    }
    let store = store()?;
    // The small kernel knows no USB.
    let flavour = if spec.usb.is_empty() { Flavour::Cloud } else { Flavour::Generic };
    let kernel = kernel::find(series, flavour, &store)?;
    let text = script.map(|(text, _)| text);
    let archive = {
        let (module, _exclusive) = built(&kernel, spec.layer().map(Into::into))?;
        initramfs(spec, &kernel, &module, &kernel::busybox(&store)?, text)?
    };

    let initrd = Temporary::new(&store, "initrd", &archive)?;
    let status = Temporary::new(&store, "status", b"")?;
    let console = Temporary::new(&store, "console", b"")?;
    let mut machine = Machine::q35(super::machine::LINUX, spec, DEFAULT_MEMORY);
    machine.self_modifying(spec.cpus).powers_off().kernel(&kernel.image).arg("-initrd").arg(&initrd.0);
    match script {
        Some((_, limit)) => machine.console(&console.0).limit(limit).args(["-append", LOUD]),
        None => machine.args(["-append", QUIET]),
    };
    let mut serial = std::ffi::OsString::from("file:");
    serial.push(&status.0);
    machine.arg("-serial").arg(serial);
    let ended = machine.run(spec);
    let text =
        |file: &Temporary| String::from_utf8_lossy(&fs::read(&file.0).unwrap_or_default()).into_owned();
    Ok((ended, text(&status), text(&console)))
}

fn status_of(code: &str) -> Option<ExitStatus> {
    let all = [ExitStatus::Success, ExitStatus::Failure, ExitStatus::Usage, ExitStatus::Panic];
    let code: u8 = code.parse().ok()?;
    all.into_iter().find(|status| status.code() == code)
}

/// A file that is deleted when dropped.
struct Temporary(PathBuf);

impl Temporary {
    /// Its name is this process's and this call's alone.
    fn new(dir: &Path, name: &str, content: &[u8]) -> Result<Self, Failure> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let path =
            dir.join(format!("{name}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        let written = fs::create_dir_all(dir).and_then(|()| fs::write(&path, content));
        written.map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
        Ok(Self(path))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Whoever took it away did our work.
        let _ = fs::remove_file(&self.0);
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    fs::read(path).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

fn initramfs(
    spec: &RunSpec,
    kernel: &kernel::GuestKernel,
    module: &Path,
    busybox: &Path,
    script: Option<&str>,
) -> Result<Vec<u8>, Failure> {
    let mut root = initramfs::Initramfs::default();
    for directory in ["bin", "dev", "lib", "proc", "sys"] {
        root.directory(directory);
    }
    root.file("bin/busybox", &read(busybox)?);
    root.file("init", include_bytes!("linux_module/init.sh"));
    if let Some(script) = script {
        root.file("script", script.as_bytes());
    }
    root.file("modules", MODULES.join("\n").as_bytes());
    // Linux looks for them in its own time, and what is to be mounted must be there.
    root.file("usb", spec.usb.len().to_string().as_bytes());
    root.file("parameters", parameters(spec).as_bytes());
    root.file("config.json", config(spec).to_json().as_bytes());
    root.file("lib/anykernel.ko", &read(module)?);
    let mut files = Vec::new();
    find_modules(&kernel.modules, &mut files);
    for (name, path) in files {
        root.file(&format!("lib/{name}"), &read(&path)?);
    }
    Ok(root.finish())
}

/// What is plugged in to the guest is for the module, not for Linux.
fn config(spec: &RunSpec) -> Config {
    let mut config = spec.config.clone();
    for device in &spec.usb {
        let classes: &[&str] = match device {
            UsbSpec::Disk(_) => &["class:08"],
            UsbSpec::Keyboard | UsbSpec::Mouse => &["class:03"],
            UsbSpec::Net => &["class:02"],
            UsbSpec::Hub => &[],
            UsbSpec::Host(_) => &["class:02", "class:03", "class:08"],
        };
        for class in classes {
            if !config.usb.iter().any(|one| one == class) {
                config.usb.push((*class).into());
            }
        }
    }
    config
}

/// The module's parameters beside `links`, separated by spaces.
fn parameters(spec: &RunSpec) -> String {
    let mut text = String::from("config_file=/config.json");
    for (i, disk) in spec.disks.iter().enumerate() {
        text += if i == 0 { " disk=" } else { "," };
        // Linux names virtio disks vda, vdb... in the order of the PCI bus, which is ours.
        let letter = char::from(b'a' + u8::try_from(i).unwrap_or(25).min(25));
        let _ = write!(text, "/dev/vd{letter}{}", if disk.writable { ":rw" } else { "" });
    }
    text
}

/// Those of [`MODULES`] and of USB storage that the kernel has as files, compressed or not.
pub fn find_modules(dir: &Path, found: &mut Vec<(String, PathBuf)>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if path.is_dir() {
            find_modules(&path, found);
        } else if name
            .split_once('.')
            .map(|(stem, _)| stem.replace('-', "_"))
            .is_some_and(|stem| [&MODULES[..], &STORAGE].concat().contains(&stem.as_str()))
        {
            found.push((name, path));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_have_all_of_a_panic() {
        let said = |lines: &[String]| {
            Said { ended: Ok(ExitStatus::Success), lines: String::new(), console: lines.join("\r\n") }
                .last_words()
        };
        let mut lines: Vec<_> = (0..100).map(|n| format!("line {n}")).collect();
        assert_eq!(said(&lines).lines().collect::<Vec<_>>(), lines[60..]);
        assert_eq!(said(&lines[..3]).lines().count(), 3);
        lines[50] = "Kernel panic - not syncing".into();
        assert_eq!(said(&lines).lines().collect::<Vec<_>>(), lines[10..]);
    }
}
