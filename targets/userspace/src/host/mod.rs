//! [`PosixHost`]: the contract bound to a POSIX process (Linux: futexes, mmap, getrandom).
//!
//! A host handle is `Copy` and may be kept by anybody for ever, yet an instance must give everything back when it is
//! retired. So a handle names a *slot* and a generation. Slots are few bytes, never freed and used again; what is costly
//! (threads, descriptors, buffers) hangs off the slot and goes when its owner, [`HostOwner`], is dropped. A handle of an
//! earlier generation then finds nothing: its calls fail with `Gone` or `NotFound`, and those that need no instance
//! (time, parking, freeing pages) still work.

mod console;
mod device;
mod memory;
mod system;
mod thread;

pub use console::{ConsoleSink, ConsoleText};
pub use system::DomainExit;

use crate::disk::HostDisk;
use crate::link::{Link, LinkPort, Pcap};
use crate::usb::UsbBus;
use hypercall::ExitStatus;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard};

/// A lock whose holder panicked still guards consistent data here: everything under it is changed in one step.
pub(crate) trait Recover<T> {
    /// The guard, poisoned or not.
    fn recover(self) -> T;
}

impl<T> Recover<T> for Result<T, PoisonError<T>> {
    fn recover(self) -> T {
        self.unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a host is made of.
#[derive(Debug, Default)]
pub struct HostSetup {
    /// Shown before each console line when not empty, and as the prefix of thread names.
    pub name: String,
    /// Virtual CPUs; 0 counts as 1.
    pub cpus: u32,
    /// Bytes of memory that the domain may use; 0: a quarter of the machine's.
    pub memory: u64,
    /// Bind virtual CPU `n` to a host CPU. Worth it for one instance with the machine to itself.
    pub pin: bool,
    /// Parameters; `config` is the JSON configuration.
    pub params: HashMap<String, String>,
    /// Where the console goes.
    pub console: ConsoleSink,
    /// `disk0`, `disk1`, ...
    pub disks: Vec<HostDisk>,
    /// `nic0`, `nic1`, ...
    pub links: Vec<Link>,
    /// USB devices of this machine.
    pub usb: Option<Arc<UsbBus>>,
    /// Where frames of all links are recorded.
    pub pcap: Option<Arc<Pcap>>,
}

type StopHook = Box<dyn Fn() + Send + Sync>;

/// An instance's own things.
struct Inner {
    name: String,
    memory: u64,
    memory_used: Arc<AtomicU64>,
    /// Host CPUs that virtual CPUs are bound to, if they are.
    pins: Vec<usize>,
    params: HashMap<String, String>,
    console: console::Console,
    threads: Mutex<HashMap<u64, std::thread::JoinHandle<()>>>,
    next_thread: AtomicU64,
    exit: OnceLock<ExitStatus>,
    stop_hook: OnceLock<StopHook>,
    disks: Vec<Arc<HostDisk>>,
    links: Vec<LinkPort>,
    usb: Option<Arc<UsbBus>>,
    retired: AtomicBool,
}

struct Slot(RwLock<Live>);

struct Live {
    generation: u32,
    inner: Option<Arc<Inner>>,
}

static FREE_SLOTS: Mutex<Vec<&'static Slot>> = Mutex::new(Vec::new());

/// A handle to an instance's host.
#[derive(Clone, Copy)]
pub struct PosixHost {
    slot: &'static Slot,
    generation: u32,
    cpus: u32,
}

impl std::fmt::Debug for PosixHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.inner() {
            Some(inner) => write!(f, "PosixHost({:?})", inner.name),
            None => f.write_str("PosixHost(retired)"),
        }
    }
}

