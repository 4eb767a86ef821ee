//! An application that shows USB devices, the same on every target:
//!
//! * `usb list [--verbose] [--json]`: what is plugged in where, what drives it, and why not;
//! * `usb watch SECONDS [--read]`: the same, one line for each change, until that time has passed, and reads all disks meanwhile;
//! * `usb read FILE`: reads a file of a mounted stick and says how long that took;
//! * `usb keys [COUNT]`: what is typed on keyboards and moved on mice, one JSON object for each event;
//! * `usb fill DISK DIRECTORY`: writes there until the disk is pulled out, and checks what it had synced once it is plugged in
//!   again.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod decode;
mod fill;
mod keys;
mod list;
mod read;
mod watch;

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel_usb::{Listed, UsbStack};
use hypercall::{ExitStatus, Host};

const USAGE: &str = "write: usb list [--verbose] [--json], usb watch SECONDS [--read], usb read FILE, usb keys [COUNT], or usb fill DISK DIRECTORY";

/// Runs what the configuration's `app` says. Context: the application's thread. Blocks.
pub fn main<H: Host>(kernel: &Arc<Kernel<H>>) -> ExitStatus {
    main_with(kernel, None)
}

/// As [`main`]. `usb watch` also shows what `free_bytes` says, whenever nothing changes any more.
pub fn main_with<H: Host>(kernel: &Arc<Kernel<H>>, free_bytes: Option<fn() -> u64>) -> ExitStatus {
    let words: Vec<&str> = kernel.config().app.iter().skip(1).map(String::as_str).collect();
    match words.as_slice() {
        ["list", options @ ..] => match list::Options::parse(options) {
            Some(options) => list::run(kernel, options),
            None => usage(),
        },
        ["watch", seconds, options @ ..] => match (seconds.parse(), options) {
            (Ok(seconds), []) => watch::run(kernel, seconds, false, free_bytes),
            (Ok(seconds), ["--read"]) => watch::run(kernel, seconds, true, free_bytes),
            _ => usage(),
        },
        ["fill", disk, directory] => fill::run(kernel, disk, directory),
        ["keys"] => keys::run(kernel, None),
        ["keys", count] => match count.parse() {
            Ok(count) => keys::run(kernel, Some(count)),
            Err(_) => usage(),
        },
        ["read", path] => read::run(kernel, path),
        _ => usage(),
    }
}

fn usage() -> ExitStatus {
    log::error!("{USAGE}");
    ExitStatus::Usage
}

/// Everything that is plugged in, on all buses.
fn devices<H: Host>(kernel: &Kernel<H>) -> Vec<Listed> {
    kernel.provided::<UsbStack<H>>().iter().flat_map(|stack| stack.tree()).collect()
}

fn print<H: Host>(kernel: &Kernel<H>, line: &str) {
    kernel.host().console_write(alloc::format!("{line}\n").as_bytes());
}
