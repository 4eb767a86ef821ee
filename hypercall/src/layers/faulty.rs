//! [`Faulty`].

use crate::*;
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Which calls fail. Calls count from 1, and only those that can fail do count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// None: the plan only counts.
    Never,
    /// The `n`-th.
    Nth(u64),
    /// The `n`-th and all after it: memory is used up, a device is gone.
    From(u64),
    /// Each with a chance of so many in a million, by seed.
    Random {
        /// Where chance comes from.
        seed: u64,
        /// In a million.
        ppm: u32,
    },
}

/// What is to fail, and what has failed. Shared by reference by the layers of one host.
#[derive(Debug)]
pub struct FaultPlan {
    fault: Fault,
    /// Only this call counts.
    only: Option<Call>,
    counted: AtomicU64,
    injected: AtomicU64,
    /// Number, call and error of the last one: 48, 8 and 8 bits.
    last: AtomicU64,
}

/// A failure that was injected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Injected {
    /// The how-many-th call it was of those that count.
    pub n: u64,
    /// Which function.
    pub call: Call,
    /// With what it failed; [`Call::Park`] has none and returned early.
    pub error: Option<Error>,
}

impl fmt::Display for Injected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.error {
            Some(error) => write!(f, "call {} ({}) failed: {error}", self.n, self.call.name()),
            None => write!(f, "call {} ({}) returned for no reason", self.n, self.call.name()),
        }
    }
}

impl FaultPlan {
    /// A plan for every call that can fail.
    pub const fn new(fault: Fault) -> Self {
        Self {
            fault,
            only: None,
            counted: AtomicU64::new(0),
            injected: AtomicU64::new(0),
            last: AtomicU64::new(0),
        }
    }

    /// A plan for one call. [`Call::Park`] is one of those: it then returns although nobody woke it.
    pub const fn only(call: Call, fault: Fault) -> Self {
        Self { only: Some(call), ..Self::new(fault) }
    }

    /// How many calls there were that could have failed.
    pub fn counted(&self) -> u64 {
        self.counted.load(Relaxed)
    }

    /// How many of them did.
    pub fn injected(&self) -> u64 {
        self.injected.load(Relaxed)
    }

    /// The last one that did.
    pub fn last(&self) -> Option<Injected> {
        let last = self.last.load(Relaxed);
        let call = *Call::ALL.get((last >> 8 & 0xff) as usize)?;
        let error = errors(call).get((last & 0xff) as usize).copied();
        (last != 0).then_some(Injected { n: last >> 16, call, error })
    }

    /// Counts a call. `Some`: it is to fail with that.
    fn decide(&self, call: Call) -> Option<Error> {
        let errors = errors(call);
        let counts = match self.only {
            None => !errors.is_empty(),
            Some(only) => only == call,
        };
        if !counts {
            return None;
        }
        let n = self.counted.fetch_add(1, Relaxed) + 1;
        let chance = mix(n);
        let (fails, which) = match self.fault {
            Fault::Never => (false, 0),
            Fault::Nth(nth) => (n == nth, 0),
            Fault::From(first) => (n >= first, 0),
            Fault::Random { seed, ppm } => {
                let chance = mix(chance ^ seed);
                (chance % 1_000_000 < u64::from(ppm), (chance >> 32) as usize % errors.len().max(1))
            }
        };
        if !fails {
            return None;
        }
        self.injected.fetch_add(1, Relaxed);
        self.last.store(n << 16 | (call as u64) << 8 | which as u64, Relaxed);
        Some(errors.get(which).copied().unwrap_or(Error::WouldBlock))
    }
}

