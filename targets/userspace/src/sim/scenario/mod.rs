//! Scenarios: worlds with a purpose, which find something or do not.
//!
//! Each builds a [`Simulation`] from a seed, runs real kernels with their components in it, and says in a [`Report`] what
//! it saw. [`run`] is what `anykernel simulate` and the tests call.

mod datagrams;
mod faults;
mod grid;
mod httpd;
mod image;
mod power;
mod selftest;
mod tasks;
mod transfer;

pub use faults::{FaultRange, once as run_with_faults, served_file, sweep as sweep_faults};
pub use power::{Wreck, sweep as sweep_power_cuts, wreck};

use super::{LinkModel, Schedule, SimConfig, SimHost, Simulation};
use anykernel::config::{Config, Interface};
use anykernel::{Kernel, StartError};
use hypercall::{Host, HostBlock, HostLink};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::Arc;

/// How a scenario is to be run. In a file each key may be left out.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// One of [`SCENARIOS`].
    pub scenario: String,
    /// Everything random comes from it.
    pub seed: u64,
    /// Virtual seconds.
    pub seconds: u64,
    /// Nodes, where their number is not given by the scenario.
    pub nodes: u32,
    /// CPUs of each node.
    pub cpus: u32,
    /// What segments do to frames.
    pub link: LinkModel,
    /// Who runs next.
    pub schedule: Schedule,
    /// Images for scenarios that take some: `FILE`, `FILE:ro` or `FILE:rw`. One that can be written is written back.
    pub disks: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            scenario: "transfer".into(),
            seed: 1,
            seconds: 60,
            nodes: 2,
            cpus: 1,
            link: LinkModel::default(),
            schedule: Schedule::Turns,
            disks: Vec::new(),
        }
    }
}

/// What a run came to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// Which scenario.
    pub scenario: String,
    /// With which seed.
    pub seed: u64,
    /// Hash over everything that happened.
    pub trace_hash: u64,
    /// Virtual time at the end.
    pub virtual_ns: u64,
    /// Hypercalls.
    pub hypercalls: u64,
    /// What was done, by name.
    pub counters: BTreeMap<String, u64>,
    /// What went wrong, a line each.
    pub findings: Vec<String>,
    /// What the application on a node said of its kernel, in scenarios where it does.
    pub verdicts: Vec<Verdict>,
}

/// What a check came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Its name.
    pub check: String,
    /// `pass`, `fail` or `absent`.
    pub status: String,
    /// Why it is not `pass`.
    pub reason: String,
}

impl Report {
    fn new(options: &Options) -> Self {
        Self { scenario: options.scenario.clone(), seed: options.seed, ..Self::default() }
    }

    fn count(&mut self, name: &str, n: u64) {
        *self.counters.entry(name.into()).or_default() += n;
    }

    fn find(&mut self, line: impl Into<String>) {
        self.findings.push(line.into());
    }

    /// Takes in what the world itself says.
    fn close(&mut self, sim: &Simulation) {
        self.virtual_ns += sim.now_ns();
        self.hypercalls += sim.steps();
        self.trace_hash = self.trace_hash.rotate_left(1) ^ sim.trace_hash();
        for panicked in sim.panics() {
            self.find(panicked.to_string());
        }
    }
}

type Scenario = (&'static str, &'static str, fn(&Options) -> Report);

/// All scenarios: name, what it does, and the function.
pub const SCENARIOS: &[Scenario] = &[
    (
        "transfer",
        "every node sends to its neighbour over TCP on one segment; each byte is checked",
        transfer::run,
    ),
    ("tasks", "threads of one node wake each other, take locks, open and close sockets", tasks::run),
    ("datagrams", "fragmented datagrams over a link that changes their order", datagrams::run),
    ("grid", "routers in a grid ping each other over static routes", grid::run),
    ("httpd", "clients fetch a file from a server and check every byte", httpd::run),
    (
        "power-cuts",
        "a node writes files and its power fails at every write; what was synced must be there",
        power::run,
    ),
    (
        "selftest",
        "a node checks its kernel and the disks given with --disk; a client fetches their files over HTTP",
        selftest::run,
    ),
    ("faults", "every hypercall of a node that boots, works and shuts down fails once", faults::run),
    (faults::HTTPD, "the same of a node that serves a file over HTTP", faults::run),
];

/// Runs the scenario that `options` name. Errors: there is none of that name, in one line that lists them.
pub fn run(options: &Options) -> Result<Report, String> {
    let found = SCENARIOS.iter().find(|(name, ..)| *name == options.scenario);
    let (_, _, run) = found.ok_or_else(|| {
        let names: Vec<_> = SCENARIOS.iter().map(|(name, ..)| *name).collect();
        format!(
            "there is no scenario {:?}: take one of {}, or the file of one",
            options.scenario,
            names.join(", ")
        )
    })?;
    Ok(run(options))
}

impl Options {
    fn sim_config(&self) -> SimConfig {
        SimConfig::seeded(self.seed).schedule(self.schedule)
    }
}

/// A configuration with one interface that has this address.
fn with_address(address: &str) -> Config {
    let interface = Interface { ipv4: address.into(), ipv6: "none".into(), ..Interface::default() };
    Config { hostname: "sim".into(), log: "off".into(), interfaces: vec![interface], ..Config::default() }
}

/// Boots a kernel on the calling thread, lets `app` use it, and shuts it down. The second result is how many still hold
/// the kernel then: 0 unless it leaks.
fn with_kernel<H: Host + HostBlock + HostLink, R>(
    host: H,
    config: Config,
    app: impl FnOnce(&Arc<Kernel<H>>) -> R,
) -> (Result<R, StartError>, usize) {
    let kernel = Kernel::new(host, config);
    let running = Running(kernel.clone());
    let result = crate::start_components(&kernel).map(|()| app(&kernel));
    drop(running);
    (result, Arc::strong_count(&kernel) - 1)
}

/// Shuts a kernel down also when its thread is unwound, so that nothing of it keeps the rest alive.
struct Running<H: Host>(Arc<Kernel<H>>);

impl<H: Host> Drop for Running<H> {
    fn drop(&mut self) {
        self.0.shutdown();
    }
}

/// Serves with an application until the world ends.
fn serve(
    sim: &Simulation,
    host: SimHost,
    config: Config,
    app: fn(&Arc<Kernel<SimHost>>) -> hypercall::ExitStatus,
) {
    use hypercall::{ThreadSpec, Threads};
    let main = move || {
        // How it ended shows on the console.
        let _ = with_kernel(host, config, app);
    };
    let started = host.spawn(ThreadSpec { name: "main", cpu: None }, Box::new(main));
    debug_assert!(started.is_ok(), "a node that is up has threads at {} ns", sim.now_ns());
}

/// What byte `at` of a stream or file is.
fn pattern(seed: u64, at: usize) -> u8 {
    let at = at as u64;
    (at ^ at >> 8 ^ at >> 16 ^ seed.wrapping_mul(0x9e37_79b9) >> 16) as u8
}

fn patterned(seed: u64, len: usize) -> Vec<u8> {
    (0..len).map(|at| pattern(seed, at)).collect()
}
