//! The engine: threads, events and the loop that runs them.

use super::config::{NodeSetup, SimConfig};
use super::device::Devices;
use super::disk::Disk;
use super::fiber::{self, Fiber};
use super::memory::DmaTable;
use super::report::{Failure, Leaks, Panicked, ThreadReport};
use super::schedule::Scheduler;
use super::segment::{Flight, Segment};
use super::trace::TraceHash;
use super::watchdog::Watched;
use super::{Random, SimHost};
use crate::host::{DomainExit, Recover};
use core::sync::atomic::AtomicU32;
use hypercall::{Call, CpuId, Error, ExitStatus, ParkResult, Result, ThreadId, ThreadSpec, Threads};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::{Arc, Mutex};

/// The index of the outside among the threads.
pub(super) const OUTSIDE: u32 = 0;

/// How often a thread that is to unwind may block before its stack is taken away.
const MOST_DEAD_TURNS: u32 = 10_000;

/// What a yield costs beside the hypercall.
const YIELD_NS: u64 = 1_000;

/// What a thread that is to end is unwound with.
struct Killed;

/// How a thread ended.
enum Ending {
    Returned,
    Killed,
    Exit(ExitStatus),
    Panic(String),
}

/// Words by address. The order of entries is never looked at.
#[derive(Default)]
pub(super) struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_usize(usize::from(*byte));
        }
    }
    fn write_usize(&mut self, value: usize) {
        self.0 = (self.0 ^ value as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 32;
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Free,
    Ready,
    Running,
    Parked,
    Joining(u32),
    Sleeping,
    /// Of a node that is down: only its unwinding is left.
    Dying,
    Ended,
}

struct Thread {
    generation: u32,
    node: u32,
    cpu: u32,
    name: String,
    state: State,
    since_ns: u64,
    word: usize,
    timer: Option<(u64, u64)>,
    result: ParkResult,
    joiner: Option<u32>,
    fiber: Option<Fiber>,
    entry: Option<Box<dyn FnOnce() + Send>>,
    ending: Rc<Cell<Option<Ending>>>,
    panicked: bool,
    killed: bool,
    /// Unwinds, for whatever reason.
    unwinding: bool,
    dead_turns: u32,
}

pub(super) enum Event {
    Wake(u32),
    Flight(Flight),
    /// Bytes have left a sender's queue.
    Departed(usize, usize),
    Call(Box<dyn FnOnce()>),
}

/// A node's own things.
pub(super) struct Node {
    pub(super) name: String,
    pub(super) setup: NodeSetup,
    pub(super) memory: u64,
    pub(super) down: Cell<bool>,
    pub(super) exit: Cell<Option<ExitStatus>>,
    pub(super) pages: Cell<u64>,
    pub(super) dma: RefCell<DmaTable>,
    pub(super) devices: RefCell<Devices>,
    pub(super) random: RefCell<Random>,
    pub(super) console: RefCell<Vec<u8>>,
    /// Indices of ports.
    pub(super) ports: Vec<usize>,
    next_cpu: Cell<u32>,
    threads: Cell<u64>,
    abandoned: Cell<u64>,
}

/// Everything of one simulation.
pub(super) struct World {
    pub(super) config: SimConfig,
    pub(super) now: Cell<u64>,
    steps: Cell<u64>,
    hash: Cell<TraceHash>,
    next_seq: Cell<u64>,
    events: RefCell<BTreeMap<(u64, u64), Event>>,
    next_event_ns: Cell<u64>,
    threads: RefCell<Vec<Thread>>,
    free_threads: RefCell<Vec<u32>>,
    current: Cell<u32>,
    slice_end_ns: Cell<u64>,
    parked: RefCell<HashMap<usize, VecDeque<u32>, BuildHasherDefault<AddressHasher>>>,
    dying: RefCell<VecDeque<u32>>,
    scheduler: RefCell<Scheduler>,
    /// The loop itself runs: nobody may block.
    in_loop: Cell<bool>,
    pub(super) nodes: RefCell<Vec<Rc<Node>>>,
    pub(super) segments: RefCell<Vec<Segment>>,
    pub(super) ports: RefCell<Vec<super::segment::Port>>,
    pub(super) disks: RefCell<Vec<Disk>>,
    pub(super) random: RefCell<Random>,
    panics: RefCell<Vec<Panicked>>,
    watched: Watched,
    slot: Cell<(u32, u32)>,
}

#[derive(Default)]
struct Slot {
    generation: u32,
    world: Option<Rc<World>>,
}

thread_local! {
    /// The simulations of this OS thread.
    static WORLDS: RefCell<Vec<Slot>> = const { RefCell::new(Vec::new()) };
}

pub(super) fn world(slot: u32, generation: u32) -> Option<Rc<World>> {
    // Fails while the OS thread ends; then there is none.
    WORLDS
        .try_with(|worlds| {
            let worlds = worlds.borrow();
            worlds.get(slot as usize).filter(|one| one.generation == generation)?.world.clone()
        })
        .ok()
        .flatten()
}

/// A simulation. It stays on the OS thread that made it; dropping it stops every thread and gives everything back.
///
/// ```
/// use anykernel_userspace::sim::{NodeSetup, SimConfig, Simulation};
/// use hypercall::{Clock, Threads};
///
/// let sim = Simulation::new(SimConfig::seeded(7));
/// let host = sim.node(NodeSetup::named("a"));
/// let slept = sim.run(host, "main", move || {
///     let start = host.monotonic_ns();
///     host.park(&0.into(), 0, Some(start + 3_600_000_000_000));
///     host.monotonic_ns() - start
/// });
/// assert!(slept.unwrap() >= 3_600_000_000_000);
/// ```
pub struct Simulation(Rc<World>);

impl Simulation {
    /// A simulation without nodes, at time 0.
    pub fn new(config: SimConfig) -> Self {
        let world = Rc::new(World {
            now: Cell::new(0),
            steps: Cell::new(0),
            hash: Cell::new(TraceHash::new(config.seed)),
            next_seq: Cell::new(0),
            events: RefCell::default(),
            next_event_ns: Cell::new(u64::MAX),
            threads: RefCell::default(),
            free_threads: RefCell::default(),
            current: Cell::new(OUTSIDE),
            slice_end_ns: Cell::new(config.slice_ns),
            parked: RefCell::default(),
            dying: RefCell::default(),
            scheduler: RefCell::new(Scheduler::new(config.schedule, config.seed)),
            in_loop: Cell::new(false),
            nodes: RefCell::default(),
            segments: RefCell::default(),
            ports: RefCell::default(),
            disks: RefCell::default(),
            random: RefCell::new(Random::new(config.seed, 2)),
            panics: RefCell::default(),
            watched: Watched::new(config.watchdog_s),
            slot: Cell::default(),
            config,
        });
        let outside = world.new_thread(u32::MAX, 0, "outside", None);
        debug_assert_eq!(outside, OUTSIDE);
        world.threads.borrow_mut()[0].state = State::Running;
        WORLDS.with_borrow_mut(|worlds| {
            let at = worlds.iter().position(|slot| slot.world.is_none()).unwrap_or_else(|| {
                worlds.push(Slot::default());
                worlds.len() - 1
            });
            worlds[at].world = Some(world.clone());
            world.slot.set((at as u32, worlds[at].generation));
        });
        Self(world)
    }

    pub(super) fn world(&self) -> &Rc<World> {
        &self.0
    }

    /// Adds a node. Panics if it names a disk or a segment of another simulation.
    pub fn node(&self, setup: NodeSetup) -> SimHost {
        self.0.add_node(setup)
    }

    /// Virtual time in nanoseconds.
    pub fn now_ns(&self) -> u64 {
        self.0.now.get()
    }

    /// Hypercalls so far.
    pub fn steps(&self) -> u64 {
        self.0.steps.get()
    }

    /// A hash over every hypercall so far: who, what, arguments that are not addresses, result, when.
    pub fn trace_hash(&self) -> u64 {
        self.0.hash.get().get()
    }

    /// Runs `body` on a thread of `host` and waits for it, others running meanwhile. Context: the outside.
    pub fn run<T: Send + 'static>(
        &self,
        host: SimHost,
        name: &str,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Failure> {
        let cell = Arc::new(Mutex::new(None));
        let its = cell.clone();
        let entry = Box::new(move || *its.lock().recover() = Some(body()));
        let Ok(thread) = host.spawn(ThreadSpec { name, cpu: None }, entry) else { return Err(Failure::Down) };
        self.0.join_outside(host.index(), thread)?;
        let value = cell.lock().recover().take();
        value.ok_or_else(|| self.0.why_ended(host.index()))
    }

    /// Waits for a thread that was started with [`Threads::spawn`]. Context: the outside. Errors: it panicked, its node went
    /// down, or a limit is reached.
    pub fn wait_for(&self, host: SimHost, thread: ThreadId) -> Result<(), Failure> {
        match self.0.join_any(host.index(), thread)? {
            Ok(()) => Ok(()),
            Err(_) => Err(self.0.why_ended(host.index())),
        }
    }

    /// Lets `ns` of virtual time pass. Context: the outside. Errors: a limit.
    pub fn run_for(&self, ns: u64) -> Result<(), Failure> {
        self.0.sleep_outside(self.now_ns() + ns)
    }

    /// Lets time pass until `done`, which is asked after every millisecond at the latest, or `deadline_ns`. Says whether it
    /// was done. Context: the outside. Errors: a limit.
    pub fn run_until(&self, deadline_ns: u64, mut done: impl FnMut() -> bool) -> Result<bool, Failure> {
        loop {
            if done() {
                return Ok(true);
            }
            let now = self.now_ns();
            if now >= deadline_ns {
                return Ok(false);
            }
            self.0.sleep_outside(deadline_ns.min(now + super::MS))?;
        }
    }

    /// `what` happens at `at_ns`, between two hypercalls of whoever runs then. It must not block.
    pub fn at(&self, at_ns: u64, what: impl FnOnce() + 'static) {
        self.0.schedule(at_ns, Event::Call(Box::new(what)));
    }

    /// Stops all threads of a node, as if its power failed: they unwind, and nothing they still call does anything. Disks
    /// keep what [`super::PowerCut`] left of them, links are closed. Context: the outside or [`Simulation::at`].
    pub fn crash(&self, host: SimHost) {
        self.0.crash(host.index());
    }

    /// A new node like the one that `host` was, with its disks and links, after a crash or an exit of that.
    pub fn reboot(&self, host: SimHost) -> SimHost {
        self.0.crash(host.index());
        self.0.reap();
        self.0.add_node_on(host.index())
    }

    /// How the node ended, if it called exit or one of its threads panicked.
    pub fn exit_status(&self, host: SimHost) -> Option<ExitStatus> {
        self.0.node(host.index())?.exit.get()
    }

    /// What the node has written to its console.
    pub fn console(&self, host: SimHost) -> String {
        let Some(node) = self.0.node(host.index()) else { return String::new() };
        let bytes = node.console.borrow();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Threads that panicked so far.
    pub fn panics(&self) -> Vec<Panicked> {
        self.0.panics.borrow().clone()
    }

    /// Every thread that there is, but for the outside.
    pub fn threads(&self) -> Vec<ThreadReport> {
        self.0.report_threads()
    }

    /// What a node has not given back by now.
    pub fn leaks(&self, host: SimHost) -> Leaks {
        let Some(node) = self.0.node(host.index()) else { return Leaks::default() };
        let (dma_blocks, dma_maps) = node.dma.borrow().counts();
        let ports = self.0.ports.borrow();
        Leaks {
            pages: node.pages.get(),
            dma_blocks,
            dma_maps,
            irqs: node.devices.borrow().attached(),
            links: node.ports.iter().filter(|port| ports[**port].is_open_by(host.index())).count() as u64,
            threads: node.threads.get(),
            abandoned: node.abandoned.get(),
        }
    }
}

impl Drop for Simulation {
    fn drop(&mut self) {
        let world = &self.0;
        let nodes = world.nodes.borrow().len() as u32;
        for node in 0..nodes {
            world.crash(node);
        }
        world.reap();
        let events = core::mem::take(&mut *world.events.borrow_mut());
        drop(events);
        let (slot, _) = world.slot.get();
        let gone = WORLDS.try_with(|worlds| {
            let mut worlds = worlds.borrow_mut();
            let slot = worlds.get_mut(slot as usize)?;
            slot.generation = slot.generation.wrapping_add(1);
            slot.world.take()
        });
        drop(gone);
    }
}

impl World {
    // Nodes.

    pub(super) fn node(&self, index: u32) -> Option<Rc<Node>> {
        self.nodes.borrow().get(index as usize).cloned()
    }

    fn add_node(&self, setup: NodeSetup) -> SimHost {
        let index = self.nodes.borrow().len() as u32;
        let ports = setup.links.iter().map(|segment| self.add_port(*segment)).collect();
        assert!(setup.disks.iter().all(|disk| disk.0 < self.disks.borrow().len()), "no such disk here");
        self.push_node(index, setup, ports)
    }

    fn add_node_on(&self, old: u32) -> SimHost {
        let old = self.node(old).expect("a node of this simulation");
        let index = self.nodes.borrow().len() as u32;
        self.push_node(index, old.setup.clone(), old.ports.clone())
    }

    fn push_node(&self, index: u32, setup: NodeSetup, ports: Vec<usize>) -> SimHost {
        for port in &ports {
            self.ports.borrow_mut()[*port].node = index;
        }
        let cpus = setup.cpus.max(1);
        let node = Node {
            name: if setup.name.is_empty() { format!("node{index}") } else { setup.name.clone() },
            memory: setup.memory,
            down: Cell::new(false),
            exit: Cell::new(None),
            pages: Cell::new(0),
            dma: RefCell::default(),
            devices: RefCell::default(),
            random: RefCell::new(Random::new(self.config.seed, 1000 + u64::from(index))),
            console: RefCell::default(),
            ports,
            next_cpu: Cell::new(0),
            threads: Cell::new(0),
            abandoned: Cell::new(0),
            setup,
        };
        self.nodes.borrow_mut().push(Rc::new(node));
        let (slot, generation) = self.slot.get();
        SimHost::new(slot, generation, index, cpus)
    }

    /// Takes a node down. Its threads unwind when the loop comes to it, the caller, if it is one of them, at once.
    pub(super) fn crash(&self, index: u32) {
        let Some(node) = self.node(index) else { return };
        if node.down.replace(true) {
            return;
        }
        self.close_ports(&node);
        for disk in &node.setup.disks {
            self.disks.borrow_mut()[disk.0].power_fails(&mut self.random.borrow_mut());
        }
        let devices = core::mem::take(&mut *node.devices.borrow_mut());
        drop(devices);
        let current = self.current.get();
        let threads = self.threads.borrow().len() as u32;
        for at in 0..threads {
            let mut threads = self.threads.borrow_mut();
            let thread = &mut threads[at as usize];
            if thread.node != index || matches!(thread.state, State::Free | State::Ended | State::Dying) {
                continue;
            }
            thread.killed = true;
            if at == current && thread.state == State::Running {
                continue;
            }
            let timer = thread.timer.take();
            let (word, state) = (thread.word, core::mem::replace(&mut thread.state, State::Dying));
            drop(threads);
            self.forget_timer(timer);
            match state {
                State::Parked => self.forget_parked(word, at),
                State::Ready => self.scheduler.borrow_mut().remove(at),
                State::Joining(target) => self.threads.borrow_mut()[target as usize].joiner = None,
                _ => {}
            }
            self.dying.borrow_mut().push_back(at);
        }
    }

    /// Unwinds what is left of nodes that are down.
    fn reap(&self) {
        loop {
            let Some(at) = self.dying.borrow_mut().pop_front() else { return };
            let mut threads = self.threads.borrow_mut();
            let thread = &mut threads[at as usize];
            thread.dead_turns += 1;
            if thread.dead_turns > MOST_DEAD_TURNS {
                let fiber = thread.fiber.take();
                let node = thread.node;
                thread.ending.set(Some(Ending::Killed));
                drop(threads);
                if let Some(fiber) = fiber {
                    fiber.recycle();
                }
                if let Some(node) = self.node(node) {
                    node.abandoned.set(node.abandoned.get() + 1);
                }
                self.ended(at);
                continue;
            }
            if thread.fiber.is_none() {
                let entry = thread.entry.take();
                thread.ending.set(Some(Ending::Killed));
                drop(threads);
                drop(entry);
                self.ended(at);
                continue;
            }
            drop(threads);
            self.resume(at);
        }
    }

    fn why_ended(&self, index: u32) -> Failure {
        let Some(node) = self.node(index) else { return Failure::Down };
        let panicked = self.panics.borrow().iter().find(|one| one.node == node.name).cloned();
        match (panicked, node.exit.get()) {
            (Some(panicked), _) => Failure::Panic(panicked),
            (None, Some(status)) => Failure::Exited(status),
            (None, None) => Failure::Down,
        }
    }

    // The trace.

    /// At the beginning of every hypercall of node `index`: counts it, lets it cost its time, and lets others run if it is
    /// their turn.
    #[inline]
    pub(super) fn enter(self: &Rc<Self>, index: u32, call: Call, arguments: [u64; 2]) {
        let steps = self.steps.get() + 1;
        self.steps.set(steps);
        let now = self.now.get() + self.config.call_ns;
        self.now.set(now);
        self.watched.beat(steps);
        let current = self.current.get();
        let mut hash = self.hash.get();
        hash.mix(u64::from(index) << 40 | u64::from(current) << 8 | call as u64);
        hash.mix(arguments[0]);
        hash.mix(arguments[1]);
        hash.mix(now);
        self.hash.set(hash);
        if self.in_loop.get() {
            return;
        }
        let due = self.next_event_ns.get() <= now;
        let over = now >= self.slice_end_ns.get();
        if due
            || over
            || steps >= self.config.step_limit
            || self.scheduler.borrow_mut().preempts(current, steps)
        {
            if over {
                self.scheduler.borrow_mut().falls_behind(current);
            }
            self.give_way(current, over);
        }
    }

    /// At the end of a hypercall that has a result.
    #[inline]
    pub(super) fn leave(&self, result: u64) {
        let mut hash = self.hash.get();
        hash.mix(result);
        self.hash.set(hash);
    }

    pub(super) fn leave_with<T>(&self, result: &Result<T>) {
        self.leave(match result {
            Ok(_) => 0,
            Err(error) => 1 + *error as u64,
        });
    }

    /// Lets the loop run; the caller goes on when its turn comes again.
    pub(super) fn give_way(self: &Rc<Self>, current: u32, to_the_end: bool) {
        {
            let mut threads = self.threads.borrow_mut();
            let thread = &mut threads[current as usize];
            if thread.killed {
                thread.state = State::Dying;
                self.dying.borrow_mut().push_back(current);
            } else {
                thread.state = State::Ready;
                self.scheduler.borrow_mut().add(current, !to_the_end);
            }
        }
        self.switch(current);
    }

    /// Lets a moment pass, or others run.
    pub(super) fn yield_now(self: &Rc<Self>, index: u32) {
        if self.in_loop.get() {
            return;
        }
        let current = self.current.get();
        if self.is_down(index) {
            return self.dead_turn(current);
        }
        self.scheduler.borrow_mut().falls_behind(current);
        // Who spins waits for time to pass.
        self.now.set(self.now.get() + YIELD_NS);
        self.give_way(current, true);
    }

    fn is_down(&self, index: u32) -> bool {
        self.node(index).is_none_or(|node| node.down.get())
    }

    /// What blocking is in a node that is down.
    fn dead_turn(self: &Rc<Self>, current: u32) {
        if self.threads.borrow()[current as usize].killed {
            self.give_way(current, true);
        }
    }

    // Time and events.

    pub(super) fn schedule(&self, at_ns: u64, event: Event) -> (u64, u64) {
        let seq = self.next_seq.get();
        self.next_seq.set(seq + 1);
        let mut events = self.events.borrow_mut();
        events.insert((at_ns, seq), event);
        self.next_event_ns.set(self.next_event_ns.get().min(at_ns));
        (at_ns, seq)
    }

    fn forget_timer(&self, timer: Option<(u64, u64)>) {
        if let Some(key) = timer {
            let mut events = self.events.borrow_mut();
            let event = events.remove(&key);
            if key.0 == self.next_event_ns.get() {
                self.next_event_ns.set(events.first_key_value().map_or(u64::MAX, |(key, _)| key.0));
            }
            drop((events, event));
        }
    }

    fn fire_due(&self) {
        while self.next_event_ns.get() <= self.now.get() {
            let mut events = self.events.borrow_mut();
            let event = events.pop_first();
            self.next_event_ns.set(events.first_key_value().map_or(u64::MAX, |(key, _)| key.0));
            drop(events);
            match event {
                Some((_, Event::Wake(thread))) => self.timed_out(thread),
                Some((_, Event::Flight(flight))) => self.land(flight),
                Some((_, Event::Departed(port, bytes))) => self.departed(port, bytes),
                Some((_, Event::Call(what))) => what(),
                None => return,
            }
        }
    }

    fn timed_out(&self, at: u32) {
        let mut threads = self.threads.borrow_mut();
        let thread = &mut threads[at as usize];
        thread.timer = None;
        let (word, state) = (thread.word, thread.state);
        thread.result = ParkResult::TimedOut;
        drop(threads);
        match state {
            State::Parked => {
                self.forget_parked(word, at);
                self.make_ready(at);
            }
            State::Sleeping => self.make_ready(at),
            _ => {}
        }
    }

    fn make_ready(&self, at: u32) {
        let timer = {
            let mut threads = self.threads.borrow_mut();
            let thread = &mut threads[at as usize];
            thread.state = State::Ready;
            thread.timer.take()
        };
        self.forget_timer(timer);
        self.scheduler.borrow_mut().add(at, false);
    }

    // Threads.

    fn new_thread(&self, node: u32, cpu: u32, name: &str, entry: Option<Box<dyn FnOnce() + Send>>) -> u32 {
        let mut threads = self.threads.borrow_mut();
        let free = self.free_threads.borrow_mut().pop();
        let generation = free.map_or(1, |at| threads[at as usize].generation);
        let thread = Thread {
            generation,
            node,
            cpu,
            name: name.into(),
            state: State::Ready,
            since_ns: self.now.get(),
            word: 0,
            timer: None,
            result: ParkResult::Woken,
            joiner: None,
            fiber: None,
            entry,
            ending: Rc::default(),
            panicked: false,
            killed: false,
            unwinding: false,
            dead_turns: 0,
        };
        let at = match free {
            Some(at) => {
                threads[at as usize] = thread;
                at
            }
            None => {
                threads.push(thread);
                threads.len() as u32 - 1
            }
        };
        self.scheduler.borrow_mut().born(at);
        at
    }

    pub(super) fn spawn(
        &self,
        index: u32,
        spec: ThreadSpec<'_>,
        entry: Box<dyn FnOnce() + Send>,
    ) -> Result<ThreadId> {
        let node = self.node(index).ok_or(Error::Gone)?;
        let cpus = node.setup.cpus.max(1);
        let cpu = match spec.cpu {
            Some(CpuId(cpu)) if cpu >= cpus => return Err(Error::Invalid),
            Some(CpuId(cpu)) => cpu,
            None => {
                let next = node.next_cpu.get();
                node.next_cpu.set((next + 1) % cpus);
                next
            }
        };
        let at = self.new_thread(index, cpu, spec.name, Some(entry));
        node.threads.set(node.threads.get() + 1);
        self.scheduler.borrow_mut().add(at, false);
        let generation = self.threads.borrow()[at as usize].generation;
        Ok(ThreadId(u64::from(generation) << 32 | u64::from(at)))
    }

    /// The CPU that the caller runs on, 0 for one of another node.
    pub(super) fn cpu(&self, index: u32) -> u32 {
        let threads = self.threads.borrow();
        threads
            .get(self.current.get() as usize)
            .filter(|thread| thread.node == index)
            .map_or(0, |thread| thread.cpu)
    }

    fn resume(&self, at: u32) {
        let mut threads = self.threads.borrow_mut();
        let thread = &mut threads[at as usize];
        if thread.state != State::Dying {
            thread.state = State::Running;
        }
        let mut fiber = match thread.fiber.take() {
            Some(fiber) => fiber,
            None => {
                let entry = thread.entry.take().expect("a thread begins once");
                let ending = thread.ending.clone();
                Fiber::new(self.config.stack_bytes, move || {
                    ending.set(Some(match catch_unwind(AssertUnwindSafe(entry)) {
                        Ok(()) => Ending::Returned,
                        Err(payload) => classify(payload),
                    }));
                })
                .expect("memory for a stack")
            }
        };
        self.watched.runs(thread.node, at);
        drop(threads);
        self.current.set(at);
        self.slice_end_ns.set(self.now.get() + self.config.slice_ns);
        self.in_loop.set(false);
        let ended = fiber.resume();
        self.in_loop.set(true);
        if ended {
            fiber.recycle();
            self.ended(at);
        } else {
            self.threads.borrow_mut()[at as usize].fiber = Some(fiber);
        }
    }

    fn ended(&self, at: u32) {
        let mut threads = self.threads.borrow_mut();
        let thread = &mut threads[at as usize];
        let ending = thread.ending.take().unwrap_or(Ending::Killed);
        thread.state = State::Ended;
        thread.panicked = !matches!(ending, Ending::Returned);
        let (index, name, joiner, killed) = (thread.node, thread.name.clone(), thread.joiner, thread.killed);
        drop(threads);
        let Some(node) = self.node(index) else { return };
        if killed {
            // Nobody of its node will join it.
            node.threads.set(node.threads.get() - 1);
            if joiner.is_none() {
                self.free_thread(at);
            }
        }
        if let Some(joiner) = joiner {
            self.make_ready(joiner);
        }
        let status = match ending {
            Ending::Returned | Ending::Killed => return,
            Ending::Exit(status) => status,
            Ending::Panic(message) => {
                let at_ns = self.now.get();
                self.panics.borrow_mut().push(Panicked {
                    node: node.name.clone(),
                    thread: name,
                    message,
                    at_ns,
                });
                ExitStatus::Panic
            }
        };
        if node.exit.get().is_none() {
            node.exit.set(Some(status));
        }
        self.crash(index);
    }

    fn free_thread(&self, at: u32) {
        let mut threads = self.threads.borrow_mut();
        let thread = &mut threads[at as usize];
        thread.state = State::Free;
        thread.generation = thread.generation.wrapping_add(1).max(1);
        self.free_threads.borrow_mut().push(at);
    }

    /// The thread of that id, if it may be joined by the caller.
    fn joinable(&self, index: u32, id: ThreadId) -> Option<u32> {
        let at = id.0 as u32;
        let threads = self.threads.borrow();
        let thread = threads.get(at as usize)?;
        let same = u64::from(thread.generation) == id.0 >> 32 && thread.node == index;
        let free = thread.state != State::Free && thread.joiner.is_none() && at != self.current.get();
        (same && free).then_some(at)
    }

    fn join_any(self: &Rc<Self>, index: u32, id: ThreadId) -> Result<Result<()>, Failure> {
        let Some(target) = self.joinable(index, id) else { return Ok(Err(Error::NotFound)) };
        let current = self.current.get();
        if self.threads.borrow()[target as usize].state != State::Ended {
            self.threads.borrow_mut()[target as usize].joiner = Some(current);
            self.block(State::Joining(target), None)?;
        }
        let mut threads = self.threads.borrow_mut();
        let thread = &mut threads[target as usize];
        let (panicked, killed) = (thread.panicked, thread.killed);
        drop(threads);
        self.free_thread(target);
        if !killed && let Some(node) = self.node(index) {
            node.threads.set(node.threads.get() - 1);
        }
        Ok(if panicked { Err(Error::Gone) } else { Ok(()) })
    }

    pub(super) fn join(self: &Rc<Self>, index: u32, id: ThreadId) -> Result<()> {
        if self.is_down(index) && self.current.get() != OUTSIDE {
            return Err(Error::NotFound);
        }
        match self.join_any(index, id) {
            Ok(result) => result,
            Err(failure) => panic!("{failure}"),
        }
    }

    fn join_outside(self: &Rc<Self>, index: u32, id: ThreadId) -> Result<(), Failure> {
        self.join_any(index, id).map(|_| ())
    }

    fn sleep_outside(self: &Rc<Self>, until_ns: u64) -> Result<(), Failure> {
        self.block(State::Sleeping, Some(until_ns)).map(|_| ())
    }

    /// Lets a hypercall take its time.
    pub(super) fn sleep(self: &Rc<Self>, ns: u64) {
        if !self.in_loop.get() && ns > 0 {
            let until = self.now.get() + ns;
            self.block(State::Sleeping, Some(until)).unwrap_or_else(|failure| panic!("{failure}"));
        }
    }

    pub(super) fn park(
        self: &Rc<Self>,
        index: u32,
        word: &AtomicU32,
        expected: u32,
        deadline_ns: Option<u64>,
    ) -> ParkResult {
        assert!(!self.in_loop.get(), "an event of the simulation may not block");
        let current = self.current.get();
        if word.load(core::sync::atomic::Ordering::SeqCst) != expected {
            return ParkResult::Changed;
        }
        if self.is_down(index) {
            self.dead_turn(current);
            return ParkResult::Woken;
        }
        if deadline_ns.is_some_and(|deadline| deadline <= self.now.get()) {
            // Others get their turn all the same: who polls so must not keep them from running.
            self.give_way(current, true);
            return ParkResult::TimedOut;
        }
        let address = core::ptr::from_ref(word).addr();
        self.threads.borrow_mut()[current as usize].word = address;
        self.parked.borrow_mut().entry(address).or_default().push_back(current);
        self.block(State::Parked, deadline_ns).unwrap_or_else(|failure| panic!("{failure}"))
    }

    pub(super) fn unpark(&self, word: &AtomicU32, count: u32) -> u32 {
        let address = core::ptr::from_ref(word).addr();
        let mut woken = 0;
        while woken < count {
            let mut parked = self.parked.borrow_mut();
            let Some(waiting) = parked.get_mut(&address) else { break };
            let next = self.scheduler.borrow_mut().choose_waiter(waiting);
            if waiting.is_empty() {
                parked.remove(&address);
            }
            drop(parked);
            let Some(next) = next else { break };
            self.threads.borrow_mut()[next as usize].result = ParkResult::Woken;
            self.make_ready(next);
            woken += 1;
        }
        woken
    }

    fn forget_parked(&self, word: usize, at: u32) {
        let mut parked = self.parked.borrow_mut();
        if let Some(waiting) = parked.get_mut(&word) {
            waiting.retain(|one| *one != at);
            if waiting.is_empty() {
                parked.remove(&word);
            }
        }
    }

    /// Blocks the caller. Only the outside ever sees a failure.
    fn block(self: &Rc<Self>, state: State, deadline_ns: Option<u64>) -> Result<ParkResult, Failure> {
        assert!(!self.in_loop.get(), "an event of the simulation may not block");
        let current = self.current.get();
        let timer = deadline_ns.map(|at_ns| self.schedule(at_ns, Event::Wake(current)));
        {
            let mut threads = self.threads.borrow_mut();
            let thread = &mut threads[current as usize];
            thread.state = state;
            thread.since_ns = self.now.get();
            thread.timer = timer;
            thread.result = ParkResult::Woken;
        }
        if current == OUTSIDE {
            self.drive()?;
        } else {
            self.switch(current);
        }
        Ok(self.threads.borrow()[current as usize].result)
    }

    /// Leaves the caller, whose state says what it waits for, and comes back when it runs again.
    fn switch(self: &Rc<Self>, current: u32) {
        if current == OUTSIDE {
            self.drive().unwrap_or_else(|failure| panic!("{failure}"));
            return;
        }
        {
            let mut threads = self.threads.borrow_mut();
            let thread = &mut threads[current as usize];
            thread.unwinding |= !thread.killed && std::thread::panicking();
        }
        fiber::suspend();
        if self.is_to_unwind() {
            unwind();
        }
    }

    /// Whether the calling thread's node is down and it has not begun to unwind.
    pub(super) fn is_to_unwind(&self) -> bool {
        let current = self.current.get();
        if self.in_loop.get() || current == OUTSIDE {
            return false;
        }
        let mut threads = self.threads.borrow_mut();
        let thread = &mut threads[current as usize];
        let now = thread.killed && !thread.unwinding;
        thread.unwinding |= now;
        now
    }

    /// The node ends itself; the caller unwinds with its status next.
    pub(super) fn exits(&self, index: u32, status: ExitStatus) {
        if let Some(node) = self.node(index)
            && node.exit.get().is_none()
        {
            node.exit.set(Some(status));
        }
        self.crash(index);
        // Not a second time.
        let _ = self.is_to_unwind();
    }

    /// Runs the others until the outside can run again.
    fn drive(&self) -> Result<(), Failure> {
        self.in_loop.set(true);
        let result = self.drive_loop();
        self.in_loop.set(false);
        self.current.set(OUTSIDE);
        self.slice_end_ns.set(self.now.get() + self.config.slice_ns);
        self.watched.rests();
        if result.is_err() {
            // It runs again, with the bad news.
            let mut threads = self.threads.borrow_mut();
            let outside = &mut threads[OUTSIDE as usize];
            let (word, timer) = (outside.word, outside.timer.take());
            let state = core::mem::replace(&mut outside.state, State::Running);
            drop(threads);
            self.forget_timer(timer);
            match state {
                State::Parked => self.forget_parked(word, OUTSIDE),
                State::Ready => self.scheduler.borrow_mut().remove(OUTSIDE),
                State::Joining(target) => self.threads.borrow_mut()[target as usize].joiner = None,
                _ => {}
            }
        }
        result
    }

    fn drive_loop(&self) -> Result<(), Failure> {
        loop {
            self.reap();
            self.fire_due();
            let at_ns = self.now.get();
            if self.steps.get() >= self.config.step_limit {
                let threads = self.report_threads();
                return Err(Failure::StepLimit { steps: self.steps.get(), at_ns, threads });
            }
            if at_ns > self.config.time_limit_ns {
                return Err(Failure::TimeLimit { at_ns, threads: self.report_threads() });
            }
            let next = self.scheduler.borrow_mut().next();
            match next {
                Some(OUTSIDE) => {
                    self.threads.borrow_mut()[OUTSIDE as usize].state = State::Running;
                    return Ok(());
                }
                Some(at) => self.resume(at),
                None if self.next_event_ns.get() == u64::MAX => {
                    return Err(Failure::Deadlock { at_ns, threads: self.report_threads() });
                }
                None => self.now.set(at_ns.max(self.next_event_ns.get())),
            }
        }
    }

    fn report_threads(&self) -> Vec<ThreadReport> {
        let threads = self.threads.borrow();
        let live = threads.iter().skip(1).filter(|thread| thread.state != State::Free);
        live.map(|thread| ThreadReport {
            node: self.node(thread.node).map_or_else(String::new, |node| node.name.clone()),
            name: thread.name.clone(),
            state: match thread.state {
                State::Free => String::new(),
                State::Ready | State::Running => "can run".into(),
                State::Parked => match thread.timer {
                    Some((at, _)) => format!("parked since {} ns, until {at} ns", thread.since_ns),
                    None => format!("parked since {} ns, without a deadline", thread.since_ns),
                },
                State::Joining(target) => match threads.get(target as usize) {
                    Some(other) => format!("joins {} since {} ns", other.name, thread.since_ns),
                    None => "joins".into(),
                },
                State::Sleeping => "in a hypercall that takes its time".into(),
                State::Dying => "unwinds".into(),
                State::Ended => "has ended and was not joined".into(),
            },
        })
        .collect()
    }
}

/// Ends the calling thread by unwinding it.
pub(super) fn unwind() -> ! {
    resume_unwind(Box::new(Killed))
}

fn classify(payload: Box<dyn Any + Send>) -> Ending {
    if payload.is::<Killed>() {
        return Ending::Killed;
    }
    if let Some(exit) = payload.downcast_ref::<DomainExit>() {
        return Ending::Exit(exit.0);
    }
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_string());
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
    Ending::Panic(text.unwrap_or_else(|| "a panic without a message".into()))
}

/// Wakes whoever waits for a signal that the simulation itself raises.
pub(super) struct Raiser<'a>(pub(super) &'a World);

impl Threads for Raiser<'_> {
    fn spawn(&self, _: ThreadSpec<'_>, _: Box<dyn FnOnce() + Send + 'static>) -> Result<ThreadId> {
        Err(Error::Unsupported)
    }
    fn join(&self, _: ThreadId) -> Result<()> {
        Err(Error::Unsupported)
    }
    fn park(&self, _: &AtomicU32, _: u32, _: Option<u64>) -> ParkResult {
        ParkResult::Woken
    }
    fn unpark(&self, word: &AtomicU32, count: u32) -> u32 {
        self.0.unpark(word, count)
    }
    fn yield_now(&self) {}
}
