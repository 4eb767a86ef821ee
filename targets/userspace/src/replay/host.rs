//! [`Replayed`]: the host of a domain that is run again. It answers each call as recorded, whatever target that was on.
#![expect(unsafe_code, reason = "pages and device memory are real")]

use super::engine::Engine;
use hypercall::layers::recorded::{Event, Record, digest, outcome_of};
use hypercall::*;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::panic::AssertUnwindSafe;
use std::ptr::NonNull;
use std::sync::Arc;

/// A host that answers as recorded. See [`hypercall::layers::Recorded`] for what each call writes down.
#[derive(Clone, Copy)]
pub struct Replayed(pub(super) &'static Engine);

impl std::fmt::Debug for Replayed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Replayed")
    }
}

/// What recorded memory is aligned to here: as much as any call may ask for.
const DMA_ALIGN: usize = 65536;

/// Zeroed memory.
fn memory(bytes: usize, align: usize) -> Result<NonNull<u8>> {
    let layout = Layout::from_size_align(bytes.max(1), align).map_err(|_| Error::NoMemory)?;
    // SAFETY: of at least one byte.
    NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(Error::NoMemory)
}

/// # Safety
/// It came from [`memory`] with the same numbers and nobody uses it.
unsafe fn free(base: NonNull<u8>, bytes: usize, align: usize) {
    if let Ok(layout) = Layout::from_size_align(bytes.max(1), align) {
        // SAFETY: the caller's promise.
        unsafe { dealloc(base.as_ptr(), layout) }
    }
}

fn function_number(function: PciAddress) -> u64 {
    u64::from(function.segment) << 16
        | u64::from(function.bus) << 8
        | u64::from(function.device) << 3
        | u64::from(function.function)
}

fn optional(value: Option<u64>) -> u64 {
    value.map_or(0, |value| value.wrapping_add(1))
}

pub(super) fn result(record: &Record, at: usize) -> u64 {
    record.results.get(at).copied().unwrap_or(0)
}

/// The first result as an outcome.
pub(super) fn outcome(record: &Record) -> Result<()> {
    outcome_of(result(record, 0)).unwrap_or(Err(Error::Io))
}

/// Copies the recorded bytes and says how many there were.
pub(super) fn copy(record: &Record, to: &mut [u8]) -> usize {
    let len = record.data.len().min(to.len());
    to[..len].copy_from_slice(&record.data[..len]);
    len
}

pub(super) fn words(record: &Record) -> impl Iterator<Item = u64> {
    record.data.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word))
}

impl Replayed {
    pub(super) fn call(&self, call: Call, arguments: &[u64]) -> Record {
        let blocks = call.blocks();
        self.0.step(Event::Call(call), blocks, arguments)
    }

    /// As [`hypercall::layers::Recorded::outside`]: gives the recorded answer.
    pub(super) fn outside(&self) -> u64 {
        result(&self.0.step(Event::Outside, true, &[]), 0)
    }
}

impl Versions for Replayed {
    fn contracts(&self) -> &'static [ContractVersion] {
        &[
            ContractVersion::CORE,
            ContractVersion::DMA,
            ContractVersion::MMIO,
            ContractVersion::PCI,
            ContractVersion::IRQ,
            ContractVersion::BLOCK,
            ContractVersion::LINK,
            ContractVersion::USB,
        ]
    }
}

impl Clock for Replayed {
    fn monotonic_ns(&self) -> u64 {
        result(&self.call(Call::MonotonicNs, &[]), 0)
    }
    fn realtime_ns(&self) -> u64 {
        result(&self.call(Call::RealtimeNs, &[]), 0)
    }
}

// SAFETY: fresh zeroed memory of that size and alignment.
unsafe impl Memory for Replayed {
    fn alloc_pages(&self, count: usize) -> Result<Pages> {
        outcome(&self.call(Call::AllocPages, &[count as u64]))?;
        let bytes = count.checked_mul(PAGE_SIZE).ok_or(Error::NoMemory)?;
        Ok(Pages { base: memory(bytes, PAGE_SIZE)?, count })
    }
    unsafe fn free_pages(&self, pages: Pages) {
        self.call(Call::FreePages, &[pages.count as u64]);
        // SAFETY: from `alloc_pages`, by the caller.
        unsafe { free(pages.base, pages.count * PAGE_SIZE, PAGE_SIZE) }
    }
    fn memory_bytes(&self) -> u64 {
        result(&self.call(Call::MemoryBytes, &[]), 0)
    }
}

