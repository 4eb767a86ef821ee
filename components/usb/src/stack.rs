//! The stack of one host controller, or of the platform's devices: what targets start and ask.

use crate::controller::{HostController, Slot, Translator};
use crate::device::Device;
use crate::engine::{Engine, Turn};
use crate::hub::Ports;
use crate::platform::Claim;
use crate::port;
use crate::quirks::{self, QuirkEntry, Quirks};
use crate::tree::{DriverNote, Listed, Node, NodeDevice, NodeState};
use crate::usbmon::{Capture, Tap};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use anykernel::block::BlockDevice;
use anykernel::config::Config;
use anykernel::counter::Counter;
use anykernel::manifest::Capability;
use anykernel::sync::Mutex;
use anykernel::{Kernel, Manifest, StartError};
use hypercall::{ContractVersion, Host, Signal, UsbPath};

/// What the stack itself uses. A driver for a host controller has a manifest of its own.
pub const MANIFEST: Manifest = Manifest {
    name: "usb",
    summary: "USB host stack: hubs, mass storage, HID, CDC-ECM and CDC-NCM",
    core: &[Capability::Clock, Capability::Threads],
    contracts: &[ContractVersion::CORE],
};

/// What can be chosen about a stack.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Quirks beside those of [`quirks::TABLE`].
    pub quirks: Vec<QuirkEntry>,
    /// Which devices of a platform are taken. A stack on a controller of its own has them all.
    pub claim: Claim,
    /// Who is told of every transfer from the start on.
    pub capture: Option<Capture>,
    /// Devices of a platform that are not taken are opened for a moment, as far as that is allowed, and asked for their names.
    pub ask_names: bool,
}

impl Options {
    /// What a configuration asks of a platform's devices; `None`: nothing, and then no stack is needed.
    pub fn of_config(config: &Config) -> Option<Self> {
        let claim = Claim::of_config(config);
        let app = |at: usize, name: &str| config.app.get(at).is_some_and(|word| word == name);
        let looks = app(0, "usb");
        let wanted = looks || claim != Claim::None;
        wanted.then(|| Self { claim, ask_names: looks && app(1, "list"), ..Self::default() })
    }
}

/// What users can read of a stack, as `usb.NAME`.
pub(crate) struct Counters {
    pub(crate) attached: Counter,
    pub(crate) detached: Counter,
    pub(crate) given_up: Counter,
    pub(crate) retries: Counter,
    pub(crate) resets: Counter,
    pub(crate) lost: Counter,
    pub(crate) storage_recoveries: Counter,
    pub(crate) storage_retries: Counter,
    pub(crate) storage_errors: Counter,
    pub(crate) input_dropped: Counter,
    pub(crate) input_errors: Counter,
    pub(crate) net_dropped: Counter,
    pub(crate) net_bad_frames: Counter,
    pub(crate) net_errors: Counter,
}

impl Counters {
    fn new<H: Host>(kernel: &Kernel<H>) -> Self {
        let counter = |name: &str| kernel.counter(&alloc::format!("usb.{name}"));
        Self {
            attached: counter("attached"),
            detached: counter("detached"),
            given_up: counter("given_up"),
            retries: counter("enumeration_retries"),
            resets: counter("resets"),
            lost: counter("lost_at_reset"),
            storage_recoveries: counter("storage_recoveries"),
            storage_retries: counter("storage_retries"),
            storage_errors: counter("storage_errors"),
            input_dropped: counter("input_dropped"),
            input_errors: counter("input_errors"),
            net_dropped: counter("net_dropped"),
            net_bad_frames: counter("net_bad_frames"),
            net_errors: counter("net_errors"),
        }
    }
}

/// Ends the tasks when the last user of the stack is gone.
pub(crate) struct Owner<H: Host>(Arc<Engine<H>>);

impl<H: Host> Drop for Owner<H> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// What all tasks of a stack share.
pub(crate) struct Shared<H: Host> {
    pub(crate) engine: Arc<Engine<H>>,
    pub(crate) kernel: Weak<Kernel<H>>,
    owner: Weak<Owner<H>>,
    /// Who may have a device at address 0.
    pub(crate) turn: Turn<H>,
    pub(crate) counters: Counters,
    quirks: Vec<QuirkEntry>,
    pub(crate) ask_names: bool,
    tree: Mutex<H, BTreeMap<UsbPath, Node>>,
    /// Full and low speed hubs behind a high speed one, and what translates for them.
    translators: Mutex<H, Vec<(Slot, Translator)>>,
    /// How many ports and drivers are still finding out what there is.
    busy: Mutex<H, usize>,
    settled: Signal,
}

