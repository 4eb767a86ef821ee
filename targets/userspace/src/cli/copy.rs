//! `cp`: files and directories out of images, and into those that can be written (FAT).
//!
//! What an image says is not trusted: a name never leads out of the destination, and no symbolic link that came from the image
//! is written through.

use super::Outcome;
use super::files::DEEPEST;
use super::image::{ImagePath, Mounted, Reader, join, shown};
use anykernel::fs::{FileKind, FsError, Inode, OpenOptions, Timestamp};
use anykernel_userspace::{Failure, interrupt};
use clap::Args;
use hypercall::ExitStatus;
use indicatif::{ProgressBar, ProgressStyle};
use std::fs::{File, FileTimes, Permissions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Bytes per read and write.
const CHUNK: usize = 1 << 20;

/// Copy files out of an image, or into one (FAT)
#[derive(Args)]
#[command(after_help = "Examples:
  anykernel cp disk.img:/etc/hostname .          out of the image
  anykernel cp -r disk.img:1:/boot backup        a whole directory
  anykernel cp notes.txt stick.img:/             into a FAT image
  anykernel cp -r site stick.img:/www            a whole directory into a FAT image

An image that is only read from is never written to.")]
pub(super) struct Cp {
    /// What to copy: IMAGE[:PARTITION]:/PATH, or files of this host
    #[arg(required = true, value_name = "FROM")]
    from: Vec<String>,
    /// Where to: the other kind
    #[arg(required = true, value_name = "TO")]
    to: String,
    /// Directories with everything in them
    #[arg(short, short_alias = 'R', long)]
    recursive: bool,
    #[command(flatten)]
    reader: Reader,
}

struct Progress {
    bar: ProgressBar,
    buf: Vec<u8>,
    recursive: bool,
}

impl Progress {
    fn check(&self) -> Result<(), Failure> {
        if interrupt::interrupted() {
            return Err(Failure::new("interrupted: what was being copied is incomplete"));
        }
        Ok(())
    }
}

fn host_failure(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(format!("{}: {error}", path.display()))
}

impl Cp {
    pub(super) fn run(self) -> Outcome {
        let bar = ProgressBar::new(0);
        let template = "{wide_msg} {bytes} of {total_bytes} [{bar:20}] {binary_bytes_per_sec}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        let mut progress = Progress { bar, buf: vec![0; CHUNK], recursive: self.recursive };
        let result = match ImagePath::parse(&self.to) {
            Some(to) => self.write_image(&to, &mut progress),
            None => self.read_images(Path::new(&self.to), &mut progress),
        };
        progress.bar.finish_and_clear();
        result.map(|()| ExitStatus::Success)
    }

    fn read_images(&self, to: &Path, progress: &mut Progress) -> Result<(), Failure> {
        let several = self.from.len() > 1;
        if several && !to.is_dir() {
            return Err(Failure::usage(format!(
                "{} is not a directory: several files need one",
                to.display()
            )));
        }
        for from in &self.from {
            let place = ImagePath::parse(from).ok_or_else(|| {
                Failure::usage(format!(
                    "neither {from} nor {} is in an image: write IMAGE:/path for one of them",
                    self.to
                ))
            })?;
            let mounted = place.mount(false, &self.reader)?;
            let inode = mounted.resolve(&place.path, true)?;
            let name = place.path.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
            let target = match (to.is_dir(), name) {
                (true, "" | "." | "..") | (false, _) => to.to_path_buf(),
                (true, name) => to.join(name),
            };
            out(&mounted, &inode, &place.path, &target, progress, 0)?;
            mounted.finish()?;
        }
        Ok(())
    }

    fn write_image(&self, to: &ImagePath, progress: &mut Progress) -> Result<(), Failure> {
        if let Some(from) = self.from.iter().find(|from| ImagePath::parse(from).is_some()) {
            return Err(Failure::usage(format!("{from} is in an image, too: copy it to this host first")));
        }
        // Before the image is opened for writing.
        for from in &self.from {
            let from = Path::new(from);
            let metadata = from.metadata().map_err(|error| host_failure(from, &error))?;
            if metadata.is_dir() && !self.recursive {
                return Err(Failure::usage(format!("{} is a directory: copy it with -r", from.display())));
            }
        }
        let mounted = to.mount(true, &self.reader)?;
        let into_directory = mounted.is_directory(&to.path);
        if self.from.len() > 1 && !into_directory {
            return Err(Failure::usage(format!(
                "{} is not a directory of the image: several files need one",
                to.path
            )));
        }
        for from in &self.from {
            let from = Path::new(from);
            let name = from.file_name().map(OsStrExt::as_bytes).unwrap_or_default();
            let target =
                if into_directory && !name.is_empty() { join(&to.path, name) } else { to.path.clone() };
            into(&mounted, from, &target, progress, 0)?;
        }
        mounted.finish()
    }
}

/// Copies out of an image. `target` is the new file or directory itself.
fn out(
    mounted: &Mounted,
    inode: &Arc<dyn Inode>,
    path: &str,
    target: &Path,
    progress: &mut Progress,
    depth: usize,
) -> Result<(), Failure> {
    progress.check()?;
    let fail = |error| mounted.failure(path, error);
    let metadata = inode.metadata().map_err(fail)?;
    let there = target.symlink_metadata().ok();
    match metadata.kind {
        FileKind::Directory => {
            if !progress.recursive {
                return Err(Failure::usage(format!("{path} is a directory: copy it with -r")));
            }
            if depth > DEEPEST {
                return Err(fail(FsError::Corrupt));
            }
            match there {
                // At the top the user's own link to a directory is as good as one.
                Some(there) if there.is_dir() || depth == 0 && target.is_dir() => {}
                Some(_) => {
                    return Err(Failure::new(format!("{} is there and not a directory", target.display())));
                }
                None => std::fs::create_dir(target).map_err(|error| host_failure(target, &error))?,
            }
            for entry in mounted.entries(inode, path)? {
                let full = join(path, &entry.name);
                if entry.name.is_empty() || entry.name.iter().any(|byte| matches!(byte, b'/' | 0)) {
                    return Err(mounted.failure(&full, FsError::Corrupt));
                }
                let child = inode.lookup(&entry.name).map_err(|error| mounted.failure(&full, error))?;
                let name = std::ffi::OsStr::from_bytes(&entry.name);
                out(mounted, &child, &full, &target.join(name), progress, depth + 1)?;
            }
        }
        FileKind::Symlink => {
            let link = inode.read_link().map_err(fail)?;
            if there.is_some_and(|there| !there.is_dir()) {
                std::fs::remove_file(target).map_err(|error| host_failure(target, &error))?;
            }
            std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(&link), target)
                .map_err(|error| host_failure(target, &error))?;
        }
        FileKind::File => {
            progress.bar.set_message(shown(path.as_bytes()));
            progress.bar.inc_length(metadata.size);
            let mut options = File::options();
            options.write(true).create(true).truncate(true).mode(0o666 & u32::from(metadata.mode));
            if depth > 0 {
                options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed());
            }
            let mut file = options.open(target).map_err(|error| host_failure(target, &error))?;
            let mut offset = 0;
            loop {
                progress.check()?;
                let n = inode.read_at(offset, &mut progress.buf).map_err(fail)?;
                if n == 0 {
                    break;
                }
                file.write_all(&progress.buf[..n]).map_err(|error| host_failure(target, &error))?;
                offset += n as u64;
                progress.bar.inc(n as u64);
            }
            // The content is what counts: a file system that keeps no times or modes is no failure.
            let _ = file.set_permissions(Permissions::from_mode(u32::from(metadata.mode & 0o777)));
            if let Some(time) = system_time(metadata.modified) {
                let _ = file.set_times(FileTimes::new().set_modified(time));
            }
        }
        _ => log::warn!("{}: not copied: it is a device, pipe or socket", shown(path.as_bytes())),
    }
    Ok(())
}

