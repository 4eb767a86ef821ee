//! The contract's own suite on this host, as JSON lines: the application `conformance`.
//!
//! Arguments: `core` (also without any), `block:N` for disk N (if it is writable its first MiB is overwritten), `link` for
//! links 0 and 1, which Linux must have bridged, `usb:1-2` for the USB device at that place. It runs without components, since those use the links themselves.

use crate::LinuxHost;
use crate::domain::Domain;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use anykernel::Kernel;
use hypercall::conformance::{self, CheckReport, Outcome};
use hypercall::{Clock, Console, ExitStatus, HostLink, HostUsb, Signal, UsbPath};

/// Runs the suites that the arguments name.
pub(crate) fn main(kernel: &Arc<Kernel<Domain>>) -> ExitStatus {
    let arguments = kernel.config().app.get(1..).unwrap_or_default();
    let core = [String::from("core")];
    let mut failed = 0;
    for argument in if arguments.is_empty() { &core } else { arguments } {
        let disk = argument.strip_prefix("block:").and_then(|number| number.parse().ok());
        let place = argument.strip_prefix("usb:").and_then(UsbPath::parse);
        failed += match (argument.as_str(), disk) {
            ("core", _) => failures(|each| conformance::run(LinuxHost, each)),
            ("link", _) => link(),
            (_, Some(disk)) => block(disk),
            _ if place.is_some() => place.map_or(0, usb),
            _ => {
                log::error!("conformance: {argument:?} is not a suite: write core, block:N, link or usb:1-2");
                return ExitStatus::Usage;
            }
        };
    }
    LinuxHost.console_write(format!("{{\"conformance\":\"done\",\"failed\":{failed}}}\n").as_bytes());
    if failed == 0 { ExitStatus::Success } else { ExitStatus::Failure }
}

/// Prints the verdicts of a suite and says how many were failures: what could not be judged is none.
fn failures(run: impl FnOnce(&mut dyn FnMut(CheckReport))) -> usize {
    let mut failed = 0;
    selftest::suite(LinuxHost, |each| {
        run(&mut |check| {
            failed += usize::from(matches!(check.outcome, Outcome::Fail(_)));
            each(check);
        });
    });
    failed
}

fn block(disk: u32) -> usize {
    failures(|each| conformance::run_block(LinuxHost, disk, each))
}

fn link() -> usize {
    let peer = (LinuxHost.link_count() > 1).then_some(1);
    if peer.is_some() {
        wait_for_wire();
    }
    failures(|each| conformance::run_link(LinuxHost, 0, peer, each))
}

/// A device that is not there is a failure.
fn usb(place: UsbPath) -> usize {
    let mut device = None;
    LinuxHost.usb_devices(&mut |info| device = device.or((info.path == place).then_some(info.id)));
    match device {
        Some(device) => failures(|each| conformance::run_usb(LinuxHost, device, each)),
        None => {
            log::error!("conformance: no USB device is at {place}");
            1
        }
    }
}

/// Sends from link 0 until link 1 receives: whoever loads the module bridges them only then. At most 10 s.
fn wait_for_wire() {
    let signal = || Arc::new(Signal::new());
    if LinuxHost.link_open(0, signal()).is_ok() && LinuxHost.link_open(1, signal()).is_ok() {
        // A broadcast of no known protocol (IEEE 802, local experimental EtherType 1).
        let mut frame = [0; 60];
        frame[..6].fill(0xff);
        frame[6] = 2;
        frame[12..14].copy_from_slice(&[0x88, 0xb5]);
        let mut buf = [0; 2048];
        for _ in 0..100 {
            // What is lost is sent again.
            let _ = LinuxHost.link_send(0, &frame);
            let sleep = Signal::new();
            sleep.wait(&LinuxHost, 0, Some(LinuxHost.monotonic_ns() + 100_000_000));
            if LinuxHost.link_receive(1, &mut buf).is_ok_and(|len| buf[..len] == frame) {
                break;
            }
        }
    }
    LinuxHost.link_close(0);
    LinuxHost.link_close(1);
}
