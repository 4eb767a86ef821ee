//! A host of one thread and virtual time, reset for every execution.
//!
//! Threads that a component starts are kept; a harness runs one of them itself ([`FuzzHost::run_thread`]). When that one
//! goes to sleep, the harness's [`Script`] plays the rest of the world: the device, the peer, the application. When nobody
//! is left who could wake a sleeper, that is a deadlock, and a finding.

use crate::watch;
use hypercall::atomic::AtomicU32;
use hypercall::*;
use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What happens while the component's thread sleeps.
pub trait Script: Send {
    /// One step. `false`: the story is over; the script has stopped what it started.
    fn step(&mut self, host: FuzzHost) -> bool;
}

/// A device behind the device contracts.
pub trait Device: Send {
    /// A register is read.
    fn read(&mut self, dma: &mut DmaMemory, offset: usize, width: Width) -> u64;
    /// A register is written.
    fn write(&mut self, dma: &mut DmaMemory, offset: usize, width: Width, value: u64);
    /// Time passes, or the driver is about to read shared memory: the device may do anything.
    fn tick(&mut self, dma: &mut DmaMemory);
    /// Whether it wants to interrupt.
    fn interrupt(&mut self) -> bool;
    /// Its place on PCI; `None`: it is behind virtio-mmio.
    fn pci(&mut self) -> Option<&mut [u8]> {
        None
    }
    /// Its place on PCI is written.
    fn pci_write(&mut self, _offset: usize, _bytes: &[u8]) {}
}

/// A link that the harness is at the other end of.
#[derive(Default)]
pub struct Link {
    /// What its contract says of it.
    pub info: Option<LinkInfo>,
    /// Frames on their way to the component; `Err` is what the call returns instead.
    pub incoming: VecDeque<Result<Vec<u8>>>,
    /// Frames that the component sent.
    pub outgoing: VecDeque<Vec<u8>>,
    /// What sending returns instead, for the next calls.
    pub refuse: VecDeque<Error>,
    /// Says that it received this many bytes more than it did.
    pub lie: usize,
    signal: Option<Arc<Signal>>,
}

type Entry = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    now_ns: u64,
    seed: u64,
    threads: VecDeque<Entry>,
    link: Link,
    signals: Vec<(IrqId, Arc<Signal>)>,
    next_irq: u32,
    memory_bytes: u64,
    refuse_threads: bool,
}

struct Inner {
    state: Mutex<State>,
    script: Mutex<Option<Box<dyn Script>>>,
    device: Mutex<Option<Box<dyn Device>>>,
    dma: Mutex<DmaMemory>,
}

