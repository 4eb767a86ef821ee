//! The xHCI driver, with a disk and a keyboard, on a controller that lies.

use crate::host::{Device, DmaMemory, FuzzHost, REGISTERS};
use crate::watch;
use anykernel::Kernel;
use anykernel::block::{BlockDevice, BlockError, Complete, Op, Request};
use anykernel::config::Config;
use anykernel_usb::testing::{HidModel, KEYBOARD, StorageModel};
use anykernel_usb::{Options, UsbStack};
use anykernel_xhci::testing::{Lies, Memory, Model};
use hypercall::{Clock, Width};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Rounds of an execution, and of those the ones after the last lie: the driver takes in both devices in about half of them.
const ROUNDS: usize = 64;
const HONEST_ROUNDS: usize = 24;
/// Between two rounds time jumps to what the stack waits for. It never says more than this, though it may wait for longer...
const HEARTBEAT_NS: u64 = 1_000_000_000;
/// ... so that then much more passes: the longest of its time-outs is 30 s.
const PAUSE_NS: u64 = 8_000_000_000;
const DISK_BYTES: usize = 64 << 10;

struct Shared<'a>(&'a mut DmaMemory);

impl Memory for Shared<'_> {
    fn read(&mut self, at: u64, to: &mut [u8]) -> bool {
        self.0.at(at, to.len()).is_some_and(|from| {
            to.copy_from_slice(from);
            true
        })
    }
    fn write(&mut self, at: u64, from: &[u8]) -> bool {
        self.0.at(at, from.len()).is_some_and(|to| {
            to.copy_from_slice(from);
            true
        })
    }
}

struct Controller {
    model: Model,
    honest: Arc<AtomicBool>,
}

impl Device for Controller {
    fn read(&mut self, _: &mut DmaMemory, offset: usize, _: Width) -> u64 {
        self.model.read(offset).into()
    }
    fn write(&mut self, dma: &mut DmaMemory, offset: usize, _: Width, value: u64) {
        self.model.write(&mut Shared(dma), offset, value as u32);
    }
    fn tick(&mut self, dma: &mut DmaMemory) {
        self.model.tick(&mut Shared(dma));
        self.honest.store(self.model.is_honest(), Ordering::Relaxed);
    }
    fn interrupt(&mut self) -> bool {
        self.model.interrupt()
    }
    fn pci(&mut self) -> Option<&mut [u8]> {
        Some(self.model.pci())
    }
    fn pci_write(&mut self, offset: usize, bytes: &[u8]) {
        self.model.pci_write(offset, bytes);
    }
}

/// Takes requests back: a buffer is as long as it was.
struct Back;

impl Complete for Back {
    fn complete(&self, request: Request, _: Result<(), BlockError>) {
        assert!(request.buffers.iter().all(|buffer| buffer.len() == 4096));
    }
}

fn use_disk(disk: &dyn BlockDevice, round: usize) {
    let (op, buffers) = match round % 3 {
        0 => (Op::Flush, Vec::new()),
        1 => (Op::Read, vec![vec![0; 4096].into()]),
        _ => (Op::Write, vec![vec![round as u8; 4096].into()]),
    };
    let sector = round as u64 % 8 * 8;
    let _ = disk.submit_and_poll(Request { op, sector, buffers, done: Arc::new(Back), tag: 0 });
    disk.poll();
}

/// One execution.
pub fn run(data: &[u8]) {
    let host = FuzzHost::fresh();
    let mut model = Model::new(REGISTERS as u32, Lies::new(data));
    model.plug(0, StorageModel::new(vec![0; DISK_BYTES]).0);
    model.plug(1, HidModel::new(KEYBOARD, 1).0);
    if !model.can_be_halted() {
        watch::allow_leak();
    }
    let honest = Arc::new(AtomicBool::new(false));
    host.set_device(Controller { model, honest: honest.clone() });
    let kernel = Kernel::new(host, Config::default());
    let mut stacks = Vec::new();
    let mut found = |controller, signal| {
        stacks.extend(UsbStack::attach(&kernel, controller, signal, 1, Options::default()));
    };
    anykernel_xhci::probe(&kernel, &mut found).expect("the host has every contract");
    let (mut round, mut left) = (0, HONEST_ROUNDS);
    while round < ROUNDS && left > 0 && !stacks.is_empty() {
        watch::step();
        stacks.iter().for_each(|stack| stack.poll());
        kernel.block_devices().iter().for_each(|disk| use_disk(&**disk, round));
        host.tick();
        // At once, if the controller has something to say.
        let next_ns = stacks.iter().filter_map(|stack| stack.next_poll_ns()).min().unwrap_or(u64::MAX);
        let wait_ns = next_ns.saturating_sub(host.monotonic_ns());
        // A look at the clock takes a little.
        host.advance(if wait_ns > HEARTBEAT_NS - 1_000_000 { PAUSE_NS } else { wait_ns + 1_000_000 });
        round += 1;
        left -= usize::from(honest.load(Ordering::Relaxed));
    }
    kernel.stop();
    host.run_rest();
    kernel.shutdown();
}
