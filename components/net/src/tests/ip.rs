//! Everything beside TCP: UDP, ICMP, DHCP, IPv6 configuration, fragments, hostile frames.

use super::world::{MS, SECOND, Spec, World, error};
use crate::config::{Ipv4Setting, Ipv6Setting, Settings};
use crate::udp::{UdpId, udp_home};
use anykernel::socket::{NetError, Result};
use core::net::{IpAddr, Ipv6Addr, SocketAddr};
use core::task::{Context, Poll, Waker};
use proptest::prelude::*;
use smoltcp::wire;
use std::vec::Vec;

fn bind(world: &mut World, node: usize, addr: &str) -> UdpId {
    let addr: SocketAddr = addr.parse().unwrap();
    let shards = world.nodes[node].shards.len();
    world.nodes[node].shards[udp_home(addr.port(), shards)].udp_bind(addr).unwrap()
}

fn send(world: &mut World, node: usize, id: UdpId, data: &[u8], to: &str) -> Result<()> {
    let now_ns = world.now_ns;
    let shard = &mut world.nodes[node].shards[id.shard];
    shard.set_now(now_ns);
    shard.udp_send(id, data, to.parse().unwrap())
}

fn recv(world: &mut World, node: usize, id: UdpId) -> Option<Result<(Vec<u8>, SocketAddr)>> {
    let mut buf = std::vec![0; 70_000];
    let shard = &mut world.nodes[node].shards[id.shard];
    match shard.udp_poll_recv(id, &mut Context::from_waker(Waker::noop()), &mut buf) {
        Poll::Ready(result) => Some(result.map(|(n, from)| (buf[..n].to_vec(), from))),
        Poll::Pending => None,
    }
}

#[test]
fn datagrams_of_all_sizes_in_both_versions() {
    for (specs, base) in [([Spec::v4(1), Spec::v4(2)], "10.0.0.2"), ([Spec::v6(1), Spec::v6(2)], "[fd00::2]")]
    {
        let mut world = World::new(&specs);
        world.pass(3 * SECOND);
        let any = if base.starts_with('[') { "[::]" } else { "0.0.0.0" };
        let ours = bind(&mut world, 0, &std::format!("{any}:1000"));
        let theirs = bind(&mut world, 1, &std::format!("{any}:2000"));
        let to = std::format!("{base}:2000");
        // The first packets find the neighbour.
        send(&mut world, 0, ours, b"first", &to).unwrap();
        world.pass(10 * MS);
        assert_eq!(recv(&mut world, 1, theirs).unwrap().unwrap().0, b"first");
        for len in [0, 1, 1400, 1472, 1473, 3000, 8192, 60_000] {
            let data: Vec<u8> = (0..len).map(|at: usize| (at % 251) as u8).collect();
            send(&mut world, 0, ours, &data, &to).unwrap();
            world.pass(10 * MS);
            let (got, from) = recv(&mut world, 1, theirs).expect("a datagram").unwrap();
            assert!(got == data, "{len} bytes to {base}");
            assert_eq!(from.port(), 1000);
        }
        assert_eq!(send(&mut world, 0, ours, &[0; 65_530], &to), Err(NetError::TooLarge));
        assert_eq!(world.nodes[1].counters.drop_checksum.get(), 0);
    }
}

#[test]
fn a_closed_port_is_told_to_the_sender_only() {
    let mut world = World::new(&[Spec::v4(1), Spec::v4(2)]);
    let ours = bind(&mut world, 0, "0.0.0.0:1000");
    send(&mut world, 0, ours, b"?", "10.0.0.2:9").unwrap();
    world.pass(10 * MS);
    assert_eq!(recv(&mut world, 0, ours), Some(Err(NetError::Refused)));
    assert_eq!(recv(&mut world, 0, ours), None);
}

