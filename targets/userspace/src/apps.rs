//! The applications of this workspace, by name.

use anykernel::Kernel;
use hypercall::{ExitStatus, Host};
use std::sync::Arc;

/// Name and what it is, of each application that every target can run.
pub const APPS: &[(&str, &str)] = &[
    ("httpd", "serves the mounted files over HTTP on port 80"),
    ("files", "serves the mounted files over 9P on port 564"),
    ("selftest", "checks the kernel it runs in and prints the verdicts as JSON lines"),
    ("usb", "shows USB devices: usb list, usb watch SECONDS, usb keys, usb read FILE"),
    ("netbench", "the server side of the network benchmarks"),
    ("contractbench", "measures what a contract call costs"),
];

/// Runs the application `name`; `None` if there is none of that name.
pub fn run<H: Host>(name: &str, kernel: &Arc<Kernel<H>>) -> Option<ExitStatus> {
    Some(match name {
        "httpd" => httpd::main(kernel),
        "files" => files::main(kernel),
        "selftest" => selftest::main(kernel),
        "usb" => usb_app::main(kernel),
        "netbench" => netbench::main(kernel),
        "contractbench" => contractbench::main(kernel),
        _ => return None,
    })
}
