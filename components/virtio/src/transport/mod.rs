//! How a device is reached: virtio-mmio or virtio-pci, chosen at run time.

mod mmio;
mod pci;

pub(crate) use mmio::MmioTransport;
pub(crate) use pci::{PciTransport, device_type as pci_device_type};

use crate::dma::after_reset;
use crate::error::{Error, Result};
use crate::queue::Queue;
use crate::spec::{Status, feature};
use alloc::sync::Arc;
use anykernel::driver::Quiet;
use core::fmt;
use hypercall::{CpuId, DeviceHost, Irq, IrqId, IrqSource, Mmio, MmioRegion, Signal, Width};

/// How often a configuration that keeps changing is read again, and how long a reset may take.
const CONFIG_TRIES: usize = 32;
const RESET_TIMEOUT_NS: u64 = 100_000_000;
/// A clock that stands still must not make the wait endless.
const RESET_TRIES: usize = 1_000_000;

/// Where a device was found.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    Mmio(hypercall::PhysAddr),
    Pci(hypercall::PciAddress),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Mmio(at) => write!(f, "virtio-mmio at {:#x}", at.0),
            Place::Pci(at) => write!(f, "virtio-pci {at}"),
        }
    }
}

/// Registers, with every access checked against what was mapped.
#[derive(Clone, Copy)]
pub(crate) struct Registers<H> {
    host: H,
    region: MmioRegion,
}

impl<H: Mmio> Registers<H> {
    pub(crate) fn new(host: H, region: MmioRegion) -> Self {
        Self { host, region }
    }

    fn try_read(&self, offset: usize, width: Width) -> Result<u64> {
        if !self.region.holds(offset, width) {
            return Err(Error::BadDevice("a register lies outside the device"));
        }
        Ok(self.host.mmio_read(self.region, offset, width))
    }

    /// Registers that set-up has checked to be there; reads as all ones elsewhere, as an absent device does.
    fn read(&self, offset: usize, width: Width) -> u64 {
        self.try_read(offset, width).unwrap_or(u64::MAX)
    }

    fn write(&self, offset: usize, width: Width, value: u64) {
        if self.region.holds(offset, width) {
            self.host.mmio_write(self.region, offset, width, value);
        }
    }

    fn read32(&self, offset: usize) -> u32 {
        self.read(offset, Width::U32) as u32
    }

    fn write32(&self, offset: usize, value: u32) {
        self.write(offset, Width::U32, u64::from(value));
    }

    /// A 64-bit register as two halves, low one first.
    fn write64(&self, offset: usize, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }
}

/// Tells a device about a queue: one register write.
#[derive(Clone, Copy)]
pub(crate) struct Doorbell<H> {
    registers: Registers<H>,
    offset: usize,
    width: Width,
    queue: u16,
}

impl<H: Mmio> Doorbell<H> {
    fn new(registers: Registers<H>, offset: usize, width: Width, queue: u16) -> Result<Self> {
        if !registers.region.holds(offset, width) {
            return Err(Error::BadDevice("a queue's doorbell lies outside the notification area"));
        }
        Ok(Self { registers, offset, width, queue })
    }

    pub(crate) fn ring(&self) {
        self.registers.host.mmio_write(self.registers.region, self.offset, self.width, u64::from(self.queue));
    }
}

/// How a device interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InterruptMode {
    /// One shared line; its cause is acknowledged in the device.
    Line(u32),
    /// A vector for each queue (pair): how many there are.
    Msix(u16),
}

/// An attached interrupt of a device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attached {
    id: IrqId,
    line: bool,
}

/// A device's registers, whatever the bus.
pub(crate) enum Transport<H: DeviceHost> {
    Mmio(MmioTransport<H>),
    Pci(PciTransport<H>),
}

macro_rules! each {
    ($self:ident, $transport:ident => $body:expr) => {
        match $self {
            Transport::Mmio($transport) => $body,
            Transport::Pci($transport) => $body,
        }
    };
}

