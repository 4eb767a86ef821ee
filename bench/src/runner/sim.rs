//! The simulation on one core: how long a network takes to live, and to come up.

use super::Result;
use crate::record::{Better, Record};
use anykernel_userspace::sim::scenario::{self, Options, Report};
use anykernel_userspace::sim::{LinkModel, SECOND};
use std::time::Instant;

const RUNS: usize = 3;

/// Runs a scenario; how long it took in seconds, and what it came to.
fn timed(options: &Options) -> Result<(f64, Report)> {
    let start = Instant::now();
    let report = scenario::run(options)?;
    let seconds = start.elapsed().as_secs_f64();
    match report.findings.first() {
        None if report.virtual_ns < options.seconds * SECOND => {
            Err(format!("only {} virtual s went by, not {}", report.virtual_ns / SECOND, options.seconds))
        }
        None => Ok((seconds, report)),
        Some(line) => Err(format!("the scenario {} found something: {line}", options.scenario)),
    }
}

/// The median of some runs beside what was asked for.
fn record(
    case: &str,
    asked_s: f64,
    options: &Options,
    note: impl FnOnce(&Report) -> String,
) -> Result<Record> {
    let mut ours = Vec::new();
    let mut last = Report::default();
    for _ in 0..RUNS {
        let (seconds, report) = timed(options)?;
        ours.push(seconds);
        last = report;
    }
    let asked = [asked_s; RUNS];
    let id = ("sim", case, "userspace");
    Ok(Record::new(id, "s", Better::Lower, &ours, ("asked for", &asked)).goal(1.0).note(note(&last)))
}

/// Both rows.
pub fn records() -> Result {
    let link =
        LinkModel { bits_per_second: Some(100_000), send_queue_bytes: 16 << 10, ..LinkModel::default() };
    // Everybody sends all the time; afterwards the scenario goes on for 130 s.
    let network =
        Options { scenario: "transfer".into(), nodes: 100, seconds: 1000, link, ..Options::default() };
    let network = record("simulation, 100 nodes for 1,000 virtual s", 60.0, &network, |report| {
        let (bytes, frames) = (report.counters["bytes_received"], report.counters["frames_delivered"]);
        format!(
            "{} virtual s, {bytes} bytes over TCP in {frames} frames, {} hypercalls",
            report.virtual_ns / SECOND,
            report.hypercalls
        )
    })?;
    let grid = Options { scenario: "grid".into(), nodes: 255, seconds: 0, ..Options::default() };
    let grid = record("simulation, 255 routers up and pinged", 1.0, &grid, |report| {
        let (pings, forwarded) = (report.counters["pings_answered"], report.counters["forwarded"]);
        format!("{pings} pings answered over {forwarded} hops; rump kernels, as quoted: under 8 s")
    })?;
    Ok(vec![network, grid])
}
