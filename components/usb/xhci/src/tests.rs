//! The driver on a modelled controller: one that keeps to the rules, and ones that do not.

use crate::probe;
use crate::testing::{Lies, Memory, Model, REGISTER_BYTES};
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::config::Config;
use anykernel_usb::testing::{HidModel, KEYBOARD, StorageModel};
use anykernel_usb::{Options, UsbStack};
use hypercall::testing::{Registers, TestHost};
use hypercall::{DmaAddr, PciAddress, PhysAddr, Width};
use proptest::prelude::*;
use std::sync::Mutex;

const BAR: u32 = 0xfeb0_0000;

struct Shared(TestHost);

impl Memory for Shared {
    fn read(&mut self, at: u64, to: &mut [u8]) -> bool {
        self.0.dma_read(DmaAddr(at), to).is_ok()
    }
    fn write(&mut self, at: u64, from: &[u8]) -> bool {
        self.0.dma_write(DmaAddr(at), from).is_ok()
    }
}

struct Device {
    host: TestHost,
    model: Arc<Mutex<Model>>,
}

impl Registers for Device {
    fn read(&mut self, offset: usize, _: Width) -> u64 {
        let mut model = self.model.lock().unwrap();
        model.tick(&mut Shared(self.host));
        // Whoever waits by looking is to see time pass.
        self.host.advance(20_000);
        model.read(offset).into()
    }
    fn write(&mut self, offset: usize, _: Width, value: u64) {
        let mut model = self.model.lock().unwrap();
        model.write(&mut Shared(self.host), offset, value as u32);
        model.tick(&mut Shared(self.host));
    }
}

struct World {
    host: TestHost,
    kernel: Arc<Kernel<TestHost>>,
    model: Arc<Mutex<Model>>,
    stacks: Vec<Arc<UsbStack<TestHost>>>,
}

impl World {
    fn new(lies: &[u8]) -> Self {
        let host = TestHost::with_virtual_time();
        let mut model = Model::new(BAR, Lies::new(lies));
        model.plug(0, StorageModel::new(alloc::vec![0; 1 << 20]).0);
        model.plug(1, HidModel::new(KEYBOARD, 1).0);
        let space = model.pci().to_vec();
        host.add_pci_function(
            PciAddress { segment: 0, bus: 0, device: 3, function: 0 },
            &space,
            0,
            &[(0x10, !(REGISTER_BYTES as u32 - 1))],
        );
        let model = Arc::new(Mutex::new(model));
        host.add_pci_memory(PhysAddr(BAR.into()), REGISTER_BYTES, Device { host, model: model.clone() });
        let kernel = Kernel::new(host, Config::default());
        let mut stacks = Vec::new();
        probe(&kernel, &mut |controller, signal| {
            stacks.push(UsbStack::attach(&kernel, controller, signal, 1, Options::default()).unwrap());
        })
        .unwrap();
        Self { host, kernel, model, stacks }
    }

    fn run(&self, ms: u64) {
        for _ in 0..ms / 5 {
            for stack in &self.stacks {
                stack.poll();
                stack.next_poll_ns();
            }
            self.model.lock().unwrap().tick(&mut Shared(self.host));
            self.host.advance(5_000_000);
        }
    }

    /// Ends it; nothing may be left that the controller could still use.
    fn end(self) {
        self.kernel.shutdown();
        drop((self.stacks, self.kernel));
        let left = (self.host.dma_blocks(), self.host.dma_mappings());
        assert!(left == (0, 0) || !self.model.lock().unwrap().can_be_halted(), "{left:?}");
    }
}

#[test]
fn devices_work_on_a_controller_that_keeps_to_the_rules() {
    let world = World::new(&[]);
    world.run(3000);
    let tree = world.stacks[0].tree();
    let disks: Vec<_> = world.kernel.block_devices().iter().map(|disk| disk.info().clone()).collect();
    assert!(disks.first().is_some_and(|disk| disk.sectors == 2048), "{tree:?}");
    assert_eq!(world.kernel.inputs().len(), 1, "{tree:?}");
    drop(disks);
    world.end();
}

/// A link that went to sleep, or whose device wakes it, is woken, and its device goes on.
#[test]
fn a_link_that_sleeps_is_woken() {
    let world = World::new(&[]);
    world.run(3000);
    for state in [3, 15] {
        world.model.lock().unwrap().set_link(&mut Shared(world.host), 1, state);
        world.run(200);
    }
    // Driven for a while, then awake; twice.
    assert_eq!(world.model.lock().unwrap().link_states(), [15, 0, 15, 0]);
    assert_eq!(world.kernel.inputs().len(), 1);
    world.end();
}

proptest! {
    /// Whatever it says, when ever: no panic, no end of time, and all memory comes back.
    #[test]
    fn a_controller_that_lies_does_no_harm(lies: Vec<u8>) {
        let world = World::new(&lies);
        world.run(2500);
        world.end();
    }
}
