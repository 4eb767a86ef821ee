//! TCP between two stacks.

use super::world::{Link, MS, SECOND, Spec, World, error};
use crate::packet::flag;
use anykernel::nic::NicCaps;
use anykernel::socket::{NetError, Shutdown};

fn two() -> World {
    World::new(&[Spec::v4(1), Spec::v4(2)])
}

#[test]
fn connects_transfers_both_ways_and_closes() {
    let mut world = two();
    let (client, server) = world.pair();
    world.transfer((0, client), (1, server), 1 << 20, 60 * SECOND);
    world.transfer((1, server), (0, client), 1 << 20, 60 * SECOND);
    world.shard(0, client).tcp_shutdown(client, Shutdown::Write).unwrap();
    world.pass(SECOND);
    assert_eq!(world.recv(1, server), Some(Ok(std::vec![])));
    // Half-closed: the other direction still works.
    world.transfer((1, server), (0, client), 100_000, 60 * SECOND);
    world.shard(1, server).tcp_shutdown(server, Shutdown::Write).unwrap();
    world.pass(SECOND);
    assert_eq!(world.recv(0, client), Some(Ok(std::vec![])));
    world.shard(0, client).tcp_drop(client);
    world.shard(1, server).tcp_drop(server);
    world.pass(SECOND);
    assert_eq!(world.nodes[0].shards[0].flows.len(), 0, "TIME-WAIT keeps no connection");
    assert_eq!(world.nodes[1].shards[0].flows.len(), 0);
    assert!(world.nodes[0].shards[0].time_waits.next_deadline_ns().is_some());
    world.pass(20 * SECOND);
    assert!(world.nodes[0].shards[0].time_waits.next_deadline_ns().is_none());
}

/// Both ends probe the other's closed window with one byte, and both take that byte because both have just read.
#[test]
fn two_probes_that_cross_do_not_stop_a_connection() {
    const WINDOW: usize = 64 << 10;
    let mut world = two();
    let (client, server) = world.pair();
    world.link.delay_ns = MS;
    let ends = [(0, client), (1, server)];
    for (node, flow) in ends {
        assert_eq!(world.send(node, flow, &[1; WINDOW]), Some(Ok(WINDOW)));
    }
    world.pass(SECOND);
    // Everything is there and acknowledged, and no window is open: these make probes at once.
    for (node, flow) in ends {
        assert_eq!(world.send(node, flow, &[2; 1000]), Some(Ok(1000)));
    }
    let mut received = [0; 2];
    let done = world.run(5 * SECOND, |world| {
        for (end, (node, flow)) in ends.into_iter().enumerate() {
            while let Some(Ok(data)) = world.recv(node, flow) {
                received[end] += data.len();
            }
        }
        received == [WINDOW + 1000; 2]
    });
    assert!(done, "received {received:?}");
}

#[test]
fn survives_loss_duplication_and_reordering() {
    for seed in 1..=5u64 {
        let mut world = two();
        world.reseed(seed);
        let (client, server) = world.pair();
        world.link = Link { delay_ns: MS, lost: 10_000, duplicated: 10_000, late: 20_000, ..Link::default() };
        world.transfer((0, client), (1, server), 1 << 20, 600 * SECOND);
        world.transfer((1, server), (0, client), 1 << 20, 600 * SECOND);
    }
}

#[test]
fn a_lost_handshake_is_repeated() {
    for seed in 1..=20u64 {
        let mut world = two();
        world.reseed(seed);
        world.link.lost = 300_000;
        let accept = world.listen(1, "0.0.0.0:80", 16);
        let client = world.connect(0, "10.0.0.1:50000", "10.0.0.2:80").unwrap();
        let mut done = false;
        world.run(29 * SECOND, |world| {
            done = world.connected(0, client) == Some(Ok(()));
            done
        });
        let outcome = world.connected(0, client);
        assert!(
            matches!(outcome, Some(Ok(()) | Err(NetError::Unreachable))) || outcome.is_none(),
            "seed {seed}: {outcome:?}"
        );
        if done {
            world.link.lost = 0;
            world.send(0, client, b"x").unwrap().unwrap();
            assert!(world.run(60 * SECOND, |_| accept.pop().is_some()), "seed {seed}");
        }
    }
}

