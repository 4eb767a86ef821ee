//! Devices of a platform that owns the host controller ([`hypercall::HostUsb`]): enumeration is done, transfers go to the
//! host, and what blocks there runs on a thread of its own.

use crate::asking::Asking;
use crate::controller::*;
use crate::descriptor::{Configuration, DescriptorError, DeviceDescriptor};
use crate::device::{Device, Identity, Platform};
use crate::engine::{Engine, Failure};
use crate::quirks::Quirks;
use crate::stack::{Busy, MANIFEST, Options, Shared, UsbStack};
use crate::tree::{NodeDevice, NodeState};
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::config::{Config, UsbSelector};
use anykernel::manifest::Capability;
use anykernel::sync::Mutex;
use anykernel::{Kernel, Manifest, StartError};
use core::future::Future;
use core::pin::Pin;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::{Poll, Waker};
use hypercall::{
    ContractVersion, Error, Host, HostUsb, Signal, UsbCompletion, UsbDeviceId, UsbDeviceInfo, UsbPath,
    UsbTransfer, UsbTransferKind,
};

/// What the driver uses.
pub const PLATFORM_MANIFEST: Manifest = Manifest {
    name: "usb-host",
    summary: "USB devices of a platform that has enumerated them",
    core: &[Capability::Clock, Capability::Threads],
    contracts: &[ContractVersion::CORE, ContractVersion::USB],
};

/// The list is looked at this often where the host does not tell of hot plug.
const LIST_NS: u64 = 1_000_000_000;
/// Longest descriptors of a device.
const MAX_DESCRIPTORS: usize = 128 << 10;
const MAX_TRANSFER: usize = 1 << 20;
/// Buffers that are kept, each at most as long as a transfer.
const MAX_SPARE: usize = 4;

/// Which of the platform's devices the stack takes for itself. The others are only listed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Claim {
    /// None: for a look around.
    #[default]
    None,
    /// Those that one of these picks.
    Only(Vec<UsbSelector>),
    /// All that it has drivers for.
    All,
}

impl Claim {
    /// Those that a configuration names, and those whose disks it mounts: of `usb1-2.1`, `usb1-2.1p1` or `usb1-2.1l1p2` the one
    /// at 1-2.1.
    pub fn of_config(config: &Config) -> Self {
        let place = |source: &str| {
            let place = source.strip_prefix("usb")?;
            UsbPath::parse(place.split_once(['p', 'l']).map_or(place, |(place, _)| place))
        };
        let mounted = config.mounts.iter().filter_map(|mount| place(&mount.source).map(UsbSelector::Place));
        let named = config.usb.iter().filter_map(|text| UsbSelector::parse(text));
        let picked: Vec<UsbSelector> = mounted.chain(named).collect();
        if picked.is_empty() { Self::None } else { Self::Only(picked) }
    }

    fn wants(&self, device: &Identity) -> bool {
        let picks = |selector: &UsbSelector| match *selector {
            UsbSelector::Place(path) => path == device.path,
            UsbSelector::Product(vendor, product) => {
                (vendor, product) == (device.descriptor.vendor, device.descriptor.product)
            }
            UsbSelector::Class(class) => {
                let settings = device.configurations.iter().flat_map(|one| &one.settings);
                let [of_device, ..] = device.descriptor.class;
                of_device == class || settings.map(|one| one.class).any(|[of_it, ..]| of_it == class)
            }
        };
        match self {
            Self::None => false,
            Self::Only(selectors) => selectors.iter().any(picks),
            Self::All => true,
        }
    }
}

struct Open {
    id: UsbDeviceId,
    kinds: BTreeMap<u8, EndpointKind>,
    halted: BTreeSet<u8>,
    /// A failure that is told once nothing of its endpoint is in flight any more, with what was flushed behind it.
    held_back: BTreeMap<u8, Vec<Event>>,
    detaching: Option<CommandTag>,
}

struct Flight {
    slot: Slot,
    endpoint: u8,
    setup: Option<[u8; 8]>,
    zero_packet: bool,
    /// The buffers of a transfer that went as a copy in one piece.
    parts: Option<Vec<Box<[u8]>>>,
}