#[test]
fn a_full_receive_queue_drops_and_counts() {
    let mut world = World::new(&[Spec::v4(1), Spec::v4(2)]);
    let ours = bind(&mut world, 0, "0.0.0.0:1000");
    let theirs = bind(&mut world, 1, "0.0.0.0:2000");
    for _ in 0..200 {
        send(&mut world, 0, ours, &[1; 1000], "10.0.0.2:2000").unwrap();
        world.pass(MS);
    }
    let mut got = 0;
    while recv(&mut world, 1, theirs).is_some() {
        got += 1;
    }
    assert_eq!(got, 65);
    assert_eq!(world.nodes[1].counters.drop_udp_full.get(), 200 - 65);
}

#[test]
fn steering_brings_datagrams_to_their_socket() {
    let mut spec = Spec::v4(2);
    spec.shards = 4;
    let mut world = World::new(&[Spec::v4(1), spec]);
    for port in 2000..2008 {
        let ours = bind(&mut world, 0, &std::format!("0.0.0.0:{port}"));
        let theirs = bind(&mut world, 1, &std::format!("0.0.0.0:{port}"));
        for len in [10, 5000] {
            send(&mut world, 0, ours, &std::vec![7; len], &std::format!("10.0.0.2:{port}")).unwrap();
            world.pass(10 * MS);
            // The first long one may lose fragments to the search for the neighbour, so short ones go first.
            let (data, from) = recv(&mut world, 1, theirs).expect("a datagram").unwrap();
            assert_eq!(data.len(), len);
            send(&mut world, 1, theirs, b"back", &std::format!("{from}")).unwrap();
            world.pass(10 * MS);
            assert_eq!(recv(&mut world, 0, ours).unwrap().unwrap().0, b"back");
        }
    }
}

fn ping(world: &mut World, node: usize, to: &str) -> Result<u64> {
    let now_ns = world.now_ns;
    world.nodes[node].shards[0].set_now(now_ns);
    let key = world.nodes[node].shards[0].ping_start(to.parse().unwrap())?;
    let mut result = None;
    world.run(10 * SECOND, |world| {
        let polled = world.nodes[node].shards[0].ping_poll(key, &mut Context::from_waker(Waker::noop()));
        if let Poll::Ready(done) = polled {
            result = Some(done);
        }
        result.is_some()
    });
    world.nodes[node].shards[0].ping_drop(key);
    result.unwrap()
}

#[test]
fn echo() {
    let mut world = World::new(&[Spec::v4(1), Spec::v4(2)]);
    world.pass(MS);
    // A question for the address, its answer, the request, the reply.
    assert_eq!(ping(&mut world, 0, "10.0.0.2"), Ok(400_000));
    assert_eq!(ping(&mut world, 0, "10.0.0.2"), Ok(200_000));
    assert_eq!(ping(&mut world, 0, "10.0.0.1"), Ok(0));
    assert_eq!(ping(&mut world, 0, "127.0.0.1"), Ok(0));
    assert_eq!(ping(&mut world, 0, "10.0.0.99"), Err(NetError::TimedOut));
    assert_eq!(ping(&mut world, 0, "8.8.8.8"), Err(NetError::Unreachable));
    let mut world = World::new(&[Spec::v6(1), Spec::v6(2)]);
    world.pass(3 * SECOND);
    assert!(ping(&mut world, 0, "fd00::2").is_ok());
    assert!(ping(&mut world, 0, "fe80::ff:fe00:2").is_ok());
    assert!(ping(&mut world, 0, "::1").is_ok());
}

#[test]
fn tcp_over_ipv6() {
    let mut world = World::new(&[Spec::v6(1), Spec::v6(2)]);
    world.pass(3 * SECOND);
    let accept = world.listen(1, "[::]:80", 16);
    let client = world.connect(0, "[fd00::1]:50000", "[fd00::2]:80").unwrap();
    let mut server = None;
    assert!(world.run(SECOND, |_| {
        server = server.or(accept.pop());
        server.is_some()
    }));
    let server = server.unwrap().flow;
    world.transfer((0, client), (1, server), 500_000, 60 * SECOND);
    world.transfer((1, server), (0, client), 500_000, 60 * SECOND);
}