/// The last steps of SplitMix64.
fn mix(n: u64) -> u64 {
    let z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// The errors that the contract allows at any time, whatever the caller did; none for a call that cannot fail, or whose
/// failure would say something of the caller (a thread that is not there to be joined).
pub const fn errors(call: Call) -> &'static [Error] {
    match call {
        Call::AllocPages | Call::Spawn | Call::DmaAlloc | Call::DmaMap => &[Error::NoMemory],
        Call::FillRandom => &[Error::Unsupported],
        Call::Param => &[Error::NotFound],
        Call::MmioMap => &[Error::NoMemory, Error::Denied],
        Call::PciRead => &[Error::NotFound],
        Call::PciWrite => &[Error::NotFound, Error::Denied],
        Call::IrqAttach => &[Error::NoMemory, Error::Busy],
        Call::DiskInfo => &[Error::NotFound],
        Call::DiskRead | Call::DiskWrite => &[Error::Io, Error::Gone],
        Call::DiskFlush => &[Error::Io],
        Call::LinkOpen => &[Error::Busy, Error::NotFound],
        Call::LinkSend => &[Error::Gone],
        Call::LinkReceive => &[Error::BufferTooSmall],
        Call::UsbWatch => &[Error::Unsupported],
        Call::UsbDescriptors => &[Error::Io, Error::Gone],
        Call::UsbOpen => &[Error::Denied, Error::Gone],
        Call::UsbConfigure => &[Error::Io, Error::Busy],
        Call::UsbClaim => &[Error::Busy, Error::Denied],
        Call::UsbSetAlternate | Call::UsbClearHalt | Call::UsbReset => &[Error::Io, Error::Gone],
        Call::UsbSubmit => &[Error::NoMemory, Error::Io],
        _ => &[],
    }
}

/// A host whose calls fail as a plan says, with errors that the contract allows at that call and with no other effect:
/// a page that is refused is not allocated, a write that fails writes nothing, a frame that does not fit is dropped.
#[derive(Debug, Clone, Copy)]
pub struct Faulty<H> {
    host: H,
    plan: &'static FaultPlan,
}

impl<H> Faulty<H> {
    /// A layer around `host`.
    pub const fn new(host: H, plan: &'static FaultPlan) -> Self {
        Self { host, plan }
    }

    /// The plan.
    pub const fn plan(&self) -> &'static FaultPlan {
        self.plan
    }

    #[inline]
    fn may_fail(&self, call: Call) -> Result<()> {
        self.plan.decide(call).map_or(Ok(()), Err)
    }
}

impl<H: Versions> Versions for Faulty<H> {
    #[inline]
    fn contracts(&self) -> &'static [ContractVersion] {
        self.host.contracts()
    }
}

impl<H: Clock> Clock for Faulty<H> {
    #[inline]
    fn monotonic_ns(&self) -> u64 {
        self.host.monotonic_ns()
    }
    #[inline]
    fn realtime_ns(&self) -> u64 {
        self.host.realtime_ns()
    }
}

#[expect(unsafe_code, reason = "forwards")]
// SAFETY: the pages are the inner host's.
unsafe impl<H: Memory> Memory for Faulty<H> {
    fn alloc_pages(&self, count: usize) -> Result<Pages> {
        self.may_fail(Call::AllocPages)?;
        self.host.alloc_pages(count)
    }
    unsafe fn free_pages(&self, pages: Pages) {
        // SAFETY: the caller's promise.
        unsafe { self.host.free_pages(pages) }
    }
    fn memory_bytes(&self) -> u64 {
        self.host.memory_bytes()
    }
}

impl<H: Threads> Threads for Faulty<H> {
    fn spawn(&self, spec: ThreadSpec<'_>, entry: Box<dyn FnOnce() + Send + 'static>) -> Result<ThreadId> {
        self.may_fail(Call::Spawn)?;
        self.host.spawn(spec, entry)
    }
    fn join(&self, thread: ThreadId) -> Result<()> {
        self.host.join(thread)
    }
    fn park(&self, word: &atomic::AtomicU32, expected: u32, deadline_ns: Option<u64>) -> ParkResult {
        if self.plan.decide(Call::Park).is_some() {
            // As another thread's turn would be, so that a caller that loops does not keep others from running.
            self.host.yield_now();
            return ParkResult::Woken;
        }
        self.host.park(word, expected, deadline_ns)
    }
    fn unpark(&self, word: &atomic::AtomicU32, count: u32) -> u32 {
        self.host.unpark(word, count)
    }
    fn yield_now(&self) {
        self.host.yield_now();
    }
}

