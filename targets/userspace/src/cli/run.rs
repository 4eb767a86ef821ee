//! `run` and `demo`.

use super::{Outcome, size};
use anykernel::config::{Config, Interface, Mount};
use anykernel_userspace::runner::{self, Target};
use anykernel_userspace::{
    DiskSpec, Failure, MachineKind, NetSpec, Publish, RunSpec, UsbSpec, apps, gateway, logger, plan,
};
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// Where to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum On {
    /// In this process, without privileges
    Userspace,
    /// As a unikernel in QEMU
    Rumprun,
    /// Inside a Debian kernel in QEMU
    LinuxModule,
}

impl From<On> for Target {
    fn from(on: On) -> Self {
        match on {
            On::Userspace => Target::Userspace,
            On::Rumprun => Target::Rumprun,
            On::LinuxModule => Target::LinuxModule,
        }
    }
}

fn apps_help() -> String {
    let list: Vec<_> = apps::APPS.iter().map(|(name, what)| format!("  {name:<14} {what}")).collect();
    format!(
        "Applications:\n{}\n\n\
Examples:
  anykernel run httpd --disk doc.ext4 --publish 8080:80
      serve the image on http://127.0.0.1:8080/, in this process
  anykernel run httpd --on rumprun --cpus 2 --disk doc.ext4 --publish 8080:80
      the same as a unikernel with two CPUs
  anykernel run httpd --disk doc.ext4 --net tap:tap0 --address 192.168.7.2/24 --gateway 192.168.7.1
      on a TAP interface, with an address of its own
  anykernel run httpd --disk doc.ext4 --publish 8080:80 -- --root /html
      what follows -- goes to the application

The first disk, or its first partition with a file system, is mounted at / (read-only unless :rw). Ctrl-C ends it.",
        list.join("\n")
    )
}

/// Run an application on one of the targets
#[derive(Args)]
#[command(after_help = apps_help())]
pub(super) struct Run {
    /// The application
    app: String,
    /// Its arguments; put -- before those that begin with a dash
    args: Vec<String>,
    /// Where to run it
    #[arg(long, value_enum, default_value = "userspace", value_name = "TARGET")]
    on: On,
    /// A disk image or block device; may be given several times (disk0, disk1, ...)
    #[arg(long = "disk", value_name = "FILE[:ro|:rw]")]
    disks: Vec<DiskSpec>,
    /// Mount another disk, as in disk1:/fat or disk0p2:/data:rw
    #[arg(long = "mount", value_name = "DEVICE:/PATH[:rw]", value_parser = parse_mount)]
    mounts: Vec<Mount>,
    /// Forward a TCP port of this host (127.0.0.1) into the guest; may be given several times
    #[arg(long = "publish", short = 'p', value_name = "HOST:GUEST")]
    publish: Vec<Publish>,
    /// Plug something in to the guest's USB: disk:FILE[:rw], keyboard, mouse, hub (for those that follow), net (the network
    /// by USB) or host:BUS-PORT (a device of this machine, also for --on userspace); may be given several times. Disks are called by their place, as usb1-1
    #[arg(long = "usb", value_name = "DEVICE")]
    usb: Vec<UsbSpec>,
    /// The network: user (no privileges), tap:NAME, usb (an interface among the USB devices) or none
    #[arg(long, default_value = "user", value_name = "NET")]
    net: NetSpec,
    /// The guest's address on a TAP or USB; without it the guest asks by DHCP
    #[arg(long, value_name = "ADDRESS/LENGTH")]
    address: Option<String>,
    /// The guest's default router there
    #[arg(long, value_name = "ADDRESS", requires = "address")]
    gateway: Option<String>,
    /// The machine that a unikernel boots on: microvm or q35
    #[arg(long, default_value = "microvm", value_name = "KIND")]
    machine: MachineKind,
    /// CPUs of the guest
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256), value_name = "N")]
    cpus: u32,
    /// Memory of the guest, as in 64M
    #[arg(long, value_parser = size::parse, value_name = "SIZE")]
    memory: Option<u64>,
    /// Write a trace of hypercalls, for https://ui.perfetto.dev
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Tell `anykernel top` what hypercalls cost, at this path
    #[arg(long, value_name = "PATH", conflicts_with = "record")]
    control: Option<PathBuf>,
    /// Record everything that the guest is told, for `anykernel replay`; it runs more slowly
    #[arg(long, value_name = "FILE", conflicts_with = "trace")]
    record: Option<PathBuf>,
    /// How large the recording may become, as in 200M; after that the run goes on unrecorded
    #[arg(long, value_parser = size::parse, default_value = "1G", requires = "record", value_name = "SIZE")]
    record_limit: u64,
    /// Write the frames of the link, for Wireshark
    #[arg(long, value_name = "FILE")]
    pcap: Option<PathBuf>,
    /// Write what goes over USB, for Wireshark
    #[arg(long, value_name = "FILE")]
    usb_pcap: Option<PathBuf>,
    /// The configuration document (see `anykernel schema`); options given here win over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Show messages up to this level: off, error, warn, info, debug or trace; warn unless --config says otherwise
    #[arg(long, value_name = "LEVEL", value_parser = ["off", "error", "warn", "info", "debug", "trace"])]
    log: Option<String>,
    /// One JSON object a line on standard output: {"event":"console"|"publish"|"exit",...}
    #[arg(long)]
    json: bool,
}