/// Something is still being found out.
pub(crate) struct Busy<H: Host>(Arc<Shared<H>>);

impl<H: Host> Busy<H> {
    pub(crate) fn new(shared: &Arc<Shared<H>>) -> Self {
        *shared.busy.lock() += 1;
        Self(shared.clone())
    }
}

impl<H: Host> Clone for Busy<H> {
    fn clone(&self) -> Self {
        Self::new(&self.0)
    }
}

impl<H: Host> Drop for Busy<H> {
    fn drop(&mut self) {
        let mut busy = self.0.busy.lock();
        *busy -= 1;
        let none = *busy == 0;
        drop(busy);
        if none {
            self.0.settled.raise(&self.0.engine.host);
        }
    }
}

impl<H: Host> Shared<H> {
    pub(crate) fn quirks_of(&self, vendor: u16, product: u16) -> Quirks {
        quirks::quirks_of(quirks::TABLE, vendor, product) | quirks::quirks_of(&self.quirks, vendor, product)
    }

    pub(crate) fn set_state(&self, path: UsbPath, state: NodeState) {
        self.tree.lock().entry(path).or_default().state = state;
    }

    pub(crate) fn set_failed(&self, path: UsbPath, why: String) {
        self.set_state(path, NodeState::Failed(why));
    }

    /// Says who a device is, whether it will work or not.
    pub(crate) fn set_device(&self, path: UsbPath, device: NodeDevice) {
        self.tree.lock().entry(path).or_default().device = Some(device);
    }

    /// Puts what a driver says in the place of what it said before.
    pub(crate) fn set_driver(&self, path: UsbPath, interface: u8, name: &'static str, note: String) {
        self.note(path, DriverNote { interface, name, note, failed: false });
    }

    fn note(&self, path: UsbPath, note: DriverNote) {
        let mut tree = self.tree.lock();
        let Some(node) = tree.get_mut(&path) else { return };
        node.drivers.retain(|one| one.interface != note.interface);
        node.drivers.push(note);
    }

    /// Says why there is no driver for an interface.
    pub(crate) fn set_refused(&self, path: UsbPath, interface: u8, name: &'static str, why: String) {
        self.note(path, DriverNote { interface, name, note: why, failed: true });
    }

    /// A driver gives up. The device goes with the last of its drivers.
    pub(crate) fn driver_failed(&self, device: &Device<H>, interface: u8, name: &'static str, why: String) {
        let path = device.identity.path;
        log::error!("usb {path}: {name}: {why}; giving it up");
        self.counters.given_up.increment();
        self.note(path, DriverNote { interface, name, note: why.clone(), failed: true });
        let all = self.tree.lock().get(&path).is_some_and(|node| node.drivers.iter().all(|one| one.failed));
        if all {
            self.set_failed(path, why);
            device.mark_gone();
        }
    }

    /// Nothing is there any more.
    pub(crate) fn forget(&self, path: UsbPath) {
        self.tree.lock().remove(&path);
    }

    pub(crate) fn translator(&self, hub: Slot) -> Option<Translator> {
        self.translators.lock().iter().find(|one| one.0 == hub).map(|one| one.1)
    }

    pub(crate) fn set_translator(&self, hub: Slot, translator: Translator) {
        let mut known = self.translators.lock();
        known.retain(|one| one.0 != hub);
        known.push((hub, translator));
    }

    /// Registers a block device; `false`: the kernel is gone.
    pub(crate) fn add_disk(&self, make: impl FnOnce(Arc<Owner<H>>) -> Arc<dyn BlockDevice>) -> bool {
        let (Some(kernel), Some(owner)) = (self.kernel.upgrade(), self.owner.upgrade()) else { return false };
        kernel.add_block_device(make(owner));
        true
    }

    pub(crate) fn remove_disk(&self, name: &str) {
        if let Some(kernel) = self.kernel.upgrade() {
            kernel.remove_block_device(name);
        }
    }

    pub(crate) fn owner(&self) -> Option<Arc<Owner<H>>> {
        self.owner.upgrade()
    }
}

/// A running stack.
pub struct UsbStack<H: Host> {
    pub(crate) shared: Arc<Shared<H>>,
    owner: Arc<Owner<H>>,
}

