//! [`Recorded`], call by call. What is written down of each is what the replayer must know to give the same answer, and what
//! it needs to see that it is asked the same. Numbers that stand for addresses in memory are left out.

use super::record::outcome;
use super::{Event, Recorder, Use, digest};
use crate::*;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ptr::NonNull;

/// A host that writes down what its domain is told. See the module.
#[derive(Clone, Copy)]
pub struct Recorded<H> {
    host: H,
    recorder: &'static Recorder,
}

impl<H: core::fmt::Debug> core::fmt::Debug for Recorded<H> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Recorded({:?})", self.host)
    }
}

/// Takes the baton back, also when the call did not return.
struct Back<'a, H: Threads>(&'a Recorded<H>, u32);

impl<H: Threads> Drop for Back<'_, H> {
    fn drop(&mut self) {
        self.0.recorder.acquire(&self.0.host, self.1);
    }
}

/// Ends the life of a thread, also when it did not return.
struct Life<H: Threads + Clock>(Recorded<H>, Event);

impl<H: Threads + Clock> Drop for Life<H> {
    fn drop(&mut self) {
        self.0.recorder.write(&self.0.host, self.1, &[], &[], &[]);
        self.0.recorder.release(&self.0.host);
    }
}

impl<H: Threads + Clock> Recorded<H> {
    /// A layer around `host`. The calling thread becomes the domain's first and has the baton.
    pub fn new(host: H, recorder: &'static Recorder) -> Self {
        recorder.acquire(&host, 0);
        Self { host, recorder }
    }

    /// Where it writes.
    pub fn recorder(&self) -> &'static Recorder {
        self.recorder
    }

    pub(super) fn host(&self) -> &H {
        &self.host
    }

    pub(super) fn note(&self, call: Call, arguments: &[u64], results: &[u64], data: &[u8]) {
        self.recorder.write(&self.host, Event::Call(call), arguments, results, data);
    }

    /// A thread that calls this again and again may wait for another, or for the host.
    fn share(&self) {
        let Some(wanted) = self.recorder.slice_over() else { return };
        if wanted {
            self.recorder.write(&self.host, Event::Preempt, &[], &[], &[]);
            let back = Back(self, self.recorder.held(|held| held.thread));
            self.recorder.release(&self.host);
            drop(back);
        }
        self.recorder.pass_signals(&self.host);
    }

    /// Runs `body` without the baton.
    pub(super) fn blocking<T>(&self, body: impl FnOnce(&H) -> T) -> T {
        let back = Back(self, self.recorder.held(|held| held.thread));
        self.recorder.release(&self.host);
        let result = body(&self.host);
        drop(back);
        self.recorder.pass_signals(&self.host);
        result
    }

    /// Waits for something that is not the domain's, on a thread of the domain: `body` makes no call through this layer.
    /// A replay does not run it, but gives the same answer.
    pub fn outside(&self, body: impl FnOnce(&H) -> u64) -> u64 {
        let answer = self.blocking(body);
        self.recorder.write(&self.host, Event::Outside, &[], &[answer], &[]);
        answer
    }

    /// Runs `body`, which may call through this layer, on a thread that is none of the domain's. `why` tells a replay
    /// what to run there.
    pub fn enter(&self, why: u64, body: impl FnOnce())
    where
        H: Copy,
    {
        let thread = self.recorder.new_thread();
        self.recorder.acquire(&self.host, thread);
        self.recorder.write(&self.host, Event::Enter, &[why], &[], &[]);
        let life = Life(*self, Event::Leave);
        body();
        drop(life);
    }

    /// The first thread leaves the domain for good: what is left of it may go on.
    pub fn leave(&self)
    where
        H: Copy,
    {
        drop(Life(*self, Event::End));
    }
}

/// Words as bytes.
pub(super) fn list(words: impl Iterator<Item = u64>) -> Vec<u8> {
    words.flat_map(u64::to_le_bytes).collect()
}

fn function_number(function: PciAddress) -> u64 {
    u64::from(function.segment) << 16
        | u64::from(function.bus) << 8
        | u64::from(function.device) << 3
        | u64::from(function.function)
}

