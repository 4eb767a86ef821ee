//! The suite is judged here: the right host passes every check, and each deliberately wrong one fails exactly the
//! check meant for its fault.
#![expect(unsafe_code, reason = "forwards and breaks memory contracts")]

use super::*;
use crate::atomic::{AtomicU32, Ordering::SeqCst};
use crate::testing::{TestHost, UsbLoopback};
use crate::*;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use core::ptr::NonNull;
use core::sync::atomic::AtomicU64;
use core::time::Duration;

/// What is wrong with a host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    None,
    TimeGoesBack,
    TimeSkewsBetweenCpus,
    ClockTicksAt100Hz,
    WallTimeStandsStill,
    CpuOutOfRange,
    CpuBindingIgnored,
    UnknownCpuAccepted,
    ZeroPagesGranted,
    PagesMisaligned,
    PagesNotZeroed,
    PagesShared,
    JoinReturnsEarly,
    JoinTwice,
    CompareThenSleep,
    ExpectedIgnored,
    DeadlineIgnored,
    DeadlineEarly,
    ParkSpins,
    UnparkLost,
    UnparkWakesAll,
    UnparkWakesOne,
    UnparkCountsNone,
    UnparkWakesStrangers,
    RandomConstant,
    RandomShort,
    ParamTruncates,
    ParamWritesBeforeRefusing,
    UnknownParamEmpty,
    ConsoleTears,
    ConsoleCuts,
    NoVersion,
    DmaMisaligned,
    DmaNotZeroed,
    DmaShared,
    DmaMapOverlaps,
    DmaMapClobbers,
    IrqTwice,
    IrqNever,
    IrqAfterDetach,
    IrqStaysMasked,
    ShortRead,
    WriteBesideTheSpot,
    FlushLosesWrites,
    WritesReadOnly,
    PartialSectorAccepted,
    FrameCut,
    FramesSwapped,
    LinkSignalNever,
    LinkOpensTwice,
    UsbListsTwice,
    UsbBusZero,
    UsbStrangersOpened,
    UsbDescriptorsCut,
    UsbOpensTwice,
    UsbControlZeroes,
    UsbShortAsFull,
    UsbStallAsDone,
    UsbCompletesTwice,
    UsbLoses,
    UsbSignalNever,
    UsbKeepsRefused,
    UsbClaimsAnything,
    UsbCancelSilent,
    UsbReleaseForgets,
    UsbHaltStays,
    UsbKeepsSignal,
    UsbResetKills,
    UsbWatchForever,
}

/// What a wrong host remembers.
struct Memo {
    calls: AtomicU64,
    word: AtomicU32,
    pages: std::sync::Mutex<Vec<(usize, usize)>>,
    frame: std::sync::Mutex<Option<Vec<u8>>>,
    writes: std::sync::Mutex<Vec<(u64, Vec<u8>)>>,
    irqs: std::sync::Mutex<Vec<Arc<Signal>>>,
    threads: std::sync::Mutex<Vec<ThreadId>>,
    completion: std::sync::Mutex<Option<UsbCompletion>>,
}

#[derive(Clone, Copy)]
struct Wrong {
    host: TestHost,
    fault: Fault,
    memo: &'static Memo,
}

impl Wrong {
    fn new(fault: Fault) -> Self {
        let host = TestHost::new();
        host.set_config(r#"{"hostname":"conformance"}"#);
        let memo = Memo {
            calls: AtomicU64::new(0),
            word: AtomicU32::new(0),
            pages: Default::default(),
            frame: Default::default(),
            writes: Default::default(),
            irqs: Default::default(),
            threads: Default::default(),
            completion: Default::default(),
        };
        Self { host, fault, memo: Box::leak(Box::new(memo)) }
    }

    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    /// `true` once in so many calls.
    fn once_in(&self, n: u64) -> bool {
        self.memo.calls.fetch_add(1, SeqCst) % n == n - 1
    }
}

impl Versions for Wrong {
    fn contracts(&self) -> &'static [ContractVersion] {
        if self.is(Fault::NoVersion) { &[] } else { self.host.contracts() }
    }
}

