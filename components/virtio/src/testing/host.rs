//! The machine: a [`TestHost`] with devices.
#![allow(unsafe_code, reason = "implements the contract's unsafe traits")]

use super::Mutex;
use super::arena::Arena;
use super::device::{Core, Hostility, Model, Rings};
use super::{mmio, pci};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, AtomicU64};
use hypercall::testing::TestHost;
use hypercall::*;
use std::collections::HashSet;
use std::string::String;

const MMIO_BASE: u64 = 0xfeb0_0000;
const MMIO_BYTES: usize = 0x200;
const FIRST_LINE: u32 = 5;
const BAR_BASE: u64 = 0x8_0000_0000;

/// How a device sits behind virtio-mmio.
#[derive(Debug, Clone, Copy)]
pub struct MmioOptions {
    /// Version 1 registers.
    pub legacy: bool,
    /// Features of the ring that it offers.
    pub ring_features: u64,
    /// What it does wrong.
    pub hostility: Hostility,
}

impl Default for MmioOptions {
    /// Version 2, indirect descriptors and event indices, honest.
    fn default() -> Self {
        Self { legacy: false, ring_features: 1 << 28 | 1 << 29, hostility: Hostility::None }
    }
}

/// How a device sits on PCI.
#[derive(Debug, Clone, Copy)]
pub struct PciOptions {
    /// Entries of its MSI-X table; 0: none.
    pub msix: u16,
    /// Uses the transitional device id.
    pub transitional: bool,
    /// Features of the ring that it offers.
    pub ring_features: u64,
    /// What it does wrong.
    pub hostility: Hostility,
}

impl Default for PciOptions {
    /// Four vectors, indirect descriptors and event indices, honest.
    fn default() -> Self {
        Self { msix: 4, transitional: false, ring_features: 1 << 28 | 1 << 29, hostility: Hostility::None }
    }
}

enum Front {
    Mmio { line: u32 },
    Pci { address: PciAddress, space: Mutex<Vec<u8>>, msix: u16, line: u32 },
}

struct Slot {
    base: u64,
    len: usize,
    front: Front,
    core: Mutex<Core>,
    model: Arc<Mutex<dyn Model>>,
}

impl Slot {
    fn line(&self) -> u32 {
        match self.front {
            Front::Mmio { line } | Front::Pci { line, .. } => line,
        }
    }
}

struct Interrupt {
    source: IrqSource,
    signal: Arc<Signal>,
}

struct Inner {
    arena: Arena,
    slots: Mutex<Vec<Arc<Slot>>>,
    interrupts: Mutex<Vec<Option<Interrupt>>>,
    masked: Mutex<HashSet<u32>>,
    cpus: AtomicU32,
    memory_bytes: AtomicU64,
    /// MSI-X vectors that are left.
    vectors: Mutex<usize>,
}

/// A machine in memory. The handle is leaked, as tests are short.
#[derive(Clone, Copy)]
pub struct TestMachine {
    host: TestHost,
    inner: &'static Inner,
}

/// A device of a machine.
pub struct Handle<M> {
    machine: TestMachine,
    slot: Arc<Slot>,
    model: Arc<Mutex<M>>,
}

impl Default for TestMachine {
    fn default() -> Self {
        Self::new()
    }
}

impl TestMachine {
    /// A machine with two CPUs, 64 MiB and no devices.
    pub fn new() -> Self {
        Self::on(TestHost::new(), 8 << 20)
    }

    /// A machine whose time moves only by [`TestHost::advance`].
    pub fn with_virtual_time() -> Self {
        Self::on(TestHost::with_virtual_time(), 8 << 20)
    }

    fn on(host: TestHost, arena_bytes: usize) -> Self {
        let inner = Inner {
            arena: Arena::new(arena_bytes),
            slots: Mutex::default(),
            interrupts: Mutex::default(),
            masked: Mutex::default(),
            cpus: AtomicU32::new(2),
            memory_bytes: AtomicU64::new(32 << 20),
            vectors: Mutex::new(64),
        };
        Self { host, inner: Box::leak(Box::new(inner)) }
    }

    /// The host below.
    pub fn host(&self) -> TestHost {
        self.host
    }

