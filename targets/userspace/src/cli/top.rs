//! `top`.

use super::{Outcome, output_failure};
use anykernel_userspace::{Failure, control, interrupt};
use clap::Args;
use hypercall::ExitStatus;
use serde_json::Value;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

/// Show what a running instance's hypercalls cost, and its counters
#[derive(Args)]
#[command(after_help = "Examples:
  anykernel run httpd --disk doc.ext4 --publish 8080:80 --control /tmp/httpd
  anykernel top /tmp/httpd               what costs most, every second
  anykernel top /tmp/httpd --once --json for a script")]
pub(super) struct Top {
    /// The path that `run --control` was given
    control: PathBuf,
    /// Once, and not again every second
    #[arg(long)]
    once: bool,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// How many kinds of calls and counters to show
    #[arg(long, default_value_t = 20, value_name = "N")]
    rows: usize,
}

impl Top {
    pub(super) fn run(self) -> Outcome {
        let mut out = std::io::stdout();
        let mut seen = false;
        loop {
            let said = match control::ask(&self.control) {
                Ok(said) => said,
                // It ended while we watched.
                Err(_) if seen => return Ok(ExitStatus::Success),
                Err(failure) => return Err(failure),
            };
            seen = true;
            let text = if self.json { format!("{said}\n") } else { self.table(&said)? };
            let clear = if !self.json && !self.once && out.is_terminal() { "\x1b[H\x1b[2J" } else { "" };
            write!(out, "{clear}{text}").and_then(|()| out.flush()).map_err(output_failure)?;
            if self.once || interrupt::interrupted() {
                return Ok(ExitStatus::Success);
            }
            std::thread::sleep(Duration::from_secs(1));
        }
    }

    /// The costliest first: by the time that callers spent in them.
    fn table(&self, said: &Value) -> Result<String, Failure> {
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        let mut calls: Vec<&Value> = said["calls"].as_array().into_iter().flatten().collect();
        calls.sort_by_key(|call| std::cmp::Reverse(number(&call["total_ns"])));
        let mut text = format!("up {:.1} s\n", number(&said["up_ns"]) as f64 / 1e9);
        let _ = writeln!(
            text,
            "{:<9} {:<14} {:>10} {:>12} {:>10} {:>12}",
            "component", "call", "calls", "total ms", "mean us", "longest us"
        );
        for call in calls.into_iter().take(self.rows) {
            let (count, total) = (number(&call["calls"]), number(&call["total_ns"]));
            let _ = writeln!(
                text,
                "{:<9} {:<14} {:>10} {:>12.1} {:>10.2} {:>12.1}",
                call["component"].as_str().unwrap_or_default(),
                call["call"].as_str().unwrap_or_default(),
                count,
                total as f64 / 1e6,
                total as f64 / 1e3 / count.max(1) as f64,
                number(&call["longest_ns"]) as f64 / 1e3,
            );
        }
        let counters = said["counters"].as_object().into_iter().flatten();
        for (name, value) in counters.filter(|(_, value)| number(value) > 0).take(self.rows) {
            let _ = writeln!(text, "{name:<40} {}", number(value));
        }
        Ok(text)
    }
}
