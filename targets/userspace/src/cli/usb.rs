//! `usb`.

use super::Outcome;
use super::run::On;
use anykernel::config::Config;
use anykernel_userspace::{RunSpec, UsbSpec, logger, runner};
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Show USB devices
#[derive(Args)]
#[command(after_help = "Examples:
  anykernel usb list                              what is plugged in to this machine
  anykernel usb list --json | jq .path            the same for programs, one object a line
  anykernel usb list --verbose --on rumprun --usb hub --usb keyboard --usb disk:stick.img
                                                  what a unikernel finds of devices that QEMU plays
  anykernel usb list --on linux-module --usb keyboard
                                                  the same as Linux's USB core shows it to the module
  anykernel ls usb:1-2:/                          files of the stick at 1-2, without mounting it")]
pub(super) struct Usb {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// What is plugged in where, what drives it, and why not
    List(List),
}

#[derive(Args)]
struct List {
    /// Descriptors, too
    #[arg(long, short)]
    verbose: bool,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// Where to look: userspace (this machine's own, through libusb), rumprun or linux-module
    #[arg(long, value_enum, default_value = "userspace", value_name = "TARGET")]
    on: On,
    /// Plug something in to the guest: disk:FILE[:rw], keyboard, mouse, hub or net; may be given several times
    #[arg(long = "usb", value_name = "DEVICE")]
    usb: Vec<UsbSpec>,
    /// Write what goes over USB of the guest, for Wireshark
    #[arg(long, value_name = "FILE")]
    usb_pcap: Option<PathBuf>,
}

impl Usb {
    pub(super) fn run(self) -> Outcome {
        let Command::List(list) = self.command;
        let words = ["usb", "list"].into_iter().chain(list.verbose.then_some("--verbose"));
        let app = words.chain(list.json.then_some("--json")).map(Into::into).collect();
        logger::init("warn");
        let config = Config { log: "warn".into(), app, ..Config::default() };
        runner::run(
            list.on.into(),
            &RunSpec { usb: list.usb, usb_pcap: list.usb_pcap, ..RunSpec::new(config) },
        )
    }
}
