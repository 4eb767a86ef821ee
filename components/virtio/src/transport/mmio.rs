//! virtio-mmio, version 2 and legacy version 1 (VirtIO 1.2, 4.2).

use super::{Doorbell, Registers};
use crate::error::{Error, Result};
use crate::queue::Queue;
use crate::spec::{mmio as reg, ring};
use hypercall::{DeviceHost, MmioDevice, Width};

/// A virtio-mmio device.
pub(crate) struct MmioTransport<H: DeviceHost> {
    host: H,
    registers: Registers<H>,
    legacy: bool,
    device_type: u32,
    line: u32,
}

impl<H: DeviceHost> MmioTransport<H> {
    /// Looks at a device. `None`: an empty slot.
    pub(crate) fn new(host: H, device: MmioDevice) -> Result<Option<Self>> {
        if device.len < reg::CONFIG {
            return Err(Error::BadDevice("the register window is too small"));
        }
        let region = host
            .mmio_map(device.registers, device.len)
            .map_err(|error| Error::Host("mapping its registers", error))?;
        let registers = Registers::new(host, region);
        if registers.try_read(reg::MAGIC, Width::U32)? as u32 != reg::MAGIC_VALUE {
            return Err(Error::BadDevice("no virtio device is at this address"));
        }
        let legacy = match registers.read32(reg::VERSION) {
            1 => true,
            2 => false,
            _ => return Err(Error::Unsupported("its virtio-mmio version is neither 1 nor 2")),
        };
        let device_type = registers.read32(reg::DEVICE_ID);
        if device_type == 0 {
            return Ok(None);
        }
        Ok(Some(Self { host, registers, legacy, device_type, line: device.line }))
    }

    pub(super) fn host(&self) -> H {
        self.host
    }

    pub(super) fn registers(&self) -> Registers<H> {
        self.registers
    }

    pub(super) fn line(&self) -> u32 {
        self.line
    }

    pub(crate) fn device_type(&self) -> u32 {
        self.device_type
    }

    pub(super) fn is_legacy(&self) -> bool {
        self.legacy
    }

    pub(super) fn status(&self) -> u8 {
        self.registers.read32(reg::STATUS) as u8
    }

    pub(super) fn set_status(&mut self, status: u8) {
        self.registers.write32(reg::STATUS, u32::from(status));
    }

    pub(super) fn device_features(&mut self) -> u64 {
        let mut features = 0;
        for half in 0..2 {
            self.registers.write32(reg::DEVICE_FEATURES_SEL, half);
            features |= u64::from(self.registers.read32(reg::DEVICE_FEATURES)) << (32 * half);
        }
        features
    }

    pub(super) fn set_driver_features(&mut self, features: u64) {
        let halves = if self.legacy { 1 } else { 2 };
        for half in 0..halves {
            self.registers.write32(reg::DRIVER_FEATURES_SEL, half);
            self.registers.write32(reg::DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        if self.legacy {
            self.registers.write32(reg::LEGACY_PAGE_SIZE, ring::LEGACY_ALIGN as u32);
        }
    }

    pub(super) fn queue_max(&mut self, index: u16) -> u16 {
        self.registers.write32(reg::QUEUE_SEL, u32::from(index));
        u16::try_from(self.registers.read32(reg::QUEUE_NUM_MAX)).unwrap_or(1 << 15)
    }

    pub(super) fn enable_queue<T>(&mut self, index: u16, queue: &Queue<H, T>) -> Result<Doorbell<H>> {
        let doorbell = Doorbell::new(self.registers, reg::QUEUE_NOTIFY, Width::U32, index)?;
        let registers = &self.registers;
        registers.write32(reg::QUEUE_SEL, u32::from(index));
        let in_use = if self.legacy { reg::LEGACY_QUEUE_PFN } else { reg::QUEUE_READY };
        if registers.read32(in_use) != 0 {
            return Err(Error::BadDevice("a queue is in use after the reset"));
        }
        registers.write32(reg::QUEUE_NUM, u32::from(queue.size()));
        if self.legacy {
            let frame = u32::try_from(queue.begins_at() / ring::LEGACY_ALIGN as u64)
                .map_err(|_| Error::Unsupported("a legacy device cannot reach memory above 16 TiB"))?;
            queue.addresses();
            registers.write32(reg::LEGACY_QUEUE_ALIGN, ring::LEGACY_ALIGN as u32);
            registers.write32(reg::LEGACY_QUEUE_PFN, frame);
        } else {
            let at = queue.addresses();
            registers.write64(reg::QUEUE_DESC, at.descriptors);
            registers.write64(reg::QUEUE_DRIVER, at.driver);
            registers.write64(reg::QUEUE_DEVICE, at.device);
            registers.write32(reg::QUEUE_READY, 1);
        }
        Ok(doorbell)
    }

    pub(super) fn config_generation(&self) -> Option<u32> {
        (!self.legacy).then(|| self.registers.read32(reg::CONFIG_GENERATION))
    }

    pub(super) fn config(&self, offset: usize, width: Width) -> Result<u64> {
        self.registers.try_read(reg::CONFIG.saturating_add(offset), width)
    }
}
