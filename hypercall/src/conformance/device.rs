//! [`crate::Irq`], [`crate::Mmio`] and [`crate::Pci`].

use super::support::{MS, Stop, ensure, helper, not_run, pause, wait_until};
use crate::{
    CpuId, Error, Host, Irq, IrqId, IrqSource, Mmio, MmioDevice, Pci, PciAddress, PhysAddr, Signal, Width,
};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{
    AtomicU32,
    Ordering::{Acquire, Release},
};

/// How long an interrupt takes at most.
const SOON_NS: u64 = 500 * MS;
/// How long to look for one that should not come.
const NEVER_NS: u64 = 20 * MS;

/// An interrupt that is detached when dropped.
struct Attached<H: Host + Irq> {
    host: H,
    irq: IrqId,
    signal: Arc<Signal>,
}

impl<H: Host + Irq> Attached<H> {
    fn new(host: H, source: IrqSource) -> Result<Self, Stop> {
        let signal = Arc::new(Signal::new());
        match host.irq_attach(source, CpuId(0), signal.clone()) {
            Ok(irq) => Ok(Self { host, irq, signal }),
            Err(error) => Err(Stop::Fail(alloc::format!("irq_attach({source:?}): {error}"))),
        }
    }

    fn reaches(&self, count: u32) -> bool {
        wait_until(self.host, SOON_NS, || self.signal.count() == count)
    }
}

impl<H: Host + Irq> Drop for Attached<H> {
    fn drop(&mut self) {
        self.host.irq_detach(self.irq);
    }
}

pub(super) fn irq_not_found<H: Host + Irq>(host: H) -> Result<(), Stop> {
    let nowhere = PciAddress { segment: u16::MAX, bus: 255, device: 31, function: 7 };
    for source in [IrqSource::Line(u32::MAX), IrqSource::Msix { function: nowhere, entry: 0 }] {
        let result = host.irq_attach(source, CpuId(0), Arc::new(Signal::new()));
        ensure!(
            result == Err(Error::NotFound),
            "irq_attach of {source:?}, which is none, returned {result:?}"
        );
    }
    Ok(())
}

pub(super) fn irq_raises<H: Host + Irq>(
    host: H,
    source: IrqSource,
    fire: &mut dyn FnMut(),
) -> Result<(), Stop> {
    let attached = Attached::new(host, source)?;
    let before = attached.signal.count();
    ensure!(before == 0, "the signal was raised {before} times before the device interrupted");
    fire();
    let raised = wait_until(host, SOON_NS, || attached.signal.count() > 0);
    ensure!(raised, "the device interrupted and the signal was not raised");
    Ok(())
}

pub(super) fn irq_raises_once<H: Host + Irq>(
    host: H,
    source: IrqSource,
    fire: &mut dyn FnMut(),
) -> Result<(), Stop> {
    let attached = Attached::new(host, source)?;
    fire();
    wait_until(host, SOON_NS, || attached.signal.count() > 0);
    pause(host, NEVER_NS);
    let count = attached.signal.count();
    ensure!(count == 1, "one interrupt raised the signal {count} times");
    Ok(())
}

pub(super) fn irq_wakes<H: Host + Irq>(
    host: H,
    source: IrqSource,
    fire: &mut dyn FnMut(),
) -> Result<(), Stop> {
    let attached = Attached::new(host, source)?;
    let woken = Arc::new(AtomicU32::new(0));
    let (signal, its_woken) = (attached.signal.clone(), woken.clone());
    let waiting = helper(host, None, move || {
        if signal.wait(&host, 0, Some(host.monotonic_ns() + 2 * SOON_NS)) {
            its_woken.store(1, Release);
        }
    })?;
    pause(host, 5 * MS);
    fire();
    waiting.finish()?;
    ensure!(woken.load(Acquire) == 1, "the interrupt did not wake a thread that waits for its signal");
    Ok(())
}

pub(super) fn irq_again<H: Host + Irq>(
    host: H,
    source: IrqSource,
    fire: &mut dyn FnMut(),
) -> Result<(), Stop> {
    let attached = Attached::new(host, source)?;
    for round in 1..=8 {
        fire();
        let count = || attached.signal.count();
        ensure!(
            wait_until(host, SOON_NS, || count() >= round),
            "interrupt {round} after an unmask did not come"
        );
        host.irq_unmask(attached.irq);
    }
    Ok(())
}

pub(super) fn irq_busy<H: Host + Irq>(host: H, source: IrqSource) -> Result<(), Stop> {
    let attached = Attached::new(host, source)?;
    let again = host.irq_attach(source, CpuId(0), Arc::new(Signal::new()));
    ensure!(again == Err(Error::Busy), "irq_attach of an attached source returned {again:?} instead of Busy");
    drop(attached);
    drop(Attached::new(host, source)?);
    Ok(())
}