#[test]
fn two_hosts_with_one_address_notice() {
    let mut world = World::new(&[Spec::v6(1), Spec::v6(1)]);
    world.pass(3 * SECOND);
    for node in &world.nodes {
        let interface = node.shards[0].routes.get(0).unwrap();
        assert_eq!(interface.v6.len(), 1, "only the link-local address is used");
        assert!(interface.v6[0].0.is_unicast_link_local());
    }
    // Somebody who comes later sees that the address is taken.
    let mut world = World::new(&[Spec::v6(1), Spec::v6(2)]);
    world.pass(3 * SECOND);
    assert!(world.nodes.iter().all(|node| node.shards[0].is_configured()));
}

/// A router advertisement, byte by byte as RFC 4861, 4.2 and 4.6.2 draw it; checksum by smoltcp.
fn router_advert(to: [u8; 6]) -> Vec<u8> {
    let router = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x99);
    let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut icmp = std::vec![134, 0, 0, 0, 64, 0];
    icmp.extend(1800u16.to_be_bytes());
    icmp.extend([0; 8]);
    icmp.extend([3, 4, 64, 0xc0]);
    icmp.extend(86_400u32.to_be_bytes());
    icmp.extend(14_400u32.to_be_bytes());
    icmp.extend([0; 4]);
    icmp.extend(Ipv6Addr::new(0x2001, 0xdb8, 1, 2, 0, 0, 0, 0).octets());
    wire::Icmpv6Packet::new_unchecked(&mut icmp[..]).fill_checksum(&router, &all);
    let ip = wire::Ipv6Repr {
        src_addr: router,
        dst_addr: all,
        next_header: wire::IpProtocol::Icmpv6,
        payload_len: icmp.len(),
        hop_limit: 255,
    };
    let mut frame = std::vec![0; 54];
    frame[..6].copy_from_slice(&to);
    frame[6..14].copy_from_slice(&[2, 0, 0, 0, 0, 0x99, 0x86, 0xdd]);
    ip.emit(&mut wire::Ipv6Packet::new_unchecked(&mut frame[14..]));
    frame.extend(icmp);
    frame
}

#[test]
fn a_router_gives_prefix_and_route() {
    let settings = Settings { ipv4: Ipv4Setting::None, ipv6: Ipv6Setting::Auto, ..Settings::default() };
    let mut world = World::new(&[Spec::new(settings)]);
    world.trace = Some(Vec::new());
    world.pass(2 * SECOND);
    let solicited = world.trace.take().unwrap().iter().any(|frame| frame.get(54) == Some(&133));
    assert!(solicited, "a router was asked for");
    world.inject(0, &router_advert([0x33, 0x33, 0, 0, 0, 1]));
    world.pass(3 * SECOND);
    let interface = world.nodes[0].shards[0].routes.get(0).unwrap().clone();
    let own: Ipv6Addr = "2001:db8:1:2:0:ff:fe00:1".parse().unwrap();
    assert!(interface.v6.contains(&(own, 64)), "{:?}", interface.v6);
    assert_eq!(interface.gateway_v6, Some("fe80::99".parse().unwrap()));
    // One that was forwarded is nobody's router.
    let mut forged = router_advert([0x33, 0x33, 0, 0, 0, 1]);
    forged[21] = 254;
    let before = world.nodes[0].counters.drop_malformed.get();
    world.inject(0, &forged);
    world.settle();
    assert_eq!(world.nodes[0].counters.drop_malformed.get(), before + 1);
}

