//! [`Granted`].

use crate::*;
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What a component was granted, and how often it went beyond.
#[derive(Debug)]
pub struct GrantBook {
    component: &'static str,
    grants: Grants,
    violations: AtomicU64,
    /// One bit for each [`Call`] that was reported.
    reported: AtomicU64,
}

// One bit each is enough.
const _: () = assert!(Call::ALL.len() <= 64);

impl GrantBook {
    /// A book for `component`, which may use `grants`.
    pub const fn new(component: &'static str, grants: Grants) -> Self {
        Self { component, grants, violations: AtomicU64::new(0), reported: AtomicU64::new(0) }
    }

    /// How many calls were refused so far.
    pub fn violations(&self) -> u64 {
        self.violations.load(Relaxed)
    }
}

/// A host that grants a component what is in its book and nothing else.
///
/// A refused call that can fail fails with [`Error::Denied`]. One that cannot fail does nothing and returns the least
/// that the contract allows: no CPU but one, no memory, a wall clock that knows no time, a park that returns at once, a
/// register that reads all ones. `exit` ends the domain with [`ExitStatus::Panic`] instead. Each refusal is
/// counted; the first of each function is told on the console in one line.
#[derive(Debug, Clone, Copy)]
pub struct Granted<H> {
    host: H,
    book: &'static GrantBook,
}

impl<H: Console> Granted<H> {
    /// A layer around `host`.
    pub const fn new(host: H, book: &'static GrantBook) -> Self {
        Self { host, book }
    }

    #[inline]
    fn grants(&self, call: Call) -> bool {
        let granted = self.book.grants.has(call.capability());
        if !granted {
            self.violation(call);
        }
        granted
    }

    #[inline]
    fn check(&self, call: Call) -> Result<()> {
        if self.grants(call) { Ok(()) } else { Err(Error::Denied) }
    }

    #[cold]
    fn violation(&self, call: Call) {
        self.book.violations.fetch_add(1, Relaxed);
        let bit = 1 << call as u8;
        if self.book.reported.fetch_or(bit, Relaxed) & bit == 0 {
            let line = alloc::format!(
                "{}: {} refused: its manifest does not grant {}\n",
                self.book.component,
                call.name(),
                call.capability().name()
            );
            self.host.console_write(line.as_bytes());
        }
    }
}

impl<H: Versions> Versions for Granted<H> {
    #[inline]
    fn contracts(&self) -> &'static [ContractVersion] {
        self.host.contracts()
    }
    #[inline]
    fn of_component(self, name: &'static str) -> Self {
        Self { host: self.host.of_component(name), book: self.book }
    }
}

impl<H: Console + Clock> Clock for Granted<H> {
    #[inline]
    fn monotonic_ns(&self) -> u64 {
        if self.grants(Call::MonotonicNs) { self.host.monotonic_ns() } else { 0 }
    }
    #[inline]
    fn realtime_ns(&self) -> u64 {
        if self.grants(Call::RealtimeNs) { self.host.realtime_ns() } else { 0 }
    }
}

#[expect(unsafe_code, reason = "forwards")]
// SAFETY: the pages are the inner host's.
unsafe impl<H: Console + Memory> Memory for Granted<H> {
    #[inline]
    fn alloc_pages(&self, count: usize) -> Result<Pages> {
        self.check(Call::AllocPages)?;
        self.host.alloc_pages(count)
    }
    #[inline]
    unsafe fn free_pages(&self, pages: Pages) {
        // SAFETY: the caller's promise. Not refused: whoever has pages was given them, and a leak helps nobody.
        unsafe { self.host.free_pages(pages) }
    }
    #[inline]
    fn memory_bytes(&self) -> u64 {
        if self.grants(Call::MemoryBytes) { self.host.memory_bytes() } else { 0 }
    }
}

