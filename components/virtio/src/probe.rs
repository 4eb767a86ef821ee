//! Finding devices.

use crate::blk::Blk;
use crate::error::Result;
use crate::net::Net;
use crate::spec::{DEVICE_BLOCK, DEVICE_NET};
use crate::transport::{MmioTransport, PciTransport, Place, Transport};
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::manifest::Capability;
use anykernel::{Kernel, Manifest, StartError};
use hypercall::{ContractVersion, DeviceHost};

/// What the block driver uses.
pub const BLK_MANIFEST: Manifest = Manifest {
    name: "virtio-blk",
    summary: "block devices of virtual machines (VirtIO 1.2, 5.2)",
    core: &[Capability::Clock, Capability::Memory, Capability::Threads, Capability::Cpus],
    contracts: CONTRACTS,
};

/// What the network driver uses.
pub const NET_MANIFEST: Manifest = Manifest {
    name: "virtio-net",
    summary: "network devices of virtual machines (VirtIO 1.2, 5.1)",
    core: &[
        Capability::Clock,
        Capability::Memory,
        Capability::Threads,
        Capability::Cpus,
        Capability::Entropy,
    ],
    contracts: CONTRACTS,
};

const CONTRACTS: &[ContractVersion] = &[
    ContractVersion::CORE,
    ContractVersion::DMA,
    ContractVersion::MMIO,
    ContractVersion::PCI,
    ContractVersion::IRQ,
];

/// Finds every virtio block and network device on virtio-mmio and PCI and registers them, in the order in which the host
/// names them: `disk0`, `disk1`, ..., `nic0`, ....
///
/// A device that fails is given up with one line in the log; the others go on. Errors: [`StartError::Refused`] if the
/// host lacks a contract. Context: thread.
pub fn probe<H: DeviceHost>(kernel: &Arc<Kernel<H>>) -> Result<(), StartError> {
    kernel.admit(BLK_MANIFEST)?;
    kernel.admit(NET_MANIFEST)?;
    let host = kernel.host().of_component("virtio");

    let mut devices = Vec::new();
    host.mmio_devices(&mut |device| devices.push(device));
    for device in devices {
        let place = Place::Mmio(device.registers);
        let outcome = MmioTransport::new(host, device).and_then(|transport| match transport {
            Some(transport) => {
                let kind = transport.device_type();
                start(kernel, place, kind, Transport::Mmio(transport))
            }
            None => Ok(()),
        });
        report(place, outcome);
    }

    let mut functions = Vec::new();
    host.pci_functions(&mut |function| functions.push(function));
    for function in functions {
        let place = Place::Pci(function);
        if let Some(kind) = crate::transport::pci_device_type(host, function)
            && matches!(kind, DEVICE_NET | DEVICE_BLOCK)
        {
            let outcome = PciTransport::new(host, function)
                .and_then(|transport| start(kernel, place, kind, Transport::Pci(transport)));
            report(place, outcome);
        }
    }
    Ok(())
}

fn start<H: DeviceHost>(
    kernel: &Arc<Kernel<H>>,
    place: Place,
    kind: u32,
    transport: Transport<H>,
) -> Result<()> {
    match kind {
        DEVICE_NET => Net::start(kernel, place, transport),
        DEVICE_BLOCK => Blk::start(kernel, place, transport),
        _ => {
            log::debug!("{place}: no driver for virtio device type {kind}");
            Ok(())
        }
    }
}

fn report(place: Place, outcome: Result<()>) {
    if let Err(error) = outcome {
        log::error!("{place}: {error}; going on without this device");
    }
}
