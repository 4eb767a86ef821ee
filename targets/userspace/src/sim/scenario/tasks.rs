//! Threads of one node that get in each other's way: tasks on an executor, a queue with a condition variable, and sockets that
//! come and go. Under the schedules `random` and `priorities` it looks for lost wake-ups and locks taken in two orders.

use super::{Options, Report, with_address, with_kernel};
use crate::sim::{NodeSetup, SECOND, SimConfig, SimHost, Simulation};
use anykernel::Kernel;
use anykernel::socket::{SocketProvider, UdpSocket};
use anykernel::sync::{Condvar, Mutex};
use anykernel::task::{Executor, block_on, block_on_until};
use hypercall::Clock;
use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

const ROUNDS: u64 = 30;

/// A bounded queue, as every kernel has one somewhere.
struct Queue {
    items: Mutex<SimHost, VecDeque<u64>>,
    changed: Condvar,
}

impl Queue {
    fn put(&self, host: SimHost, item: u64) {
        let (mut items, _) = self.changed.wait_while(self.items.lock(), None, |items| items.len() >= 2);
        items.push_back(item);
        drop(items);
        self.changed.notify_all(&host);
    }

    fn take(&self, host: SimHost) -> u64 {
        let (mut items, _) = self.changed.wait_while(self.items.lock(), None, |items| items.is_empty());
        let item = items.pop_front().unwrap_or_default();
        drop(items);
        self.changed.notify_all(&host);
        item
    }
}

/// Tasks that wake each other, awaited by a thread.
fn tasks(host: SimHost, executor: &Arc<Executor<SimHost>>, done: &AtomicU64) {
    for round in 0..ROUNDS {
        let inner = executor.clone();
        let outer = executor.spawn_join(async move { inner.spawn_join(async move { round }).await });
        if block_on(host, outer).flatten() == Some(round) {
            done.fetch_add(1, Relaxed);
        }
    }
}

/// Datagrams to ourselves, each on a socket of its own.
fn sockets(host: SimHost, provider: &dyn SocketProvider, done: &AtomicU64) {
    for round in 0..ROUNDS {
        let Ok(socket) = provider.bind((Ipv4Addr::UNSPECIFIED, 0).into()).map(UdpSocket) else { continue };
        let to = (Ipv4Addr::LOCALHOST, socket.0.local_addr().port()).into();
        let mut buf = [0; 16];
        let echo = async {
            socket.send_to(&round.to_le_bytes(), to).await.ok()?;
            socket.recv_from(&mut buf).await.ok()
        };
        let got = block_on_until(host, echo, Some(host.monotonic_ns() + SECOND)).flatten();
        if got.is_some_and(|(n, _)| buf[..n] == round.to_le_bytes()) {
            done.fetch_add(1, Relaxed);
        }
    }
}

fn app(kernel: &Arc<Kernel<SimHost>>) -> Result<(u64, u64), String> {
    let host = kernel.host();
    let executor = kernel.start_executor("tasks").map_err(|error| error.to_string())?;
    let provider = kernel.sockets().ok_or("no network stack")?;
    let queue = Arc::new(Queue { items: Mutex::new(host, VecDeque::new()), changed: Condvar::new() });
    let done = Arc::new(AtomicU64::new(0));
    let ended = Arc::new(AtomicU64::new(0));
    let mut expected = 0;
    let mut threads = 0;
    let mut start = |name: &str, rounds: u64, body: Box<dyn FnOnce() + Send>| {
        let ended = ended.clone();
        expected += rounds;
        threads += 1;
        kernel.spawn(name, None, move || {
            body();
            ended.fetch_add(1, Relaxed);
        })
    };
    for _ in 0..2 {
        let (executor, its) = (executor.clone(), done.clone());
        start("tasks", ROUNDS, Box::new(move || tasks(host, &executor, &its)))
            .map_err(|error| error.to_string())?;
    }
    for _ in 0..3 {
        let (provider, its) = (provider.clone(), done.clone());
        start("sockets", ROUNDS, Box::new(move || sockets(host, &*provider, &its)))
            .map_err(|error| error.to_string())?;
    }
    let (puts, takes, its) = (queue.clone(), queue, done.clone());
    start("puts", 0, Box::new(move || (1..=ROUNDS).for_each(|item| puts.put(host, item))))
        .map_err(|error| error.to_string())?;
    start(
        "takes",
        ROUNDS,
        Box::new(move || {
            for wanted in 1..=ROUNDS {
                if takes.take(host) == wanted {
                    its.fetch_add(1, Relaxed);
                }
            }
        }),
    )
    .map_err(|error| error.to_string())?;
    // Stopping would wake whoever sleeps for good.
    while ended.load(Relaxed) < threads {
        host.sleep(SECOND / 100);
    }
    Ok((done.load(Relaxed), expected))
}

pub(super) fn run(options: &Options) -> Report {
    let mut report = Report::new(options);
    let limits = SimConfig { time_limit_ns: 100 * SECOND, step_limit: 20_000_000, ..options.sim_config() };
    let sim = Simulation::new(limits);
    let wire = sim.segment(options.link.clone());
    let host =
        sim.node(NodeSetup { cpus: options.cpus.max(2), links: vec![wire], ..NodeSetup::named("node") });
    let result = sim.run(host, "main", move || with_kernel(host, with_address("10.6.0.1/24"), app));
    match result {
        Ok((Ok(Ok((done, expected))), 0)) => {
            report.count("done", done);
            if done != expected {
                report.find(format!("only {done} of {expected} rounds came to the right end"));
            }
        }
        Ok((result, held)) => report.find(format!("{result:?}, the kernel is held {held} times")),
        Err(failure) => report.find(failure.to_string()),
    }
    let leaks = sim.leaks(host);
    if report.findings.is_empty() && leaks.any() {
        report.find(format!("leaks: {leaks}"));
    }
    report.close(&sim);
    report
}
