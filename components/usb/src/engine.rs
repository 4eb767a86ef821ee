//! What drives everything: tasks, timers, and transfers and commands in flight on one host controller.
//!
//! Ports and class drivers are tasks. [`Engine::poll`] takes what the controller has, wakes those who wait for it, and
//! runs whoever is awake; it never blocks, and may be called from any thread. One thread at a time is in it; whoever finds
//! it busy leaves word that there is more, and goes.

mod turn;
mod wait;

pub(crate) use turn::Turn;
pub(crate) use wait::{Commanding, Sleep, Transferring};

use crate::controller::{
    Command, CommandTag, ControllerError, EndpointKind, Event, HostController, Outcome, Refused, RootPort,
    Slot, Status, Token, Transfer,
};
use crate::usbmon::Tap;
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::{Arc, Weak};
use alloc::task::Wake;
use alloc::vec::Vec;
use anykernel::sync::Mutex;
use anykernel::timer::{TimerKey, TimerQueue};
use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::task::{Context, Poll, Waker};
use hypercall::{Host, Signal, UsbPath};
use slab::Slab;

/// The thread looks at its deadlines at least this often while there are any.
const HEARTBEAT_NS: u64 = 1_000_000_000;
/// Rounds of one poll: more than anything sound takes.
const MAX_ROUNDS: usize = 10_000;

/// Why something did not work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Failure {
    /// The device refused it (STALL).
    Stall,
    /// It sent more than there was room for.
    Overflow,
    /// No answer, or garbage.
    Error,
    /// It took too long.
    TimedOut,
    /// Cancelled because another transfer of its endpoint failed.
    Cancelled,
    /// The device is gone.
    Gone,
    /// The controller did not take it.
    Controller(ControllerError),
    /// The platform did not do it.
    Host(hypercall::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stall => "refused by the device",
            Self::Overflow => "the device sent too much",
            Self::Error => "the device did not answer",
            Self::TimedOut => "the device took too long",
            Self::Cancelled => "cancelled",
            Self::Gone => "the device is gone",
            Self::Controller(error) => return error.fmt(f),
            Self::Host(error) => return error.fmt(f),
        })
    }
}

/// A transfer that is over.
#[derive(Debug)]
pub(crate) struct Over {
    pub(crate) data: Vec<Box<[u8]>>,
    pub(crate) actual: usize,
    pub(crate) result: Result<(), Failure>,
}

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

struct Pending {
    waker: Option<Waker>,
    over: Option<Over>,
    /// Nobody waits any more.
    orphan: bool,
}

#[derive(Default)]
struct PendingCommand {
    waker: Option<Waker>,
    result: Option<Result<Outcome, ControllerError>>,
    orphan: bool,
}

#[derive(Default)]
struct PortWatch {
    changed: bool,
    waker: Option<Waker>,
}

struct Bus {
    controller: Box<dyn HostController>,
    transfers: BTreeMap<u64, Pending>,
    commands: BTreeMap<u64, PendingCommand>,
    ports: Vec<PortWatch>,
    timers: TimerQueue<Waker>,
    /// When the thread wakes by itself.
    armed_ns: u64,
    next: u64,
    dead: bool,
    events: VecDeque<Event>,
    tap: Option<Tap>,
}

struct Ready<H: Host>(Mutex<H, VecDeque<usize>>);

struct TaskWaker<H: Host> {
    index: usize,
    queued: AtomicBool,
    ready: Arc<Ready<H>>,
}

impl<H: Host> Wake for TaskWaker<H> {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.ready.0.lock().push_back(self.index);
        }
    }
}

struct Slotted<H: Host> {
    task: Task,
    waker: Arc<TaskWaker<H>>,
}

/// Something that threads wait for.
pub(crate) trait Awaited: Send + Sync {
    /// Nobody waits for anything of it now.
    fn idle(&self) -> bool;
}

