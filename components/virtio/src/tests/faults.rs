//! Every hypercall of a driver that finds its device, works and shuts down fails once, and from some call on all of them do.
//! Nothing may panic, hang, or stay behind.

use crate::testing::{BlkModel, MmioOptions, NetModel, PciOptions, TestMachine};
use alloc::boxed::Box;
use alloc::sync::Arc;
use anykernel::Kernel;
use anykernel::block::{Op, transfer};
use anykernel::config::Config;
use anykernel::nic::TxMeta;
use hypercall::Signal;
use hypercall::layers::{Fault, FaultPlan, Faulty};
use std::vec;

/// Devices on both buses; what the driver makes of them is its own affair as long as it gives everything back.
fn run(fault: Fault, cpus: u32) -> &'static FaultPlan {
    let plan: &'static FaultPlan = Box::leak(Box::new(FaultPlan::new(fault)));
    let machine = TestMachine::new();
    machine.set_cpus(cpus);
    machine.add_mmio(BlkModel::new(vec![7; 64 << 10]), MmioOptions::default());
    machine.add_mmio(NetModel::new([2, 0, 0, 0, 0, 1]), MmioOptions::default());
    // As many queues as there are CPUs, and as there are vectors.
    let mut several = BlkModel::new(vec![7; 64 << 10]);
    several.queues = 2;
    machine.add_pci(several, PciOptions::default());
    machine.add_pci(NetModel::new([2, 0, 0, 0, 0, 2]).with_pairs(2), PciOptions::default());
    machine.add_pci(NetModel::new([2, 0, 0, 0, 0, 3]), PciOptions { msix: 1, ..PciOptions::default() });
    let host = Faulty::new(machine, plan);
    let kernel = Kernel::new(host, Config::default());
    let _ = crate::probe(&kernel);
    for disk in kernel.block_devices() {
        let one = || vec![vec![9; 4096].into_boxed_slice()];
        if transfer(host, &*disk, Op::Write, 8, one()).is_ok()
            && let Ok(read) = transfer(host, &*disk, Op::Read, 8, vec![vec![0; 4096].into_boxed_slice()])
        {
            assert!(read[0].iter().all(|byte| *byte == 9), "{fault:?}: what was written is not there");
        }
        let _ = transfer(host, &*disk, Op::Flush, 0, vec![]);
    }
    for nic in kernel.nics() {
        let queues = (0..nic.info().queues).map(|index| nic.open_queue(index, Arc::new(Signal::new())));
        for mut queue in queues.collect::<vec::Vec<_>>().into_iter().flatten() {
            let _ = queue.transmit(60, TxMeta::default(), &mut |frame| frame.fill(1));
            queue.flush();
            queue.receive(8, &mut |_, _| ());
        }
    }
    kernel.shutdown();
    let what = plan.last();
    assert_eq!(Arc::strong_count(&kernel), 1, "{fault:?}, {what:?}: the kernel is still held");
    drop(kernel);
    assert_eq!(machine.arena().blocks_in_use(), 0, "{fault:?}, {what:?}: DMA memory leaked");
    assert_eq!(machine.attached_interrupts(), 0, "{fault:?}, {what:?}: interrupts left attached");
    assert_eq!(machine.violations(), 0, "{fault:?}, {what:?}: a device was sent outside its memory");
    assert_eq!(machine.host().threads_in_use(), 0, "{fault:?}, {what:?}: threads are left");
    assert_eq!(machine.host().pages_in_use(), 0, "{fault:?}, {what:?}: pages leaked");
    plan
}

#[test]
fn every_hypercall_fails() {
    for cpus in [1, 2] {
        let calls = run(Fault::Never, cpus).counted();
        assert!(calls > 30, "{calls}");
        for n in 1..=calls {
            run(Fault::Nth(n), cpus);
            run(Fault::From(n), cpus);
        }
    }
}
