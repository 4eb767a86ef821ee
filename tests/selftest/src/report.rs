//! Verdicts as JSON lines on the console.

use alloc::format;
use alloc::string::{String, ToString};
use core::fmt::Display;
use hypercall::conformance::CheckReport;
use hypercall::{ExitStatus, Host};

/// Prints each verdict as it comes and counts failures.
pub(crate) struct Report<H> {
    host: H,
    failed: usize,
}

impl<H: Host> Report<H> {
    pub(crate) fn new(host: H) -> Self {
        Self { host, failed: 0 }
    }

    /// One verdict; an error is the reason of a failure.
    pub(crate) fn result<E: Display>(&mut self, check: &str, result: Result<(), E>) {
        match result {
            Ok(()) => self.line(check, "pass", ""),
            Err(reason) => self.line(check, "fail", &reason.to_string()),
        }
    }

    /// Runs a conformance suite and prints its verdicts as they come.
    pub(crate) fn suite(&mut self, run: impl FnOnce(&mut dyn FnMut(CheckReport))) {
        run(&mut |check| {
            let outcome = &check.outcome;
            self.line(&format!("conformance/{}", check.name), outcome.status(), outcome.reason());
        });
    }

    fn line(&mut self, check: &str, status: &str, reason: &str) {
        self.failed += usize::from(status != "pass");
        let line = format!(
            "{{\"check\":\"{}\",\"status\":\"{status}\",\"reason\":\"{}\"}}\n",
            escape(check),
            escape(reason)
        );
        self.host.console_write(line.as_bytes());
    }

    /// How many verdicts were not "pass".
    pub(crate) fn failed(&self) -> usize {
        self.failed
    }

    /// The last line.
    pub(crate) fn finish(self) -> ExitStatus {
        let line = format!("{{\"selftest\":\"done\",\"failed\":{}}}\n", self.failed);
        self.host.console_write(line.as_bytes());
        if self.failed == 0 { ExitStatus::Success } else { ExitStatus::Failure }
    }
}

fn escape(text: &str) -> String {
    text.chars()
        .flat_map(|character| match character {
            '"' | '\\' => ['\\', character].into_iter().take(2),
            character if character.is_control() => [' ', ' '].into_iter().take(1),
            character => [character, ' '].into_iter().take(1),
        })
        .collect()
}
