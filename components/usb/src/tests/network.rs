//! Network devices over models.

use super::support::World;
use crate::NodeState;
use crate::net::{Builder, NtbParameters, parse_ntb};
use crate::testing::NetModel;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::nic::{NicQueue, TxMeta};
use hypercall::Signal;
use std::vec;

fn frame(number: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| number ^ at as u8).collect()
}

fn send(queue: &mut Box<dyn NicQueue>, bytes: &[u8]) {
    queue.transmit(bytes.len(), TxMeta::default(), &mut |room| room.copy_from_slice(bytes)).unwrap();
}

fn receive(queue: &mut Box<dyn NicQueue>) -> Vec<Vec<u8>> {
    let mut got = Vec::new();
    queue.receive(1000, &mut |bytes, _| got.push(bytes.to_vec()));
    got
}

fn parameters() -> NtbParameters {
    NtbParameters { in_max: 16_384, out_max: 8192, divisor: 4, remainder: 2, alignment: 4 }
}

#[test]
fn frames_go_both_ways() {
    for ncm in [false, true] {
        let world = World::new(1);
        let (model, state) = NetModel::new(ncm);
        world.bus.plug(1, model);
        world.settle();
        let nic = world.kernel.nics().first().cloned().unwrap_or_else(|| panic!("{:#?}", world.lines()));
        assert_eq!((nic.info().mac, nic.info().mtu), ([2, 0, 0, 0, 0, 7], 1500));
        // The second configuration is the one that somebody knows.
        assert_eq!(world.node("1-1").unwrap().node.device.unwrap().chosen, 1);
        assert_eq!(state.lock().unwrap().filter, Some(0x0e));
        let signal = Arc::new(Signal::new());
        let mut queue = nic.open_queue(0, signal.clone()).unwrap();
        assert!(nic.open_queue(0, signal.clone()).is_err());
        assert!(queue.link_up());

        // 498: exactly a packet of 512 bytes with ECM's 14.
        let sent: Vec<_> = [60, 512, 1024, 1514, 61].iter().map(|len| frame(*len as u8, *len)).collect();
        sent.iter().for_each(|one| send(&mut queue, one));
        queue.flush();
        world.run(5);
        let came = core::mem::take(&mut state.lock().unwrap().from_host);
        let mut frames = Vec::new();
        if ncm {
            assert_eq!(came.len(), 1, "one block");
            assert_eq!(parse_ntb(&came[0], &mut |one| frames.push(one.to_vec())), Ok(5));
        } else {
            frames = came;
        }
        assert_eq!(frames, sent, "ncm: {ncm}");

        let seen = signal.count();
        if ncm {
            let mut block = Builder::new(parameters());
            sent.iter().for_each(|one| assert!(block.add(one)));
            state.lock().unwrap().to_host.push_back(block.finish(1));
        } else {
            state.lock().unwrap().to_host.extend(sent.iter().cloned());
        }
        world.run(20);
        assert_ne!(signal.count(), seen);
        assert_eq!(receive(&mut queue), sent, "ncm: {ncm}");

        // Stalls are overcome.
        state.lock().unwrap().stalls = 2;
        world.run(50);
        send(&mut queue, &frame(1, 100));
        queue.flush();
        world.run(50);
        assert_eq!(state.lock().unwrap().from_host.len(), 1);
        // The cable.
        state.lock().unwrap().notes.push_back(vec![0xa1, 0, 0, 0, 0, 0, 0, 0]);
        world.run(20);
        assert!(!queue.link_up());
        assert_eq!(world.state("1-1"), NodeState::Configured);
    }
}

/// Unplugged, the interface goes, and whoever has it open finds no link; plugged in again, it is a new one.
#[test]
fn plugged_in_again() {
    let world = World::new(2);
    let (model, _) = NetModel::new(false);
    world.bus.plug(1, model);
    world.settle();
    let nic = world.kernel.nics()[0].clone();
    let mut queue = nic.open_queue(0, Arc::new(Signal::new())).unwrap();
    world.bus.unplug(1);
    world.run(50);
    assert!(!queue.link_up() && world.kernel.nics().is_empty());
    send(&mut queue, &frame(1, 100));
    queue.flush();
    let (model, state) = NetModel::new(true);
    world.bus.plug(2, model);
    world.settle();
    assert!(!queue.link_up());
    let nic = world.kernel.nics()[0].clone();
    assert_eq!(nic.info().name, "nic0");
    let mut queue = nic.open_queue(0, Arc::new(Signal::new())).unwrap();
    assert!(queue.link_up());
    send(&mut queue, &frame(2, 100));
    queue.flush();
    world.run(20);
    let came = state.lock().unwrap().from_host.clone();
    let mut frames = Vec::new();
    assert_eq!(parse_ntb(&came[0], &mut |one| frames.push(one.to_vec())), Ok(1));
    assert_eq!(frames, [frame(2, 100)]);
}

/// Nonsense is counted, and good frames after it arrive.
#[test]
fn hostile_blocks() {
    let world = World::new(1);
    let (model, state) = NetModel::new(true);
    world.bus.plug(1, model);
    world.settle();
    let mut queue = world.kernel.nics()[0].open_queue(0, Arc::new(Signal::new())).unwrap();
    let mut block = Builder::new(parameters());
    assert!(block.add(&frame(3, 200)));
    let good = block.finish(9);
    let mut blocks = vec![vec![0xff; 700], b"NCMH".to_vec(), vec![0; 100], vec![7; 16_383]];
    for at in [8, 10, 212, 216, 220, 222] {
        let mut bad = good.clone();
        if let Some(byte) = bad.get_mut(at) {
            *byte ^= 0xff;
        }
        blocks.push(bad);
    }
    blocks.push(good);
    state.lock().unwrap().to_host.extend(blocks);
    world.run(100);
    let got = receive(&mut queue);
    assert_eq!(got.last(), Some(&frame(3, 200)));
    assert!(world.counter("net_bad_frames") >= 6, "{}", world.counter("net_bad_frames"));
    assert_eq!(world.state("1-1"), NodeState::Configured);
}
