//! Registers, PCI functions and interrupts, with models of devices behind them.

use super::engine::{Event, Node, Raiser, World};
use super::{SimHost, Simulation};
use hypercall::{
    Call, CpuId, DmaAddr, Error, Irq, IrqId, IrqSource, Mmio, MmioDevice, MmioRegion, Pci, PciAddress,
    PhysAddr, Result, Signal, Width,
};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

/// A model of a device's registers. It may keep a [`Bus`] of its node for what it does by itself.
pub trait Registers {
    /// What the driver reads at `offset`.
    fn read(&mut self, bus: Bus, offset: usize, width: Width) -> u64;
    /// What the driver writes at `offset`.
    fn write(&mut self, bus: Bus, offset: usize, width: Width, value: u64);
}

/// What a device can do to its node: reach the memory that it was given, and interrupt.
#[derive(Debug, Clone, Copy)]
pub struct Bus(SimHost);

impl Bus {
    /// The device side of a node.
    pub fn new(host: SimHost) -> Self {
        Self(host)
    }

    fn with<T>(&self, f: impl FnOnce(&Rc<World>, &Node) -> T) -> Option<T> {
        let world = self.0.world()?;
        let node = world.node(self.0.index())?;
        (!node.down.get()).then(|| f(&world, &node))
    }

    /// Reads memory of the driver. `false`: the device was not given it.
    pub fn dma_read(&self, at: DmaAddr, buf: &mut [u8]) -> bool {
        self.with(|_, node| node.dma.borrow().read(at, buf)).unwrap_or(false)
    }

    /// Writes memory of the driver. `false`: the device was not given it.
    pub fn dma_write(&self, at: DmaAddr, data: &[u8]) -> bool {
        self.with(|_, node| node.dma.borrow().write(at, data)).unwrap_or(false)
    }

    /// Virtual time.
    pub fn now_ns(&self) -> u64 {
        self.with(|world, _| world.now.get()).unwrap_or(0)
    }

    /// A random number of the device's own stream.
    pub fn random(&self) -> u64 {
        self.with(|_, node| node.devices.borrow_mut().random()).unwrap_or(0)
    }

    /// `what` happens in `ns`. It must not block. Dropped if the node goes down before.
    pub fn after(&self, ns: u64, what: impl FnOnce(Bus) + 'static) {
        let bus = *self;
        self.with(|world, _| {
            let event = Box::new(move || {
                if bus.with(|_, _| ()).is_some() {
                    what(bus);
                }
            });
            world.schedule(world.now.get() + ns, Event::Call(event));
        });
    }

    /// Interrupts. `false`: nobody is attached. A line that fired stays masked until it is unmasked; what comes meanwhile is
    /// delivered then.
    pub fn interrupt(&self, source: IrqSource) -> bool {
        self.with(|world, node| match node.devices.borrow_mut().fire(source) {
            Fired::Nobody => false,
            Fired::Masked => true,
            Fired::Signal(signal) => {
                signal.raise(&Raiser(world));
                true
            }
        })
        .unwrap_or(false)
    }
}

enum Fired {
    Nobody,
    Masked,
    Signal(Arc<Signal>),
}

type Model = Rc<RefCell<dyn Registers>>;

struct Window {
    at: PhysAddr,
    len: usize,
    /// Of a virtio-mmio transport.
    line: Option<u32>,
    model: Model,
}

struct Function {
    space: Vec<u8>,
    msix_entries: u16,
    /// Of base address registers: which bits a driver can set.
    writable: BTreeMap<u16, u32>,
}

struct Attached {
    id: u32,
    source: IrqSource,
    signal: Arc<Signal>,
    masked: bool,
    pending: bool,
}

/// Lines that exist.
const LINES: u32 = 64;

/// The devices of a node.
#[derive(Default)]
pub(super) struct Devices {
    windows: Vec<Window>,
    functions: BTreeMap<PciAddress, Function>,
    attached: Vec<Attached>,
    next_irq: u32,
    random: Option<super::Random>,
}

impl Devices {
    pub(super) fn attached(&self) -> u64 {
        self.attached.len() as u64
    }

    fn random(&mut self) -> u64 {
        self.random.get_or_insert_with(|| super::Random::new(4, 4)).next_u64()
    }

