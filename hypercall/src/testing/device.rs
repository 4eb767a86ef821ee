//! Interrupts and registers, with models of devices behind them.

use super::TestHost;
use crate::devices::{DeviceTable, Fired};
use crate::*;
use alloc::boxed::Box;
use alloc::sync::Arc;
use std::sync::Mutex;

/// A model of a device's registers.
pub trait Registers: Send {
    /// What the driver reads at `offset`.
    fn read(&mut self, offset: usize, width: Width) -> u64;
    /// What the driver writes at `offset`.
    fn write(&mut self, offset: usize, width: Width, value: u64);
}

type Model = Arc<Mutex<dyn Registers>>;

pub(super) type Devices = DeviceTable<Model>;

impl TestHost {
    /// Adds a virtio-mmio transport with `len` bytes of registers.
    pub fn add_mmio_device(
        &self,
        registers: PhysAddr,
        len: usize,
        line: u32,
        model: impl Registers + 'static,
    ) -> Arc<Mutex<dyn Registers>> {
        self.add_window(registers, len, Some(line), model)
    }

    /// Adds memory of a PCI function (what one of its base address registers points to).
    pub fn add_pci_memory(
        &self,
        at: PhysAddr,
        len: usize,
        model: impl Registers + 'static,
    ) -> Arc<Mutex<dyn Registers>> {
        self.add_window(at, len, None, model)
    }

    fn add_window(
        &self,
        at: PhysAddr,
        len: usize,
        line: Option<u32>,
        model: impl Registers + 'static,
    ) -> Model {
        let model: Model = Arc::new(Mutex::new(model));
        self.0.devices.lock().unwrap().add_window(at, len, line, model.clone());
        model
    }

    /// Adds a PCI function with its configuration space (at most 4096 bytes) and MSI-X entries. `bars` says of which
    /// registers a driver may write which bits.
    pub fn add_pci_function(&self, at: PciAddress, space: &[u8], msix_entries: u16, bars: &[(u16, u32)]) {
        self.0.devices.lock().unwrap().add_function(at, space, msix_entries, bars);
    }

    /// An interrupt, as a device makes it. `false`: nobody is attached. A line that fired stays masked until it is
    /// unmasked; what comes meanwhile is delivered then.
    pub fn fire(&self, source: IrqSource) -> bool {
        let fired = self.0.devices.lock().unwrap().fire(source);
        if let Fired::Raise(signal) = &fired {
            signal.raise(self);
        }
        !matches!(fired, Fired::Nobody)
    }

    /// How many interrupts are attached.
    pub fn irqs_attached(&self) -> usize {
        self.0.devices.lock().unwrap().attached()
    }
}

impl Irq for TestHost {
    fn irq_attach(&self, source: IrqSource, cpu: CpuId, signal: Arc<Signal>) -> Result<IrqId> {
        self.0.devices.lock().unwrap().attach(source, cpu, self.cpu_count(), signal)
    }

    fn irq_unmask(&self, irq: IrqId) {
        let again = self.0.devices.lock().unwrap().unmask(irq);
        if let Some(signal) = again {
            signal.raise(self);
        }
    }

    fn irq_detach(&self, irq: IrqId) {
        let gone = self.0.devices.lock().unwrap().detach(irq);
        drop(gone);
    }
}

impl TestHost {
    fn model(&self, region: MmioRegion, offset: usize, width: Width) -> (Model, usize) {
        assert!(region.holds(offset, width), "register access outside its region, or not aligned");
        let model = self.0.devices.lock().unwrap().model((region.base() + offset) as u64);
        model.expect("a region that this host mapped")
    }
}

impl Mmio for TestHost {
    fn mmio_devices(&self, found: &mut dyn FnMut(MmioDevice)) {
        let list = self.0.devices.lock().unwrap().transports();
        list.into_iter().for_each(found);
    }

    fn mmio_map(&self, at: PhysAddr, len: usize) -> Result<MmioRegion> {
        self.0.devices.lock().unwrap().can_map(at, len)?;
        // SAFETY: access to the region goes to a model, never to memory.
        Ok(unsafe { MmioRegion::new(at.0 as usize, len) })
    }

    fn mmio_read(&self, region: MmioRegion, offset: usize, width: Width) -> u64 {
        let (model, offset) = self.model(region, offset, width);
        model.lock().unwrap().read(offset, width)
    }

    fn mmio_write(&self, region: MmioRegion, offset: usize, width: Width, value: u64) {
        let (model, offset) = self.model(region, offset, width);
        model.lock().unwrap().write(offset, width, value);
    }
}

impl Pci for TestHost {
    fn pci_functions(&self, found: &mut dyn FnMut(PciAddress)) {
        let list = self.0.devices.lock().unwrap().functions();
        list.into_iter().for_each(found);
    }

    fn pci_read(&self, function: PciAddress, offset: u16, width: Width) -> Result<u32> {
        self.0.devices.lock().unwrap().pci_read(function, offset, width)
    }

    fn pci_write(&self, function: PciAddress, offset: u16, width: Width, value: u32) -> Result<()> {
        self.0.devices.lock().unwrap().pci_write(function, offset, width, value)
    }
}

/// A model from two closures is enough for most tests.
impl<R, W> Registers for (R, W)
where
    R: FnMut(usize, Width) -> u64 + Send,
    W: FnMut(usize, Width, u64) + Send,
{
    fn read(&mut self, offset: usize, width: Width) -> u64 {
        self.0(offset, width)
    }
    fn write(&mut self, offset: usize, width: Width, value: u64) {
        self.1(offset, width, value);
    }
}

impl Registers for Box<dyn Registers> {
    fn read(&mut self, offset: usize, width: Width) -> u64 {
        (**self).read(offset, width)
    }
    fn write(&mut self, offset: usize, width: Width, value: u64) {
        (**self).write(offset, width, value);
    }
}