pub(super) fn irq_detach<H: Host + Irq>(
    host: H,
    source: IrqSource,
    fire: &mut dyn FnMut(),
) -> Result<(), Stop> {
    let attached = Attached::new(host, source)?;
    let signal = attached.signal.clone();
    fire();
    attached.reaches(1);
    drop(attached);
    ensure!(Arc::strong_count(&signal) == 1, "the host keeps the signal of a detached interrupt");
    let count = signal.count();
    fire();
    pause(host, NEVER_NS);
    ensure!(signal.count() == count, "the signal was raised after the interrupt was detached");
    Ok(())
}

fn transports<H: Host + Mmio>(host: H) -> Vec<MmioDevice> {
    let mut list = Vec::new();
    host.mmio_devices(&mut |device| list.push(device));
    list
}

pub(super) fn mmio_refuses_empty<H: Host + Mmio>(host: H) -> Result<(), Stop> {
    for (at, len) in [(PhysAddr(0xfeb0_0000), 0), (PhysAddr(u64::MAX - 4), 4096)] {
        let result = host.mmio_map(at, len).map(|_| ());
        let refused = matches!(result, Err(Error::Invalid | Error::Denied));
        ensure!(refused, "mmio_map of {len} bytes at {:#x} returned {result:?} instead of Invalid", at.0);
    }
    Ok(())
}

pub(super) fn mmio_devices<H: Host + Mmio>(host: H) -> Result<(), Stop> {
    let list = transports(host);
    ensure!(transports(host) == list, "the list of virtio-mmio transports changes");
    for device in &list {
        ensure!(device.len >= 0x200, "a virtio-mmio transport has {} bytes of registers", device.len);
        let result = host.mmio_map(device.registers, device.len).map(|region| region.len() >= device.len);
        ensure!(result == Ok(true), "mmio_map of a listed transport returned {result:?}");
    }
    if list.is_empty() {
        not_run!("the host knows no virtio-mmio transport");
    }
    Ok(())
}

/// VirtIO 1.2, 4.2.2: the magic number reads "virt".
pub(super) fn mmio_identity<H: Host + Mmio>(host: H) -> Result<(), Stop> {
    for device in transports(host) {
        let Ok(region) = host.mmio_map(device.registers, device.len) else { continue };
        let magic = host.mmio_read(region, 0, Width::U32);
        ensure!(magic == 0x7472_6976, "the transport at {:#x} begins with {magic:#x}", device.registers.0);
    }
    Ok(())
}

fn functions<H: Host + Pci>(host: H) -> Vec<PciAddress> {
    let mut list = Vec::new();
    host.pci_functions(&mut |function| list.push(function));
    list
}

pub(super) fn pci_functions<H: Host + Pci>(host: H) -> Result<(), Stop> {
    let list = functions(host);
    if list.is_empty() {
        not_run!("the host has no PCI functions");
    }
    ensure!(list.is_sorted_by(|one, two| one < two), "functions come twice or out of order");
    for function in list {
        let vendor = host.pci_read(function, 0, Width::U16);
        let present = matches!(vendor, Ok(vendor) if vendor != 0xffff && vendor != 0);
        ensure!(present, "{function} is listed, but its vendor reads {vendor:x?}");
    }
    Ok(())
}

pub(super) fn pci_widths<H: Host + Pci>(host: H) -> Result<(), Stop> {
    for function in functions(host) {
        // Identification registers only: reading others may have effects.
        let whole = host.pci_read(function, 0, Width::U32);
        let halves = [0, 2].map(|offset| host.pci_read(function, offset, Width::U16));
        let bytes = [0, 1, 2, 3].map(|offset| host.pci_read(function, offset, Width::U8));
        let joined = halves[1].and_then(|high| halves[0].map(|low| high << 16 | low));
        let from_bytes = bytes.iter().rev().try_fold(0, |value, byte| byte.map(|byte| value << 8 | byte));
        let fine = whole.is_ok() && whole == joined && whole == from_bytes;
        ensure!(fine, "{function}: register 0 reads {whole:x?}, in halves {halves:x?}, in bytes {bytes:x?}");
    }
    Ok(())
}

pub(super) fn pci_refuses<H: Host + Pci>(host: H) -> Result<(), Stop> {
    let Some(function) = functions(host).into_iter().next() else { return Ok(()) };
    for (offset, width) in
        [(1, Width::U16), (2, Width::U32), (0, Width::U64), (4096, Width::U8), (4095, Width::U16)]
    {
        let result = host.pci_read(function, offset, width);
        ensure!(result == Err(Error::Invalid), "pci_read of {width:?} at {offset} returned {result:x?}");
    }
    Ok(())
}

pub(super) fn pci_absent<H: Host + Pci>(host: H) -> Result<(), Stop> {
    let nowhere = PciAddress { segment: u16::MAX, bus: 255, device: 31, function: 7 };
    let result = host.pci_read(nowhere, 0, Width::U16);
    let absent = matches!(result, Err(Error::NotFound) | Ok(0xffff));
    ensure!(absent, "{nowhere}, which is none, reads {result:x?}");
    Ok(())
}