impl Threads for Replayed {
    fn spawn(&self, spec: ThreadSpec<'_>, entry: Box<dyn FnOnce() + Send + 'static>) -> Result<ThreadId> {
        let arguments = [optional(spec.cpu.map(|cpu| cpu.0.into())), digest(spec.name.as_bytes())];
        let record = self.call(Call::Spawn, &arguments);
        outcome(&record)?;
        let (engine, thread) = (self.0, result(&record, 2) as u32);
        engine.announce(thread);
        let body = move || {
            let life = AssertUnwindSafe(|| engine.live(thread, entry));
            if let Err(payload) = std::panic::catch_unwind(life) {
                engine.panicked(super::message(&*payload));
            }
        };
        let name = format!("{thread}:{}", spec.name).replace('\0', "?");
        if let Err(error) = std::thread::Builder::new().name(name).spawn(body) {
            // Others would wait for it.
            engine.panicked(format!("no thread: {error}"));
        }
        Ok(ThreadId(result(&record, 1)))
    }
    fn join(&self, thread: ThreadId) -> Result<()> {
        outcome(&self.call(Call::Join, &[thread.0]))
    }
    fn park(&self, _word: &atomic::AtomicU32, expected: u32, deadline_ns: Option<u64>) -> ParkResult {
        let record = self.call(Call::Park, &[expected.into(), optional(deadline_ns)]);
        let all = [ParkResult::Woken, ParkResult::Changed, ParkResult::TimedOut];
        let found = all.into_iter().find(|one| *one as u64 == result(&record, 0));
        found.unwrap_or(ParkResult::Woken)
    }
    fn unpark(&self, _word: &atomic::AtomicU32, count: u32) -> u32 {
        result(&self.call(Call::Unpark, &[count.into()]), 0) as u32
    }
    fn yield_now(&self) {
        self.call(Call::YieldNow, &[]);
    }
}

impl Cpus for Replayed {
    fn cpu_count(&self) -> u32 {
        result(&self.call(Call::CpuCount, &[]), 0) as u32
    }
    fn current_cpu(&self) -> CpuId {
        CpuId(result(&self.call(Call::CurrentCpu, &[]), 0) as u32)
    }
}

impl Entropy for Replayed {
    fn fill_random(&self, buf: &mut [u8]) -> Result<()> {
        let record = self.call(Call::FillRandom, &[buf.len() as u64]);
        copy(&record, buf);
        outcome(&record)
    }
}

impl Params for Replayed {
    fn param(&self, key: &str, buf: &mut [u8]) -> Result<usize> {
        let record = self.call(Call::Param, &[digest(key.as_bytes()), buf.len() as u64]);
        outcome(&record).map(|()| copy(&record, buf))
    }
}

impl Console for Replayed {
    fn console_write(&self, bytes: &[u8]) {
        self.call(Call::ConsoleWrite, &[bytes.len() as u64, digest(bytes)]);
    }
}

impl Exit for Replayed {
    fn exit(&self, status: ExitStatus) -> ! {
        self.call(Call::Exit, &[status.code().into()]);
        self.0.exit(status.code().into())
    }
}

// SAFETY: fresh zeroed memory of that size and alignment; there is no device.
unsafe impl Dma for Replayed {
    fn dma_alloc(&self, len: usize, align: usize) -> Result<DmaBlock> {
        let record = self.call(Call::DmaAlloc, &[len as u64, align as u64]);
        outcome(&record)?;
        let len =
            usize::try_from(result(&record, 2)).ok().filter(|got| *got >= len).ok_or(Error::NoMemory)?;
        Ok(DmaBlock { cpu: memory(len, DMA_ALIGN)?, device: DmaAddr(result(&record, 1)), len })
    }
    unsafe fn dma_free(&self, block: DmaBlock) {
        self.call(Call::DmaFree, &[block.device.0, block.len as u64]);
        // SAFETY: from `dma_alloc`, by the caller.
        unsafe { free(block.cpu, block.len, DMA_ALIGN) }
    }
    unsafe fn dma_map(&self, buf: NonNull<[u8]>, direction: DmaDirection) -> Result<DmaAddr> {
        let content = match direction {
            // SAFETY: the caller promises a valid buffer.
            DmaDirection::ToDevice => digest(unsafe { buf.as_ref() }),
            DmaDirection::FromDevice => 0,
        };
        let record = self.call(Call::DmaMap, &[buf.len() as u64, direction as u64, content]);
        outcome(&record).map(|()| DmaAddr(result(&record, 1)))
    }
    unsafe fn dma_unmap(&self, device: DmaAddr, mut buf: NonNull<[u8]>, direction: DmaDirection) {
        let record = self.call(Call::DmaUnmap, &[device.0, buf.len() as u64, direction as u64]);
        // SAFETY: the caller lends the buffer.
        copy(&record, unsafe { buf.as_mut() });
    }
    unsafe fn dma_read(&self, block: &DmaBlock, offset: usize, width: Width) -> u64 {
        let arguments = [block.device.0.wrapping_add(offset as u64), width.bytes() as u64];
        result(&self.call(Call::DmaRead, &arguments), 0)
    }
    unsafe fn dma_copy(&self, block: &DmaBlock, offset: usize, to: &mut [u8]) {
        let arguments = [block.device.0.wrapping_add(offset as u64), to.len() as u64];
        copy(&self.call(Call::DmaCopy, &arguments), to);
    }
}

