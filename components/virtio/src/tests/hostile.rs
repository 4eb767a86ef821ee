//! Devices that break the rules: an error, never a panic, a hang or an access out of bounds.

use super::kernel;
use crate::testing::{BlkModel, Hostility, MmioOptions, NetModel, TestMachine};
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::block::{BlockError, Op, transfer};
use anykernel::nic::TxMeta;
use hypercall::Signal;
use std::vec;

const BREAKING: [Hostility; 5] = [
    Hostility::UsedIdRange,
    Hostility::UsedIdIdle,
    Hostility::UsedTwice,
    Hostility::UsedLen,
    Hostility::IndexJump,
];

#[test]
fn a_disk_that_breaks_its_ring_is_gone() {
    for hostility in BREAKING {
        for ring_features in [0, 1 << 28 | 1 << 29] {
            let machine = TestMachine::new();
            let options = MmioOptions { hostility, ring_features, ..Default::default() };
            let handle = machine.add_mmio(BlkModel::new(vec![7; 4096]), options);
            let kernel = kernel(machine);
            let disk = kernel.block_devices()[0].clone();
            let buffers = vec![vec![0; 512].into_boxed_slice()];
            // A buffer returned twice may count as served the first time, but never the second.
            let mut results: Vec<_> =
                (0..3).map(|_| transfer(machine, &*disk, Op::Read, 0, buffers.clone()).map(|_| ())).collect();
            if hostility == Hostility::UsedTwice && results[0].is_ok() {
                results.swap_remove(0).unwrap();
            }
            assert!(results.iter().all(|r| *r == Err(BlockError::Gone)), "{hostility:?}: {results:?}");
            assert_eq!(handle.status(), 0, "the device was reset");
            drop(disk);
            kernel.shutdown();
            assert_eq!(machine.violations(), 0);
        }
    }
}

#[test]
fn a_disk_with_strange_answers_fails_requests_only() {
    for hostility in [Hostility::BadAnswer, Hostility::ShortLen] {
        let machine = TestMachine::new();
        machine.add_mmio(BlkModel::new(vec![7; 4096]), MmioOptions { hostility, ..Default::default() });
        let kernel = kernel(machine);
        let disk = kernel.block_devices()[0].clone();
        for _ in 0..3 {
            let got = transfer(machine, &*disk, Op::Read, 0, vec![vec![0; 512].into_boxed_slice()]);
            assert_eq!(got.err(), Some(BlockError::Io), "{hostility:?}");
        }
        drop(disk);
        super::shut_down(machine, &kernel);
    }
}

#[test]
fn what_a_disk_writes_after_it_returned_a_buffer_is_not_seen() {
    let machine = TestMachine::new();
    let handle = machine.add_mmio(
        BlkModel::new(vec![7; 4096]),
        MmioOptions { hostility: Hostility::ChangesLater, ..Default::default() },
    );
    let kernel = kernel(machine);
    let disk = kernel.block_devices()[0].clone();
    for _ in 0..20 {
        // It may have been overwritten before we looked, status and all; never after.
        let read = transfer(machine, &*disk, Op::Read, 0, vec![vec![0; 512].into_boxed_slice()]);
        match read {
            Ok(buffers) => {
                let first = buffers[0].clone();
                assert!(first[..] == [7; 512] || first[..] == [0xee; 512]);
                let _ = transfer(machine, &*disk, Op::Read, 1, vec![vec![0; 512].into_boxed_slice()]);
                assert_eq!(buffers[0], first);
            }
            Err(error) => assert_eq!(error, BlockError::Io),
        }
    }
    assert_eq!(handle.complaints(), Vec::<std::string::String>::new());
    drop(disk);
    kernel.shutdown();
}

#[test]
fn a_disk_that_asks_for_a_reset_is_given_up() {
    let machine = TestMachine::with_virtual_time();
    machine.add_mmio(
        BlkModel::new(vec![7; 4096]),
        MmioOptions { hostility: Hostility::NeedsReset, ..Default::default() },
    );
    let kernel = kernel(machine);
    let disk = kernel.block_devices()[0].clone();
    let buffers = || vec![vec![0; 512].into_boxed_slice()];
    let _ = transfer(machine, &*disk, Op::Read, 0, buffers());
    let start = std::time::Instant::now();
    while transfer(machine, &*disk, Op::Read, 0, buffers()).is_ok() {
        assert!(start.elapsed().as_secs() < 10);
        machine.host().advance(1_000_000_000);
        std::thread::sleep(core::time::Duration::from_millis(1));
    }
    drop(disk);
    super::shut_down(machine, &kernel);
}

#[test]
fn a_disk_that_cannot_be_reset_keeps_its_buffers() {
    let machine = TestMachine::new();
    let handle = machine.add_mmio(BlkModel::new(vec![7; 4096]), MmioOptions::default());
    let kernel = kernel(machine);
    let disk = kernel.block_devices()[0].clone();
    handle.set_hostility(Hostility::NoReset);
    handle.hold();
    let waiter = {
        let disk = disk.clone();
        std::thread::spawn(move || {
            transfer(machine, &*disk, Op::Read, 0, vec![vec![0; 512].into_boxed_slice()]).map(|_| ())
        })
    };
    while handle.kicks(0) == 0 {
        std::thread::yield_now();
    }
    handle.release_as(Hostility::IndexJump, Hostility::NoReset);
    assert_eq!(waiter.join().unwrap(), Err(BlockError::Gone));
    drop(disk);
    kernel.shutdown();
    assert!(machine.arena().blocks_in_use() > 0, "memory that the device may still write is not reused");
}