    fn fire(&mut self, source: IrqSource) -> Fired {
        let Some(attached) = self.attached.iter_mut().find(|one| one.source == source) else {
            return Fired::Nobody;
        };
        if attached.masked {
            attached.pending = true;
            return Fired::Masked;
        }
        attached.masked = matches!(source, IrqSource::Line(_));
        Fired::Signal(attached.signal.clone())
    }
}

impl Simulation {
    fn devices<T>(&self, host: SimHost, f: impl FnOnce(&mut Devices) -> T) -> T {
        let node = self.world().node(host.index()).expect("a node of this simulation");
        f(&mut node.devices.borrow_mut())
    }

    /// Adds a virtio-mmio transport with `len` bytes of registers.
    pub fn add_mmio_device(
        &self,
        host: SimHost,
        at: PhysAddr,
        len: usize,
        line: u32,
        model: Rc<RefCell<dyn Registers>>,
    ) {
        self.devices(host, |devices| devices.windows.push(Window { at, len, line: Some(line), model }));
    }

    /// Adds memory of a PCI function: what one of its base address registers points to.
    pub fn add_pci_memory(&self, host: SimHost, at: PhysAddr, len: usize, model: Rc<RefCell<dyn Registers>>) {
        self.devices(host, |devices| devices.windows.push(Window { at, len, line: None, model }));
    }

    /// Adds a PCI function with its configuration space (at most 4096 bytes) and MSI-X entries. `bars` says of which
    /// registers a driver may write which bits.
    pub fn add_pci_function(
        &self,
        host: SimHost,
        at: PciAddress,
        space: &[u8],
        msix_entries: u16,
        bars: &[(u16, u32)],
    ) {
        let mut whole = vec![0; 4096];
        whole[..space.len()].copy_from_slice(space);
        let function = Function { space: whole, msix_entries, writable: bars.iter().copied().collect() };
        self.devices(host, |devices| devices.functions.insert(at, function));
    }
}

impl SimHost {
    /// The model behind a register, and the offset of the region's part in it.
    fn model(&self, call: Call, region: MmioRegion, offset: usize, width: Width) -> Option<(Model, usize)> {
        assert!(region.holds(offset, width), "register {offset:#x} is not in the region or not aligned");
        let address = (region.base() + offset) as u64;
        self.call(call, [address, width.bytes() as u64], |node| {
            let devices = node.devices.borrow();
            let window =
                devices.windows.iter().find(|one| address >= one.at.0 && address - one.at.0 < one.len as u64);
            let window = window.ok_or(Error::NotFound)?;
            Ok((window.model.clone(), (address - window.at.0) as usize))
        })
        .ok()
    }
}

impl Mmio for SimHost {
    fn mmio_devices(&self, found: &mut dyn FnMut(MmioDevice)) {
        let list = self.value(Call::MmioDevices, |node| {
            let devices = node.devices.borrow();
            let list = devices
                .windows
                .iter()
                .filter_map(|one| Some(MmioDevice { registers: one.at, len: one.len, line: one.line? }));
            list.collect::<Vec<_>>()
        });
        list.unwrap_or_default().into_iter().for_each(found);
    }

    #[expect(unsafe_code, reason = "mints regions")]
    fn mmio_map(&self, at: PhysAddr, len: usize) -> Result<MmioRegion> {
        self.call(Call::MmioMap, [at.0, len as u64], |node| {
            if len == 0 {
                return Err(Error::Invalid);
            }
            let devices = node.devices.borrow();
            let inside = |one: &Window| {
                at.0 >= one.at.0
                    && (at.0 - one.at.0).checked_add(len as u64).is_some_and(|end| end <= one.len as u64)
            };
            if !devices.windows.iter().any(inside) {
                return Err(Error::Denied);
            }
            // SAFETY: accesses go to a model, never to memory.
            Ok(unsafe { MmioRegion::new(at.0 as usize, len) })
        })
    }

    fn mmio_read(&self, region: MmioRegion, offset: usize, width: Width) -> u64 {
        let all_ones = u64::MAX >> (64 - 8 * width.bytes());
        let Some((model, offset)) = self.model(Call::MmioRead, region, offset, width) else {
            return all_ones;
        };
        let value = model.borrow_mut().read(Bus(*self), offset, width) & all_ones;
        if let Some(world) = self.world() {
            world.leave(value);
        }
        value
    }

