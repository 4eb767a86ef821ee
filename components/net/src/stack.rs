//! The stack: threads and locks around the shards.
//!
//! Each shard is behind a mutex. Its thread sleeps on a signal and polls; application threads take the lock
//! themselves to send and receive, so that a packet leaves without a change of threads. Wakers are called, and other
//! shards told, after the lock is given back.

use crate::config::{Limits, Settings};
use crate::counters::NetCounters;
use crate::provider::Provider;
use crate::shard::{Message, NicSetup, Shard, ShardSetup};
use alloc::sync::{Arc, Weak};
use alloc::{boxed::Box, format, string::String, vec::Vec};
use anykernel::manifest::{Capability, Manifest};
use anykernel::nic::{Nic, NicQueue};
use anykernel::socket::{NetError, Result};
use anykernel::sync::{Mutex, MutexGuard};
use anykernel::{Kernel, StartError};
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crossbeam_queue::ArrayQueue;
use hypercall::{ContractVersion, CpuId, Host, Signal};

/// Messages between two shards that wait. More are dropped and counted.
const RING_LEN: usize = 1024;

const MANIFEST: Manifest = Manifest {
    name: "net",
    summary: "Ethernet, IPv4, IPv6, UDP and TCP",
    core: &[
        Capability::Clock,
        Capability::Memory,
        Capability::Threads,
        Capability::Cpus,
        Capability::Entropy,
    ],
    contracts: &[ContractVersion::CORE],
};

/// A shard with what its thread and others need to reach it.
pub(crate) struct Cell<H: Host> {
    shard: Mutex<H, Shard>,
    signal: Arc<Signal>,
    inbox: ArrayQueue<Message>,
    /// The deadline that the thread sleeps to; an earlier one needs the signal. `0` while it is awake.
    sleeps_until: AtomicU64,
}

/// The stack.
pub(crate) struct Stack<H: Host> {
    pub(crate) host: H,
    pub(crate) cells: Vec<Cell<H>>,
    counters: NetCounters,
    /// Counts through the dynamic ports.
    pub(crate) next_port: AtomicU32,
    /// What has the settings.
    kernel: Weak<Kernel<H>>,
    /// Interfaces by their numbers. Held while one comes or goes.
    places: Mutex<H, Vec<Place>>,
}

/// A number of an interface, and who has it.
struct Place {
    mac: [u8; 6],
    /// `None`: it was unplugged.
    name: Option<String>,
}

/// The lock of a shard. Giving it back lets the shard send, then wakes whoever waited.
pub(crate) struct Session<'a, H: Host> {
    stack: &'a Stack<H>,
    index: usize,
    guard: Option<MutexGuard<'a, H, Shard>>,
}

impl<H: Host> Deref for Session<'_, H> {
    type Target = Shard;
    #[expect(clippy::expect_used, reason = "the guard is there until drop")]
    fn deref(&self) -> &Shard {
        self.guard.as_ref().expect("guard")
    }
}

impl<H: Host> DerefMut for Session<'_, H> {
    #[expect(clippy::expect_used, reason = "the guard is there until drop")]
    fn deref_mut(&mut self) -> &mut Shard {
        self.guard.as_mut().expect("guard")
    }
}

impl<H: Host> Drop for Session<'_, H> {
    fn drop(&mut self) {
        let Some(mut guard) = self.guard.take() else { return };
        let mut more = guard.finish();
        // Only the thread asks the device to tell of room.
        more |= guard.io.is_waiting();
        let (mut wakers, mut messages) = (Vec::new(), Vec::new());
        guard.swap_effects(&mut wakers, &mut messages);
        let deadline = guard.next_deadline_ns();
        drop(guard);
        self.stack.deliver(&mut messages);
        for waker in wakers {
            waker.wake();
        }
        if let Some(cell) = self.stack.cells.get(self.index) {
            let sleeps_until = cell.sleeps_until.load(Ordering::Relaxed);
            if more || deadline.is_some_and(|deadline| deadline < sleeps_until) {
                cell.signal.raise(&self.stack.host);
            }
        }
    }
}

