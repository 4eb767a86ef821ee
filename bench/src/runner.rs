//! The benchmarks, one module each; every one returns its records.

pub mod boot;
mod busy;
pub mod contract;
pub mod fuzz;
pub mod guest;
pub mod image;
pub mod linux;
pub mod net;
pub mod sim;
pub mod usb;
pub mod vfs;

use crate::record::Record;
use std::process::{Command, Stdio};

/// An error is one line for a person.
pub type Result<T = Vec<Record>> = std::result::Result<T, String>;

/// Runs a program to its end; what it printed, or a line with what it complained of.
fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }
}

/// Tells how far a benchmark is, on standard error.
fn progress(bench: &str, turn: usize, turns: usize) {
    eprintln!("bench {bench}: turn {} of {turns}", turn + 1);
}