impl<H: Cpus> Cpus for Faulty<H> {
    #[inline]
    fn cpu_count(&self) -> u32 {
        self.host.cpu_count()
    }
    #[inline]
    fn current_cpu(&self) -> CpuId {
        self.host.current_cpu()
    }
}

impl<H: Entropy> Entropy for Faulty<H> {
    fn fill_random(&self, buf: &mut [u8]) -> Result<()> {
        self.may_fail(Call::FillRandom)?;
        self.host.fill_random(buf)
    }
}

impl<H: Params> Params for Faulty<H> {
    fn param(&self, key: &str, buf: &mut [u8]) -> Result<usize> {
        self.may_fail(Call::Param)?;
        self.host.param(key, buf)
    }
}

impl<H: Console> Console for Faulty<H> {
    fn console_write(&self, bytes: &[u8]) {
        self.host.console_write(bytes);
    }
}

impl<H: Exit> Exit for Faulty<H> {
    fn exit(&self, status: ExitStatus) -> ! {
        self.host.exit(status)
    }
}

#[expect(unsafe_code, reason = "forwards")]
// SAFETY: blocks and mappings are the inner host's.
unsafe impl<H: Dma> Dma for Faulty<H> {
    fn dma_alloc(&self, len: usize, align: usize) -> Result<DmaBlock> {
        self.may_fail(Call::DmaAlloc)?;
        self.host.dma_alloc(len, align)
    }
    unsafe fn dma_free(&self, block: DmaBlock) {
        // SAFETY: the caller's promise.
        unsafe { self.host.dma_free(block) }
    }
    unsafe fn dma_map(&self, buf: NonNull<[u8]>, direction: DmaDirection) -> Result<DmaAddr> {
        self.may_fail(Call::DmaMap)?;
        // SAFETY: the caller's promise.
        unsafe { self.host.dma_map(buf, direction) }
    }
    unsafe fn dma_unmap(&self, device: DmaAddr, buf: NonNull<[u8]>, direction: DmaDirection) {
        // SAFETY: the caller's promise.
        unsafe { self.host.dma_unmap(device, buf, direction) }
    }
    #[inline]
    unsafe fn dma_read(&self, block: &DmaBlock, offset: usize, width: Width) -> u64 {
        // SAFETY: the caller's promise.
        unsafe { self.host.dma_read(block, offset, width) }
    }
    #[inline]
    unsafe fn dma_copy(&self, block: &DmaBlock, offset: usize, to: &mut [u8]) {
        // SAFETY: the caller's promise.
        unsafe { self.host.dma_copy(block, offset, to) }
    }
}

impl<H: Mmio> Mmio for Faulty<H> {
    fn mmio_devices(&self, found: &mut dyn FnMut(MmioDevice)) {
        self.host.mmio_devices(found);
    }
    fn mmio_map(&self, at: PhysAddr, len: usize) -> Result<MmioRegion> {
        self.may_fail(Call::MmioMap)?;
        self.host.mmio_map(at, len)
    }
    fn mmio_read(&self, region: MmioRegion, offset: usize, width: Width) -> u64 {
        self.host.mmio_read(region, offset, width)
    }
    fn mmio_write(&self, region: MmioRegion, offset: usize, width: Width, value: u64) {
        self.host.mmio_write(region, offset, width, value);
    }
}

impl<H: Pci> Pci for Faulty<H> {
    fn pci_functions(&self, found: &mut dyn FnMut(PciAddress)) {
        self.host.pci_functions(found);
    }
    fn pci_read(&self, function: PciAddress, offset: u16, width: Width) -> Result<u32> {
        self.may_fail(Call::PciRead)?;
        self.host.pci_read(function, offset, width)
    }
    fn pci_write(&self, function: PciAddress, offset: u16, width: Width, value: u32) -> Result<()> {
        self.may_fail(Call::PciWrite)?;
        self.host.pci_write(function, offset, width, value)
    }
}