/// The host's devices as a controller without ports.
struct PlatformController<H: Host + HostUsb> {
    host: H,
    info: ControllerInfo,
    open: BTreeMap<u32, Open>,
    flights: BTreeMap<u64, Flight>,
    events: VecDeque<Event>,
    worker: Arc<Worker<H>>,
    /// What transfers in several pieces went in, kept for the next ones of their lengths.
    spare: Vec<Box<[u8]>>,
}

impl<H: Host + HostUsb> PlatformController<H> {
    fn new(host: H, worker: Arc<Worker<H>>) -> Self {
        let info = ControllerInfo {
            name: "platform".into(),
            ports: 0,
            max_slots: u32::MAX,
            max_transfer_bytes: MAX_TRANSFER,
            max_buffers: usize::MAX,
        };
        let (open, flights, events) = (BTreeMap::new(), BTreeMap::new(), VecDeque::new());
        Self { host, info, open, flights, events, worker, spare: Vec::new() }
    }

    fn in_flight(&self, slot: Slot, endpoint: Option<u8>) -> Vec<u64> {
        let of_it = self.flights.iter().filter(|(_, flight)| {
            flight.slot == slot && endpoint.is_none_or(|endpoint| flight.endpoint == endpoint)
        });
        of_it.map(|(tag, _)| *tag).collect()
    }

    /// A transfer of the host is over.
    fn over(&mut self, slot: Slot, completion: UsbCompletion) {
        let UsbCompletion { transfer, actual, status } = completion;
        let Some(flight) = self.flights.remove(&transfer.tag) else { return };
        let (actual, endpoint) = (actual.min(transfer.data.len()), flight.endpoint);
        let data = match flight.parts {
            None if transfer.data.is_empty() => Vec::new(),
            None => alloc::vec![transfer.data],
            Some(mut parts) => {
                // What lies behind it is of another transfer.
                let mut rest = transfer.data.get(..actual).unwrap_or_default();
                for part in parts.iter_mut().filter(|_| endpoint & 0x80 != 0) {
                    let (mine, behind) = rest.split_at(rest.len().min(part.len()));
                    if let Some(part) = part.get_mut(..mine.len()) {
                        part.copy_from_slice(mine);
                    }
                    rest = behind;
                }
                if self.spare.len() == MAX_SPARE {
                    self.spare.remove(0);
                }
                self.spare.push(transfer.data);
                parts
            }
        };
        let back = Transfer {
            token: Token(transfer.tag),
            slot,
            endpoint,
            setup: flight.setup,
            data,
            zero_packet: flight.zero_packet,
        };
        let event = Event::Transfer { transfer: back, actual, status };
        let others = self.in_flight(slot, Some(endpoint));
        let Some(open) = self.open.get_mut(&slot.0) else { return self.events.push_back(event) };
        let fails = !matches!(status, Status::Done | Status::Cancelled) && endpoint != 0;
        if fails && open.halted.insert(endpoint) {
            for tag in &others {
                self.host.usb_cancel(open.id, *tag);
            }
            open.held_back.insert(endpoint, Vec::new());
        }
        match open.held_back.get_mut(&endpoint) {
            Some(held) => {
                held.push(event);
                if others.is_empty() {
                    let held = open.held_back.remove(&endpoint).unwrap_or_default();
                    self.events.extend(held);
                }
            }
            None => self.events.push_back(event),
        }
    }

    /// Closes what has nothing in flight any more.
    fn finish_detaching(&mut self) {
        let ready: Vec<u32> = self
            .open
            .iter()
            .filter(|(slot, open)| {
                open.detaching.is_some() && self.flights.values().all(|flight| flight.slot.0 != **slot)
            })
            .map(|(slot, _)| *slot)
            .collect();
        for slot in ready {
            let Some(open) = self.open.remove(&slot) else { continue };
            drop(self.worker.call(move |host| host.usb_close(open.id)));
            if let Some(tag) = open.detaching {
                self.events.push_back(Event::Command { tag, result: Ok(Outcome::Done) });
            }
        }
    }
}

/// A buffer of this length, with anything in it.
fn take(spare: &mut Vec<Box<[u8]>>, len: usize) -> Option<Box<[u8]>> {
    if let Some(index) = spare.iter().position(|one| one.len() == len) {
        return Some(spare.swap_remove(index));
    }
    let mut fresh = Vec::new();
    fresh.try_reserve_exact(len).ok()?;
    fresh.resize(len, 0);
    Some(fresh.into_boxed_slice())
}