impl Mmio for Replayed {
    fn mmio_devices(&self, found: &mut dyn FnMut(MmioDevice)) {
        let record = self.call(Call::MmioDevices, &[]);
        let words: Vec<u64> = words(&record).collect();
        for [registers, len, line] in words.as_chunks::<3>().0 {
            found(MmioDevice { registers: PhysAddr(*registers), len: *len as usize, line: *line as u32 });
        }
    }
    fn mmio_map(&self, at: PhysAddr, len: usize) -> Result<MmioRegion> {
        let record = self.call(Call::MmioMap, &[at.0, len as u64]);
        outcome(&record)?;
        // SAFETY: nothing is ever read or written there: this host answers from the recording.
        Ok(unsafe { MmioRegion::new(result(&record, 1) as usize, result(&record, 2) as usize) })
    }
    fn mmio_read(&self, region: MmioRegion, offset: usize, width: Width) -> u64 {
        let at = region.base().wrapping_add(offset) as u64;
        result(&self.call(Call::MmioRead, &[at, width.bytes() as u64]), 0)
    }
    fn mmio_write(&self, region: MmioRegion, offset: usize, width: Width, value: u64) {
        let at = region.base().wrapping_add(offset) as u64;
        self.call(Call::MmioWrite, &[at, width.bytes() as u64, value]);
    }
}

impl Pci for Replayed {
    fn pci_functions(&self, found: &mut dyn FnMut(PciAddress)) {
        let record = self.call(Call::PciFunctions, &[]);
        for number in words(&record) {
            found(PciAddress {
                segment: (number >> 16) as u16,
                bus: (number >> 8) as u8,
                device: (number >> 3) as u8 & 31,
                function: number as u8 & 7,
            });
        }
    }
    fn pci_read(&self, function: PciAddress, offset: u16, width: Width) -> Result<u32> {
        let arguments = [function_number(function), offset.into(), width.bytes() as u64];
        let record = self.call(Call::PciRead, &arguments);
        outcome(&record).map(|()| result(&record, 1) as u32)
    }
    fn pci_write(&self, function: PciAddress, offset: u16, width: Width, value: u32) -> Result<()> {
        let arguments = [function_number(function), offset.into(), width.bytes() as u64, value.into()];
        outcome(&self.call(Call::PciWrite, &arguments))
    }
}

impl Irq for Replayed {
    fn irq_attach(&self, source: IrqSource, cpu: CpuId, signal: Arc<Signal>) -> Result<IrqId> {
        let (kind, place) = match source {
            IrqSource::Line(line) => (u64::MAX, line.into()),
            IrqSource::Msix { function, entry } => (function_number(function), entry.into()),
        };
        let record = self.call(Call::IrqAttach, &[kind, place, cpu.0.into()]);
        outcome(&record)?;
        self.0.add_signal(result(&record, 2), signal);
        Ok(IrqId(result(&record, 1) as u32))
    }
    fn irq_unmask(&self, irq: IrqId) {
        self.call(Call::IrqUnmask, &[irq.0.into()]);
    }
    fn irq_detach(&self, irq: IrqId) {
        self.call(Call::IrqDetach, &[irq.0.into()]);
    }
}

impl HostBlock for Replayed {
    fn disk_count(&self) -> u32 {
        result(&self.call(Call::DiskCount, &[]), 0) as u32
    }
    fn disk_info(&self, disk: u32) -> Result<DiskInfo> {
        let record = self.call(Call::DiskInfo, &[disk.into()]);
        outcome(&record).map(|()| DiskInfo {
            sector_size: result(&record, 1) as u32,
            sectors: result(&record, 2),
            read_only: result(&record, 3) != 0,
        })
    }
    fn disk_read(&self, disk: u32, sector: u64, buf: &mut [u8]) -> Result<()> {
        let record = self.call(Call::DiskRead, &[disk.into(), sector, buf.len() as u64]);
        copy(&record, buf);
        outcome(&record)
    }
    fn disk_write(&self, disk: u32, sector: u64, buf: &[u8]) -> Result<()> {
        outcome(&self.call(Call::DiskWrite, &[disk.into(), sector, buf.len() as u64, digest(buf)]))
    }
    fn disk_flush(&self, disk: u32) -> Result<()> {
        outcome(&self.call(Call::DiskFlush, &[disk.into()]))
    }
}

impl HostLink for Replayed {
    fn link_count(&self) -> u32 {
        result(&self.call(Call::LinkCount, &[]), 0) as u32
    }
    fn link_open(&self, link: u32, signal: Arc<Signal>) -> Result<LinkInfo> {
        let record = self.call(Call::LinkOpen, &[link.into()]);
        outcome(&record)?;
        self.0.add_signal(result(&record, 3), signal);
        let [a, b, c, d, e, f, ..] = result(&record, 1).to_le_bytes();
        Ok(LinkInfo { mac: [a, b, c, d, e, f], mtu: result(&record, 2) as u16 })
    }
    fn link_send(&self, link: u32, frame: &[u8]) -> Result<()> {
        outcome(&self.call(Call::LinkSend, &[link.into(), frame.len() as u64, digest(frame)]))
    }
    fn link_receive(&self, link: u32, buf: &mut [u8]) -> Result<usize> {
        let record = self.call(Call::LinkReceive, &[link.into(), buf.len() as u64]);
        outcome(&record).map(|()| copy(&record, buf))
    }
    fn link_close(&self, link: u32) {
        self.call(Call::LinkClose, &[link.into()]);
    }
}