impl<H: Irq> Irq for Faulty<H> {
    fn irq_attach(&self, source: IrqSource, cpu: CpuId, signal: Arc<Signal>) -> Result<IrqId> {
        self.may_fail(Call::IrqAttach)?;
        self.host.irq_attach(source, cpu, signal)
    }
    fn irq_unmask(&self, irq: IrqId) {
        self.host.irq_unmask(irq);
    }
    fn irq_detach(&self, irq: IrqId) {
        self.host.irq_detach(irq);
    }
}

impl<H: HostBlock> HostBlock for Faulty<H> {
    fn disk_count(&self) -> u32 {
        self.host.disk_count()
    }
    fn disk_info(&self, disk: u32) -> Result<DiskInfo> {
        self.may_fail(Call::DiskInfo)?;
        self.host.disk_info(disk)
    }
    fn disk_read(&self, disk: u32, sector: u64, buf: &mut [u8]) -> Result<()> {
        self.may_fail(Call::DiskRead)?;
        self.host.disk_read(disk, sector, buf)
    }
    fn disk_write(&self, disk: u32, sector: u64, buf: &[u8]) -> Result<()> {
        self.may_fail(Call::DiskWrite)?;
        self.host.disk_write(disk, sector, buf)
    }
    fn disk_flush(&self, disk: u32) -> Result<()> {
        self.may_fail(Call::DiskFlush)?;
        self.host.disk_flush(disk)
    }
}

impl<H: HostLink> HostLink for Faulty<H> {
    fn link_count(&self) -> u32 {
        self.host.link_count()
    }
    fn link_open(&self, link: u32, signal: Arc<Signal>) -> Result<LinkInfo> {
        self.may_fail(Call::LinkOpen)?;
        self.host.link_open(link, signal)
    }
    fn link_send(&self, link: u32, frame: &[u8]) -> Result<()> {
        self.may_fail(Call::LinkSend)?;
        self.host.link_send(link, frame)
    }
    fn link_receive(&self, link: u32, buf: &mut [u8]) -> Result<usize> {
        let len = self.host.link_receive(link, buf)?;
        // Only where there was a frame: that one is dropped now.
        self.may_fail(Call::LinkReceive)?;
        Ok(len)
    }
    fn link_close(&self, link: u32) {
        self.host.link_close(link);
    }
}