impl<H: Host> Stack<H> {
    /// Locks a shard. Context: thread. Blocks for as long as another thread uses it.
    pub(crate) fn enter(&self, index: usize) -> Result<Session<'_, H>> {
        let cell = self.cells.get(index).ok_or(NetError::Invalid)?;
        let mut guard = cell.shard.lock();
        guard.set_now(self.host.monotonic_ns());
        Ok(Session { stack: self, index, guard: Some(guard) })
    }

    fn deliver(&self, messages: &mut Vec<(usize, Message)>) {
        let mut to = 0u64;
        for (index, message) in messages.drain(..) {
            let Some(cell) = self.cells.get(index) else { continue };
            let mut message = message;
            // Configuration is rare and may not be lost; the ring empties as fast as the other shard runs.
            while let Err(back) = cell.inbox.push(message) {
                if !matches!(back, Message::Routes(_)) {
                    self.counters.drop_ring_full.increment();
                    break;
                }
                message = back;
                cell.signal.raise(&self.host);
                self.host.yield_now();
            }
            to |= 1 << (index % 64);
        }
        if to != 0 {
            for (index, cell) in self.cells.iter().enumerate() {
                if to & 1 << (index % 64) != 0 {
                    cell.signal.raise(&self.host);
                }
            }
        }
    }

    /// What the thread of a shard does until `stopping`.
    fn run(&self, index: usize, stopping: impl Fn() -> bool) {
        let Some(cell) = self.cells.get(index) else { return };
        let (mut wakers, mut messages) = (Vec::new(), Vec::new());
        while !stopping() {
            let seen = cell.signal.count();
            cell.sleeps_until.store(0, Ordering::Relaxed);
            let now_ns = self.host.monotonic_ns();
            let mut guard = cell.shard.lock();
            guard.set_now(now_ns);
            for _ in 0..RING_LEN {
                let Some(message) = cell.inbox.pop() else { break };
                guard.message_in(message);
            }
            let again = guard.poll(now_ns).again || guard.arm() || !cell.inbox.is_empty();
            guard.swap_effects(&mut wakers, &mut messages);
            let deadline = guard.next_deadline_ns();
            // Under the lock, so that whoever takes it next compares with what we go to sleep with.
            if !again {
                cell.sleeps_until.store(deadline.unwrap_or(u64::MAX), Ordering::Relaxed);
            }
            drop(guard);
            self.deliver(&mut messages);
            for waker in wakers.drain(..) {
                waker.wake();
            }
            if again {
                // Others want the lock, or this CPU, too.
                self.host.yield_now();
            } else {
                cell.signal.wait(&self.host, seen, deadline);
            }
        }
    }

    /// See [`SocketProvider::attach`].
    pub(crate) fn attach(&self, nic: &Arc<dyn Nic>) -> Result<()> {
        let info = nic.info();
        let mut places = self.places.lock();
        if places.iter().any(|place| place.name.as_ref() == Some(&info.name)) {
            return Ok(());
        }
        let kernel = self.kernel.upgrade().ok_or(NetError::Closed)?;
        // Its own again, else any that is free.
        let free = |place: &Place| place.name.is_none();
        let number = places
            .iter()
            .position(|place| free(place) && place.mac == info.mac)
            .or_else(|| places.iter().position(free))
            .unwrap_or(places.len());
        let settings = Settings::parse(kernel.config(), number).map_err(|line| {
            log::error!("{line}");
            NetError::Invalid
        })?;
        let signals: Vec<_> = self.cells.iter().map(|cell| cell.signal.clone()).collect();
        let mut queues = open_queue_pairs(nic, &signals).map_err(|error| {
            log::error!("{error}");
            NetError::Unsupported
        })?;
        let place = Place { mac: info.mac, name: Some(info.name.clone()) };
        match places.get_mut(number) {
            Some(free) => *free = place,
            None => places.push(place),
        }
        log::info!("{}: interface {number}", info.name);
        for id in (0..self.cells.len()).rev() {
            let setup = NicSetup { info: info.clone(), queue: queues.take(id), owner: id % queues.opened };
            self.enter(id)?.plug(number, setup, &settings);
        }
        self.cells.iter().for_each(|cell| cell.signal.raise(&self.host));
        Ok(())
    }

    /// See [`SocketProvider::detach`].
    pub(crate) fn detach(&self, name: &str) {
        let mut places = self.places.lock();
        let number = places.iter().position(|place| place.name.as_deref() == Some(name));
        let Some((number, place)) = number.and_then(|number| Some((number, places.get_mut(number)?))) else {
            return;
        };
        place.name = None;
        for id in (0..self.cells.len()).rev() {
            if let Ok(mut shard) = self.enter(id) {
                shard.unplug(number);
            }
        }
        log::warn!("{name}: unplugged; connections over it fail");
    }
}

