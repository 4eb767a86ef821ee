//! [`Traced`].

use crate::*;
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::ptr::NonNull;

/// Who made a call: the first 8 bytes of a component's name.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ComponentName([u8; 8]);

impl ComponentName {
    /// Calls that no component made: the kernel's own and the application's.
    pub const KERNEL: Self = Self::new("kernel");

    /// Of a name of ASCII letters, digits and `-`.
    pub const fn new(name: &str) -> Self {
        let (mut bytes, mut at) = ([0; 8], 0);
        while at < 8 && at < name.len() {
            bytes[at] = name.as_bytes()[at];
            at += 1;
        }
        Self(bytes)
    }

    /// The name; `?` if somebody wrote nonsense in it.
    pub fn as_str(&self) -> &str {
        let len = self.0.iter().position(|byte| *byte == 0).unwrap_or(8);
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'-';
        let bytes = self.0.get(..len).filter(|bytes| bytes.iter().all(plain) && !bytes.is_empty());
        bytes.and_then(|bytes| core::str::from_utf8(bytes).ok()).unwrap_or("?")
    }

    pub(super) const fn to_word(self) -> u64 {
        u64::from_le_bytes(self.0)
    }

    pub(super) const fn from_word(word: u64) -> Self {
        Self(word.to_le_bytes())
    }
}

impl core::fmt::Debug for ComponentName {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One hypercall that has returned (or, for `exit`, begun).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceEvent {
    /// Which function.
    pub call: Call,
    /// Who called it.
    pub component: ComponentName,
    /// On which CPU it was called.
    pub cpu: CpuId,
    /// When, in [`Clock::monotonic_ns`].
    pub start_ns: u64,
    /// How long it took.
    pub duration_ns: u64,
    /// A summary of its arguments; [`Call::arguments`] says of which.
    pub arguments: [u64; 2],
}

/// Takes events. A `Copy` handle, as hosts are: usually a reference to a [`super::TraceRing`].
pub trait TraceSink: Copy + Send + Sync + 'static {
    /// Takes one. Called on the thread, or in the interrupt, that made the hypercall, many at once. Must neither block
    /// nor make hypercalls through the traced host.
    fn record(&self, event: TraceEvent);
}

/// A host that tells a sink of every hypercall.
///
/// The measuring itself calls the inner clock twice and the inner CPU number once. A host behind a layer makes its own
/// calls unseen: what an interrupt unparks is not in the trace.
#[derive(Debug, Clone, Copy)]
pub struct Traced<H, S> {
    host: H,
    sink: S,
    component: ComponentName,
}

impl<H, S> Traced<H, S> {
    /// A layer around `host`.
    pub const fn new(host: H, sink: S) -> Self {
        Self { host, sink, component: ComponentName::KERNEL }
    }
}

impl<H: Clock + Cpus, S: TraceSink> Traced<H, S> {
    #[inline]
    fn trace<T>(&self, call: Call, arguments: [u64; 2], body: impl FnOnce(&H) -> T) -> T {
        let cpu = self.host.current_cpu();
        let start_ns = self.host.monotonic_ns();
        let result = body(&self.host);
        let duration_ns = self.host.monotonic_ns().saturating_sub(start_ns);
        self.sink.record(TraceEvent {
            call,
            component: self.component,
            cpu,
            start_ns,
            duration_ns,
            arguments,
        });
        result
    }
}

/// A word's or register's place as a number.
fn at<T>(place: *const T) -> u64 {
    place.addr() as u64
}

/// As one number: segment, bus, device, function.
fn function_number(function: PciAddress) -> u64 {
    u64::from(function.segment) << 16
        | u64::from(function.bus) << 8
        | u64::from(function.device) << 3
        | u64::from(function.function)
}

impl<H: Versions, S> Versions for Traced<H, S> {
    #[inline]
    fn contracts(&self) -> &'static [ContractVersion] {
        self.host.contracts()
    }
    #[inline]
    fn of_component(self, name: &'static str) -> Self {
        Self { host: self.host.of_component(name), component: ComponentName::new(name), ..self }
    }
}

impl<H: Clock + Cpus, S: TraceSink> Clock for Traced<H, S> {
    #[inline]
    fn monotonic_ns(&self) -> u64 {
        self.trace(Call::MonotonicNs, [0; 2], |host| host.monotonic_ns())
    }
    #[inline]
    fn realtime_ns(&self) -> u64 {
        self.trace(Call::RealtimeNs, [0; 2], |host| host.realtime_ns())
    }
}

