//! A connection goes on whenever its reader has room, whatever was lost, late or said of windows before.

use super::world::{Link, MS, SECOND, Spec, World, pattern};
use anykernel::nic::NicCaps;
use proptest::prelude::*;

/// How the ends are made and what the link does to them.
#[derive(Debug, Clone)]
struct Case {
    seed: u64,
    mtu: u16,
    /// Receive and send buffer of the one end and of the other.
    buffers: [usize; 4],
    tso: bool,
    /// Bytes that the ends send.
    totals: [usize; 2],
    link: [u64; 4],
}

fn cases(faults: bool) -> impl Strategy<Value = Case> {
    let buffer = prop_oneof![Just(64 << 10), Just(128 << 10), Just(256 << 10), 3000usize..200_000];
    let rate = if faults { prop_oneof![Just(0u64), 1000u64..100_000].boxed() } else { Just(0u64).boxed() };
    (
        any::<u64>(),
        prop_oneof![Just(1500u16), Just(9000), Just(65_535)],
        [buffer.clone(), buffer.clone(), buffer.clone(), buffer],
        any::<bool>(),
        (0usize..600_000, prop_oneof![Just(0), 1usize..600_000]),
        prop_oneof![Just(1000u64), Just(100_000), Just(20 * MS)],
        [rate.clone(), rate.clone(), rate],
    )
        .prop_map(|(seed, mtu, buffers, tso, (first, second), delay_ns, [lost, late, shut])| Case {
            seed,
            mtu,
            buffers,
            tso: tso && mtu == 1500,
            totals: [first, second],
            link: [delay_ns, lost, late, shut],
        })
}

fn world(case: &Case) -> World {
    let mut specs = [Spec::v4(1), Spec::v4(2)];
    for (spec, buffers) in specs.iter_mut().zip(case.buffers.chunks(2)) {
        spec.mtu = case.mtu;
        spec.limits.receive_bytes = buffers[0];
        spec.limits.send_bytes = buffers[1];
    }
    if case.tso {
        specs[0].caps = NicCaps::TX_CHECKSUM | NicCaps::TSO4;
    }
    World::new(&specs)
}

/// The longest time without progress.
#[derive(Default)]
struct Gap {
    progress: usize,
    since_ns: u64,
    longest_ns: u64,
}

impl Gap {
    fn see(&mut self, now_ns: u64, progress: usize) {
        self.longest_ns = self.longest_ns.max(now_ns - self.since_ns);
        if progress != self.progress {
            (self.progress, self.since_ns) = (progress, now_ns);
        }
    }
}

