//! Keyboards and mice.

use super::support::World;
use crate::NodeState;
use crate::testing::{HidModel, KEYBOARD, MOUSE};
use alloc::string::String;
use alloc::vec::Vec;
use anykernel::input::{Axis, InputDevice, InputKind, ascii};
use std::vec;

fn drain(device: &dyn InputDevice) -> Vec<InputKind> {
    core::iter::from_fn(|| device.read()).map(|event| event.kind).collect()
}

#[test]
fn typed_keys_arrive() {
    let world = World::new(1);
    let (model, state) = HidModel::new(KEYBOARD, 1);
    world.bus.plug(1, model);
    world.settle();
    let keyboard = world.kernel.inputs()[0].clone();
    assert_eq!(
        (keyboard.info().name.as_str(), keyboard.info().keyboard, keyboard.info().pointer),
        ("usb1-1i0", true, false)
    );
    assert_eq!(state.lock().unwrap().protocol, None, "its own descriptor serves");
    for (shift, key) in [(2u8, 11u8), (0, 12), (0, 0x28)] {
        for report in [[shift, 0, key, 0, 0, 0, 0, 0], [0; 8]] {
            state.lock().unwrap().reports.push_back(report.to_vec());
        }
    }
    world.run(100);
    let (mut text, mut shift) = (String::new(), false);
    for event in drain(&*keyboard) {
        match event {
            InputKind::Key { usage: 0xe1, pressed } => shift = pressed,
            InputKind::Key { usage, pressed: true } => text.extend(ascii(usage, shift)),
            InputKind::Key { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(text, "Hi\n");
    // Too many keys at once say nothing, and what is held is let go when it is unplugged.
    let mut reports = vec![vec![0, 0, 4, 0, 0, 0, 0, 0], vec![0, 0, 1, 1, 1, 1, 1, 1], vec![7], vec![]];
    state.lock().unwrap().reports.extend(reports.drain(..));
    world.run(50);
    assert_eq!(drain(&*keyboard), [InputKind::Key { usage: 4, pressed: true }]);
    world.bus.unplug(1);
    world.run(50);
    assert_eq!(drain(&*keyboard), [InputKind::Key { usage: 4, pressed: false }]);
    assert!(keyboard.gone());
    assert!(world.kernel.inputs().is_empty());
    assert!(world.counter("input_errors") >= 1);
}

#[test]
fn a_mouse_moves() {
    let world = World::new(1);
    let (model, state) = HidModel::new(MOUSE, 2);
    world.bus.plug(1, model);
    world.settle();
    let mouse = world.kernel.inputs()[0].clone();
    assert!(mouse.info().pointer && !mouse.info().keyboard);
    state.lock().unwrap().reports.extend([
        vec![5, 1, 10, 0xf6, 0],
        vec![5, 0, 0, 0, 0xff],
        vec![9, 1, 1, 1, 1],
    ]);
    world.run(50);
    assert_eq!(
        drain(&*mouse),
        [
            InputKind::Button { number: 1, pressed: true },
            InputKind::Motion { axis: Axis::X, delta: 10 },
            InputKind::Motion { axis: Axis::Y, delta: -10 },
            InputKind::Button { number: 1, pressed: false },
            InputKind::Motion { axis: Axis::Wheel, delta: -1 },
        ]
    );
}

/// A keyboard whose descriptor is nonsense still knows the boot protocol; another device is given up.
#[test]
fn nonsense_descriptors() {
    let world = World::new(2);
    let nonsense = [0x95, 0xff, 0x76, 0xff, 0xff, 0x81, 2, 0xa1];
    let (model, state) = HidModel::new(&nonsense, 1);
    world.bus.plug(1, model);
    world.bus.plug(2, HidModel::new(&nonsense, 0).0);
    world.settle();
    assert_eq!(state.lock().unwrap().protocol, Some(0));
    state.lock().unwrap().reports.push_back(vec![0, 0, 5, 0, 0, 0, 0, 0]);
    world.run(50);
    let keyboard = world.kernel.inputs()[0].clone();
    assert_eq!(drain(&*keyboard), [InputKind::Key { usage: 5, pressed: true }]);
    let why = "its report descriptor has a field of impossible size";
    assert_eq!(world.state("1-2"), NodeState::Failed(why.into()));
}

#[test]
fn a_stalling_keyboard_is_given_up() {
    let world = World::new(1);
    let (model, state) = HidModel::new(KEYBOARD, 1);
    state.lock().unwrap().stall = true;
    world.bus.plug(1, model);
    world.settle();
    world.run(100);
    assert_eq!(world.state("1-1"), NodeState::Failed("its reports fail: refused by the device".into()));
    assert!(world.kernel.inputs().is_empty() && !world.bus.enabled(1));
}

/// Nobody reads: the queue is bounded, and what is lost is counted.
#[test]
fn events_that_nobody_reads() {
    let world = World::new(1);
    let (model, state) = HidModel::new(KEYBOARD, 1);
    world.bus.plug(1, model);
    world.settle();
    for turn in 0..1500u32 {
        let key = if turn % 2 == 0 { 4 } else { 0 };
        state.lock().unwrap().reports.push_back(vec![0, 0, key, 0, 0, 0, 0, 0]);
    }
    world.run(4_000);
    assert_eq!(world.counter("input_dropped"), 1500 - 1024);
}