fn refusal(error: Error) -> ControllerError {
    match error {
        Error::WouldBlock => ControllerError::Full,
        Error::NoMemory => ControllerError::NoMemory,
        Error::Gone | Error::NotFound | Error::Io => ControllerError::NoAnswer,
        _ => ControllerError::Invalid,
    }
}

impl<H: Host + HostUsb> HostController for PlatformController<H> {
    fn info(&self) -> &ControllerInfo {
        &self.info
    }

    fn port_status(&mut self, _: RootPort) -> PortStatus {
        PortStatus::default()
    }

    fn port_action(&mut self, _: RootPort, _: PortAction) {}

    fn command(&mut self, tag: CommandTag, command: Command) -> Result<(), ControllerError> {
        let mut result = Err(ControllerError::Invalid);
        match command {
            // The device is open; the slot says which. The endpoints say what kind they are.
            Command::Configure { slot, remove, add, .. } => {
                if let Some(open) = self.open.get_mut(&slot.0) {
                    for address in remove {
                        open.kinds.remove(&address);
                        open.halted.remove(&address);
                    }
                    open.kinds.extend(add.iter().map(|spec| (spec.address, spec.kind)));
                    result = Ok(Outcome::Done);
                }
            }
            Command::ResetEndpoint { slot, endpoint } => {
                if let Some(open) = self.open.get_mut(&slot.0) {
                    open.halted.remove(&endpoint);
                    result = Ok(Outcome::Done);
                }
            }
            Command::Readdress { slot, .. } => {
                if let Some(open) = self.open.get_mut(&slot.0) {
                    open.halted.clear();
                    result = Ok(Outcome::Done);
                }
            }
            Command::Detach { slot } => {
                let tags = self.in_flight(slot, None);
                if let Some(open) = self.open.get_mut(&slot.0) {
                    tags.into_iter().for_each(|one| self.host.usb_cancel(open.id, one));
                    open.detaching = Some(tag);
                    self.finish_detaching();
                    return Ok(());
                }
                result = Ok(Outcome::Done);
            }
            Command::Attach { .. } | Command::SetMaxPacket { .. } => {}
        }
        self.events.push_back(Event::Command { tag, result });
        Ok(())
    }

    fn submit(&mut self, transfer: Transfer) -> Result<(), Box<Refused>> {
        let refuse = |transfer, error| Err(Box::new(Refused { transfer, error }));
        // Opened by [`open`], under the number that the platform gave.
        let slot = transfer.slot;
        let open = self.open.entry(slot.0).or_insert_with(|| Open {
            id: UsbDeviceId(u64::from(slot.0)),
            kinds: BTreeMap::new(),
            halted: BTreeSet::new(),
            held_back: BTreeMap::new(),
            detaching: None,
        });
        let kind = match (transfer.setup, open.kinds.get(&transfer.endpoint)) {
            (Some(setup), _) => UsbTransferKind::Control(setup),
            (None, Some(EndpointKind::Bulk)) => UsbTransferKind::Bulk,
            (None, Some(EndpointKind::Interrupt)) => UsbTransferKind::Interrupt,
            _ => return refuse(transfer, ControllerError::Invalid),
        };
        if open.halted.contains(&transfer.endpoint) {
            return refuse(transfer, ControllerError::Halted);
        }
        if open.detaching.is_some() {
            return refuse(transfer, ControllerError::Invalid);
        }
        let Transfer { token, slot, endpoint, setup, data, zero_packet } = transfer;
        let (data, parts) = match <[_; 1]>::try_from(data) {
            Ok([one]) => (one, None),
            Err(parts) if parts.is_empty() => (Box::default(), None),
            Err(parts) => {
                let len = parts.iter().map(|part| part.len()).sum();
                let Some(mut flat) = take(&mut self.spare, len) else {
                    let transfer = Transfer { token, slot, endpoint, setup, data: parts, zero_packet };
                    return refuse(transfer, ControllerError::NoMemory);
                };
                if endpoint & 0x80 == 0 {
                    let mut rest = &mut flat[..];
                    for part in &parts {
                        let Some((mine, behind)) = rest.split_at_mut_checked(part.len()) else { break };
                        mine.copy_from_slice(part);
                        rest = behind;
                    }
                }
                (flat, Some(parts))
            }
        };
        let one = UsbTransfer { kind, endpoint, data, zero_packet, tag: token.0 };
        match self.host.usb_submit(open.id, one) {
            Ok(()) => {
                self.flights.insert(token.0, Flight { slot, endpoint, setup, zero_packet, parts });
                Ok(())
            }
            Err(refused) => {
                let one = refused.transfer.data;
                let data = match parts {
                    Some(parts) => parts,
                    None if one.is_empty() => Vec::new(),
                    None => alloc::vec![one],
                };
                let transfer = Transfer { token, slot, endpoint, setup, data, zero_packet };
                refuse(transfer, refusal(refused.error))
            }
        }
    }