    fn mmio_write(&self, region: MmioRegion, offset: usize, width: Width, value: u64) {
        if let Some((model, offset)) = self.model(Call::MmioWrite, region, offset, width) {
            if let Some(world) = self.world() {
                world.leave(value);
            }
            model.borrow_mut().write(Bus(*self), offset, width, value);
        }
    }
}

fn config_bytes(function: &Function, offset: u16, width: Width) -> Result<core::ops::Range<usize>> {
    let (at, bytes) = (usize::from(offset), width.bytes());
    if bytes > 4 || !at.is_multiple_of(bytes) || at + bytes > function.space.len() {
        return Err(Error::Invalid);
    }
    Ok(at..at + bytes)
}

fn number(at: PciAddress) -> u64 {
    u64::from(at.segment) << 16 | u64::from(at.bus) << 8 | u64::from(at.device) << 3 | u64::from(at.function)
}

impl Pci for SimHost {
    fn pci_functions(&self, found: &mut dyn FnMut(PciAddress)) {
        let list = self.value(Call::PciFunctions, |node| {
            node.devices.borrow().functions.keys().copied().collect::<Vec<_>>()
        });
        list.unwrap_or_default().into_iter().for_each(found);
    }

    fn pci_read(&self, function: PciAddress, offset: u16, width: Width) -> Result<u32> {
        self.call(Call::PciRead, [number(function), offset.into()], |node| {
            let devices = node.devices.borrow();
            let found = devices.functions.get(&function).ok_or(Error::NotFound)?;
            let range = config_bytes(found, offset, width)?;
            let mut value = [0; 4];
            value[..range.len()].copy_from_slice(&found.space[range]);
            Ok(u32::from_le_bytes(value))
        })
    }

    fn pci_write(&self, function: PciAddress, offset: u16, width: Width, value: u32) -> Result<()> {
        self.call(Call::PciWrite, [number(function), u64::from(offset) << 32 | u64::from(value)], |node| {
            let mut devices = node.devices.borrow_mut();
            let found = devices.functions.get_mut(&function).ok_or(Error::NotFound)?;
            let range = config_bytes(found, offset, width)?;
            let mut value = value;
            if (0x10..0x28).contains(&offset) {
                value &= found.writable.get(&offset).copied().unwrap_or(0);
                // The low bits say of which kind the register is.
                value |= u32::from(found.space[range.start]) & 0xf;
            }
            let bytes = value.to_le_bytes();
            let len = range.len();
            found.space[range].copy_from_slice(&bytes[..len]);
            Ok(())
        })
    }
}

fn source_number(source: IrqSource) -> u64 {
    match source {
        IrqSource::Line(line) => line.into(),
        IrqSource::Msix { function, entry } => 1 << 63 | number(function) << 16 | u64::from(entry),
    }
}

impl Irq for SimHost {
    fn irq_attach(&self, source: IrqSource, cpu: CpuId, signal: Arc<Signal>) -> Result<IrqId> {
        self.call(Call::IrqAttach, [source_number(source), cpu.0.into()], |node| {
            let mut devices = node.devices.borrow_mut();
            if cpu.0 >= node.setup.cpus.max(1) {
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
        })
    }

    fn irq_unmask(&self, irq: IrqId) {
        let _ = self.world_call(Call::IrqUnmask, [irq.0.into(), 0], |world, node| {
            let mut devices = node.devices.borrow_mut();
            let attached = devices.attached.iter_mut().find(|one| one.id == irq.0).ok_or(Error::NotFound)?;
            attached.masked = core::mem::take(&mut attached.pending);
            let again = attached.masked.then(|| attached.signal.clone());
            drop(devices);
            if let Some(signal) = again {
                signal.raise(&Raiser(world));
            }
            Ok(())
        });
    }

    fn irq_detach(&self, irq: IrqId) {
        self.note(Call::IrqDetach, [irq.0.into(), 0], |node| {
            let mut devices = node.devices.borrow_mut();
            let at = devices.attached.iter().position(|one| one.id == irq.0);
            let gone = at.map(|at| devices.attached.remove(at));
            drop(devices);
            drop(gone);
        });
    }
}