#[test]
fn nobody_listens() {
    let mut world = two();
    let client = world.connect(0, "10.0.0.1:50000", "10.0.0.2:81").unwrap();
    world.pass(SECOND);
    assert_eq!(error(world.connected(0, client)), NetError::Refused);
    assert_eq!(world.nodes[1].counters.resets_sent.get(), 1);
    world.shard(0, client).tcp_drop(client);
    assert_eq!(world.nodes[0].shards[0].flows.len(), 0);
}

#[test]
fn nobody_is_there() {
    let mut world = two();
    let client = world.connect(0, "10.0.0.1:50000", "10.0.0.77:80").unwrap();
    world.pass(10 * SECOND);
    assert_eq!(error(world.connected(0, client)), NetError::Unreachable);
    assert_eq!(error(world.send(0, client, b"x")), NetError::Unreachable);
}

#[test]
fn a_silent_peer_times_out() {
    let mut world = two();
    let (client, server) = world.pair();
    world.link.lost = 1_000_000;
    world.send(0, client, b"lost").unwrap().unwrap();
    world.pass(200 * SECOND);
    assert_eq!(error(world.recv(0, client)), NetError::TimedOut);
    let _ = server;
}

#[test]
fn an_idle_connection_stays_and_keepalive_notices_death() {
    let mut world = two();
    let (client, server) = world.pair();
    world.pass(3600 * SECOND);
    assert_eq!(world.recv(0, client), None);
    world.shard(0, client).tcp_set_keepalive(client, Some(10 * SECOND)).unwrap();
    world.pass(3600 * SECOND);
    assert_eq!(world.recv(0, client), None, "the peer answers probes");
    world.transfer((0, client), (1, server), 10_000, SECOND);
    world.link.lost = 1_000_000;
    world.pass(60 * SECOND);
    assert_eq!(error(world.recv(0, client)), NetError::TimedOut);
}

#[test]
fn abort_resets() {
    let mut world = two();
    let (client, server) = world.pair();
    world.shard(0, client).tcp_abort(client);
    world.pass(SECOND);
    assert_eq!(error(world.recv(1, server)), NetError::Reset);
    assert_eq!(error(world.send(1, server, b"x")), NetError::Reset);
}

#[test]
fn dropping_unread_data_resets() {
    let mut world = two();
    let (client, server) = world.pair();
    world.send(0, client, b"never read").unwrap().unwrap();
    world.pass(SECOND);
    world.shard(1, server).tcp_drop(server);
    world.pass(SECOND);
    assert_eq!(error(world.recv(0, client)), NetError::Reset);
    assert_eq!(world.nodes[1].shards[0].flows.len(), 0);
}

#[test]
fn a_full_backlog_drops_and_recovers() {
    let mut world = two();
    let accept = world.listen(1, "0.0.0.0:80", 2);
    let mut clients = std::vec::Vec::new();
    for port in 50_000..50_004 {
        let local = std::format!("10.0.0.1:{port}");
        clients.push(world.connect(0, &local, "10.0.0.2:80").unwrap());
    }
    world.pass(SECOND / 2);
    let up =
        |world: &mut World| clients.iter().filter(|flow| world.connected(0, **flow) == Some(Ok(()))).count();
    assert_eq!(up(&mut world), 2);
    assert!(world.nodes[1].counters.drop_backlog.get() >= 2);
    let mut accepted = 0;
    world.run(60 * SECOND, |_| {
        accepted += usize::from(accept.pop().is_some());
        accepted == 4
    });
    assert_eq!(accepted, 4, "later SYNs got the room");
    assert_eq!(up(&mut world), 4);
}

