//! `mount`.

use super::Outcome;
use super::image::{ImagePath, Reader};
use anykernel_userspace::fuse::Mount as FuseMount;
use anykernel_userspace::{Failure, interrupt};
use clap::Args;
use hypercall::ExitStatus;
use std::path::PathBuf;
use std::time::Duration;

/// How often it is looked whether it is over.
const PERIOD: Duration = Duration::from_millis(100);

/// Mount an image or a USB stick at a directory, through FUSE
#[derive(Args)]
#[command(after_help = "Examples:
  anykernel mount disk.img /mnt           the first file system of an image, read-only
  anykernel mount disk.img:2:/srv /mnt    a directory of its second partition
  anykernel mount usb:1-2 /mnt --write    a stick, which is taken from its driver meanwhile

It stays until Ctrl-C, or until somebody unmounts it (umount, fusermount3 -u). The file system is read by this process: what a
bad image does, it does to this process only. FAT can be written; pull no stick before it has ended.")]
pub(super) struct Mount {
    /// What to mount
    #[arg(value_name = "IMAGE[:PARTITION]|usb:BUS-PORT[:PARTITION]")]
    source: ImagePath,
    /// Where: an empty directory of this host
    #[arg(value_name = "DIR")]
    place: PathBuf,
    /// Let files be written
    #[arg(long, short)]
    write: bool,
    #[command(flatten)]
    reader: Reader,
}

impl Mount {
    pub(super) fn run(self) -> Outcome {
        let mounted = self.source.mount(self.write, &self.reader)?;
        let root = mounted.resolve(&self.source.path, true)?;
        let source = self.source.image.display().to_string();
        let mount = FuseMount::new(mounted.names.clone(), root, &self.place, &source, self.write)?;
        let how = if self.write { "read and write" } else { "read-only" };
        let (kind, place) = (&mounted.kind, self.place.display());
        eprintln!("ready: {source} ({kind}) is at {place}, {how}; Ctrl-C unmounts it");
        let gone = loop {
            if interrupt::interrupted() || mount.is_over() {
                break false;
            }
            if mounted.is_unplugged() {
                break true;
            }
            std::thread::sleep(PERIOD);
        };
        // Before it is taken away, so that who still has something open loses nothing that was written.
        let written = if gone { Ok(()) } else { mounted.sync() };
        let free = mount.end();
        if gone {
            return Err(Failure::new(format!("{source}: it was unplugged; {place} is unmounted")));
        }
        if !free {
            log::warn!("{place}: unmounted while in use: who still has a file open there gets errors");
        }
        mounted.finish()?;
        written.map(|()| ExitStatus::Success)
    }
}
