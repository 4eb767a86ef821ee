//! Interrupts and registers, with models of devices behind them.

use super::TestHost;
use crate::*;
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use std::sync::Mutex;

/// A model of a device's registers.
pub trait Registers: Send {
    /// What the driver reads at `offset`.
    fn read(&mut self, offset: usize, width: Width) -> u64;
    /// What the driver writes at `offset`.
    fn write(&mut self, offset: usize, width: Width, value: u64);
}

type Model = Arc<Mutex<dyn Registers>>;

struct Window {
    at: PhysAddr,
    len: usize,
    /// The line of a virtio-mmio transport; none for a PCI function's memory.
    line: Option<u32>,
    model: Model,
}

struct Function {
    space: Vec<u8>,
    msix_entries: u16,
    /// Of base address registers: which bits a driver can set, so that it finds their sizes.
    writable: BTreeMap<u16, u32>,
}

struct Attached {
    id: u32,
    source: IrqSource,
    signal: Arc<Signal>,
    masked: bool,
    pending: bool,
}

#[derive(Default)]
pub(super) struct Devices {
    windows: Vec<Window>,
    functions: BTreeMap<PciAddress, Function>,
    attached: Vec<Attached>,
    next_irq: u32,
}

/// Lines that exist.
const LINES: u32 = 64;

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
        self.0.devices.lock().unwrap().windows.push(Window { at, len, line, model: model.clone() });
        model
    }

    /// Adds a PCI function with its configuration space (at most 4096 bytes) and MSI-X entries. `bars` says of which
    /// registers a driver may write which bits.
    pub fn add_pci_function(&self, at: PciAddress, space: &[u8], msix_entries: u16, bars: &[(u16, u32)]) {
        let mut whole = alloc::vec![0; 4096];
        whole[..space.len()].copy_from_slice(space);
        let function = Function { space: whole, msix_entries, writable: bars.iter().copied().collect() };
        self.0.devices.lock().unwrap().functions.insert(at, function);
    }

    /// An interrupt, as a device makes it. `false`: nobody is attached. A line that fired stays masked until it is
    /// unmasked; what comes meanwhile is delivered then.
    pub fn fire(&self, source: IrqSource) -> bool {
        let signal = {
            let mut devices = self.0.devices.lock().unwrap();
            let Some(attached) = devices.attached.iter_mut().find(|one| one.source == source) else {
                return false;
            };
            if attached.masked {
                attached.pending = true;
                return true;
            }
            attached.masked = matches!(source, IrqSource::Line(_));
            attached.signal.clone()
        };
        signal.raise(self);
        true
    }

    /// How many interrupts are attached.
    pub fn irqs_attached(&self) -> usize {
        self.0.devices.lock().unwrap().attached.len()
    }
}

impl Irq for TestHost {
    fn irq_attach(&self, source: IrqSource, cpu: CpuId, signal: Arc<Signal>) -> Result<IrqId> {
        let mut devices = self.0.devices.lock().unwrap();
        if cpu.0 >= self.cpu_count() {
            return Err(Error::Invalid);
        }
        let exists = match source {
            IrqSource::Line(line) => line < LINES,
            IrqSource::Msix { function, entry } => {
                devices.functions.get(&function).is_some_and(|found| entry < found.msix_entries)
            }
        };
        if !exists {
            return Err(Error::NotFound);
        }
        if devices.attached.iter().any(|one| one.source == source) {
            return Err(Error::Busy);
        }
        devices.next_irq += 1;
        let id = devices.next_irq;
        devices.attached.push(Attached { id, source, signal, masked: false, pending: false });
        Ok(IrqId(id))
    }

    fn irq_unmask(&self, irq: IrqId) {
        let again = {
            let mut devices = self.0.devices.lock().unwrap();
            let Some(attached) = devices.attached.iter_mut().find(|one| one.id == irq.0) else { return };
            attached.masked = false;
            core::mem::take(&mut attached.pending).then_some(attached.source)
        };
        if let Some(source) = again {
            self.fire(source);
        }
    }

