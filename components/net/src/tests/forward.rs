//! A router: node 0, with a route to 10.9.0.0/16 behind node 1.

use super::ip::repair;
use super::world::{MS, Spec, World};
use crate::checksum::Sum;
use std::vec::Vec;

const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const NEXT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

fn world(forward: bool, mtu: u16) -> World {
    let mut router = Spec::v4(1);
    router.settings.forward = forward;
    router.settings.routes = std::vec![([10, 9, 0, 0].into(), 16, [10, 0, 0, 2].into())];
    router.mtu = mtu;
    let mut world = World::new(&[router, Spec::v4(2)]);
    world.pass(10 * MS);
    world.trace = Some(Vec::new());
    world
}

/// A UDP packet without checksum for the router's link address.
fn packet(src: [u8; 4], dst: [u8; 4], ttl: u8, flags: u16, payload: usize) -> Vec<u8> {
    let mut frame = std::vec![0; 14 + 20 + 8 + payload];
    frame[..6].copy_from_slice(&ROUTER_MAC);
    frame[6..12].copy_from_slice(&NEXT_MAC);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14] = 0x45;
    frame[16..18].copy_from_slice(&((28 + payload) as u16).to_be_bytes());
    frame[18..20].copy_from_slice(&[0x12, 0x34]);
    frame[20..22].copy_from_slice(&flags.to_be_bytes());
    frame[22] = ttl;
    frame[23] = 17;
    frame[26..30].copy_from_slice(&src);
    frame[30..34].copy_from_slice(&dst);
    frame[34..38].copy_from_slice(&[0x10, 0, 0x20, 0]);
    frame[38..40].copy_from_slice(&((8 + payload) as u16).to_be_bytes());
    for (at, byte) in frame[42..].iter_mut().enumerate() {
        *byte = at as u8;
    }
    repair(&mut frame);
    frame
}

/// What the router sends when it gets `frame`, ARP left out.
fn routed(world: &mut World, frame: &[u8]) -> Vec<Vec<u8>> {
    world.trace = Some(Vec::new());
    world.inject(0, frame);
    world.pass(10 * MS);
    let sent = world.trace.take().unwrap();
    sent.into_iter().filter(|frame| frame[6..12] == ROUTER_MAC && frame[12..14] == [8, 0]).collect()
}

const FAR: [u8; 4] = [10, 9, 1, 1];
const NEAR: [u8; 4] = [10, 0, 0, 2];

#[test]
fn passes_on_with_one_less_to_live() {
    let mut world = world(true, 1500);
    let sent = routed(&mut world, &packet(NEAR, FAR, 9, 0x4000, 100));
    assert_eq!(sent.len(), 1);
    let frame = &sent[0];
    assert_eq!(frame[..6], NEXT_MAC);
    assert_eq!(frame[22], 8);
    assert!(Sum::default().bytes(&frame[14..34]).is_valid());
    assert_eq!(frame[26..], packet(NEAR, FAR, 9, 0x4000, 100)[26..]);
    assert_eq!(world.nodes[0].counters.forwarded.get(), 1);
}

#[test]
fn is_off_by_default() {
    let mut world = world(false, 1500);
    assert!(routed(&mut world, &packet(NEAR, FAR, 9, 0, 100)).is_empty());
    assert_eq!(world.nodes[0].counters.forwarded.get(), 0);
}

#[track_caller]
fn is_error(frame: &[u8], kind: u8, code: u8, word: u32) {
    assert_eq!((frame[23], frame[34], frame[35]), (1, kind, code));
    assert_eq!(frame[38..42], word.to_be_bytes());
    assert_eq!(
        (&frame[26..30], &frame[30..34]),
        (&[10, 0, 0, 1][..], &NEAR[..]),
        "from the router to the sender"
    );
}

#[test]
fn says_why_it_does_not() {
    let mut world = world(true, 1500);
    let sent = routed(&mut world, &packet(NEAR, FAR, 1, 0, 100));
    is_error(&sent[0], 11, 0, 0);
    let sent = routed(&mut world, &packet(NEAR, [10, 77, 0, 1], 9, 0, 100));
    is_error(&sent[0], 3, 0, 0);
    let counters = &world.nodes[0].counters;
    assert_eq!((counters.drop_ttl.get(), counters.drop_no_route.get(), counters.forwarded.get()), (1, 1, 0));
    // Not about a later piece, nor for what no router passes on.
    assert!(routed(&mut world, &packet(NEAR, FAR, 1, 3, 100)).is_empty());
    for dst in [[127, 0, 0, 1], [169, 254, 1, 1], [224, 0, 0, 9], [0, 0, 0, 1]] {
        assert!(routed(&mut world, &packet(NEAR, dst, 9, 0, 100)).is_empty(), "{dst:?}");
    }
    assert!(routed(&mut world, &packet([127, 0, 0, 1], FAR, 9, 0, 100)).is_empty());
    // A broadcast of a neighbour's link is not passed on to it.
    let mut to_all = packet(NEAR, FAR, 9, 0, 100);
    to_all[..6].fill(0xff);
    assert!(routed(&mut world, &to_all).is_empty());
}

#[test]
fn cuts_what_is_too_long_unless_forbidden() {
    let mut world = world(true, 600);
    let sent = routed(&mut world, &packet(NEAR, FAR, 9, 0x4000, 1000));
    is_error(&sent[0], 3, 4, 600);
    assert_eq!(world.nodes[0].counters.drop_too_long.get(), 1);
    let whole = packet(NEAR, FAR, 9, 0, 1000);
    let sent = routed(&mut world, &whole);
    assert_eq!(sent.len(), 2);
    let mut payload: Vec<u8> = Vec::new();
    for frame in &sent {
        assert!(frame.len() <= 614 && Sum::default().bytes(&frame[14..34]).is_valid());
        assert_eq!(frame[18..20], [0x12, 0x34]);
        let field = u16::from_be_bytes([frame[20], frame[21]]);
        assert_eq!(usize::from(field & 0x1fff) * 8, payload.len());
        payload.extend(&frame[34..]);
        assert_eq!(field & 0x2000 != 0, payload.len() < 1008);
    }
    assert_eq!(payload, whole[34..]);
}
