//! Finding controllers.

use crate::start::{self, Counters};
use alloc::boxed::Box;
use alloc::sync::Arc;
use anykernel::manifest::Capability;
use anykernel::{Kernel, Manifest, StartError};
use anykernel_usb::controller::HostController;
use hypercall::{ContractVersion, DeviceHost, Signal};

/// What the driver uses.
pub const MANIFEST: Manifest = Manifest {
    name: "xhci",
    summary: "USB host controllers (xHCI 1.2)",
    core: &[Capability::Clock, Capability::Memory, Capability::Threads, Capability::Cpus],
    contracts: &[
        ContractVersion::CORE,
        ContractVersion::DMA,
        ContractVersion::MMIO,
        ContractVersion::PCI,
        ContractVersion::IRQ,
    ],
};

/// Takes over every xHCI controller on PCI and hands each to `found`, with the signal that it raises, in the order of their
/// addresses.
///
/// A controller that fails is given up with one line in the log; the others go on. Errors: [`StartError::Refused`] if the
/// host lacks a contract. Context: thread.
pub fn probe<H: DeviceHost>(
    kernel: &Arc<Kernel<H>>,
    found: &mut dyn FnMut(Box<dyn HostController>, Arc<Signal>),
) -> Result<(), StartError> {
    kernel.admit(MANIFEST)?;
    let host = kernel.host();
    let mut functions = alloc::vec::Vec::new();
    host.pci_functions(&mut |function| functions.push(function));
    for function in functions.into_iter().filter(|function| start::is_xhci(host, *function)) {
        let signal = Arc::new(Signal::new());
        let counters = Counters {
            spurious: kernel.counter("xhci.spurious_events"),
            lost: kernel.counter("xhci.lost_transfers"),
        };
        match start::open(host, function, &signal, counters) {
            Ok(controller) => found(Box::new(controller), signal),
            Err(error) => log::error!("xhci {function}: {error}; going on without this controller"),
        }
    }
    Ok(())
}