impl Clock for Wrong {
    fn monotonic_ns(&self) -> u64 {
        let now = self.host.monotonic_ns();
        match self.fault {
            Fault::TimeGoesBack if self.once_in(1000) => now.saturating_sub(1_000_000),
            // CPU 0, on which the test's own thread counts too, is behind.
            Fault::TimeSkewsBetweenCpus => now + 2_000_000 * u64::from(self.host.current_cpu().0),
            Fault::ClockTicksAt100Hz => now / 10_000_000 * 10_000_000,
            _ => now,
        }
    }
    fn realtime_ns(&self) -> u64 {
        if self.is(Fault::WallTimeStandsStill) { 1_700_000_000_000_000_000 } else { self.host.realtime_ns() }
    }
}

// SAFETY: not kept: the wrong hosts hand out pages that break the contract, to a suite that expects as much. Memory
// stays valid in every case.
unsafe impl Memory for Wrong {
    fn alloc_pages(&self, count: usize) -> Result<Pages> {
        match self.fault {
            Fault::ZeroPagesGranted if count == 0 => {
                self.host.alloc_pages(1).map(|pages| Pages { count: 0, ..pages })
            }
            Fault::PagesMisaligned if (1..1 << 20).contains(&count) => {
                let pages = self.host.alloc_pages(count + 1)?;
                // SAFETY: inside of what was allocated.
                Ok(Pages { base: unsafe { pages.base.add(64) }, count })
            }
            Fault::PagesNotZeroed | Fault::PagesShared if (1..1 << 20).contains(&count) => {
                let mut kept = self.memo.pages.lock().unwrap();
                let known = match self.fault {
                    // The next allocation of a size gets the memory of the last one, in use or not.
                    Fault::PagesShared => kept.iter().find(|one| one.0 == count).map(|one| one.1),
                    _ => kept.iter().position(|one| one.0 == count).map(|index| kept.swap_remove(index).1),
                };
                if let Some(base) = known.and_then(|base| NonNull::new(base as *mut u8)) {
                    if self.is(Fault::PagesShared) {
                        // SAFETY: memory that is never freed.
                        unsafe { base.write_bytes(0, count * PAGE_SIZE) };
                    }
                    return Ok(Pages { base, count });
                }
                let pages = self.host.alloc_pages(count)?;
                if self.is(Fault::PagesShared) {
                    kept.push((count, pages.base.as_ptr() as usize));
                }
                Ok(pages)
            }
            _ => self.host.alloc_pages(count),
        }
    }
    unsafe fn free_pages(&self, pages: Pages) {
        match self.fault {
            Fault::PagesNotZeroed => {
                self.memo.pages.lock().unwrap().push((pages.count, pages.base.as_ptr() as usize));
            }
            // Leaked: they are shared, or not where the allocator gave them out.
            Fault::PagesShared | Fault::PagesMisaligned | Fault::ZeroPagesGranted => {}
            // SAFETY: the caller's promise.
            _ => unsafe { self.host.free_pages(pages) },
        }
    }
    fn memory_bytes(&self) -> u64 {
        self.host.memory_bytes()
    }
}

