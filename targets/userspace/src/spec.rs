//! What is to run: one description for every target.

use anykernel::config::Config;
use hypercall::{ExitStatus, UsbPath};
use std::fmt;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;
use std::str::FromStr;

/// One run of one application on some target.
#[derive(Debug, Clone)]
pub struct RunSpec {
    /// Application, mounts and interfaces: what the guest gets as its parameter `config`.
    pub config: Config,
    /// Disks in order: `disk0`, `disk1`, ... Each exists and holds what the mounts in `config` say.
    pub disks: Vec<DiskSpec>,
    /// Host ports forwarded to the guest, with [`NetSpec::User`] only.
    pub publish: Vec<Publish>,
    /// What is plugged in to the guest's USB.
    pub usb: Vec<UsbSpec>,
    /// The network.
    pub net: NetSpec,
    /// The machine that a unikernel boots on; other targets choose for themselves.
    pub machine: MachineKind,
    /// CPUs, at least 1.
    pub cpus: u32,
    /// Memory in bytes; `None`: as much as the target usually gets.
    pub memory: Option<u64>,
    /// Where to write a trace of hypercalls (Perfetto's JSON).
    pub trace: Option<PathBuf>,
    /// Where `anykernel top` may ask; needs `trace`, which may go nowhere.
    pub control: Option<PathBuf>,
    /// Where to write a recording for `anykernel replay`.
    pub record: Option<PathBuf>,
    /// How large the recording may become, in bytes; the run goes on without it.
    pub record_limit: u64,
    /// Where to write the frames of the link.
    pub pcap: Option<PathBuf>,
    /// Where to write what goes over USB.
    pub usb_pcap: Option<PathBuf>,
    /// Standard output carries one JSON object a line: `{"event":...}`.
    pub json: bool,
    /// Nothing is said about what is published where.
    pub quiet: bool,
    /// A guest's console goes to standard error: standard output is the caller's own.
    pub stderr: bool,
}

impl RunSpec {
    /// A run of what `config` says, without disks and network, on one CPU, that shows nothing but the console.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            disks: Vec::new(),
            publish: Vec::new(),
            usb: Vec::new(),
            net: NetSpec::None,
            machine: MachineKind::default(),
            cpus: 1,
            memory: None,
            trace: None,
            control: None,
            record: None,
            record_limit: crate::record::DEFAULT_LIMIT,
            pcap: None,
            usb_pcap: None,
            json: false,
            quiet: true,
            stderr: false,
        }
    }

    /// The layer around the guest's host, which is a feature of its crate.
    pub(crate) fn layer(&self) -> Option<&'static str> {
        match (self.record.is_some(), self.trace.is_some()) {
            (true, _) => Some("record"),
            (false, true) => Some("trace"),
            (false, false) => None,
        }
    }

    /// What a unikernel must be able to do: the features of its crate.
    pub(crate) fn feature(&self) -> Option<&'static str> {
        match (self.layer(), self.usb.is_empty()) {
            (Some("trace"), false) => Some("trace,usb"),
            (Some("record"), false) => Some("record,usb"),
            (None, false) => Some("usb"),
            (layer, _) => layer,
        }
    }
}

/// A disk image or block device of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// The file.
    pub path: PathBuf,
    /// The guest may write to it.
    pub writable: bool,
}

impl FromStr for DiskSpec {
    type Err = String;
    /// `FILE`, `FILE:ro` or `FILE:rw`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (path, writable) = match text.rsplit_once(':') {
            Some((path, "rw")) => (path, true),
            Some((path, "ro")) => (path, false),
            _ => (text, false),
        };
        if path.is_empty() {
            return Err("write FILE, FILE:ro or FILE:rw".into());
        }
        Ok(Self { path: path.into(), writable })
    }
}

/// A USB device of the guest, as QEMU plays them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UsbSpec {
    /// A stick with this content.
    Disk(DiskSpec),
    /// A keyboard.
    Keyboard,
    /// A mouse.
    Mouse,
    /// A hub with eight ports; what follows is plugged in to it.
    Hub,
    /// A network interface on the guest's network, instead of another one.
    Net,
    /// A device of this machine, taken from whoever drives it.
    Host(UsbPath),
}

impl FromStr for UsbSpec {
    type Err = String;
    /// `disk:FILE`, `disk:FILE:rw`, `keyboard`, `mouse`, `hub`, `net` or `host:BUS-PORT`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("disk", disk)) => disk.parse().map(Self::Disk),
            Some(("host", place)) => {
                let place = UsbPath::parse(place).filter(|place| !place.ports().is_empty());
                place.map(Self::Host).ok_or_else(|| "write host:BUS-PORT, as in host:1-2.1".into())
            }
            None if text == "keyboard" => Ok(Self::Keyboard),
            None if text == "mouse" => Ok(Self::Mouse),
            None if text == "hub" => Ok(Self::Hub),
            None if text == "net" => Ok(Self::Net),
            _ => Err("write disk:FILE, disk:FILE:rw, keyboard, mouse, hub, net or host:BUS-PORT".into()),
        }
    }
}

/// A port of the host that leads to a TCP port of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Publish {
    /// Where the host listens; 127.0.0.1 unless said otherwise. Port 0 picks a free one.
    pub host: SocketAddrV4,
    /// The port in the guest.
    pub guest: u16,
}

