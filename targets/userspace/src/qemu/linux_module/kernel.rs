//! Finding a Debian kernel and its headers: what is installed, else packages unpacked below `target/linux`, for
//! which no privileges are needed.

use crate::Failure;
use crate::qemu::build::step;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A kernel that can be booted and built for.
#[derive(Debug)]
pub struct GuestKernel {
    /// As `uname -r` says it.
    pub release: String,
    /// What boots.
    pub image: PathBuf,
    /// Holds `kernel/drivers/...`.
    pub modules: PathBuf,
    /// For the module's build.
    pub headers: PathBuf,
}

fn told(path: &Path) -> impl Fn(std::io::Error) -> Failure + '_ {
    move |error| Failure::new(format!("{}: {error}", path.display()))
}

/// Which of Debian's kernels of a series.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// For virtual machines: small, and without USB.
    Cloud,
    /// For all machines.
    Generic,
}

impl Flavour {
    /// Behind the version in a release's name.
    fn suffix(self) -> &'static str {
        match self {
            Self::Cloud => "-cloud-amd64",
            Self::Generic => "-amd64",
        }
    }
}

/// A kernel of `series` ("6.1", "6.12"); packages are unpacked below `store`.
pub fn find(series: &str, flavour: Flavour, store: &Path) -> Result<GuestKernel, Failure> {
    let newest = || newest_release(series, flavour);
    // What is here before what is new, so that a run needs the network only once.
    let release = match newest_in(Path::new("/usr/src"), "linux-headers-", series, flavour)
        .or_else(|| newest_in(store, "", series, flavour))
    {
        Some(release) => release,
        None => newest()?,
    };
    match complete(&release, store) {
        // Headers of a release whose image was taken from the mirror: then the newest of both.
        Err(error) => match newest()? {
            other if other != release => complete(&other, store),
            _ => Err(error),
        },
        found => found,
    }
}

fn complete(release: &str, store: &Path) -> Result<GuestKernel, Failure> {
    let root = store.join(release);
    let installed = (
        PathBuf::from(format!("/boot/vmlinuz-{release}")),
        PathBuf::from(format!("/lib/modules/{release}/kernel")),
    );
    let (image, modules) = if fs::File::open(&installed.0).is_ok() && installed.1.is_dir() {
        installed
    } else {
        let image = root.join(format!("boot/vmlinuz-{release}"));
        if !image.is_file() {
            let package = format!("linux-image-{release}");
            unpack(&[package], &root)
                .or_else(|_| unpack(&[format!("linux-image-{release}-unsigned")], &root))?;
        }
        (image, root.join(format!("lib/modules/{release}/kernel")))
    };
    let mut headers = PathBuf::from(format!("/usr/src/linux-headers-{release}"));
    if module_build::release(&headers).is_err() {
        headers = root.join(headers.strip_prefix("/").unwrap_or(&headers));
        if module_build::release(&headers).is_err() {
            unpack_headers(release, &root, &headers)?;
        }
    }
    Ok(GuestKernel { release: release.into(), image, modules, headers })
}

fn matches(release: &str, series: &str, flavour: Flavour) -> bool {
    let version = release.strip_suffix(flavour.suffix());
    let rest = version.and_then(|version| version.strip_prefix(series));
    // Others than the generic one have their name in front: 6.1.0-56-rt-amd64.
    rest.is_some_and(|rest| rest.starts_with('.') && !rest.ends_with("-cloud") && !rest.ends_with("-rt"))
}

fn newest_in(dir: &Path, prefix: &str, series: &str, flavour: Flavour) -> Option<String> {
    let names = fs::read_dir(dir).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names
        .filter_map(|name| Some(name.strip_prefix(prefix)?.to_owned()))
        .filter(|name| matches(name, series, flavour))
        .max()
}

/// What Debian's own package of the series depends on now.
fn newest_release(series: &str, flavour: Flavour) -> Result<String, Failure> {
    let suffix = flavour.suffix();
    for meta in [format!("linux-image-{series}{suffix}"), format!("linux-image{suffix}")] {
        let found =
            depends(&meta).into_iter().filter_map(|name| Some(name.strip_prefix("linux-image-")?.to_owned()));
        if let Some(release) = found.filter(|release| matches(release, series, flavour)).max() {
            return Ok(release);
        }
    }
    Err(Failure::new(format!(
        "no Debian kernel {series} ({suffix}) is known here: on Debian 12 run `apt-get update` as root (6.12 comes \
         from bookworm-backports or bookworm-security), elsewhere use --on userspace"
    )))
}