impl Threads for Wrong {
    fn spawn(&self, spec: ThreadSpec<'_>, entry: Box<dyn FnOnce() + Send + 'static>) -> Result<ThreadId> {
        let spec = match self.fault {
            Fault::UnknownCpuAccepted if spec.cpu.is_some_and(|cpu| cpu.0 >= self.cpu_count()) => {
                ThreadSpec { cpu: None, ..spec }
            }
            Fault::CpuBindingIgnored if spec.cpu == Some(CpuId(1)) => {
                ThreadSpec { cpu: Some(CpuId(0)), ..spec }
            }
            _ => spec,
        };
        let thread = self.host.spawn(spec, entry)?;
        self.memo.threads.lock().unwrap().push(thread);
        Ok(thread)
    }
    fn join(&self, thread: ThreadId) -> Result<()> {
        match self.fault {
            Fault::JoinReturnsEarly if !TestHost::is_current(thread) => {
                let mut started = self.memo.threads.lock().unwrap();
                let index = started.iter().position(|one| *one == thread).ok_or(Error::NotFound)?;
                started.swap_remove(index);
                let host = self.host;
                std::thread::spawn(move || host.join(thread));
                Ok(())
            }
            Fault::JoinTwice => match self.host.join(thread) {
                Err(Error::NotFound) if self.memo.word.swap(thread.0 as u32, SeqCst) == thread.0 as u32 => {
                    Ok(())
                }
                Ok(()) => {
                    self.memo.word.store(thread.0 as u32, SeqCst);
                    Ok(())
                }
                other => other,
            },
            _ => self.host.join(thread),
        }
    }
    fn park(&self, word: &AtomicU32, expected: u32, deadline_ns: Option<u64>) -> ParkResult {
        match self.fault {
            // Looks, and sleeps in a second step: what happens in between is lost.
            Fault::CompareThenSleep => {
                if word.load(SeqCst) != expected {
                    return ParkResult::Changed;
                }
                std::thread::sleep(Duration::from_micros(50));
                self.host.park(word, word.load(SeqCst), deadline_ns)
            }
            Fault::ExpectedIgnored => self.host.park(word, word.load(SeqCst), deadline_ns),
            Fault::DeadlineIgnored => self.host.park(word, expected, None),
            Fault::DeadlineEarly => {
                self.host.park(word, expected, deadline_ns.map(|deadline| deadline.saturating_sub(500_000)))
            }
            Fault::ParkSpins => {
                if word.load(SeqCst) != expected {
                    return ParkResult::Changed;
                }
                let late = deadline_ns.is_some_and(|deadline| self.monotonic_ns() >= deadline);
                if late { ParkResult::TimedOut } else { ParkResult::Woken }
            }
            _ => self.host.park(word, expected, deadline_ns),
        }
    }
    fn unpark(&self, word: &AtomicU32, count: u32) -> u32 {
        match self.fault {
            Fault::UnparkLost if self.once_in(500) => 0,
            Fault::UnparkWakesAll if count > 0 => self.host.unpark(word, u32::MAX).min(count),
            Fault::UnparkWakesOne => self.host.unpark(word, count.min(1)),
            Fault::UnparkCountsNone => {
                self.host.unpark(word, count);
                0
            }
            Fault::UnparkWakesStrangers => {
                self.host.wake_everybody();
                self.host.unpark(word, count)
            }
            _ => self.host.unpark(word, count),
        }
    }
    fn yield_now(&self) {
        self.host.yield_now();
    }
}

impl Cpus for Wrong {
    fn cpu_count(&self) -> u32 {
        self.host.cpu_count()
    }
    fn current_cpu(&self) -> CpuId {
        match self.fault {
            // Numbers from 1.
            Fault::CpuOutOfRange => CpuId(self.host.current_cpu().0 + 2),
            _ => self.host.current_cpu(),
        }
    }
}

impl Entropy for Wrong {
    fn fill_random(&self, buf: &mut [u8]) -> Result<()> {
        match self.fault {
            Fault::RandomConstant => {
                buf.iter_mut().enumerate().for_each(|(index, byte)| *byte = index as u8 | 1)
            }
            Fault::RandomShort => {
                let whole = buf.len() / 8 * 8;
                return self.host.fill_random(&mut buf[..whole]);
            }
            _ => return self.host.fill_random(buf),
        }
        Ok(())
    }
}

impl Params for Wrong {
    fn param(&self, key: &str, buf: &mut [u8]) -> Result<usize> {
        match self.fault {
            Fault::UnknownParamEmpty => match self.host.param(key, buf) {
                Err(Error::NotFound) => Ok(0),
                other => other,
            },
            // Only in buffers that are nearly large enough, so that larger ones still see the whole.
            Fault::ParamTruncates | Fault::ParamWritesBeforeRefusing => match self.host.param(key, buf) {
                Err(Error::BufferTooSmall) => {
                    let mut whole = [0; 256];
                    let len = self.host.param(key, &mut whole)?;
                    buf.copy_from_slice(&whole[..buf.len()]);
                    if self.is(Fault::ParamTruncates) && buf.len() + 1 == len {
                        Ok(buf.len())
                    } else {
                        Err(Error::BufferTooSmall)
                    }
                }
                other => other,
            },
            _ => self.host.param(key, buf),
        }
    }
}

impl Console for Wrong {
    fn console_write(&self, bytes: &[u8]) {
        match self.fault {
            Fault::ConsoleTears => bytes.chunks(7).for_each(|part| {
                self.host.console_write(part);
                std::thread::sleep(Duration::from_micros(100));
            }),
            Fault::ConsoleCuts => self.host.console_write(&bytes[..bytes.len().min(256)]),
            _ => self.host.console_write(bytes),
        }
    }
}

impl Exit for Wrong {
    fn exit(&self, status: ExitStatus) -> ! {
        self.host.exit(status)
    }
}

