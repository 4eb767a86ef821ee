//! Routers in a grid: each shares a segment with the one to its right and one with the one below, has static routes to
//! everybody, and passes packets on. Every node pings the far corner, and the first pings everybody.

use super::{Options, Report, with_kernel};
use crate::sim::{LinkModel, NodeSetup, SECOND, SegmentId, SimConfig, SimHost, Simulation};
use anykernel::config::{Config, Interface};
use anykernel::task::block_on;
use hypercall::{Clock, ThreadSpec, Threads};
use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

/// Who is joined to whom: nodes in rows of `width`.
struct Grid {
    nodes: u32,
    width: u32,
}

impl Grid {
    fn new(nodes: u32) -> Self {
        Self { nodes, width: (1..=nodes).find(|width| width * width >= nodes).unwrap_or(1) }
    }

    /// How many segments lie between two nodes.
    fn distance(&self, from: u32, to: u32) -> u32 {
        // The last row may be short; the rows above it are not, so that no way has to go round.
        (from / self.width).abs_diff(to / self.width) + (from % self.width).abs_diff(to % self.width)
    }

    /// Pairs of neighbours; each pair has a segment of its own.
    fn edges(&self) -> Vec<(u32, u32)> {
        let right = (0..self.nodes).filter(|n| (n + 1) % self.width != 0).map(|n| (n, n + 1));
        let down = (0..self.nodes).map(|n| (n, n + self.width));
        right.chain(down).filter(|(_, b)| *b < self.nodes).collect()
    }
}

/// The subnet of edge `e` is 10.(e/64).(e%64*4).0/30; the node with the smaller number has 1, the other 2.
fn address(edge: usize, second: bool) -> Ipv4Addr {
    let base = 0x0a00_0000 | (edge as u32) << 2;
    Ipv4Addr::from(base + 1 + u32::from(second))
}

struct Plan {
    configs: Vec<Config>,
    links: Vec<Vec<SegmentId>>,
    /// The address that others know a node by.
    names: Vec<Ipv4Addr>,
}

/// Addresses, and routes by the shortest paths.
fn plan(grid: &Grid, sim: &Simulation, link: &LinkModel) -> Plan {
    let edges = grid.edges();
    let count = grid.nodes as usize;
    // Of each node: neighbour, its address there, own address.
    let mut near: Vec<Vec<(u32, Ipv4Addr, Ipv4Addr)>> = vec![Vec::new(); count];
    let mut links = vec![Vec::new(); count];
    for (edge, (a, b)) in edges.iter().enumerate() {
        let segment = sim.segment(link.clone());
        let (of_a, of_b) = (address(edge, false), address(edge, true));
        near[*a as usize].push((*b, of_b, of_a));
        near[*b as usize].push((*a, of_a, of_b));
        links[*a as usize].push(segment);
        links[*b as usize].push(segment);
    }
    let names: Vec<Ipv4Addr> = near.iter().map(|near| near[0].2).collect();
    let configs = (0..grid.nodes)
        .map(|from| {
            // Breadth first; the way to each node begins with a neighbour.
            let mut first: BTreeMap<u32, usize> = BTreeMap::new();
            let mut queue = VecDeque::new();
            for (index, (neighbour, ..)) in near[from as usize].iter().enumerate() {
                first.insert(*neighbour, index);
                queue.push_back(*neighbour);
            }
            while let Some(at) = queue.pop_front() {
                let index = first[&at];
                for (next, ..) in &near[at as usize] {
                    if *next != from && !first.contains_key(next) {
                        first.insert(*next, index);
                        queue.push_back(*next);
                    }
                }
            }
            let mut interfaces: Vec<Interface> = near[from as usize]
                .iter()
                .map(|(_, _, own)| Interface {
                    ipv4: format!("{own}/30"),
                    ipv6: "none".into(),
                    ..Interface::default()
                })
                .collect();
            for (to, index) in &first {
                let via = near[from as usize][*index].1;
                // All addresses of a node, as answers come from the nearest.
                for (_, _, own) in &near[*to as usize] {
                    interfaces[*index].routes.push(format!("{own}/32 via {via}"));
                }
            }
            Config {
                hostname: "router".into(),
                log: "off".into(),
                forward: true,
                interfaces,
                ..Config::default()
            }
        })
        .collect();
    Plan { configs, links, names }
}

