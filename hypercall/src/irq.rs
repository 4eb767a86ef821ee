//! Private contract: interrupts, delivered as signals.
//!
//! No driver code runs in interrupt context. An interrupt raises a [`Signal`]; the thread that owns the queue looks at
//! its device. What an interrupt did is thereby one number, which can be recorded, replayed and injected.

use crate::atomic::{AtomicU32, Ordering};
use crate::{CpuId, PciAddress, Result, Threads};

/// Something happened: a counter that a thread can park on.
///
/// The waiter's protocol, which loses nothing: read [`Signal::count`], look for work, and only if there is none
/// [`Signal::wait`] with that count.
#[derive(Debug, Default)]
pub struct Signal(AtomicU32);

impl Signal {
    /// A signal that nobody raised yet.
    #[cfg(not(loom))]
    pub const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// A signal that nobody raised yet.
    #[cfg(loom)]
    pub fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// How often it was raised, modulo 2^32.
    #[inline]
    pub fn count(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    /// Counts one up and wakes every waiter. Context: any, interrupt included. Never blocks.
    #[inline]
    pub fn raise<H: Threads>(&self, host: &H) {
        self.0.fetch_add(1, Ordering::Release);
        host.unpark(&self.0, u32::MAX);
    }

    /// Counts `by` up and wakes nobody: for who decides itself when threads go on, as a replay does. Context: any.
    pub fn advance(&self, by: u32) {
        self.0.fetch_add(by, Ordering::Release);
    }

    /// The word that waiters park on.
    pub(crate) fn word(&self) -> &AtomicU32 {
        &self.0
    }

    /// Whether `word` is the one that waiters park on.
    pub(crate) fn is_counted_by(&self, word: &AtomicU32) -> bool {
        core::ptr::eq(&self.0, word)
    }

    /// Sleeps until the count differs from `seen`, at the latest until `deadline_ns`. Says whether it differs.
    /// Context: thread.
    #[inline]
    pub fn wait<H: Threads>(&self, host: &H, seen: u32, deadline_ns: Option<u64>) -> bool {
        loop {
            if self.count() != seen {
                return true;
            }
            if host.park(&self.0, seen, deadline_ns) == crate::ParkResult::TimedOut {
                return self.count() != seen;
            }
        }
    }
}

/// Where an interrupt comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IrqSource {
    /// A level-triggered line (GSI), as virtio-mmio and legacy PCI have. The host masks it when it fires.
    Line(u32),
    /// Entry `entry` of the MSI-X table of a function. The host programs the table and never masks it by itself.
    Msix {
        /// Whose table.
        function: PciAddress,
        /// Which entry.
        entry: u16,
    },
}

/// An attached interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IrqId(pub u32);

/// Interrupts.
pub trait Irq {
    /// From now on every interrupt of `source` raises `signal`; MSI-X is delivered to `cpu`, a line where the host can.
    ///
    /// Errors: [`crate::Error::NotFound`] (no such line, function or entry), [`crate::Error::Invalid`] (no such CPU), [`crate::Error::NoMemory`] (no vectors
    /// left), [`crate::Error::Busy`] (somebody else's). Context: thread.
    /// Counterparts: `rumpcomp_pci_irq_establish`; LKL `irq_init` of `lkl_dev_pci_ops`, and `lkl_trigger_irq`.
    fn irq_attach(&self, source: IrqSource, cpu: CpuId, signal: alloc::sync::Arc<Signal>) -> Result<IrqId>;

    /// Lets a masked line fire again, after its cause in the device was cleared. No effect on MSI-X. Context: thread.
    fn irq_unmask(&self, irq: IrqId);

    /// Ends the delivery and drops the host's reference to the signal; when it returns the signal is raised no more.
    /// Context: thread.
    fn irq_detach(&self, irq: IrqId);
}