impl<H: Host> UsbStack<H> {
    /// A stack on `controller`, which raises `signal`, without a thread: whoever has it calls [`UsbStack::poll`]. Its root hub is
    /// bus number `bus`. Errors: [`StartError::Refused`]. Context: thread.
    pub fn attach(
        kernel: &Arc<Kernel<H>>,
        controller: Box<dyn HostController>,
        signal: Arc<Signal>,
        bus: u8,
        options: Options,
    ) -> Result<Arc<Self>, StartError> {
        kernel.admit(MANIFEST)?;
        let stack = Self::make(kernel, controller, signal, options);
        let ports = stack.shared.engine.with_controller(|one| one.info().ports);
        let root = Ports::Root(stack.shared.engine.clone());
        port::start(&stack.shared, &root, UsbPath::root(bus), ports);
        Ok(stack)
    }

    pub(crate) fn make(
        kernel: &Arc<Kernel<H>>,
        controller: Box<dyn HostController>,
        signal: Arc<Signal>,
        options: Options,
    ) -> Arc<Self> {
        let host = kernel.host();
        let engine = Engine::new(host, controller, signal);
        engine.set_tap(options.capture.map(Capture::tap));
        let owner = Arc::new(Owner(engine.clone()));
        let shared = Arc::new(Shared {
            engine,
            kernel: Arc::downgrade(kernel),
            owner: Arc::downgrade(&owner),
            turn: Turn::new(host),
            counters: Counters::new(kernel),
            quirks: options.quirks,
            ask_names: options.ask_names,
            tree: Mutex::new(host, BTreeMap::new()),
            translators: Mutex::new(host, Vec::new()),
            busy: Mutex::new(host, 0),
            settled: Signal::new(),
        });
        Arc::new(Self { shared, owner })
    }

    /// As [`UsbStack::attach`], with a thread that serves it until the kernel stops. Errors: as there, and
    /// [`StartError::Host`]. Context: thread. Does not wait for devices: see [`UsbStack::settle`].
    pub fn start(
        kernel: &Arc<Kernel<H>>,
        controller: Box<dyn HostController>,
        signal: Arc<Signal>,
        bus: u8,
        options: Options,
    ) -> Result<Arc<Self>, StartError> {
        let stack = Self::attach(kernel, controller, signal, bus, options)?;
        stack.spawn_thread(kernel, bus)?;
        Ok(stack)
    }

    pub(crate) fn spawn_thread(&self, kernel: &Arc<Kernel<H>>, bus: u8) -> Result<(), StartError> {
        let engine = self.shared.engine.clone();
        kernel.raise_on_stop(engine.signal.clone());
        let (owner, instance) = (self.owner.clone(), Arc::downgrade(kernel));
        let started = kernel.spawn(&alloc::format!("usb{bus}"), None, move || {
            owner.0.run(|| instance.upgrade().is_none_or(|kernel| kernel.stopping()));
        });
        if started.is_err() {
            self.shared.engine.set_polled();
        }
        started
    }

    /// Does everything that can be done now. Context: thread. Never blocks.
    pub fn poll(&self) {
        self.shared.engine.poll();
    }

    /// When [`UsbStack::poll`] must be called at the latest if no signal comes, in [`hypercall::Clock::monotonic_ns`]. `None`: only
    /// after a signal. For whoever runs a stack without a thread.
    pub fn next_poll_ns(&self) -> Option<u64> {
        match self.shared.engine.rest() {
            (_, true) => Some(self.shared.engine.now_ns()),
            (deadline_ns, false) => deadline_ns,
        }
    }

    /// Waits until everything that is plugged in is taken in or given up, at most `limit_ns`. Says whether it is. Needs the
    /// thread. Context: thread. Blocks.
    pub fn settle(&self, limit_ns: u64) -> bool {
        let host = self.shared.engine.host;
        let deadline_ns = host.monotonic_ns().saturating_add(limit_ns);
        loop {
            let seen = self.shared.settled.count();
            if self.settled() {
                return true;
            }
            if !self.shared.settled.wait(&host, seen, Some(deadline_ns)) {
                return self.settled();
            }
        }
    }

    /// Whether nothing is being found out.
    pub fn settled(&self) -> bool {
        *self.shared.busy.lock() == 0
    }

    /// What is plugged in where, hubs before what is behind them.
    pub fn tree(&self) -> Vec<Listed> {
        let tree = self.shared.tree.lock();
        tree.iter().map(|(path, node)| Listed { path: *path, node: node.clone() }).collect()
    }

    /// How many transfers were submitted since the start.
    pub fn transfers(&self) -> u64 {
        self.shared.engine.submitted.load(core::sync::atomic::Ordering::Relaxed)
    }

    /// From now on every transfer is told to `tap` (see [`crate::usbmon`]); `None` ends it.
    pub fn set_tap(&self, tap: Option<Tap>) {
        self.shared.engine.set_tap(tap);
    }
}