/// One host controller with everything above it.
pub(crate) struct Engine<H: Host> {
    pub(crate) host: H,
    /// What the controller raises, and what the thread waits for.
    pub(crate) signal: Arc<Signal>,
    bus: Mutex<H, Bus>,
    ready: Arc<Ready<H>>,
    tasks: Mutex<H, Slab<Slotted<H>>>,
    spawned: Mutex<H, Vec<Task>>,
    awaited: Mutex<H, Vec<Weak<dyn Awaited>>>,
    /// Somebody came while another thread was in [`Engine::poll`].
    again: AtomicBool,
    /// Nobody waits for the signal any more.
    polled: AtomicBool,
    /// Transfers submitted, for counters and tests.
    pub(crate) submitted: AtomicU64,
}

impl<H: Host> Engine<H> {
    pub(crate) fn new(host: H, controller: Box<dyn HostController>, signal: Arc<Signal>) -> Arc<Self> {
        let ports = usize::from(controller.info().ports) + 1;
        let bus = Bus {
            controller,
            transfers: BTreeMap::new(),
            commands: BTreeMap::new(),
            ports: (0..ports).map(|_| PortWatch::default()).collect(),
            timers: TimerQueue::default(),
            armed_ns: u64::MAX,
            next: 1,
            dead: false,
            events: VecDeque::new(),
            tap: None,
        };
        Arc::new(Self {
            host,
            signal,
            bus: Mutex::new(host, bus),
            ready: Arc::new(Ready(Mutex::new(host, VecDeque::new()))),
            tasks: Mutex::new(host, Slab::new()),
            spawned: Mutex::new(host, Vec::new()),
            awaited: Mutex::new(host, Vec::new()),
            again: AtomicBool::new(false),
            polled: AtomicBool::new(false),
            submitted: AtomicU64::new(0),
        })
    }

    pub(crate) fn now_ns(&self) -> u64 {
        self.host.monotonic_ns()
    }

    /// Looks at the controller through `body`.
    pub(crate) fn with_controller<T>(&self, body: impl FnOnce(&mut dyn HostController) -> T) -> T {
        body(&mut *self.bus.lock().controller)
    }

    /// From now on every transfer is told to `tap`, or to none.
    pub(crate) fn set_tap(&self, tap: Option<Tap>) {
        self.bus.lock().tap = tap;
    }

    /// Names a device in what the tap tells.
    pub(crate) fn name_slot(&self, slot: Slot, path: UsbPath, address: u8) {
        if let Some(tap) = &mut self.bus.lock().tap {
            tap.name(slot, path, address);
        }
    }