    /// Its DMA memory.
    pub fn arena(&self) -> &'static Arena {
        &self.inner.arena
    }

    /// Says that it has `cpus` CPUs.
    pub fn set_cpus(&self, cpus: u32) {
        self.inner.cpus.store(cpus, core::sync::atomic::Ordering::SeqCst);
    }

    /// Says that it has `bytes` of memory.
    pub fn set_memory_bytes(&self, bytes: u64) {
        self.inner.memory_bytes.store(bytes, core::sync::atomic::Ordering::SeqCst);
    }

    /// From now on only `n` more MSI-X vectors can be attached.
    pub fn set_vectors(&self, n: usize) {
        *self.inner.vectors.lock() = n;
    }

    /// How often a device touched memory that it was not given.
    pub fn violations(&self) -> usize {
        self.inner.arena.violations()
    }

    /// How many interrupts are attached.
    pub fn attached_interrupts(&self) -> usize {
        self.inner.interrupts.lock().iter().flatten().count()
    }

    /// Adds a device behind virtio-mmio.
    pub fn add_mmio<M: Model>(&self, model: M, options: MmioOptions) -> Handle<M> {
        let mut slots = self.inner.slots.lock();
        let n = slots.len();
        let core = Core::new(&model, options.legacy, options.ring_features, options.hostility);
        let model = Arc::new(Mutex::new(model));
        let slot = Arc::new(Slot {
            base: MMIO_BASE + (n * MMIO_BYTES) as u64,
            len: MMIO_BYTES,
            front: Front::Mmio { line: FIRST_LINE + n as u32 },
            core: Mutex::new(core),
            model: model.clone(),
        });
        slots.push(slot.clone());
        Handle { machine: *self, slot, model }
    }

    /// Adds a PCI function.
    pub fn add_pci<M: Model>(&self, model: M, options: PciOptions) -> Handle<M> {
        let mut slots = self.inner.slots.lock();
        let n = slots.len();
        let core = Core::new(&model, false, options.ring_features, options.hostility);
        let base = BAR_BASE + (n * pci::BAR_BYTES) as u64;
        let line = FIRST_LINE + n as u32;
        let space =
            pci::config_space(model.device_type(), options.transitional, base, options.msix, line as u8);
        let model = Arc::new(Mutex::new(model));
        let slot = Arc::new(Slot {
            base,
            len: pci::BAR_BYTES,
            front: Front::Pci {
                address: PciAddress { segment: 0, bus: 0, device: n as u8, function: 0 },
                space: Mutex::new(space),
                msix: options.msix,
                line,
            },
            core: Mutex::new(core),
            model: model.clone(),
        });
        slots.push(slot.clone());
        Handle { machine: *self, slot, model }
    }

    fn slot(&self, region: MmioRegion, offset: usize, width: Width) -> (Arc<Slot>, usize) {
        assert!(region.holds(offset, width), "access of {width:?} at {offset:#x} outside {region:?}");
        let at = region.base() as u64 + offset as u64;
        let slots = self.inner.slots.lock();
        let slot = slots.iter().find(|slot| (slot.base..slot.base + slot.len as u64).contains(&at));
        let slot = slot.expect("a mapped region belongs to a device").clone();
        let offset = (at - slot.base) as usize;
        (slot, offset)
    }

    fn function(&self, at: PciAddress) -> Option<Arc<Slot>> {
        let slots = self.inner.slots.lock();
        slots.iter().find(|slot| matches!(slot.front, Front::Pci { address, .. } if address == at)).cloned()
    }

    /// Raises every signal attached to `source`.
    fn raise(&self, source: IrqSource) {
        let signals: Vec<_> = self
            .inner
            .interrupts
            .lock()
            .iter()
            .flatten()
            .filter(|interrupt| interrupt.source == source)
            .map(|interrupt| interrupt.signal.clone())
            .collect();
        for signal in signals {
            signal.raise(&self.host);
        }
    }

    /// Delivers what a device asks for. Called without locks.
    fn deliver(&self, slot: &Slot) {
        let (queues, config, level) = {
            let mut core = slot.core.lock();
            let queues = core::mem::take(&mut core.interrupt);
            let queues: Vec<u16> = queues.into_iter().map(|queue| core_vector(&core.queues, queue)).collect();
            let config = core::mem::take(&mut core.config_changed);
            (queues, config.then_some(core.config_vector), core.isr != 0)
        };
        match &slot.front {
            Front::Mmio { line } => self.deliver_line(*line, level),
            Front::Pci { address, line, .. } => {
                let msix =
                    self.inner.interrupts.lock().iter().flatten().any(
                        |i| matches!(i.source, IrqSource::Msix { function, .. } if function == *address),
                    );
                if !msix {
                    self.deliver_line(*line, level);
                    return;
                }
                for entry in queues.into_iter().chain(config).filter(|&entry| entry != 0xffff) {
                    self.raise(IrqSource::Msix { function: *address, entry });
                }
            }
        }
    }

    fn deliver_line(&self, line: u32, level: bool) {
        if level && self.inner.masked.lock().insert(line) {
            self.raise(IrqSource::Line(line));
        }
    }
}

