//! Datagrams of all sizes between two nodes, most of them in fragments, over a link that changes their order. None may come
//! changed, and none be lost unless the link lost a frame.

use super::{Options, Report, patterned, with_address, with_kernel};
use crate::sim::{MS, NodeSetup, Random, SECOND, SimConfig, SimHost, Simulation};
use anykernel::socket::UdpSocket;
use anykernel::task::block_on_until;
use hypercall::{Clock, ThreadSpec, Threads};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

const PORT: u16 = 6000;

#[derive(Default)]
struct Tally {
    sent: u64,
    arrived: BTreeSet<u64>,
    wrong: u64,
}

fn sender(host: SimHost, seed: u64, end_ns: u64, tally: &Mutex<Tally>) {
    let _ = with_kernel(host, with_address("10.5.0.1/24"), |kernel| {
        let socket = kernel.sockets().and_then(|sockets| sockets.bind(([0, 0, 0, 0], 0).into()).ok());
        let Some(socket) = socket.map(UdpSocket) else { return };
        let mut random = Random::new(seed, 11);
        // The first finds the neighbour; it counts like all.
        host.sleep(SECOND);
        for number in 0u64.. {
            let mut data = patterned(number, 8 + random.below(7000) as usize);
            data[..8].copy_from_slice(&number.to_le_bytes());
            let send = socket.send_to(&data, ([10, 5, 0, 2], PORT).into());
            if let Some(Ok(())) = block_on_until(host, send, Some(end_ns)) {
                tally.lock().expect("one thread").sent += 1;
            }
            host.sleep(if number == 0 { SECOND } else { 20 * MS });
            if host.monotonic_ns() >= end_ns {
                break;
            }
        }
        host.sleep(2 * SECOND);
    });
}

fn receiver(host: SimHost, end_ns: u64, tally: &Mutex<Tally>) {
    let _ = with_kernel(host, with_address("10.5.0.2/24"), |kernel| {
        let socket = kernel.sockets().and_then(|sockets| sockets.bind(([0, 0, 0, 0], PORT).into()).ok());
        let Some(socket) = socket.map(UdpSocket) else { return };
        let mut buf = vec![0; 8000];
        while let Some(Ok((n, _))) = block_on_until(host, socket.recv_from(&mut buf), Some(end_ns + SECOND)) {
            let number = buf[..n].first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
            let mut tally = tally.lock().expect("one thread");
            match number {
                Some(number) if buf[8..n] == patterned(number, n)[8..] => drop(tally.arrived.insert(number)),
                _ => tally.wrong += 1,
            }
        }
    });
}

pub(super) fn run(options: &Options) -> Report {
    let mut report = Report::new(options);
    let end_ns = options.seconds * SECOND;
    let sim = Simulation::new(SimConfig { time_limit_ns: end_ns + 100 * SECOND, ..options.sim_config() });
    let mut link = options.link.clone();
    link.reorder_ppm = link.reorder_ppm.max(200_000);
    let lossless = link.loss_ppm == 0 && link.corrupt_ppm == 0;
    let wire = sim.segment(link);
    let tally = Arc::new(Mutex::new(Tally::default()));
    let node =
        |name: &str| sim.node(NodeSetup { cpus: options.cpus, links: vec![wire], ..NodeSetup::named(name) });
    let (to, from) = (node("receiver"), node("sender"));
    let (its, seed) = (tally.clone(), options.seed);
    let receives = move || receiver(to, end_ns, &its);
    let its = tally.clone();
    let sends = move || sender(from, seed, end_ns, &its);
    let spec = ThreadSpec { name: "main", cpu: None };
    let threads = [(to, to.spawn(spec, Box::new(receives))), (from, from.spawn(spec, Box::new(sends)))];
    for (host, thread) in threads {
        if let Ok(thread) = thread
            && let Err(failure) = sim.wait_for(host, thread)
        {
            report.find(failure.to_string());
        }
    }
    let tally = std::mem::take(&mut *tally.lock().expect("one thread"));
    report.count("sent", tally.sent);
    report.count("arrived", tally.arrived.len() as u64);
    if tally.wrong > 0 {
        report.find(format!("{} datagrams came changed", tally.wrong));
    }
    if lossless && (tally.arrived.len() as u64) < tally.sent {
        let lost = tally.sent - tally.arrived.len() as u64;
        report.find(format!("{lost} of {} datagrams are lost, although no frame was", tally.sent));
    }
    for (name, n) in sim.segment_counters(wire).list() {
        report.count(&format!("frames_{name}"), n);
    }
    report.close(&sim);
    report
}