// SAFETY: not kept, as with `Memory` above; memory stays valid in every case.
unsafe impl Dma for Wrong {
    fn dma_alloc(&self, len: usize, align: usize) -> Result<DmaBlock> {
        match self.fault {
            // As an allocator that only knows cache lines.
            Fault::DmaMisaligned if align > 64 && len < 1 << 20 => {
                let block = self.host.dma_alloc(len + align, align)?;
                // SAFETY: inside of what was allocated.
                Ok(DmaBlock { cpu: unsafe { block.cpu.add(64) }, device: DmaAddr(block.device.0 + 64), len })
            }
            Fault::DmaNotZeroed => {
                let block = self.host.dma_alloc(len, align)?;
                if self.once_in(3) {
                    // SAFETY: the block's own last byte.
                    unsafe { block.cpu.add(len - 1).write(1) };
                }
                Ok(block)
            }
            Fault::DmaShared if len > 1000 && len < 2000 => {
                let mut pages = self.memo.pages.lock().unwrap();
                if pages.is_empty() {
                    let block = self.host.dma_alloc(8192, 4096)?;
                    pages.push((block.cpu.as_ptr() as usize, block.device.0 as usize));
                }
                let (cpu, device) = pages[0];
                Ok(DmaBlock {
                    cpu: NonNull::new(cpu as *mut u8).unwrap(),
                    device: DmaAddr(device as u64),
                    len,
                })
            }
            _ => self.host.dma_alloc(len, align),
        }
    }
    unsafe fn dma_free(&self, block: DmaBlock) {
        if !matches!(self.fault, Fault::DmaMisaligned | Fault::DmaShared) {
            // SAFETY: the caller's promise.
            unsafe { self.host.dma_free(block) }
        }
    }
    unsafe fn dma_map(&self, buf: NonNull<[u8]>, direction: DmaDirection) -> Result<DmaAddr> {
        if self.is(Fault::DmaMapOverlaps) {
            return Ok(DmaAddr(0x1000 + self.memo.calls.fetch_add(1, SeqCst) * 64));
        }
        if self.is(Fault::DmaMapClobbers) {
            // SAFETY: the caller's buffer.
            unsafe { buf.cast::<u8>().write(0xee) };
        }
        // SAFETY: the caller's promise.
        unsafe { self.host.dma_map(buf, direction) }
    }
    unsafe fn dma_unmap(&self, device: DmaAddr, buf: NonNull<[u8]>, direction: DmaDirection) {
        if !self.is(Fault::DmaMapOverlaps) {
            // SAFETY: the caller's promise.
            unsafe { self.host.dma_unmap(device, buf, direction) }
        }
    }
}

impl Irq for Wrong {
    fn irq_attach(&self, source: IrqSource, cpu: CpuId, signal: Arc<Signal>) -> Result<IrqId> {
        let inner = match self.fault {
            Fault::IrqNever => Arc::new(Signal::new()),
            _ => signal.clone(),
        };
        let irq = self.host.irq_attach(source, cpu, inner)?;
        if matches!(self.fault, Fault::IrqTwice | Fault::IrqAfterDetach) {
            self.memo.irqs.lock().unwrap().push(signal);
        }
        Ok(irq)
    }
    fn irq_unmask(&self, irq: IrqId) {
        if !self.is(Fault::IrqStaysMasked) {
            self.host.irq_unmask(irq);
        }
    }
    fn irq_detach(&self, irq: IrqId) {
        self.host.irq_detach(irq);
        if self.is(Fault::IrqTwice) {
            self.memo.irqs.lock().unwrap().clear();
        }
    }
}

impl HostBlock for Wrong {
    fn disk_count(&self) -> u32 {
        self.host.disk_count()
    }
    fn disk_info(&self, disk: u32) -> Result<DiskInfo> {
        self.host.disk_info(disk)
    }
    fn disk_read(&self, disk: u32, sector: u64, buf: &mut [u8]) -> Result<()> {
        let size = 512;
        match self.fault {
            Fault::ShortRead if buf.len() > 16 * size => {
                let half = buf.len() / 2 / size * size;
                self.host.disk_read(disk, sector, &mut buf[..half])
            }
            Fault::PartialSectorAccepted if !buf.len().is_multiple_of(size) => Ok(()),
            _ => self.host.disk_read(disk, sector, buf),
        }
    }
    fn disk_write(&self, disk: u32, sector: u64, buf: &[u8]) -> Result<()> {
        let size = 512;
        match self.fault {
            Fault::PartialSectorAccepted if !buf.len().is_multiple_of(size) => Ok(()),
            Fault::WritesReadOnly if self.host.disk_info(disk)?.read_only && buf.len() == size => {
                match self.host.disk_write(disk, sector, buf) {
                    Err(Error::Denied) => Ok(()),
                    other => other,
                }
            }
            // Rounds up to the next 4096 bytes, as a read-modify-write that forgot the read.
            Fault::WriteBesideTheSpot if sector == 4 && buf.len() < 8 * size => {
                let mut whole = buf.to_vec();
                whole.resize(8 * size, 0);
                self.host.disk_write(disk, sector, &whole)
            }
            Fault::FlushLosesWrites => {
                let mut old = vec![0; buf.len()];
                self.host.disk_read(disk, sector, &mut old)?;
                self.memo.writes.lock().unwrap().push((sector, old));
                self.host.disk_write(disk, sector, buf)
            }
            _ => self.host.disk_write(disk, sector, buf),
        }
    }
    fn disk_flush(&self, disk: u32) -> Result<()> {
        if self.is(Fault::FlushLosesWrites) {
            for (sector, old) in self.memo.writes.lock().unwrap().drain(..).rev() {
                self.host.disk_write(disk, sector, &old)?;
            }
        }
        self.host.disk_flush(disk)
    }
}