/// The handle. There is one host for each thread of the fuzzer's process.
#[derive(Clone, Copy)]
pub struct FuzzHost(&'static Inner);

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

std::thread_local! {
    static HOST: FuzzHost = FuzzHost(Box::leak(Box::new(Inner {
        state: Mutex::default(),
        script: Mutex::default(),
        device: Mutex::default(),
        dma: Mutex::new(DmaMemory::new()),
    })));
}

impl FuzzHost {
    /// The host of this thread, as new.
    pub fn fresh() -> Self {
        let host = HOST.with(|host| *host);
        host.clear_script();
        let device = lock(&host.0.device).take();
        drop(device);
        let state = State { now_ns: 1_000_000_000, seed: 1, memory_bytes: 16 << 20, ..State::default() };
        let old = core::mem::replace(&mut *lock(&host.0.state), state);
        drop(old);
        lock(&host.0.dma).reset();
        host
    }

    /// From now on no thread can be started.
    pub fn refuse_threads(self) {
        lock(&self.0.state).refuse_threads = true;
    }

    /// Looks at the host link.
    pub fn link<R>(self, look: impl FnOnce(&mut Link) -> R) -> R {
        look(&mut lock(&self.0.state).link)
    }

    /// Puts what happened on the link before the component's eyes.
    pub fn raise_link(self) {
        let signal = lock(&self.0.state).link.signal.clone();
        if let Some(signal) = signal {
            signal.raise(&self);
        }
    }

    /// Gives the host a device, and lets it act whenever a driver is about to read shared memory.
    pub fn set_device(self, device: impl Device + 'static) {
        *lock(&self.0.device) = Some(Box::new(device));
    }

    /// Lets the device act, and delivers its interrupt.
    pub fn tick(self) {
        let Ok(mut device) = self.0.device.try_lock() else { return };
        let Some(device) = device.as_mut() else { return };
        device.tick(&mut lock(&self.0.dma));
        let raise = device.interrupt();
        if raise {
            let signals: Vec<Arc<Signal>> =
                lock(&self.0.state).signals.iter().map(|(_, signal)| signal.clone()).collect();
            signals.iter().for_each(|signal| signal.raise(&self));
        }
    }

    /// Reads what is in a block that a driver and the device share.
    fn shared(self, block: &DmaBlock, offset: usize, to: &mut [u8]) {
        let len = to.len();
        assert!(offset + len <= block.len, "{len} bytes at {offset} are outside {block:?}");
        let at = (block.device.0 - DMA_BASE) as usize + offset;
        to.copy_from_slice(lock(&self.0.dma).slice(at, len).expect("inside"));
    }

    /// How many blocks of device memory are in use.
    pub fn dma_blocks(self) -> usize {
        lock(&self.0.dma).blocks.len()
    }

    /// Lets time pass.
    pub fn advance(self, ns: u64) {
        let mut state = lock(&self.0.state);
        state.now_ns = state.now_ns.saturating_add(ns);
    }

    /// From now on `script` plays the world whenever a thread sleeps.
    pub fn set_script(self, script: impl Script + 'static) {
        *lock(&self.0.script) = Some(Box::new(script));
    }

    /// Ends the script, if it is not over.
    pub fn clear_script(self) {
        let script = lock(&self.0.script).take();
        drop(script);
    }

    /// Runs the oldest thread that was started and has not run, on this thread, while `script` plays the world.
    pub fn run_thread(self, script: impl Script + 'static) {
        let entry = lock(&self.0.state).threads.pop_front();
        self.set_script(script);
        if let Some(entry) = entry {
            entry();
        }
        self.clear_script();
    }

    /// Runs every other thread that was started. The instance is stopping, so that each ends.
    pub fn run_rest(self) {
        loop {
            let Some(entry) = lock(&self.0.state).threads.pop_front() else { return };
            entry();
        }
    }
}

impl Versions for FuzzHost {
    fn contracts(&self) -> &'static [ContractVersion] {
        &[
            ContractVersion::CORE,
            ContractVersion::DMA,
            ContractVersion::MMIO,
            ContractVersion::PCI,
            ContractVersion::IRQ,
            ContractVersion::BLOCK,
            ContractVersion::LINK,
        ]
    }
}

impl Clock for FuzzHost {
    fn monotonic_ns(&self) -> u64 {
        // A little for every look, so that waiting by looking ends.
        let mut state = lock(&self.0.state);
        state.now_ns += 100;
        state.now_ns
    }
    fn realtime_ns(&self) -> u64 {
        1_700_000_000_000_000_000 + lock(&self.0.state).now_ns
    }
}

// SAFETY: pages come from the global allocator with the size and alignment that the contract asks for.
unsafe impl Memory for FuzzHost {
    fn alloc_pages(&self, count: usize) -> Result<Pages> {
        let bytes = count.checked_mul(PAGE_SIZE).filter(|bytes| *bytes > 0).ok_or(Error::Invalid)?;
        let layout = std::alloc::Layout::from_size_align(bytes, PAGE_SIZE).map_err(|_| Error::Invalid)?;
        // SAFETY: the layout has a size above 0.
        let base = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).ok_or(Error::NoMemory)?;
        Ok(Pages { base, count })
    }
    unsafe fn free_pages(&self, pages: Pages) {
        let layout =
            std::alloc::Layout::from_size_align(pages.count * PAGE_SIZE, PAGE_SIZE).expect("as allocated");
        // SAFETY: by the contract the pages came from `alloc_pages`, with this layout.
        unsafe { std::alloc::dealloc(pages.base.as_ptr(), layout) }
    }
    fn memory_bytes(&self) -> u64 {
        lock(&self.0.state).memory_bytes
    }
}