fn parse_mount(text: &str) -> Result<Mount, String> {
    const HELP: &str = "write DEVICE:/PATH or DEVICE:/PATH:rw, as in disk1:/data";
    let (text, read_only) = match text.strip_suffix(":rw") {
        Some(text) => (text, false),
        None => (text.strip_suffix(":ro").unwrap_or(text), true),
    };
    let (source, target) = text.split_once(':').ok_or(HELP)?;
    if source.is_empty() || !target.starts_with('/') {
        return Err(HELP.into());
    }
    Ok(Mount { source: source.into(), target: target.into(), kind: None, read_only })
}

fn read_config(path: &PathBuf) -> Result<Config, Failure> {
    let shown = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::usage(format!("{shown}: {error}: --config takes a JSON file")))?;
    Config::parse(&text).map_err(|error| Failure::usage(format!("{shown}: {error}")))
}

impl Run {
    pub(super) fn run(self) -> Outcome {
        let unsaid = || Ok(Config { log: "warn".into(), ..Config::default() });
        let mut config = self.config.as_ref().map_or_else(unsaid, read_config)?;
        if let Some(level) = self.log {
            config.log = level;
        }
        logger::init(&config.log);
        config.app = std::iter::once(self.app).chain(self.args).collect();
        if self.address.is_some() && !matches!(self.net, NetSpec::Tap(_) | NetSpec::Usb) {
            return Err(Failure::usage(
                "--address and --gateway are for --net tap:NAME and usb: the other networks decide",
            ));
        }
        if config.mounts.is_empty()
            && let Some(disk) = self.disks.first()
        {
            config.mounts.push(plan::root_mount(&disk.path, disk.writable)?);
        }
        config.mounts.extend(self.mounts);
        if self.on == On::Userspace {
            config.usb.extend(self.usb.iter().filter_map(|one| match one {
                UsbSpec::Host(place) => Some(place.to_string()),
                _ => None,
            }));
        }
        if config.interfaces.is_empty() {
            config.interfaces = match &self.net {
                NetSpec::User => vec![gateway::guest_interface()],
                NetSpec::Tap(_) | NetSpec::Usb => vec![Interface {
                    ipv4: self.address.unwrap_or_else(|| "dhcp".into()),
                    gateway: self.gateway,
                    ..Interface::default()
                }],
                NetSpec::None => Vec::new(),
            };
        }
        let spec = RunSpec {
            config,
            disks: self.disks,
            publish: self.publish,
            usb: self.usb,
            net: self.net,
            machine: self.machine,
            cpus: self.cpus,
            memory: self.memory,
            // What is told of calls comes from a trace.
            trace: self.trace.or_else(|| self.control.as_ref().map(|_| "/dev/null".into())),
            control: self.control,
            record: self.record,
            record_limit: self.record_limit,
            pcap: self.pcap,
            usb_pcap: self.usb_pcap,
            json: self.json,
            quiet: false,
            stderr: false,
        };
        runner::run(self.on.into(), &spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts() {
        let mount = parse_mount("disk1:/fat").unwrap();
        assert_eq!((mount.source.as_str(), mount.target.as_str(), mount.read_only), ("disk1", "/fat", true));
        assert!(!parse_mount("disk1:/fat:rw").unwrap().read_only);
        for bad in ["disk1", "disk1:fat", ":/fat", "/fat"] {
            assert!(parse_mount(bad).is_err(), "{bad}");
        }
    }
}