#[expect(unsafe_code, reason = "forwards")]
// SAFETY: the pages are the inner host's.
unsafe impl<H: Memory + Clock + Cpus, S: TraceSink> Memory for Traced<H, S> {
    #[inline]
    fn alloc_pages(&self, count: usize) -> Result<Pages> {
        self.trace(Call::AllocPages, [count as u64, 0], |host| host.alloc_pages(count))
    }
    #[inline]
    unsafe fn free_pages(&self, pages: Pages) {
        // SAFETY: the caller's promise.
        self.trace(Call::FreePages, [pages.count as u64, 0], |host| unsafe { host.free_pages(pages) });
    }
    #[inline]
    fn memory_bytes(&self) -> u64 {
        self.trace(Call::MemoryBytes, [0; 2], |host| host.memory_bytes())
    }
}

impl<H: Threads + Clock + Cpus, S: TraceSink> Threads for Traced<H, S> {
    #[inline]
    fn spawn(&self, spec: ThreadSpec<'_>, entry: Box<dyn FnOnce() + Send + 'static>) -> Result<ThreadId> {
        let cpu = spec.cpu.map_or(u64::MAX, |cpu| cpu.0.into());
        self.trace(Call::Spawn, [cpu, 0], |host| host.spawn(spec, entry))
    }
    #[inline]
    fn join(&self, thread: ThreadId) -> Result<()> {
        self.trace(Call::Join, [thread.0, 0], |host| host.join(thread))
    }
    #[inline]
    fn park(&self, word: &atomic::AtomicU32, expected: u32, deadline_ns: Option<u64>) -> ParkResult {
        let arguments = [at(word), deadline_ns.unwrap_or(u64::MAX)];
        self.trace(Call::Park, arguments, |host| host.park(word, expected, deadline_ns))
    }
    #[inline]
    fn unpark(&self, word: &atomic::AtomicU32, count: u32) -> u32 {
        self.trace(Call::Unpark, [at(word), count.into()], |host| host.unpark(word, count))
    }
    #[inline]
    fn yield_now(&self) {
        self.trace(Call::YieldNow, [0; 2], |host| host.yield_now());
    }
}

impl<H: Clock + Cpus, S: TraceSink> Cpus for Traced<H, S> {
    #[inline]
    fn cpu_count(&self) -> u32 {
        self.trace(Call::CpuCount, [0; 2], |host| host.cpu_count())
    }
    #[inline]
    fn current_cpu(&self) -> CpuId {
        self.trace(Call::CurrentCpu, [0; 2], |host| host.current_cpu())
    }
}

impl<H: Entropy + Clock + Cpus, S: TraceSink> Entropy for Traced<H, S> {
    #[inline]
    fn fill_random(&self, buf: &mut [u8]) -> Result<()> {
        self.trace(Call::FillRandom, [buf.len() as u64, 0], |host| host.fill_random(buf))
    }
}

impl<H: Params + Clock + Cpus, S: TraceSink> Params for Traced<H, S> {
    #[inline]
    fn param(&self, key: &str, buf: &mut [u8]) -> Result<usize> {
        self.trace(Call::Param, [buf.len() as u64, 0], |host| host.param(key, buf))
    }
}

impl<H: Console + Clock + Cpus, S: TraceSink> Console for Traced<H, S> {
    #[inline]
    fn console_write(&self, bytes: &[u8]) {
        self.trace(Call::ConsoleWrite, [bytes.len() as u64, 0], |host| host.console_write(bytes));
    }
}

impl<H: Exit + Clock + Cpus, S: TraceSink> Exit for Traced<H, S> {
    fn exit(&self, status: ExitStatus) -> ! {
        // Recorded before: nothing runs after it.
        self.trace(Call::Exit, [status.code().into(), 0], |_| ());
        self.host.exit(status)
    }
}

#[expect(unsafe_code, reason = "forwards")]
// SAFETY: blocks and mappings are the inner host's.
unsafe impl<H: Dma + Clock + Cpus, S: TraceSink> Dma for Traced<H, S> {
    #[inline]
    fn dma_alloc(&self, len: usize, align: usize) -> Result<DmaBlock> {
        self.trace(Call::DmaAlloc, [len as u64, align as u64], |host| host.dma_alloc(len, align))
    }
    #[inline]
    unsafe fn dma_free(&self, block: DmaBlock) {
        let arguments = [block.device.0, block.len as u64];
        // SAFETY: the caller's promise.
        self.trace(Call::DmaFree, arguments, |host| unsafe { host.dma_free(block) });
    }
    #[inline]
    unsafe fn dma_map(&self, buf: NonNull<[u8]>, direction: DmaDirection) -> Result<DmaAddr> {
        // SAFETY: the caller's promise.
        self.trace(Call::DmaMap, [buf.len() as u64, 0], |host| unsafe { host.dma_map(buf, direction) })
    }
    #[inline]
    unsafe fn dma_unmap(&self, device: DmaAddr, buf: NonNull<[u8]>, direction: DmaDirection) {
        let arguments = [device.0, buf.len() as u64];
        // SAFETY: the caller's promise.
        self.trace(Call::DmaUnmap, arguments, |host| unsafe { host.dma_unmap(device, buf, direction) });
    }
    #[inline]
    unsafe fn dma_read(&self, block: &DmaBlock, offset: usize, width: Width) -> u64 {
        let arguments = [block.device.0 + offset as u64, width.bytes() as u64];
        // SAFETY: the caller's promise.
        self.trace(Call::DmaRead, arguments, |host| unsafe { host.dma_read(block, offset, width) })
    }
    #[inline]
    unsafe fn dma_copy(&self, block: &DmaBlock, offset: usize, to: &mut [u8]) {
        let arguments = [block.device.0 + offset as u64, to.len() as u64];
        // SAFETY: the caller's promise.
        self.trace(Call::DmaCopy, arguments, |host| unsafe { host.dma_copy(block, offset, to) });
    }
}