#[test]
fn to_ourselves() {
    let mut world = two();
    let accept = world.listen(0, "0.0.0.0:80", 4);
    for (local, remote) in [("127.0.0.1:50000", "127.0.0.1:80"), ("10.0.0.1:50001", "10.0.0.1:80")] {
        let client = world.connect(0, local, remote).unwrap();
        world.pass(MS);
        let server = accept.pop().unwrap().flow;
        world.transfer((0, client), (0, server), 1 << 20, SECOND);
        world.transfer((0, server), (0, client), 1 << 20, SECOND);
    }
}

#[test]
fn four_shards_carry_many_connections() {
    let mut spec = Spec::v4(2);
    spec.shards = 4;
    let mut other = Spec::v4(1);
    other.shards = 3;
    let mut world = World::new(&[other, spec]);
    let accept = world.listen(1, "0.0.0.0:80", 64);
    let mut used = std::collections::BTreeSet::new();
    for port in 50_000..50_032u16 {
        let local = std::format!("10.0.0.1:{port}");
        let client = world.connect(0, &local, "10.0.0.2:80").unwrap();
        let mut server = None;
        assert!(world.run(10 * SECOND, |_| {
            server = server.or(accept.pop());
            server.is_some()
        }));
        let server = server.unwrap().flow;
        used.insert(server.shard);
        world.transfer((0, client), (1, server), 50_000, 10 * SECOND);
        world.transfer((1, server), (0, client), 50_000, 10 * SECOND);
    }
    assert_eq!(used.len(), 4);
    assert!(world.nodes[1].counters.steered.get() > 0);
}

#[test]
fn offloads_give_the_same_stream() {
    let mut spec = Spec::v4(1);
    spec.caps = NicCaps::TX_CHECKSUM | NicCaps::TSO4;
    let mut world = World::new(&[spec, Spec::v4(2)]);
    let (client, server) = world.pair();
    world.transfer((0, client), (1, server), 1 << 20, 60 * SECOND);
    world.transfer((1, server), (0, client), 1 << 20, 60 * SECOND);
    assert_eq!(world.nodes[1].counters.drop_checksum.get(), 0);
    let sent = world.nodes[0].counters.tx_frames.get();
    assert!(sent < 1300, "{sent} frames: the device was to cut them");
}

#[test]
fn a_small_transmit_queue_loses_nothing() {
    let mut spec = Spec::v4(1);
    spec.room = 4;
    let mut world = World::new(&[spec, Spec::v4(2)]);
    let (client, server) = world.pair();
    world.transfer((0, client), (1, server), 1 << 20, 60 * SECOND);
    assert_eq!(world.nodes[0].counters.drop_tx_full.get(), 0);
}

#[test]
fn a_flood_of_syns_is_bounded() {
    let mut world = two();
    let accept = world.listen(1, "0.0.0.0:80", 64);
    let client = world.connect(0, "10.0.0.1:50000", "10.0.0.2:80").unwrap();
    world.trace = Some(std::vec::Vec::new());
    world.pass(MS);
    let trace = world.trace.take().unwrap();
    let syn = trace.iter().find(|frame| frame.len() > 47 && frame[47] == 2).unwrap().clone();
    accept.pop().unwrap();
    for n in 0..5000u32 {
        let mut frame = syn.clone();
        frame[26..30].copy_from_slice(&(0x0a00_0010 + n % 200).to_be_bytes());
        frame[34..36].copy_from_slice(&(1000 + n as u16).to_be_bytes());
        let src = core::net::Ipv4Addr::from(<[u8; 4]>::try_from(&frame[26..30]).unwrap());
        frame[24..26].fill(0);
        let sum = crate::checksum::Sum::default().bytes(&frame[14..34]).finish();
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        frame[50..52].fill(0);
        let sum = crate::checksum::Sum::default()
            .pseudo_header(src.into(), core::net::Ipv4Addr::new(10, 0, 0, 2).into(), 6, frame.len() - 34)
            .bytes(&frame[34..])
            .finish();
        frame[50..52].copy_from_slice(&sum.to_be_bytes());
        world.inject(1, &frame);
    }
    world.settle();
    assert_eq!(world.nodes[1].shards[0].half_open.len(), 64);
    assert_eq!(world.nodes[1].shards[0].flows.len(), 1);
    assert!(world.nodes[1].counters.drop_backlog.get() >= 4900);
    // What was never answered is forgotten.
    world.pass(60 * SECOND);
    assert_eq!(world.nodes[1].shards[0].half_open.len(), 0);
    assert_eq!(world.connected(0, client), Some(Ok(())));
}

