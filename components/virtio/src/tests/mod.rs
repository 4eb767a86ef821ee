//! Drivers against device models.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod blk;
mod faults;
mod hostile;
mod machine;
mod net;
mod probe;
mod ring;
mod spec;

use crate::testing::TestMachine;
use alloc::sync::Arc;
use anykernel::Kernel;
use anykernel::config::Config;

fn kernel(machine: TestMachine) -> Arc<Kernel<TestMachine>> {
    let kernel = Kernel::new(machine, Config::default());
    crate::probe(&kernel).unwrap();
    kernel
}

/// Shuts down and checks that nothing is left: no memory with devices, no interrupt, no access out of bounds.
fn shut_down(machine: TestMachine, kernel: &Arc<Kernel<TestMachine>>) {
    kernel.shutdown();
    assert_eq!(machine.arena().blocks_in_use(), 0, "DMA memory leaked");
    assert_eq!(machine.attached_interrupts(), 0, "interrupts left attached");
    assert_eq!(machine.violations(), 0, "a device was sent outside its memory");
}

/// The same for a device whose broken ring keeps the buffers that it named.
fn shut_down_leaky(machine: TestMachine, kernel: &Arc<Kernel<TestMachine>>) {
    kernel.shutdown();
    assert_eq!(machine.attached_interrupts(), 0, "interrupts left attached");
    assert_eq!(machine.violations(), 0, "a device was sent outside its memory");
}