impl<H: Console + Threads> Threads for Granted<H> {
    #[inline]
    fn spawn(&self, spec: ThreadSpec<'_>, entry: Box<dyn FnOnce() + Send + 'static>) -> Result<ThreadId> {
        self.check(Call::Spawn)?;
        self.host.spawn(spec, entry)
    }
    #[inline]
    fn join(&self, thread: ThreadId) -> Result<()> {
        self.check(Call::Join)?;
        self.host.join(thread)
    }
    #[inline]
    fn park(&self, word: &atomic::AtomicU32, expected: u32, deadline_ns: Option<u64>) -> ParkResult {
        if self.grants(Call::Park) { self.host.park(word, expected, deadline_ns) } else { ParkResult::Woken }
    }
    #[inline]
    fn unpark(&self, word: &atomic::AtomicU32, count: u32) -> u32 {
        if self.grants(Call::Unpark) { self.host.unpark(word, count) } else { 0 }
    }
    #[inline]
    fn yield_now(&self) {
        if self.grants(Call::YieldNow) {
            self.host.yield_now();
        }
    }
}

impl<H: Console + Cpus> Cpus for Granted<H> {
    #[inline]
    fn cpu_count(&self) -> u32 {
        if self.grants(Call::CpuCount) { self.host.cpu_count() } else { 1 }
    }
    #[inline]
    fn current_cpu(&self) -> CpuId {
        if self.grants(Call::CurrentCpu) { self.host.current_cpu() } else { CpuId(0) }
    }
}

impl<H: Console + Entropy> Entropy for Granted<H> {
    #[inline]
    fn fill_random(&self, buf: &mut [u8]) -> Result<()> {
        self.check(Call::FillRandom)?;
        self.host.fill_random(buf)
    }
}

impl<H: Console + Params> Params for Granted<H> {
    #[inline]
    fn param(&self, key: &str, buf: &mut [u8]) -> Result<usize> {
        self.check(Call::Param)?;
        self.host.param(key, buf)
    }
}

impl<H: Console> Console for Granted<H> {
    #[inline]
    fn console_write(&self, bytes: &[u8]) {
        if self.grants(Call::ConsoleWrite) {
            self.host.console_write(bytes);
        }
    }
}

impl<H: Console + Exit> Exit for Granted<H> {
    fn exit(&self, status: ExitStatus) -> ! {
        self.host.exit(if self.grants(Call::Exit) { status } else { ExitStatus::Panic })
    }
}

#[expect(unsafe_code, reason = "forwards")]
// SAFETY: blocks and mappings are the inner host's.
unsafe impl<H: Console + Dma> Dma for Granted<H> {
    #[inline]
    fn dma_alloc(&self, len: usize, align: usize) -> Result<DmaBlock> {
        self.check(Call::DmaAlloc)?;
        self.host.dma_alloc(len, align)
    }
    #[inline]
    unsafe fn dma_free(&self, block: DmaBlock) {
        // SAFETY: the caller's promise. Not refused, as with pages.
        unsafe { self.host.dma_free(block) }
    }
    #[inline]
    unsafe fn dma_map(&self, buf: NonNull<[u8]>, direction: DmaDirection) -> Result<DmaAddr> {
        self.check(Call::DmaMap)?;
        // SAFETY: the caller's promise.
        unsafe { self.host.dma_map(buf, direction) }
    }
    #[inline]
    unsafe fn dma_unmap(&self, device: DmaAddr, buf: NonNull<[u8]>, direction: DmaDirection) {
        // SAFETY: the caller's promise. Not refused, as with pages.
        unsafe { self.host.dma_unmap(device, buf, direction) }
    }
    #[inline]
    unsafe fn dma_read(&self, block: &DmaBlock, offset: usize, width: Width) -> u64 {
        // SAFETY: the caller's promise. Not refused: whoever has a block was given it.
        unsafe { self.host.dma_read(block, offset, width) }
    }
    #[inline]
    unsafe fn dma_copy(&self, block: &DmaBlock, offset: usize, to: &mut [u8]) {
        // SAFETY: the caller's promise. Not refused, as above.
        unsafe { self.host.dma_copy(block, offset, to) }
    }
}