#[test]
fn a_nic_that_breaks_its_ring_is_gone() {
    for hostility in BREAKING {
        let machine = TestMachine::new();
        let handle = machine.add_mmio(NetModel::new([2; 6]), MmioOptions { hostility, ..Default::default() });
        let kernel = kernel(machine);
        let mut queue = kernel.nics()[0].open_queue(0, Arc::new(Signal::new())).unwrap();
        handle.drive(|model, rings| model.receive(rings, 0, 0, &[0; 100]));
        let mut frames = 0;
        for _ in 0..3 {
            queue.receive(100, &mut |_, _| frames += 1);
        }
        assert!(frames <= 1, "{hostility:?}");
        assert!(!queue.link_up(), "{hostility:?}");
        assert_eq!(handle.status(), 0);
        // Everything still answers.
        assert!(!queue.arm());
        assert!(queue.transmit(60, TxMeta::default(), &mut |out| out.fill(0)).is_ok());
        queue.flush();
        drop(queue);
        super::shut_down_leaky(machine, &kernel);
    }
}

#[test]
fn a_nic_that_breaks_its_transmit_ring_is_gone() {
    // With all descriptors in flight every one of them is a possible answer.
    for hostility in BREAKING.into_iter().filter(|h| *h != Hostility::UsedIdIdle) {
        let machine = TestMachine::new();
        let model = NetModel::new([2; 6]).with(|model| model.queue_size = 8);
        let handle = machine.add_mmio(model, MmioOptions { hostility, ..Default::default() });
        let kernel = kernel(machine);
        let mut queue = kernel.nics()[0].open_queue(0, Arc::new(Signal::new())).unwrap();
        for _ in 0..100 {
            let _ = queue.transmit(60, TxMeta::default(), &mut |out| out.fill(0));
            queue.flush();
        }
        // A transmit chain has nothing to write, so every length is too long; the ring shows it when it is reclaimed.
        assert!(!queue.link_up(), "{hostility:?}");
        assert_eq!(handle.status(), 0);
        drop(queue);
        super::shut_down_leaky(machine, &kernel);
    }
}

#[test]
fn impossible_received_headers_end_the_nic() {
    for (hostility, len) in
        [(Hostility::BadAnswer, 100), (Hostility::BadAnswer, 101), (Hostility::ShortLen, 100)]
    {
        let machine = TestMachine::new();
        let handle = machine.add_mmio(NetModel::new([2; 6]), MmioOptions { hostility, ..Default::default() });
        let kernel = kernel(machine);
        let mut queue = kernel.nics()[0].open_queue(0, Arc::new(Signal::new())).unwrap();
        handle.drive(|model, rings| model.receive(rings, 0, 0, &vec![0; len]));
        assert_eq!(queue.receive(10, &mut |_, _| panic!("no frame came")), 0);
        assert!(!queue.link_up());
        drop(queue);
        super::shut_down(machine, &kernel);
    }
}

#[test]
fn a_frame_that_the_device_changes_later_is_seen_as_it_was_copied() {
    let machine = TestMachine::new();
    let handle = machine.add_mmio(NetModel::new([2; 6]), MmioOptions::default());
    let kernel = kernel(machine);
    let mut queue = kernel.nics()[0].open_queue(0, Arc::new(Signal::new())).unwrap();
    handle.drive(|model, rings| model.receive(rings, 0, 0, &[5; 100]));
    queue.receive(10, &mut |frame, _| {
        handle.drive(|_, rings| {
            // Every receive buffer is overwritten while the stack looks at the frame.
            while let Some(element) = rings.pop(0) {
                element.write_at(rings.arena(), 0, &[0xee; 2048]);
            }
        });
        assert_eq!(frame, [5; 100]);
    });
    drop(queue);
    super::shut_down(machine, &kernel);
}

#[test]
fn a_control_queue_that_never_answers_times_out() {
    use crate::testing::PciOptions;
    let machine = TestMachine::new();
    let handle = machine.add_pci(NetModel::new([2; 6]).with_pairs(2), PciOptions::default());
    let kernel = kernel(machine);
    let nic = kernel.nics()[0].clone();
    let first = nic.open_queue(0, Arc::new(Signal::new())).unwrap();
    handle.set_hostility(Hostility::NeverCompletes);
    assert_eq!(nic.open_queue(1, Arc::new(Signal::new())).err(), Some(hypercall::Error::Io));
    handle.set_hostility(Hostility::BadAnswer);
    assert_eq!(nic.open_queue(1, Arc::new(Signal::new())).err(), Some(hypercall::Error::Io));
    drop((first, nic));
    super::shut_down(machine, &kernel);
}
