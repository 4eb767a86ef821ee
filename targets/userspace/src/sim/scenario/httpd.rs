//! The file server under loss: one node serves, the others fetch a file again and again and check every byte.

use super::{Options, Report, pattern, patterned, with_address, with_kernel};
use crate::sim::{NodeSetup, SECOND, SimConfig, SimHost, Simulation};
use anykernel::Kernel;
use anykernel::fs::OpenOptions;
use anykernel::socket::{Result, TcpStream};
use anykernel::task::block_on_until;
use hypercall::{Clock, ExitStatus, ThreadSpec, Threads};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

const FILE_BYTES: usize = 200_000;
const SERVER: [u8; 4] = [10, 8, 0, 1];

#[derive(Default)]
struct Tally {
    fetched: AtomicU64,
    /// Fetches that ended with an error: allowed, but counted.
    broken: AtomicU64,
    findings: Mutex<Vec<String>>,
}

fn server(kernel: &Arc<Kernel<SimHost>>) -> ExitStatus {
    let Some(files) = kernel.namespace() else { return ExitStatus::Failure };
    let Ok(file) = files.open(b"/file", OpenOptions::CREATE) else { return ExitStatus::Failure };
    let content = patterned(5, FILE_BYTES);
    let mut at = 0;
    while at < content.len() {
        match file.write_at(at as u64, &content[at..]) {
            Ok(n) if n > 0 => at += n,
            _ => return ExitStatus::Failure,
        }
    }
    httpd::main(kernel)
}

/// The body of an answer of 200, or how the connection failed.
pub(super) async fn fetch(
    kernel: &Kernel<SimHost>,
    server: SocketAddr,
    path: &str,
) -> Result<Option<Vec<u8>>> {
    let Some(sockets) = kernel.sockets() else { return Ok(None) };
    let stream = TcpStream::connect(&*sockets, server).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: sim\r\nConnection: close\r\n\r\n");
    stream.send_all(request.as_bytes()).await?;
    let mut all = Vec::new();
    let mut buf = vec![0; 16 << 10];
    loop {
        match stream.recv(&mut buf).await? {
            0 => break,
            n => all.extend_from_slice(&buf[..n]),
        }
    }
    let head = all.windows(4).position(|four| four == b"\r\n\r\n");
    Ok(head.filter(|_| all.starts_with(b"HTTP/1.1 200")).map(|at| all.split_off(at + 4)))
}

fn client(host: SimHost, number: u32, end_ns: u64, tally: &Tally) {
    let config = with_address(&format!("10.8.{}.{}/16", number / 250, number % 250 + 2));
    let (result, _) = with_kernel(host, config, |kernel| {
        host.park(&0.into(), 0, Some(SECOND));
        while host.monotonic_ns() < end_ns {
            let deadline = host.monotonic_ns() + 300 * SECOND;
            match block_on_until(host, fetch(kernel, (SERVER, 80).into(), "/file"), Some(deadline)) {
                Some(Ok(Some(body))) => {
                    let right =
                        body.len() == FILE_BYTES && (0..FILE_BYTES).all(|at| body[at] == pattern(5, at));
                    if right {
                        tally.fetched.fetch_add(1, Relaxed);
                    } else {
                        let line = format!("client {number}: {} bytes that are not the file", body.len());
                        tally.findings.lock().expect("one thread").push(line);
                    }
                }
                Some(Ok(None)) => {
                    tally
                        .findings
                        .lock()
                        .expect("one thread")
                        .push(format!("client {number}: no answer of 200"));
                }
                Some(Err(_)) => {
                    tally.broken.fetch_add(1, Relaxed);
                }
                None => {
                    let line = format!("client {number}: a fetch hangs for 300 s");
                    tally.findings.lock().expect("one thread").push(line);
                }
            }
        }
    });
    if let Err(error) = result {
        tally.findings.lock().expect("one thread").push(format!("client {number}: {error}"));
    }
}

pub(super) fn run(options: &Options) -> Report {
    let mut report = Report::new(options);
    let end_ns = options.seconds * SECOND;
    let sim = Simulation::new(SimConfig { time_limit_ns: end_ns + 900 * SECOND, ..options.sim_config() });
    let mut link = options.link.clone();
    link.bits_per_second.get_or_insert(10_000_000);
    let wire = sim.segment(link);
    let setup = |name: &str| NodeSetup { cpus: options.cpus, links: vec![wire], ..NodeSetup::named(name) };
    let host = sim.node(setup("server"));
    let mut config = with_address("10.8.0.1/16");
    config.app = ["httpd", "--port", "80", "--root", "/"].map(Into::into).into();
    super::serve(&sim, host, config, server);
    let tally = Arc::new(Tally::default());
    let mut threads = Vec::new();
    for number in 0..options.nodes.max(2) - 1 {
        let host = sim.node(setup(&format!("client{number}")));
        let tally = tally.clone();
        let body = move || client(host, number, end_ns, &tally);
        threads.push((host, host.spawn(ThreadSpec { name: "main", cpu: None }, Box::new(body))));
    }
    for (host, thread) in threads {
        if let Ok(thread) = thread
            && let Err(failure) = sim.wait_for(host, thread)
        {
            report.find(failure.to_string());
            break;
        }
    }
    report.count("fetched", tally.fetched.load(Relaxed));
    report.count("broken", tally.broken.load(Relaxed));
    for (name, n) in sim.segment_counters(wire).list() {
        report.count(&format!("frames_{name}"), n);
    }
    report.findings.append(&mut tally.findings.lock().expect("one thread"));
    report.close(&sim);
    report
}
