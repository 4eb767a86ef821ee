//! virtio-pci, modern (VirtIO 1.2, 4.1). Transitional devices are used through their modern interface.

use super::{Doorbell, InterruptMode, Registers};
use crate::error::{Error, Result};
use crate::queue::Queue;
use crate::spec::{DEVICE_BLOCK, DEVICE_NET, pci as reg};
use alloc::sync::Arc;
use anykernel::driver::pci::{Base, Function};
use hypercall::{CpuId, DeviceHost, IrqSource, PciAddress, PhysAddr, Signal, Width};

const CONFIG_ID: u16 = 0x00;
const CAPABILITY_VENDOR: u8 = 0x09;
/// No structure of a virtio device is larger; a device that claims more gets this much mapped.
const MAX_STRUCTURE: u32 = 1 << 20;

/// A virtio-pci device.
pub(crate) struct PciTransport<H: DeviceHost> {
    host: H,
    address: PciAddress,
    common: Registers<H>,
    notify: Registers<H>,
    notify_multiplier: u32,
    isr: Registers<H>,
    device: Option<Registers<H>>,
    msix_entries: u16,
    mode: InterruptMode,
}

/// A structure as its capability describes it (4.1.4).
#[derive(Debug, Clone, Copy)]
struct Structure {
    bar: u8,
    offset: u32,
    len: u32,
}

/// The virtio device type of a function, if it is one.
pub(crate) fn device_type<H: DeviceHost>(host: H, at: PciAddress) -> Option<u32> {
    let id = host.pci_read(at, CONFIG_ID, Width::U32).ok()?;
    if id & 0xffff != reg::VENDOR {
        return None;
    }
    match id >> 16 {
        reg::TRANSITIONAL_NET => Some(DEVICE_NET),
        reg::TRANSITIONAL_BLOCK => Some(DEVICE_BLOCK),
        id if (reg::MODERN_BASE..reg::MODERN_BASE + 0x40).contains(&id) => Some(id - reg::MODERN_BASE),
        _ => None,
    }
}

impl<H: DeviceHost> PciTransport<H> {
    /// Sets a function up. Its type was found by [`device_type`].
    pub(crate) fn new(host: H, at: PciAddress) -> Result<Self> {
        let function = Function::new(host, at);
        let failed = |error| Error::Host("reading its PCI configuration", error);
        let [mut common, mut notify, mut isr, mut device] = [None::<Structure>; 4];
        let mut notify_multiplier = 0;
        for (id, base) in function.capabilities().map_err(failed)? {
            // The last 16 bytes of the list's page hold no whole capability.
            if id != CAPABILITY_VENDOR || base > 0xf0 {
                continue;
            }
            let kind = function.read8(base + 3).map_err(failed)?;
            let structure = Structure {
                bar: function.read8(base + 4).map_err(failed)?,
                offset: function.read32(base + 8).map_err(failed)?,
                len: function.read32(base + 12).map_err(failed)?,
            };
            // The first of each kind that we can use is the device's preference (4.1.4.1).
            let place = match kind {
                reg::CAP_COMMON => Some(&mut common),
                reg::CAP_NOTIFY => Some(&mut notify),
                reg::CAP_ISR => Some(&mut isr),
                reg::CAP_DEVICE => Some(&mut device),
                _ => None,
            };
            if let Some(place) = place
                && place.is_none()
                && function.base(structure.bar).map_err(failed)? != Base::NoMemory
            {
                *place = Some(structure);
                if kind == reg::CAP_NOTIFY && base <= 0xec {
                    notify_multiplier = function.read32(base + 16).map_err(failed)?;
                }
            }
        }

        let missing = Error::Unsupported(
            "it has no modern virtio interface in memory: with QEMU, drop disable-modern=on",
        );
        let (common, notify, isr) = (common.ok_or(missing)?, notify.ok_or(missing)?, isr.ok_or(missing)?);
        function.enable().map_err(|error| Error::Host("enabling it", error))?;
        let line = function.line().map_err(failed)?.unwrap_or(u32::MAX);
        Ok(Self {
            host,
            address: at,
            common: map(host, function, common, reg::COMMON_BYTES)?,
            notify: map(host, function, notify, 2)?,
            notify_multiplier,
            isr: map(host, function, isr, 1)?,
            device: device.map(|structure| map(host, function, structure, 1)).transpose()?,
            msix_entries: function.msix_entries().map_err(failed)?,
            mode: InterruptMode::Line(line),
        })
    }

    pub(super) fn host(&self) -> H {
        self.host
    }

    pub(super) fn address(&self) -> PciAddress {
        self.address
    }

    pub(super) fn isr(&self) -> Registers<H> {
        self.isr
    }

    pub(super) fn interrupt_mode(&self) -> InterruptMode {
        self.mode
    }

    pub(super) fn is_legacy(&self) -> bool {
        false
    }

    pub(super) fn status(&self) -> u8 {
        self.common.read(reg::DEVICE_STATUS, Width::U8) as u8
    }

    pub(super) fn set_status(&mut self, status: u8) {
        self.common.write(reg::DEVICE_STATUS, Width::U8, u64::from(status));
    }