/// Two ends send to each other, and read, now and then. At last both read all, over a good link: returns the longest time
/// without progress then.
fn last_part(case: &Case, limit_ns: u64) -> Result<u64, TestCaseError> {
    let mut world = world(case);
    let (client, server) = world.pair();
    world.reseed(case.seed);
    let [delay_ns, lost, late, shut] = case.link;
    world.link = Link { delay_ns, lost, late, shut, ..Link::default() };
    let ends = [(0, client), (1, server)];
    let (mut sent, mut received) = ([0usize; 2], [0usize; 2]);
    for phase in 0..=30 {
        let last = phase == 30;
        let (mut sends, mut reads, mut piece, mut ns) = ([true; 2], [true; 2], 64 << 10, limit_ns);
        if last {
            world.link = Link { delay_ns, ..Link::default() };
        } else {
            for flag in sends.iter_mut().chain(&mut reads) {
                *flag = world.random().is_multiple_of(2);
            }
            piece = 1 << (world.random() % 17);
            ns = 1 << (world.random() % 32);
        }
        let mut gap = Gap { since_ns: world.now_ns, ..Gap::default() };
        let mut wrong = None;
        let done = world.run(ns, |world| {
            for (end, (node, flow)) in ends.into_iter().enumerate() {
                while sends[end] && sent[end] < case.totals[end] {
                    let until = (sent[end] + piece).min(case.totals[end]);
                    let data: std::vec::Vec<u8> = (sent[end]..until).map(pattern).collect();
                    match world.send(node, flow, &data) {
                        Some(Ok(n)) => sent[end] += n,
                        Some(Err(error)) => wrong = Some(std::format!("{end} sends: {error}")),
                        None => break,
                    }
                    if !last || wrong.is_some() {
                        break;
                    }
                }
                while let Some(result) = reads[end].then(|| world.recv_up_to(node, flow, piece)).flatten() {
                    let at = received[end];
                    match result {
                        Ok(data)
                            if !data.is_empty()
                                && (at..).zip(&data).all(|(at, byte)| pattern(at) == *byte) =>
                        {
                            received[end] += data.len();
                        }
                        other => wrong = Some(std::format!("{end} receives at {at}: {other:?}")),
                    }
                    if !last || wrong.is_some() {
                        break;
                    }
                }
            }
            gap.see(world.now_ns, received[0] + received[1]);
            wrong.is_some() || [received[1], received[0]] == case.totals
        });
        prop_assert!(wrong.is_none(), "phase {}: {}", phase, wrong.unwrap_or_default());
        if done || last {
            prop_assert!(done, "received {:?}, sent {:?}", received, sent);
            return Ok(if last { gap.longest_ns } else { 0 });
        }
    }
    unreachable!("the last phase returns")
}

/// A service that sends back what it receives, and a client that begins to read only after a while. Returns the longest
/// time without progress then.
fn echo(case: &Case, pause_ns: u64) -> Result<u64, TestCaseError> {
    const TOTAL: usize = 1 << 20;
    let mut world = world(case);
    let (client, server) = world.pair();
    world.reseed(case.seed);
    world.link.delay_ns = case.link[0];
    let mut data = std::vec![0; 64 << 10];
    let (mut sent, mut echoed, mut received) = (0usize, std::vec::Vec::new(), 0usize);
    let mut turn = |world: &mut World, reads: bool| {
        while sent < TOTAL
            && let Some(n) = world.send(0, client, &data[..data.len().min(TOTAL - sent)])
        {
            sent += n.unwrap();
        }
        loop {
            if echoed.is_empty() {
                match world.recv_up_to(1, server, 64 << 10) {
                    Some(data) => echoed = data.unwrap(),
                    None => break,
                }
            }
            match world.send(1, server, &echoed) {
                Some(n) => drop(echoed.drain(..n.unwrap())),
                None => break,
            }
        }
        while reads && let Some(data) = world.recv_up_to(0, client, 64 << 10) {
            received += data.unwrap().len();
        }
        data[0] = data[0].wrapping_add(1);
        received
    };
    world.run(pause_ns, |world| turn(world, false) > TOTAL);
    let mut gap = Gap { since_ns: world.now_ns, ..Gap::default() };
    let done = world.run(1000 * SECOND, |world| {
        let received = turn(world, true);
        gap.see(world.now_ns, received);
        received == TOTAL
    });
    prop_assert!(done, "{} of {} bytes came back", gap.progress, TOTAL);
    Ok(gap.longest_ns)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 300, ..ProptestConfig::default() })]

    #[test]
    fn slow_readers_get_everything_at_once_when_they_read(case in cases(false)) {
        let gap = last_part(&case, 1000 * SECOND)?;
        prop_assert!(gap < 3 * SECOND / 2, "nothing for {} ms", gap / MS);
    }

    #[test]
    fn slow_readers_get_everything_over_a_bad_link(case in cases(true)) {
        last_part(&case, 1000 * SECOND)?;
    }

    #[test]
    fn an_echo_comes_back_once_it_is_read(case in cases(false), pause_ns in 1u64..5 * SECOND) {
        let gap = echo(&case, pause_ns)?;
        prop_assert!(gap < 3 * SECOND / 2, "nothing for {} ms", gap / MS);
    }
}