    fn irq_detach(&self, irq: IrqId) {
        self.0.devices.lock().unwrap().attached.retain(|one| one.id != irq.0);
    }
}

impl TestHost {
    fn window(&self, region: MmioRegion, offset: usize, width: Width) -> (Model, usize) {
        assert!(region.holds(offset, width), "register access outside its region, or not aligned");
        let devices = self.0.devices.lock().unwrap();
        let at = region.base() as u64;
        let window = devices.windows.iter().find(|one| at >= one.at.0 && at < one.at.0 + one.len as u64);
        let window = window.expect("a region that this host mapped");
        (window.model.clone(), (at - window.at.0) as usize + offset)
    }
}

impl Mmio for TestHost {
    fn mmio_devices(&self, found: &mut dyn FnMut(MmioDevice)) {
        let list: Vec<_> = {
            let devices = self.0.devices.lock().unwrap();
            let with_line = devices.windows.iter().filter_map(|one| one.line.map(|line| (one, line)));
            with_line.map(|(one, line)| MmioDevice { registers: one.at, len: one.len, line }).collect()
        };
        list.into_iter().for_each(found);
    }

    fn mmio_map(&self, at: PhysAddr, len: usize) -> Result<MmioRegion> {
        let end = at.0.checked_add(len as u64).filter(|_| len > 0).ok_or(Error::Invalid)?;
        let devices = self.0.devices.lock().unwrap();
        let inside = |one: &&Window| at.0 >= one.at.0 && end <= one.at.0 + one.len as u64;
        devices.windows.iter().find(inside).ok_or(Error::Denied)?;
        // SAFETY: access to the region goes to a model, never to memory.
        Ok(unsafe { MmioRegion::new(at.0 as usize, len) })
    }

    fn mmio_read(&self, region: MmioRegion, offset: usize, width: Width) -> u64 {
        let (model, offset) = self.window(region, offset, width);
        model.lock().unwrap().read(offset, width)
    }

    fn mmio_write(&self, region: MmioRegion, offset: usize, width: Width, value: u64) {
        let (model, offset) = self.window(region, offset, width);
        model.lock().unwrap().write(offset, width, value);
    }
}

/// The register at `offset` as a range of the configuration space.
fn register(offset: u16, width: Width) -> Result<core::ops::Range<usize>> {
    let (at, bytes) = (usize::from(offset), width.bytes());
    if bytes > 4 || !at.is_multiple_of(bytes) || at + bytes > 4096 {
        return Err(Error::Invalid);
    }
    Ok(at..at + bytes)
}

impl Pci for TestHost {
    fn pci_functions(&self, found: &mut dyn FnMut(PciAddress)) {
        let list: Vec<_> = self.0.devices.lock().unwrap().functions.keys().copied().collect();
        list.into_iter().for_each(found);
    }

    fn pci_read(&self, function: PciAddress, offset: u16, width: Width) -> Result<u32> {
        let range = register(offset, width)?;
        let devices = self.0.devices.lock().unwrap();
        let space = &devices.functions.get(&function).ok_or(Error::NotFound)?.space;
        Ok(space[range].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte)))
    }

    fn pci_write(&self, function: PciAddress, offset: u16, width: Width, value: u32) -> Result<()> {
        let range = register(offset, width)?;
        let mut devices = self.0.devices.lock().unwrap();
        let function = devices.functions.get_mut(&function).ok_or(Error::NotFound)?;
        // Base address registers keep their fixed bits; the rest takes what is written.
        let mask = match (0x10..0x28).contains(&offset) {
            true => function.writable.get(&offset).copied().unwrap_or(0),
            false => u32::MAX,
        };
        for (index, byte) in function.space[range].iter_mut().enumerate() {
            let (mask, value) = ((mask >> (8 * index)) as u8, (value >> (8 * index)) as u8);
            *byte = *byte & !mask | value & mask;
        }
        Ok(())
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
