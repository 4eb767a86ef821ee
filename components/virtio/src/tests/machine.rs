//! The test machine keeps the contracts that it stands for.

use crate::testing::{BlkModel, MmioOptions, Model, NetModel, PciOptions, TestMachine};
use alloc::vec::Vec;
use hypercall::conformance::{self, CheckReport, Outcome};
use hypercall::{CpuId, Irq, IrqSource, Mmio, PciAddress, Signal, Width};
use std::string::String;
use std::vec;

fn failures(run: impl FnOnce(&mut dyn FnMut(CheckReport))) -> Vec<String> {
    let mut failures = Vec::new();
    let mut checks = 0;
    run(&mut |check| {
        checks += 1;
        if !matches!(check.outcome, Outcome::Pass) {
            failures.push(std::format!("{check}"));
        }
    });
    assert!(checks > 0);
    failures
}

#[test]
fn passes_the_device_suites() {
    let machine = TestMachine::new();
    machine.add_mmio(BlkModel::new(vec![0; 512]), MmioOptions { legacy: true, ..Default::default() });
    machine.add_mmio(NetModel::new([2; 6]), MmioOptions::default());
    machine.add_pci(BlkModel::new(vec![0; 512]), PciOptions::default());
    assert_eq!(failures(|report| conformance::run_dma(machine, report)), Vec::<String>::new());
    assert_eq!(failures(|report| conformance::run_mmio(machine, report)), Vec::<String>::new());
    assert_eq!(failures(|report| conformance::run_pci(machine, report)), Vec::<String>::new());
    assert_eq!(machine.arena().blocks_in_use(), 0);
}

#[test]
fn passes_the_interrupt_suite() {
    let machine = TestMachine::new();
    let line = machine.add_mmio(NetModel::new([2; 6]), MmioOptions::default());
    let mut source = IrqSource::Line(0);
    machine.mmio_devices(&mut |device| source = IrqSource::Line(device.line));
    let config = line.with(|model| model.config());
    let region = {
        let mut at = None;
        machine.mmio_devices(&mut |device| at = Some(device));
        let device = at.unwrap();
        machine.mmio_map(device.registers, device.len).unwrap()
    };
    let mut fire = || {
        // A line is level-triggered: what the device wanted before is over.
        machine.mmio_write(region, 0x64, Width::U32, 3);
        line.change_config(config.clone());
    };
    assert_eq!(
        failures(|report| conformance::run_irq(machine, source, &mut fire, report)),
        Vec::<String>::new()
    );
    assert_eq!(machine.attached_interrupts(), 0);
}

#[test]
fn refuses_vectors_that_are_not_there() {
    let machine = TestMachine::new();
    machine.add_pci(BlkModel::new(vec![0; 512]), PciOptions { msix: 2, ..Default::default() });
    let function = PciAddress { segment: 0, bus: 0, device: 0, function: 0 };
    let attach = |entry| {
        machine.irq_attach(
            IrqSource::Msix { function, entry },
            CpuId(0),
            alloc::sync::Arc::new(Signal::new()),
        )
    };
    assert!(attach(1).is_ok());
    assert_eq!(attach(2).err(), Some(hypercall::Error::NotFound));
}
