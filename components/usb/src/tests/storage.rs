//! Mass storage over models of good and bad sticks.

use super::support::World;
use crate::NodeState;
use crate::testing::{Fault, StorageModel, StorageState};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::block::{BlockDevice, BlockError, Complete, Op, Request};
use core::sync::atomic::{AtomicBool, Ordering};
use hypercall::UsbSpeed;
use hypercall::testing::{UsbModel, UsbReply};
use std::sync::Mutex;
use std::vec;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at as u32).wrapping_mul(2_654_435_761) as u8 ^ (at >> 9) as u8).collect()
}

/// Tag, result and data of a request that is over.
type Done = (u64, Result<(), BlockError>, Vec<u8>);

#[derive(Default)]
struct Sink(Mutex<Vec<Done>>);

impl Complete for Sink {
    fn complete(&self, request: Request, result: Result<(), BlockError>) {
        self.0.lock().unwrap().push((request.tag, result, request.buffers.concat()));
    }
}

impl Sink {
    fn results(&self) -> Vec<(u64, Result<(), BlockError>)> {
        self.0.lock().unwrap().iter().map(|one| (one.0, one.1)).collect()
    }
}

fn request(op: Op, sector: u64, buffers: Vec<Box<[u8]>>, sink: &Arc<Sink>, tag: u64) -> Request {
    Request { op, sector, buffers, done: sink.clone(), tag }
}

struct Stick {
    world: World,
    state: Arc<Mutex<StorageState>>,
    disk: Arc<dyn BlockDevice>,
}

impl Stick {
    fn new(medium: Vec<u8>, change: impl FnOnce(&mut StorageState)) -> Self {
        let world = World::new(1);
        let (model, state) = StorageModel::new(medium);
        change(&mut state.lock().unwrap());
        world.bus.plug(1, model);
        world.settle();
        let disk = world.kernel.block_devices().first().cloned();
        let disk = disk.unwrap_or_else(|| panic!("no disk: {:#?}", world.lines()));
        Self { world, state, disk }
    }

    fn one(&self, op: Op, sector: u64, buffers: Vec<Box<[u8]>>) -> (Result<(), BlockError>, Vec<u8>) {
        let sink = Arc::new(Sink::default());
        if let Err(rejected) = self.disk.submit(request(op, sector, buffers, &sink, 0)) {
            return (Err(rejected.reason.unwrap()), Vec::new());
        }
        self.world.until(200_000, || !sink.0.lock().unwrap().is_empty());
        let (_, result, data) = sink.0.lock().unwrap().remove(0);
        (result, data)
    }

    fn read(&self, sector: u64, bytes: usize) -> Result<Vec<u8>, BlockError> {
        let (result, data) = self.one(Op::Read, sector, vec![vec![0; bytes].into()]);
        result.map(|()| data)
    }

    fn write(&self, sector: u64, bytes: &[u8]) -> Result<(), BlockError> {
        self.one(Op::Write, sector, vec![bytes.into()]).0
    }
}

#[test]
fn a_stick_is_a_disk() {
    let medium = pattern(1 << 20);
    let stick = Stick::new(medium.clone(), |_| ());
    let info = stick.disk.info().clone();
    assert_eq!((info.name.as_str(), info.sector_size, info.sectors), ("usb1-1", 512, 2048));
    assert!(!info.read_only && info.needs_flush);
    assert_eq!(stick.read(3, 512).unwrap(), medium[3 * 512..4 * 512]);
    // In several buffers, of sizes that are no multiples of each other.
    let buffers = [512usize, 4096, 1024].map(|len| vec![0; len].into_boxed_slice());
    let (result, data) = stick.one(Op::Read, 100, buffers.into());
    assert_eq!((result, &data[..]), (Ok(()), &medium[100 * 512..][..5632]));
    stick.write(2047, &[0xaa; 512]).unwrap();
    assert_eq!(stick.read(2047, 512).unwrap(), [0xaa; 512]);
    assert_eq!(stick.one(Op::Flush, 0, Vec::new()).0, Ok(()));
    assert_eq!(stick.state.lock().unwrap().flushes, 1);
    // Outside, and not whole sectors.
    assert_eq!(stick.read(2047, 1024), Err(BlockError::Invalid));
    assert_eq!(stick.read(0, 100), Err(BlockError::Invalid));
    assert_eq!(stick.read(u64::MAX, 512), Err(BlockError::Invalid));
    let tree = stick.world.node("1-1").unwrap();
    assert_eq!(tree.node.drivers[0].note, "usb1-1 (ANYKERNL model stick 1.0)");
    assert_eq!(stick.world.counter("storage_recoveries"), 0);
}

