use super::{kernel, shut_down};
use crate::testing::{Handle, MmioOptions, NetModel, PciOptions, TestMachine};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::nic::{ChecksumAt, NicCaps, NicQueue, RxMeta, Segment, TxFull, TxMeta};
use hypercall::{Error, Signal};
use std::string::String;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

struct Started {
    machine: TestMachine,
    handle: Handle<NetModel>,
    kernel: Arc<Kernel<TestMachine>>,
    signal: Arc<Signal>,
    queue: Box<dyn NicQueue>,
}

impl Started {
    fn mmio(model: NetModel, options: MmioOptions) -> Self {
        let machine = TestMachine::new();
        let handle = machine.add_mmio(model, options);
        Self::open(machine, handle)
    }

    fn pci(model: NetModel, options: PciOptions) -> Self {
        let machine = TestMachine::new();
        let handle = machine.add_pci(model, options);
        Self::open(machine, handle)
    }

    fn open(machine: TestMachine, handle: Handle<NetModel>) -> Self {
        let kernel = kernel(machine);
        let signal = Arc::new(Signal::new());
        let queue = kernel.nics()[0].open_queue(0, signal.clone()).unwrap();
        Self { machine, handle, kernel, signal, queue }
    }

    fn inject(&self, frame: &[u8]) -> bool {
        self.handle.drive(|model, rings| model.receive(rings, 0, 0, frame))
    }

    fn receive_all(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        self.queue.receive(1000, &mut |frame, _| frames.push(frame.to_vec()));
        frames
    }

    fn send(&mut self, frame: &[u8], meta: TxMeta) -> Result<(), TxFull> {
        self.queue.transmit(frame.len(), meta, &mut |out| out.copy_from_slice(frame))
    }

    fn end(self) {
        assert_eq!(self.handle.complaints(), Vec::<String>::new());
        drop(self.queue);
        shut_down(self.machine, &self.kernel);
    }
}

fn frame(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + seed) as u8).collect()
}

fn all_fronts(model: impl Fn() -> NetModel) -> Vec<Started> {
    let mut all = Vec::new();
    for ring_features in [0, 1 << 29, 1 << 28 | 1 << 29] {
        for legacy in [false, true] {
            all.push(Started::mmio(model(), MmioOptions { legacy, ring_features, ..Default::default() }));
        }
        for (msix, transitional) in [(4, false), (0, true)] {
            all.push(Started::pci(
                model(),
                PciOptions { msix, transitional, ring_features, ..Default::default() },
            ));
        }
    }
    all
}

#[test]
fn frames_go_and_come_on_every_front() {
    // With and without mergeable buffers: header sizes differ on legacy devices.
    for mergeable in [true, false] {
        let model = || {
            let mut model = NetModel::new(MAC);
            if !mergeable {
                model.features &= !(1 << 15);
            }
            model
        };
        for mut started in all_fronts(model) {
            let info = started.kernel.nics()[0].info().clone();
            assert_eq!((info.name.as_str(), info.mac, info.mtu, info.queues), ("nic0", MAC, 1500, 1));
            for i in 0..1000 {
                let sent = frame(60 + i % 1400, i);
                started.send(&sent, TxMeta::default()).unwrap();
                started.queue.flush();
                let received = frame(60 + i * 7 % 1454, i + 1);
                assert!(started.inject(&received), "no receive buffer at frame {i}");
                assert_eq!(started.receive_all(), [received]);
                let got = started.handle.with(|model| model.sent.pop()).unwrap();
                assert_eq!(got.frame, sent);
                assert!(got.header.iter().all(|byte| *byte == 0));
            }
            started.end();
        }
    }
}