fn core_vector(queues: &[super::device::DeviceQueue], queue: u16) -> u16 {
    queues.get(usize::from(queue)).map_or(0xffff, |queue| queue.vector)
}

impl<M: Model> Handle<M> {
    /// Looks at the model.
    pub fn with<R>(&self, f: impl FnOnce(&mut M) -> R) -> R {
        f(&mut self.model.lock())
    }

    /// Lets the model use its queues by itself, as when a frame comes in.
    pub fn drive<R>(&self, f: impl FnOnce(&mut M, &mut Rings<'_>) -> R) -> R {
        let result = {
            let mut core = self.slot.core.lock();
            let mut model = self.model.lock();
            core.with_rings(&self.machine.inner.arena, |rings| f(&mut model, rings))
        };
        self.machine.deliver(&self.slot);
        result
    }

    /// From now on doorbells are noted and nothing is done, until [`Handle::release`].
    pub fn hold(&self) {
        self.slot.core.lock().held = true;
    }

    /// Does what the doorbells asked for, and from now on at once.
    pub fn release(&self) {
        {
            let mut core = self.slot.core.lock();
            core.held = false;
            core.run(&mut *self.model.lock(), &self.machine.inner.arena);
        }
        self.machine.deliver(&self.slot);
    }

    /// As [`Handle::release`], breaking the rules like `first` meanwhile and like `then` afterwards.
    pub fn release_as(&self, first: Hostility, then: Hostility) {
        {
            let mut core = self.slot.core.lock();
            core.held = false;
            core.hostility = first;
            core.run(&mut *self.model.lock(), &self.machine.inner.arena);
            core.hostility = then;
        }
        self.machine.deliver(&self.slot);
    }

    /// Sets the device status, as a device does that was in use before.
    pub fn force_status(&self, status: u8) {
        self.slot.core.lock().status = status;
    }

    /// Replaces the configuration space and tells the driver.
    pub fn change_config(&self, config: Vec<u8>) {
        {
            let mut core = self.slot.core.lock();
            core.config = config;
            core.generation = (core.generation + 1) & 0xff;
            core.isr |= 2;
            core.config_changed = true;
        }
        self.machine.deliver(&self.slot);
    }

    /// From now on it breaks the rules like this.
    pub fn set_hostility(&self, hostility: Hostility) {
        self.slot.core.lock().hostility = hostility;
    }

    /// What the driver did wrong.
    pub fn complaints(&self) -> Vec<String> {
        self.slot.core.lock().complaints.clone()
    }

    /// The device status register.
    pub fn status(&self) -> u8 {
        self.slot.core.lock().status
    }

    /// What the driver accepted.
    pub fn accepted_features(&self) -> u64 {
        self.slot.core.lock().accepted
    }

    /// How often the driver rang for queue `index`.
    pub fn kicks(&self, index: usize) -> u64 {
        self.slot.core.lock().queues[index].kicks
    }

    /// How often queue `index` asked for an interrupt.
    pub fn interrupts(&self, index: usize) -> u64 {
        self.slot.core.lock().queues[index].interrupts
    }

    /// Changes the PCI configuration space.
    pub fn with_pci_space(&self, f: impl FnOnce(&mut [u8])) {
        if let Front::Pci { space, .. } = &self.slot.front {
            f(&mut space.lock());
        }
    }
}

impl Versions for TestMachine {
    fn contracts(&self) -> &'static [ContractVersion] {
        &[
            ContractVersion::CORE,
            ContractVersion::DMA,
            ContractVersion::MMIO,
            ContractVersion::PCI,
            ContractVersion::IRQ,
        ]
    }
}

