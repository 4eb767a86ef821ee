//! `usb-conformance BUS-PORT...`: judges how a process binds the host-USB contract to libusb, on real devices. A line for each
//! check; run by a test in a guest that has such devices.

use anykernel_userspace::usb::UsbBus;
use anykernel_userspace::{ConsoleSink, HostOwner, HostSetup};
use hypercall::conformance::{self, Outcome};
use hypercall::{HostUsb, UsbPath};
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut all_good = true;
    for place in std::env::args().skip(1) {
        let bus = UsbBus::new().unwrap_or_else(|failure| panic!("{failure}"));
        let setup = HostSetup { cpus: 2, usb: Some(bus), console: ConsoleSink::Null, ..HostSetup::default() };
        let owner = HostOwner::new(setup);
        let (host, wanted) = (owner.host(), UsbPath::parse(&place));
        let mut device = None;
        host.usb_devices(&mut |info| {
            if Some(info.path) == wanted {
                device = Some(info.id);
            }
        });
        let Some(device) = device else {
            println!("{place}: nothing is there");
            return ExitCode::FAILURE;
        };
        conformance::run_usb(host, device, &mut |report| {
            all_good &= matches!(report.outcome, Outcome::Pass);
            println!("{place}: {report}");
        });
    }
    if all_good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
