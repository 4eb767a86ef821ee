//! From a PCI function to a running controller (xHCI 1.2, 4.2).

use crate::controller::{self, DmaCommands, Interrupter, Interrupts, Parts, Xhci};
use crate::dma::vouch;
use crate::error::Error;
use crate::regs::{Command, Registers, Status, cap, extended, interrupter, op};
use crate::ring::Events;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::counter::Counter;
use anykernel::driver::DmaMemory;
use anykernel::driver::pci::{Base, Function};
use anykernel_usb::controller::ControllerInfo;
use hypercall::{CpuId, DeviceHost, IrqSource, PciAddress, PhysAddr, Signal, Width};

type Result<T> = core::result::Result<T, Error>;

const CONFIG_CLASS: u16 = 0x08;
/// Serial bus controller, USB, xHCI (PCI Code and ID Assignment 1.11, 1.13).
const CLASS_XHCI: u32 = 0x0c_03_30;

/// Registers that are mapped, at most.
const MAX_REGISTERS: u32 = 1 << 20;
/// More extended capabilities than this are a circle.
const MAX_EXTENDED: usize = 64;
/// How long the firmware may take to let go (7.1.1 names none; it is a second elsewhere), and a reset.
const BIOS_TIMEOUT_NS: u64 = 1_000_000_000;
const RESET_TIMEOUT_NS: u64 = 1_000_000_000;
/// Interrupters that are used, at most.
const MAX_INTERRUPTERS: u32 = 4;
/// At least this long between interrupts, in units of 250 ns.
const MODERATION: u32 = 160;
const MAX_TRANSFER_BYTES: usize = 1 << 20;
const MAX_BUFFERS: usize = 256;

/// Whether a function is an xHCI controller.
pub(crate) fn is_xhci<H: DeviceHost>(host: H, at: PciAddress) -> bool {
    host.pci_read(at, CONFIG_CLASS, Width::U32).is_ok_and(|class| class >> 8 == CLASS_XHCI)
}

/// Counters of a controller.
pub(crate) struct Counters {
    pub(crate) spurious: Counter,
    pub(crate) lost: Counter,
}