impl FromStr for Publish {
    type Err = String;
    /// `HOST:GUEST`, or `ADDRESS:HOST:GUEST` for another address than 127.0.0.1.
    fn from_str(text: &str) -> Result<Self, String> {
        const HELP: &str = "write HOSTPORT:GUESTPORT, as in 8080:80";
        let (host, guest) = text.rsplit_once(':').ok_or(HELP)?;
        let (address, host) = match host.rsplit_once(':') {
            Some((address, port)) => {
                (address.parse().map_err(|_| "the address is not an IPv4 address")?, port)
            }
            None => (Ipv4Addr::LOCALHOST, host),
        };
        let guest = guest.parse().ok().filter(|port| *port != 0).ok_or(HELP)?;
        Ok(Self { host: SocketAddrV4::new(address, host.parse().map_err(|_| HELP)?), guest })
    }
}

/// A kind of virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MachineKind {
    /// QEMU's microvm: virtio-mmio, no firmware to speak of. Boots fastest.
    #[default]
    Microvm,
    /// QEMU's q35, a PC: PCI Express and ACPI.
    Q35,
}

impl FromStr for MachineKind {
    type Err = String;
    /// `microvm` or `q35`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "microvm" => Ok(MachineKind::Microvm),
            "q35" => Ok(MachineKind::Q35),
            _ => Err("write microvm or q35".into()),
        }
    }
}

/// What network the guest is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetSpec {
    /// A private network of one guest, 10.0.2.15/24, with published ports: no privileges needed.
    User,
    /// A TAP interface of the host, by name.
    Tap(String),
    /// The network interfaces among the USB devices.
    Usb,
    /// None.
    None,
}

impl FromStr for NetSpec {
    type Err = String;
    /// `user`, `tap:NAME`, `usb` or `none`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "user" => Ok(NetSpec::User),
            None if text == "none" => Ok(NetSpec::None),
            None if text == "usb" => Ok(NetSpec::Usb),
            Some(("tap", name)) if !name.is_empty() && name.len() < 16 => Ok(NetSpec::Tap(name.into())),
            _ => Err("write user, tap:NAME, usb or none".into()),
        }
    }
}

/// Why a command ended without doing its work: one line that says what is wrong and what to do, and an exit status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// For a person, without a full stop or newline at the end.
    pub line: String,
    /// [`ExitStatus::Failure`] or [`ExitStatus::Usage`].
    pub status: ExitStatus,
}

impl Failure {
    /// It was tried and did not work: exit status 1.
    pub fn new(line: impl Into<String>) -> Self {
        Self { line: line.into(), status: ExitStatus::Failure }
    }

    /// What was asked for makes no sense: exit status 2.
    pub fn usage(line: impl Into<String>) -> Self {
        Self { line: line.into(), status: ExitStatus::Usage }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line)
    }
}

impl std::error::Error for Failure {}

impl From<String> for Failure {
    fn from(line: String) -> Self {
        Self::new(line)
    }
}

/// What to say when a host port cannot be listened on.
pub(crate) fn port_failure(addr: SocketAddrV4, error: &std::io::Error) -> Failure {
    let port = addr.port();
    Failure::new(match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            format!("port {port} of {} is in use: end what listens there, or publish another port", addr.ip())
        }
        std::io::ErrorKind::PermissionDenied => {
            format!("port {port} needs privileges: publish one above 1023, as in --publish 8080:80")
        }
        std::io::ErrorKind::AddrNotAvailable => format!("{} is not an address of this host", addr.ip()),
        _ => format!("cannot listen on {addr}: {error}"),
    })
}

/// Passes console output on: as it is, or each line as a JSON object.
pub(crate) struct ConsoleLines {
    json: bool,
    line: Vec<u8>,
}

impl ConsoleLines {
    pub(crate) fn new(json: bool) -> Self {
        Self { json, line: Vec::new() }
    }

    /// A sink that is gone swallows it, as a console does.
    pub(crate) fn write(&mut self, to: &mut dyn Write, bytes: &[u8]) {
        if !self.json {
            let _ = to.write_all(bytes);
            let _ = to.flush();
            return;
        }
        for byte in bytes {
            match byte {
                b'\n' => self.finish(to),
                b'\r' => {}
                byte => self.line.push(*byte),
            }
        }
    }

    pub(crate) fn finish(&mut self, to: &mut dyn Write) {
        if !self.line.is_empty() {
            let line = String::from_utf8_lossy(&self.line);
            let _ = writeln!(to, "{}", serde_json::json!({ "event": "console", "line": line }));
            self.line.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_disks() {
        let disk = |path: &str, writable| Ok(DiskSpec { path: path.into(), writable });
        assert_eq!("a.img".parse(), disk("a.img", false));
        assert_eq!("a.img:ro".parse(), disk("a.img", false));
        assert_eq!("a:b.img:rw".parse(), disk("a:b.img", true));
        assert!(":rw".parse::<DiskSpec>().is_err());
    }

    #[test]
    fn reads_ports() {
        let publish: Publish = "8080:80".parse().unwrap();
        assert_eq!((publish.host.to_string().as_str(), publish.guest), ("127.0.0.1:8080", 80));
        let publish: Publish = "0.0.0.0:8080:80".parse().unwrap();
        assert_eq!(publish.host.to_string(), "0.0.0.0:8080");
        for bad in ["80", "8080:", ":80", "8080:0", "x:80", "70000:80", "a.b:1:2"] {
            assert!(bad.parse::<Publish>().is_err(), "{bad}");
        }
    }

    #[test]
    fn reads_networks() {
        assert_eq!("user".parse(), Ok(NetSpec::User));
        assert_eq!("usb".parse(), Ok(NetSpec::Usb));
        assert_eq!("tap:tap0".parse(), Ok(NetSpec::Tap("tap0".into())));
        for bad in ["", "tap", "tap:", "tap:a-name-that-is-too-long", "user:x"] {
            assert!(bad.parse::<NetSpec>().is_err(), "{bad}");
        }
    }
}
