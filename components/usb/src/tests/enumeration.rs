//! Ports, hubs, and devices that make it hard.

use super::support::World;
use crate::NodeState;
use crate::testing::{Descriptors, HubModel, StorageModel};
use alloc::vec::Vec;
use hypercall::UsbSpeed;
use hypercall::testing::{UsbLoopback, UsbModel, UsbReply, UsbStandard};
use std::vec;

#[test]
fn a_device_is_taken_in_and_let_go() {
    let world = World::new(2);
    world.bus.plug(1, UsbLoopback::default());
    world.settle();
    assert_eq!(world.state("1-1"), NodeState::Configured);
    let device = world.node("1-1").unwrap().node.device.unwrap();
    assert_eq!((device.descriptor.vendor, device.descriptor.product), (0x1209, 1));
    assert_eq!(device.strings[..2], ["anykernel", "loopback"]);
    assert_eq!(device.speed, UsbSpeed::High);
    assert_eq!(world.bus.slots(), 1);
    world.bus.unplug(1);
    world.run(20);
    assert!(world.node("1-1").is_none());
    assert_eq!(world.bus.slots(), 0);
    let (accepted, completed) = world.bus.transfers();
    assert_eq!(accepted, completed);
}

#[test]
fn hubs_in_hubs() {
    let world = World::new(1);
    let outer = HubModel::new(world.host, &world.bus, 4);
    let inner = HubModel::new(world.host, &world.bus, 2);
    outer.plug_into_root(1);
    inner.plug_into(&outer, 3);
    inner.plug(2, UsbLoopback::default());
    outer.plug(1, UsbLoopback::default());
    world.settle();
    for path in ["1-1", "1-1.1", "1-1.3", "1-1.3.2"] {
        assert_eq!(world.state(path), NodeState::Configured, "{path}");
    }
    assert_eq!(world.bus.slots(), 4);
    // Into a hub that runs, and out of it.
    outer.plug(4, UsbLoopback::default());
    world.settle();
    assert_eq!(world.state("1-1.4"), NodeState::Configured);
    assert!(outer.unplug(1));
    world.run(50);
    assert!(world.node("1-1.1").is_none());
    // The hub takes everything along.
    world.bus.unplug(1);
    world.run(50);
    assert_eq!(world.lines(), [""; 0]);
    assert_eq!(world.bus.slots(), 0);
}

/// USB allows five hubs in a row; the sixth is refused, and everything before it works.
#[test]
fn endless_hub_chains_end() {
    let world = World::new(1);
    let hubs: Vec<_> = (0..7).map(|_| HubModel::new(world.host, &world.bus, 1)).collect();
    hubs[0].plug_into_root(1);
    for pair in hubs.windows(2) {
        pair[1].plug_into(&pair[0], 1);
    }
    world.settle();
    assert_eq!(world.state("1-1.1.1.1.1"), NodeState::Configured);
    assert_eq!(world.state("1-1.1.1.1.1.1"), NodeState::Failed("more than five hubs in a row".into()));
    assert_eq!(world.stack.tree().len(), 6);
}

#[test]
fn more_devices_than_the_controller_holds() {
    let world = World::with(1, 3, Default::default());
    let hub = HubModel::new(world.host, &world.bus, 4);
    hub.plug_into_root(1);
    for port in 1..=4 {
        hub.plug(port, UsbLoopback::default());
    }
    world.settle();
    let states: Vec<_> = (1..=4).map(|port| world.state(&alloc::format!("1-1.{port}"))).collect();
    assert_eq!(states.iter().filter(|state| **state == NodeState::Configured).count(), 2);
    let why = "giving it an address: the host controller holds no more devices";
    assert!(states.contains(&NodeState::Failed(why.into())), "{states:?}");
}

/// A hub that reports all the time wakes us, but not more often than it may.
#[test]
fn a_chatty_hub_is_held_back() {
    let world = World::new(2);
    let mut hub = HubModel::new(world.host, &world.bus, 2);
    hub.chatty = true;
    hub.plug_into_root(1);
    world.bus.plug(2, UsbLoopback::default());
    world.settle();
    assert_eq!(world.state("1-2"), NodeState::Configured);
    let before = world.stack.transfers();
    world.run(1000);
    let each_ms = (world.stack.transfers() - before) / 1000;
    assert!(each_ms <= 2, "{each_ms} transfers each millisecond");
}