#[test]
fn the_limit_of_connections_holds() {
    let mut spec = Spec::v4(2);
    spec.limits.connections = 3;
    let mut world = World::new(&[Spec::v4(1), spec]);
    let _accept = world.listen(1, "0.0.0.0:80", 64);
    let clients: std::vec::Vec<_> = (50_000..50_006)
        .map(|port| world.connect(0, &std::format!("10.0.0.1:{port}"), "10.0.0.2:80").unwrap())
        .collect();
    world.pass(5 * SECOND);
    let up = clients.iter().filter(|flow| world.connected(0, **flow) == Some(Ok(()))).count();
    assert_eq!(up, 3);
    assert!(world.nodes[1].counters.drop_no_memory.get() > 0);
}

#[test]
fn somebody_in_the_middle_forges_segments() {
    let (mut bytes, mut resets) = (0usize, 0);
    for seed in 1..=300u64 {
        let mut world = two();
        world.reseed(seed);
        let (client, server) = world.pair();
        world.link.forged = 100_000;
        world.link.late = 100_000;
        // Whatever becomes of the data: nobody panics, everybody comes to rest, and the end is an end.
        world.run(30 * SECOND, |world| {
            for (node, flow) in [(0, client), (1, server)] {
                while let Some(Ok(_)) = world.send(node, flow, &[node as u8; 4000]) {}
                while let Some(Ok(data)) = world.recv(node, flow) {
                    bytes += data.len();
                    if data.is_empty() {
                        break;
                    }
                }
            }
            bytes > 2_000_000 * seed as usize
        });
        world.shard(0, client).tcp_shutdown(client, Shutdown::Both).ok();
        world.pass(SECOND);
        for (node, flow) in [(0, client), (1, server)] {
            resets += usize::from(matches!(world.recv(node, flow), Some(Err(_))));
            world.shard(node, flow).tcp_drop(flow);
        }
        world.pass(400 * SECOND);
        for node in &world.nodes {
            assert_eq!(node.shards[0].flows.len(), 0, "seed {seed}");
        }
    }
    assert!(bytes > 10_000_000, "{bytes} bytes got through");
    assert!(resets > 0);
}