#[test]
fn at_every_speed() {
    for speed in [UsbSpeed::Full, UsbSpeed::High, UsbSpeed::Super] {
        let world = World::new(1);
        let medium = pattern(256 << 10);
        let (model, state) = StorageModel::with_speed(medium.clone(), speed);
        world.bus.plug(1, model);
        world.settle();
        let disk = world.kernel.block_devices().first().cloned().unwrap_or_else(|| panic!("{speed:?}"));
        let stick = Stick { world, state, disk };
        assert_eq!(stick.read(1, 65_536 - 512).unwrap(), medium[512..65_536], "{speed:?}");
    }
}

#[test]
fn many_requests_come_back_in_order() {
    let medium = pattern(1 << 20);
    let stick = Stick::new(medium.clone(), |_| ());
    let sink = Arc::new(Sink::default());
    let mut refused = 0;
    for tag in 0..100 {
        let buffers = vec![vec![0; 4096].into()];
        let submitted = stick.disk.submit(request(Op::Read, tag * 8, buffers, &sink, tag));
        refused += usize::from(submitted.is_err_and(|rejected| rejected.reason.is_none()));
    }
    assert_eq!(refused, 100 - stick.disk.info().queue_depth);
    stick.world.run(5);
    let done = sink.0.lock().unwrap();
    assert_eq!(done.len(), stick.disk.info().queue_depth);
    for (tag, (its, result, data)) in done.iter().enumerate() {
        assert_eq!((*its, *result), (tag as u64, Ok(())));
        assert_eq!(data[..], medium[tag * 4096..][..4096]);
    }
}

/// Each of these is overcome: the data is right, at the price of retries that are counted.
#[test]
fn sticks_with_faults_work() {
    for fault in [
        Fault::WrongTag(7),
        Fault::PhaseError(7),
        Fault::StallData(5),
        Fault::StallStatus(3),
        Fault::Residue(3),
        Fault::ShortData(3),
        Fault::Aborts(4),
        Fault::EmptyStatus,
        Fault::Minimal,
        Fault::NoMaxLun,
        Fault::SlowStart(5),
    ] {
        let medium = pattern(128 << 10);
        let stick = Stick::new(medium.clone(), |state| state.faults.push(fault));
        for sector in [0, 8, 16, 200, 33, 77, 1, 2, 3, 4, 5, 6] {
            let data = stick.read(sector, 8192);
            let at = sector as usize * 512;
            assert_eq!(data.as_deref(), Ok(&medium[at..at + 8192]), "{fault:?} at {sector}");
        }
        for sector in 50..60 {
            assert_eq!(stick.write(sector, &[sector as u8; 512]), Ok(()), "{fault:?}");
        }
        assert_eq!(stick.one(Op::Flush, 0, Vec::new()).0, Ok(()), "{fault:?}");
        let medium = stick.state.lock().unwrap().medium.clone().unwrap();
        for sector in 50..60 {
            assert_eq!(medium[sector * 512..][..512], [sector as u8; 512], "{fault:?}");
        }
        assert_eq!(stick.world.state("1-1"), NodeState::Configured, "{fault:?}");
    }
}

