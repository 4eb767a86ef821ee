//! One process of libFuzzer, and what it says.

use super::Options;
use super::build::{self, Folders};
use crate::Failure;
use crate::qemu::die_with_parent;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// An input that takes longer, in seconds, is a finding.
pub(super) const TIMEOUT: u64 = 10;
/// Memory of the process, in MiB. An execution's own bound is in the harness.
const MEMORY_MB: u64 = 2048;
/// Lines kept of what it says at its end.
const LAST_LINES: usize = 400;

/// A line of libFuzzer's own reports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) executions: u64,
    pub(super) coverage: u64,
    pub(super) features: u64,
    pub(super) corpus: u64,
    pub(super) new: bool,
}

/// What a worker tells.
pub(super) enum Event {
    Status {
        worker: usize,
        status: Status,
    },
    /// It ended, with the input that ended it, and what it said last.
    Ended {
        worker: usize,
        artifact: Option<PathBuf>,
        said: String,
    },
}

/// A running process.
pub(super) struct Worker(Arc<Mutex<Child>>);

impl Worker {
    pub(super) fn start(
        index: usize,
        program: &Path,
        folders: &Folders,
        options: &Options,
        end: Option<Instant>,
        events: Sender<Event>,
    ) -> Result<Self, Failure> {
        let mut command = build::start(program)?;
        command.arg("-print_final_stats=1").arg("-max_len=4096");
        command.arg(format!("-timeout={TIMEOUT}")).arg(format!("-rss_limit_mb={MEMORY_MB}"));
        // Of its own: two workers may find the same input.
        command.arg(format!("-artifact_prefix={}/{index}-", folders.artifacts.display()));
        if let Some(end) = end {
            let left = end.saturating_duration_since(Instant::now()).as_secs().max(1);
            command.arg(format!("-max_total_time={left}"));
        }
        if options.runs > 0 {
            command.arg(format!("-runs={}", options.runs));
        }
        if let Some(dictionary) = &folders.dictionary {
            command.arg(format!("-dict={}", dictionary.display()));
        }
        command.arg(&folders.corpus).arg(&folders.seeds);
        command.env("RUST_BACKTRACE", "1");
        options.plant(&mut command);
        if options.plant.is_some() {
            // A test: each worker for itself and from a seed of its own, so that a second run meets what the first met.
            command.arg(format!("-seed={}", index + 1)).arg("-reload=0");
        } else {
            command.arg("-reload=1");
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        die_with_parent(&mut command);
        let mut child =
            command.spawn().map_err(|error| Failure::new(format!("{}: {error}", program.display())))?;
        let stderr = child.stderr.take();
        let child = Arc::new(Mutex::new(child));
        let process = child.clone();
        std::thread::spawn(move || {
            let (mut said, mut artifact) = (std::collections::VecDeque::new(), None);
            for line in stderr
                .into_iter()
                .flat_map(|stderr| BufReader::new(stderr).split(b'\n').map_while(Result::ok))
            {
                let line = String::from_utf8_lossy(&line).into_owned();
                if let Some(status) = parse(&line) {
                    let _ = events.send(Event::Status { worker: index, status });
                } else if let Some((_, path)) = line.split_once("Test unit written to ") {
                    artifact = Some(PathBuf::from(path.trim()));
                }
                said.push_back(line);
                if said.len() > LAST_LINES {
                    said.pop_front();
                }
            }
            let status = process.lock().unwrap_or_else(PoisonError::into_inner).wait();
            let well = status.is_ok_and(|status| status.success());
            let said = if well { String::new() } else { Vec::from(said).join("\n") };
            let _ = events.send(Event::Ended { worker: index, artifact, said });
        });
        Ok(Self(child))
    }

    /// Ends it.
    pub(super) fn stop(&mut self) {
        // The thread that reads holds the lock only when the process has ended already.
        if let Ok(mut child) = self.0.try_lock() {
            let _ = child.kill();
        }
    }
}

/// Reads `#4096 pulse  cov: 123 ft: 456 corp: 7/89b lim: 4 exec/s: 2048 rss: 30Mb`.
fn parse(line: &str) -> Option<Status> {
    let mut words = line.strip_prefix('#')?.split_whitespace();
    let mut status = Status { executions: words.next()?.parse().ok()?, ..Status::default() };
    status.new = matches!(words.next(), Some("NEW"));
    while let Some(word) = words.next() {
        let number = |word: Option<&str>| {
            let word = word.unwrap_or_default();
            let end = word.find(|c: char| !c.is_ascii_digit()).unwrap_or(word.len());
            word[..end].parse().unwrap_or(0)
        };
        match word {
            "cov:" => status.coverage = number(words.next()),
            "ft:" => status.features = number(words.next()),
            "corp:" => status.corpus = number(words.next()),
            _ => {}
        }
    }
    Some(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_reports() {
        let line = "#4096\tNEW    cov: 123 ft: 456 corp: 7/89b lim: 4 exec/s: 2048 rss: 30Mb L: 3/4 MS: 1 EraseBytes-";
        let expected = Status { executions: 4096, coverage: 123, features: 456, corpus: 7, new: true };
        assert_eq!(parse(line), Some(expected));
        let inited = parse("#2\tINITED exec/s: 0 rss: 30Mb").expect("a report");
        assert!(!inited.new && inited.coverage == 0);
        assert_eq!(parse("INFO: Seed: 1"), None);
    }
}
