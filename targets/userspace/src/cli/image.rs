//! `IMAGE[:PARTITION]:/path` and `usb:BUS-PORT[:PARTITION]:/path`, and the file system behind it.

use super::run::On;
use anykernel::config::{Config, Mount};
use anykernel::fs::{DirEntry, FileKind, FsError, Inode, Namespace};
use anykernel_usb::{Claim, Options};
use anykernel_userspace::remote::Guest;
use anykernel_userspace::usb::UsbBus;
use anykernel_userspace::{ConsoleSink, DiskSpec, Failure, HostDisk, Instance, RunSpec, UsbSpec, plan};
use clap::Args;
use hypercall::UsbPath;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

/// Who reads an image or a stick.
#[derive(Debug, Args)]
pub(super) struct Reader {
    /// Where the disk is read: userspace (this process), rumprun or linux-module (a guest that is booted for it)
    #[arg(long, value_enum, default_value = "userspace", value_name = "TARGET")]
    on: On,
    /// Plug something in to the guest, whose own places usb:BUS-PORT names then: disk:FILE, keyboard, mouse, hub or
    /// host:BUS-PORT; may be given several times. Without it a guest gets the stick of this machine at that place
    #[arg(long = "usb", value_name = "DEVICE")]
    usb: Vec<UsbSpec>,
}

/// A place in an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ImagePath {
    pub(super) image: PathBuf,
    pub(super) partition: Option<u32>,
    /// Absolute.
    pub(super) path: String,
}

impl ImagePath {
    /// `None`: no place in an image, but a path of this host.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (image, path) = match text.split_once(":/") {
            Some((image, path)) => (image, format!("/{path}")),
            None => (text.strip_suffix(':')?, "/".to_string()),
        };
        if image.is_empty() {
            return None;
        }
        let (image, partition) = match image.rsplit_once(':') {
            Some((left, number)) if !left.is_empty() => {
                match number.strip_prefix('p').unwrap_or(number).parse() {
                    Ok(number) => (left, Some(number)),
                    Err(_) => (image, None),
                }
            }
            _ => (image, None),
        };
        Some(Self { image: image.into(), partition, path })
    }

    /// As it was written, with another path.
    fn shown(&self, path: &str) -> String {
        match self.partition {
            Some(partition) => format!("{}:{partition}:{path}", self.image.display()),
            None => format!("{}:{path}", self.image.display()),
        }
    }

    /// Opens the image. Nothing is written to it unless `writable`.
    pub(super) fn mount(&self, writable: bool, reader: &Reader) -> Result<Mounted, Failure> {
        let device = self.image.to_str().and_then(|image| image.strip_prefix("usb:"));
        if reader.on == On::Userspace && !reader.usb.is_empty() {
            return Err(Failure::usage(
                "--usb plugs something in to a guest: add --on rumprun or --on linux-module; what this machine has is usb:BUS-PORT",
            ));
        }
        match (reader.on, device) {
            (On::Userspace, Some(device)) => return self.mount_usb(device, writable),
            (On::Userspace, None) => {}
            (_, device) => return self.mount_in_guest(device, writable, reader),
        }
        let found = plan::find_file_system(&self.image, self.partition)?;
        let mount = Mount {
            source: found.device,
            target: "/".into(),
            kind: Some(found.kind.clone()),
            read_only: !writable,
        };
        let config = Config { log: "warn".into(), mounts: vec![mount], ..Config::default() };
        let instance = Instance::builder()
            .console(ConsoleSink::Stderr)
            .config(config)
            .disk(HostDisk::open(&self.image, writable)?)
            .start()
            .map_err(|error| Failure::new(format!("{}: {error}", self.image.display())))?;
        let names =
            instance.kernel().namespace().ok_or_else(|| Failure::new("this build has no file systems"))?;
        let by = By::Instance { instance, disk: None };
        Ok(Mounted { names, place: self.clone(), kind: found.kind, by })
    }
}