fn depends(package: &str) -> Vec<String> {
    let output = Command::new("apt-cache").args(["depends", package]).env("LC_ALL", "C").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().filter_map(|line| Some(line.trim().strip_prefix("Depends: ")?.to_owned())).collect()
}

/// Downloads packages and unpacks them into `root`.
fn unpack(packages: &[String], root: &Path) -> Result<(), Failure> {
    let dir = root.join("packages");
    fs::create_dir_all(&dir).map_err(told(&dir))?;
    let mut download = Command::new("apt-get");
    download.arg("download").args(packages).current_dir(&dir);
    let what = format!("downloading {}", packages.join(", "));
    step(&what, download).map_err(|error| {
        Failure::new(format!("{error}; `apt-get update` as root brings the list of packages up to date"))
    })?;
    for entry in fs::read_dir(&dir).map_err(told(&dir))? {
        let package = entry.map_err(told(&dir))?.path();
        let mut dpkg = Command::new("dpkg-deb");
        dpkg.arg("-x").arg(&package).arg(root);
        step(&format!("unpacking {}", package.file_name().unwrap_or_default().to_string_lossy()), dpkg)?;
    }
    fs::remove_dir_all(&dir).map_err(told(&dir))
}

fn unpack_headers(release: &str, root: &Path, headers: &Path) -> Result<(), Failure> {
    let package = format!("linux-headers-{release}");
    let mut packages = depends(&package);
    packages.retain(|name| name.starts_with("linux-headers-") || name.starts_with("linux-kbuild-"));
    packages.push(package);
    unpack(&packages, root)?;
    // It includes the common half by its path as installed.
    let makefile = headers.join("Makefile");
    let text = fs::read_to_string(&makefile).map_err(told(&makefile))?;
    let text = text.replace("include /usr/src/", &format!("include {}/usr/src/", root.display()));
    fs::write(&makefile, text).map_err(told(&makefile))
}

/// A busybox that needs no libraries: the installed one, else the package's.
pub fn busybox(store: &Path) -> Result<PathBuf, Failure> {
    let unpacked = store.join("busybox-static/bin/busybox");
    for path in [Path::new("/bin/busybox"), &unpacked] {
        if fs::read(path).is_ok_and(|program| is_static(&program)) {
            return Ok(path.into());
        }
    }
    unpack(&["busybox-static".to_owned()], &store.join("busybox-static"))?;
    Ok(unpacked)
}

/// Whether an ELF64 program has no interpreter (elf(5)).
fn is_static(program: &[u8]) -> bool {
    const PT_INTERP: [u8; 4] = [3, 0, 0, 0];
    let number = |at: usize, len: usize| {
        let bytes = program.get(at..at + len)?;
        bytes
            .iter()
            .rev()
            .try_fold(0usize, |value, byte| value.checked_mul(256)?.checked_add(usize::from(*byte)))
    };
    let headers = || Some((number(32, 8)?, number(54, 2)?, number(56, 2)?));
    let Some((start, size, count)) = headers().filter(|_| program.starts_with(b"\x7fELF\x02\x01")) else {
        return false;
    };
    (0..count).all(|i| {
        let at = start.saturating_add(i * size);
        program.get(at..at.saturating_add(4)).is_some_and(|kind| kind != PT_INTERP)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_is_not_a_prefix() {
        let matches = |release, series| {
            [Flavour::Cloud, Flavour::Generic].map(|flavour| matches(release, series, flavour))
        };
        assert_eq!(matches("6.1.0-56-cloud-amd64", "6.1"), [true, false]);
        assert_eq!(matches("6.1.0-56-amd64", "6.1"), [false, true]);
        assert_eq!(matches("6.12.117+deb12-cloud-amd64", "6.1"), [false, false]);
        assert_eq!(matches("6.12.117+deb12-amd64", "6.12"), [false, true]);
        assert_eq!(matches("6.1.0-56-rt-amd64", "6.1"), [false, false]);
    }

    #[test]
    fn tells_static_programs() {
        let dynamic = fs::read("/bin/ls").unwrap();
        assert!(!is_static(&dynamic));
        assert!(!is_static(b"#!/bin/sh"));
        assert!(!is_static(&dynamic[..60]));
    }
}
