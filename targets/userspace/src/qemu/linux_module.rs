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
    let series = std::env::var("ANYKERNEL_LINUX").unwrap_or_else(|_| SERIES.into());
    let kernel = kernel::find(&series, &store)?;
    let plan = module_build::Build { workspace, kernel: kernel.headers.clone() };
    let module = module_build::build::<Failure>(&plan, &mut build::step)?;
    let archive = initramfs(spec, &kernel, &module.path, &kernel::busybox(&store)?)?;

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
    if ended != ExitStatus::Success || crate::interrupt::interrupted() {
        return Ok(ended);
    }
    let code = fs::read_to_string(&status.0).unwrap_or_default();
    status_of(code.trim()).ok_or_else(|| {
        Failure::new(format!(
            "Linux {} stopped before the application ended: see its last words above",
            kernel.release
        ))
    })
}

fn status_of(code: &str) -> Option<ExitStatus> {
    let all = [ExitStatus::Success, ExitStatus::Failure, ExitStatus::Usage, ExitStatus::Panic];
    let code: u8 = code.parse().ok()?;
    all.into_iter().find(|status| status.code() == code)
}

/// A file that is deleted when dropped.
struct Temporary(PathBuf);

impl Temporary {
    fn new(dir: &Path, name: &str, content: &[u8]) -> Result<Self, Failure> {
        let path = dir.join(format!("{name}-{}", std::process::id()));
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
) -> Result<Vec<u8>, Failure> {
    let mut root = initramfs::Initramfs::default();
    for directory in ["bin", "dev", "lib", "proc", "sys"] {
        root.directory(directory);
    }
    root.file("bin/busybox", &read(busybox)?);
    root.file("init", include_bytes!("linux_module/init.sh"));
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
