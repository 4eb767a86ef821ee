//! [`Machine`]: the hypercall contract on this machine.

use crate::bus::pci;
use crate::interrupts::{ioapic, irq};
use crate::memory::{self, frames, paging};
use crate::{boot, console, cpu, entropy, thread, time};
use alloc::{boxed::Box, sync::Arc};
use core::ptr::NonNull;
use core::sync::atomic::AtomicU32;
use hypercall::*;

/// The machine that the image runs on. There is one, so the handle holds nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Machine;

impl Versions for Machine {
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

impl Clock for Machine {
    fn monotonic_ns(&self) -> u64 {
        time::monotonic_ns()
    }
    fn realtime_ns(&self) -> u64 {
        time::realtime_ns()
    }
}

// SAFETY: frames are whole aligned pages of RAM seen through the direct map, given once until freed; they are zeroed here.
unsafe impl Memory for Machine {
    fn alloc_pages(&self, count: usize) -> Result<Pages> {
        if count == 0 {
            return Err(Error::Invalid);
        }
        let base = NonNull::new(paging::direct(frames::allocate(count)?)).ok_or(Error::NoMemory)?;
        // SAFETY: `count` fresh pages.
        unsafe { base.as_ptr().write_bytes(0, count * PAGE_SIZE) };
        Ok(Pages { base, count })
    }

    unsafe fn free_pages(&self, pages: Pages) {
        // SAFETY: by the caller they came from `alloc_pages` and are not in use.
        unsafe { frames::free(pages.base.as_ptr().addr() as u64 - paging::DIRECT_BASE, pages.count) };
    }

    fn memory_bytes(&self) -> u64 {
        memory::total_bytes()
    }
}

impl Threads for Machine {
    fn spawn(&self, spec: ThreadSpec<'_>, entry: Box<dyn FnOnce() + Send + 'static>) -> Result<ThreadId> {
        thread::spawn(spec, entry)
    }
    fn join(&self, thread: ThreadId) -> Result<()> {
        thread::join(thread)
    }
    fn park(&self, word: &AtomicU32, expected: u32, deadline_ns: Option<u64>) -> ParkResult {
        thread::park::park(word, expected, deadline_ns)
    }
    fn unpark(&self, word: &AtomicU32, count: u32) -> u32 {
        thread::park::unpark(word, count)
    }
    fn yield_now(&self) {
        thread::scheduler::yield_now();
    }
}

impl Cpus for Machine {
    fn cpu_count(&self) -> u32 {
        cpu::count()
    }
    fn current_cpu(&self) -> CpuId {
        CpuId(cpu::current_id())
    }
}

impl Entropy for Machine {
    fn fill_random(&self, buf: &mut [u8]) -> Result<()> {
        entropy::fill(buf);
        Ok(())
    }
}

/// `"config"` is the first boot module (QEMU `-initrd FILE`), `"cmdline"` the kernel command line.
impl Params for Machine {
    fn param(&self, key: &str, buf: &mut [u8]) -> Result<usize> {
        const LONGEST: usize = 1 << 20;
        let info = boot::start_info::get();
        let value = match key {
            "config" if info.module.start < info.module.end => memory::module().ok_or(Error::NotFound)?,
            "cmdline" => info.cmdline().as_bytes(),
            _ => return Err(Error::NotFound),
        };
        let room =
            buf.get_mut(..value.len()).filter(|room| room.len() <= LONGEST).ok_or(Error::BufferTooSmall)?;
        room.copy_from_slice(value);
        Ok(value.len())
    }
}

impl Console for Machine {
    fn console_write(&self, bytes: &[u8]) {
        console::write(bytes);
    }
}

impl Exit for Machine {
    fn exit(&self, status: ExitStatus) -> ! {
        crate::exit::exit(status)
    }
}

// SAFETY: frames are contiguous RAM, zeroed here, given once until freed. There is no IOMMU: a device sees physical
// addresses, and every buffer that is passed lies in one mapping of contiguous RAM (direct map, a stack, the image).
unsafe impl Dma for Machine {
    fn dma_alloc(&self, len: usize, align: usize) -> Result<DmaBlock> {
        const MAX_ALIGN: usize = 65536;
        if len == 0 || !align.is_power_of_two() || align > MAX_ALIGN {
            return Err(Error::Invalid);
        }
        let phys = frames::allocate_aligned(len.div_ceil(PAGE_SIZE), align.div_ceil(PAGE_SIZE))?;
        let cpu = NonNull::new(paging::direct(phys)).ok_or(Error::NoMemory)?;
        // SAFETY: fresh memory.
        unsafe { cpu.as_ptr().write_bytes(0, len) };
        Ok(DmaBlock { cpu, device: DmaAddr(phys), len })
    }

