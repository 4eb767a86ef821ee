//! A Debian guest with the generic kernel and a root in memory, for tests and benchmarks: some of the kernel's own drivers, some
//! programs of this machine, and a script.

use super::initramfs::Initramfs;
use super::kernel::{self, Flavour, GuestKernel};
use super::{Temporary, built, read, store};
use crate::Failure;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is done before the script. The first serial port carries what it writes; the drivers are in `/modules`, in order.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
stty -F /dev/ttyS0 raw
for name in $(cat /modules); do insmod "/lib/$name.ko" || echo "no driver $name"; done
. /script
sync
poweroff -f
sleep 60
"#;

/// How the kernel is started: quiet, and with no patience for faults of its own.
pub const PARAMETERS: &str = "console=ttyS0 quiet loglevel=1 panic=-1 oops=panic no_timer_check";

/// The files of a guest.
pub struct DebianGuest {
    root: Initramfs,
    made: BTreeSet<String>,
    kernel: GuestKernel,
    /// Every driver of the kernel, by the name that other drivers know it by.
    drivers: BTreeMap<String, PathBuf>,
    /// Those to be loaded.
    order: Vec<String>,
}

fn told(path: &Path) -> impl Fn(std::io::Error) -> Failure + '_ {
    move |error| Failure::new(format!("{}: {error}", path.display()))
}

fn find_drivers(dir: &Path, found: &mut BTreeMap<String, PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            find_drivers(&path, found);
        } else if let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".ko")) {
            found.insert(name.replace('-', "_"), path.clone());
        }
    }
}

/// What a driver says that it needs (its `.modinfo` section).
fn depends(module: &[u8]) -> Vec<String> {
    let mut fields = module.split(|byte| *byte == 0);
    let list = fields.find_map(|field| std::str::from_utf8(field).ok()?.strip_prefix("depends="));
    list.unwrap_or_default().split(',').filter(|name| !name.is_empty()).map(Into::into).collect()
}

impl DebianGuest {
    /// A guest with Debian's generic kernel 6.1 that runs `script` with busybox's shell and then turns itself off.
    pub fn new(script: &str) -> Result<Self, Failure> {
        let store = store()?;
        let kernel = kernel::find("6.1", Flavour::Generic, &store)?;
        let mut drivers = BTreeMap::new();
        find_drivers(&kernel.modules, &mut drivers);
        let (root, made) = (Initramfs::default(), BTreeSet::new());
        let mut this = Self { root, made, kernel, drivers, order: Vec::new() };
        for directory in ["dev", "proc", "sys", "tmp", "lib", "lib64", "mnt"] {
            this.made.insert(directory.into());
            this.root.directory(directory);
        }
        this.file("bin/busybox", &read(&kernel::busybox(&store)?)?);
        this.file("init", INIT.as_bytes());
        this.file("script", script.as_bytes());
        Ok(this)
    }

    /// A file that may be executed, with the directories that it lies in.
    pub fn file(&mut self, to: &str, content: &[u8]) {
        for (at, _) in to.match_indices('/') {
            if self.made.insert(to[..at].into()) {
                self.root.directory(&to[..at]);
            }
        }
        if self.made.insert(to.into()) {
            self.root.file(to, content);
        }
    }

    /// A program of this machine without its symbols, and the libraries that ldd(1) names.
    pub fn program(&mut self, from: &Path, to: &str) -> Result<(), Failure> {
        let output = Command::new("ldd").arg(from).output().map_err(told(Path::new("ldd")))?;
        for word in
            String::from_utf8_lossy(&output.stdout).split_whitespace().filter(|word| word.starts_with('/'))
        {
            self.file(word.trim_start_matches('/'), &read(Path::new(word))?);
        }
        let bare = Temporary::new(&store()?, "stripped", b"")?;
        let stripped = Command::new("strip").arg("-o").arg(&bare.0).arg(from).status();
        let content = read(if stripped.is_ok_and(|status| status.success()) { &bare.0 } else { from });
        self.file(to, &content?);
        Ok(())
    }

    /// Drivers of the kernel, with what they need in front of them. They are loaded before the script runs.
    pub fn drivers(&mut self, names: &[&str]) -> Result<(), Failure> {
        for name in names {
            let name = name.replace('-', "_");
            if self.order.contains(&name) {
                continue;
            }
            // What is built in has no file.
            let Some(path) = self.drivers.get(&name).cloned() else {
                return Err(Failure::new(format!("the kernel has no driver {name}")));
            };
            let content = read(&path)?;
            let needs = depends(&content);
            self.drivers(&needs.iter().map(String::as_str).collect::<Vec<_>>())?;
            self.file(&format!("lib/{name}.ko"), &content);
            self.order.push(name);
        }
        Ok(())
    }

    /// Our module, built for this kernel if it is not up to date, as `/lib/anykernel.ko`.
    pub fn module(&mut self) -> Result<(), Failure> {
        let (path, _exclusive) = built(&self.kernel, None)?;
        self.file("lib/anykernel.ko", &read(&path)?);
        Ok(())
    }

    /// Writes the root to `initrd` and returns what boots.
    pub fn finish(mut self, initrd: &Path) -> Result<PathBuf, Failure> {
        let modules = self.order.join("\n");
        self.file("modules", modules.as_bytes());
        fs::write(initrd, self.root.finish()).map_err(told(initrd))?;
        Ok(self.kernel.image)
    }
}