impl<H: DeviceHost> Transport<H> {
    fn host(&self) -> H {
        each!(self, t => t.host())
    }

    fn status(&self) -> Status {
        Status::from_bits_retain(each!(self, t => t.status()))
    }

    fn set_status(&mut self, status: Status) {
        each!(self, t => t.set_status(status.bits()));
    }

    /// Resets the device and waits, for a bounded time, until it says that it is done. `None`: it does not.
    pub(crate) fn reset(&mut self) -> Option<Quiet> {
        self.set_status(Status::empty());
        let host = self.host();
        let deadline_ns = host.monotonic_ns().saturating_add(RESET_TIMEOUT_NS);
        for _ in 0..RESET_TRIES {
            if self.status().is_empty() {
                return Some(after_reset());
            }
            if host.monotonic_ns() >= deadline_ns {
                break;
            }
            host.yield_now();
        }
        None
    }

    /// Tells the device that we gave up on it (2.1).
    pub(crate) fn fail(&mut self) {
        let status = self.status();
        self.set_status(status | Status::FAILED);
    }

    /// Steps 1 to 6 of 3.1.1: reset, features. Returns what both sides agreed on.
    ///
    /// `choose` picks features of the device type among those offered; those of the transport and the ring are added here.
    pub(crate) fn negotiate(&mut self, choose: impl FnOnce(u64) -> u64) -> Result<u64> {
        self.reset().ok_or(Error::BadDevice("the device does not finish its reset"))?;
        self.set_status(Status::ACKNOWLEDGE);
        self.set_status(Status::ACKNOWLEDGE | Status::DRIVER);
        let legacy = each!(self, t => t.is_legacy());
        let offered = each!(self, t => t.device_features());
        let mut known = choose(offered) | feature::INDIRECT_DESC | feature::EVENT_IDX;
        if legacy {
            known = (known | feature::ANY_LAYOUT) & u64::from(u32::MAX);
        } else {
            if offered & feature::VERSION_1 == 0 {
                return Err(Error::BadDevice("a modern transport without VIRTIO_F_VERSION_1"));
            }
            known |= feature::VERSION_1 | feature::ACCESS_PLATFORM;
        }
        let agreed = offered & known;
        each!(self, t => t.set_driver_features(agreed));
        if !legacy {
            let status = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
            self.set_status(status);
            if !self.status().contains(Status::FEATURES_OK) {
                return Err(Error::BadDevice("the device refuses the features it offered"));
            }
        }
        Ok(agreed)
    }

    /// Step 8: the device may work.
    pub(crate) fn driver_ok(&mut self) -> Result<()> {
        let status = self.status();
        self.set_status(status | Status::DRIVER_OK);
        if self.status().intersects(Status::NEEDS_RESET | Status::FAILED) {
            return Err(Error::BadDevice("the device failed at start"));
        }
        Ok(())
    }

    /// Whether the device asks for a reset, or is not there any more.
    pub(crate) fn needs_reset(&self) -> bool {
        self.status().contains(Status::NEEDS_RESET)
    }

    /// Whether the device is of before VirtIO 1.0.
    pub(crate) fn is_legacy(&self) -> bool {
        each!(self, t => t.is_legacy())
    }

    /// Most entries of queue `index`; 0: there is none.
    pub(crate) fn queue_max(&mut self, index: u16) -> u16 {
        each!(self, t => t.queue_max(index))
    }

    /// Tells the device of a queue. `vector`: which of the device's interrupts belongs to it, if it has several. On an error
    /// the device was not told: the queue may be dropped.
    pub(crate) fn enable_queue<T>(
        &mut self,
        index: u16,
        queue: &Queue<H, T>,
        vector: u16,
    ) -> Result<Doorbell<H>> {
        match self {
            Transport::Mmio(t) => t.enable_queue(index, queue),
            Transport::Pci(t) => t.enable_queue(index, queue, vector),
        }
    }

    /// Reads from the device's configuration space what fits one access (1, 2 or 4 bytes).
    pub(crate) fn config(&self, offset: usize, width: Width) -> Result<u64> {
        each!(self, t => t.config(offset, width))
    }