    fn flush(&mut self) {}

    fn cancel(&mut self, token: Token) {
        let slot = self.flights.get(&token.0).map(|flight| flight.slot.0);
        if let Some(open) = slot.and_then(|slot| self.open.get(&slot)) {
            self.host.usb_cancel(open.id, token.0);
        }
    }

    fn poll(&mut self, events: &mut VecDeque<Event>) {
        let open: Vec<_> = self.open.iter().map(|(slot, open)| (Slot(*slot), open.id)).collect();
        for (slot, id) in open {
            // Bounded by what is in flight.
            for _ in 0..=self.flights.len() {
                let Some(completion) = self.host.usb_reap(id) else { break };
                self.over(slot, completion);
            }
        }
        self.finish_detaching();
        events.append(&mut self.events);
    }

    fn arm(&mut self) -> bool {
        // The host always raises the signal.
        !self.events.is_empty()
    }
}

impl<H: Host + HostUsb> Drop for PlatformController<H> {
    fn drop(&mut self) {
        for open in self.open.values() {
            self.host.usb_close(open.id);
        }
    }
}

type Job<H> = Box<dyn FnOnce(&H) + Send>;

/// Does what blocks, in order, and looks at the list of devices.
struct Worker<H: Host> {
    host: H,
    /// Raised for jobs, and by the host for hot plug.
    signal: Arc<Signal>,
    /// What its results wake.
    engine_signal: Arc<Signal>,
    jobs: Mutex<H, VecDeque<Job<H>>>,
    /// Somebody does the jobs; otherwise they are done at once by whoever has them.
    running: AtomicBool,
    list: Mutex<H, (Vec<UsbDeviceInfo>, bool, Option<Waker>)>,
}

impl<H: Host + HostUsb> Worker<H> {
    /// Has `job` done; the future is for its result.
    fn call<T: Send + 'static>(&self, job: impl FnOnce(&H) -> T + Send + 'static) -> Call<H, T> {
        let state = Arc::new(Mutex::new(self.host, (None, None)));
        let (result, engine) = (state.clone(), self.engine_signal.clone());
        let job: Job<H> = Box::new(move |host| {
            let value = job(host);
            let waker: Option<Waker> = {
                let mut state = result.lock();
                state.0 = Some(value);
                state.1.take()
            };
            waker.into_iter().for_each(Waker::wake);
            engine.raise(host);
        });
        let mut jobs = self.jobs.lock();
        // While they are locked nobody stops doing them.
        if self.running.load(Ordering::Acquire) {
            jobs.push_back(job);
            drop(jobs);
            self.signal.raise(&self.host);
        } else {
            drop(jobs);
            job(&self.host);
        }
        Call { state }
    }

    /// Lists what is there, and tells whoever watches if it has changed.
    fn look(&self) {
        let mut found = Vec::new();
        self.host.usb_devices(&mut |info| found.push(info));
        let mut list = self.list.lock();
        if list.0 != found {
            (list.0, list.1) = (found, true);
            let waker = list.2.take();
            drop(list);
            waker.into_iter().for_each(Waker::wake);
            self.engine_signal.raise(&self.host);
        }
    }

    /// What the thread does.
    fn run(&self, told: bool, stopping: impl Fn() -> bool) {
        loop {
            let seen = self.signal.count();
            while let Some(job) = self.next_job() {
                job(&self.host);
            }
            if stopping() {
                break;
            }
            self.look();
            let deadline_ns = (!told).then(|| self.host.monotonic_ns().saturating_add(LIST_NS));
            self.signal.wait(&self.host, seen, deadline_ns);
        }
        let jobs = self.jobs.lock();
        self.running.store(false, Ordering::Release);
        drop(jobs);
        while let Some(job) = self.next_job() {
            job(&self.host);
        }
    }

    fn next_job(&self) -> Option<Job<H>> {
        self.jobs.lock().pop_front()
    }
}