impl Clock for TestMachine {
    fn monotonic_ns(&self) -> u64 {
        self.host.monotonic_ns()
    }
    fn realtime_ns(&self) -> u64 {
        self.host.realtime_ns()
    }
}

// SAFETY: passed on to a host that keeps the contract.
unsafe impl Memory for TestMachine {
    fn alloc_pages(&self, count: usize) -> Result<Pages> {
        self.host.alloc_pages(count)
    }
    unsafe fn free_pages(&self, pages: Pages) {
        // SAFETY: the caller's promise is the same.
        unsafe { self.host.free_pages(pages) }
    }
    fn memory_bytes(&self) -> u64 {
        self.inner.memory_bytes.load(core::sync::atomic::Ordering::SeqCst)
    }
}

impl Threads for TestMachine {
    fn spawn(&self, spec: ThreadSpec<'_>, entry: Box<dyn FnOnce() + Send + 'static>) -> Result<ThreadId> {
        self.host.spawn(spec, entry)
    }
    fn join(&self, thread: ThreadId) -> Result<()> {
        self.host.join(thread)
    }
    fn park(&self, word: &AtomicU32, expected: u32, deadline_ns: Option<u64>) -> ParkResult {
        self.host.park(word, expected, deadline_ns)
    }
    fn unpark(&self, word: &AtomicU32, count: u32) -> u32 {
        self.host.unpark(word, count)
    }
    fn yield_now(&self) {
        self.host.yield_now();
    }
}

impl Cpus for TestMachine {
    fn cpu_count(&self) -> u32 {
        self.inner.cpus.load(core::sync::atomic::Ordering::SeqCst)
    }
    fn current_cpu(&self) -> CpuId {
        self.host.current_cpu()
    }
}

impl Entropy for TestMachine {
    fn fill_random(&self, buf: &mut [u8]) -> Result<()> {
        self.host.fill_random(buf)
    }
}

impl Params for TestMachine {
    fn param(&self, key: &str, buf: &mut [u8]) -> Result<usize> {
        self.host.param(key, buf)
    }
}

impl Console for TestMachine {
    fn console_write(&self, bytes: &[u8]) {
        self.host.console_write(bytes);
    }
}

impl Exit for TestMachine {
    fn exit(&self, status: ExitStatus) -> ! {
        self.host.exit(status)
    }
}

// SAFETY: blocks of the arena are zeroed, disjoint, and valid until freed; mapped buffers are bounced.
unsafe impl Dma for TestMachine {
    fn dma_alloc(&self, len: usize, align: usize) -> Result<DmaBlock> {
        self.inner.arena.alloc(len, align)
    }
    unsafe fn dma_free(&self, block: DmaBlock) {
        self.inner.arena.free(&block);
    }
    unsafe fn dma_map(&self, buf: NonNull<[u8]>, direction: DmaDirection) -> Result<DmaAddr> {
        self.inner.arena.map(buf, direction)
    }
    unsafe fn dma_unmap(&self, device: DmaAddr, buf: NonNull<[u8]>, direction: DmaDirection) {
        self.inner.arena.unmap(device, buf, direction);
    }
}

impl Mmio for TestMachine {
    fn mmio_devices(&self, found: &mut dyn FnMut(MmioDevice)) {
        let slots = self.inner.slots.lock().clone();
        for slot in slots {
            if let Front::Mmio { line } = slot.front {
                found(MmioDevice { registers: PhysAddr(slot.base), len: slot.len, line });
            }
        }
    }
    fn mmio_map(&self, at: PhysAddr, len: usize) -> Result<MmioRegion> {
        if len == 0 {
            return Err(Error::Invalid);
        }
        let slots = self.inner.slots.lock();
        let inside = slots.iter().any(|slot| {
            at.0 >= slot.base
                && at.0.checked_add(len as u64).is_some_and(|end| end <= slot.base + slot.len as u64)
        });
        if !inside {
            return Err(Error::Denied);
        }
        // SAFETY: accesses end in the device model, which checks them.
        Ok(unsafe { MmioRegion::new(at.0 as usize, len) })
    }
    fn mmio_read(&self, region: MmioRegion, offset: usize, width: Width) -> u64 {
        let (slot, offset) = self.slot(region, offset, width);
        let mut core = slot.core.lock();
        match slot.front {
            Front::Mmio { .. } => mmio::read(&mut core, offset, width),
            Front::Pci { .. } => pci::read(&mut core, offset, width),
        }
    }
    fn mmio_write(&self, region: MmioRegion, offset: usize, width: Width, value: u64) {
        let (slot, offset) = self.slot(region, offset, width);
        {
            let mut core = slot.core.lock();
            let before = core.accepted;
            match slot.front {
                Front::Mmio { .. } => mmio::write(&mut core, offset, width, value),
                Front::Pci { msix, .. } => pci::write(&mut core, offset, width, value, msix),
            }
            let mut model = slot.model.lock();
            if core.accepted != before {
                model.negotiated(core.accepted);
            }
            if !core.held {
                core.run(&mut *model, &self.inner.arena);
            }
        }
        self.deliver(&slot);
    }
}