impl Threads for FuzzHost {
    fn spawn(&self, _: ThreadSpec<'_>, entry: Entry) -> Result<ThreadId> {
        let mut state = lock(&self.0.state);
        if state.refuse_threads {
            return Err(Error::NoMemory);
        }
        state.threads.push_back(entry);
        Ok(ThreadId(1))
    }
    fn join(&self, _: ThreadId) -> Result<()> {
        Ok(())
    }
    fn park(&self, word: &AtomicU32, expected: u32, deadline_ns: Option<u64>) -> ParkResult {
        use std::sync::atomic::Ordering::SeqCst;
        watch::step();
        if word.load(SeqCst) != expected {
            return ParkResult::Changed;
        }
        let script = lock(&self.0.script).take();
        if let Some(mut script) = script {
            let more = script.step(*self);
            if more {
                *lock(&self.0.script) = Some(script);
            }
            return ParkResult::Woken;
        }
        self.tick();
        if word.load(SeqCst) != expected {
            return ParkResult::Changed;
        }
        let Some(deadline_ns) = deadline_ns else { panic!("deadlock: asleep, and nobody is left to wake") };
        let mut state = lock(&self.0.state);
        state.now_ns = state.now_ns.max(deadline_ns);
        ParkResult::TimedOut
    }
    fn unpark(&self, _: &AtomicU32, _: u32) -> u32 {
        0
    }
    fn yield_now(&self) {
        watch::step();
        self.tick();
        self.advance(50_000_000);
    }
}

impl Cpus for FuzzHost {
    fn cpu_count(&self) -> u32 {
        1
    }
    fn current_cpu(&self) -> CpuId {
        CpuId(0)
    }
}

impl Entropy for FuzzHost {
    fn fill_random(&self, buf: &mut [u8]) -> Result<()> {
        let mut state = lock(&self.0.state);
        for byte in buf {
            state.seed =
                state.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = (state.seed >> 56) as u8;
        }
        Ok(())
    }
}

impl Params for FuzzHost {
    fn param(&self, _: &str, _: &mut [u8]) -> Result<usize> {
        Err(Error::NotFound)
    }
}

impl Console for FuzzHost {
    fn console_write(&self, _: &[u8]) {}
}

impl Exit for FuzzHost {
    fn exit(&self, status: ExitStatus) -> ! {
        panic!("the domain exits with {status:?}")
    }
}

impl HostLink for FuzzHost {
    fn link_count(&self) -> u32 {
        self.link(|link| u32::from(link.info.is_some()))
    }
    fn link_open(&self, _: u32, signal: Arc<Signal>) -> Result<LinkInfo> {
        self.link(|link| {
            link.signal = Some(signal);
            link.info.ok_or(Error::NotFound)
        })
    }
    fn link_send(&self, _: u32, frame: &[u8]) -> Result<()> {
        watch::step();
        self.link(|link| match link.refuse.pop_front() {
            Some(error) => Err(error),
            None => {
                if link.outgoing.len() < 4096 {
                    link.outgoing.push_back(frame.to_vec());
                }
                Ok(())
            }
        })
    }
    fn link_receive(&self, _: u32, buf: &mut [u8]) -> Result<usize> {
        watch::step();
        self.link(|link| {
            let frame = link.incoming.pop_front().unwrap_or(Err(Error::WouldBlock))?;
            let room = buf.get_mut(..frame.len()).ok_or(Error::BufferTooSmall)?;
            room.copy_from_slice(&frame);
            Ok(frame.len() + core::mem::take(&mut link.lie))
        })
    }
    fn link_close(&self, _: u32) {
        self.link(|link| link.signal = None);
    }
}

/// Where devices see their memory.
pub const DMA_BASE: u64 = 0x10_0000;
const DMA_BYTES: usize = 1 << 20;

/// Memory that a driver shares with its device.
pub struct DmaMemory {
    base: NonNull<u8>,
    next: usize,
    /// Offset to length; a mapped buffer also has its address.
    blocks: std::collections::BTreeMap<usize, (usize, Option<usize>)>,
}

// SAFETY: it owns its memory, which is reached through methods only; the driver's own pointers into it follow the
// contract.
unsafe impl Send for DmaMemory {}