#[test]
fn a_false_residue_needs_its_quirk() {
    let medium = pattern(64 << 10);
    let stick = Stick::new(medium.clone(), |state| state.faults.push(Fault::FalseResidue));
    assert_eq!(stick.read(0, 1024), Err(BlockError::Io));

    let quirks = crate::quirks::parse("46f4:0001:r").unwrap();
    let world = World::with(1, 8, crate::Options { quirks, ..Default::default() });
    let (model, state) = StorageModel::new(medium.clone());
    state.lock().unwrap().faults.push(Fault::FalseResidue);
    world.bus.plug(1, model);
    world.settle();
    let disk = world.kernel.block_devices()[0].clone();
    let stick = Stick { world, state, disk };
    assert_eq!(stick.read(0, 1024).unwrap(), medium[..1024]);
}

/// These are beyond help: given up with a reason, after a bounded number of commands, without a hang.
#[test]
fn hopeless_sticks_are_given_up() {
    for fault in [
        Fault::Mute,
        Fault::StallAll,
        Fault::WrongTag(1),
        Fault::PhaseError(1),
        Fault::ShortStatus,
        Fault::Aborts(1),
    ] {
        let world = World::new(2);
        let (model, state) = StorageModel::new(pattern(64 << 10));
        state.lock().unwrap().faults.push(fault);
        world.bus.plug(1, model);
        let (good, _) = StorageModel::new(pattern(64 << 10));
        world.bus.plug(2, good);
        world.settle();
        world.until(300_000, || matches!(world.state("1-1"), NodeState::Failed(_)));
        world.run(200);
        assert!(!world.bus.enabled(1), "{fault:?}");
        assert_eq!(world.disks(), ["usb1-2"], "{fault:?}");
        assert_eq!(world.bus.slots(), 1, "{fault:?}");
        let commands = state.lock().unwrap().commands;
        assert!(commands < 60, "{fault:?}: {commands} commands");
        world.run(10_000);
        assert_eq!(state.lock().unwrap().commands, commands, "{fault:?}: it is asked for ever");
    }
}

#[test]
fn a_stick_that_breaks_later_fails_its_requests() {
    for fault in [Fault::Mute, Fault::StallAll, Fault::WrongTag(1), Fault::LongData] {
        let stick = Stick::new(pattern(64 << 10), |_| ());
        stick.state.lock().unwrap().faults.push(fault);
        let sink = Arc::new(Sink::default());
        for tag in 0..5 {
            let buffers = vec![vec![0; 512].into()];
            assert!(stick.disk.submit(request(Op::Read, tag, buffers, &sink, tag)).is_ok());
        }
        stick.world.until(600_000, || sink.results().len() == 5);
        assert!(sink.results().iter().all(|one| one.1.is_err()), "{fault:?}: {:?}", sink.results());
        assert_eq!(stick.read(0, 512), Err(BlockError::Gone), "{fault:?}");
        stick.world.run(100);
        assert!(stick.world.disks().is_empty(), "{fault:?}");
    }
}

#[test]
fn no_size_no_disk() {
    let world = World::new(1);
    let (model, state) = StorageModel::new(pattern(64 << 10));
    state.lock().unwrap().faults.push(Fault::NoCapacity);
    world.bus.plug(1, model);
    world.settle();
    assert!(world.disks().is_empty());
}

#[test]
fn write_protection() {
    let stick = Stick::new(pattern(64 << 10), |state| state.read_only = true);
    assert!(stick.disk.info().read_only);
    assert_eq!(stick.write(0, &[1; 512]), Err(BlockError::ReadOnly));
    // One that is switched on later shows by its sense data.
    let stick = Stick::new(pattern(64 << 10), |_| ());
    stick.state.lock().unwrap().read_only = true;
    assert_eq!(stick.write(0, &[1; 512]), Err(BlockError::ReadOnly));
    assert!(stick.read(0, 512).is_ok());
}