#[test]
fn offloads_that_were_agreed_on_are_announced() {
    let started = Started::mmio(NetModel::new(MAC), MmioOptions::default());
    assert_eq!(started.kernel.nics()[0].info().caps, NicCaps::all());
    started.end();
    let mut plain = NetModel::new(MAC);
    plain.features = 1 << 5;
    let started = Started::mmio(plain, MmioOptions::default());
    let info = started.kernel.nics()[0].info().clone();
    assert_eq!((info.caps, info.mtu), (NicCaps::empty(), 1500));
    started.end();
    // Cutting without checksums, and merging without mergeable buffers, make no sense.
    let mut odd = NetModel::new(MAC);
    odd.features = 1 << 5 | 1 << 1 | 1 << 7 | 1 << 11;
    let started = Started::mmio(odd, MmioOptions::default());
    assert_eq!(started.kernel.nics()[0].info().caps, NicCaps::RX_CHECKSUM);
    started.end();
}

#[test]
fn asks_the_device_for_checksums_and_cutting() {
    let mut started = Started::mmio(NetModel::new(MAC), MmioOptions::default());
    let checksum = Some(ChecksumAt { start: 34, field: 16 });
    let segment = Some(Segment { mss: 1448, header_len: 66, ipv6: false });
    let large = frame(60_000, 3);
    started.send(&large, TxMeta { checksum, segment }).unwrap();
    started.send(&frame(100, 1), TxMeta { checksum, segment: None }).unwrap();
    let segment = Some(Segment { mss: 1428, header_len: 86, ipv6: true });
    started.send(&large, TxMeta { checksum, segment }).unwrap();
    started.queue.flush();
    let sent = started.handle.with(|model| core::mem::take(&mut model.sent));
    assert_eq!(sent[0].header, [1, 1, 66, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]);
    assert_eq!(sent[0].frame, large);
    assert_eq!(sent[1].header, [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0]);
    assert_eq!(sent[2].header, [1, 4, 86, 0, 0x94, 5, 34, 0, 16, 0, 0, 0]);
    // What was not agreed on, or does not fit, is dropped and counted.
    started.send(&frame(2000, 0), TxMeta::default()).unwrap();
    started.send(&frame(65_536 + 100, 0), TxMeta { checksum, segment }).unwrap();
    started.send(&large, TxMeta { checksum: None, segment }).unwrap();
    started.send(&[], TxMeta::default()).unwrap();
    started.queue.flush();
    assert_eq!(started.handle.with(|model| model.sent.len()), 0);
    assert_eq!(started.kernel.counter("nic0.tx_dropped").get(), 4);
    started.end();
}

#[test]
fn says_which_checksums_are_good() {
    let mut started = Started::mmio(NetModel::new(MAC), MmioOptions::default());
    for (flags, expected) in [(0, false), (1, true), (2, true)] {
        started.handle.drive(|model, rings| model.receive(rings, 0, flags, &frame(80, 0)));
        let mut metas = Vec::new();
        started.queue.receive(10, &mut |_, meta| metas.push(meta));
        assert_eq!(metas, [RxMeta { checksum_ok: expected }]);
    }
    started.end();
}

#[test]
fn puts_a_merged_frame_together_even_if_it_comes_in_pieces() {
    let mut started = Started::mmio(NetModel::new(MAC), MmioOptions::default());
    let large = frame(65_000, 9);
    for shown in [usize::MAX, 1, 2, 30] {
        let injected = started.handle.drive(|model, rings| model.receive_in(rings, 0, 0, &large, shown));
        assert!(injected);
        assert_eq!(started.receive_all(), core::slice::from_ref(&large));
    }
    started.handle.with(|model| assert_eq!(model.largest_buffer, 2048));
    started.end();
}

#[test]
fn a_runt_and_a_giant_are_dropped_and_counted() {
    let mut started = Started::mmio(NetModel::new(MAC), MmioOptions::default());
    started.inject(&frame(13, 0));
    started.inject(&frame(65_535 + 19, 0));
    started.inject(&frame(64, 5));
    assert_eq!(started.receive_all(), [frame(64, 5)]);
    assert_eq!(started.kernel.counter("nic0.rx_errors").get(), 2);
    started.end();
}