impl<H: HostUsb> HostUsb for Faulty<H> {
    fn usb_watch(&self, signal: Option<Arc<Signal>>) -> Result<()> {
        // To end it does not fail: the host would keep a signal that nobody waits for.
        if signal.is_some() {
            self.may_fail(Call::UsbWatch)?;
        }
        self.host.usb_watch(signal)
    }
    fn usb_devices(&self, found: &mut dyn FnMut(UsbDeviceInfo)) {
        self.host.usb_devices(found);
    }
    fn usb_descriptors(&self, device: UsbDeviceId, buf: &mut [u8]) -> Result<usize> {
        self.may_fail(Call::UsbDescriptors)?;
        self.host.usb_descriptors(device, buf)
    }
    fn usb_open(&self, device: UsbDeviceId, signal: Arc<Signal>) -> Result<()> {
        self.may_fail(Call::UsbOpen)?;
        self.host.usb_open(device, signal)
    }
    fn usb_close(&self, device: UsbDeviceId) {
        self.host.usb_close(device);
    }
    fn usb_configure(&self, device: UsbDeviceId, configuration: u8) -> Result<()> {
        self.may_fail(Call::UsbConfigure)?;
        self.host.usb_configure(device, configuration)
    }
    fn usb_claim(&self, device: UsbDeviceId, interface: u8) -> Result<()> {
        self.may_fail(Call::UsbClaim)?;
        self.host.usb_claim(device, interface)
    }
    fn usb_release(&self, device: UsbDeviceId, interface: u8) {
        self.host.usb_release(device, interface);
    }
    fn usb_set_alternate(&self, device: UsbDeviceId, interface: u8, alternate: u8) -> Result<()> {
        self.may_fail(Call::UsbSetAlternate)?;
        self.host.usb_set_alternate(device, interface, alternate)
    }
    fn usb_clear_halt(&self, device: UsbDeviceId, endpoint: u8) -> Result<()> {
        self.may_fail(Call::UsbClearHalt)?;
        self.host.usb_clear_halt(device, endpoint)
    }
    fn usb_reset(&self, device: UsbDeviceId) -> Result<()> {
        self.may_fail(Call::UsbReset)?;
        self.host.usb_reset(device)
    }
    fn usb_submit(&self, device: UsbDeviceId, transfer: UsbTransfer) -> Result<(), UsbRefused> {
        match self.may_fail(Call::UsbSubmit) {
            Ok(()) => self.host.usb_submit(device, transfer),
            Err(error) => Err(UsbRefused { transfer, error }),
        }
    }
    fn usb_cancel(&self, device: UsbDeviceId, tag: u64) {
        self.host.usb_cancel(device, tag);
    }
    fn usb_reap(&self, device: UsbDeviceId) -> Option<UsbCompletion> {
        self.host.usb_reap(device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestHost;

    fn plan(plan: FaultPlan) -> &'static FaultPlan {
        Box::leak(Box::new(plan))
    }

    #[test]
    fn the_nth_call_fails_and_only_that() {
        let plan = plan(FaultPlan::new(Fault::Nth(2)));
        let host = Faulty::new(TestHost::new(), plan);
        let mut one = [0];
        assert_eq!(host.fill_random(&mut one), Ok(()));
        let pages = host.alloc_pages(1).unwrap_err();
        assert_eq!(pages, Error::NoMemory);
        assert_eq!(host.fill_random(&mut one), Ok(()));
        assert_eq!((plan.counted(), plan.injected()), (3, 1));
        let last = plan.last().unwrap();
        assert_eq!((last.n, last.call, last.error), (2, Call::AllocPages, Some(Error::NoMemory)));
        assert_eq!(alloc::format!("{last}"), "call 2 (alloc_pages) failed: out of memory");
    }

    #[test]
    fn one_kind_from_some_call_on() {
        let plan = plan(FaultPlan::only(Call::FillRandom, Fault::From(2)));
        let host = Faulty::new(TestHost::new(), plan);
        let results: alloc::vec::Vec<_> = (0..4).map(|_| host.fill_random(&mut [0]).is_ok()).collect();
        assert_eq!(results, [true, false, false, false]);
        assert_eq!(plan.counted(), 4);
        assert_eq!(host.param("none", &mut []), Err(Error::NotFound));
        assert_eq!(plan.counted(), 4);
    }

    #[test]
    fn a_park_returns_for_no_reason() {
        let host = Faulty::new(TestHost::new(), plan(FaultPlan::only(Call::Park, Fault::Nth(1))));
        let word = atomic::AtomicU32::new(0);
        assert_eq!(host.park(&word, 0, None), ParkResult::Woken);
        assert_eq!(host.plan().last().unwrap().error, None);
    }

    #[test]
    fn chance_is_the_same_for_the_same_seed() {
        let run = |seed| {
            let host =
                Faulty::new(TestHost::new(), plan(FaultPlan::new(Fault::Random { seed, ppm: 300_000 })));
            let results =
                (0..1000).map(|_| host.fill_random(&mut [0]).is_ok()).collect::<alloc::vec::Vec<_>>();
            assert!((200..400).contains(&host.plan().injected()), "{}", host.plan().injected());
            results
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    /// Every error is one that the call documents; a call with a result that it can refuse is not forgotten.
    #[test]
    fn every_call_that_can_fail_can_be_made_to() {
        let infallible = Call::ALL.iter().filter(|call| errors(**call).is_empty()).count();
        assert_eq!(Call::ALL.len() - infallible, 26);
    }
}