/// Answers DHCP messages at node 1 for as long as the world runs; an independent reading of RFC 2131.
fn dhcp_server(world: &mut World, socket: UdpId, lease_s: u32) -> Vec<u8> {
    let mut kinds = Vec::new();
    while let Some(Ok((message, from))) = recv(world, 1, socket) {
        assert_eq!(from.port(), 68);
        let options: Vec<u8> = message[240..].to_vec();
        let find = |code: u8| {
            let mut at = 0;
            while options[at] != 255 {
                let len = usize::from(options[at + 1]);
                if options[at] == code {
                    return Some(options[at + 2..at + 2 + len].to_vec());
                }
                at += 2 + len;
            }
            None
        };
        let kind = find(53).unwrap()[0];
        kinds.push(kind);
        assert_eq!(find(12).unwrap(), b"testhost");
        let mut reply = message[..236].to_vec();
        reply[0] = 2;
        reply[16..20].copy_from_slice(&[10, 0, 0, 77]);
        reply.extend([99, 130, 83, 99, 53, 1, if kind == 1 { 2 } else { 5 }]);
        reply.extend([
            54, 4, 10, 0, 0, 2, 1, 4, 255, 255, 255, 0, 3, 4, 10, 0, 0, 2, 6, 4, 10, 0, 0, 3, 51, 4,
        ]);
        reply.extend(lease_s.to_be_bytes());
        reply.push(255);
        let to = if from.ip().is_unspecified() {
            std::string::String::from("255.255.255.255:68")
        } else {
            std::format!("{from}")
        };
        send(world, 1, socket, &reply, &to).unwrap();
    }
    kinds
}

#[test]
fn dhcp_gives_keeps_and_takes_the_address() {
    let settings = Settings { hostname: "testhost".into(), ipv6: Ipv6Setting::None, ..Settings::default() };
    let mut world = World::new(&[Spec::new(settings), Spec::v4(2)]);
    let server = bind(&mut world, 1, "0.0.0.0:67");
    let mut seen = Vec::new();
    assert!(!world.nodes[0].shards[0].is_configured());
    assert!(world.run(20 * SECOND, |world| {
        seen.extend(dhcp_server(world, server, 600));
        world.nodes[0].shards[0].is_configured()
    }));
    assert_eq!(seen, [1, 3]);
    let interface = world.nodes[0].shards[0].routes.get(0).unwrap().clone();
    assert_eq!(interface.v4, [([10, 0, 0, 77].into(), 24)]);
    assert_eq!(interface.gateway_v4, Some([10, 0, 0, 2].into()));
    assert_eq!(interface.dns, ["10.0.0.3".parse::<IpAddr>().unwrap()]);
    assert!(ping(&mut world, 1, "10.0.0.77").is_ok());
    // Renewals by unicast keep it for an hour.
    seen.clear();
    world.run(3600 * SECOND, |world| {
        seen.extend(dhcp_server(world, server, 600));
        false
    });
    assert!(seen.len() >= 11 && seen.iter().all(|kind| *kind == 3), "{seen:?}");
    assert!(ping(&mut world, 1, "10.0.0.77").is_ok());
    // A connection that is open when the lease ends, ends with it.
    let accept = world.listen(0, "0.0.0.0:80", 4);
    let peer = world.connect(1, "10.0.0.2:50000", "10.0.0.77:80").unwrap();
    world.pass(SECOND);
    assert_eq!(world.connected(1, peer), Some(Ok(())));
    let flow = accept.pop().unwrap().flow;
    world.pass(700 * SECOND);
    assert!(world.nodes[0].shards[0].routes.get(0).unwrap().v4.is_empty());
    assert_eq!(error(world.recv(0, flow)), NetError::AddrNotAvailable);
}

