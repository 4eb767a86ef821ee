//! Verdicts as JSON lines on the console.

use alloc::format;
use alloc::string::{String, ToString};
use core::fmt::Display;
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
        let line = match result {
            Ok(()) => format!("{{\"check\":\"{}\",\"status\":\"pass\"}}\n", escape(check)),
            Err(reason) => {
                self.failed += 1;
                let reason = escape(&reason.to_string());
                format!("{{\"check\":\"{}\",\"status\":\"fail\",\"reason\":\"{reason}\"}}\n", escape(check))
            }
        };
        self.host.console_write(line.as_bytes());
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