/// 0 stands for none.
fn optional(value: Option<u64>) -> u64 {
    value.map_or(0, |value| value.wrapping_add(1))
}

impl<H: Versions> Versions for Recorded<H> {
    fn contracts(&self) -> &'static [ContractVersion] {
        self.host.contracts()
    }
}

impl<H: Threads + Clock> Clock for Recorded<H> {
    fn monotonic_ns(&self) -> u64 {
        self.share();
        let now = self.host.monotonic_ns();
        self.note(Call::MonotonicNs, &[], &[now], &[]);
        now
    }
    fn realtime_ns(&self) -> u64 {
        self.share();
        let now = self.host.realtime_ns();
        self.note(Call::RealtimeNs, &[], &[now], &[]);
        now
    }
}

#[expect(unsafe_code, reason = "forwards")]
// SAFETY: the pages are the inner host's.
unsafe impl<H: Memory + Threads + Clock> Memory for Recorded<H> {
    fn alloc_pages(&self, count: usize) -> Result<Pages> {
        let result = self.host.alloc_pages(count);
        self.note(Call::AllocPages, &[count as u64], &[outcome(&result)], &[]);
        result
    }
    unsafe fn free_pages(&self, pages: Pages) {
        self.note(Call::FreePages, &[pages.count as u64], &[], &[]);
        // SAFETY: the caller's promise.
        unsafe { self.host.free_pages(pages) }
    }
    fn memory_bytes(&self) -> u64 {
        let bytes = self.host.memory_bytes();
        self.note(Call::MemoryBytes, &[], &[bytes], &[]);
        bytes
    }
}

impl<H: Threads + Clock + Copy + Send + 'static> Threads for Recorded<H> {
    fn spawn(&self, spec: ThreadSpec<'_>, entry: Box<dyn FnOnce() + Send + 'static>) -> Result<ThreadId> {
        let (me, thread) = (*self, self.recorder.new_thread());
        let body = move || {
            me.recorder.acquire(&me.host, thread);
            me.recorder.pass_signals(&me.host);
            me.recorder.write(&me.host, Event::Begin, &[], &[], &[]);
            let life = Life(me, Event::End);
            entry();
            drop(life);
        };
        let result = self.host.spawn(spec, Box::new(body));
        let id = result.as_ref().map_or(0, |id| id.0);
        let arguments = [optional(spec.cpu.map(|cpu| cpu.0.into())), digest(spec.name.as_bytes())];
        self.note(Call::Spawn, &arguments, &[outcome(&result), id, thread.into()], &[]);
        result
    }
    fn join(&self, thread: ThreadId) -> Result<()> {
        let result = self.blocking(|host| host.join(thread));
        self.note(Call::Join, &[thread.0], &[outcome(&result)], &[]);
        result
    }
    fn park(&self, word: &atomic::AtomicU32, expected: u32, deadline_ns: Option<u64>) -> ParkResult {
        let result = if word.load(atomic::Ordering::Acquire) != expected {
            self.blocking(|_| ParkResult::Changed)
        } else if let Some((shadow, seen)) = self.recorder.source_of(word) {
            match self.blocking(|host| host.park(shadow.word(), seen, deadline_ns)) {
                // Of the shadow, which the component does not know.
                ParkResult::Changed => ParkResult::Woken,
                other => other,
            }
        } else {
            self.blocking(|host| host.park(word, expected, deadline_ns))
        };
        self.note(Call::Park, &[expected.into(), optional(deadline_ns)], &[result as u64], &[]);
        result
    }
    fn unpark(&self, word: &atomic::AtomicU32, count: u32) -> u32 {
        let woken = match self.recorder.raised_inside(word) {
            Some(shadow) => self.host.unpark(shadow.word(), count),
            None => self.host.unpark(word, count),
        };
        self.note(Call::Unpark, &[count.into()], &[woken.into()], &[]);
        woken
    }
    fn yield_now(&self) {
        self.blocking(|host| host.yield_now());
        self.note(Call::YieldNow, &[], &[], &[]);
    }
}

