//! Nodes: how they come, go down, and end.

use super::config::NodeSetup;
use super::device::Devices;
use super::engine::World;
use super::memory::DmaTable;
use super::report::Failure;
use super::thread::State;
use super::{Random, SimHost};
use hypercall::ExitStatus;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

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
    pub(super) next_cpu: Cell<u32>,
    pub(super) threads: Cell<u64>,
    pub(super) abandoned: Cell<u64>,
}

impl World {
    pub(super) fn node(&self, index: u32) -> Option<Rc<Node>> {
        self.nodes.borrow().get(index as usize).cloned()
    }

    pub(super) fn add_node(&self, setup: NodeSetup) -> SimHost {
        let index = self.nodes.borrow().len() as u32;
        let ports = setup.links.iter().map(|segment| self.add_port(*segment)).collect();
        assert!(setup.disks.iter().all(|disk| disk.0 < self.disks.borrow().len()), "no such disk here");
        self.push_node(index, setup, ports)
    }

    pub(super) fn add_node_on(&self, old: u32) -> SimHost {
        let old = self.node(old).expect("a node of this simulation");
        let index = self.nodes.borrow().len() as u32;
        self.push_node(index, old.setup.clone(), old.ports.clone())
    }

    pub(super) fn push_node(&self, index: u32, setup: NodeSetup, ports: Vec<usize>) -> SimHost {
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

    pub(super) fn is_down(&self, index: u32) -> bool {
        self.node(index).is_none_or(|node| node.down.get())
    }

    pub(super) fn why_ended(&self, index: u32) -> Failure {
        let Some(node) = self.node(index) else { return Failure::Down };
        let panicked = self.panics.borrow().iter().find(|one| one.node == node.name).cloned();
        match (panicked, node.exit.get()) {
            (Some(panicked), _) => Failure::Panic(panicked),
            (None, Some(status)) => Failure::Exited(status),
            (None, None) => Failure::Down,
        }
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
}