impl<H: Console + Mmio> Mmio for Granted<H> {
    #[inline]
    fn mmio_devices(&self, found: &mut dyn FnMut(MmioDevice)) {
        if self.grants(Call::MmioDevices) {
            self.host.mmio_devices(found);
        }
    }
    #[inline]
    fn mmio_map(&self, at: PhysAddr, len: usize) -> Result<MmioRegion> {
        self.check(Call::MmioMap)?;
        self.host.mmio_map(at, len)
    }
    #[inline]
    fn mmio_read(&self, region: MmioRegion, offset: usize, width: Width) -> u64 {
        if self.grants(Call::MmioRead) {
            self.host.mmio_read(region, offset, width)
        } else {
            u64::MAX >> (64 - 8 * width.bytes())
        }
    }
    #[inline]
    fn mmio_write(&self, region: MmioRegion, offset: usize, width: Width, value: u64) {
        if self.grants(Call::MmioWrite) {
            self.host.mmio_write(region, offset, width, value);
        }
    }
}

impl<H: Console + Pci> Pci for Granted<H> {
    #[inline]
    fn pci_functions(&self, found: &mut dyn FnMut(PciAddress)) {
        if self.grants(Call::PciFunctions) {
            self.host.pci_functions(found);
        }
    }
    #[inline]
    fn pci_read(&self, function: PciAddress, offset: u16, width: Width) -> Result<u32> {
        self.check(Call::PciRead)?;
        self.host.pci_read(function, offset, width)
    }
    #[inline]
    fn pci_write(&self, function: PciAddress, offset: u16, width: Width, value: u32) -> Result<()> {
        self.check(Call::PciWrite)?;
        self.host.pci_write(function, offset, width, value)
    }
}

impl<H: Console + Irq> Irq for Granted<H> {
    #[inline]
    fn irq_attach(&self, source: IrqSource, cpu: CpuId, signal: Arc<Signal>) -> Result<IrqId> {
        self.check(Call::IrqAttach)?;
        self.host.irq_attach(source, cpu, signal)
    }
    #[inline]
    fn irq_unmask(&self, irq: IrqId) {
        if self.grants(Call::IrqUnmask) {
            self.host.irq_unmask(irq);
        }
    }
    #[inline]
    fn irq_detach(&self, irq: IrqId) {
        if self.grants(Call::IrqDetach) {
            self.host.irq_detach(irq);
        }
    }
}

impl<H: Console + HostBlock> HostBlock for Granted<H> {
    #[inline]
    fn disk_count(&self) -> u32 {
        if self.grants(Call::DiskCount) { self.host.disk_count() } else { 0 }
    }
    #[inline]
    fn disk_info(&self, disk: u32) -> Result<DiskInfo> {
        self.check(Call::DiskInfo)?;
        self.host.disk_info(disk)
    }
    #[inline]
    fn disk_read(&self, disk: u32, sector: u64, buf: &mut [u8]) -> Result<()> {
        self.check(Call::DiskRead)?;
        self.host.disk_read(disk, sector, buf)
    }
    #[inline]
    fn disk_write(&self, disk: u32, sector: u64, buf: &[u8]) -> Result<()> {
        self.check(Call::DiskWrite)?;
        self.host.disk_write(disk, sector, buf)
    }
    #[inline]
    fn disk_flush(&self, disk: u32) -> Result<()> {
        self.check(Call::DiskFlush)?;
        self.host.disk_flush(disk)
    }
}

