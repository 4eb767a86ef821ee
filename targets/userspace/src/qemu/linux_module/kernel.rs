//! Finding a Debian cloud kernel and its headers: what is installed, else packages unpacked below `target/linux`, for
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

/// A kernel of `series` ("6.1", "6.12"); packages are unpacked below `store`.
pub fn find(series: &str, store: &Path) -> Result<GuestKernel, Failure> {
    let newest = || newest_release(series);
    // What is here before what is new, so that a run needs the network only once.
    let release = match installed_headers(series).or_else(|| unpacked(series, store)) {
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

/// Debian's kernel for all machines, with its drivers for USB.
#[derive(Debug)]
pub struct GenericKernel {
    /// What boots.
    pub image: PathBuf,
    /// Holds `drivers/...`.
    pub modules: PathBuf,
}

/// The newest generic kernel of `series`, unpacked below `store`.
pub fn find_generic(series: &str, store: &Path) -> Result<GenericKernel, Failure> {
    let is_one = |release: &str| {
        release.starts_with(&format!("{series}."))
            && release.strip_suffix("-amd64").is_some_and(|rest| !rest.ends_with(char::is_alphabetic))
    };
    let names = fs::read_dir(store).into_iter().flatten().flatten();
    let unpacked = names.filter_map(|entry| entry.file_name().into_string().ok());
    let unpacked = unpacked
        .filter(|name| is_one(name) && store.join(name).join(format!("boot/vmlinuz-{name}")).is_file());
    let known = || {
        let images = depends("linux-image-amd64").into_iter();
        images
            .filter_map(|name| Some(name.strip_prefix("linux-image-")?.to_owned()))
            .find(|name| is_one(name))
    };
    let Some(release) = unpacked.max().or_else(known) else {
        return Err(Failure::new(format!(
            "no Debian kernel {series} is known here: on Debian 12 run `apt-get update` as root"
        )));
    };
    let root = store.join(&release);
    let image = root.join(format!("boot/vmlinuz-{release}"));
    if !image.is_file() {
        unpack(&[format!("linux-image-{release}")], &root)?;
    }
    Ok(GenericKernel { image, modules: root.join(format!("lib/modules/{release}/kernel")) })
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

fn matches(release: &str, series: &str) -> bool {
    release.strip_prefix(series).is_some_and(|rest| rest.starts_with('.'))
        && release.ends_with("-cloud-amd64")
}

fn newest_in(dir: &Path, prefix: &str, series: &str) -> Option<String> {
    let names = fs::read_dir(dir).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names
        .filter_map(|name| Some(name.strip_prefix(prefix)?.to_owned()))
        .filter(|name| matches(name, series))
        .max()
}

fn installed_headers(series: &str) -> Option<String> {
    newest_in(Path::new("/usr/src"), "linux-headers-", series)
}

fn unpacked(series: &str, store: &Path) -> Option<String> {
    newest_in(store, "", series)
}

/// What Debian's own package of the series depends on now.
fn newest_release(series: &str) -> Result<String, Failure> {
    let metas = [format!("linux-image-{series}-cloud-amd64"), "linux-image-cloud-amd64".to_owned()];
    for meta in &metas {
        let found =
            depends(meta).into_iter().filter_map(|name| Some(name.strip_prefix("linux-image-")?.to_owned()));
        if let Some(release) = found.filter(|release| matches(release, series)).max() {
            return Ok(release);
        }
    }
    Err(Failure::new(format!(
        "no Debian cloud kernel {series} is known here: on Debian 12 run `apt-get update` as root (6.12 comes from \
         bookworm-backports or bookworm-security), elsewhere use --on userspace"
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
        assert!(matches("6.1.0-56-cloud-amd64", "6.1"));
        assert!(!matches("6.12.117+deb12-cloud-amd64", "6.1"));
        assert!(!matches("6.1.0-56-amd64", "6.1"));
    }

    #[test]
    fn tells_static_programs() {
        let dynamic = fs::read("/bin/ls").unwrap();
        assert!(!is_static(&dynamic));
        assert!(!is_static(b"#!/bin/sh"));
        assert!(!is_static(&dynamic[..60]));
    }
}