#[test]
fn a_medium_comes_and_goes() {
    let stick = Stick::new(pattern(64 << 10), |_| ());
    let medium = stick.state.lock().unwrap().medium.take();
    assert_eq!(stick.read(0, 512), Err(BlockError::Gone));
    assert_eq!(stick.read(0, 512), Err(BlockError::Gone));
    assert!(stick.world.disks().is_empty());
    assert_eq!(stick.world.state("1-1"), NodeState::Configured);
    // Another one is found without anybody asking.
    {
        let mut state = stick.state.lock().unwrap();
        state.medium = medium.map(|medium| medium[..32 << 10].to_vec());
        state.attention = true;
    }
    stick.world.run(5_000);
    assert_eq!(stick.world.disks(), ["usb1-1"]);
    assert_eq!(stick.world.kernel.block_devices()[0].info().sectors, 64);
    // And its loss is noticed too.
    stick.state.lock().unwrap().medium = None;
    stick.world.run(5_000);
    assert!(stick.world.disks().is_empty());
}

#[test]
fn several_units() {
    let world = World::new(1);
    let (model, state) = StorageModel::new(pattern(64 << 10));
    state.lock().unwrap().units = 3;
    world.bus.plug(1, model);
    world.settle();
    assert_eq!(world.disks(), ["usb1-1", "usb1-1l1", "usb1-1l2"]);
    world.bus.unplug(1);
    world.run(50);
    assert!(world.disks().is_empty());
}

/// Pulled out in the middle of everything: each request ends once, as an error, and plugged in again it works.
#[test]
fn unplugged_mid_transfer() {
    let medium = pattern(256 << 10);
    for delay in 0..6 {
        let stick = Stick::new(medium.clone(), |state| {
            // Something is always going on.
            state.faults.push(Fault::SlowStart(0));
        });
        let sink = Arc::new(Sink::default());
        stick.state.lock().unwrap().faults.push(Fault::Mute);
        for tag in 0..20 {
            let (op, data) =
                if tag % 2 == 0 { (Op::Write, vec![9; 4096]) } else { (Op::Read, vec![0; 4096]) };
            assert!(stick.disk.submit(request(op, tag, vec![data.into()], &sink, tag)).is_ok());
        }
        stick.world.run(delay * 3);
        stick.world.bus.unplug(1);
        stick.world.until(1_000, || sink.results().len() == 20);
        assert!(sink.results().iter().all(|one| one.1 == Err(BlockError::Gone)), "{:?}", sink.results());
        assert!(stick.world.disks().is_empty());
        stick.state.lock().unwrap().faults.clear();
        stick.world.bus.plug(1, StorageModel::around(&stick.state));
        stick.world.settle();
        let disk = stick.world.kernel.block_devices()[0].clone();
        let again = Stick { disk, ..stick };
        assert_eq!(again.read(8, 512).unwrap(), medium[4096..4608]);
    }
}

#[test]
fn a_device_that_comes_back_from_a_reset_as_another() {
    let stick = Stick::new(pattern(64 << 10), |_| ());
    stick.state.lock().unwrap().faults = vec![Fault::ChangesAtReset, Fault::WrongTag(1)];
    assert_eq!(stick.read(0, 512), Err(BlockError::Gone));
    stick.state.lock().unwrap().faults.clear();
    stick.world.settle();
    // It was taken in anew, as what it is now.
    stick.world.until(10_000, || stick.world.disks() == ["usb1-1"]);
    assert_eq!(stick.world.counter("lost_at_reset"), 1);
}