#[test]
fn a_narrow_link_on_the_way_gets_fragments() {
    let mut world = two();
    let (client, server) = world.pair();
    world.trace = Some(std::vec::Vec::new());
    world.transfer((0, client), (1, server), 20_000, SECOND);
    let sent = world.trace.take().unwrap();
    let long = sent.iter().find(|frame| frame.len() > 1400).unwrap();
    assert_eq!(long[20] & 0x40, 0x40, "not to be cut before anybody asks");
    // What a router at 10.0.0.9 says: fragmentation needed, next MTU 1280, quoting the segment.
    let mut error = std::vec![3, 4, 0, 0, 0, 0, 5, 0];
    error.extend(&long[14..14 + 28]);
    let sum = crate::checksum::Sum::default().bytes(&error).finish();
    error[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame = [&[2, 0, 0, 0, 0, 1], &[2, 0, 0, 0, 0, 9], &[8u8, 0][..]].concat();
    let mut header = [0; 20];
    let (from, to) = ([10, 0, 0, 9].into(), [10, 0, 0, 1].into());
    crate::packet::write_ip_header(
        &mut header,
        core::net::IpAddr::V4(from),
        core::net::IpAddr::V4(to),
        1,
        64,
        error.len(),
    );
    frame.extend(header);
    frame.extend(error);
    world.inject(0, &frame);
    world.trace = Some(std::vec::Vec::new());
    world.transfer((0, client), (1, server), 20_000, SECOND);
    let sent = world.trace.take().unwrap();
    let long = sent.iter().rfind(|frame| frame.len() > 1400).unwrap();
    assert_eq!(long[20] & 0x40, 0);
    assert_eq!(world.nodes[0].counters.fragmentable.get(), 1);
    assert_eq!(world.nodes[1].counters.drop_checksum.get(), 0);
}

/// RFC 8201: what a router says of its next link is believed, down to what every link takes, if it quotes what was sent.
#[test]
fn a_narrow_link_over_ipv6_gets_shorter_segments() {
    let mut world = World::new(&[Spec::v6(1), Spec::v6(2)]);
    world.pass(3 * SECOND);
    let (client, server) = world.pair_of("[fd00::1]:50000", "[fd00::2]:80");
    let longest = |world: &mut World| {
        world.trace = Some(std::vec::Vec::new());
        world.transfer((0, client), (1, server), 50_000, 5 * SECOND);
        world.trace.take().unwrap().into_iter().max_by_key(std::vec::Vec::len).unwrap()
    };
    let long = longest(&mut world);
    assert_eq!(long.len(), 14 + 1500);
    // Packet too big, from a router at fd00::9, quoting a segment; `change` changes the quoted sequence number.
    let too_big = |mtu: u32, change: u8| {
        let mut quote = long[14..14 + 60].to_vec();
        quote[44] ^= change;
        let mut error = [&[2, 0, 0, 0], &mtu.to_be_bytes()[..], &quote].concat();
        let (from, to) = ("fd00::9".parse().unwrap(), "fd00::1".parse().unwrap());
        crate::icmp::sum_icmp(&mut error, from, to);
        let mut header = [0; 40];
        crate::packet::write_ip_header(&mut header, from, to, 58, 64, error.len());
        [&[2, 0, 0, 0, 0, 1], &[2, 0, 0, 0, 0, 9], &[0x86u8, 0xdd][..], &header, &error].concat()
    };
    for (mtu, change, expected, narrowed) in [
        (1400, 0x80, 1500, 0),
        (9000, 0, 1500, 0),
        (1400, 0, 1400, 1),
        (1450, 0, 1400, 1),
        (40, 0, 1280, 2),
        (0, 0, 1280, 2),
    ] {
        world.inject(0, &too_big(mtu, change));
        assert_eq!(longest(&mut world).len(), 14 + expected, "{mtu} {change}");
        assert_eq!(world.nodes[0].counters.narrowed.get(), narrowed, "{mtu} {change}");
    }
    assert_eq!(world.nodes[0].counters.drop_checksum.get() + world.nodes[0].counters.drop_malformed.get(), 0);
}

/// The window in a SYN is not scaled, and the buffer ends before four times what it says.
#[test]
fn data_beyond_the_window_of_the_handshake_is_dropped() {
    const BUFFER: usize = 128 << 10;
    let mut spec = Spec::v4(2);
    spec.limits.receive_bytes = BUFFER;
    let mut world = World::new(&[Spec::v4(1), spec]);
    let (client, server) = world.pair();
    world.link.lost = 1_000_000;
    world.trace = Some(std::vec::Vec::new());
    assert_eq!(world.send(0, client, &[1; 1460]), Some(Ok(1460)));
    world.settle();
    let mut frame = world.trace.take().unwrap().into_iter().find(|frame| frame.len() > 1400).unwrap();
    let seq = u32::from_be_bytes(frame[38..42].try_into().unwrap());
    // Half of it lies behind the end of the buffer.
    frame[38..42].copy_from_slice(&seq.wrapping_add(BUFFER as u32 - 730).to_be_bytes());
    super::ip::repair(&mut frame);
    world.inject(1, &frame);
    world.settle();
    assert_eq!(world.nodes[1].counters.drop_window.get(), 1);
    world.link.lost = 0;
    let mut sent = 1460;
    world.run(10 * SECOND, |world| {
        while let Some(Ok(n)) = world.send(0, client, &[1; 8000]) {
            sent += n;
        }
        false
    });
    let mut received = 0;
    world.run(10 * SECOND, |world| {
        while let Some(Ok(data)) = world.recv(1, server) {
            received += data.len();
        }
        received == sent
    });
    assert_eq!(received, sent);
}

/// RFC 9293, 3.10.7.4: in CLOSE-WAIT the text of a segment is ignored.
#[test]
fn data_behind_the_end_is_dropped() {
    let mut world = two();
    let (client, server) = world.pair();
    world.trace = Some(std::vec::Vec::new());
    assert_eq!(world.send(0, client, &[1; 1000]), Some(Ok(1000)));
    world.settle();
    let mut frame = world.trace.take().unwrap().into_iter().find(|frame| frame.len() > 1000).unwrap();
    world.shard(0, client).tcp_shutdown(client, Shutdown::Write).unwrap();
    world.pass(SECOND);
    let seq = u32::from_be_bytes(frame[38..42].try_into().unwrap());
    frame[38..42].copy_from_slice(&seq.wrapping_add(1001).to_be_bytes());
    super::ip::repair(&mut frame);
    world.inject(1, &frame);
    // What was sent before is no news, but no fault either.
    frame[38..42].copy_from_slice(&seq.to_be_bytes());
    super::ip::repair(&mut frame);
    world.inject(1, &frame);
    world.settle();
    assert_eq!(world.recv(1, server), Some(Ok(std::vec![1; 1000])));
    assert_eq!(world.recv(1, server), Some(Ok(std::vec![])), "the end");
    assert_eq!(world.nodes[1].counters.drop_window.get(), 1);
}

/// What came before the end stays readable for as long as the application likes (RFC 9293, 3.6.1), TIME-WAIT or not.
#[test]
fn what_was_not_read_outlives_time_wait() {
    let mut world = two();
    let (client, server) = world.pair();
    world.shard(0, client).tcp_shutdown(client, Shutdown::Write).unwrap();
    world.pass(SECOND);
    assert_eq!(world.send(1, server, &[1; 1000]), Some(Ok(1000)));
    world.trace = Some(std::vec::Vec::new());
    world.shard(1, server).tcp_shutdown(server, Shutdown::Write).unwrap();
    world.pass(SECOND);
    // A reset in TIME-WAIT (RFC 1337).
    let from_server = |frame: &std::vec::Vec<u8>| frame[47] & flag::FIN != 0;
    let mut reset = world.trace.take().unwrap().into_iter().find(from_server).unwrap();
    let seq = u32::from_be_bytes(reset[38..42].try_into().unwrap()).wrapping_add(reset.len() as u32 - 54 + 1);
    reset[38..42].copy_from_slice(&seq.to_be_bytes());
    reset[47] = flag::RST;
    super::ip::repair(&mut reset);
    world.inject(0, &reset);
    world.settle();
    // Nothing happens meanwhile.
    world.pass(200 * SECOND);
    assert_eq!(world.recv_up_to(0, client, 600), Some(Ok(std::vec![1; 600])));
    world.pass(200 * SECOND);
    assert_eq!(world.recv(0, client), Some(Ok(std::vec![1; 400])));
    assert_eq!(world.recv(0, client), Some(Ok(std::vec![])), "the end");
    assert_eq!(world.nodes[0].counters.resets_received.get(), 0);
}