impl DmaMemory {
    fn new() -> Self {
        let layout = std::alloc::Layout::from_size_align(DMA_BYTES, 1 << 16).expect("a layout");
        // SAFETY: the size is not 0. Never freed: the host lives as long as its thread.
        let base = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).expect("memory");
        Self { base, next: 0, blocks: Default::default() }
    }

    fn reset(&mut self) {
        // SAFETY: inside the arena; no driver is left that refers to it.
        unsafe { self.base.write_bytes(0, self.next.min(DMA_BYTES)) };
        self.next = 0;
        self.blocks.clear();
    }

    fn take(&mut self, len: usize, align: usize, mapped: Option<usize>) -> Result<usize> {
        if len == 0 || !align.is_power_of_two() || align > 1 << 16 {
            return Err(Error::Invalid);
        }
        // The first gap that is large enough: what was freed is used again.
        let mut at = 0usize;
        for (&start, &(taken, _)) in &self.blocks {
            if start >= at + len {
                break;
            }
            at = (start + taken).next_multiple_of(align);
        }
        if at + len > DMA_BYTES {
            return Err(Error::NoMemory);
        }
        self.next = self.next.max(at + len);
        self.blocks.insert(at, (len, mapped));
        Ok(at)
    }

    fn slice(&mut self, at: usize, len: usize) -> Option<&mut [u8]> {
        let end = at.checked_add(len)?;
        // SAFETY: inside the arena. The driver accesses it atomically or by copies, on this same thread and not now.
        (end <= DMA_BYTES)
            .then(|| unsafe { core::slice::from_raw_parts_mut(self.base.add(at).as_ptr(), len) })
    }

    /// Device memory at the address `addr`, as far as it exists: a hostile device reaches all of it.
    pub fn at(&mut self, addr: u64, len: usize) -> Option<&mut [u8]> {
        self.slice(usize::try_from(addr.checked_sub(DMA_BASE)?).ok()?, len)
    }

    /// Whether a driver shares these bytes with its device now.
    pub fn is_shared(&self, addr: u64, len: usize) -> bool {
        let Some(at) = addr.checked_sub(DMA_BASE).and_then(|at| usize::try_from(at).ok()) else {
            return false;
        };
        let block = self.blocks.range(..=at).next_back();
        block.is_some_and(|(start, (room, _))| at.saturating_add(len) <= start + room)
    }

    /// How much of it is or was in use.
    pub fn used(&self) -> usize {
        self.next
    }
}

// SAFETY: blocks are disjoint and valid for ever; mapped buffers are bounced.
unsafe impl Dma for FuzzHost {
    fn dma_alloc(&self, len: usize, align: usize) -> Result<DmaBlock> {
        let mut dma = lock(&self.0.dma);
        let at = dma.take(len, align, None)?;
        dma.slice(at, len).expect("inside").fill(0);
        // SAFETY: inside the arena.
        let cpu = unsafe { dma.base.add(at) };
        Ok(DmaBlock { cpu, device: DmaAddr(DMA_BASE + at as u64), len })
    }
    unsafe fn dma_free(&self, block: DmaBlock) {
        let known = lock(&self.0.dma).blocks.remove(&((block.device.0 - DMA_BASE) as usize));
        assert_eq!(known, Some((block.len, None)), "freed what was not allocated");
    }
    unsafe fn dma_map(&self, buf: NonNull<[u8]>, direction: DmaDirection) -> Result<DmaAddr> {
        let mut dma = lock(&self.0.dma);
        let at = dma.take(buf.len(), 16, Some(buf.cast::<u8>().as_ptr().addr()))?;
        if direction == DmaDirection::ToDevice {
            let place = dma.slice(at, buf.len()).expect("inside");
            // SAFETY: the driver vouches for the buffer.
            place.copy_from_slice(unsafe { buf.as_ref() });
        }
        Ok(DmaAddr(DMA_BASE + at as u64))
    }
    unsafe fn dma_unmap(&self, device: DmaAddr, mut buf: NonNull<[u8]>, direction: DmaDirection) {
        let at = (device.0 - DMA_BASE) as usize;
        let mut dma = lock(&self.0.dma);
        let known = dma.blocks.remove(&at);
        let expected = (buf.len(), Some(buf.cast::<u8>().as_ptr().addr()));
        assert_eq!(known, Some(expected), "unmapped what was not mapped");
        if direction == DmaDirection::FromDevice {
            let place = dma.slice(at, buf.len()).expect("inside");
            // SAFETY: the driver vouches for the buffer, whose transfer is over.
            unsafe { buf.as_mut() }.copy_from_slice(place);
        }
    }
    unsafe fn dma_read(&self, block: &DmaBlock, offset: usize, width: Width) -> u64 {
        self.tick();
        let at = block.device.0 as usize + offset;
        assert!(at.is_multiple_of(width.bytes()), "{width:?} at {offset} is not aligned");
        let mut bytes = [0; 8];
        self.shared(block, offset, &mut bytes[..width.bytes()]);
        u64::from_le_bytes(bytes)
    }
    unsafe fn dma_copy(&self, block: &DmaBlock, offset: usize, to: &mut [u8]) {
        self.tick();
        self.shared(block, offset, to);
    }
}

