//! What is on an image: found by looking, before anything starts, so that every target says the same about it.

use crate::{ConsoleSink, Failure, HostDisk, Instance, logger};
use anykernel::config::{Config, Mount};
use anykernel::fs::FsError;
use std::path::Path;

/// A file system on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The registered name: `disk0`, `disk0p1`.
    pub device: String,
    /// `ext4`, `vfat`.
    pub kind: String,
}

/// The first file system on the image, or the one on partition `partition` (from 1). Nothing is written.
/// Failures are lines for a person.
pub fn find_file_system(image: &Path, partition: Option<u32>) -> Result<Found, Failure> {
    let disk = HostDisk::open(image, false)?;
    let shown = image.display().to_string();
    let (found, messages) = logger::capture(|| find_on(disk, &shown, partition));
    // The driver knows more precisely what is wrong, but not the name of the image.
    found.map_err(|failure| match messages.into_iter().find_map(|line| about_image(&line, &shown)) {
        Some(line) => Failure::new(line),
        None => failure,
    })
}

/// `disk0: the image is ...` or `disk0p1: ...` with the name of the image instead.
fn about_image(line: &str, shown: &str) -> Option<String> {
    let (device, rest) = line.strip_prefix("disk0")?.split_once(": ")?;
    let partition = match device {
        "" => String::new(),
        device => format!(", partition {}", device.strip_prefix('p')?),
    };
    Some(format!("{shown}{partition}: {rest}"))
}

fn find_on(disk: HostDisk, shown: &str, partition: Option<u32>) -> Result<Found, Failure> {
    let instance = Instance::builder()
        .console(ConsoleSink::Null)
        .config(Config { log: "error".into(), ..Config::default() })
        .disk(disk)
        .start()
        .map_err(|error| Failure::new(format!("{shown}: {error}")))?;
    let kernel = instance.kernel();
    let wanted = partition.map(|number| format!("disk0p{number}"));
    let mut names = Vec::new();
    let mut trouble = None;
    for device in kernel.block_devices() {
        let name = device.info().name.clone();
        if wanted.as_ref().is_none_or(|wanted| *wanted == name) {
            for kind in kernel.fs_types() {
                match kind.probe(&device) {
                    Ok(false) => {}
                    Ok(true) => match kind.mount(Some(device.clone()), true) {
                        Ok(_) => return Ok(Found { device: name, kind: kind.name().into() }),
                        Err(error) => {
                            trouble.get_or_insert(explain(shown, Some(kind.name()), error));
                        }
                    },
                    Err(error) => {
                        trouble.get_or_insert(explain(shown, None, error));
                    }
                }
            }
        }
        names.push(name);
    }
    if let Some(wanted) = wanted.filter(|wanted| !names.contains(wanted)) {
        let partitions: Vec<_> = names.iter().filter_map(|name| name.strip_prefix("disk0p")).collect();
        let there = match partitions.len() {
            0 => "it has no partitions".into(),
            _ => format!("it has {}", partitions.join(", ")),
        };
        let number = wanted.trim_start_matches("disk0p");
        return Err(Failure::new(format!("{shown} has no partition {number}: {there}")));
    }
    Err(trouble.unwrap_or_else(|| {
        Failure::new(format!(
            "{shown}: no file system that is known here (ext4, FAT), neither on it nor on a partition: is it a raw image?"
        ))
    }))
}

fn explain(shown: &str, kind: Option<&str>, error: FsError) -> Failure {
    let kind = kind.unwrap_or("its");
    let check = if kind == "ext4" { "e2fsck -n" } else { "fsck" };
    Failure::new(match error {
        FsError::Corrupt => {
            format!(
                "{shown}: the {kind} file system is corrupt or the image is cut short: look with `{check} {shown}`"
            )
        }
        FsError::NotAFileSystem => {
            format!("{shown}: no file system that is known here (ext4, FAT): is it a raw image?")
        }
        FsError::Unsupported => {
            format!("{shown}: its {kind} file system has features that are not supported here")
        }
        FsError::NoMemory => format!("{shown}: too little memory to mount it: give more with --memory"),
        error => format!("{shown}: cannot mount {kind} file system: {error}"),
    })
}

/// The mount of the first disk at `/`, as `run` has it when the configuration names no mounts.
pub fn root_mount(image: &Path, writable: bool) -> Result<Mount, Failure> {
    let found = find_file_system(image, None)?;
    Ok(Mount { source: found.device, target: "/".into(), kind: Some(found.kind), read_only: !writable })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_image() {
        let about = |line| about_image(line, "a.img");
        assert_eq!(about("disk0: it is cut short"), Some("a.img: it is cut short".into()));
        assert_eq!(about("disk0p2: it is cut short"), Some("a.img, partition 2: it is cut short".into()));
        assert_eq!(about("vfs: something else"), None);
    }
}