#[test]
fn receives_no_more_than_the_budget() {
    let mut started = Started::mmio(NetModel::new(MAC), MmioOptions::default());
    for i in 0..10 {
        started.inject(&frame(64, i));
    }
    let mut seen = 0;
    assert_eq!(started.queue.receive(4, &mut |_, _| seen += 1), 4);
    assert!(started.queue.arm(), "there is more");
    assert_eq!(started.queue.receive(100, &mut |_, _| seen += 1), 6);
    assert_eq!(seen, 10);
    assert!(!started.queue.arm());
    started.end();
}

#[test]
fn interrupts_only_when_armed_and_never_loses_one() {
    for mut started in all_fronts(|| NetModel::new(MAC)) {
        for round in 0..50 {
            assert!(!started.queue.arm());
            let before = started.signal.count();
            started.inject(&frame(64, round));
            assert_eq!(started.signal.count().wrapping_sub(before), 1, "an armed queue interrupts once");
            started.receive_all();
            // Polling: no interrupt for what comes now.
            let interrupts = started.handle.interrupts(0);
            for i in 0..5 {
                started.inject(&frame(64, i));
            }
            assert_eq!(started.receive_all().len(), 5);
            assert_eq!(started.handle.interrupts(0), interrupts, "a polling queue is left alone");
        }
        started.end();
    }
}

#[test]
fn a_batch_costs_one_doorbell_and_no_interrupt() {
    let mut started = Started::mmio(NetModel::new(MAC), MmioOptions::default());
    let (kicks, interrupts) = (started.handle.kicks(1), started.handle.interrupts(1));
    for _ in 0..100 {
        for i in 0..32 {
            started.send(&frame(64, i), TxMeta::default()).unwrap();
        }
        started.queue.flush();
        started.queue.flush();
    }
    assert_eq!(started.handle.kicks(1) - kicks, 100);
    assert_eq!(started.handle.interrupts(1), interrupts);
    started.end();
}

#[test]
fn a_full_ring_wakes_the_sender_when_there_is_room() {
    for mut started in all_fronts(|| NetModel::new(MAC).with(|model| model.slow = true)) {
        let mut sent = 0;
        while started.send(&frame(64, sent), TxMeta::default()).is_ok() {
            sent += 1;
            assert!(sent <= 256);
        }
        started.queue.flush();
        assert!(sent >= 64);
        assert!(!started.queue.arm(), "nothing was sent yet");
        let before = started.signal.count();
        started.handle.drive(|model, rings| model.finish_sending(rings, sent));
        assert_ne!(started.signal.count(), before, "room came back without a signal");
        started.send(&frame(64, 1), TxMeta::default()).unwrap();
        started.queue.flush();
        assert_eq!(started.kernel.counter("nic0.tx_full").get(), 1);
        started.end();
    }
}

#[test]
fn used_up_large_buffers_wake_the_sender_too() {
    let mut started =
        Started::mmio(NetModel::new(MAC).with(|model| model.slow = true), MmioOptions::default());
    let meta = TxMeta {
        checksum: Some(ChecksumAt { start: 34, field: 16 }),
        segment: Some(Segment { mss: 1448, header_len: 66, ipv6: false }),
    };
    let mut sent = 0;
    while started.send(&frame(60_000, 0), meta).is_ok() {
        sent += 1;
    }
    assert_eq!(sent, 8);
    // A small frame in between must not make it forget.
    started.send(&frame(64, 0), TxMeta::default()).unwrap();
    assert!(!started.queue.arm());
    let before = started.signal.count();
    started.handle.drive(|model, rings| model.finish_sending(rings, 9));
    assert_ne!(started.signal.count(), before);
    started.send(&frame(60_000, 0), meta).unwrap();
    started.end();
}