    unsafe fn dma_free(&self, block: DmaBlock) {
        // SAFETY: by the caller it came from `dma_alloc` and nobody uses it.
        unsafe { frames::free(block.device.0, block.len.div_ceil(PAGE_SIZE)) };
    }

    unsafe fn dma_map(&self, buf: NonNull<[u8]>, _direction: DmaDirection) -> Result<DmaAddr> {
        let start = buf.cast::<u8>().as_ptr().addr();
        let last = start + buf.len().max(1) - 1;
        let first_phys = paging::translate(start).ok_or(Error::Invalid)?;
        let last_phys = paging::translate(last).ok_or(Error::Invalid)?;
        if last_phys.wrapping_sub(first_phys) != (last - start) as u64 {
            return Err(Error::Invalid);
        }
        Ok(DmaAddr(first_phys))
    }

    unsafe fn dma_unmap(&self, _device: DmaAddr, _buf: NonNull<[u8]>, _direction: DmaDirection) {}
}

impl Mmio for Machine {
    fn mmio_devices(&self, found: &mut dyn FnMut(MmioDevice)) {
        boot::cmdline::virtio_mmio_devices(boot::start_info::get().cmdline()).for_each(found);
    }

    fn mmio_map(&self, at: PhysAddr, len: usize) -> Result<MmioRegion> {
        let end = at.0.checked_add(len as u64).ok_or(Error::Invalid)?;
        let range = boot::start_info::Range { start: at.0, end };
        // Where devices write to interrupt CPUs, and where the CPUs' own registers are.
        const LOCAL_APICS: boot::start_info::Range =
            boot::start_info::Range { start: 0xfee0_0000, end: 0xfef0_0000 };
        let ram = boot::start_info::get().ram();
        if ram.iter().any(|ram| ram.overlaps(&range)) || range.overlaps(&LOCAL_APICS) || ioapic::owns(&range)
        {
            return Err(Error::Denied);
        }
        let base = paging::map_device(at.0, len)?;
        // SAFETY: the registers are mapped for good, uncached, and are not memory.
        Ok(unsafe { MmioRegion::new(base, len) })
    }

    #[inline]
    fn mmio_read(&self, region: MmioRegion, offset: usize, width: Width) -> u64 {
        assert!(region.holds(offset, width), "register {offset:#x} is outside the region");
        let at = core::ptr::with_exposed_provenance::<u8>(region.base() + offset);
        // SAFETY: inside the region and aligned, as was just checked.
        unsafe {
            match width {
                Width::U8 => u64::from(at.read_volatile()),
                Width::U16 => u64::from(at.cast::<u16>().read_volatile()),
                Width::U32 => u64::from(at.cast::<u32>().read_volatile()),
                Width::U64 => at.cast::<u64>().read_volatile(),
            }
        }
    }

    #[inline]
    fn mmio_write(&self, region: MmioRegion, offset: usize, width: Width, value: u64) {
        assert!(region.holds(offset, width), "register {offset:#x} is outside the region");
        let at = core::ptr::with_exposed_provenance_mut::<u8>(region.base() + offset);
        // SAFETY: as in `mmio_read`.
        unsafe {
            match width {
                Width::U8 => at.write_volatile(value as u8),
                Width::U16 => at.cast::<u16>().write_volatile(value as u16),
                Width::U32 => at.cast::<u32>().write_volatile(value as u32),
                Width::U64 => at.cast::<u64>().write_volatile(value),
            }
        }
    }
}

impl Pci for Machine {
    fn pci_functions(&self, found: &mut dyn FnMut(PciAddress)) {
        pci::functions(found);
    }
    fn pci_read(&self, function: PciAddress, offset: u16, width: Width) -> Result<u32> {
        pci::read(function, offset, width)
    }
    fn pci_write(&self, function: PciAddress, offset: u16, width: Width, value: u32) -> Result<()> {
        pci::write(function, offset, width, value)
    }
}

impl Irq for Machine {
    fn irq_attach(&self, source: IrqSource, cpu: CpuId, signal: Arc<Signal>) -> Result<IrqId> {
        irq::attach(source, cpu, signal)
    }
    fn irq_unmask(&self, irq: IrqId) {
        irq::unmask(irq);
    }
    fn irq_detach(&self, irq: IrqId) {
        irq::detach(irq);
    }
}
