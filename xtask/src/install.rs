//! What the tests need beside cargo, and how it gets here.

use crate::sh::{self, Result, quiet, step};
use module_build::toolchain::{DEBIAN_PACKAGES, Need, TARGET, Toolchain};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

/// A file whose presence shows that the package is there.
const PACKAGES: &[(&str, &str)] = &[
    ("/usr/bin/qemu-system-x86_64", "qemu-system-x86"),
    ("/sbin/mkfs.ext4", "e2fsprogs"),
    ("/sbin/mkfs.fat", "dosfstools"),
    ("/usr/bin/mcopy", "mtools"),
    ("/usr/bin/curl", "curl"),
    ("/bin/busybox", "busybox-static"),
    ("/usr/bin/make", "make"),
    ("/usr/bin/gcc", "gcc"),
    ("/usr/bin/ld", "binutils"),
    ("/usr/bin/gdb", "gdb"),
    ("/sbin/sfdisk", "fdisk"),
    ("/sbin/sgdisk", "gdisk"),
    ("/sbin/ip", "iproute2"),
    ("/usr/bin/cpio", "cpio"),
    ("/sbin/depmod", "kmod"),
    ("/usr/bin/bc", "bc"),
    ("/usr/include/libelf.h", "libelf-dev"),
    ("/usr/bin/xz", "xz-utils"),
    ("/usr/bin/lsusb", "usbutils"),
    ("/usr/bin/tshark", "tshark"),
];

/// What benchmarks compare with and load with.
const PEERS: &[(&str, &str)] = &[("/usr/sbin/nginx", "nginx-light"), ("/usr/bin/wrk", "wrk")];

/// Debian's meta packages of the kernels that the module is built for and tested in.
const KERNEL_HEADERS: [&str; 2] = ["linux-headers-cloud-amd64", "linux-headers-6.12-cloud-amd64"];

/// Installs everything, or says in one line what the user has to do.
pub(crate) fn everything() -> Result {
    rust_parts()?;
    debian_packages()
}

/// Installs what the benchmarks compare with.
pub(crate) fn benchmark_peers() -> Result {
    install(missing(PEERS))
}

fn debian_packages() -> Result {
    let mut packages = missing(PACKAGES);
    packages.extend(KERNEL_HEADERS.iter().filter(|package| !package_installed(package)));
    install(packages)
}

fn missing(known: &[(&'static str, &'static str)]) -> BTreeSet<&'static str> {
    known
        .iter()
        // /sbin and /bin may be links into /usr or not.
        .filter(|(file, _)| !Path::new(file).exists() && !Path::new("/usr").join(&file[1..]).exists())
        .map(|(_, package)| *package)
        .collect()
}

fn install(packages: BTreeSet<&str>) -> Result {
    if packages.is_empty() {
        return Ok(());
    }
    let list: Vec<&str> = packages.into_iter().collect();
    let by_hand = format!("apt-get install --no-install-recommends {}", list.join(" "));
    if !is_root() {
        return Err(format!("missing packages; run as root: {by_hand}"));
    }
    step(&format!("installing {}", list.join(" ")));
    quiet(Command::new("apt-get").args(["update", "-qq"]))?;
    quiet(
        Command::new("apt-get")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["install", "-y", "-qq", "--no-install-recommends"])
            .args(&list),
    )
    .map(drop)
    .map_err(|error| format!("{error}\nxtask: install by hand: {by_hand}"))
}

fn package_installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["-W", "-f", "${Status}", package])
        .output()
        .is_ok_and(|output| output.stdout.ends_with(b"install ok installed"))
}

fn is_root() -> bool {
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| {
        status.lines().any(|line| {
            line.strip_prefix("Uid:").is_some_and(|ids| ids.split_whitespace().nth(1) == Some("0"))
        })
    })
}

/// The bare-metal target and the library source that the kernel module is built from: from rustup, else, as root, from
/// Debian.
fn rust_parts() -> Result {
    let parts = [("target", TARGET, TARGET), ("component", "rust-src", "src/rust/library/core")];
    let sysroot = quiet(Command::new("rustc").args(["--print", "sysroot"]).current_dir(sh::root()))
        .map(|path| Path::new(String::from_utf8_lossy(&path).trim()).join("lib/rustlib"));
    for (kind, name, place) in parts {
        if sysroot.as_ref().is_ok_and(|lib| !lib.join(place).exists()) {
            step(&format!("rustup {kind} add {name}"));
            if let Err(error) =
                quiet(Command::new("rustup").args([kind, "add", name]).current_dir(sh::root()))
            {
                step(&format!("rustup cannot: {}", error.lines().last().unwrap_or_default()));
            }
        }
    }
    let complete = || Toolchain::find(Need::Core).and_then(|_| Toolchain::find(Need::Source)).map(drop);
    if complete().is_err() && is_root() {
        install(DEBIAN_PACKAGES.into())?;
    }
    complete()
}