#[test]
fn link_changes_raise_the_signal_and_are_seen() {
    for mut started in all_fronts(|| NetModel::new(MAC)) {
        assert!(started.queue.link_up());
        assert!(!started.queue.arm());
        for up in [false, true, false] {
            let before = started.signal.count();
            let config = started.handle.with(|model| {
                model.up = up;
                crate::testing::Model::config(model)
            });
            started.handle.change_config(config);
            assert_ne!(started.signal.count(), before);
            started.queue.receive(10, &mut |_, _| ());
            started.queue.arm();
            assert_eq!(started.queue.link_up(), up);
        }
        started.end();
    }
}

#[test]
fn one_pair_for_each_cpu_with_vectors() {
    let machine = TestMachine::new();
    let handle = machine.add_pci(NetModel::new(MAC).with_pairs(4), PciOptions::default());
    let kernel = kernel(machine);
    let nic = kernel.nics()[0].clone();
    assert_eq!(nic.info().queues, 2);
    let signals = [Arc::new(Signal::new()), Arc::new(Signal::new())];
    let mut first = nic.open_queue(0, signals[0].clone()).unwrap();
    handle.with(|model| assert_eq!(model.active_pairs, 1));
    assert_eq!(nic.open_queue(0, signals[0].clone()).err(), Some(Error::Busy));
    assert_eq!(nic.open_queue(2, signals[0].clone()).err(), Some(Error::NotFound));
    let mut second = nic.open_queue(1, signals[1].clone()).unwrap();
    handle.with(|model| assert_eq!(model.active_pairs, 2));
    assert!(!first.arm() && !second.arm());
    handle.drive(|model, rings| model.receive(rings, 1, 0, &frame(70, 1)));
    assert_eq!((signals[0].count(), signals[1].count()), (0, 1));
    assert_eq!(first.receive(10, &mut |_, _| ()), 0);
    assert_eq!(second.receive(10, &mut |_, _| ()), 1);
    second.transmit(60, TxMeta::default(), &mut |out| out.fill(5)).unwrap();
    second.flush();
    handle.with(|model| assert_eq!(model.sent[0].pair, 1));
    drop(second);
    handle.with(|model| assert_eq!(model.active_pairs, 1));
    // It can be opened again.
    let again = nic.open_queue(1, signals[1].clone()).unwrap();
    handle.with(|model| assert_eq!(model.active_pairs, 2));
    assert_eq!(handle.complaints(), Vec::<String>::new());
    drop((first, again, nic));
    shut_down(machine, &kernel);
}

#[test]
fn one_pair_only_without_vectors_or_with_one_cpu() {
    for (cpus, msix) in [(1, 4), (2, 0), (2, 1)] {
        let machine = TestMachine::new();
        machine.set_cpus(cpus);
        machine.add_pci(NetModel::new(MAC).with_pairs(4), PciOptions { msix, ..Default::default() });
        let kernel = kernel(machine);
        assert_eq!(kernel.nics()[0].info().queues, 1);
        shut_down(machine, &kernel);
    }
}

#[test]
fn fits_a_machine_of_8_mib() {
    let machine = TestMachine::new();
    machine.set_memory_bytes(8 << 20);
    let handle = machine.add_mmio(NetModel::new(MAC), MmioOptions::default());
    let mut started = Started::open(machine, handle);
    assert!(machine.arena().bytes_in_use() < 512 << 10, "{}", machine.arena().bytes_in_use());
    // Even the largest frame finds its buffers.
    assert!(started.inject(&frame(65_000, 2)));
    assert_eq!(started.receive_all(), [frame(65_000, 2)]);
    started.end();
}

#[test]
fn jumbo_frames_by_the_devices_mtu() {
    let mut started =
        Started::mmio(NetModel::new(MAC).with(|model| model.mtu = 9000), MmioOptions::default());
    assert_eq!(started.kernel.nics()[0].info().mtu, 9000);
    let jumbo = frame(9014, 1);
    started.send(&jumbo, TxMeta::default()).unwrap();
    started.queue.flush();
    assert_eq!(started.handle.with(|model| model.sent.pop()).unwrap().frame, jumbo);
    assert!(started.inject(&jumbo));
    assert_eq!(started.receive_all(), [jumbo]);
    started.end();
}
