//! TCP between neighbours on one segment: each node sends a stream to the next one, which checks every byte.

use super::{Options, Report, pattern, with_address, with_kernel};
use crate::sim::{NodeSetup, SECOND, SimConfig, SimHost, Simulation};
use anykernel::Kernel;
use anykernel::socket::{Result, TcpListener, TcpStream};
use anykernel::task::block_on_until;
use hypercall::{Clock, ThreadSpec, Threads};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

const PORT: u16 = 7000;
/// What is sent at a time, with a rest between.
const BURST: usize = 64 << 10;

#[derive(Default)]
struct Tally {
    sent: AtomicU64,
    received: AtomicU64,
    findings: Mutex<Vec<String>>,
}

/// The address of a node; at most 250 a row.
fn address(node: u32) -> [u8; 4] {
    [10, 7, (node / 250) as u8, (node % 250 + 1) as u8]
}

async fn receive(listener: TcpListener, from: u32, tally: &Tally) -> Result<()> {
    let stream = listener.accept().await?;
    let mut buf = vec![0; 32 << 10];
    let mut at = 0;
    loop {
        let n = stream.recv(&mut buf).await?;
        if n == 0 {
            return Ok(());
        }
        if let Some(wrong) = (0..n).find(|index| buf[*index] != pattern(from.into(), at + index)) {
            let line = format!("the stream of node {from} is wrong at byte {}", at + wrong);
            tally.findings.lock().expect("one thread").push(line);
            return Ok(());
        }
        at += n;
        tally.received.fetch_add(n as u64, Relaxed);
    }
}

async fn send(kernel: &Kernel<SimHost>, from: u32, to: u32, end_ns: u64, tally: &Tally) -> Result<()> {
    let Some(sockets) = kernel.sockets() else { return Ok(()) };
    let host = kernel.host();
    let stream = TcpStream::connect(&*sockets, (address(to), PORT).into()).await?;
    let mut at = 0;
    while host.monotonic_ns() < end_ns {
        let data: Vec<u8> = (at..at + BURST).map(|at| pattern(from.into(), at)).collect();
        stream.send_all(&data).await?;
        at += BURST;
        tally.sent.fetch_add(BURST as u64, Relaxed);
    }
    stream.flush().await?;
    stream.0.shutdown(anykernel::socket::Shutdown::Write)
}

/// A node: one thread receives, the main thread sends.
fn node(host: SimHost, number: u32, nodes: u32, end_ns: u64, tally: Arc<Tally>) {
    let config = with_address(&format!("{}/16", std::net::Ipv4Addr::from(address(number))));
    let complain = move |tally: &Tally, what: &str, result: Option<Result<()>>| {
        let line = match result {
            Some(Ok(())) => return,
            Some(Err(error)) => format!("node {number} {what}: {error}"),
            None => format!("node {number} {what}: not done in time"),
        };
        tally.findings.lock().expect("one thread").push(line);
    };
    let (result, held) = with_kernel(host, config, |kernel| {
        let Some(sockets) = kernel.sockets() else { return };
        let last_ns = end_ns + 120 * SECOND;
        let Ok(listener) = sockets.listen(([0, 0, 0, 0], PORT).into(), 4) else { return };
        let its = tally.clone();
        let from = (number + nodes - 1) % nodes;
        let receiver = kernel.spawn("receiver", None, move || {
            let result = block_on_until(host, receive(TcpListener(listener), from, &its), Some(last_ns));
            complain(&its, "receives", result);
            its.received.fetch_add(0, Relaxed);
        });
        if let Err(error) = receiver {
            tally.findings.lock().expect("one thread").push(error.to_string());
        }
        // Everybody listens by then.
        host.park(&0.into(), 0, Some(SECOND));
        let to = (number + 1) % nodes;
        let result = block_on_until(host, send(kernel, number, to, end_ns, &tally), Some(last_ns));
        complain(&tally, "sends", result);
        // The neighbour may have to send again what got lost.
        host.park(&0.into(), 0, Some(last_ns));
    });
    if let Err(error) = result {
        tally.findings.lock().expect("one thread").push(format!("node {number}: {error}"));
    }
    if held > 0 {
        tally
            .findings
            .lock()
            .expect("one thread")
            .push(format!("node {number}: its kernel is held {held} times"));
    }
}

pub(super) fn run(options: &Options) -> Report {
    let mut report = Report::new(options);
    let end_ns = options.seconds * SECOND;
    let sim = Simulation::new(SimConfig { time_limit_ns: end_ns + 600 * SECOND, ..options.sim_config() });
    let mut link = options.link.clone();
    // Without a rate virtual time hardly passes and the number of bytes has no bound.
    link.bits_per_second.get_or_insert(10_000_000);
    let wire = sim.segment(link);
    let tally = Arc::new(Tally::default());
    let nodes = options.nodes.max(2);
    let mut hosts = Vec::new();
    for number in 0..nodes {
        let setup =
            NodeSetup { cpus: options.cpus, links: vec![wire], ..NodeSetup::named(&format!("n{number}")) };
        let host = sim.node(setup);
        let tally = tally.clone();
        let body = move || node(host, number, nodes, end_ns, tally);
        let thread = host.spawn(ThreadSpec { name: "main", cpu: None }, Box::new(body));
        hosts.push((host, thread));
    }
    if let Err(failure) = sim.run_for(end_ns + 130 * SECOND) {
        report.find(failure.to_string());
    }
    for (host, thread) in &hosts {
        if let Ok(thread) = thread
            && sim.exit_status(*host).is_none()
        {
            // All have ended by now, or have panicked, which is reported.
            let _ = host.join(*thread);
        }
        let leaks = sim.leaks(*host);
        if leaks.any() {
            report.find(format!("node {}: leaks: {leaks}", host.index()));
        }
    }
    report.count("bytes_sent", tally.sent.load(Relaxed));
    report.count("bytes_received", tally.received.load(Relaxed));
    for (name, n) in sim.segment_counters(wire).list() {
        report.count(&format!("frames_{name}"), n);
    }
    report.findings.append(&mut tally.findings.lock().expect("one thread"));
    report.close(&sim);
    report
}