impl ImagePath {
    /// Mounts a USB stick of this machine: `1-2`, as `anykernel usb list` names its place.
    fn mount_usb(&self, device: &str, writable: bool) -> Result<Mounted, Failure> {
        let place = usb_place(device)?;
        let options = Options { claim: Claim::Only(vec![place.into()]), ..Options::default() };
        let instance = Instance::builder()
            .console(ConsoleSink::Stderr)
            .config(Config { log: "warn".into(), ..Config::default() })
            .usb(UsbBus::new()?, options)
            .start()
            .map_err(|error| Failure::new(format!("usb:{device}: {error}")))?;
        let kernel = instance.kernel();
        let (source, kind) = files::find(kernel, &[format!("usb{place}")], self.partition, 0)
            .map_err(|line| Failure::new(format!("usb:{device}: {line}")))?;
        let names = kernel.namespace().ok_or_else(|| Failure::new("this build has no file systems"))?;
        // In the place of the empty root.
        names
            .unmount(b"/")
            .and_then(|()| names.mount(&source, b"/", Some(&kind), !writable))
            .map_err(|error| Failure::new(format!("usb:{device}: {error}")))?;
        let by = By::Instance { instance, disk: Some(source) };
        Ok(Mounted { names, place: self.clone(), kind, by })
    }

    /// Has a guest mount an image, or the USB stick at `device`: of this machine, which is handed to it, or of what is plugged in to it.
    fn mount_in_guest(
        &self,
        device: Option<&str>,
        writable: bool,
        reader: &Reader,
    ) -> Result<Mounted, Failure> {
        let mut config = Config { log: "warn".into(), ..Config::default() };
        let mut options = files::Options { write: writable, ..files::Options::default() };
        let (mut usb, mut disks) = (reader.usb.clone(), Vec::new());
        match device {
            Some(device) => {
                let place = usb_place(device)?;
                options.partition = self.partition;
                options.find = vec![format!("usb{place}")];
                if usb.is_empty() {
                    // Of the only device there, by its speed: the unikernel's two places, and Linux's.
                    options.find = ["usb1-1", "usb1-9", "usb2-1"].map(Into::into).into();
                    usb.push(UsbSpec::Host(place));
                }
            }
            None => {
                let found = plan::find_file_system(&self.image, self.partition)?;
                let (source, kind) = (found.device, Some(found.kind));
                config.mounts = vec![Mount { source, target: "/".into(), kind, read_only: !writable }];
                disks.push(DiskSpec { path: self.image.clone(), writable });
            }
        }
        // Who only reads must not be able to do more.
        for one in &mut usb {
            if let UsbSpec::Disk(disk) = one {
                disk.writable = writable;
            }
        }
        let guest =
            Guest::start(reader.on.into(), RunSpec { disks, usb, ..RunSpec::new(config) }, options).map_err(
                |failure| Failure { line: format!("{}: {}", self.image.display(), failure.line), ..failure },
            )?;
        let names = guest.names();
        let kind = names
            .stats(b"/")
            .map_err(|error| Failure::new(format!("{}: {error}", self.image.display())))?
            .kind;
        Ok(Mounted { names, place: self.clone(), kind: kind.into(), by: By::Guest(guest) })
    }
}

/// `1-2`, as `anykernel usb list` names places.
fn usb_place(device: &str) -> Result<UsbPath, Failure> {
    UsbPath::parse(device).filter(|place| !place.ports().is_empty()).ok_or_else(|| {
        Failure::usage(format!(
            "usb:{device}: write usb:BUS-PORT:/path, as in usb:1-2:/; `anykernel usb list` shows what there is"
        ))
    })
}

impl FromStr for ImagePath {
    type Err = String;
    /// For commands that only know images: without a path the root is meant.
    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse(text)
            .or_else(|| Self::parse(&format!("{text}:/")))
            .ok_or_else(|| "write IMAGE:/path or IMAGE:PARTITION:/path".into())
    }
}

/// An image in use.
pub(super) struct Mounted {
    pub(super) names: Arc<dyn Namespace>,
    pub(super) place: ImagePath,
    pub(super) kind: String,
    by: By,
}

/// Who reads it.
enum By {
    /// This process.
    Instance {
        instance: Instance,
        /// What can be unplugged.
        disk: Option<String>,
    },
    Guest(Guest),
}

