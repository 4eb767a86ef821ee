//! The books of a host that plays devices itself: which registers, PCI functions and interrupts there are.
//!
//! A [`DeviceTable`] holds models as values `M` and never calls them. Locks are its owner's affair: what has to happen without
//! them, such as raising a signal, is handed out.

use crate::{CpuId, Error, IrqId, IrqSource, MmioDevice, PciAddress, PhysAddr, Result, Signal, Width};
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// Lines that exist.
const LINES: u32 = 64;
/// Bytes of a function's configuration space.
const SPACE: usize = 4096;

struct Window<M> {
    at: PhysAddr,
    len: usize,
    /// Of a virtio-mmio transport; none for a PCI function's memory.
    line: Option<u32>,
    model: M,
}

struct Function {
    space: Vec<u8>,
    msix_entries: u16,
    /// Of base address registers: which bits a driver can set, so that it finds their sizes.
    writable: BTreeMap<u16, u32>,
}

struct Attached {
    id: IrqId,
    source: IrqSource,
    signal: Arc<Signal>,
    masked: bool,
    pending: bool,
}

/// What an interrupt came to.
#[derive(Debug)]
pub enum Fired {
    /// Nobody is attached.
    Nobody,
    /// It is delivered at the unmasking.
    Masked,
    /// To be raised.
    Raise(Arc<Signal>),
}

/// The devices of a host.
pub struct DeviceTable<M> {
    windows: Vec<Window<M>>,
    functions: BTreeMap<PciAddress, Function>,
    attached: Vec<Attached>,
    next_irq: u32,
}

impl<M> Default for DeviceTable<M> {
    fn default() -> Self {
        Self { windows: Vec::new(), functions: BTreeMap::new(), attached: Vec::new(), next_irq: 0 }
    }
}

impl<M: Clone> DeviceTable<M> {
    /// Adds `len` bytes of registers. `line`: they are a virtio-mmio transport with that interrupt; else what a base address
    /// register of a PCI function points to.
    pub fn add_window(&mut self, at: PhysAddr, len: usize, line: Option<u32>, model: M) {
        self.windows.push(Window { at, len, line, model });
    }

    /// Adds a PCI function with its configuration space (at most 4096 bytes) and MSI-X entries. `bars` says of which
    /// registers a driver may write which bits.
    pub fn add_function(&mut self, at: PciAddress, space: &[u8], msix_entries: u16, bars: &[(u16, u32)]) {
        let mut whole = alloc::vec![0; SPACE];
        whole[..space.len()].copy_from_slice(space);
        let function = Function { space: whole, msix_entries, writable: bars.iter().copied().collect() };
        self.functions.insert(at, function);
    }

    /// The virtio-mmio transports.
    pub fn transports(&self) -> Vec<MmioDevice> {
        let found = self.windows.iter().filter_map(|one| Some((one, one.line?)));
        found.map(|(one, line)| MmioDevice { registers: one.at, len: one.len, line }).collect()
    }

    /// Whether these registers can be mapped. Errors: `Invalid`, no registers at all; `Denied`, not all are a device's.
    pub fn can_map(&self, at: PhysAddr, len: usize) -> Result<()> {
        let end = at.0.checked_add(len as u64).filter(|_| len > 0).ok_or(Error::Invalid)?;
        let inside = |one: &Window<M>| at.0 >= one.at.0 && end <= one.at.0 + one.len as u64;
        if self.windows.iter().any(inside) { Ok(()) } else { Err(Error::Denied) }
    }

    /// The model whose register is at `address`, and the register's offset there.
    pub fn model(&self, address: u64) -> Option<(M, usize)> {
        let offset =
            |one: &Window<M>| address.checked_sub(one.at.0).filter(|offset| *offset < one.len as u64);
        self.windows.iter().find_map(|one| Some((one.model.clone(), offset(one)? as usize)))
    }

    /// The PCI functions.
    pub fn functions(&self) -> Vec<PciAddress> {
        self.functions.keys().copied().collect()
    }

    /// As [`crate::Pci::pci_read`].
    pub fn pci_read(&self, function: PciAddress, offset: u16, width: Width) -> Result<u32> {
        let range = register(offset, width)?;
        let space = &self.functions.get(&function).ok_or(Error::NotFound)?.space;
        Ok(space[range].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte)))
    }

    /// As [`crate::Pci::pci_write`].
    pub fn pci_write(&mut self, function: PciAddress, offset: u16, width: Width, value: u32) -> Result<()> {
        let range = register(offset, width)?;
        let function = self.functions.get_mut(&function).ok_or(Error::NotFound)?;
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

    /// As [`crate::Irq::irq_attach`], on a host with so many CPUs.
    pub fn attach(&mut self, source: IrqSource, cpu: CpuId, cpus: u32, signal: Arc<Signal>) -> Result<IrqId> {
        if cpu.0 >= cpus {
            return Err(Error::Invalid);
        }
        let exists = match source {
            IrqSource::Line(line) => line < LINES,
            IrqSource::Msix { function, entry } => {
                self.functions.get(&function).is_some_and(|found| entry < found.msix_entries)
            }
        };
        if !exists {
            return Err(Error::NotFound);
        }
        if self.attached.iter().any(|one| one.source == source) {
            return Err(Error::Busy);
        }
        self.next_irq += 1;
        let id = IrqId(self.next_irq);
        self.attached.push(Attached { id, source, signal, masked: false, pending: false });
        Ok(id)
    }

    /// Unmasks. What came meanwhile is to be raised.
    pub fn unmask(&mut self, irq: IrqId) -> Option<Arc<Signal>> {
        let attached = self.attached.iter_mut().find(|one| one.id == irq)?;
        let pending = core::mem::take(&mut attached.pending);
        attached.masked = pending && matches!(attached.source, IrqSource::Line(_));
        pending.then(|| attached.signal.clone())
    }

    /// Ends an attachment. Its signal comes back, so that it is dropped outside of locks.
    pub fn detach(&mut self, irq: IrqId) -> Option<Arc<Signal>> {
        let at = self.attached.iter().position(|one| one.id == irq)?;
        Some(self.attached.remove(at).signal)
    }

    /// A device interrupts. A line that fired stays masked until it is unmasked.
    pub fn fire(&mut self, source: IrqSource) -> Fired {
        let Some(attached) = self.attached.iter_mut().find(|one| one.source == source) else {
            return Fired::Nobody;
        };
        if attached.masked {
            attached.pending = true;
            return Fired::Masked;
        }
        attached.masked = matches!(source, IrqSource::Line(_));
        Fired::Raise(attached.signal.clone())
    }

    /// How many interrupts are attached.
    pub fn attached(&self) -> usize {
        self.attached.len()
    }
}

/// The register at `offset` as a range of the configuration space.
fn register(offset: u16, width: Width) -> Result<core::ops::Range<usize>> {
    let (at, bytes) = (usize::from(offset), width.bytes());
    if bytes > 4 || !at.is_multiple_of(bytes) || at + bytes > SPACE {
        return Err(Error::Invalid);
    }
    Ok(at..at + bytes)
}
