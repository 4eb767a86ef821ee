//! What a packet costs with 10, 1,000 and 10,000 idle connections beside the one that is measured: two stacks in
//! one process on a wire in memory, polled by one thread.
//!
//! `cargo bench -p anykernel-net --features testing --bench flows [-- --runs N]` prints one JSON object a line. The peer of each row is
//! the same measurement with 10 idle connections, so a ratio near 1 says that the cost does not grow.

use anykernel_net::Limits;
use anykernel_net::testing::{Connection, Pair};
use std::time::Instant;

const BULK_BYTES: usize = 256 << 20;
const REQUESTS: usize = 200_000;
const IDLE: [usize; 3] = [10, 1_000, 10_000];

fn main() {
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let mut runs = 5;
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--runs" => {
                runs = args.next().and_then(|n| n.parse().ok()).filter(|n| *n > 0).unwrap_or_else(|| usage())
            }
            _ => usage(),
        }
    }
    for mtu in [1500, 9000] {
        let mut worlds: Vec<_> = IDLE.iter().map(|idle| (*idle, prepare(*idle, mtu))).collect();
        // Rows of one run are measured one after the other, so that what else the machine does hits all of them.
        let mut bulk = vec![Vec::new(); IDLE.len()];
        let mut requests = vec![Vec::new(); IDLE.len()];
        for _ in 0..runs {
            for (row, (idle, (pair, active))) in worlds.iter_mut().enumerate() {
                let mut data = vec![0x5a; 64 << 10];
                let start = Instant::now();
                assert!(
                    pair.bulk(*active, BULK_BYTES, &mut data),
                    "bulk with {idle} idle connections stopped"
                );
                bulk[row].push(BULK_BYTES as f64 * 8e-9 / start.elapsed().as_secs_f64());
                let start = Instant::now();
                assert!(pair.request_response(*active, REQUESTS, 64), "an answer was lost with {idle} idle");
                requests[row].push(REQUESTS as f64 / start.elapsed().as_secs_f64());
            }
        }
        for (row, idle) in IDLE.iter().enumerate() {
            print(&format!("bulk, MTU {mtu}, {idle} idle"), "Gb/s", &bulk[row], &bulk[0]);
            print(
                &format!("64 B request/response, MTU {mtu}, {idle} idle"),
                "1/s",
                &requests[row],
                &requests[0],
            );
        }
    }
}

fn usage() -> ! {
    eprintln!("usage: flows [--runs N]");
    std::process::exit(2)
}

fn prepare(idle: usize, mtu: u16) -> (Pair, Connection) {
    let limits = Limits {
        receive_bytes: 4096,
        send_bytes: 4096,
        connections: 100_000,
        udp_bytes: 65_536,
        reassembly_bytes: 65_536,
    };
    let mut pair = Pair::new(limits, mtu);
    for n in 0..idle {
        pair.connect().unwrap_or_else(|| panic!("connection {n} did not come to be"));
    }
    pair.set_buffers(256 << 10, 256 << 10);
    let active = pair.connect().expect("the active connection");
    assert_eq!(pair.connections(), idle + 1);
    // The congestion window opens before anything is measured.
    assert!(pair.bulk(active, 16 << 20, &mut vec![0; 64 << 10]));
    (pair, active)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn print(case: &str, unit: &str, ours: &[f64], theirs: &[f64]) {
    let ratios: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
    let ratio = median(&ratios);
    let spread = (ratios.iter().copied().fold(f64::MIN, f64::max)
        - ratios.iter().copied().fold(f64::MAX, f64::min))
        / ratio;
    println!(
        r#"{{"bench":"flows","case":"{case}","target":"userspace","unit":"{unit}","ours":{:.3},"peer":"10 idle connections","theirs":{:.3},"ratio":{ratio:.3},"runs":{},"spread":{spread:.3}}}"#,
        median(ours),
        median(theirs),
        ours.len()
    );
}