impl HostLink for Wrong {
    fn link_count(&self) -> u32 {
        self.host.link_count()
    }
    fn link_open(&self, link: u32, signal: Arc<Signal>) -> Result<LinkInfo> {
        match self.fault {
            Fault::LinkSignalNever => self.host.link_open(link, Arc::new(Signal::new())),
            Fault::LinkOpensTwice => match self.host.link_open(link, signal.clone()) {
                Err(Error::Busy) => {
                    self.host.link_close(link);
                    self.host.link_open(link, signal)
                }
                other => other,
            },
            _ => self.host.link_open(link, signal),
        }
    }
    fn link_send(&self, link: u32, frame: &[u8]) -> Result<()> {
        match self.fault {
            Fault::FrameCut if frame.len() == 1514 => self.host.link_send(link, &frame[..1500]),
            // Two queues without an order between them: short frames overtake.
            Fault::FramesSwapped if (70..90).contains(&frame.len()) => {
                let mut held = self.memo.frame.lock().unwrap();
                match held.take() {
                    Some(first) => {
                        self.host.link_send(link, frame)?;
                        self.host.link_send(link, &first)
                    }
                    None => {
                        *held = Some(frame.to_vec());
                        Ok(())
                    }
                }
            }
            _ => self.host.link_send(link, frame),
        }
    }
    fn link_receive(&self, link: u32, buf: &mut [u8]) -> Result<usize> {
        self.host.link_receive(link, buf)
    }
    fn link_close(&self, link: u32) {
        self.host.link_close(link);
    }
}