impl<H: Mmio + Clock + Cpus, S: TraceSink> Mmio for Traced<H, S> {
    #[inline]
    fn mmio_devices(&self, found: &mut dyn FnMut(MmioDevice)) {
        self.trace(Call::MmioDevices, [0; 2], |host| host.mmio_devices(found));
    }
    #[inline]
    fn mmio_map(&self, address: PhysAddr, len: usize) -> Result<MmioRegion> {
        self.trace(Call::MmioMap, [address.0, len as u64], |host| host.mmio_map(address, len))
    }
    #[inline]
    fn mmio_read(&self, region: MmioRegion, offset: usize, width: Width) -> u64 {
        let arguments = [(region.base() + offset) as u64, width.bytes() as u64];
        self.trace(Call::MmioRead, arguments, |host| host.mmio_read(region, offset, width))
    }
    #[inline]
    fn mmio_write(&self, region: MmioRegion, offset: usize, width: Width, value: u64) {
        let arguments = [(region.base() + offset) as u64, value];
        self.trace(Call::MmioWrite, arguments, |host| host.mmio_write(region, offset, width, value));
    }
}

impl<H: Pci + Clock + Cpus, S: TraceSink> Pci for Traced<H, S> {
    #[inline]
    fn pci_functions(&self, found: &mut dyn FnMut(PciAddress)) {
        self.trace(Call::PciFunctions, [0; 2], |host| host.pci_functions(found));
    }
    #[inline]
    fn pci_read(&self, function: PciAddress, offset: u16, width: Width) -> Result<u32> {
        let arguments = [function_number(function), offset.into()];
        self.trace(Call::PciRead, arguments, |host| host.pci_read(function, offset, width))
    }
    #[inline]
    fn pci_write(&self, function: PciAddress, offset: u16, width: Width, value: u32) -> Result<()> {
        let arguments = [function_number(function), offset.into()];
        self.trace(Call::PciWrite, arguments, |host| host.pci_write(function, offset, width, value))
    }
}

impl<H: Irq + Clock + Cpus, S: TraceSink> Irq for Traced<H, S> {
    #[inline]
    fn irq_attach(&self, source: IrqSource, cpu: CpuId, signal: Arc<Signal>) -> Result<IrqId> {
        self.trace(Call::IrqAttach, [cpu.0.into(), 0], |host| host.irq_attach(source, cpu, signal))
    }
    #[inline]
    fn irq_unmask(&self, irq: IrqId) {
        self.trace(Call::IrqUnmask, [irq.0.into(), 0], |host| host.irq_unmask(irq));
    }
    #[inline]
    fn irq_detach(&self, irq: IrqId) {
        self.trace(Call::IrqDetach, [irq.0.into(), 0], |host| host.irq_detach(irq));
    }
}

impl<H: HostBlock + Clock + Cpus, S: TraceSink> HostBlock for Traced<H, S> {
    #[inline]
    fn disk_count(&self) -> u32 {
        self.trace(Call::DiskCount, [0; 2], |host| host.disk_count())
    }
    #[inline]
    fn disk_info(&self, disk: u32) -> Result<DiskInfo> {
        self.trace(Call::DiskInfo, [disk.into(), 0], |host| host.disk_info(disk))
    }
    #[inline]
    fn disk_read(&self, disk: u32, sector: u64, buf: &mut [u8]) -> Result<()> {
        self.trace(Call::DiskRead, [sector, buf.len() as u64], |host| host.disk_read(disk, sector, buf))
    }
    #[inline]
    fn disk_write(&self, disk: u32, sector: u64, buf: &[u8]) -> Result<()> {
        self.trace(Call::DiskWrite, [sector, buf.len() as u64], |host| host.disk_write(disk, sector, buf))
    }
    #[inline]
    fn disk_flush(&self, disk: u32) -> Result<()> {
        self.trace(Call::DiskFlush, [disk.into(), 0], |host| host.disk_flush(disk))
    }
}

