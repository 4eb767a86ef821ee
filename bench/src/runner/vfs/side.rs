//! Both sides behind one interface, so that the same loops measure them.

use crate::runner::{Result, run};
use anykernel::config::{Cache, Config, Mount};
use anykernel::fs::{FileKind, Namespace, OpenOptions};
use anykernel_userspace::{HostDisk, Instance};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

/// Twice the image: in the page cache as the image, and in the cache of a file system.
const MEMORY_BYTES: usize = 5 << 29;

/// Whose file system it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    Ours,
    Kernels,
}

/// A mounted image. Nothing of it is in any cache at first.
pub(super) enum Side {
    Ours { namespace: Arc<dyn Namespace>, _instance: Instance },
    Kernels { mount: PathBuf },
}

/// An open file.
pub(super) enum File {
    Ours(anykernel::fs::File),
    Kernels(fs::File),
}

fn line(error: impl ToString) -> String {
    error.to_string()
}

fn drop_caches() -> Result<()> {
    run(&mut Command::new("sync"))?;
    fs::write("/proc/sys/vm/drop_caches", "3")
        .map_err(|error| format!("dropping the page cache needs root: {error}"))
}

/// Uses as much memory as a run needs, and gives it back. Under a hypervisor that takes free memory away from its guest
/// the first use of each page is slow, which would be counted for whoever comes first.
fn back_memory() {
    const PIECE: usize = 64 << 10;
    // As the cache takes it, so that it is the same memory.
    let pieces: Vec<Vec<u8>> = (0..MEMORY_BYTES / PIECE).map(|_| vec![1; PIECE]).collect();
    std::hint::black_box(pieces);
}

impl Side {
    /// Mounts `image`; the kernel at `mount` through a loop device.
    pub(super) fn mount(whose: Whose, image: &Path, mount: &Path) -> Result<Self> {
        let side = match whose {
            Whose::Ours => {
                let root = Mount { source: "disk0".into(), target: "/".into(), kind: None, read_only: true };
                // As much as a kernel with 2 GiB would use.
                let cache = Cache { bytes: 1280 << 20, ..Cache::default() };
                let config = Config { log: "warn".into(), mounts: vec![root], cache, ..Config::default() };
                let disk = HostDisk::open(image, false).map_err(line)?;
                let instance =
                    Instance::builder().memory(2 << 30).config(config).disk(disk).start().map_err(line)?;
                let namespace = instance.kernel().namespace().ok_or("the instance has no vfs")?;
                Self::Ours { namespace, _instance: instance }
            }
            Whose::Kernels => {
                run(Command::new("mount").args(["-o", "loop,ro"]).arg(image).arg(mount))
                    .map_err(|line| format!("{line}; the loop mount of the peer needs root"))?;
                Self::Kernels { mount: mount.into() }
            }
        };
        drop_caches()?;
        back_memory();
        Ok(side)
    }

    /// Opens a file by its path in the image.
    pub(super) fn open(&self, path: &str) -> Result<File> {
        let failed = |error: String| format!("{path}: {error}");
        match self {
            Self::Ours { namespace, .. } => namespace
                .open(path.as_bytes(), OpenOptions::READ)
                .map(File::Ours)
                .map_err(|error| failed(error.to_string())),
            Self::Kernels { mount } => fs::File::open(mount.join(&path[1..]))
                .map(File::Kernels)
                .map_err(|error| failed(error.to_string())),
        }
    }

    /// Names in a directory, each with whether it is one.
    pub(super) fn list(&self, path: &str) -> Result<Vec<(String, bool)>> {
        let mut names = Vec::new();
        match self {
            Self::Ours { namespace, .. } => {
                let directory = namespace.resolve(path.as_bytes(), true).map_err(line)?;
                let mut cursor = Some(0);
                while let Some(from) = cursor {
                    cursor = directory
                        .read_dir(from, &mut |entry| {
                            let name = String::from_utf8_lossy(&entry.name).into_owned();
                            names.push((name, entry.kind == FileKind::Directory));
                            true
                        })
                        .map_err(line)?;
                }
            }
            Self::Kernels { mount } => {
                for entry in fs::read_dir(mount.join(&path[1..])).map_err(line)? {
                    let entry = entry.map_err(line)?;
                    let kind = entry.file_type().map_err(line)?;
                    names.push((entry.file_name().to_string_lossy().into_owned(), kind.is_dir()));
                }
            }
        }
        names.retain(|(name, _)| name != "." && name != "..");
        Ok(names)
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        if let Self::Kernels { mount } = self {
            let _ = Command::new("umount").arg(mount).status();
        }
    }
}

impl File {
    /// As pread(2).
    pub(super) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        match self {
            Self::Ours(file) => file.read_at(offset, buffer).map_err(line),
            Self::Kernels(file) => file.read_at(buffer, offset).map_err(line),
        }
    }
}
