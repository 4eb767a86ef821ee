//! Registers, PCI functions and interrupts, with models of devices behind them.

use super::engine::World;
use super::event::Event;
use super::node::Node;
use super::park::Raiser;
use super::{SimHost, Simulation};
use hypercall::devices::{DeviceTable, Fired};
use hypercall::{
    Call, CpuId, DmaAddr, Error, Irq, IrqId, IrqSource, Mmio, MmioDevice, MmioRegion, Pci, PciAddress,
    PhysAddr, Result, Signal, Width,
};
use std::cell::RefCell;
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
        let stream = 2_000_000 + u64::from(self.0.index());
        self.with(|world, node| {
            let random = &mut node.devices.borrow_mut().random;
            random.get_or_insert_with(|| super::Random::new(world.config.seed, stream)).next_u64()
        })
        .unwrap_or(0)
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
        self.with(|world, node| {
            let fired = node.devices.borrow_mut().table.fire(source);
            if let Fired::Raise(signal) = &fired {
                signal.raise(&Raiser(world));
            }
            !matches!(fired, Fired::Nobody)
        })
        .unwrap_or(false)
    }
}

type Model = Rc<RefCell<dyn Registers>>;

/// The devices of a node.
#[derive(Default)]
pub(super) struct Devices {
    table: DeviceTable<Model>,
    random: Option<super::Random>,
}

impl Devices {
    pub(super) fn attached(&self) -> u64 {
        self.table.attached() as u64
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
        self.devices(host, |devices| devices.table.add_window(at, len, Some(line), model));
    }

    /// Adds memory of a PCI function: what one of its base address registers points to.
    pub fn add_pci_memory(&self, host: SimHost, at: PhysAddr, len: usize, model: Rc<RefCell<dyn Registers>>) {
        self.devices(host, |devices| devices.table.add_window(at, len, None, model));
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
        self.devices(host, |devices| devices.table.add_function(at, space, msix_entries, bars));
    }
}

impl SimHost {
    /// The model behind a register, and the offset of the region's part in it.
    fn model(&self, call: Call, region: MmioRegion, offset: usize, width: Width) -> Option<(Model, usize)> {
        assert!(region.holds(offset, width), "register {offset:#x} is not in the region or not aligned");
        let address = (region.base() + offset) as u64;
        self.call(call, [address, width.bytes() as u64], |node| {
            node.devices.borrow().table.model(address).ok_or(Error::NotFound)
        })
        .ok()
    }
}

impl Mmio for SimHost {
    fn mmio_devices(&self, found: &mut dyn FnMut(MmioDevice)) {
        let list = self.value(Call::MmioDevices, |node| node.devices.borrow().table.transports());
        list.unwrap_or_default().into_iter().for_each(found);
    }

    #[expect(unsafe_code, reason = "mints regions")]
    fn mmio_map(&self, at: PhysAddr, len: usize) -> Result<MmioRegion> {
        self.call(Call::MmioMap, [at.0, len as u64], |node| {
            node.devices.borrow().table.can_map(at, len)?;
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

fn number(at: PciAddress) -> u64 {
    u64::from(at.segment) << 16 | u64::from(at.bus) << 8 | u64::from(at.device) << 3 | u64::from(at.function)
}

impl Pci for SimHost {
    fn pci_functions(&self, found: &mut dyn FnMut(PciAddress)) {
        let list = self.value(Call::PciFunctions, |node| node.devices.borrow().table.functions());
        list.unwrap_or_default().into_iter().for_each(found);
    }

    fn pci_read(&self, function: PciAddress, offset: u16, width: Width) -> Result<u32> {
        self.call(Call::PciRead, [number(function), offset.into()], |node| {
            node.devices.borrow().table.pci_read(function, offset, width)
        })
    }

    fn pci_write(&self, function: PciAddress, offset: u16, width: Width, value: u32) -> Result<()> {
        self.call(Call::PciWrite, [number(function), u64::from(offset) << 32 | u64::from(value)], |node| {
            node.devices.borrow_mut().table.pci_write(function, offset, width, value)
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
            let cpus = node.setup.cpus.max(1);
            node.devices.borrow_mut().table.attach(source, cpu, cpus, signal)
        })
    }

    fn irq_unmask(&self, irq: IrqId) {
        let _ = self.world_call(Call::IrqUnmask, [irq.0.into(), 0], |world, node| {
            let again = node.devices.borrow_mut().table.unmask(irq);
            if let Some(signal) = again {
                signal.raise(&Raiser(world));
            }
            Ok(())
        });
    }

    fn irq_detach(&self, irq: IrqId) {
        self.note(Call::IrqDetach, [irq.0.into(), 0], |node| {
            let gone = node.devices.borrow_mut().table.detach(irq);
            drop(gone);
        });
    }
}