impl HostUsb for Wrong {
    fn usb_watch(&self, signal: Option<Arc<Signal>>) -> Result<()> {
        if self.is(Fault::UsbWatchForever) && signal.is_none() {
            return Ok(());
        }
        self.host.usb_watch(signal)
    }
    fn usb_devices(&self, found: &mut dyn FnMut(UsbDeviceInfo)) {
        self.host.usb_devices(&mut |mut info| {
            if self.is(Fault::UsbBusZero) {
                info.path = UsbPath::root(0);
            }
            found(info);
            if self.is(Fault::UsbListsTwice) {
                found(info);
            }
        });
    }
    fn usb_descriptors(&self, device: UsbDeviceId, buf: &mut [u8]) -> Result<usize> {
        let len = self.host.usb_descriptors(device, buf)?;
        Ok(if self.is(Fault::UsbDescriptorsCut) { len - 1 } else { len })
    }
    fn usb_open(&self, device: UsbDeviceId, signal: Arc<Signal>) -> Result<()> {
        let signal = match self.fault {
            Fault::UsbSignalNever => Arc::new(Signal::new()),
            Fault::UsbKeepsSignal => {
                self.memo.irqs.lock().unwrap().push(signal.clone());
                signal
            }
            _ => signal,
        };
        match self.host.usb_open(device, signal) {
            Err(Error::Busy) if self.is(Fault::UsbOpensTwice) => Ok(()),
            Err(Error::NotFound) if self.is(Fault::UsbStrangersOpened) => Ok(()),
            other => other,
        }
    }
    fn usb_close(&self, device: UsbDeviceId) {
        *self.memo.completion.lock().unwrap() = None;
        self.host.usb_close(device);
    }
    fn usb_configure(&self, device: UsbDeviceId, configuration: u8) -> Result<()> {
        self.host.usb_configure(device, configuration)
    }
    fn usb_claim(&self, device: UsbDeviceId, interface: u8) -> Result<()> {
        match self.host.usb_claim(device, interface) {
            Err(Error::Invalid) if self.is(Fault::UsbClaimsAnything) => Ok(()),
            other => other,
        }
    }
    fn usb_release(&self, device: UsbDeviceId, interface: u8) {
        self.host.usb_release(device, interface);
        if self.is(Fault::UsbReleaseForgets) {
            while self.host.usb_reap(device).is_some() {}
        }
    }
    fn usb_set_alternate(&self, device: UsbDeviceId, interface: u8, alternate: u8) -> Result<()> {
        self.host.usb_set_alternate(device, interface, alternate)
    }
    fn usb_clear_halt(&self, device: UsbDeviceId, endpoint: u8) -> Result<()> {
        if self.is(Fault::UsbHaltStays) {
            return Err(Error::Io);
        }
        self.host.usb_clear_halt(device, endpoint)
    }
    fn usb_reset(&self, device: UsbDeviceId) -> Result<()> {
        if self.is(Fault::UsbResetKills) {
            self.host.usb_close(device);
            return Ok(());
        }
        self.host.usb_reset(device)
    }
    fn usb_submit(&self, device: UsbDeviceId, transfer: UsbTransfer) -> Result<(), UsbRefused> {
        self.host.usb_submit(device, transfer).map_err(|mut refused| {
            if self.is(Fault::UsbKeepsRefused) {
                refused.transfer.data = Box::new([]);
            }
            refused
        })
    }
    fn usb_cancel(&self, device: UsbDeviceId, tag: u64) {
        if !self.is(Fault::UsbCancelSilent) {
            self.host.usb_cancel(device, tag);
        }
    }
    fn usb_reap(&self, device: UsbDeviceId) -> Option<UsbCompletion> {
        if let Some(again) = self.memo.completion.lock().unwrap().take() {
            return Some(again);
        }
        let mut over = self.host.usb_reap(device)?;
        // The last of the eight that `once` submits.
        let eighth = over.transfer.tag == 17;
        match self.fault {
            Fault::UsbControlZeroes => over.transfer.data.fill(0),
            Fault::UsbShortAsFull => over.actual = over.transfer.data.len(),
            Fault::UsbStallAsDone if over.status == UsbStatus::Stall => over.status = UsbStatus::Done,
            Fault::UsbCompletesTwice if eighth => {
                *self.memo.completion.lock().unwrap() = Some(over.clone());
            }
            Fault::UsbLoses if eighth => return None,
            _ => {}
        }
        Some(over)
    }
}

/// Everything the suite has to say about a host.
fn judge(host: Wrong) -> Vec<CheckReport> {
    let mut reports = Vec::new();
    let mut report = |one| reports.push(one);
    run(host, &mut report);
    run_console(host, &mut || host.host.console_text().into_bytes(), &mut report);
    run_dma(host, &mut report);
    let disk = host.host.add_disk(vec![0x11; 1 << 20], 512, false);
    run_block(host, disk, &mut report);
    let (a, b) = host.host.add_link_pair();
    run_link(host, a, Some(b), &mut report);
    let device = host.host.plug_usb(UsbPath::root(1).child(1).unwrap(), Box::new(UsbLoopback::default()));
    run_usb(host, device, &mut report);
    let source = IrqSource::Line(5);
    let mut fire = || {
        host.host.fire(source);
        let again = host.is(Fault::IrqTwice) || host.host.irqs_attached() == 0;
        for signal in host.memo.irqs.lock().unwrap().iter().filter(|_| again) {
            signal.raise(&host.host);
        }
    };
    run_irq(host, source, &mut fire, &mut report);
    reports
}

fn failed(reports: &[CheckReport]) -> Vec<&'static str> {
    reports
        .iter()
        .filter(|report| matches!(report.outcome, Outcome::Fail(_)))
        .map(|report| report.name)
        .collect()
}

/// The host fails `expected` and nothing else, and what was not run says that it rests on it (or is about another kind
/// of disk).
#[track_caller]
fn fails(fault: Fault, expected: &[&str]) {
    let reports = judge(Wrong::new(fault));
    assert_eq!(failed(&reports), expected, "{fault:?}: {reports:#?}");
    let unexplained = reports.iter().find(|report| match &report.outcome {
        Outcome::NotRun(reason) => !reason.starts_with("rests on") && report.name != "block/read-only",
        _ => false,
    });
    assert_eq!(unexplained, None, "{fault:?}");
}