impl<H: Cpus + Threads + Clock> Cpus for Recorded<H> {
    fn cpu_count(&self) -> u32 {
        let count = self.host.cpu_count();
        self.note(Call::CpuCount, &[], &[count.into()], &[]);
        count
    }
    fn current_cpu(&self) -> CpuId {
        self.share();
        let cpu = self.host.current_cpu();
        self.note(Call::CurrentCpu, &[], &[cpu.0.into()], &[]);
        cpu
    }
}

impl<H: Entropy + Threads + Clock> Entropy for Recorded<H> {
    fn fill_random(&self, buf: &mut [u8]) -> Result<()> {
        let result = self.host.fill_random(buf);
        self.note(Call::FillRandom, &[buf.len() as u64], &[outcome(&result)], buf);
        result
    }
}

impl<H: Params + Threads + Clock> Params for Recorded<H> {
    fn param(&self, key: &str, buf: &mut [u8]) -> Result<usize> {
        let result = self.host.param(key, buf);
        let len = *result.as_ref().unwrap_or(&0);
        let arguments = [digest(key.as_bytes()), buf.len() as u64];
        self.note(Call::Param, &arguments, &[outcome(&result)], buf.get(..len).unwrap_or_default());
        result
    }
}

impl<H: Console + Threads + Clock> Console for Recorded<H> {
    fn console_write(&self, bytes: &[u8]) {
        self.note(Call::ConsoleWrite, &[bytes.len() as u64, digest(bytes)], &[], &[]);
        self.host.console_write(bytes);
    }
}

impl<H: Exit + Threads + Clock> Exit for Recorded<H> {
    fn exit(&self, status: ExitStatus) -> ! {
        self.note(Call::Exit, &[status.code().into()], &[], &[]);
        self.host.exit(status)
    }
}

#[expect(unsafe_code, reason = "forwards")]
// SAFETY: blocks and mappings are the inner host's.
unsafe impl<H: Dma + Threads + Clock> Dma for Recorded<H> {
    fn dma_alloc(&self, len: usize, align: usize) -> Result<DmaBlock> {
        let result = self.host.dma_alloc(len, align);
        let (device, got) = result.as_ref().map_or((0, 0), |block| (block.device.0, block.len as u64));
        self.note(Call::DmaAlloc, &[len as u64, align as u64], &[outcome(&result), device, got], &[]);
        result
    }
    unsafe fn dma_free(&self, block: DmaBlock) {
        self.note(Call::DmaFree, &[block.device.0, block.len as u64], &[], &[]);
        // SAFETY: the caller's promise.
        unsafe { self.host.dma_free(block) }
    }
    unsafe fn dma_map(&self, buf: NonNull<[u8]>, direction: DmaDirection) -> Result<DmaAddr> {
        let content = match direction {
            // SAFETY: the caller promises a valid buffer, whose content is to go to the device.
            DmaDirection::ToDevice => digest(unsafe { buf.as_ref() }),
            DmaDirection::FromDevice => 0,
        };
        // SAFETY: the caller's promise.
        let result = unsafe { self.host.dma_map(buf, direction) };
        let device = result.as_ref().map_or(0, |device| device.0);
        let arguments = [buf.len() as u64, direction as u64, content];
        self.note(Call::DmaMap, &arguments, &[outcome(&result), device], &[]);
        result
    }
    unsafe fn dma_unmap(&self, device: DmaAddr, buf: NonNull<[u8]>, direction: DmaDirection) {
        // SAFETY: the caller's promise.
        unsafe { self.host.dma_unmap(device, buf, direction) };
        let content: &[u8] = match direction {
            DmaDirection::ToDevice => &[],
            // SAFETY: the transfer is over, so the buffer is the caller's again, who lends it.
            DmaDirection::FromDevice => unsafe { buf.as_ref() },
        };
        self.note(Call::DmaUnmap, &[device.0, buf.len() as u64, direction as u64], &[], content);
    }
    unsafe fn dma_read(&self, block: &DmaBlock, offset: usize, width: Width) -> u64 {
        self.share();
        // SAFETY: the caller's promise.
        let value = unsafe { self.host.dma_read(block, offset, width) };
        let arguments = [block.device.0.wrapping_add(offset as u64), width.bytes() as u64];
        self.note(Call::DmaRead, &arguments, &[value], &[]);
        value
    }
    unsafe fn dma_copy(&self, block: &DmaBlock, offset: usize, to: &mut [u8]) {
        // SAFETY: the caller's promise.
        unsafe { self.host.dma_copy(block, offset, to) };
        let arguments = [block.device.0.wrapping_add(offset as u64), to.len() as u64];
        self.note(Call::DmaCopy, &arguments, &[], to);
    }
}

