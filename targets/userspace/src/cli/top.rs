//! `top`.

use super::{Outcome, output_failure};
use anykernel_userspace::{control, interrupt};
use clap::Args;
use hypercall::{Call, ExitStatus};
use serde_json::Value;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

/// Show what a running instance's hypercalls cost, and its counters
#[derive(Args)]
#[command(
    after_help = "The first table has the calls that an instance makes, the costliest first: how many of each component so far and in the
last second, the time spent in them, and their mean and longest time. The second has the calls in which threads sleep, by
the time slept: that is waiting, and costs nothing. Then come the counters that are not 0.

Examples:
  anykernel run httpd --disk doc.ext4 --publish 8080:80 --control /tmp/httpd
      an instance that can be watched, on any target: add --on rumprun or --on linux-module
  anykernel top /tmp/httpd
      what costs most, every second; Ctrl-C ends it
  anykernel top /tmp/httpd --once --json
      for a script: one object with up_ns, calls and counters

Exit status: 0 also when the instance ends while it is watched, 1 if nothing runs there."
)]
pub(super) struct Top {
    /// The path that `run --control` was given
    control: PathBuf,
    /// Once, and not again every second
    #[arg(long)]
    once: bool,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// How many lines to show; on a terminal as many as it has unless told otherwise, else all
    #[arg(long, value_name = "N")]
    rows: Option<usize>,
}

impl Top {
    pub(super) fn run(self) -> Outcome {
        let mut out = std::io::stdout();
        let live = !self.json && !self.once && out.is_terminal();
        let mut before: Option<Value> = None;
        loop {
            let said = match control::ask(&self.control) {
                Ok(said) => said,
                Err(_) if before.is_some() => {
                    eprintln!("anykernel: {} has ended", self.control.display());
                    return Ok(ExitStatus::Success);
                }
                Err(failure) => return Err(failure),
            };
            let text = if self.json {
                format!("{said}\n")
            } else {
                let lines = table(&said, before.as_ref());
                let height = || terminal_rows().filter(|_| live);
                let rows = self.rows.or_else(height).unwrap_or(usize::MAX);
                // A newline after the last would push the first one out of sight.
                fit(lines, rows).join("\n") + if live { "" } else { "\n" }
            };
            let clear = if live { "\x1b[H\x1b[2J" } else { "" };
            write!(out, "{clear}{text}").and_then(|()| out.flush()).map_err(output_failure)?;
            if self.once || interrupt::interrupted() {
                return Ok(ExitStatus::Success);
            }
            before = Some(said);
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

fn terminal_rows() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
    Some(usize::from(size.ws_row)).filter(|rows| *rows > 0)
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

/// Whether threads sleep in it.
fn sleeps(call: &Value) -> bool {
    Call::ALL.iter().any(|one| one.blocks() && call["call"] == one.name())
}

/// Three parts: calls that cost, calls that sleep, counters. The first line of each is its head.
fn table(said: &Value, before: Option<&Value>) -> [Vec<String>; 3] {
    let up = number(&said["up_ns"]);
    let seconds = before.map(|before| up.saturating_sub(number(&before["up_ns"])) as f64 / 1e9);
    let rate = |now: &Value, then: &Value| match seconds {
        Some(seconds) if seconds > 0.0 => {
            format!("{:.0}", number(now).saturating_sub(number(then)) as f64 / seconds)
        }
        _ => "-".into(),
    };
    let mut calls: Vec<&Value> = said["calls"].as_array().into_iter().flatten().collect();
    calls.sort_by_key(|call| std::cmp::Reverse(number(&call["total_ns"])));
    let mut parts = [
        vec![format!(
            "{:<9} {:<15} {:>10} {:>9} {:>10} {:>9} {:>11}",
            format!("up {:.0} s", up as f64 / 1e9),
            "call",
            "calls",
            "calls/s",
            "total ms",
            "mean us",
            "longest us"
        )],
        vec!["asleep in".into()],
        vec![format!("{:<46} {:>18} {:>9}", "counter", "so far", "a second")],
    ];
    for call in calls {
        let (count, total) = (number(&call["calls"]), number(&call["total_ns"]));
        let then = before.and_then(|before| {
            let same = |one: &&Value| one["component"] == call["component"] && one["call"] == call["call"];
            before["calls"].as_array()?.iter().find(same)
        });
        parts[usize::from(sleeps(call))].push(format!(
            "{:<9} {:<15} {:>10} {:>9} {:>10.1} {:>9.2} {:>11.1}",
            call["component"].as_str().unwrap_or_default(),
            call["call"].as_str().unwrap_or_default(),
            count,
            rate(&call["calls"], then.map_or(&Value::Null, |then| &then["calls"])),
            total as f64 / 1e6,
            total as f64 / 1e3 / count.max(1) as f64,
            number(&call["longest_ns"]) as f64 / 1e3,
        ));
    }
    for (name, value) in said["counters"].as_object().into_iter().flatten() {
        if number(value) > 0 {
            let then = before.map_or(&Value::Null, |before| &before["counters"][name]);
            parts[2].push(format!("{name:<46} {:>18} {:>9}", number(value), rate(value, then)));
        }
    }
    parts
}

/// As many lines as there is room for, some of each part: half of it for calls that cost.
fn fit(parts: [Vec<String>; 3], rows: usize) -> Vec<String> {
    let [costs, asleep, counters] = parts;
    let least = asleep.len().min(5);
    let of_counters = counters.len().min((rows / 3).max(rows.saturating_sub(costs.len() + least)));
    let of_costs = costs.len().min(rows.saturating_sub(of_counters + least));
    let of_asleep = rows.saturating_sub(of_costs + of_counters);
    let mut lines = Vec::new();
    for (part, most) in [(costs, of_costs), (asleep, of_asleep), (counters, of_counters)] {
        lines.extend(part.into_iter().take(most));
    }
    lines.truncate(rows);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_shown() {
        let cost = |call: &str, calls: u64, total_ns: u64| json!({ "component": "net", "call": call, "calls": calls, "total_ns": total_ns, "longest_ns": 5 });
        let before =
            json!({ "up_ns": 1_000_000_000_u64, "calls": [cost("unpark", 1, 9)], "counters": { "a": 1 } });
        let calls = [cost("unpark", 11, 90), cost("link_send", 2, 2000), cost("park", 3, 7_000_000)];
        let said = json!({ "up_ns": 3_000_000_000_u64, "calls": calls, "counters": { "a": 5, "b": 0 } });
        let lines = fit(table(&said, Some(&before)), usize::MAX);
        let starts: Vec<&str> = lines.iter().map(|line| line.get(..16).unwrap_or(line).trim_end()).collect();
        assert_eq!(
            starts,
            [
                "up 3 s    call",
                "net       link_s",
                "net       unpark",
                "asleep in",
                "net       park",
                "counter",
                "a"
            ]
        );
        let words = |at: usize| lines[at].split_whitespace().collect::<Vec<_>>();
        assert_eq!(words(2), ["net", "unpark", "11", "5", "0.0", "0.01", "0.0"]);
        assert_eq!(words(6), ["a", "5", "2"]);
        for rows in 0..9 {
            assert_eq!(fit(table(&said, None), rows).len(), rows.min(lines.len()));
        }
    }
}