fn system_time(time: Timestamp) -> Option<SystemTime> {
    let nanos = Duration::from_nanos(time.nanos.into());
    match u64::try_from(time.seconds) {
        Ok(seconds) => UNIX_EPOCH.checked_add(Duration::from_secs(seconds) + nanos),
        Err(_) => UNIX_EPOCH.checked_sub(Duration::from_secs(time.seconds.unsigned_abs())),
    }
}

/// Copies into an image. `target` is the new file or directory itself.
fn into(
    mounted: &Mounted,
    from: &Path,
    target: &str,
    progress: &mut Progress,
    depth: usize,
) -> Result<(), Failure> {
    progress.check()?;
    let fail = |error| mounted.failure(target, error);
    let metadata = from.metadata().map_err(|error| host_failure(from, &error))?;
    if metadata.is_dir() {
        if depth > DEEPEST {
            return Err(Failure::new(format!("{}: directories are too deep", from.display())));
        }
        match mounted.names.create(target.as_bytes(), FileKind::Directory, None) {
            Ok(()) => {}
            Err(FsError::Exists) if mounted.is_directory(target) => {}
            Err(error) => return Err(fail(error)),
        }
        let mut children: Vec<PathBuf> = std::fs::read_dir(from)
            .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
            .map_err(|error| host_failure(from, &error))?;
        children.sort();
        for child in children {
            let name = child.file_name().map(OsStrExt::as_bytes).unwrap_or_default();
            into(mounted, &child, &join(target, name), progress, depth + 1)?;
        }
        return Ok(());
    }
    if !metadata.is_file() {
        log::warn!("{}: not copied: it is neither a file nor a directory", from.display());
        return Ok(());
    }
    progress.bar.set_message(from.display().to_string());
    progress.bar.inc_length(metadata.len());
    let mut source = File::open(from).map_err(|error| host_failure(from, &error))?;
    let file = mounted.names.open(target.as_bytes(), OpenOptions::CREATE).map_err(fail)?;
    let mut offset = 0;
    loop {
        progress.check()?;
        let n = match source.read(&mut progress.buf) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(host_failure(from, &error)),
        };
        let mut data = &progress.buf[..n];
        while !data.is_empty() {
            let written = file.write_at(offset, data).map_err(fail)?;
            if written == 0 {
                return Err(fail(FsError::NoSpace));
            }
            offset += written as u64;
            data = data.get(written..).unwrap_or_default();
        }
        progress.bar.inc(n as u64);
    }
    if let Ok(since) = metadata.modified().map(|time| time.duration_since(UNIX_EPOCH).unwrap_or_default()) {
        let time = Timestamp { seconds: since.as_secs().cast_signed(), nanos: since.subsec_nanos() };
        // Not every file system keeps times.
        let _ = file.inode.set_modified(time);
    }
    file.inode.sync().map_err(fail)
}
