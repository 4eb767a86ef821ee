//! A stack without a thread on a model controller, on virtual time.

use crate::testing::ModelBus;
use crate::{Listed, NodeState, Options, UsbStack};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::config::Config;
use hypercall::UsbPath;
use hypercall::testing::TestHost;

pub(super) struct World {
    pub(super) host: TestHost,
    pub(super) kernel: Arc<Kernel<TestHost>>,
    pub(super) bus: ModelBus,
    pub(super) stack: Arc<UsbStack<TestHost>>,
}

impl World {
    pub(super) fn new(ports: u8) -> Self {
        Self::with(ports, 64, Options::default())
    }

    pub(super) fn with(ports: u8, max_slots: u32, options: Options) -> Self {
        let host = TestHost::with_virtual_time();
        let kernel = Kernel::new(host, Config::default());
        let bus = ModelBus::new(host, ports, max_slots);
        let (controller, signal) = bus.controller();
        let stack = UsbStack::attach(&kernel, controller, signal, 1, options).unwrap();
        Self { host, kernel, bus, stack }
    }

    /// Lets `ms` milliseconds pass.
    pub(super) fn run(&self, ms: u64) {
        for _ in 0..ms {
            self.stack.poll();
            self.host.advance(1_000_000);
        }
        self.stack.poll();
    }

    /// Runs until `done`, at most `limit_ms`.
    #[track_caller]
    pub(super) fn until(&self, limit_ms: u64, mut done: impl FnMut() -> bool) {
        for _ in 0..limit_ms {
            self.stack.poll();
            if done() {
                return;
            }
            self.host.advance(1_000_000);
        }
        panic!("not within {limit_ms} ms: {:#?}", self.lines());
    }

    /// Runs until nothing is being found out; the model looks a little at what was just plugged in.
    #[track_caller]
    pub(super) fn settle(&self) {
        self.run(5);
        self.until(120_000, || self.stack.settled());
    }

    pub(super) fn node(&self, path: &str) -> Option<Listed> {
        let path = UsbPath::parse(path).unwrap();
        self.stack.tree().into_iter().find(|one| one.path == path)
    }

    #[track_caller]
    pub(super) fn state(&self, path: &str) -> NodeState {
        self.node(path).unwrap_or_else(|| panic!("nothing at {path}: {:#?}", self.lines())).node.state
    }

    /// The tree, a line for each place.
    pub(super) fn lines(&self) -> Vec<String> {
        let line = |one: Listed| {
            let drivers: Vec<_> = one.node.drivers.iter().map(|one| (one.name, one.note.clone())).collect();
            alloc::format!("{} {:?} {drivers:?}", one.path, one.node.state)
        };
        self.stack.tree().into_iter().map(line).collect()
    }

    pub(super) fn counter(&self, name: &str) -> u64 {
        let name = alloc::format!("usb.{name}");
        self.kernel.counters().into_iter().find(|one| one.0 == name).map_or(0, |one| one.1)
    }

    pub(super) fn disks(&self) -> Vec<String> {
        self.kernel.block_devices().iter().map(|one| one.info().name.clone()).collect()
    }
}