impl PosixHost {
    fn live(&self) -> RwLockReadGuard<'static, Live> {
        self.slot.0.read().recover()
    }

    /// Calls `f` with the instance's things, without counting references. `f` must not block for long: retiring waits.
    fn with<R>(&self, f: impl FnOnce(&Inner) -> R) -> Option<R> {
        let live = self.live();
        live.inner.as_deref().filter(|_| live.generation == self.generation).map(f)
    }

    /// The instance's things, for calls that block.
    fn inner(&self) -> Option<Arc<Inner>> {
        let live = self.live();
        live.inner.clone().filter(|_| live.generation == self.generation)
    }

    pub(crate) fn usb_bus(&self) -> Option<Arc<UsbBus>> {
        self.with(|inner| inner.usb.clone()).flatten()
    }

    /// How the domain ended, if [`hypercall::Exit::exit`] was called or a thread panicked.
    pub fn exit_status(&self) -> Option<ExitStatus> {
        self.with(|inner| inner.exit.get().copied()).flatten()
    }

    /// Bytes of pages handed out and not freed.
    pub fn memory_used(&self) -> u64 {
        self.with(|inner| inner.memory_used.load(std::sync::atomic::Ordering::Relaxed)).unwrap_or(0)
    }
}

/// Owns what a host holds: dropping it retires the host.
#[derive(Debug)]
pub struct HostOwner(PosixHost);

impl HostOwner {
    /// A new host.
    pub fn new(setup: HostSetup) -> Self {
        let cpus = setup.cpus.clamp(1, 4096);
        let memory = match setup.memory {
            0 => machine_memory() / 4,
            bytes => bytes,
        };
        let pcap = setup.pcap;
        let inner = Arc::new(Inner {
            console: console::Console::new(setup.console, &setup.name),
            name: setup.name,
            memory,
            memory_used: Arc::default(),
            pins: if setup.pin { thread::choose_pins(cpus) } else { Vec::new() },
            params: setup.params,
            threads: Mutex::default(),
            next_thread: AtomicU64::new(1),
            exit: OnceLock::new(),
            stop_hook: OnceLock::new(),
            disks: setup.disks.into_iter().map(Arc::new).collect(),
            links: setup
                .links
                .into_iter()
                .enumerate()
                .map(|(i, link)| LinkPort::new(i, link, pcap.clone()))
                .collect(),
            usb: setup.usb,
            retired: AtomicBool::new(false),
        });
        let free = FREE_SLOTS.lock().recover().pop();
        let slot: &'static Slot = free
            .unwrap_or_else(|| Box::leak(Box::new(Slot(RwLock::new(Live { generation: 0, inner: None })))));
        let mut live = slot.0.write().recover();
        live.inner = Some(inner);
        Self(PosixHost { slot, generation: live.generation, cpus })
    }

    /// The handle.
    pub fn host(&self) -> PosixHost {
        self.0
    }

    /// `hook` runs when the domain ends by itself, on the thread that ended it, after that was unwound. Only the first
    /// hook counts.
    pub fn set_stop_hook(&self, hook: impl Fn() + Send + Sync + 'static) {
        self.0.with(|inner| inner.stop_hook.set(Box::new(hook)).is_ok());
    }
}

impl Drop for HostOwner {
    fn drop(&mut self) {
        let mut live = self.0.slot.0.write().recover();
        let inner = live.inner.take();
        live.generation = live.generation.wrapping_add(1);
        drop(live);
        if let Some(inner) = inner {
            inner.retire();
        }
        FREE_SLOTS.lock().recover().push(self.0.slot);
    }
}

impl Inner {
    fn retire(&self) {
        self.retired.store(true, std::sync::atomic::Ordering::Release);
        for link in &self.links {
            link.close();
        }
        if let Some(usb) = &self.usb {
            usb.retire();
        }
        self.console.finish();
        // Who still runs was not joined as the contract asks; the thread frees itself when it ends.
        self.threads.lock().recover().clear();
    }
}

fn machine_memory() -> u64 {
    let info = rustix::system::sysinfo();
    // The field is as wide as the platform's unsigned long.
    #[expect(clippy::useless_conversion, reason = "32-bit platforms")]
    u64::from(info.totalram).saturating_mul(info.mem_unit.into())
}