/// Frames that a fuzzer would start from: one of each protocol.
fn corpus() -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    for (specs, any, to) in [
        ([Spec::v4(1), Spec::v4(2)], "0.0.0.0", "10.0.0.2"),
        ([Spec::v6(1), Spec::v6(2)], "[::]", "[fd00::2]"),
    ] {
        let mut world = World::new(&specs);
        world.trace = Some(Vec::new());
        world.pass(3 * SECOND);
        let _accept = world.listen(1, &std::format!("{any}:80"), 4);
        let own = to.replace('2', "1");
        let flow = world.connect(0, &std::format!("{own}:50000"), &std::format!("{to}:80")).unwrap();
        world.pass(SECOND);
        world.send(0, flow, &[1; 3000]).unwrap().unwrap();
        let socket = bind(&mut world, 0, &std::format!("{any}:1000"));
        send(&mut world, 0, socket, &[2; 3000], &std::format!("{to}:9")).unwrap();
        let _ = ping(&mut world, 0, to.trim_matches(['[', ']']));
        world.shard(0, flow).tcp_abort(flow);
        world.pass(SECOND);
        frames.append(&mut world.trace.take().unwrap());
    }
    frames.push(router_advert([0x33, 0x33, 0, 0, 0, 1]));
    frames
}

#[test]
fn what_we_send_is_read_by_another_implementation() {
    let mut kinds = std::collections::BTreeSet::new();
    let checks = smoltcp::phy::ChecksumCapabilities::default();
    for frame in corpus() {
        let payload = &frame[14..];
        match &frame[12..14] {
            [8, 6] => {
                kinds.insert("arp");
            }
            [8, 0] => {
                let packet = wire::Ipv4Packet::new_checked(payload).unwrap();
                assert!(packet.verify_checksum());
                if packet.more_frags() || packet.frag_offset() > 0 {
                    kinds.insert("fragment");
                    continue;
                }
                let ip = wire::Ipv4Repr::parse(&packet, &checks).unwrap();
                let (src, dst) = (ip.src_addr.into(), ip.dst_addr.into());
                match ip.next_header {
                    wire::IpProtocol::Tcp => {
                        let tcp = wire::TcpPacket::new_checked(packet.payload()).unwrap();
                        wire::TcpRepr::parse(&tcp, &src, &dst, &checks).unwrap();
                        kinds.insert("tcp");
                    }
                    wire::IpProtocol::Udp => {
                        let udp = wire::UdpPacket::new_checked(packet.payload()).unwrap();
                        wire::UdpRepr::parse(&udp, &src, &dst, &checks).unwrap();
                        kinds.insert("udp");
                    }
                    wire::IpProtocol::Icmp => {
                        let icmp = wire::Icmpv4Packet::new_checked(packet.payload()).unwrap();
                        // The packet that an error quotes is cut off, which its parser refuses.
                        assert!(icmp.verify_checksum());
                        if icmp.msg_type() != wire::Icmpv4Message::DstUnreachable {
                            wire::Icmpv4Repr::parse(&icmp, &checks).unwrap();
                        }
                        kinds.insert("icmp");
                    }
                    other => panic!("protocol {other}"),
                }
            }
            _ => {
                let packet = wire::Ipv6Packet::new_checked(payload).unwrap();
                let ip = wire::Ipv6Repr::parse(&packet).unwrap();
                let (src, dst) = (ip.src_addr.into(), ip.dst_addr.into());
                match ip.next_header {
                    wire::IpProtocol::Tcp => {
                        let tcp = wire::TcpPacket::new_checked(packet.payload()).unwrap();
                        wire::TcpRepr::parse(&tcp, &src, &dst, &checks).unwrap();
                        kinds.insert("tcp6");
                    }
                    wire::IpProtocol::Icmpv6 => {
                        let icmp = wire::Icmpv6Packet::new_checked(packet.payload()).unwrap();
                        assert!(icmp.verify_checksum(&ip.src_addr, &ip.dst_addr));
                        kinds.insert("icmp6");
                    }
                    wire::IpProtocol::Ipv6Frag => {
                        kinds.insert("fragment6");
                    }
                    other => panic!("protocol {other}"),
                }
            }
        }
    }
    let all = ["arp", "fragment", "fragment6", "icmp", "icmp6", "tcp", "tcp6"];
    for kind in all {
        assert!(kinds.contains(kind), "no {kind} among {kinds:?}");
    }
}

