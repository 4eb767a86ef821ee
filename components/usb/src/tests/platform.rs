//! The stack on devices that a platform enumerated.

use crate::testing::{Fault, StorageModel};
use crate::{Claim, NodeState, Options, PlatformStack, UsbStack};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::block::{BlockError, Op, transfer};
use anykernel::config::Config;
use hypercall::testing::{TestHost, UsbLoopback};
use hypercall::{Error, HostUsb, Signal, UsbPath};
use std::{format, vec};

fn path(text: &str) -> UsbPath {
    UsbPath::parse(text).unwrap()
}

fn medium() -> Vec<u8> {
    (0..64u32 << 10).map(|at| (at * 7 + (at >> 9)) as u8).collect()
}

/// Runs until nothing is being found out.
fn settle(platform: &PlatformStack<TestHost>, host: TestHost) {
    platform.look_around();
    for _ in 0..20_000 {
        platform.stack.poll();
        host.advance(1_000_000);
    }
    assert!(platform.stack.settled());
}

fn states(stack: &UsbStack<TestHost>) -> Vec<(UsbPath, NodeState)> {
    stack.tree().into_iter().map(|one| (one.path, one.node.state)).collect()
}

#[test]
fn only_what_is_wanted_is_opened() {
    let host = TestHost::with_virtual_time();
    let kernel = Kernel::new(host, Default::default());
    let options = Options { claim: Claim::Only(vec![path("1-2").into()]), ..Options::default() };
    let platform = UsbStack::attach_platform(&kernel, options).unwrap();
    let other = host.plug_usb(path("1-1"), Box::new(StorageModel::new(medium()).0));
    let mine = host.plug_usb(path("1-2"), Box::new(StorageModel::new(medium()).0));
    host.plug_usb(path("1-3"), Box::new(UsbLoopback::default()));
    settle(&platform, host);
    let names: Vec<_> = kernel.block_devices().iter().map(|one| one.info().name.clone()).collect();
    assert_eq!(names, ["usb1-2"]);
    assert_eq!(states(&platform.stack).len(), 3);
    assert!(states(&platform.stack).iter().all(|one| one.1 == NodeState::Configured));
    assert_eq!(host.usb_open(other, Arc::new(Signal::new())), Ok(()));
    assert_eq!(host.usb_open(mine, Arc::new(Signal::new())), Err(Error::Busy));
    host.unplug_usb(mine);
    settle(&platform, host);
    assert!(kernel.block_devices().is_empty());
    assert_eq!(states(&platform.stack).len(), 2);
}

#[test]
fn devices_of_others_are_asked_for_their_names_and_let_go() {
    let host = TestHost::with_virtual_time();
    let kernel = Kernel::new(host, Default::default());
    let options = Options { ask_names: true, ..Options::default() };
    let platform = UsbStack::attach_platform(&kernel, options).unwrap();
    let free = host.plug_usb(path("1-1"), Box::new(StorageModel::new(medium()).0));
    let busy = host.plug_usb(path("1-2"), Box::new(StorageModel::new(medium()).0));
    host.usb_open(busy, Arc::new(Signal::new())).unwrap();
    settle(&platform, host);
    let tree = platform.stack.tree();
    let names = |at: usize| tree[at].node.device.as_ref().unwrap().strings.clone();
    assert!(names(0).iter().any(|name| !name.is_empty()));
    assert!(names(1).iter().all(|name| name.is_empty()));
    assert!(tree.iter().all(|one| one.node.state == NodeState::Configured));
    assert!(kernel.block_devices().is_empty());
    assert_eq!(host.usb_open(free, Arc::new(Signal::new())), Ok(()));
}

