//! `simulate`.

use super::{Outcome, output_failure};
use anykernel_userspace::Failure;
use anykernel_userspace::sim::scenario::{self, Options, Report, SCENARIOS};
use anykernel_userspace::sim::{MS, Schedule};
use clap::Args;
use hypercall::ExitStatus;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::io::Write;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Run a whole world of instances on one virtual clock, the same way each time
#[derive(Args)]
#[command(after_help = "Examples:
  anykernel simulate --list                          what there is
  anykernel simulate transfer --seed 7 --loss 2      TCP with 2 % loss
  anykernel simulate grid --nodes 255                255 routers that ping each other
  anykernel simulate power-cuts --seeds 1..100       a hundred seeds on all cores
  anykernel simulate selftest --disk disk.ext4       the checks of every target, on this host
  anykernel simulate my.json --seed 3                {\"scenario\": \"httpd\", \"link\": {\"loss_ppm\": 50000}}

The same seed gives the same trace hash on every machine. Exit status 1: something was found.")]
pub(super) struct Simulate {
    /// A scenario, or a JSON file of one
    #[arg(required_unless_present = "list")]
    scenario: Option<String>,
    /// Where everything random comes from
    #[arg(long, value_name = "N", conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Run the seeds A to B-1, on all cores
    #[arg(long, value_name = "A..B", value_parser = parse_range)]
    seeds: Option<Range<u64>>,
    /// Virtual seconds
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    seconds: Option<u64>,
    /// Nodes, where the scenario leaves that open
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=4096))]
    nodes: Option<u32>,
    /// CPUs of each node
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: Option<u32>,
    /// Frames that get lost, in percent
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent)]
    loss: Option<u32>,
    /// Who runs next: turns, random, or priorities
    #[arg(long, value_name = "NAME", value_parser = parse_schedule)]
    schedule: Option<Schedule>,
    /// A disk image for scenarios that take one; written back with :rw
    #[arg(long = "disk", value_name = "FILE[:rw]", conflicts_with = "seeds")]
    disks: Vec<String>,
    /// How many seeds at a time; as many as there are CPUs
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    jobs: Option<u16>,
    /// List the scenarios
    #[arg(long)]
    list: bool,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

fn parse_range(text: &str) -> Result<Range<u64>, String> {
    let range = text.split_once("..").and_then(|(a, b)| Some(a.parse().ok()?..b.parse().ok()?));
    range
        .filter(|range| !range.is_empty())
        .ok_or_else(|| "write the first seed and the one after the last, as in 1..100".into())
}

fn verdicts(report: &Report) -> Vec<Value> {
    let verdicts = report.verdicts.iter();
    verdicts.map(|one| json!({ "check": one.check, "status": one.status, "reason": one.reason })).collect()
}

/// Percent to parts of a million.
fn parse_percent(text: &str) -> Result<u32, String> {
    let percent: f64 = text.parse().map_err(|_| "write percent, as in 2 or 0.5")?;
    if !(0.0..=100.0).contains(&percent) {
        return Err("percent go from 0 to 100".into());
    }
    Ok((percent * 10_000.0).round() as u32)
}

fn parse_schedule(text: &str) -> Result<Schedule, String> {
    match text {
        "turns" => Ok(Schedule::Turns),
        "random" => Ok(Schedule::Random { switch_ppm: 50_000 }),
        "priorities" => Ok(Schedule::Priorities { depth: 3, steps: 100_000 }),
        _ => Err("there are turns, random and priorities".into()),
    }
}

impl Simulate {
    pub(super) fn run(self) -> Outcome {
        if self.list {
            return self.show_list();
        }
        // Nodes fail on purpose, and say so thousands of times.
        log::set_max_level(log::LevelFilter::Off);
        let (options, file) = self.options()?;
        // Seen before hundreds of threads find it out.
        if !SCENARIOS.iter().any(|(name, ..)| *name == options.scenario) {
            return Err(Failure::usage(scenario::run(&options).err().unwrap_or_default()));
        }
        let seeds = self.seeds.clone().unwrap_or(options.seed..options.seed + 1);
        let failed = self.sweep(&options, seeds)?;
        if failed.is_empty() {
            return Ok(ExitStatus::Success);
        }
        let what = file.unwrap_or_else(|| options.scenario.clone());
        let repeat = self.repeat(&what, failed[0]);
        Err(Failure::new(format!(
            "{} of the runs found something, the first with seed {}: repeat it with `{repeat}`",
            failed.len(),
            failed[0]
        )))
    }

    fn show_list(&self) -> Outcome {
        let mut out = std::io::stdout().lock();
        for (name, summary, _) in SCENARIOS {
            let line = if self.json {
                json!({ "scenario": name, "summary": summary }).to_string()
            } else {
                format!("{name:<12}{summary}")
            };
            writeln!(out, "{line}").map_err(output_failure)?;
        }
        Ok(ExitStatus::Success)
    }