impl<H: Console + HostLink> HostLink for Granted<H> {
    #[inline]
    fn link_count(&self) -> u32 {
        if self.grants(Call::LinkCount) { self.host.link_count() } else { 0 }
    }
    #[inline]
    fn link_open(&self, link: u32, signal: Arc<Signal>) -> Result<LinkInfo> {
        self.check(Call::LinkOpen)?;
        self.host.link_open(link, signal)
    }
    #[inline]
    fn link_send(&self, link: u32, frame: &[u8]) -> Result<()> {
        self.check(Call::LinkSend)?;
        self.host.link_send(link, frame)
    }
    #[inline]
    fn link_receive(&self, link: u32, buf: &mut [u8]) -> Result<usize> {
        self.check(Call::LinkReceive)?;
        self.host.link_receive(link, buf)
    }
    #[inline]
    fn link_close(&self, link: u32) {
        if self.grants(Call::LinkClose) {
            self.host.link_close(link);
        }
    }
}

impl<H: Console + HostUsb> HostUsb for Granted<H> {
    #[inline]
    fn usb_watch(&self, signal: Option<Arc<Signal>>) -> Result<()> {
        self.check(Call::UsbWatch)?;
        self.host.usb_watch(signal)
    }
    #[inline]
    fn usb_devices(&self, found: &mut dyn FnMut(UsbDeviceInfo)) {
        if self.grants(Call::UsbDevices) {
            self.host.usb_devices(found);
        }
    }
    #[inline]
    fn usb_descriptors(&self, device: UsbDeviceId, buf: &mut [u8]) -> Result<usize> {
        self.check(Call::UsbDescriptors)?;
        self.host.usb_descriptors(device, buf)
    }
    #[inline]
    fn usb_open(&self, device: UsbDeviceId, signal: Arc<Signal>) -> Result<()> {
        self.check(Call::UsbOpen)?;
        self.host.usb_open(device, signal)
    }
    #[inline]
    fn usb_close(&self, device: UsbDeviceId) {
        if self.grants(Call::UsbClose) {
            self.host.usb_close(device);
        }
    }
    #[inline]
    fn usb_configure(&self, device: UsbDeviceId, configuration: u8) -> Result<()> {
        self.check(Call::UsbConfigure)?;
        self.host.usb_configure(device, configuration)
    }
    #[inline]
    fn usb_claim(&self, device: UsbDeviceId, interface: u8) -> Result<()> {
        self.check(Call::UsbClaim)?;
        self.host.usb_claim(device, interface)
    }
    #[inline]
    fn usb_release(&self, device: UsbDeviceId, interface: u8) {
        if self.grants(Call::UsbRelease) {
            self.host.usb_release(device, interface);
        }
    }
    #[inline]
    fn usb_set_alternate(&self, device: UsbDeviceId, interface: u8, alternate: u8) -> Result<()> {
        self.check(Call::UsbSetAlternate)?;
        self.host.usb_set_alternate(device, interface, alternate)
    }
    #[inline]
    fn usb_clear_halt(&self, device: UsbDeviceId, endpoint: u8) -> Result<()> {
        self.check(Call::UsbClearHalt)?;
        self.host.usb_clear_halt(device, endpoint)
    }
    #[inline]
    fn usb_reset(&self, device: UsbDeviceId) -> Result<()> {
        self.check(Call::UsbReset)?;
        self.host.usb_reset(device)
    }
    #[inline]
    fn usb_submit(&self, device: UsbDeviceId, transfer: UsbTransfer) -> Result<(), UsbRefused> {
        match self.check(Call::UsbSubmit) {
            Ok(()) => self.host.usb_submit(device, transfer),
            Err(error) => Err(UsbRefused { transfer, error }),
        }
    }
    #[inline]
    fn usb_cancel(&self, device: UsbDeviceId, tag: u64) {
        if self.grants(Call::UsbCancel) {
            self.host.usb_cancel(device, tag);
        }
    }
    #[inline]
    fn usb_reap(&self, device: UsbDeviceId) -> Option<UsbCompletion> {
        if self.grants(Call::UsbReap) { self.host.usb_reap(device) } else { None }
    }
}