/// By place, by product and by class, as a configuration says it.
#[test]
fn a_configuration_picks_devices() {
    let disks = |config: &str| {
        let host = TestHost::with_virtual_time();
        let kernel = Kernel::new(host, Config::parse(config).unwrap());
        let claim = Claim::of_config(kernel.config());
        let platform = UsbStack::attach_platform(&kernel, Options { claim, ..Options::default() }).unwrap();
        host.plug_usb(path("1-1"), Box::new(StorageModel::new(medium()).0));
        host.plug_usb(path("1-2"), Box::new(UsbLoopback::default()));
        host.plug_usb(path("1-3"), Box::new(StorageModel::new(medium()).0));
        settle(&platform, host);
        let descriptor = platform.stack.tree()[0].node.device.as_ref().unwrap().descriptor;
        let names: Vec<_> = kernel.block_devices().iter().map(|one| one.info().name.clone()).collect();
        (names, descriptor.vendor, descriptor.product)
    };
    let (none, vendor, product) = disks("{}");
    assert!(none.is_empty());
    assert_eq!(disks(r#"{"usb":["1-3"]}"#).0, ["usb1-3"]);
    assert_eq!(disks(r#"{"mounts":[{"source":"usb1-1p1","target":"/"}],"usb":["1-2"]}"#).0, ["usb1-1"]);
    assert_eq!(disks(r#"{"usb":["class:03"]}"#).0, [""; 0]);
    assert_eq!(disks(r#"{"usb":["class:08"]}"#).0.len(), 2);
    assert_eq!(disks(&format!(r#"{{"usb":["{vendor:04x}:{product:04x}"]}}"#)).0.len(), 2);
}

#[test]
fn an_open_device_of_somebody_else_is_left_alone() {
    let host = TestHost::with_virtual_time();
    let kernel = Kernel::new(host, Default::default());
    let device = host.plug_usb(path("1-1"), Box::new(StorageModel::new(medium()).0));
    host.usb_open(device, Arc::new(Signal::new())).unwrap();
    let options = Options { claim: Claim::All, ..Options::default() };
    let platform = UsbStack::attach_platform(&kernel, options).unwrap();
    settle(&platform, host);
    assert_eq!(states(&platform.stack), [(path("1-1"), NodeState::Failed("opening it: busy".into()))]);
}

/// With threads, on real time: reads, writes, recovery from stalls, unplug, plugged in again.
#[test]
fn a_disk_of_the_platform() {
    let host = TestHost::new();
    let kernel = Kernel::new(host, Default::default());
    let (model, state) = StorageModel::new(medium());
    state.lock().unwrap().faults = vec![Fault::StallData(3), Fault::StallStatus(5), Fault::WrongTag(11)];
    let device = host.plug_usb(path("2-1.4"), Box::new(model));
    let options = Options { claim: Claim::All, ..Options::default() };
    let stack = UsbStack::start_platform(&kernel, options).unwrap();
    assert!(stack.settle(20_000_000_000));
    let disk = kernel.block_devices()[0].clone();
    assert_eq!(disk.info().name, "usb2-1.4");
    for sector in 0..32 {
        let buffers = vec![vec![0; 512].into(), vec![0; 1024].into()];
        let data = transfer(host, &*disk, Op::Read, sector, buffers).unwrap().concat();
        assert_eq!(data, medium()[sector as usize * 512..][..1536]);
        let data = vec![vec![sector as u8; 512].into(), vec![!sector as u8; 512].into()];
        transfer(host, &*disk, Op::Write, 64 + sector, data).unwrap();
    }
    assert_eq!(state.lock().unwrap().medium.as_ref().unwrap()[64 * 512..][..512], [0; 512]);
    assert!(state.lock().unwrap().resets > 0);
    host.unplug_usb(device);
    let gone = transfer(host, &*disk, Op::Read, 0, vec![vec![0; 512].into()]);
    assert_eq!(gone.err(), Some(BlockError::Gone));
    let wait = |what: &str, done: &dyn Fn() -> bool| {
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !done() {
            assert!(std::time::Instant::now() < until, "{what}");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    };
    wait("it stays in the registry", &|| kernel.block_devices().is_empty());
    host.plug_usb(path("2-1.4"), Box::new(StorageModel::around(&state)));
    wait("it was not taken in again", &|| !kernel.block_devices().is_empty());
    let again = kernel.block_devices()[0].clone();
    assert!(transfer(host, &*again, Op::Read, 0, vec![vec![0; 512].into()]).is_ok());
    drop((disk, again));
    kernel.shutdown();
    drop(stack);
    assert_eq!(Arc::strong_count(&kernel), 1);
}