#[derive(Default)]
struct Tally {
    up: AtomicU32,
    answered: AtomicU64,
    forwarded: AtomicU64,
    longest_ns: AtomicU64,
    findings: Mutex<Vec<String>>,
}

fn ping(kernel: &anykernel::Kernel<SimHost>, to: Ipv4Addr, tally: &Tally) {
    let host = kernel.host();
    // A first packet may be lost while neighbours are asked for along the way.
    let mut last = None;
    for _ in 0..5 {
        let Some(sockets) = kernel.sockets() else { return };
        let start = host.monotonic_ns();
        match sockets.ping(IpAddr::V4(to)) {
            Ok(mut ping) => match block_on(host, std::future::poll_fn(|cx| ping.poll_reply(cx))) {
                Ok(_) => {
                    tally.answered.fetch_add(1, Relaxed);
                    tally.longest_ns.fetch_max(host.monotonic_ns() - start, Relaxed);
                    return;
                }
                Err(error) => last = Some(error),
            },
            Err(error) => last = Some(error),
        }
    }
    tally.findings.lock().expect("one thread").push(format!("no answer from {to}: {last:?}"));
}

/// Builds the grid, waits until all are up, lets everybody ping the last node and the first one ping all.
pub(super) fn run(options: &Options) -> Report {
    let mut report = Report::new(options);
    let grid = Grid::new(options.nodes.max(2));
    let limit = 3_600 * SECOND;
    let sim =
        Simulation::new(SimConfig { time_limit_ns: limit, stack_bytes: 128 << 10, ..options.sim_config() });
    let Plan { configs, links, names } = plan(&grid, &sim, &options.link);
    let tally = Arc::new(Tally::default());
    let names = Arc::new(names);
    let mut threads = Vec::new();
    for (number, (config, links)) in configs.into_iter().zip(links).enumerate() {
        let setup = NodeSetup { cpus: 1, links, memory: 16 << 20, ..NodeSetup::named(&format!("r{number}")) };
        let host = sim.node(setup);
        let (tally, names) = (tally.clone(), names.clone());
        let body = move || {
            let (result, _) = with_kernel(host, config, |kernel| {
                tally.up.fetch_add(1, Relaxed);
                while (tally.up.load(Relaxed) as usize) < names.len() {
                    host.sleep(1_000_000);
                }
                let all = if number == 0 { &names[1..] } else { &names[names.len() - 1..] };
                if number + 1 < names.len() {
                    all.iter().for_each(|to| ping(kernel, *to, &tally));
                }
                tally.up.fetch_add(1, Relaxed);
                // Others still need this router.
                while (tally.up.load(Relaxed) as usize) < 2 * names.len() {
                    host.sleep(1_000_000);
                }
                tally.forwarded.fetch_add(kernel.counter("net.forwarded").get(), Relaxed);
            });
            if let Err(error) = result {
                tally.findings.lock().expect("one thread").push(format!("router {number}: {error}"));
            }
        };
        let thread = host.spawn(ThreadSpec { name: "main", cpu: None }, Box::new(body));
        threads.push((host, thread));
    }
    for (host, thread) in threads {
        if let Ok(thread) = thread
            && let Err(failure) = sim.wait_for(host, thread)
        {
            report.find(failure.to_string());
            break;
        }
    }
    report.count("routers", u64::from(grid.nodes));
    report.count("pings_answered", tally.answered.load(Relaxed));
    let forwarded = tally.forwarded.load(Relaxed);
    report.count("forwarded", forwarded);
    report.count("longest_us", tally.longest_ns.load(Relaxed) / 1000);
    report.findings.append(&mut tally.findings.lock().expect("one thread"));
    // Questions and answers, each by all routers between the two.
    let last = grid.nodes - 1;
    let pairs = (1..grid.nodes).map(|to| (0, to)).chain((1..last).map(|from| (from, last)));
    let least: u64 = pairs.map(|(from, to)| 2 * u64::from(grid.distance(from, to) - 1)).sum();
    if report.findings.is_empty() && forwarded < least {
        report.find(format!("packets were passed on {forwarded} times, which cannot be under {least}"));
    }
    report.close(&sim);
    report
}