/// With the thread: a reader blocks and is served, and after the kernel's threads have ended it serves itself.
#[test]
fn a_blocking_reader() {
    use crate::{Options, UsbStack};
    use anykernel::block::transfer;
    let host = hypercall::testing::TestHost::new();
    let kernel = anykernel::Kernel::new(host, Default::default());
    let bus = crate::testing::ModelBus::new(host, 1, 4);
    let medium = pattern(256 << 10);
    let (model, _) = StorageModel::new(medium.clone());
    bus.plug(1, model);
    let (controller, signal) = bus.controller();
    let stack = UsbStack::start(&kernel, controller, signal, 1, Options::default()).unwrap();
    assert!(stack.settle(20_000_000_000));
    let disk = kernel.block_devices()[0].clone();
    for sector in 0..64 {
        let data = transfer(host, &*disk, Op::Read, sector, vec![vec![0; 4096].into()]).unwrap();
        assert_eq!(data.concat(), medium[sector as usize * 512..][..4096]);
    }
    kernel.stop();
    let data = transfer(host, &*disk, Op::Read, 9, vec![vec![0; 512].into()]).unwrap();
    assert_eq!(data.concat(), medium[9 * 512..][..512]);
    kernel.shutdown();
    let data = transfer(host, &*disk, Op::Read, 10, vec![vec![0; 512].into()]).unwrap();
    assert_eq!(data.concat(), medium[10 * 512..][..512]);
    drop((disk, stack));
    // Nothing keeps kernel or controller alive.
    assert_eq!(Arc::strong_count(&kernel), 1);
    assert_eq!(bus.slots(), 1, "the model remembers; its controller was dropped with a device attached");
}

/// A stick that does not answer while it is held.
struct Held(StorageModel, Arc<AtomicBool>);

impl UsbModel for Held {
    fn descriptors(&self) -> Vec<u8> {
        self.0.descriptors()
    }
    fn control(&mut self, setup: [u8; 8], data: &mut [u8]) -> UsbReply {
        self.0.control(setup, data)
    }
    fn packet_out(&mut self, endpoint: u8, packet: &[u8]) -> UsbReply {
        self.0.packet_out(endpoint, packet)
    }
    fn packet_in(&mut self, endpoint: u8, room: &mut [u8]) -> UsbReply {
        if self.1.load(Ordering::SeqCst) { UsbReply::Nak } else { self.0.packet_in(endpoint, room) }
    }
    fn bus_reset(&mut self) {
        self.0.bus_reset();
    }
}

/// The instance stops while a reader sleeps until the stick answers: it is served before the thread that it counts on ends.
#[test]
fn who_sleeps_when_the_instance_stops_is_served() {
    use crate::{Options, UsbStack};
    let host = hypercall::testing::TestHost::new();
    let kernel = anykernel::Kernel::new(host, Default::default());
    let bus = crate::testing::ModelBus::new(host, 1, 4);
    let (model, state) = StorageModel::new(pattern(256 << 10));
    let held = Arc::new(AtomicBool::new(false));
    bus.plug(1, Held(model, held.clone()));
    let (controller, signal) = bus.controller();
    let stack = UsbStack::start(&kernel, controller, signal, 1, Options::default()).unwrap();
    assert!(stack.settle(20_000_000_000));
    let disk = kernel.block_devices()[0].clone();
    held.store(true, Ordering::SeqCst);
    let before = state.lock().unwrap().commands;
    let reader = std::thread::spawn(move || {
        anykernel::block::transfer(host, &*disk, Op::Read, 3, vec![vec![0; 512].into()])
            .map(|data| data.concat())
    });
    let until = |done: &dyn Fn() -> bool| {
        let start = std::time::Instant::now();
        while !done() {
            assert!(start.elapsed().as_secs() < 20, "it is not served");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    };
    until(&|| state.lock().unwrap().commands > before);
    kernel.stop();
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert!(!reader.is_finished());
    held.store(false, Ordering::SeqCst);
    until(&|| reader.is_finished());
    assert_eq!(reader.join().unwrap().unwrap(), pattern(256 << 10)[3 * 512..][..512]);
    kernel.shutdown();
    drop(stack);
}
