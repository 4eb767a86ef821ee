//! [`TestHost`]: a host on std threads, for the unit tests of other crates.
//!
//! Every instance stands alone. Time is real unless the host was made with [`TestHost::with_virtual_time`]; then it
//! stands still until [`TestHost::advance`].
//!
//! It has the driver contracts too, with a device side for tests to play: memory that a device reaches only while it is
//! mapped ([`TestHost::dma_read`]), interrupts ([`TestHost::fire`]), register models ([`TestHost::add_mmio_device`],
//! [`TestHost::add_pci_function`]), disks with a volatile cache ([`TestHost::add_disk`]) links on a wire that loses
//! frames when told to ([`TestHost::add_link_pair`]) and USB devices ([`TestHost::plug_usb`]). Misuse of DMA panics with what was done.
#![expect(unsafe_code, reason = "hands out pages")]

mod block;
mod device;
mod dma;
mod link;
mod usb;

pub use block::DiskCalls;
pub use device::Registers;
pub use usb::{UsbLoopback, UsbModel, UsbReply, UsbStandard, reply as usb_reply, usb_progress};

use crate::atomic::AtomicU32;
use crate::*;
use alloc::{boxed::Box, string::String, vec::Vec};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::collections::HashMap;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// A host for tests. The handle is leaked, as tests are short.
#[derive(Clone, Copy)]
pub struct TestHost(&'static Inner);

struct Inner {
    start: Instant,
    virtual_ns: Option<AtomicU64>,
    cpus: u32,
    parked: Mutex<HashMap<usize, Vec<&'static Parker>>>,
    threads: Mutex<HashMap<u64, std::thread::JoinHandle<()>>>,
    config: Mutex<Option<String>>,
    console: Mutex<Vec<u8>>,
    seed: AtomicU64,
    pages: AtomicUsize,
    fail_pages: AtomicBool,
    dma: Mutex<dma::DmaTable>,
    devices: Mutex<device::Devices>,
    disks: Mutex<Vec<block::Disk>>,
    links: Mutex<Vec<link::End>>,
    usb: Mutex<usb::Bus>,
}

struct Parker {
    woken: Mutex<bool>,
    cond: Condvar,
}

/// Shared by all hosts of a process, so that [`SELF`] names one thread.
static NEXT_THREAD: AtomicU64 = AtomicU64::new(1);

std::thread_local! {
    static PARKER: &'static Parker =
        Box::leak(Box::new(Parker { woken: Mutex::new(false), cond: Condvar::new() }));
    /// Which thread this is, 0 for one that no host started, and the CPU it is bound to.
    static SELF: core::cell::Cell<(u64, u32)> = const { core::cell::Cell::new((0, 0)) };
}

impl Default for TestHost {
    fn default() -> Self {
        Self::new()
    }
}

impl TestHost {
    /// A host with two CPUs and real time.
    pub fn new() -> Self {
        Self::make(None)
    }

    /// A host whose time starts at 1 s and moves only by [`TestHost::advance`].
    pub fn with_virtual_time() -> Self {
        Self::make(Some(AtomicU64::new(1_000_000_000)))
    }

    fn make(virtual_ns: Option<AtomicU64>) -> Self {
        Self(Box::leak(Box::new(Inner {
            start: Instant::now(),
            virtual_ns,
            cpus: 2,
            parked: Mutex::default(),
            threads: Mutex::default(),
            config: Mutex::new(None),
            console: Mutex::default(),
            seed: AtomicU64::new(0x9e37_79b9_7f4a_7c15),
            pages: AtomicUsize::new(0),
            fail_pages: AtomicBool::new(false),
            dma: Mutex::default(),
            devices: Mutex::default(),
            disks: Mutex::default(),
            links: Mutex::default(),
            usb: Mutex::default(),
        })))
    }

    /// Sets the parameter `config`.
    pub fn set_config(&self, json: &str) {
        *self.0.config.lock().unwrap() = Some(json.into());
    }

    /// Moves virtual time on by `ns` and wakes every parked thread to look at its deadline.
    pub fn advance(&self, ns: u64) {
        self.0.virtual_ns.as_ref().expect("a host with virtual time").fetch_add(ns, Ordering::SeqCst);
        self.wake_everybody();
    }

    /// Every parked thread returns for no reason, which the contract allows.
    pub fn wake_everybody(&self) {
        let parked: Vec<_> = self.0.parked.lock().unwrap().drain().flat_map(|(_, list)| list).collect();
        for parker in parked {
            parker.wake();
        }
    }

    /// How many threads are parked on `word` now.
    pub fn sleepers(&self, word: &AtomicU32) -> usize {
        let key = core::ptr::from_ref(word).addr();
        self.0.parked.lock().unwrap().get(&key).map_or(0, Vec::len)
    }

    /// Whether `thread` is the caller.
    pub fn is_current(thread: ThreadId) -> bool {
        SELF.get().0 == thread.0
    }

    /// From now on every page allocation fails, or none does.
    pub fn fail_pages(&self, fail: bool) {
        self.0.fail_pages.store(fail, Ordering::SeqCst);
    }

    /// How many pages are handed out and not yet freed.
    pub fn pages_in_use(&self) -> usize {
        self.0.pages.load(Ordering::SeqCst)
    }

    /// How many threads were started and not yet joined.
    pub fn threads_in_use(&self) -> usize {
        self.0.threads.lock().unwrap().len()
    }

    /// What was written to the console so far.
    pub fn console_text(&self) -> String {
        String::from_utf8_lossy(&self.0.console.lock().unwrap()).into_owned()
    }
}

impl Parker {
    fn wake(&self) {
        *self.woken.lock().unwrap() = true;
        self.cond.notify_one();
    }
}

impl Versions for TestHost {
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

impl Clock for TestHost {
    fn monotonic_ns(&self) -> u64 {
        match &self.0.virtual_ns {
            Some(now) => now.load(Ordering::SeqCst),
            None => self.0.start.elapsed().as_nanos() as u64,
        }
    }
    fn realtime_ns(&self) -> u64 {
        1_700_000_000_000_000_000 + self.monotonic_ns()
    }
}

// SAFETY: pages come from the global allocator with the size and alignment that the contract asks for.
unsafe impl Memory for TestHost {
    fn alloc_pages(&self, count: usize) -> Result<Pages> {
        if self.0.fail_pages.load(Ordering::SeqCst) {
            return Err(Error::NoMemory);
        }
        let bytes = count.checked_mul(PAGE_SIZE).filter(|bytes| *bytes > 0).ok_or(Error::Invalid)?;
        let layout = core::alloc::Layout::from_size_align(bytes, PAGE_SIZE).map_err(|_| Error::Invalid)?;
        // SAFETY: the layout has a size above 0.
        let base = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).ok_or(Error::NoMemory)?;
        self.0.pages.fetch_add(count, Ordering::SeqCst);
        Ok(Pages { base, count })
    }
    unsafe fn free_pages(&self, pages: Pages) {
        self.0.pages.fetch_sub(pages.count, Ordering::SeqCst);
        let layout =
            core::alloc::Layout::from_size_align(pages.count * PAGE_SIZE, PAGE_SIZE).expect("as allocated");
        // SAFETY: by the contract the pages came from `alloc_pages`, with this layout.
        unsafe { std::alloc::dealloc(pages.base.as_ptr(), layout) }
    }
    fn memory_bytes(&self) -> u64 {
        64 << 20
    }
}

impl Threads for TestHost {
    fn spawn(&self, spec: ThreadSpec<'_>, entry: Box<dyn FnOnce() + Send + 'static>) -> Result<ThreadId> {
        if spec.cpu.is_some_and(|cpu| cpu.0 >= self.0.cpus) {
            return Err(Error::Invalid);
        }
        let id = NEXT_THREAD.fetch_add(1, Ordering::SeqCst);
        let cpu = spec.cpu.map_or(id as u32 % self.0.cpus, |cpu| cpu.0);
        let start = move || {
            SELF.set((id, cpu));
            entry();
        };
        let handle =
            std::thread::Builder::new().name(spec.name.into()).spawn(start).map_err(|_| Error::NoMemory)?;
        self.0.threads.lock().unwrap().insert(id, handle);
        Ok(ThreadId(id))
    }
    fn join(&self, thread: ThreadId) -> Result<()> {
        if Self::is_current(thread) {
            return Err(Error::NotFound);
        }
        let handle = self.0.threads.lock().unwrap().remove(&thread.0).ok_or(Error::NotFound)?;
        handle.join().map_err(|_| Error::Gone)
    }
    fn park(&self, word: &AtomicU32, expected: u32, deadline_ns: Option<u64>) -> ParkResult {
        let key = core::ptr::from_ref(word).addr();
        PARKER.with(|parker| {
            {
                let mut parked = self.0.parked.lock().unwrap();
                if word.load(Ordering::SeqCst) != expected {
                    return ParkResult::Changed;
                }
                *parker.woken.lock().unwrap() = false;
                parked.entry(key).or_default().push(parker);
            }
            let mut woken = parker.woken.lock().unwrap();
            while !*woken {
                match deadline_ns {
                    None => woken = parker.cond.wait(woken).unwrap(),
                    Some(deadline) => {
                        let now = self.monotonic_ns();
                        if now >= deadline {
                            drop(woken);
                            let mut parked = self.0.parked.lock().unwrap();
                            let list = parked.entry(key).or_default();
                            let before = list.len();
                            list.retain(|other| !core::ptr::eq(*other, *parker));
                            // An unpark that counted us just now must not be lost on a timeout.
                            let counted = list.len() == before;
                            return if counted { ParkResult::Woken } else { ParkResult::TimedOut };
                        }
                        // Virtual time does not pass while we wait: only `advance` wakes us then.
                        let wait = if self.0.virtual_ns.is_some() {
                            Duration::from_millis(50)
                        } else {
                            Duration::from_nanos(deadline - now)
                        };
                        woken = parker.cond.wait_timeout(woken, wait).unwrap().0;
                    }
                }
            }
            ParkResult::Woken
        })
    }
    fn unpark(&self, word: &AtomicU32, count: u32) -> u32 {
        let key = core::ptr::from_ref(word).addr();
        let mut parked = self.0.parked.lock().unwrap();
        let Some(list) = parked.get_mut(&key) else { return 0 };
        let n = list.len().min(count as usize);
        let wake: Vec<_> = list.drain(..n).collect();
        if list.is_empty() {
            parked.remove(&key);
        }
        drop(parked);
        for parker in wake {
            parker.wake();
        }
        n as u32
    }
    fn yield_now(&self) {
        std::thread::yield_now();
    }
}

impl Cpus for TestHost {
    fn cpu_count(&self) -> u32 {
        self.0.cpus
    }
    fn current_cpu(&self) -> CpuId {
        // A thread that this host did not start, the test's own, counts as running on CPU 0.
        CpuId(SELF.get().1)
    }
}

impl Entropy for TestHost {
    fn fill_random(&self, buf: &mut [u8]) -> Result<()> {
        for byte in buf {
            // xorshift64*: repeatable, which is what a test wants.
            let mut x = self.0.seed.load(Ordering::Relaxed);
            x ^= x >> 12;
            x ^= x << 25;
            x ^= x >> 27;
            self.0.seed.store(x, Ordering::Relaxed);
            *byte = (x.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8;
        }
        Ok(())
    }
}

impl Params for TestHost {
    fn param(&self, key: &str, buf: &mut [u8]) -> Result<usize> {
        let config = self.0.config.lock().unwrap();
        let value = config.as_ref().filter(|_| key == "config").ok_or(Error::NotFound)?;
        buf.get_mut(..value.len()).ok_or(Error::BufferTooSmall)?.copy_from_slice(value.as_bytes());
        Ok(value.len())
    }
}

impl Console for TestHost {
    fn console_write(&self, bytes: &[u8]) {
        self.0.console.lock().unwrap().extend_from_slice(bytes);
    }
}

impl Exit for TestHost {
    fn exit(&self, status: ExitStatus) -> ! {
        panic!("the domain exits with {status:?}")
    }
}
