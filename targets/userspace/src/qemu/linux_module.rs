//! `--on linux-module`: a Debian kernel booted in QEMU, which loads the module.
//!
//! The guest's Linux bridges its virtio-net interface with the module's `ak0`, so our stack is on QEMU's network with an
//! address of its own, and Linux has none. Disks are virtio-blk devices of Linux, opened by the module.

pub mod initramfs;
pub mod kernel;

use super::{Machine, build};
use crate::{Failure, RunSpec};
use hypercall::ExitStatus;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Which kernel to boot unless the environment variable `ANYKERNEL_LINUX` says another series.
const SERIES: &str = "6.1";

const DEFAULT_MEMORY: u64 = 512 << 20;

/// Less, and Linux does not start.
const LEAST_MEMORY: u64 = 128 << 20;

/// What the guest's own drivers are, in the order of loading. Which of them are built in differs between kernels.
pub const MODULES: [&str; 12] = [
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
];

/// Builds the module if it is not up to date, boots the kernel, loads the module and waits until it ends.
///
/// Errors are lines for a person. The guest's own end is an `Ok`.
pub fn run(spec: &RunSpec) -> Result<ExitStatus, Failure> {
    let series = std::env::var("ANYKERNEL_LINUX").unwrap_or_else(|_| SERIES.into());
    let (ended, code) = boot(spec, &series, None)?;
    if ended != ExitStatus::Success || crate::interrupt::interrupted() {
        return Ok(ended);
    }
    status_of(code.trim())
        .ok_or_else(|| Failure::new("Linux stopped before the application ended: see its last words above"))
}

/// Boots a kernel of `series` ("6.1" or "6.12") for a test: `script` is run by its shell, as the first process, with the
/// module at `/lib/anykernel.ko`. Returns what the script wrote to `/dev/ttyS1`.
///
/// The script ends with `end STATUS`, which turns the machine off.
pub fn run_script(spec: &RunSpec, series: &str, script: &str) -> Result<String, Failure> {
    boot(spec, series, Some(script)).map(|(_, text)| text)
}

/// How QEMU ended, and what came out of the second serial port.
fn boot(spec: &RunSpec, series: &str, script: Option<&str>) -> Result<(ExitStatus, String), Failure> {
    if spec.trace.is_some() {
        return Err(Failure::usage("--trace works with --on userspace only"));
    }
    if spec.memory.is_some_and(|memory| memory < LEAST_MEMORY) {
        return Err(Failure::usage(format!(
            "Linux needs at least {} MiB: give --memory more, or use --on userspace",
            LEAST_MEMORY >> 20
        )));
    }
    let workspace = build::workspace()?;
    let store = workspace.join("target/linux");
    let kernel = kernel::find(series, &store)?;
    let plan = module_build::Build { workspace, kernel: kernel.headers.clone() };
    let module = module_build::build::<Failure>(&plan, &mut build::step)?;
    let archive = initramfs(spec, &kernel, &module.path, &kernel::busybox(&store)?, script)?;

    let initrd = Temporary::new(&store, "initrd", &archive)?;
    let status = Temporary::new(&store, "status", b"")?;
    let mut machine = Machine::q35("Linux", spec, DEFAULT_MEMORY);
    machine.kernel(&kernel.image).arg("-initrd").arg(&initrd.0);
    // Only a panic of the kernel itself is said on the console: the module's messages are passed on by init.
    machine.args(["-append", "console=ttyS0 quiet loglevel=0 panic=-1 oops=panic no_timer_check"]);
    let mut serial = std::ffi::OsString::from("file:");
    serial.push(&status.0);
    machine.arg("-serial").arg(serial);
    let ended = machine.run(spec)?;
    Ok((ended, fs::read_to_string(&status.0).unwrap_or_default()))
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
    root.file("parameters", parameters(spec).as_bytes());
    root.file("config.json", spec.config.to_json().as_bytes());
    root.file("lib/anykernel.ko", &read(module)?);
    let mut files = Vec::new();
    find_modules(&kernel.modules, &mut files);
    for (name, path) in files {
        root.file(&format!("lib/{name}"), &read(&path)?);
    }
    Ok(root.finish())
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

/// Those of [`MODULES`] that the kernel has as files, compressed or not.
pub fn find_modules(dir: &Path, found: &mut Vec<(String, PathBuf)>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if path.is_dir() {
            find_modules(&path, found);
        } else if name
            .split_once('.')
            .is_some_and(|(stem, _)| MODULES.contains(&stem.replace('-', "_").as_str()))
        {
            found.push((name, path));
        }
    }
}
