//! [`Simulation`]: what its maker holds.

use super::config::{NodeSetup, SimConfig};
use super::engine::{OUTSIDE, World};
use super::event::Event;
use super::report::{Failure, Leaks, Panicked, ThreadReport};
use super::schedule::Scheduler;
use super::thread::State;
use super::trace::TraceHash;
use super::watchdog::Watched;
use super::{Random, SimHost};
use crate::host::Recover;
use hypercall::{ExitStatus, ThreadId, ThreadSpec, Threads};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::{Arc, Mutex};

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
