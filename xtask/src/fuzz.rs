//! The bounded run of every fuzz target, and of the bugs that were planted to see that they are found.

use crate::sh::{self, Result, cargo, root, step};
use std::path::Path;
use std::process::{Command, Stdio};

/// Seconds of fuzzing, for all targets together.
const SECONDS: &str = "60";
/// Most seconds until a planted bug is found.
const BUDGET: &str = "60";

/// What grows where, as `docs/planted-bugs.md` says.
const PLANTS: [(&str, &str); 2] = [("unchecked-extent", "ext4"), ("tcp-urgent-overflow", "tcp")];

/// Runs the harnesses as tests, every target under libFuzzer, and every plant.
pub(crate) fn run(anykernel: &Path) -> Result {
    targets(anykernel)?;
    check_list()?;
    for (plant, target) in PLANTS {
        let (found, said) = fuzz(anykernel, target, &["--plant", plant, "--first", "--seconds", BUDGET])?;
        let named = said.lines().find(|line| line.contains(&format!("FOUND: planted bug {plant} ")));
        match named {
            Some(line) if found => step(line),
            _ => return Err(format!("the planted bug {plant} was not found in {BUDGET} s:\n{said}")),
        }
    }
    Ok(())
}

/// Runs the harnesses as tests, and every target under libFuzzer: one build of each kind.
pub(crate) fn targets(anykernel: &Path) -> Result {
    let manifest = root().join("fuzz/Cargo.toml");
    sh::run(cargo().args(["fmt", "--check", "--manifest-path"]).arg(&manifest))?;
    let mut tests = cargo();
    tests.args(["test", "--quiet", "--release", "--no-default-features", "--manifest-path"]).arg(&manifest);
    sh::run(tests.env("CARGO_TARGET_DIR", root().join("fuzz/target")))?;
    // In a build that could have a planted bug, so that the plants need none of their own. What is found is printed, with
    // its reproducer.
    let mut all = Command::new(anykernel);
    sh::run(all.args(["fuzz", "--all", "--plant", "none", "--seconds", SECONDS]).stdin(Stdio::null()))
}

/// Every plant that a fuzzer is to find is in the document, and is run here.
fn check_list() -> Result {
    let path = root().join("docs/planted-bugs.md");
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let listed: Vec<(String, String)> = text
        .lines()
        .filter_map(|line| {
            let mut cells = line.split('|').map(str::trim);
            let name = cells.nth(1)?.trim_matches('`').to_owned();
            let target = cells.nth(2)?.trim_matches('`').strip_prefix("anykernel fuzz ")?.to_owned();
            Some((name, target))
        })
        .collect();
    let ours: Vec<_> =
        PLANTS.iter().map(|(plant, target)| ((*plant).to_owned(), (*target).to_owned())).collect();
    if listed == ours {
        return Ok(());
    }
    Err(format!(
        "{} lists {listed:?} for fuzzers, but the test runs {ours:?}: make them the same",
        path.display()
    ))
}

/// Whether it found something, and what it said.
fn fuzz(anykernel: &Path, target: &str, more: &[&str]) -> Result<(bool, String)> {
    let output = Command::new(anykernel)
        .args(["fuzz", target])
        .args(more)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{}: {error}", anykernel.display()))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    match output.status.code() {
        Some(0) => Ok((false, said)),
        Some(1) if said.contains("FOUND: ") => Ok((true, said)),
        _ => Err(format!("anykernel fuzz {target} failed ({}):\n{said}", output.status)),
    }
}