    pub(super) fn device_features(&mut self) -> u64 {
        let mut features = 0;
        for half in 0..2 {
            self.common.write32(reg::DEVICE_FEATURE_SELECT, half);
            features |= u64::from(self.common.read32(reg::DEVICE_FEATURE)) << (32 * half);
        }
        features
    }

    pub(super) fn set_driver_features(&mut self, features: u64) {
        for half in 0..2 {
            self.common.write32(reg::DRIVER_FEATURE_SELECT, half);
            self.common.write32(reg::DRIVER_FEATURE, (features >> (32 * half)) as u32);
        }
    }

    fn select(&mut self, index: u16) {
        self.common.write(reg::QUEUE_SELECT, Width::U16, u64::from(index));
    }

    pub(super) fn queue_max(&mut self, index: u16) -> u16 {
        self.select(index);
        self.common.read(reg::QUEUE_SIZE, Width::U16) as u16
    }

    pub(super) fn enable_queue<T>(
        &mut self,
        index: u16,
        queue: &Queue<H, T>,
        vector: u16,
    ) -> Result<Doorbell<H>> {
        self.select(index);
        let offset = self.common.read(reg::QUEUE_NOTIFY_OFF, Width::U16) as u32;
        // In 64 bits: both factors are the device's.
        let offset = usize::try_from(u64::from(offset) * u64::from(self.notify_multiplier))
            .map_err(|_| Error::BadDevice("a queue's doorbell lies outside the notification area"))?;
        let doorbell = Doorbell::new(self.notify, offset, Width::U16, index)?;
        if self.common.read(reg::QUEUE_ENABLE, Width::U16) != 0 {
            return Err(Error::BadDevice("a queue is in use after the reset"));
        }
        self.common.write(reg::QUEUE_SIZE, Width::U16, u64::from(queue.size()));
        let vector = match self.mode {
            InterruptMode::Msix(_) => vector,
            InterruptMode::Line(_) => reg::NO_VECTOR,
        };
        self.common.write(reg::QUEUE_MSIX_VECTOR, Width::U16, u64::from(vector));
        if self.common.read(reg::QUEUE_MSIX_VECTOR, Width::U16) as u16 != vector {
            return Err(Error::BadDevice("it cannot give a queue its interrupt vector"));
        }
        let at = queue.addresses();
        self.common.write64(reg::QUEUE_DESC, at.descriptors);
        self.common.write64(reg::QUEUE_DRIVER, at.driver);
        self.common.write64(reg::QUEUE_DEVICE, at.device);
        self.common.write(reg::QUEUE_ENABLE, Width::U16, 1);
        Ok(doorbell)
    }

    pub(super) fn config_generation(&self) -> Option<u32> {
        Some(self.common.read(reg::CONFIG_GENERATION, Width::U8) as u32)
    }

    pub(super) fn config(&self, offset: usize, width: Width) -> Result<u64> {
        self.device
            .as_ref()
            .ok_or(Error::BadDevice("it has no device configuration"))?
            .try_read(offset, width)
    }

    /// Tries MSI-X entries until the host has no more; with none at all the line is used.
    pub(super) fn choose_interrupts(&mut self, wanted: u16) -> u16 {
        let signal = Arc::new(Signal::new());
        let mut attached = alloc::vec::Vec::new();
        for entry in 0..wanted.min(self.msix_entries) {
            let source = IrqSource::Msix { function: self.address, entry };
            match self.host.irq_attach(source, CpuId(0), signal.clone()) {
                Ok(id) => attached.push(id),
                Err(_) => break,
            }
        }
        let vectors = attached.len() as u16;
        for id in attached {
            self.host.irq_detach(id);
        }
        if vectors > 0 {
            self.mode = InterruptMode::Msix(vectors);
        }
        vectors
    }

    pub(super) fn set_config_vector(&mut self, vector: u16) {
        let vector = match self.mode {
            InterruptMode::Msix(_) => vector,
            InterruptMode::Line(_) => reg::NO_VECTOR,
        };
        // A device without resources for it leaves us without link changes, no more.
        self.common.write(reg::CONFIG_MSIX_VECTOR, Width::U16, u64::from(vector));
    }
}

fn map<H: DeviceHost>(
    host: H,
    function: Function<H>,
    structure: Structure,
    least: usize,
) -> Result<Registers<H>> {
    let failed = |error| Error::Host("reading its PCI configuration", error);
    let len = structure.len.min(MAX_STRUCTURE);
    if (len as usize) < least || structure.offset & 3 != 0 {
        return Err(Error::BadDevice("a capability describes a structure that is too small or misaligned"));
    }
    let base = match function.base(structure.bar).map_err(failed)? {
        Base::Memory(base) => base,
        Base::Unassigned => {
            return Err(Error::Unsupported("its memory has no address: the firmware assigned none"));
        }
        Base::NoMemory => return Err(Error::BadDevice("a structure is not in memory any more")),
    };
    let start = base
        .checked_add(u64::from(structure.offset))
        .ok_or(Error::BadDevice("a capability points beyond all memory"))?;
    let region = host
        .mmio_map(PhysAddr(start), len as usize)
        .map_err(|error| Error::Host("mapping its registers", error))?;
    Ok(Registers::new(host, region))
}
