//! `replay`.

use super::{Outcome, output_failure};
use anykernel_userspace::replay::{self, End, RecordingFile};
use anykernel_userspace::{Failure, fuzz, logger};
use clap::Args;
use hypercall::ExitStatus;
use serde_json::json;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// Run a recorded domain again, in this process; or what `anykernel fuzz` found
#[derive(Args)]
#[command(after_help = "Examples:
  anykernel run httpd --on rumprun --disk doc.ext4 --publish 8080:80 --record f.rec
      record a unikernel; Ctrl-C ends it
  anykernel replay f.rec
      run it again, call for call, and print the hash of all that it did
  anykernel replay f.rec --until 1200 --gdb
      stop in the debugger as call 1200 returns, in the component's own frames; there `break FILE.rs:LINE` and `continue`
  anykernel replay fuzz/artifacts/tcp/5c678a52.repro
      see what the fuzzer found, with its stack; with --gdb in the debugger

Exit status: 0 it went as recorded (a reproducer: nothing is found any more), 1 it did not.")]
pub(super) struct Replay {
    /// What --record wrote, or a reproducer
    file: PathBuf,
    /// Stop at this call, counted from 1
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    until: Option<u64>,
    /// In gdb: it stops at --until, else at the first call, and where the component panics or does something else than recorded
    #[arg(long)]
    gdb: bool,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
    /// Show messages of the component up to this level
    #[arg(long, value_name = "LEVEL", default_value = "off", value_parser = ["off", "error", "warn", "info", "debug", "trace"])]
    log: String,
    /// gdb started us
    #[arg(long, hide = true)]
    debugged: bool,
}

impl Replay {
    pub(super) fn run(self) -> Outcome {
        logger::init(&self.log);
        if fuzz::is_reproducer(&self.file) {
            let found = fuzz::reproduce(&self.file, self.gdb)?;
            return Ok(if found { ExitStatus::Failure } else { ExitStatus::Success });
        }
        let shown = self.file.display().to_string();
        let recording =
            RecordingFile::open(&self.file).map_err(|error| Failure::new(format!("{shown}: {error}")))?;
        if self.gdb {
            return Err(self.debug());
        }
        let (cut, same_build) = (recording.cut, recording.header.same_build);
        if cut {
            eprintln!("anykernel: {shown} ends in the middle of a chunk: the calls before it are replayed");
        }
        let outcome = replay::replay(recording, self.until, self.debugged);
        let (position, thread) = (outcome.position, outcome.thread);
        let (end, failure) = match outcome.end {
            End::Complete => ("complete", None),
            End::Exit(_) => ("exit", None),
            End::Reached => ("reached", None),
            End::Panicked(message) => {
                ("panicked", Some(format!("thread {thread} panicked after call {position}: {message}")))
            }
            End::Diverged { expected, got } => {
                let hint = if same_build { "" } else { " (another build made the recording)" };
                let at = position + 1;
                (
                    "diverged",
                    Some(format!("diverged at call {at}: recorded is {expected}, but it did {got}{hint}")),
                )
            }
        };
        let hash = format!("{:016x}", outcome.hash);
        let mut out = std::io::stdout();
        if self.json {
            writeln!(out, "{}", json!({ "end": end, "calls": position, "hash": hash, "why": failure }))
        } else {
            writeln!(out, "{end}: {position} calls, hash {hash}")
        }
        .map_err(output_failure)?;
        match failure {
            Some(line) => Err(Failure::new(format!("{shown}: {line}"))),
            None => Ok(ExitStatus::Success),
        }
    }

    /// Becomes gdb. Comes back only with what went wrong.
    fn debug(&self) -> Failure {
        let program = std::env::current_exe().unwrap_or_else(|_| "anykernel".into());
        let mut gdb = Command::new("gdb");
        gdb.args(["-q", "-ex", "set breakpoint pending on", "-ex", "break rust_panic"]);
        gdb.args(["-ex", "break anykernel_replay_stop", "-ex", "run", "--args"]);
        gdb.arg(program).arg("replay").arg(&self.file).arg("--debugged");
        gdb.arg("--until").arg(self.until.unwrap_or(1).to_string());
        let error = gdb.exec();
        Failure::new(format!("gdb cannot be started: {error}: install it (Debian: apt-get install gdb)"))
    }
}
