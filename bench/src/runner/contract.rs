//! A contract call beside a plain function call, in each target: the `contractbench` application run through the command.

use super::Result;
use crate::record::{Better, Record};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};

const RUNS: usize = 3;

fn measure(anykernel: &Path, target: &str) -> Result<(f64, f64)> {
    let output = Command::new(anykernel)
        .args(["run", "contractbench", "--on", target, "--net", "none"])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("{}: {error}", anykernel.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let value = text
        .lines()
        .filter_map(|line| {
            line.find("{\"case\"").and_then(|at| serde_json::from_str::<Value>(line[at..].trim()).ok())
        })
        .next_back()
        .ok_or_else(|| format!("contractbench on {target} printed no result ({})", output.status))?;
    let per_call = |key: &str| value[key].as_f64().zip(value["calls"].as_f64()).map(|(ns, calls)| ns / calls);
    per_call("contract_ns").zip(per_call("plain_ns")).ok_or_else(|| format!("strange result: {value}"))
}

/// Runs it with the given command binary.
pub fn bench(anykernel: &Path) -> Result {
    let mut records = Vec::new();
    for target in ["userspace", "rumprun", "linux-module"] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            let (contract, plain) = measure(anykernel, target)?;
            ours.push(contract);
            theirs.push(plain);
        }
        let id = ("contract", "cpu_count", target);
        records.push(
            Record::new(id, "ns/call", Better::Lower, &ours, ("a plain function call", &theirs)).goal(1.0),
        );
    }
    Ok(records)
}
