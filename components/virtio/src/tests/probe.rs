use super::{kernel, shut_down};
use crate::testing::{BlkModel, Hostility, MmioOptions, NetModel, PciOptions, TestMachine};
use alloc::vec::Vec;
use std::vec;

#[test]
fn numbers_devices_in_the_order_they_are_found() {
    let machine = TestMachine::new();
    machine.add_pci(BlkModel::new(vec![0; 3 * 512]), PciOptions::default());
    machine.add_mmio(BlkModel::new(vec![0; 512]), MmioOptions::default());
    machine.add_mmio(NetModel::new([2, 0, 0, 0, 0, 1]), MmioOptions { legacy: true, ..Default::default() });
    machine.add_mmio(BlkModel::new(vec![0; 2 * 512]), MmioOptions::default());
    machine
        .add_pci(NetModel::new([2, 0, 0, 0, 0, 2]), PciOptions { transitional: true, ..Default::default() });
    let kernel = kernel(machine);
    let disks: Vec<_> =
        kernel.block_devices().iter().map(|d| (d.info().name.clone(), d.info().sectors)).collect();
    assert_eq!(disks, [("disk0".into(), 1), ("disk1".into(), 2), ("disk2".into(), 3)]);
    let nics: Vec<_> = kernel.nics().iter().map(|n| (n.info().name.clone(), n.info().mac[5])).collect();
    assert_eq!(nics, [("nic0".into(), 1), ("nic1".into(), 2)]);
    let manifests: Vec<_> = kernel.manifests().iter().map(|m| m.name).collect();
    assert_eq!(manifests, ["virtio-blk", "virtio-net"]);
    shut_down(machine, &kernel);
}

#[test]
fn a_device_that_fails_does_not_stop_the_others() {
    for hostility in [Hostility::FeaturesRefused, Hostility::ConfigNeverSettles, Hostility::NoReset] {
        let machine = TestMachine::new();
        let bad = [
            machine.add_mmio(BlkModel::new(vec![0; 512]), MmioOptions { hostility, ..Default::default() }),
            machine.add_pci(BlkModel::new(vec![0; 512]), PciOptions { hostility, ..Default::default() }),
        ];
        machine.add_mmio(NetModel::new([2; 6]), MmioOptions { hostility, ..Default::default() });
        machine.add_mmio(BlkModel::new(vec![0; 512]), MmioOptions::default());
        // A device that never finishes its reset looks like one that has: status 0 from the start.
        if hostility == Hostility::NoReset {
            for handle in &bad {
                handle.force_status(0x0f);
            }
        }
        let kernel = kernel(machine);
        assert_eq!(kernel.block_devices().len(), 1, "{hostility:?}");
        for handle in &bad {
            assert_ne!(handle.status() & 0x80, 0, "FAILED is set");
        }
        kernel.shutdown();
    }
}

#[test]
fn survives_any_pci_configuration_space() {
    use proptest::prelude::*;
    proptest!(ProptestConfig::with_cases(300), |(changes in prop::collection::vec((0usize..256, any::<u8>()), 1..24))| {
        let machine = TestMachine::new();
        let handle = machine.add_pci(BlkModel::new(vec![0; 512]), PciOptions::default());
        handle.with_pci_space(|space| {
            for &(at, value) in &changes {
                // The ids stay: another device is not ours to judge.
                if at >= 4 {
                    space[at] = value;
                }
            }
        });
        kernel(machine).shutdown();
        prop_assert_eq!(machine.violations(), 0);
    });
}