/// Corrects the checksums of a frame as far as it has any, so that mutations reach deeper.
pub(crate) fn repair(frame: &mut [u8]) {
    if frame.len() < 34 || frame[12..14] != [8, 0] {
        return;
    }
    let header_len = usize::from(frame[14] & 0xf) * 4;
    if frame.len() < 14 + header_len || header_len < 20 {
        return;
    }
    frame[24..26].fill(0);
    let sum = crate::checksum::Sum::default().bytes(&frame[14..14 + header_len]).finish();
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    let at = 14 + header_len + if frame[23] == 6 { 16 } else { 2 };
    if frame.len() < at + 2 || !matches!(frame[23], 1 | 6) {
        return;
    }
    let src = core::net::Ipv4Addr::from(<[u8; 4]>::try_from(&frame[26..30]).unwrap());
    let dst = core::net::Ipv4Addr::from(<[u8; 4]>::try_from(&frame[30..34]).unwrap());
    frame[at..at + 2].fill(0);
    let body = &frame[14 + header_len..];
    let sum = crate::checksum::Sum::default();
    let sum = if frame[23] == 6 { sum.pseudo_header(src.into(), dst.into(), 6, body.len()) } else { sum };
    let sum = sum.bytes(body).finish();
    frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever comes by the wire: no panic, no endless work, and the stack goes on working.
    #[test]
    fn hostile_frames(
        mutations in proptest::collection::vec((any::<u16>(), any::<u16>(), any::<u8>(), any::<bool>(), any::<u16>()), 1..200),
        dual in any::<bool>(),
    ) {
        let corpus = corpus_once();
        let mut spec = if dual { Spec::v6(2) } else { Spec::v4(2) };
        spec.shards = 2;
        spec.limits.receive_bytes = 4096;
        let mut world = World::new(&[if dual { Spec::v6(1) } else { Spec::v4(1) }, spec]);
        world.pass(3 * SECOND);
        let accept = world.listen(1, if dual { "[::]:80" } else { "0.0.0.0:80" }, 4);
        for (which, at, value, fix, cut) in mutations {
            let mut frame = corpus[usize::from(which) % corpus.len()].clone();
            let at = usize::from(at) % frame.len();
            frame[at] = value;
            if cut % 8 == 0 {
                frame.truncate(usize::from(cut / 8) % (frame.len() + 1));
            }
            if fix {
                repair(&mut frame);
            }
            if frame.len() >= 6 && at >= 6 {
                frame[..6].copy_from_slice(&world.nodes[1].mac);
            }
            world.inject(1, &frame);
            world.settle();
        }
        world.pass(10 * SECOND);
        while accept.pop().is_some() {}
        let (local, to) = if dual { ("[fd00::1]:51000", "[fd00::2]:80") } else { ("10.0.0.1:51000", "10.0.0.2:80") };
        let flow = world.connect(0, local, to).unwrap();
        let mut server = None;
        // A mutation may have taught a wrong link address; that heals when it is probed.
        let up = world.run(29 * SECOND, |_| { server = server.or(accept.pop()); server.is_some() });
        if up {
            world.transfer((0, flow), (1, server.unwrap().flow), 10_000, 60 * SECOND);
        } else {
            prop_assert!(world.connected(0, flow) != Some(Ok(())), "connected, and never accepted");
        }
    }
}

fn corpus_once() -> &'static Vec<Vec<u8>> {
    static CORPUS: std::sync::OnceLock<Vec<Vec<u8>>> = std::sync::OnceLock::new();
    CORPUS.get_or_init(corpus)
}

#[test]
fn a_lone_message_never_wakes_a_storm() {
    // Two stacks that answer each other's errors would never come to rest; `settle` asserts that they do.
    let mut world = World::new(&[Spec::v4(1), Spec::v4(2)]);
    for frame in corpus_once() {
        world.inject(0, frame);
        world.inject(1, frame);
        world.settle();
    }
    world.pass(SECOND);
}