/// A result, and who waits for it.
type Awaited<T> = (Option<T>, Option<Waker>);

struct Call<H: Host, T> {
    state: Arc<Mutex<H, Awaited<T>>>,
}

impl<H: Host, T> Future for Call<H, T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, cx: &mut core::task::Context<'_>) -> Poll<T> {
        let mut state = self.state.lock();
        match state.0.take() {
            Some(value) => Poll::Ready(value),
            None => {
                state.1 = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// One open device of the platform.
struct PlatformDevice<H: Host> {
    worker: Arc<Worker<H>>,
    id: UsbDeviceId,
}

type Operation = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send>>;

impl<H: Host + HostUsb> PlatformDevice<H> {
    fn call(&self, job: impl FnOnce(&H, UsbDeviceId) -> hypercall::Result<()> + Send + 'static) -> Operation {
        let id = self.id;
        let call = self.worker.call(move |host| job(host, id));
        Box::pin(async move { call.await.map_err(failure) })
    }
}

fn failure(error: Error) -> Failure {
    match error {
        Error::Gone => Failure::Gone,
        error => Failure::Host(error),
    }
}

impl<H: Host + HostUsb> Platform for PlatformDevice<H> {
    fn claim(&self, interface: u8) -> Operation {
        self.call(move |host, id| host.usb_claim(id, interface))
    }
    fn set_alternate(&self, interface: u8, alternate: u8) -> Operation {
        self.call(move |host, id| host.usb_set_alternate(id, interface, alternate))
    }
    fn clear_halt(&self, endpoint: u8) -> Operation {
        self.call(move |host, id| host.usb_clear_halt(id, endpoint))
    }
    fn reset(&self) -> Operation {
        self.call(|host, id| host.usb_reset(id))
    }
}

impl<H: Host + HostUsb> UsbStack<H> {
    /// A stack on the devices of the platform, without threads: whoever has it calls [`UsbStack::poll`], and
    /// [`UsbStack::look_around`] after hot plug. Errors: [`StartError::Refused`]. Context: thread. Blocks as the host does.
    pub fn attach_platform(
        kernel: &Arc<Kernel<H>>,
        options: Options,
    ) -> Result<PlatformStack<H>, StartError> {
        kernel.admit(MANIFEST)?;
        kernel.admit(PLATFORM_MANIFEST)?;
        let host = kernel.host();
        let signal = Arc::new(Signal::new());
        let worker = Arc::new(Worker {
            host,
            signal: Arc::new(Signal::new()),
            engine_signal: signal.clone(),
            jobs: Mutex::new(host, VecDeque::new()),
            running: AtomicBool::new(false),
            list: Mutex::new(host, (Vec::new(), false, None)),
        });
        let controller = PlatformController::new(host, worker.clone());
        let claim = options.claim.clone();
        let stack = Self::make(kernel, Box::new(controller), signal, options);
        worker.look();
        let (shared, its_worker) = (stack.shared.clone(), worker.clone());
        let busy = Busy::new(&shared);
        stack.shared.engine.spawn(async move { watch(shared, its_worker, claim, busy).await });
        Ok(PlatformStack { stack, worker })
    }

    /// As [`UsbStack::attach_platform`], with two threads that serve it until the kernel stops: one for what blocks on the host.
    /// Errors: as there, and [`StartError::Host`]. Does not wait for devices: see [`UsbStack::settle`].
    pub fn start_platform(kernel: &Arc<Kernel<H>>, options: Options) -> Result<Arc<Self>, StartError> {
        let PlatformStack { stack, worker } = Self::attach_platform(kernel, options)?;
        let host = kernel.host();
        let told = host.usb_watch(Some(worker.signal.clone())).is_ok();
        kernel.raise_on_stop(worker.signal.clone());
        kernel.run_on_stop(move || {
            let _ = host.usb_watch(None);
        });
        let instance = Arc::downgrade(kernel);
        worker.running.store(true, Ordering::Release);
        let running = worker.clone();
        let started = kernel.spawn("usb-host", None, move || {
            running.run(told, || instance.upgrade().is_none_or(|kernel| kernel.stopping()));
        });
        if let Err(error) = started {
            worker.running.store(false, Ordering::Release);
            return Err(error);
        }
        stack.spawn_thread(kernel, 0)?;
        Ok(stack)
    }
}

/// A stack on the platform's devices that has no threads.
pub struct PlatformStack<H: Host> {
    /// The stack.
    pub stack: Arc<UsbStack<H>>,
    worker: Arc<Worker<H>>,
}

impl<H: Host + HostUsb> PlatformStack<H> {
    /// Looks whether something was plugged in or unplugged. Context: thread.
    pub fn look_around(&self) {
        self.worker.look();
    }
}

/// Follows the platform's list.
async fn watch<H: Host + HostUsb>(
    shared: Arc<Shared<H>>,
    worker: Arc<Worker<H>>,
    claim: Claim,
    first: Busy<H>,
) {
    let mut first = Some(first);
    let mut known: Vec<(UsbDeviceInfo, Arc<Seat<H>>)> = Vec::new();
    loop {
        let list = worker.list.lock().0.clone();
        known.retain(|(info, seat)| {
            let there = list.iter().any(|other| other.id == info.id);
            if !there {
                seat.leave();
            }
            there
        });
        for info in list {
            if known.iter().any(|(other, _)| other.id == info.id) {
                continue;
            }
            let seat = Arc::new(Seat::new(&shared));
            known.push((info, seat.clone()));
            let (task_shared, worker, claim) = (shared.clone(), worker.clone(), claim.clone());
            let busy = Busy::new(&shared);
            shared.engine.spawn(async move {
                let path = info.path;
                if let Err(why) = serve(&task_shared, &worker, info, &claim, &seat, busy).await {
                    log::error!("usb {path}: {why}; going on without this device");
                    task_shared.counters.given_up.increment();
                    task_shared.set_failed(path, why);
                    seat.left().await;
                }
                task_shared.forget(path);
            });
        }
        drop(first.take());
        core::future::poll_fn(|cx| {
            let mut list = worker.list.lock();
            if core::mem::take(&mut list.1) {
                return Poll::Ready(());
            }
            list.2 = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// Whether it is gone, the device once it is open, and who waits.
type Seated<H> = (bool, Option<Arc<Device<H>>>, Option<Waker>);

/// Tells the task of a device that it is gone from the list.
struct Seat<H: Host> {
    state: Mutex<H, Seated<H>>,
}

impl<H: Host> Seat<H> {
    fn new(shared: &Shared<H>) -> Self {
        Self { state: Mutex::new(shared.engine.host, (false, None, None)) }
    }

    fn leave(&self) {
        let mut state = self.state.lock();
        state.0 = true;
        let (device, waker) = (state.1.take(), state.2.take());
        drop(state);
        if let Some(device) = device {
            device.mark_gone();
        }
        waker.into_iter().for_each(Waker::wake);
    }

    async fn left(&self) {
        core::future::poll_fn(|cx| {
            let mut state = self.state.lock();
            if state.0 {
                return Poll::Ready(());
            }
            state.2 = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

/// The life of a device of the platform. `Err`: one line why it cannot be used.
async fn serve<H: Host + HostUsb>(
    shared: &Arc<Shared<H>>,
    worker: &Arc<Worker<H>>,
    info: UsbDeviceInfo,
    claim: &Claim,
    seat: &Seat<H>,
    busy: Busy<H>,
) -> Result<(), String> {
    let engine: &Arc<Engine<H>> = &shared.engine;
    let line = |what: &'static str| move |error: Error| alloc::format!("{what}: {error}");
    shared.set_state(info.path, NodeState::New);
    let raw = worker.call(move |host| {
        let mut raw = alloc::vec![0; MAX_DESCRIPTORS];
        host.usb_descriptors(info.id, &mut raw).map(|len| {
            raw.truncate(len);
            raw
        })
    });
    let raw = raw.await.map_err(line("reading its descriptors"))?;
    let mut identity = identify(&info, raw).map_err(|error| alloc::format!("{error}"))?;
    identity.quirks = shared.quirks_of(identity.descriptor.vendor, identity.descriptor.product);
    let current = identity.configurations.iter().position(|one| one.value == info.configuration);
    let chosen = crate::class::choose(&identity);
    let useful = identity.configurations.get(chosen).is_some_and(crate::class::has_driver);
    let ignored = identity.quirks.contains(Quirks::IGNORE_DEVICE);
    shared.set_device(info.path, NodeDevice::of(&identity, current.unwrap_or(chosen)));
    shared.set_state(info.path, NodeState::Configured);
    if !claim.wants(&identity) || !useful || ignored {
        if shared.ask_names && !ignored {
            ask_names(shared, worker, &info, &mut identity).await;
            shared.set_device(info.path, NodeDevice::of(&identity, current.unwrap_or(chosen)));
        }
        drop(busy);
        seat.left().await;
        return Ok(());
    }
    let signal = engine.signal.clone();
    worker.call(move |host| host.usb_open(info.id, signal)).await.map_err(line("opening it"))?;
    let slot = identity.slot;
    engine.name_slot(slot, info.path, info.address);
    let value = identity.configurations.get(chosen).map_or(0, |one| one.value);
    if current != Some(chosen) {
        let configured = worker.call(move |host| host.usb_configure(info.id, value)).await;
        if let Err(error) = configured {
            drop(worker.call(move |host| host.usb_close(info.id)));
            return Err(line("setting its configuration")(error));
        }
    }
    if !identity.quirks.contains(Quirks::NO_STRINGS) {
        let asking = Asking { engine, slot };
        let indices = identity.descriptor.strings;
        // One that is mute about its name may still work.
        let _ = asking.strings(indices, &mut identity.strings).await;
    }
    shared.set_device(info.path, NodeDevice::of(&identity, chosen));
    let platform = PlatformDevice { worker: worker.clone(), id: info.id };
    let device = Arc::new(Device::new(engine.clone(), identity, chosen, Some(Box::new(platform))));
    let configure = Command::Configure { slot, remove: Vec::new(), add: device.endpoints(), hub: None };
    let _ = engine.command(configure).await;
    {
        let mut state = seat.state.lock();
        if state.0 {
            device.mark_gone();
        }
        state.1 = Some(device.clone());
    }
    shared.counters.attached.increment();
    crate::class::start(shared, &device, &busy);
    drop(busy);
    core::future::poll_fn(|cx| device.poll_gone(cx)).await;
    let _ = engine.command(Command::Detach { slot }).await;
    shared.counters.detached.increment();
    // Given up while it is still plugged in: it stays in the tree with the reason.
    seat.left().await;
    Ok(())
}

/// The names of a device that somebody else drives; empty where that is not allowed.
async fn ask_names<H: Host + HostUsb>(
    shared: &Arc<Shared<H>>,
    worker: &Arc<Worker<H>>,
    info: &UsbDeviceInfo,
    identity: &mut Identity,
) {
    let (engine, slot, id) = (&shared.engine, identity.slot, info.id);
    if identity.quirks.contains(Quirks::NO_STRINGS) || identity.descriptor.strings == [0; 3] {
        return;
    }
    let signal = engine.signal.clone();
    if worker.call(move |host| host.usb_open(id, signal)).await.is_ok() {
        engine.name_slot(slot, info.path, info.address);
        let asking = Asking { engine, slot };
        // One that is mute about its name may still work.
        let _ = asking.strings(identity.descriptor.strings, &mut identity.strings).await;
        let _ = engine.command(Command::Detach { slot }).await;
    }
}

fn identify(info: &UsbDeviceInfo, raw: Vec<u8>) -> Result<Identity, DescriptorError> {
    let descriptor = DeviceDescriptor::parse(&raw, info.speed)?;
    let mut configurations = Vec::new();
    let mut rest = raw.get(18..).unwrap_or_default();
    for _ in 0..descriptor.configurations {
        let total = Configuration::total_length(rest)?;
        let (one, behind) = rest.split_at_checked(total).ok_or(DescriptorError::Short)?;
        configurations.push(Configuration::parse(one)?);
        rest = behind;
    }
    // The host counts devices from 1 on and never comes that far.
    let slot = Slot(u32::try_from(info.id.0).map_err(|_| DescriptorError::TooMany)?);
    Ok(Identity {
        path: info.path,
        slot,
        address: info.address,
        speed: info.speed,
        descriptor,
        configurations,
        raw,
        strings: Default::default(),
        quirks: Quirks::empty(),
    })
}