macro_rules! wrong_hosts {
    ($($test:ident: $fault:ident fails $($check:literal),+;)*) => {
        $(
            #[test]
            fn $test() {
                fails(Fault::$fault, &[$($check),+]);
            }
        )*
    };
}

wrong_hosts! {
    time_goes_back: TimeGoesBack fails "clock/monotonic";
    time_skews: TimeSkewsBetweenCpus fails "clock/monotonic-across-cpus";
    coarse_clock: ClockTicksAt100Hz fails "clock/resolution";
    frozen_wall_time: WallTimeStandsStill fails "clock/realtime";
    cpu_out_of_range: CpuOutOfRange fails "cpus/in-range";
    cpu_binding_ignored: CpuBindingIgnored fails "threads/cpu-binding";
    unknown_cpu_accepted: UnknownCpuAccepted fails "threads/cpu-refused";
    zero_pages_granted: ZeroPagesGranted fails "memory/refuses-zero";
    pages_misaligned: PagesMisaligned fails "memory/aligned";
    pages_not_zeroed: PagesNotZeroed fails "memory/zeroed";
    pages_shared: PagesShared fails "memory/exclusive";
    join_returns_early: JoinReturnsEarly fails "threads/join-waits";
    join_twice: JoinTwice fails "threads/join-once";
    compare_then_sleep: CompareThenSleep fails "park/no-lost-wakeup";
    expected_ignored: ExpectedIgnored fails "park/compares";
    deadline_ignored: DeadlineIgnored fails "park/deadline";
    deadline_early: DeadlineEarly fails "park/not-early";
    park_spins: ParkSpins fails "park/sleeps";
    unpark_lost: UnparkLost fails "park/no-lost-wakeup";
    unpark_wakes_all: UnparkWakesAll fails "unpark/at-most";
    unpark_wakes_one: UnparkWakesOne fails "unpark/all";
    unpark_counts_none: UnparkCountsNone fails "unpark/count";
    unpark_wakes_strangers: UnparkWakesStrangers fails "unpark/by-address";
    random_constant: RandomConstant fails "entropy/not-constant";
    random_short: RandomShort fails "entropy/fills";
    param_truncates: ParamTruncates fails "params/too-small-copies-nothing";
    param_writes_before_refusing: ParamWritesBeforeRefusing fails "params/too-small-copies-nothing";
    unknown_param_empty: UnknownParamEmpty fails "params/unknown";
    console_tears: ConsoleTears fails "console/not-torn";
    console_cuts: ConsoleCuts fails "console/whole";
    no_version: NoVersion fails "versions/core";
    dma_misaligned: DmaMisaligned fails "dma/aligned";
    dma_not_zeroed: DmaNotZeroed fails "dma/zeroed";
    dma_shared: DmaShared fails "dma/exclusive";
    dma_map_overlaps: DmaMapOverlaps fails "dma/maps-apart";
    dma_map_clobbers: DmaMapClobbers fails "dma/map-keeps-data";
    irq_twice: IrqTwice fails "irq/raises-once";
    irq_never: IrqNever fails "irq/raises";
    irq_after_detach: IrqAfterDetach fails "irq/detach";
    irq_stays_masked: IrqStaysMasked fails "irq/again-after-unmask";
    short_read: ShortRead fails "block/reads-whole";
    write_beside_the_spot: WriteBesideTheSpot fails "block/writes-only-there";
    flush_loses_writes: FlushLosesWrites fails "block/flush-keeps";
    partial_sector_accepted: PartialSectorAccepted fails "block/whole-sectors";
    frame_cut: FrameCut fails "link/delivers";
    frames_swapped: FramesSwapped fails "link/order";
    link_signal_never: LinkSignalNever fails "link/signals";
    link_opens_twice: LinkOpensTwice fails "link/open-once";
    usb_lists_twice: UsbListsTwice fails "usb/listed";
    usb_bus_zero: UsbBusZero fails "usb/paths";
    usb_strangers_opened: UsbStrangersOpened fails "usb/not-found";
    usb_descriptors_cut: UsbDescriptorsCut fails "usb/descriptors";
    usb_opens_twice: UsbOpensTwice fails "usb/open-once";
    usb_control_zeroes: UsbControlZeroes fails "usb/control";
    usb_short_as_full: UsbShortAsFull fails "usb/short-in";
    usb_stall_as_done: UsbStallAsDone fails "usb/stall";
    usb_completes_twice: UsbCompletesTwice fails "usb/once";
    usb_loses: UsbLoses fails "usb/once";
    usb_signal_never: UsbSignalNever fails "usb/signals";
    usb_keeps_refused: UsbKeepsRefused fails "usb/refuses";
    usb_claims_anything: UsbClaimsAnything fails "usb/claim";
    usb_cancel_silent: UsbCancelSilent fails "usb/cancel";
    usb_release_forgets: UsbReleaseForgets fails "usb/release-cancels";
    usb_halt_stays: UsbHaltStays fails "usb/clear-halt";
    usb_keeps_signal: UsbKeepsSignal fails "usb/close-drops-signal";
    usb_reset_kills: UsbResetKills fails "usb/reset";
    usb_watch_forever: UsbWatchForever fails "usb/watch";
}