/// Takes over the controller at `at` and runs it; `signal` is raised when it has something to say.
pub(crate) fn open<H: DeviceHost>(
    host: H,
    at: PciAddress,
    signal: &Arc<Signal>,
    counters: Counters,
) -> Result<Xhci<H>> {
    let function = Function::new(host, at);
    function.enable().map_err(|error| Error::Host("enabling it", error))?;
    let registers = map(host, function)?;
    let structural = registers.read(cap::STRUCTURAL_1);
    let length = registers.read(cap::LENGTH) & 0xff;
    if structural == u32::MAX {
        return Err(Error::BadDevice("its registers read as all ones: it is gone or asleep"));
    }
    let (max_slots, ports) = (structural & 0xff, (structural >> 24) as u8);
    let offered = structural >> 8 & 0x7ff;
    let outside = Error::BadDevice("a register lies outside its memory");
    let part = |offset: u32, len: usize| registers.part(offset as usize, len).ok_or(outside);
    if length < 0x20 || max_slots == 0 || ports == 0 || offered == 0 {
        return Err(Error::BadDevice("its capabilities make no sense"));
    }
    let operational = part(length, op::PORTS + usize::from(ports) * op::PORT_BYTES)?;
    let doorbells = part(registers.read(cap::DOORBELLS) & !3, 4 * (max_slots as usize + 1))?;
    let runtime = part(registers.read(cap::RUNTIME) & !0x1f, interrupter::FIRST + interrupter::BYTES)?;
    let capability = registers.read(cap::CAPABILITY_1);
    let super_speed = extended_capabilities(host, &registers, capability, ports);

    reset(host, &operational)?;
    let page = (1u64 << 12) << (operational.read(op::PAGE_SIZE) & 0xffff).trailing_zeros().min(4);
    let no_memory = |error| Error::Host("allocating memory for it", error);
    let mut memory = Memory { host, blocks: Vec::new() };
    let contexts = memory.take(8 * (max_slots as usize + 1), 64)?;
    let second = registers.read(cap::STRUCTURAL_2);
    let scratch_count = (second >> 21 & 0x1f) << 5 | second >> 27;
    if scratch_count > 0 {
        let list = memory.take(8 * scratch_count as usize, 64)?;
        memory.block(contexts).write64(0, memory.block(list).device_addr(0));
        for i in 0..scratch_count as usize {
            let one = memory.take(page as usize, page as usize)?;
            memory.block(list).write64(8 * i, memory.block(one).device_addr(0));
        }
    }
    let commands = DmaCommands::new(host).map_err(no_memory)?;
    operational.write(op::CONFIG, max_slots);
    operational.write64(op::CONTEXTS, memory.block(contexts).device_addr(0));
    operational.write64(op::COMMAND_RING, commands.start());

    let wanted = offered.min(MAX_INTERRUPTERS).min(1 + host.cpu_count());
    let interrupts = attach(host, function, wanted, signal);
    let count = match &interrupts {
        Interrupts::Msix(irqs) => irqs.len(),
        _ => 1,
    };
    let mut interrupters = Vec::new();
    for index in 0..count {
        let offset = interrupter::FIRST + index * interrupter::BYTES;
        let Some(registers) = runtime.part(offset, interrupter::BYTES) else { break };
        let events = Events::new(host).map_err(no_memory)?;
        registers.write(interrupter::TABLE_SIZE, 1);
        registers.write64(interrupter::DEQUEUE, events.dequeue() | interrupter::BUSY);
        registers.write64(interrupter::TABLE, events.table());
        registers.write(interrupter::MODERATION, MODERATION);
        registers.write(interrupter::MANAGEMENT, interrupter::PENDING | interrupter::ENABLE);
        interrupters.push(Interrupter { events, registers, taken: 0, armed: true });
    }
    controller::run(&operational);
    let version = registers.read(cap::LENGTH) >> 16;
    debug_assert_eq!(cap::VERSION, 2);
    log::info!(
        "xhci {at}: version {:x}.{:x}, {ports} ports, {max_slots} slots, {count} interrupter(s){}{}",
        version >> 8,
        version >> 4 & 0xf,
        if matches!(interrupts, Interrupts::Msix(_)) { "" } else { ", no MSI-X" },
        if capability & cap::LARGE_CONTEXTS != 0 { ", 64-byte contexts" } else { "" },
    );
    let mut blocks = memory.blocks.into_iter();
    let contexts = blocks.next().ok_or(outside)?;
    Ok(Xhci::new(Parts {
        host,
        info: ControllerInfo {
            name: alloc::format!("xhci {at}"),
            ports,
            max_slots,
            max_transfer_bytes: MAX_TRANSFER_BYTES,
            max_buffers: MAX_BUFFERS,
        },
        operational,
        doorbells,
        stride: if capability & cap::LARGE_CONTEXTS != 0 { 64 } else { 32 },
        super_speed,
        contexts,
        scratch: blocks.collect(),
        commands,
        interrupters,
        interrupts,
        spurious: counters.spurious,
        lost: counters.lost,
    }))
}

/// Memory that the controller was not told of yet, or does not run yet to use.
struct Memory<H: DeviceHost> {
    host: H,
    blocks: Vec<DmaMemory<H>>,
}

impl<H: DeviceHost> Memory<H> {
    /// Its index in `blocks`.
    fn take(&mut self, len: usize, align: usize) -> Result<usize> {
        let failed = |error| Error::Host("allocating memory for it", error);
        match DmaMemory::new(self.host, len, align) {
            Ok(block) => {
                self.blocks.push(block);
                Ok(self.blocks.len() - 1)
            }
            Err(error) => {
                // It was reset and does not run.
                let quiet = vouch();
                self.blocks.drain(..).for_each(|block| block.free(&quiet));
                Err(failed(error))
            }
        }
    }

    #[expect(clippy::indexing_slicing, reason = "an index that `take` gave")]
    fn block(&self, index: usize) -> &DmaMemory<H> {
        &self.blocks[index]
    }
}