    /// What the file and the command line say, and the file's name.
    fn options(&self) -> Result<(Options, Option<String>), Failure> {
        let name = self.scenario.clone().unwrap_or_default();
        let is_file = name.ends_with(".json");
        let mut options = if is_file {
            let text =
                std::fs::read_to_string(&name).map_err(|error| Failure::usage(format!("{name}: {error}")))?;
            serde_json::from_str(&text).map_err(|error| {
                Failure::usage(format!(
                    "{name}: {error}; `anykernel simulate --help` shows what such a file is like"
                ))
            })?
        } else {
            Options { scenario: name.clone(), ..Options::default() }
        };
        options.seed = self.seed.unwrap_or(options.seed);
        options.seconds = self.seconds.unwrap_or(options.seconds);
        options.nodes = self.nodes.unwrap_or(options.nodes);
        options.cpus = self.cpus.unwrap_or(options.cpus);
        options.schedule = self.schedule.unwrap_or(options.schedule);
        options.disks.extend(self.disks.iter().cloned());
        options.link.loss_ppm = self.loss.unwrap_or(options.link.loss_ppm);
        Ok((options, is_file.then_some(name)))
    }

    /// Runs every seed, shows each report, and returns the seeds that found something, in order.
    fn sweep(&self, options: &Options, seeds: Range<u64>) -> Result<Vec<u64>, Failure> {
        let many = seeds.end - seeds.start > 1;
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        let jobs = self.jobs.map_or(cores, u64::from).min(seeds.end - seeds.start);
        let bar = if many { ProgressBar::new(seeds.end - seeds.start) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} seeds, {per_sec}, {msg}") {
            bar.set_style(style);
        }
        bar.set_message("nothing found");
        let next = AtomicU64::new(seeds.start);
        let failed = Mutex::new(Vec::new());
        let broken = Mutex::new(None);
        std::thread::scope(|scope| {
            for _ in 0..jobs {
                scope.spawn(|| {
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= seeds.end || broken.lock().is_ok_and(|broken| broken.is_some()) {
                            return;
                        }
                        let Ok(report) = scenario::run(&Options { seed, ..options.clone() }) else { return };
                        if !report.findings.is_empty()
                            && let Ok(mut failed) = failed.lock()
                        {
                            failed.push(seed);
                            bar.set_message(format!("{} found something", failed.len()));
                        }
                        let shown = bar.suspend(|| self.show(&report, many));
                        if let (Err(error), Ok(mut broken)) = (shown, broken.lock()) {
                            *broken = Some(error);
                        }
                        bar.inc(1);
                    }
                });
            }
        });
        bar.finish_and_clear();
        if let Ok(Some(error)) = broken.into_inner() {
            return Err(output_failure(error));
        }
        let mut failed = failed.into_inner().unwrap_or_default();
        failed.sort_unstable();
        Ok(failed)
    }

    /// Of many runs only those are shown that found something, unless a program reads it.
    fn show(&self, report: &Report, many: bool) -> std::io::Result<()> {
        let mut out = std::io::stdout().lock();
        let hash = format!("{:016x}", report.trace_hash);
        if self.json {
            let line = json!({
                "scenario": report.scenario, "seed": report.seed, "trace_hash": hash,
                "virtual_ns": report.virtual_ns, "hypercalls": report.hypercalls,
                "counters": report.counters, "findings": report.findings, "verdicts": verdicts(report),
            });
            return writeln!(out, "{line}");
        }
        if many && report.findings.is_empty() {
            return Ok(());
        }
        writeln!(
            out,
            "{}, seed {}: trace hash {hash}, {} virtual ms, {} hypercalls",
            report.scenario,
            report.seed,
            report.virtual_ns / MS,
            report.hypercalls
        )?;
        for (name, n) in &report.counters {
            writeln!(out, "  {name:<20} {n}")?;
        }
        report.findings.iter().try_for_each(|line| writeln!(out, "  found: {line}"))
    }

    /// The command that repeats one seed.
    fn repeat(&self, what: &str, seed: u64) -> String {
        let mut command = format!("anykernel simulate {what} --seed {seed}");
        let mut add = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                command.push_str(&format!(" --{name} {value}"));
            }
        };
        add("seconds", self.seconds.map(|n| n.to_string()));
        add("nodes", self.nodes.map(|n| n.to_string()));
        add("cpus", self.cpus.map(|n| n.to_string()));
        add("loss", self.loss.map(|ppm| (f64::from(ppm) / 10_000.0).to_string()));
        self.disks.iter().for_each(|disk| add("disk", Some(disk.clone())));
        add(
            "schedule",
            self.schedule.map(|schedule| match schedule {
                Schedule::Turns => "turns".into(),
                Schedule::Random { .. } => "random".into(),
                Schedule::Priorities { .. } => "priorities".into(),
            }),
        );
        command
    }
}