    /// Runs `read` until the configuration did not change meanwhile (2.5.1), a bounded number of times.
    pub(crate) fn stable_config<T: PartialEq>(&self, read: impl Fn(&Self) -> Result<T>) -> Result<T> {
        for _ in 0..CONFIG_TRIES {
            let before = each!(self, t => t.config_generation());
            let value = read(self)?;
            // A legacy device has no generation: two equal readings have to do (2.5.4).
            let settled = match before {
                Some(before) => each!(self, t => t.config_generation()) == Some(before),
                None => read(self)? == value,
            };
            if settled {
                return Ok(value);
            }
        }
        Err(Error::BadDevice("the device's configuration never settles"))
    }

    /// A 64-bit field.
    pub(crate) fn config_u64(&self, offset: usize) -> Result<u64> {
        self.stable_config(|t| Ok(t.config(offset, Width::U32)? | t.config(offset + 4, Width::U32)? << 32))
    }

    /// Decides between MSI-X and the line; says how many vectors there are, at most `wanted`; 0: only the line. Before any
    /// queue is enabled.
    pub(crate) fn choose_interrupts(&mut self, wanted: u16) -> u16 {
        match self {
            Transport::Mmio(_) => 0,
            Transport::Pci(t) => t.choose_interrupts(wanted),
        }
    }

    /// Lets configuration changes use `vector`.
    pub(crate) fn set_config_vector(&mut self, vector: u16) {
        if let Transport::Pci(t) = self {
            t.set_config_vector(vector);
        }
    }

    /// Attaches `signal` to a vector (to the line, if that is all there is).
    pub(crate) fn attach(&self, vector: u16, cpu: CpuId, signal: Arc<Signal>) -> hypercall::Result<Attached> {
        let (source, line) = match self {
            Transport::Mmio(t) => (IrqSource::Line(t.line()), true),
            Transport::Pci(t) => match t.interrupt_mode() {
                InterruptMode::Line(line) => (IrqSource::Line(line), true),
                InterruptMode::Msix(_) => (IrqSource::Msix { function: t.address(), entry: vector }, false),
            },
        };
        Ok(Attached { id: self.host().irq_attach(source, cpu, signal)?, line })
    }

    /// Ends what [`Transport::attach`] began.
    pub(crate) fn detach(&self, attached: Attached) {
        self.host().irq_detach(attached.id);
    }

    /// What it takes to acknowledge interrupts without the transport.
    pub(crate) fn acknowledger(&self, attached: Attached) -> Acknowledger<H> {
        let registers = match self {
            _ if !attached.line => None,
            Transport::Mmio(t) => Some((t.registers(), true)),
            Transport::Pci(t) => Some((t.isr(), false)),
        };
        Acknowledger { registers, id: attached.id }
    }
}

/// Clears the cause of a line interrupt and lets the line fire again.
#[derive(Clone, Copy)]
pub(crate) struct Acknowledger<H> {
    /// The registers, and whether they are virtio-mmio's. `None`: MSI-X needs nothing.
    registers: Option<(Registers<H>, bool)>,
    id: IrqId,
}

impl<H: Mmio + Irq> Acknowledger<H> {
    /// Whether there is anything to acknowledge.
    pub(crate) fn needed(&self) -> bool {
        self.registers.is_some()
    }

    /// Acknowledges, before the queues are looked at. `true`: the configuration may have changed.
    pub(crate) fn acknowledge(&self) -> bool {
        let Some((registers, mmio)) = &self.registers else { return false };
        let cause = if *mmio {
            let cause = registers.read32(crate::spec::mmio::INTERRUPT_STATUS) & 3;
            if cause != 0 {
                registers.write32(crate::spec::mmio::INTERRUPT_ACK, cause);
            }
            cause
        } else {
            // Reading clears it (4.1.4.5).
            registers.read(0, Width::U8) as u32
        };
        registers.host.irq_unmask(self.id);
        cause & crate::spec::ISR_CONFIG != 0
    }
}