impl Mounted {
    /// A failure about a path of this image.
    pub(super) fn failure(&self, path: &str, error: FsError) -> Failure {
        let shown = self.place.shown(path);
        Failure::new(match error {
            FsError::ReadOnly => format!("{shown}: {} file systems are read-only here", self.kind),
            FsError::Corrupt => format!("{shown}: the file system is corrupt there: look with fsck"),
            error => format!("{shown}: {error}"),
        })
    }

    pub(super) fn resolve(&self, path: &str, follow: bool) -> Result<Arc<dyn Inode>, Failure> {
        self.names.resolve(path.as_bytes(), follow).map_err(|error| self.failure(path, error))
    }

    /// All entries but `.` and `..`, by name.
    pub(super) fn entries(&self, directory: &Arc<dyn Inode>, path: &str) -> Result<Vec<DirEntry>, Failure> {
        let mut entries = Vec::new();
        let mut cursor = Some(0);
        while let Some(from) = cursor {
            cursor = directory
                .read_dir(from, &mut |entry| {
                    if entry.name != b"." && entry.name != b".." {
                        entries.push(entry);
                    }
                    true
                })
                .map_err(|error| self.failure(path, error))?;
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// What a path resolves to, if it is a directory.
    pub(super) fn is_directory(&self, path: &str) -> bool {
        self.names
            .resolve(path.as_bytes(), true)
            .and_then(|inode| inode.metadata())
            .is_ok_and(|metadata| metadata.kind == FileKind::Directory)
    }

    /// Its device is gone.
    pub(super) fn is_unplugged(&self) -> bool {
        match &self.by {
            By::Instance { instance, disk } => disk.as_ref().is_some_and(|disk| {
                instance.kernel().block_devices().iter().all(|one| one.info().name != *disk)
            }),
            // It says so at the latest when something is written or read.
            By::Guest(guest) => guest.is_over(),
        }
    }

    /// Writes everything out.
    pub(super) fn sync(&self) -> Result<(), Failure> {
        self.names.sync().map_err(|error| self.failure("/", error))
    }

    /// Writes everything out and ends the instance.
    pub(super) fn finish(self) -> Result<(), Failure> {
        let result = self.sync();
        let Self { names, by, .. } = self;
        drop(names);
        match by {
            By::Instance { instance, .. } => {
                instance.shutdown();
                result
            }
            By::Guest(guest) => {
                let ended = guest.finish();
                result.and(ended)
            }
        }
    }
}

/// A name as it is safe to show: control characters and what is not UTF-8 are escaped, because an image may hold
/// anything.
pub(super) fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name)
        .chars()
        .flat_map(|c| {
            let escape = c.is_control();
            escape.then(|| c.escape_default()).into_iter().flatten().chain((!escape).then_some(c))
        })
        .collect()
}

/// `directory/name`.
pub(super) fn join(directory: &str, name: &[u8]) -> String {
    format!("{}/{}", directory.trim_end_matches('/'), String::from_utf8_lossy(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(text: &str) -> Option<(String, Option<u32>, String)> {
        ImagePath::parse(text).map(|place| (place.image.display().to_string(), place.partition, place.path))
    }

    #[test]
    fn places() {
        assert_eq!(parts("a.img:/etc/x"), Some(("a.img".into(), None, "/etc/x".into())));
        assert_eq!(parts("a.img:2:/etc"), Some(("a.img".into(), Some(2), "/etc".into())));
        assert_eq!(parts("a.img:p2:/"), Some(("a.img".into(), Some(2), "/".into())));
        assert_eq!(parts("a.img:"), Some(("a.img".into(), None, "/".into())));
        assert_eq!(parts("a:b.img:/x:/y"), Some(("a:b.img".into(), None, "/x:/y".into())));
        assert_eq!(parts("file.txt"), None);
        assert_eq!(parts(":/x"), None);
        assert_eq!("a.img".parse::<ImagePath>().unwrap().path, "/");
        assert_eq!("a.img:1".parse::<ImagePath>().unwrap().partition, Some(1));
    }

    #[test]
    fn names_cannot_drive_the_terminal() {
        assert_eq!(shown(b"a\x1b[31mb\n"), "a\\u{1b}[31mb\\n");
        assert_eq!(shown("grün".as_bytes()), "grün");
    }
}
