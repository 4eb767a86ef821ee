//! [`SimHost`]: the contract on a node of a simulation.

use super::engine::World;
use super::node::Node;
use super::simulation::world;
use crate::host::DomainExit;
use core::sync::atomic::AtomicU32;
use hypercall::{
    Call, Clock, Console, ContractVersion, CpuId, Cpus, Entropy, Error, Exit, ExitStatus, Params, ParkResult,
    Result, ThreadId, ThreadSpec, Threads, Versions,
};
use std::rc::Rc;

/// A handle of a node. It may be kept for ever and sent anywhere, but works only on the OS thread of its simulation and
/// while that lives; otherwise, and when its node is down, its calls fail with `Gone` and what cannot fail does nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimHost {
    slot: u32,
    generation: u32,
    node: u32,
    cpus: u32,
}

impl SimHost {
    pub(super) fn new(slot: u32, generation: u32, node: u32, cpus: u32) -> Self {
        Self { slot, generation, node, cpus }
    }

    /// Lets `ns` of virtual time pass for the calling thread.
    pub fn sleep(&self, ns: u64) {
        let until = hypercall::Clock::monotonic_ns(self) + ns;
        while self.park(&0.into(), 0, Some(until)) == ParkResult::Woken && self.is_up() {}
    }

    /// Whether its simulation lives and it was neither crashed nor has ended itself.
    pub fn is_up(&self) -> bool {
        self.live().is_some_and(|(_, node)| !node.down.get())
    }

    /// Which node of its simulation this is: the first is 0.
    pub fn index(&self) -> u32 {
        self.node
    }

    pub(super) fn world(&self) -> Option<Rc<World>> {
        world(self.slot, self.generation)
    }

    fn live(&self) -> Option<(Rc<World>, Rc<Node>)> {
        let world = self.world()?;
        let node = world.node(self.node)?;
        Some((world, node))
    }

    /// A hypercall that can fail.
    pub(super) fn world_call<T>(
        &self,
        call: Call,
        arguments: [u64; 2],
        body: impl FnOnce(&Rc<World>, &Node) -> Result<T>,
    ) -> Result<T> {
        if let Some(world) = self.world() {
            world.enter(self.node, call, arguments);
        }
        self.finish_call(body)
    }

    /// The rest of a hypercall that was begun and took its time.
    pub(super) fn finish_call<T>(&self, body: impl FnOnce(&Rc<World>, &Node) -> Result<T>) -> Result<T> {
        let Some((world, node)) = self.live() else { return Err(Error::Gone) };
        let result = if node.down.get() { Err(Error::Gone) } else { body(&world, &node) };
        world.leave_with(&result);
        if node.down.get() {
            drop(node);
            self.unwind(world);
        }
        result
    }

    /// Ends the calling thread if it is one of a node that this very call took down.
    fn unwind(&self, world: Rc<World>) {
        if world.is_to_unwind() {
            // Nothing of the simulation may be left on a stack that is unwound.
            drop(world);
            super::thread::unwind();
        }
    }

    pub(super) fn wait(&self, ns: u64) {
        if let Some((world, node)) = self.live()
            && !node.down.get()
        {
            drop(node);
            world.sleep(ns);
        }
    }

    /// A hypercall that can fail and needs its node only.
    pub(super) fn call<T>(
        &self,
        call: Call,
        arguments: [u64; 2],
        body: impl FnOnce(&Node) -> Result<T>,
    ) -> Result<T> {
        self.world_call(call, arguments, |_, node| body(node))
    }

    /// One that has a value.
    pub(super) fn value<T>(&self, call: Call, body: impl FnOnce(&Node) -> T) -> Option<T> {
        self.call(call, [0; 2], |node| Ok(body(node))).ok()
    }

    /// One that gives something back: done also when the node is down.
    pub(super) fn note(&self, call: Call, arguments: [u64; 2], body: impl FnOnce(&Node)) {
        if let Some(world) = self.world() {
            world.enter(self.node, call, arguments);
        }
        if let Some((_, node)) = self.live() {
            body(&node);
        }
    }
}

impl Versions for SimHost {
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

impl Clock for SimHost {
    fn monotonic_ns(&self) -> u64 {
        let Some(world) = self.world() else { return 0 };
        world.enter(self.node, Call::MonotonicNs, [0; 2]);
        world.now.get()
    }
    fn realtime_ns(&self) -> u64 {
        let Some(world) = self.world() else { return 0 };
        world.enter(self.node, Call::RealtimeNs, [0; 2]);
        world.config.realtime_ns.saturating_add(world.now.get())
    }
}

impl Threads for SimHost {
    fn spawn(&self, spec: ThreadSpec<'_>, entry: Box<dyn FnOnce() + Send + 'static>) -> Result<ThreadId> {
        let cpu = spec.cpu.map_or(u64::MAX, |cpu| cpu.0.into());
        self.world_call(Call::Spawn, [cpu, 0], |world, _| world.spawn(self.node, spec, entry))
    }

    fn join(&self, thread: ThreadId) -> Result<()> {
        let world = self.world().ok_or(Error::NotFound)?;
        world.enter(self.node, Call::Join, [thread.0, 0]);
        let result = world.join(self.node, thread);
        world.leave_with(&result);
        result
    }

    fn park(&self, word: &AtomicU32, expected: u32, deadline_ns: Option<u64>) -> ParkResult {
        let Some(world) = self.world() else { return ParkResult::Woken };
        world.enter(self.node, Call::Park, [expected.into(), deadline_ns.unwrap_or(u64::MAX)]);
        let result = world.park(self.node, word, expected, deadline_ns);
        world.leave(result as u64);
        result
    }

    fn unpark(&self, word: &AtomicU32, count: u32) -> u32 {
        let Some(world) = self.world() else { return 0 };
        world.enter(self.node, Call::Unpark, [count.into(), 0]);
        let woken = world.unpark(word, count);
        world.leave(woken.into());
        woken
    }

    fn yield_now(&self) {
        let Some(world) = self.world() else { return };
        world.enter(self.node, Call::YieldNow, [0; 2]);
        world.yield_now(self.node);
    }
}

impl Cpus for SimHost {
    fn cpu_count(&self) -> u32 {
        self.cpus
    }
    fn current_cpu(&self) -> CpuId {
        CpuId(self.world().map_or(0, |world| world.cpu(self.node)))
    }
}

impl Entropy for SimHost {
    fn fill_random(&self, buf: &mut [u8]) -> Result<()> {
        self.call(Call::FillRandom, [buf.len() as u64, 0], |node| {
            node.random.borrow_mut().fill(buf);
            Ok(())
        })
    }
}

impl Params for SimHost {
    fn param(&self, key: &str, buf: &mut [u8]) -> Result<usize> {
        self.call(Call::Param, [buf.len() as u64, 0], |node| {
            let value = node.setup.params.get(key).ok_or(Error::NotFound)?.as_bytes();
            buf.get_mut(..value.len()).ok_or(Error::BufferTooSmall)?.copy_from_slice(value);
            Ok(value.len())
        })
    }
}

impl Console for SimHost {
    fn console_write(&self, bytes: &[u8]) {
        self.note(Call::ConsoleWrite, [bytes.len() as u64, 0], |node| {
            node.console.borrow_mut().extend_from_slice(bytes);
        });
    }
}

impl Exit for SimHost {
    fn exit(&self, status: ExitStatus) -> ! {
        if let Some(world) = self.world() {
            world.enter(self.node, Call::Exit, [status.code().into(), 0]);
            world.exits(self.node, status);
        }
        std::panic::resume_unwind(Box::new(DomainExit(status)))
    }
}
