//! An application that shows USB devices, the same on every target:
//!
//! * `usb list [--verbose] [--json]`: what is plugged in where, what drives it, and why not;
//! * `usb watch SECONDS`: the same, one line for each change, until that time has passed;
//! * `usb read FILE`: reads a file of a mounted stick and says how long that took.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod decode;
mod list;
mod read;
mod watch;

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel_usb::{Listed, UsbStack};
use hypercall::{ExitStatus, Host};

const USAGE: &str = "write: usb list [--verbose] [--json], usb watch SECONDS, or usb read FILE";

/// Runs what the configuration's `app` says. Context: the application's thread. Blocks.
pub fn main<H: Host>(kernel: &Arc<Kernel<H>>) -> ExitStatus {
    let words: Vec<&str> = kernel.config().app.iter().skip(1).map(String::as_str).collect();
    match words.as_slice() {
        ["list", options @ ..] => match list::Options::parse(options) {
            Some(options) => list::run(kernel, options),
            None => usage(),
        },
        ["watch", seconds] => match seconds.parse() {
            Ok(seconds) => watch::run(kernel, seconds),
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