impl<H: HostLink + Clock + Cpus, S: TraceSink> HostLink for Traced<H, S> {
    #[inline]
    fn link_count(&self) -> u32 {
        self.trace(Call::LinkCount, [0; 2], |host| host.link_count())
    }
    #[inline]
    fn link_open(&self, link: u32, signal: Arc<Signal>) -> Result<LinkInfo> {
        self.trace(Call::LinkOpen, [link.into(), 0], |host| host.link_open(link, signal))
    }
    #[inline]
    fn link_send(&self, link: u32, frame: &[u8]) -> Result<()> {
        self.trace(Call::LinkSend, [link.into(), frame.len() as u64], |host| host.link_send(link, frame))
    }
    #[inline]
    fn link_receive(&self, link: u32, buf: &mut [u8]) -> Result<usize> {
        self.trace(Call::LinkReceive, [link.into(), buf.len() as u64], |host| host.link_receive(link, buf))
    }
    #[inline]
    fn link_close(&self, link: u32) {
        self.trace(Call::LinkClose, [link.into(), 0], |host| host.link_close(link));
    }
}

impl<H: HostUsb + Clock + Cpus, S: TraceSink> HostUsb for Traced<H, S> {
    #[inline]
    fn usb_watch(&self, signal: Option<Arc<Signal>>) -> Result<()> {
        self.trace(Call::UsbWatch, [0; 2], |host| host.usb_watch(signal))
    }
    #[inline]
    fn usb_devices(&self, found: &mut dyn FnMut(UsbDeviceInfo)) {
        self.trace(Call::UsbDevices, [0; 2], |host| host.usb_devices(found));
    }
    #[inline]
    fn usb_descriptors(&self, device: UsbDeviceId, buf: &mut [u8]) -> Result<usize> {
        let arguments = [device.0, buf.len() as u64];
        self.trace(Call::UsbDescriptors, arguments, |host| host.usb_descriptors(device, buf))
    }
    #[inline]
    fn usb_open(&self, device: UsbDeviceId, signal: Arc<Signal>) -> Result<()> {
        self.trace(Call::UsbOpen, [device.0, 0], |host| host.usb_open(device, signal))
    }
    #[inline]
    fn usb_close(&self, device: UsbDeviceId) {
        self.trace(Call::UsbClose, [device.0, 0], |host| host.usb_close(device));
    }
    #[inline]
    fn usb_configure(&self, device: UsbDeviceId, configuration: u8) -> Result<()> {
        let arguments = [device.0, configuration.into()];
        self.trace(Call::UsbConfigure, arguments, |host| host.usb_configure(device, configuration))
    }
    #[inline]
    fn usb_claim(&self, device: UsbDeviceId, interface: u8) -> Result<()> {
        self.trace(Call::UsbClaim, [device.0, interface.into()], |host| host.usb_claim(device, interface))
    }
    #[inline]
    fn usb_release(&self, device: UsbDeviceId, interface: u8) {
        self.trace(Call::UsbRelease, [device.0, interface.into()], |host| {
            host.usb_release(device, interface)
        });
    }
    #[inline]
    fn usb_set_alternate(&self, device: UsbDeviceId, interface: u8, alternate: u8) -> Result<()> {
        let arguments = [device.0, interface.into()];
        self.trace(Call::UsbSetAlternate, arguments, |host| {
            host.usb_set_alternate(device, interface, alternate)
        })
    }
    #[inline]
    fn usb_clear_halt(&self, device: UsbDeviceId, endpoint: u8) -> Result<()> {
        let arguments = [device.0, endpoint.into()];
        self.trace(Call::UsbClearHalt, arguments, |host| host.usb_clear_halt(device, endpoint))
    }
    #[inline]
    fn usb_reset(&self, device: UsbDeviceId) -> Result<()> {
        self.trace(Call::UsbReset, [device.0, 0], |host| host.usb_reset(device))
    }
    #[inline]
    fn usb_submit(&self, device: UsbDeviceId, transfer: UsbTransfer) -> Result<(), UsbRefused> {
        let arguments = [transfer.endpoint.into(), transfer.data.len() as u64];
        self.trace(Call::UsbSubmit, arguments, |host| host.usb_submit(device, transfer))
    }
    #[inline]
    fn usb_cancel(&self, device: UsbDeviceId, tag: u64) {
        self.trace(Call::UsbCancel, [device.0, tag], |host| host.usb_cancel(device, tag));
    }
    #[inline]
    fn usb_reap(&self, device: UsbDeviceId) -> Option<UsbCompletion> {
        self.trace(Call::UsbReap, [device.0, 0], |host| host.usb_reap(device))
    }
}