/// Where the device's registers are.
pub const REGISTERS: u64 = 0xfeb0_0000;
const REGISTER_BYTES: usize = 0x4000;
/// The interrupt line of the device.
const LINE: u32 = 5;
const FUNCTION: PciAddress = PciAddress { segment: 0, bus: 0, device: 3, function: 0 };

impl FuzzHost {
    fn with_device<R>(self, use_it: impl FnOnce(&mut dyn Device, &mut DmaMemory) -> R) -> Option<R> {
        watch::step();
        let mut device = lock(&self.0.device);
        let result = device.as_mut().map(|device| use_it(&mut **device, &mut lock(&self.0.dma)));
        drop(device);
        self.tick();
        result
    }
}

impl Mmio for FuzzHost {
    fn mmio_devices(&self, found: &mut dyn FnMut(MmioDevice)) {
        let behind_mmio = lock(&self.0.device).as_mut().is_some_and(|device| device.pci().is_none());
        if behind_mmio {
            found(MmioDevice { registers: PhysAddr(REGISTERS), len: 0x200, line: LINE });
        }
    }
    fn mmio_map(&self, at: PhysAddr, len: usize) -> Result<MmioRegion> {
        let offset = at.0.checked_sub(REGISTERS).ok_or(Error::Denied)?;
        if len == 0 {
            return Err(Error::Invalid);
        }
        if offset.checked_add(len as u64).is_none_or(|end| end > REGISTER_BYTES as u64) {
            return Err(Error::Denied);
        }
        // SAFETY: accesses end in the device model, which checks them.
        Ok(unsafe { MmioRegion::new(offset as usize, len) })
    }
    fn mmio_read(&self, region: MmioRegion, offset: usize, width: Width) -> u64 {
        assert!(region.holds(offset, width), "read of {width:?} at {offset:#x} outside {region:?}");
        let value = self.with_device(|device, dma| device.read(dma, region.base() + offset, width));
        // No bus is wider than the access.
        value.unwrap_or(u64::MAX) & (u64::MAX >> (64 - 8 * width.bytes()))
    }
    fn mmio_write(&self, region: MmioRegion, offset: usize, width: Width, value: u64) {
        assert!(region.holds(offset, width), "write of {width:?} at {offset:#x} outside {region:?}");
        self.with_device(|device, dma| device.write(dma, region.base() + offset, width, value));
    }
}

impl Pci for FuzzHost {
    fn pci_functions(&self, found: &mut dyn FnMut(PciAddress)) {
        let on_pci = lock(&self.0.device).as_mut().is_some_and(|device| device.pci().is_some());
        if on_pci {
            found(FUNCTION);
        }
    }
    fn pci_read(&self, function: PciAddress, offset: u16, width: Width) -> Result<u32> {
        watch::step();
        if function != FUNCTION {
            return Err(Error::NotFound);
        }
        if width == Width::U64 || usize::from(offset) % width.bytes() != 0 || offset >= 4096 {
            return Err(Error::Invalid);
        }
        let mut device = lock(&self.0.device);
        let space = device.as_mut().and_then(|device| device.pci()).ok_or(Error::NotFound)?;
        let byte = |at: usize| u32::from(space.get(usize::from(offset) + at).copied().unwrap_or(0xff));
        Ok((0..width.bytes()).rev().fold(0, |value, at| value << 8 | byte(at)))
    }
    fn pci_write(&self, function: PciAddress, offset: u16, width: Width, value: u32) -> Result<()> {
        watch::step();
        if function != FUNCTION {
            return Err(Error::NotFound);
        }
        if let Some(device) = lock(&self.0.device).as_mut() {
            let bytes = value.to_le_bytes();
            device.pci_write(offset.into(), &bytes[..width.bytes().min(4)]);
        }
        Ok(())
    }
}

impl Irq for FuzzHost {
    fn irq_attach(&self, _: IrqSource, _: CpuId, signal: Arc<Signal>) -> Result<IrqId> {
        let mut state = lock(&self.0.state);
        let id = IrqId(state.next_irq);
        state.next_irq += 1;
        state.signals.push((id, signal));
        Ok(id)
    }
    fn irq_unmask(&self, _: IrqId) {}
    fn irq_detach(&self, id: IrqId) {
        let mut state = lock(&self.0.state);
        let at =
            state.signals.iter().position(|(known, _)| *known == id).expect("an interrupt that is attached");
        state.signals.swap_remove(at);
    }
}
