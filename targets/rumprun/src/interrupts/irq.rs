//! Device interrupts: which signal a vector of a CPU raises. This is what stands behind [`hypercall::Irq`].

use super::{DEVICE_VECTORS, FIRST_DEVICE_VECTOR, apic, ioapic};
use crate::bus::pci;
use crate::cpu;
use crate::host::Machine;
use crate::sync::SpinLock;
use alloc::sync::Arc;
use hypercall::{CpuId, Error, IrqId, IrqSource, Result, Signal};

struct Attached {
    signal: Arc<Signal>,
    source: IrqSource,
}

/// The device vectors of one CPU. The lock is held while a signal is raised, so that who detaches knows that it is
/// over.
pub(crate) struct Vectors(SpinLock<[Option<Attached>; DEVICE_VECTORS]>);

impl Vectors {
    pub(crate) const fn new() -> Self {
        Self(SpinLock::new([const { None }; DEVICE_VECTORS]))
    }
}

/// Called with interrupts off, for a device vector of this CPU.
pub(super) fn handle(vector: u8) {
    let vectors = cpu::this().vectors.0.lock();
    match &vectors[usize::from(vector - FIRST_DEVICE_VECTOR)] {
        Some(attached) => {
            if let IrqSource::Line(line) = attached.source
                && !ioapic::is_edge(line)
            {
                ioapic::set_mask(line, vector, true);
            }
            apic::end_of_interrupt();
            attached.signal.raise(&Machine);
        }
        None => apic::end_of_interrupt(),
    }
}

fn id(cpu: u32, index: usize) -> IrqId {
    IrqId(cpu << 8 | (index as u32 + u32::from(FIRST_DEVICE_VECTOR)))
}

fn parts(id: IrqId) -> Option<(&'static cpu::PerCpu, usize, u8)> {
    let (cpu, vector) = (id.0 >> 8, id.0 as u8);
    let index = usize::from(vector.checked_sub(FIRST_DEVICE_VECTOR)?);
    (cpu < cpu::count() && index < DEVICE_VECTORS).then(|| (cpu::get(cpu), index, vector))
}

/// See [`hypercall::Irq::irq_attach`].
pub(crate) fn attach(source: IrqSource, target: CpuId, signal: Arc<Signal>) -> Result<IrqId> {
    if target.0 >= cpu::count() {
        return Err(Error::Invalid);
    }
    if let IrqSource::Line(line) = source {
        if !ioapic::has_line(line) {
            return Err(Error::NotFound);
        }
        // A line is not shared: the host masks it when it fires.
        for other in 0..cpu::count() {
            if cpu::get(other).vectors.0.lock().iter().flatten().any(|attached| attached.source == source) {
                return Err(Error::Busy);
            }
        }
    }
    let per_cpu = cpu::get(target.0);
    let index = {
        let mut vectors = per_cpu.vectors.0.lock();
        let index = vectors.iter().position(Option::is_none).ok_or(Error::NoMemory)?;
        vectors[index] = Some(Attached { signal, source });
        index
    };
    let irq = id(target.0, index);
    let vector = FIRST_DEVICE_VECTOR + index as u8;
    let apic_id = per_cpu.apic_id.get();
    let routed = match source {
        IrqSource::Line(line) => ioapic::route(line, vector, apic_id),
        IrqSource::Msix { function, entry } => pci::msix_route(function, entry, vector, apic_id),
    };
    if let Err(error) = routed {
        let attached = per_cpu.vectors.0.lock()[index].take();
        drop(attached);
        return Err(error);
    }
    Ok(irq)
}

/// See [`hypercall::Irq::irq_unmask`].
pub(crate) fn unmask(irq: IrqId) {
    let Some((per_cpu, index, vector)) = parts(irq) else { return };
    let line = match &per_cpu.vectors.0.lock()[index] {
        Some(Attached { source: IrqSource::Line(line), .. }) => *line,
        _ => return,
    };
    if !ioapic::is_edge(line) {
        ioapic::set_mask(line, vector, false);
    }
}

/// See [`hypercall::Irq::irq_detach`].
pub(crate) fn detach(irq: IrqId) {
    let Some((per_cpu, index, vector)) = parts(irq) else { return };
    // Taken out under the lock, dropped outside of it: freeing memory may switch threads.
    let attached = per_cpu.vectors.0.lock()[index].take();
    match attached.as_ref().map(|attached| attached.source) {
        Some(IrqSource::Line(line)) => ioapic::set_mask(line, vector, true),
        Some(IrqSource::Msix { function, entry }) => pci::msix_mask(function, entry),
        None => {}
    }
}