impl<H: Mmio + Threads + Clock> Mmio for Recorded<H> {
    fn mmio_devices(&self, found: &mut dyn FnMut(MmioDevice)) {
        let mut devices = Vec::new();
        self.host.mmio_devices(&mut |device| devices.push(device));
        let words =
            devices.iter().flat_map(|device| [device.registers.0, device.len as u64, device.line.into()]);
        self.note(Call::MmioDevices, &[], &[], &list(words));
        devices.into_iter().for_each(found);
    }
    fn mmio_map(&self, at: PhysAddr, len: usize) -> Result<MmioRegion> {
        let result = self.host.mmio_map(at, len);
        let (base, got) =
            result.as_ref().map_or((0, 0), |region| (region.base() as u64, region.len() as u64));
        self.note(Call::MmioMap, &[at.0, len as u64], &[outcome(&result), base, got], &[]);
        result
    }
    fn mmio_read(&self, region: MmioRegion, offset: usize, width: Width) -> u64 {
        self.share();
        let value = self.host.mmio_read(region, offset, width);
        let arguments = [(region.base() + offset) as u64, width.bytes() as u64];
        self.note(Call::MmioRead, &arguments, &[value], &[]);
        value
    }
    fn mmio_write(&self, region: MmioRegion, offset: usize, width: Width, value: u64) {
        let arguments = [(region.base() + offset) as u64, width.bytes() as u64, value];
        self.note(Call::MmioWrite, &arguments, &[], &[]);
        self.host.mmio_write(region, offset, width, value);
    }
}

impl<H: Pci + Threads + Clock> Pci for Recorded<H> {
    fn pci_functions(&self, found: &mut dyn FnMut(PciAddress)) {
        let mut functions = Vec::new();
        self.host.pci_functions(&mut |function| functions.push(function));
        self.note(Call::PciFunctions, &[], &[], &list(functions.iter().map(|one| function_number(*one))));
        functions.into_iter().for_each(found);
    }
    fn pci_read(&self, function: PciAddress, offset: u16, width: Width) -> Result<u32> {
        let result = self.host.pci_read(function, offset, width);
        let arguments = [function_number(function), offset.into(), width.bytes() as u64];
        let value = *result.as_ref().unwrap_or(&0);
        self.note(Call::PciRead, &arguments, &[outcome(&result), value.into()], &[]);
        result
    }
    fn pci_write(&self, function: PciAddress, offset: u16, width: Width, value: u32) -> Result<()> {
        let result = self.host.pci_write(function, offset, width, value);
        let arguments = [function_number(function), offset.into(), width.bytes() as u64, value.into()];
        self.note(Call::PciWrite, &arguments, &[outcome(&result)], &[]);
        result
    }
}

impl<H: Irq + Threads + Clock> Irq for Recorded<H> {
    fn irq_attach(&self, source: IrqSource, cpu: CpuId, signal: Arc<Signal>) -> Result<IrqId> {
        let (shadow, number) = self.recorder.add_source(signal);
        let result = self.host.irq_attach(source, cpu, shadow);
        let id = result.as_ref().map_or(0, |id| id.0);
        self.recorder.begin_use(&self.host, number, result.is_ok().then_some(Use::Irq(id)));
        let (kind, place) = match source {
            IrqSource::Line(line) => (u64::MAX, line.into()),
            IrqSource::Msix { function, entry } => (function_number(function), entry.into()),
        };
        let results = [outcome(&result), id.into(), number];
        self.note(Call::IrqAttach, &[kind, place, cpu.0.into()], &results, &[]);
        result
    }
    fn irq_unmask(&self, irq: IrqId) {
        self.note(Call::IrqUnmask, &[irq.0.into()], &[], &[]);
        self.host.irq_unmask(irq);
    }
    fn irq_detach(&self, irq: IrqId) {
        self.note(Call::IrqDetach, &[irq.0.into()], &[], &[]);
        self.host.irq_detach(irq);
        self.recorder.end_use(&self.host, Use::Irq(irq.0));
    }
}

