//! What `anykernel fuzz` does: builds a target of `fuzz/`, runs workers, shows how it goes, and makes a reproducer of each
//! distinct finding.
//!
//! The targets are ordinary libFuzzer programs, also for cargo-fuzz, OSS-Fuzz and ClusterFuzzLite; this drives cargo itself,
//! with the flags of coverage on the compiler that is there.

mod build;
mod coverage;
mod finding;
mod progress;
mod reproducer;
mod worker;

pub use build::{Sanitizer, names, targets};
pub use coverage::report;
pub use finding::reproduce;
pub use reproducer::is_reproducer;

use crate::{Failure, interrupt};
use finding::Finding;
use progress::{Progress, Show};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};
use worker::{Event, Worker};

/// The same bug this often, and the search for others stops: it is in the way.
const SAME_AGAIN: usize = 3;

/// What to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which target.
    pub target: String,
    /// How long, in seconds; 0: until interrupted, or until `runs`.
    pub seconds: u64,
    /// How many executions by each worker; 0: no bound.
    pub runs: u64,
    /// How many processes.
    pub workers: usize,
    /// A bug of `docs/planted-bugs.md`, to test the tool itself; `none`: a build that could have one, and has none.
    pub plant: Option<String>,
    /// What watches memory.
    pub sanitizer: Sanitizer,
    /// Stop at the first finding.
    pub first: bool,
    /// How to show it.
    pub json: bool,
}

impl Options {
    /// The bug that grows.
    fn planted(&self) -> Option<&str> {
        self.plant.as_deref().filter(|name| *name != "none")
    }

    /// Has the bug grow in a program of a target.
    fn plant(&self, command: &mut Command) {
        if let Some(plant) = &self.plant {
            command.env("ANYKERNEL_PLANT", plant);
        }
    }
}

/// How it went.
#[derive(Debug)]
pub struct Outcome {
    /// Inputs executed by all workers.
    pub executions: u64,
    /// Edges of the program that were reached.
    pub coverage: u64,
    /// Distinct bugs, with their reproducers: what it is, and where the file is.
    pub findings: Vec<(String, PathBuf)>,
}

/// Fuzzes. Context: the main thread. Blocks for as long as asked for.
pub fn run(options: &Options) -> Result<Outcome, Failure> {
    build::build(std::slice::from_ref(&options.target), options)?;
    fuzz(options)
}

/// Fuzzes every target in turn; `seconds` is for all of them together. What is found in one does not keep the others from
/// their turn. Context and blocking as [`run`].
pub fn run_all(options: &Options) -> Result<Vec<(String, Outcome)>, Failure> {
    let names = names()?;
    build::build(&names, options)?;
    let end = Instant::now() + Duration::from_secs(options.seconds);
    let mut outcomes = Vec::new();
    for (index, name) in names.iter().enumerate() {
        let mut options = Options { target: name.clone(), ..options.clone() };
        if options.seconds > 0 {
            let left = end.saturating_duration_since(Instant::now()).as_secs_f64();
            options.seconds = ((left / (names.len() - index) as f64).round() as u64).max(1);
        }
        let outcome = fuzz(&options)?;
        let found = !outcome.findings.is_empty();
        outcomes.push((name.clone(), outcome));
        if interrupt::interrupted() || options.first && found {
            break;
        }
    }
    Ok(outcomes)
}

/// Fuzzes with programs that were built.
fn fuzz(options: &Options) -> Result<Outcome, Failure> {
    let program = build::program(&options.target, options)?;
    let folders = build::folders(&options.target, options.plant.as_deref())?;
    let (send, events) = std::sync::mpsc::channel();
    let start = Instant::now();
    let end = (options.seconds > 0).then(|| start + Duration::from_secs(options.seconds));
    let workers = options.workers.max(1);
    let mut running = Vec::new();
    for index in 0..workers {
        running.push(Worker::start(index, &program, &folders, options, end, send.clone())?);
    }
    let show = match (options.json, std::io::IsTerminal::is_terminal(&std::io::stderr())) {
        (true, _) => Show::Json,
        (false, true) => Show::Screen,
        (false, false) => Show::Lines,
    };
    let mut progress = Progress::new(&options.target, workers, show);
    let mut findings: Vec<Finding> = Vec::new();
    // `stopped`: by us. What is said by who did not end by himself is nothing to tell.
    let (mut left, mut stopped) = (workers, false);
    while left > 0 {
        let event = events.recv_timeout(Duration::from_millis(250));
        let late = end.is_some_and(|end| Instant::now() > end + Duration::from_secs(30));
        if interrupt::interrupted() || late {
            stopped = true;
            running.iter_mut().for_each(Worker::stop);
        }
        match event {
            Ok(Event::Status { worker, status }) => progress.update(worker, status),
            Ok(Event::Ended { worker, artifact, said }) => {
                let Some(artifact) = artifact else {
                    if !said.is_empty() && !stopped {
                        running.iter_mut().for_each(Worker::stop);
                        return Err(Failure::new(format!("the fuzzer ended by itself:\n{said}")));
                    }
                    left -= 1;
                    continue;
                };
                progress.crash();
                let known = finding::examine(&program, &folders, options, &artifact, &said, &mut findings)?;
                let stop = options.first || findings[known].times >= SAME_AGAIN;
                progress.distinct(findings.len());
                if findings[known].times == 1 {
                    progress.say(&findings[known].tell(options, progress.executions(), start.elapsed()));
                }
                if stop {
                    stopped = true;
                    running.iter_mut().for_each(Worker::stop);
                    left -= 1;
                } else if end.is_none_or(|end| Instant::now() < end) && !stopped {
                    running[worker] = Worker::start(worker, &program, &folders, options, end, send.clone())?;
                    progress.restarted(worker);
                } else {
                    left -= 1;
                }
            }
            Err(_) => progress.show(),
        }
    }
    progress.finish(start.elapsed());
    Ok(Outcome {
        executions: progress.executions(),
        coverage: progress.coverage(),
        findings: findings.into_iter().map(|finding| (finding.what, finding.reproducer)).collect(),
    })
}
