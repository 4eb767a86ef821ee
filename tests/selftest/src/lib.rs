//! An application that checks its own kernel from the inside and prints the verdicts as JSON lines.
//!
//! It runs on every target, unchanged: the conformance suite against the host, files of the mounted disks against the
//! checksums that came with them, and the network stack against itself and its neighbours. The last line is
//! `{"selftest":"done","failed":N}`; the exit status says the same.
//!
//! Disks it knows: a file `/SHA256SUMS` (`<hex>  <path>` a line, as sha256sum(1) writes) is checked whole; a FAT
//! file system mounted at `/fat` is checked in the same way, and written to when it is not read-only.
//!
//! `selftest hold` is for trying what an end from outside does: it writes `/held.txt`, does not sync it, and waits until
//! the instance is stopped.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod files;
mod network;
mod report;

use alloc::sync::Arc;
use anykernel::Kernel;
use hypercall::conformance::CheckReport;
use hypercall::{ExitStatus, Host};
use report::Report;

/// Prints the verdicts of a driver contract's conformance suite, which only the target can call, as in
/// `suite(host, |each| hypercall::conformance::run_dma(host, each))`. Says how many did not pass. Context: thread.
pub fn suite<H: Host>(host: H, run: impl FnOnce(&mut dyn FnMut(CheckReport))) -> usize {
    let mut report = Report::new(host);
    report.suite(run);
    report.failed()
}

/// Runs every check. Context: the application's thread. Blocks.
pub fn main<H: Host>(kernel: &Arc<Kernel<H>>) -> ExitStatus {
    let mut report = Report::new(kernel.host());
    let groups: &[&str] = &["conformance", "ext4", "fat", "tmpfs", "network"];
    let wanted = kernel.config().app.get(1..).unwrap_or_default();
    if wanted == ["hold"] {
        files::hold(kernel, &mut report, b"/held.txt");
        kernel.wait_for_stop();
        return report.finish();
    }
    if let Some(unknown) = wanted.iter().find(|name| !groups.contains(&name.as_str())) {
        log::error!("selftest: unknown group {unknown}; known are {}, and hold alone", groups.join(", "));
        return ExitStatus::Usage;
    }
    let runs = |group: &str| wanted.is_empty() || wanted.iter().any(|name| name == group);

    if runs("conformance") {
        report.suite(|each| hypercall::conformance::run(kernel.host(), each));
    }
    if runs("ext4") {
        files::checksums(kernel, &mut report, "ext4", b"/");
        files::read_only(kernel, &mut report);
    }
    if runs("fat") {
        files::checksums(kernel, &mut report, "fat", b"/fat");
        files::read_write(kernel, &mut report, "fat", b"/fat");
    }
    if runs("network") {
        network::run(kernel, &mut report);
    }
    report.finish()
}