impl<H: HostBlock + Threads + Clock> HostBlock for Recorded<H> {
    fn disk_count(&self) -> u32 {
        let count = self.host.disk_count();
        self.note(Call::DiskCount, &[], &[count.into()], &[]);
        count
    }
    fn disk_info(&self, disk: u32) -> Result<DiskInfo> {
        let result = self.host.disk_info(disk);
        let info = result
            .as_ref()
            .map_or([0; 3], |info| [info.sector_size.into(), info.sectors, info.read_only.into()]);
        self.note(Call::DiskInfo, &[disk.into()], &[outcome(&result), info[0], info[1], info[2]], &[]);
        result
    }
    fn disk_read(&self, disk: u32, sector: u64, buf: &mut [u8]) -> Result<()> {
        let result = self.blocking(|host| host.disk_read(disk, sector, buf));
        let data = if result.is_ok() { &*buf } else { &[] };
        self.note(Call::DiskRead, &[disk.into(), sector, buf.len() as u64], &[outcome(&result)], data);
        result
    }
    fn disk_write(&self, disk: u32, sector: u64, buf: &[u8]) -> Result<()> {
        let result = self.blocking(|host| host.disk_write(disk, sector, buf));
        let arguments = [disk.into(), sector, buf.len() as u64, digest(buf)];
        self.note(Call::DiskWrite, &arguments, &[outcome(&result)], &[]);
        result
    }
    fn disk_flush(&self, disk: u32) -> Result<()> {
        let result = self.blocking(|host| host.disk_flush(disk));
        self.note(Call::DiskFlush, &[disk.into()], &[outcome(&result)], &[]);
        result
    }
}

impl<H: HostLink + Threads + Clock> HostLink for Recorded<H> {
    fn link_count(&self) -> u32 {
        let count = self.host.link_count();
        self.note(Call::LinkCount, &[], &[count.into()], &[]);
        count
    }
    fn link_open(&self, link: u32, signal: Arc<Signal>) -> Result<LinkInfo> {
        let (shadow, number) = self.recorder.add_source(signal);
        let result = self.host.link_open(link, shadow);
        self.recorder.begin_use(&self.host, number, result.is_ok().then_some(Use::Link(link)));
        let mut mac = [0; 8];
        let info = result.as_ref().map_or([0; 2], |info| {
            mac[..6].copy_from_slice(&info.mac);
            [u64::from_le_bytes(mac), info.mtu.into()]
        });
        self.note(Call::LinkOpen, &[link.into()], &[outcome(&result), info[0], info[1], number], &[]);
        result
    }
    fn link_send(&self, link: u32, frame: &[u8]) -> Result<()> {
        let result = self.host.link_send(link, frame);
        let arguments = [link.into(), frame.len() as u64, digest(frame)];
        self.note(Call::LinkSend, &arguments, &[outcome(&result)], &[]);
        result
    }
    fn link_receive(&self, link: u32, buf: &mut [u8]) -> Result<usize> {
        let result = self.host.link_receive(link, buf);
        let data = result.as_ref().ok().and_then(|len| buf.get(..*len)).unwrap_or_default();
        self.note(Call::LinkReceive, &[link.into(), buf.len() as u64], &[outcome(&result)], data);
        result
    }
    fn link_close(&self, link: u32) {
        self.note(Call::LinkClose, &[link.into()], &[], &[]);
        self.host.link_close(link);
        self.recorder.end_use(&self.host, Use::Link(link));
    }
}
