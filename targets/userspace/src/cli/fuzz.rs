//! `anykernel fuzz`.

use super::{Outcome, output_failure};
use anykernel_userspace::fuzz::{self, Options, Sanitizer};
use anykernel_userspace::{Failure, interrupt};
use clap::Args;
use hypercall::ExitStatus;
use std::io::Write;
use std::path::PathBuf;

/// Look for bugs in a component, with inputs that coverage guides.
///
/// Builds the target from the source tree this command came from, runs workers, and writes a reproducer for each distinct
/// finding. Exit status 1 means that something was found.
#[derive(Args)]
#[command(after_help = "Examples:
  anykernel fuzz --list                          what can be fuzzed
  anykernel fuzz ext4 --seconds 60               one minute, on every CPU
  anykernel fuzz tcp --workers 1 --runs 100000   so many inputs
  anykernel fuzz --all --seconds 600             ten minutes for all targets together
  anykernel fuzz ext4 --coverage                 which lines its corpus reaches, as HTML
  anykernel replay FILE                          see a finding again, with --gdb in the debugger")]
pub(super) struct Fuzz {
    /// What to fuzz; see --list.
    #[arg(required_unless_present_any = ["list", "all", "reproduce"])]
    target: Option<String>,
    /// Every target in turn; --seconds is for all of them together.
    #[arg(long, conflicts_with_all = ["target", "coverage"])]
    all: bool,
    /// List the targets.
    #[arg(long)]
    list: bool,
    /// Run a reproducer again instead, as `anykernel replay` does.
    #[arg(long, value_name = "FILE", conflicts_with = "target")]
    reproduce: Option<PathBuf>,
    /// Write an HTML report of which lines the corpus reaches, instead.
    #[arg(long)]
    coverage: bool,
    /// End after so many seconds; without this or --runs: when interrupted.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seconds: u64,
    /// End after so many executions by each worker.
    #[arg(long, value_name = "N", default_value_t = 0)]
    runs: u64,
    /// Processes; without: one for each CPU.
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// End at the first finding.
    #[arg(long)]
    first: bool,
    /// Build with AddressSanitizer: slower, and sees what unsafe code does wrong.
    #[arg(long)]
    address_sanitizer: bool,
    /// Grow a bug of docs/planted-bugs.md, to see that it is found; `none`: a build that could have one.
    #[arg(long, value_name = "NAME")]
    plant: Option<String>,
    /// One object a line.
    #[arg(long)]
    json: bool,
}

impl Fuzz {
    pub(super) fn run(self) -> Outcome {
        if let Some(path) = &self.reproduce {
            let found = fuzz::reproduce(path, false)?;
            return Ok(if found { ExitStatus::Failure } else { ExitStatus::Success });
        }
        if self.list {
            let mut out = std::io::stdout().lock();
            for (name, about) in fuzz::targets()? {
                let shown = if self.json {
                    writeln!(out, "{}", serde_json::json!({"target": name, "about": about}))
                } else {
                    writeln!(out, "{name:<16}{about}")
                };
                shown.map_err(output_failure)?;
            }
            return Ok(ExitStatus::Success);
        }
        if self.all && self.seconds == 0 && self.runs == 0 {
            return Err(Failure::usage("--all needs an end: --seconds N for all, or --runs N for each"));
        }
        let target = self.target.unwrap_or_default();
        if self.coverage {
            println!("{}", fuzz::report(&target)?.display());
            return Ok(ExitStatus::Success);
        }
        let workers =
            self.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into));
        let options = Options {
            target,
            seconds: self.seconds,
            runs: self.runs,
            workers,
            plant: self.plant,
            sanitizer: if self.address_sanitizer { Sanitizer::Address } else { Sanitizer::None },
            first: self.first,
            json: self.json,
        };
        let outcomes = match self.all {
            true => fuzz::run_all(&options)?,
            false => vec![(options.target.clone(), fuzz::run(&options)?)],
        };
        for (target, outcome) in &outcomes {
            for (what, path) in outcome.findings.iter().filter(|_| self.json) {
                println!(
                    "{}",
                    serde_json::json!({
                        "target": target, "found": what, "reproducer": path, "plant": options.plant,
                    })
                );
            }
            if outcome.executions == 0 && outcome.findings.is_empty() && !interrupt::interrupted() {
                return Err(Failure::new(format!("{target}: nothing was executed")));
            }
        }
        let found = outcomes.iter().any(|(_, outcome)| !outcome.findings.is_empty());
        Ok(if found { ExitStatus::Failure } else { ExitStatus::Success })
    }
}