    /// Adds a task; it runs in the next round of [`Engine::poll`].
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.spawned.lock().push(Box::pin(task));
    }

    /// Has the thread look again. Context: thread.
    pub(crate) fn kick(&self) {
        self.signal.raise(&self.host);
    }

    /// Does everything that can be done now. Context: thread; not from inside a task.
    pub(crate) fn poll(&self) {
        self.again.store(true, Ordering::SeqCst);
        for _ in 0..MAX_ROUNDS {
            let Some(mut tasks) = self.tasks.try_lock() else { return };
            self.again.store(false, Ordering::SeqCst);
            while self.round(&mut tasks) {}
            drop(tasks);
            if !self.again.load(Ordering::SeqCst) && self.ready.0.lock().is_empty() {
                return;
            }
        }
    }

    /// Whether anything happened.
    fn round(&self, tasks: &mut Slab<Slotted<H>>) -> bool {
        self.take_events();
        for task in core::mem::take(&mut *self.spawned.lock()) {
            let entry = tasks.vacant_entry();
            let (index, ready) = (entry.key(), self.ready.clone());
            let waker = Arc::new(TaskWaker { index, queued: AtomicBool::new(false), ready });
            waker.wake_by_ref();
            entry.insert(Slotted { task, waker });
        }
        let batch = core::mem::take(&mut *self.ready.0.lock());
        let any = !batch.is_empty();
        for index in batch {
            let Some(slotted) = tasks.get_mut(index) else { continue };
            slotted.waker.queued.store(false, Ordering::Release);
            let waker = Waker::from(slotted.waker.clone());
            if slotted.task.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
                drop(tasks.remove(index));
            }
        }
        if any {
            self.bus.lock().controller.flush();
        }
        any
    }

    /// Takes what the controller and the clock have, and wakes those who wait for it.
    fn take_events(&self) {
        let now_ns = self.now_ns();
        let mut bus = self.bus.lock();
        let bus = &mut *bus;
        bus.controller.poll(&mut bus.events);
        while let Some(event) = bus.events.pop_front() {
            let waker = match event {
                Event::Port(RootPort(port)) => bus.ports.get_mut(usize::from(port)).and_then(|watch| {
                    watch.changed = true;
                    watch.waker.take()
                }),
                Event::Command { tag: CommandTag(tag), result } => {
                    let orphan = bus.commands.get(&tag).is_some_and(|command| command.orphan);
                    if orphan {
                        bus.commands.remove(&tag);
                    }
                    bus.commands.get_mut(&tag).and_then(|command| {
                        command.result = Some(result);
                        command.waker.take()
                    })
                }
                Event::Transfer { transfer, actual, status } => {
                    if let Some(tap) = &mut bus.tap {
                        tap.completed(self.host.realtime_ns(), &transfer, actual, status);
                    }
                    bus.over(transfer, actual, status)
                }
                Event::Dead(why) => {
                    log::error!("{}: {why}; giving the host controller up", bus.controller.info().name);
                    bus.dead = true;
                    // Every port task finds out by itself.
                    for watch in &mut bus.ports {
                        watch.changed = true;
                        watch.waker.take().into_iter().for_each(Waker::wake);
                    }
                    None
                }
            };
            if let Some(waker) = waker {
                waker.wake();
            }
        }
        while let Some(waker) = bus.timers.pop_due(now_ns) {
            waker.wake();
        }
    }

    pub(crate) fn dead(&self) -> bool {
        self.bus.lock().dead
    }

    /// When [`Engine::poll`] must be called at the latest; `None`: after the next signal. `true` in the second place: at once.
    pub(crate) fn rest(&self) -> (Option<u64>, bool) {
        let now_ns = self.now_ns();
        let mut bus = self.bus.lock();
        let deadline = bus.timers.next_deadline_ns().map(|at| at.min(now_ns.saturating_add(HEARTBEAT_NS)));
        bus.armed_ns = deadline.unwrap_or(u64::MAX);
        let more = bus.controller.arm();
        drop(bus);
        (deadline, more || !self.ready.0.lock().is_empty() || !self.spawned.lock().is_empty())
    }

    /// What the thread does: waits, polls, until `stopping`.
    pub(crate) fn run(&self, stopping: impl Fn() -> bool) {
        loop {
            let seen = self.signal.count();
            if stopping() {
                break;
            }
            self.poll();
            let (deadline_ns, more) = self.rest();
            if !more {
                self.signal.wait(&self.host, seen, deadline_ns);
            }
        }
        self.polled.store(true, Ordering::Release);
        // Whoever went to sleep counting on this thread is served before it ends. Every transfer has a time-out, so it does.
        loop {
            let seen = self.signal.count();
            self.poll();
            if self.idle() {
                break;
            }
            let (_, more) = self.rest();
            if !more {
                // Others poll too, and then there may be no signal.
                self.signal.wait(&self.host, seen, Some(self.now_ns().saturating_add(HEARTBEAT_NS)));
            }
        }
    }

    /// Threads will wait for this one.
    pub(crate) fn add_awaited(&self, one: Weak<dyn Awaited>) {
        let mut awaited = self.awaited.lock();
        awaited.retain(|one| one.strong_count() > 0);
        awaited.push(one);
    }

    fn idle(&self) -> bool {
        let awaited = self.awaited.lock().clone();
        awaited.iter().filter_map(Weak::upgrade).all(|one| one.idle())
    }

    /// Nobody waits for the signal: whoever wants something polls until it is there.
    pub(crate) fn polled(&self) -> bool {
        self.polled.load(Ordering::Acquire)
    }

    /// Nobody will wait for the signal.
    pub(crate) fn set_polled(&self) {
        self.polled.store(true, Ordering::Release);
    }

    /// Drops every task; block requests and the like complete as gone.
    pub(crate) fn end(&self) {
        let mut tasks = self.tasks.lock();
        let ended = core::mem::take(&mut *tasks);
        let spawned = core::mem::take(&mut *self.spawned.lock());
        drop(tasks);
        drop((ended, spawned));
    }

    /// Sets a timer; the thread is told if it would sleep past it.
    fn arm(&self, deadline_ns: u64, waker: Waker) -> TimerKey {
        let mut bus = self.bus.lock();
        let key = bus.timers.insert(deadline_ns, waker);
        let late = deadline_ns < bus.armed_ns;
        if late {
            bus.armed_ns = deadline_ns;
        }
        drop(bus);
        if late {
            self.kick();
        }
        key
    }

    /// Ready at `deadline_ns`, or soon after.
    pub(crate) fn sleep_until(self: &Arc<Self>, deadline_ns: u64) -> Sleep<H> {
        Sleep::new(self.clone(), deadline_ns)
    }

    pub(crate) fn sleep_ms(self: &Arc<Self>, ms: u64) -> Sleep<H> {
        self.sleep_until(self.now_ns().saturating_add(ms * 1_000_000))
    }

    /// Starts a transfer now; the future is for its end. `timeout_ms` 0: none.
    pub(crate) fn transfer(self: &Arc<Self>, mut transfer: Transfer, timeout_ms: u64) -> Transferring<H> {
        let deadline_ns = match timeout_ms {
            0 => u64::MAX,
            ms => self.now_ns().saturating_add(ms * 1_000_000),
        };
        let mut bus = self.bus.lock();
        let bus = &mut *bus;
        let token = bus.next;
        bus.next += 1;
        transfer.token = Token(token);
        if let Some(tap) = &mut bus.tap {
            tap.submitted(self.host.realtime_ns(), &transfer);
        }
        let over = match bus.controller.submit(transfer) {
            Ok(()) => None,
            Err(refused) => {
                let Refused { transfer, error } = *refused;
                if let Some(tap) = &mut bus.tap {
                    tap.refused(self.host.realtime_ns(), &transfer);
                }
                Some(Over { data: transfer.data, actual: 0, result: Err(Failure::Controller(error)) })
            }
        };
        bus.transfers.insert(token, Pending { waker: None, over, orphan: false });
        self.submitted.fetch_add(1, Ordering::Relaxed);
        Transferring::new(self.clone(), token, deadline_ns)
    }

    /// Starts a command now; the future is for its end.
    pub(crate) fn command(self: &Arc<Self>, command: Command) -> Commanding<H> {
        let mut bus = self.bus.lock();
        let bus = &mut *bus;
        let tag = bus.next;
        bus.next += 1;
        if let (Some(tap), Command::Configure { slot, add, .. }) = (&mut bus.tap, &command) {
            let interrupts = add.iter().filter(|spec| spec.kind == EndpointKind::Interrupt);
            interrupts.for_each(|spec| tap.interrupt(*slot, spec.address));
        }
        let result = bus.controller.command(CommandTag(tag), command).err().map(Err);
        bus.commands.insert(tag, PendingCommand { result, ..PendingCommand::default() });
        Commanding::new(self.clone(), tag)
    }

    /// Ready if root port `port` changed since the last time.
    pub(crate) fn poll_port(&self, port: u8, cx: &mut Context<'_>) -> Poll<()> {
        let mut bus = self.bus.lock();
        let Some(watch) = bus.ports.get_mut(usize::from(port)) else { return Poll::Pending };
        if core::mem::take(&mut watch.changed) {
            return Poll::Ready(());
        }
        watch.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Bus {
    fn over(&mut self, transfer: Transfer, actual: usize, status: Status) -> Option<Waker> {
        let token = transfer.token.0;
        let actual = actual.min(transfer.len());
        let result = match status {
            Status::Done => Ok(()),
            Status::Stall => Err(Failure::Stall),
            Status::Overflow => Err(Failure::Overflow),
            Status::Cancelled => Err(Failure::Cancelled),
            Status::Gone => Err(Failure::Gone),
            _ => Err(Failure::Error),
        };
        let pending = self.transfers.get_mut(&token)?;
        if pending.orphan {
            self.transfers.remove(&token);
            return None;
        }
        pending.over = Some(Over { data: transfer.data, actual, result });
        pending.waker.take()
    }
}