#[test]
fn the_right_host_passes_everything() {
    let host = Wrong::new(Fault::None);
    let reports = judge(host);
    for report in &reports {
        // The one check for another kind of disk; it runs below.
        if report.name != "block/read-only" {
            assert_eq!(report.outcome, Outcome::Pass, "{report}");
        }
    }
    assert_eq!(host.host.pages_in_use(), 0);
    assert_eq!((host.host.dma_blocks(), host.host.dma_mappings(), host.host.irqs_attached()), (0, 0, 0));
    // What was reported is what is published.
    let published: Vec<_> = SUITES.iter().filter(|suite| !["mmio", "pci"].contains(&suite.0)).collect();
    let published: Vec<_> = published.into_iter().flat_map(|suite| suite.1).copied().collect();
    assert_eq!(reports.iter().map(|report| report.name).collect::<Vec<_>>(), published);
}

#[test]
fn names_are_unique() {
    let mut names: Vec<_> = SUITES.iter().flat_map(|suite| suite.1).collect();
    let all = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), all);
}

fn read_only_reports(fault: Fault) -> Vec<CheckReport> {
    let host = Wrong::new(fault);
    let disk = host.host.add_disk(vec![0x11; 1 << 20], 512, true);
    let mut reports = Vec::new();
    run_block(host, disk, &mut |report| reports.push(report));
    reports
}

#[test]
fn a_read_only_disk_passes() {
    let reports = read_only_reports(Fault::None);
    assert_eq!(failed(&reports), [""; 0]);
    let passed = reports.iter().find(|report| report.name == "block/read-only").unwrap();
    assert_eq!(passed.outcome, Outcome::Pass);
}

#[test]
fn a_write_to_a_read_only_disk_fails() {
    assert_eq!(failed(&read_only_reports(Fault::WritesReadOnly)), ["block/read-only"]);
}

#[test]
fn a_lossy_wire_fails_delivery() {
    let host = Wrong::new(Fault::None);
    let (a, b) = host.host.add_link_pair();
    host.host.lose_frames(a, 3);
    let mut reports = Vec::new();
    run_link(host, a, Some(b), &mut |report| reports.push(report));
    assert_eq!(failed(&reports), ["link/delivers"]);
}

#[test]
fn devices_are_judged() {
    let host = Wrong::new(Fault::None).host;
    let virt = |_, _| 0x7472_6976;
    host.add_mmio_device(PhysAddr(0xfeb0_0000), 0x200, 5, (virt, |_, _, _| ()));
    let at = PciAddress { segment: 0, bus: 0, device: 3, function: 0 };
    host.add_pci_function(at, &[0xf4, 0x1a, 0x41, 0x10], 2, &[]);
    let mut reports = Vec::new();
    run_mmio(host, &mut |report| reports.push(report));
    run_pci(host, &mut |report| reports.push(report));
    run_irq(
        host,
        IrqSource::Msix { function: at, entry: 1 },
        &mut || {
            host.fire(IrqSource::Msix { function: at, entry: 1 });
        },
        &mut |report| reports.push(report),
    );
    for report in reports {
        assert_eq!(report.outcome, Outcome::Pass, "{report}");
    }

    let host = TestHost::new();
    host.add_mmio_device(PhysAddr(0xfeb0_0000), 0x200, 5, (|_, _| 0, |_, _, _| ()));
    host.add_pci_function(at, &[0xff, 0xff, 0xff, 0xff], 2, &[]);
    let mut reports = Vec::new();
    run_mmio(host, &mut |report| reports.push(report));
    run_pci(host, &mut |report| reports.push(report));
    assert_eq!(failed(&reports), ["mmio/identity", "pci/functions"]);
}