impl Pci for TestMachine {
    fn pci_functions(&self, found: &mut dyn FnMut(PciAddress)) {
        let slots = self.inner.slots.lock().clone();
        for slot in slots {
            if let Front::Pci { address, .. } = slot.front {
                found(address);
            }
        }
    }
    fn pci_read(&self, function: PciAddress, offset: u16, width: Width) -> Result<u32> {
        let slot = self.function(function).ok_or(Error::NotFound)?;
        let Front::Pci { space, .. } = &slot.front else { return Err(Error::NotFound) };
        if width == Width::U64 || usize::from(offset) % width.bytes() != 0 || offset >= 4096 {
            return Err(Error::Invalid);
        }
        let space = space.lock();
        let mut value = [0; 4];
        for (i, byte) in value.iter_mut().enumerate().take(width.bytes()) {
            *byte = space.get(usize::from(offset) + i).copied().unwrap_or(0xff);
        }
        Ok(u32::from_le_bytes(value))
    }
    fn pci_write(&self, function: PciAddress, offset: u16, width: Width, value: u32) -> Result<()> {
        let slot = self.function(function).ok_or(Error::NotFound)?;
        let Front::Pci { space, .. } = &slot.front else { return Err(Error::NotFound) };
        let mut space = space.lock();
        // Only the command register can be written.
        if offset != 4 || width != Width::U16 {
            return Err(Error::Denied);
        }
        space[4..6].copy_from_slice(&(value as u16).to_le_bytes());
        Ok(())
    }
}

impl Irq for TestMachine {
    fn irq_attach(&self, source: IrqSource, _cpu: CpuId, signal: Arc<Signal>) -> Result<IrqId> {
        if let IrqSource::Msix { function, entry } = source {
            let slot = self.function(function).ok_or(Error::NotFound)?;
            let Front::Pci { msix, .. } = slot.front else { return Err(Error::NotFound) };
            if entry >= msix {
                return Err(Error::NotFound);
            }
            let used = {
                let interrupts = self.inner.interrupts.lock();
                interrupts.iter().flatten().filter(|i| matches!(i.source, IrqSource::Msix { .. })).count()
            };
            if used >= *self.inner.vectors.lock() {
                return Err(Error::NoMemory);
            }
        }
        if let IrqSource::Line(line) = source
            && !self.inner.slots.lock().iter().any(|slot| slot.line() == line)
        {
            return Err(Error::NotFound);
        }
        let mut interrupts = self.inner.interrupts.lock();
        if interrupts.iter().flatten().any(|interrupt| interrupt.source == source) {
            return Err(Error::Busy);
        }
        interrupts.push(Some(Interrupt { source, signal }));
        Ok(IrqId(interrupts.len() as u32 - 1))
    }
    fn irq_unmask(&self, irq: IrqId) {
        let source = match self.inner.interrupts.lock().get(irq.0 as usize) {
            Some(Some(interrupt)) => interrupt.source,
            _ => return,
        };
        let IrqSource::Line(line) = source else { return };
        self.inner.masked.lock().remove(&line);
        let slots = self.inner.slots.lock().clone();
        for slot in slots {
            if slot.line() == line {
                let level = slot.core.lock().isr != 0;
                self.deliver_line(line, level);
            }
        }
    }
    fn irq_detach(&self, irq: IrqId) {
        let interrupt = self.inner.interrupts.lock().get_mut(irq.0 as usize).and_then(Option::take);
        let interrupt = interrupt.expect("detached once");
        if let IrqSource::Line(line) = interrupt.source {
            self.inner.masked.lock().remove(&line);
        }
    }
}