/// Starts the stack on every registered NIC, one shard per CPU, and becomes the kernel's socket provider.
///
/// Errors: a configuration that makes no sense, no entropy, a NIC that does not open, no memory for threads.
/// Context: thread.
pub fn start<H: Host>(kernel: &Arc<Kernel<H>>) -> Result<(), StartError> {
    kernel.admit(MANIFEST)?;
    let host = kernel.host().of_component("net");
    let fail = |what: &str| {
        let what = String::from(what);
        move |error| StartError::Host { what, error }
    };
    let count = host.cpu_count().max(1) as usize;
    let mut random = [0u8; 36];
    host.fill_random(&mut random).map_err(fail("drawing entropy for the network stack"))?;
    let (words, rest) = random.as_chunks::<8>();
    let mut secret = [0u64; 4];
    for (word, bytes) in secret.iter_mut().zip(words) {
        *word = u64::from_le_bytes(*bytes);
    }
    let first_port = rest.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let limits = Limits::new(&kernel.config().tcp, host.memory_bytes(), count);
    let counters = NetCounters::new(|name| kernel.counter(name));
    let nics = kernel.nics();
    let mut settings = Vec::new();
    for index in 0..nics.len() {
        settings.push(Settings::parse(kernel.config(), index).map_err(StartError::Config)?);
    }
    let signals: Vec<_> = (0..count).map(|_| Arc::new(Signal::new())).collect();
    let mut queues = open_queues(&nics, &signals)?;
    let now_ns = host.monotonic_ns();
    let cells = signals
        .into_iter()
        .enumerate()
        .map(|(id, signal)| {
            let nics = nics
                .iter()
                .zip(&mut queues)
                .map(|(nic, queues)| {
                    let owner = id % queues.opened;
                    NicSetup { info: nic.info().clone(), queue: queues.take(id), owner }
                })
                .collect();
            let settings = settings.clone();
            let counters = counters.clone();
            let setup = ShardSetup { id, count, secret, limits, counters, nics, settings, now_ns };
            Cell {
                shard: Mutex::new(host, Shard::new(setup)),
                signal,
                inbox: ArrayQueue::new(if count > 1 { RING_LEN } else { 1 }),
                sleeps_until: AtomicU64::new(0),
            }
        })
        .collect();
    let place = |nic: &Arc<dyn Nic>| Place { mac: nic.info().mac, name: Some(nic.info().name.clone()) };
    let stack = Arc::new(Stack {
        host,
        cells,
        counters,
        next_port: AtomicU32::new(first_port),
        kernel: Arc::downgrade(kernel),
        places: Mutex::new(host, nics.iter().map(place).collect()),
    });
    for (index, cell) in stack.cells.iter().enumerate() {
        kernel.raise_on_stop(cell.signal.clone());
        let (stack, kernel_of_thread) = (stack.clone(), kernel.clone());
        kernel.spawn(&format!("net{index}"), Some(CpuId(index as u32)), move || {
            stack.run(index, || kernel_of_thread.stopping());
        })?;
    }
    kernel.set_sockets(Arc::new(Provider(stack.clone())));
    // What came and went meanwhile.
    let now = kernel.nics();
    for nic in nics.iter().filter(|nic| now.iter().all(|one| one.info().name != nic.info().name)) {
        stack.detach(&nic.info().name);
    }
    for nic in &now {
        if let Err(error) = stack.attach(nic) {
            log::error!("{}: the network stack does not take it: {error}", nic.info().name);
        }
    }
    Ok(())
}

struct Queues {
    queues: Vec<Option<Box<dyn NicQueue>>>,
    opened: usize,
}

impl Queues {
    fn take(&mut self, index: usize) -> Option<Box<dyn NicQueue>> {
        self.queues.get_mut(index)?.take()
    }
}

/// Opens as many queues of every NIC as there are shards, or as it has.
fn open_queues(nics: &[Arc<dyn Nic>], signals: &[Arc<Signal>]) -> Result<Vec<Queues>, StartError> {
    nics.iter().map(|nic| open_queue_pairs(nic, signals)).collect()
}

fn open_queue_pairs(nic: &Arc<dyn Nic>, signals: &[Arc<Signal>]) -> Result<Queues, StartError> {
    let mut queues = Vec::new();
    for (index, signal) in signals.iter().enumerate().take(usize::from(nic.info().queues.max(1))) {
        let queue = nic.open_queue(index as u16, signal.clone()).map_err(|error| StartError::Host {
            what: format!("opening queue {index} of {}", nic.info().name),
            error,
        })?;
        queues.push(Some(queue));
    }
    Ok(Queues { opened: queues.len().max(1), queues })
}