/// What a hostile device answers to GET_DESCRIPTOR.
struct Hostile {
    standard: UsbStandard,
    answer: fn(&Hostile, setup: [u8; 8], data: &mut [u8]) -> Option<UsbReply>,
    asked: alloc::sync::Arc<core::sync::atomic::AtomicU32>,
}

impl Hostile {
    fn new(answer: fn(&Hostile, [u8; 8], &mut [u8]) -> Option<UsbReply>) -> Self {
        let standard =
            Descriptors::new(0x6666, 0x6666, [0; 3], false).interface(0, 0, 0, [0xff, 0, 0]).build();
        Self { standard, answer, asked: Default::default() }
    }
}

impl UsbModel for Hostile {
    fn descriptors(&self) -> Vec<u8> {
        self.standard.descriptors()
    }
    fn control(&mut self, setup: [u8; 8], data: &mut [u8]) -> UsbReply {
        self.asked.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
        match (self.answer)(self, setup, data) {
            Some(reply) => reply,
            None => self.standard.control(setup, data).unwrap_or(UsbReply::Stall),
        }
    }
    fn packet_out(&mut self, _: u8, _: &[u8]) -> UsbReply {
        UsbReply::Nak
    }
    fn packet_in(&mut self, _: u8, _: &mut [u8]) -> UsbReply {
        UsbReply::Nak
    }
}

const GET_DEVICE: u8 = 1;
const GET_CONFIGURATION: u8 = 2;

/// Each is given up with a reason after a bounded number of questions, its port is disabled, and its neighbour goes on.
#[test]
fn hostile_devices_are_given_up() {
    type Answer = fn(&Hostile, [u8; 8], &mut [u8]) -> Option<UsbReply>;
    let fill = |_: &Hostile, setup: [u8; 8], data: &mut [u8]| {
        (setup[1] == 6).then(|| {
            data.fill(0xff);
            UsbReply::Ack(data.len())
        })
    };
    let cases: [(&str, Answer, &str); 9] = [
        ("all ones", fill, "it answers with something else than the descriptor asked for"),
        ("mute", |_, _, _| Some(UsbReply::Nak), "reading its descriptor: the device took too long"),
        ("stalls", |_, _, _| Some(UsbReply::Stall), "reading its descriptor: refused by the device"),
        ("silent", |_, _, _| Some(UsbReply::Silence), "reading its descriptor: the device did not answer"),
        ("babbles", |_, _, _| Some(UsbReply::Babble), "reading its descriptor: the device sent too much"),
        (
            "empty",
            |_, setup, _| (setup[1] == 6).then_some(UsbReply::Ack(0)),
            "it answers with something else than the descriptor asked for",
        ),
        (
            "no configuration",
            |this, setup, data| {
                (setup[1] == 6 && setup[3] == GET_DEVICE).then(|| {
                    let mut device = this.standard.device.clone();
                    device[17] = 0;
                    hypercall::testing::usb_reply(data, &device)
                })
            },
            "it has no configuration with interfaces",
        ),
        (
            "200 configurations",
            |this, setup, data| {
                (setup[1] == 6 && setup[3] == GET_DEVICE).then(|| {
                    let mut device = this.standard.device.clone();
                    device[17] = 200;
                    hypercall::testing::usb_reply(data, &device)
                })
            },
            "it claims more configurations or interfaces than can be",
        ),
        (
            "a configuration of 65,535 bytes",
            |_, setup, data| {
                (setup[1] == 6 && setup[3] == GET_CONFIGURATION)
                    .then(|| hypercall::testing::usb_reply(data, &[9, 2, 0xff, 0xff, 1, 1, 0, 0x80, 50]))
            },
            "it claims more configurations or interfaces than can be",
        ),
    ];
    for (name, answer, why) in cases {
        let world = World::new(2);
        let hostile = Hostile::new(answer);
        let asked = hostile.asked.clone();
        world.bus.plug(1, hostile);
        world.bus.plug(2, UsbLoopback::default());
        world.settle();
        assert_eq!(world.state("1-1"), NodeState::Failed(why.into()), "{name}");
        assert_eq!(world.state("1-2"), NodeState::Configured, "{name}");
        assert!(!world.bus.enabled(1), "{name}: its port is enabled");
        assert_eq!((world.bus.slots(), world.counter("given_up")), (1, 1), "{name}");
        assert_eq!(world.counter("enumeration_retries"), 2, "{name}");
        // Not an endless retry: nothing is asked any more.
        let then = asked.load(core::sync::atomic::Ordering::Relaxed);
        world.run(5_000);
        assert_eq!(asked.load(core::sync::atomic::Ordering::Relaxed), then, "{name}");
        // Most are mute for 5 s twice in each of three attempts.
        assert!(name == "mute" || then < 40, "{name}: asked {then} times");
        // Another device in the same port works.
        world.bus.unplug(1);
        world.run(20);
        world.bus.plug(1, UsbLoopback::default());
        world.settle();
        assert_eq!(world.state("1-1"), NodeState::Configured, "{name}");
    }
}