/// Halts and resets it (4.2).
fn reset<H: DeviceHost>(host: H, operational: &Registers<H>) -> Result<()> {
    if controller::halt(host, operational).is_none() {
        return Err(Error::BadDevice("it does not halt"));
    }
    operational.write(op::COMMAND, Command::RESET.bits());
    let ready = || {
        let command = Command::from_bits_truncate(operational.read(op::COMMAND));
        let status = operational.read(op::STATUS);
        status != u32::MAX
            && !command.contains(Command::RESET)
            && !Status::from_bits_truncate(status).contains(Status::NOT_READY)
    };
    match controller::wait(host, RESET_TIMEOUT_NS, ready) {
        true => Ok(()),
        false => Err(Error::BadDevice("it does not finish its reset")),
    }
}

/// Takes the controller from the firmware (7.1), and learns which ports are USB 3's (7.2).
fn extended_capabilities<H: DeviceHost>(
    host: H,
    registers: &Registers<H>,
    capability: u32,
    ports: u8,
) -> Vec<bool> {
    let mut super_speed = alloc::vec![false; usize::from(ports)];
    let mut at = (capability >> 16) as usize * 4;
    for _ in 0..MAX_EXTENDED {
        let header = registers.read(at);
        if at == 0 || header == u32::MAX {
            break;
        }
        match header & 0xff {
            extended::LEGACY => take_over(host, registers, at),
            extended::PROTOCOL if header >> 24 >= 3 => {
                let range = registers.read(at + 8);
                let (first, count) = ((range & 0xff) as usize, (range >> 8 & 0xff) as usize);
                let theirs = super_speed.iter_mut().skip(first.saturating_sub(1)).take(count);
                theirs.for_each(|port| *port = first > 0);
            }
            _ => {}
        }
        match (header >> 8 & 0xff) as usize {
            0 => break,
            next => at += 4 * next,
        }
    }
    super_speed
}

fn take_over<H: DeviceHost>(host: H, registers: &Registers<H>, at: usize) {
    registers.write(at, registers.read(at) | extended::OS_OWNED);
    let free = || registers.read(at) & extended::BIOS_OWNED == 0;
    if !controller::wait(host, BIOS_TIMEOUT_NS, free) {
        log::warn!("the firmware does not let go of an xHCI controller; taking it");
        registers.write(at, registers.read(at) & !extended::BIOS_OWNED | extended::OS_OWNED);
    }
    let control = registers.read(at + 4);
    registers.write(at + 4, control & extended::SMI_KEPT | extended::SMI_CAUSES);
}

/// Its registers are those of its first base address (5.2.1).
fn map<H: DeviceHost>(host: H, function: Function<H>) -> Result<Registers<H>> {
    let failed = |error| Error::Host("reading its PCI configuration", error);
    let base = match function.base(0).map_err(failed)? {
        Base::Memory(base) => base,
        Base::Unassigned => {
            return Err(Error::Unsupported("its memory has no address: the firmware assigned none"));
        }
        Base::NoMemory => return Err(Error::BadDevice("its registers are not in memory")),
    };
    let len = function.base_len(0).map_err(failed)?.unwrap_or(MAX_REGISTERS).min(MAX_REGISTERS);
    if len < 0x1000 {
        return Err(Error::BadDevice("its memory is too small for its registers"));
    }
    let region = host
        .mmio_map(PhysAddr(base), len as usize)
        .map_err(|error| Error::Host("mapping its registers", error))?;
    Ok(Registers::new(host, region))
}

/// An interrupt for each interrupter, on the CPUs in turn: MSI-X, else the line, else none.
fn attach<H: DeviceHost>(host: H, function: Function<H>, wanted: u32, signal: &Arc<Signal>) -> Interrupts {
    let cpus = host.cpu_count().max(1);
    let mut irqs = Vec::new();
    for index in 0..wanted.min(u32::from(function.msix_entries().unwrap_or(0))) {
        let source = IrqSource::Msix { function: function.address(), entry: index as u16 };
        match host.irq_attach(source, CpuId(index % cpus), signal.clone()) {
            Ok(irq) => irqs.push(irq),
            Err(_) => break,
        }
    }
    if !irqs.is_empty() {
        return Interrupts::Msix(irqs);
    }
    let line = function.line().ok().flatten();
    let attached =
        line.and_then(|line| host.irq_attach(IrqSource::Line(line), CpuId(0), signal.clone()).ok());
    match attached {
        Some(irq) => Interrupts::Line(irq),
        None => {
            log::warn!("xhci {}: no interrupt; it is polled", function.address());
            Interrupts::None
        }
    }
}