/// Descriptors that lie inside a configuration: what is sound is used.
#[test]
fn lying_configurations_are_used_as_far_as_sound() {
    let world = World::new(1);
    let mut model = Hostile::new(|_, _, _| None);
    model.standard = Descriptors::new(0x6666, 1, [0; 3], false)
        .interface(0, 0, 3, [0xff, 0, 0])
        .endpoint(0x81, 2, 512)
        .endpoint(0x81, 2, 512)
        .endpoint(0x80, 2, 512)
        .raw(&[2, 0x24])
        .interface(0, 0, 1, [0xff, 0, 0])
        .endpoint(0x82, 2, 512)
        .interface(1, 0, 1, [0xff, 0, 0])
        .endpoint(0x81, 3, 8)
        .raw(&[0, 5])
        .interface(2, 0, 1, [0xff, 0, 0])
        .build();
    world.bus.plug(1, model);
    world.settle();
    assert_eq!(world.state("1-1"), NodeState::Configured);
    let device = world.node("1-1").unwrap().node.device.unwrap();
    let configuration = &device.configurations[0];
    let shape: Vec<_> =
        configuration.settings.iter().map(|one| (one.interface, one.endpoints.len())).collect();
    assert_eq!(shape, [(0, 1), (1, 0)]);
    assert!(configuration.faults >= 5, "{}", configuration.faults);
}

/// 200 plugs and unplugs at random moments, of hubs with devices behind them: no slot, transfer or node is left over.
#[test]
fn two_hundred_hot_plugs() {
    let world = World::new(3);
    let hub = HubModel::new(world.host, &world.bus, 2);
    let (stick, state) = StorageModel::new(vec![7; 64 << 10]);
    let mut random = 0x1234_5678_9abc_def1u64;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let mut plugs = 0;
    while plugs < 200 {
        match next(4) {
            0 if !world.bus.unplug(1) => {
                world.bus.plug(1, stick.again());
                plugs += 1;
            }
            1 if !world.bus.unplug(2) => {
                hub.plug_into_root(2);
                plugs += 1;
            }
            2 if !hub.unplug(1) => {
                hub.plug(1, StorageModel::around(&state));
                plugs += 1;
            }
            3 if !hub.unplug(2) => {
                hub.plug(2, UsbLoopback::default());
                plugs += 1;
            }
            _ => {}
        }
        world.run(next(250));
    }
    world.settle();
    world.bus.unplug(1);
    world.bus.unplug(2);
    world.run(100);
    assert_eq!(world.lines(), [""; 0]);
    assert_eq!((world.bus.slots(), world.disks().len()), (0, 0));
    let (accepted, completed) = world.bus.transfers();
    assert_eq!(accepted, completed);
    // And all of it still works.
    world.bus.plug(1, stick);
    hub.plug_into_root(2);
    world.settle();
    assert_eq!(world.state("1-1"), NodeState::Configured);
    assert_eq!(world.state("1-2"), NodeState::Configured);
    assert!(world.disks().contains(&"usb1-1".into()));
}
