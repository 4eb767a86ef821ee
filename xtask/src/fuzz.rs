//! The bounded run of every fuzz target, and of the bugs that were planted to see that they are found.

use crate::plants;
use crate::sh::{self, Result, cargo, root};
use std::path::Path;
use std::process::{Command, Stdio};

/// Seconds of fuzzing, for all targets together.
const SECONDS: &str = "60";

/// Runs the harnesses as tests, every target under libFuzzer, and every plant.
pub(crate) fn run(anykernel: &Path) -> Result {
    targets(anykernel)?;
    plants::run(anykernel)
}

/// Runs the harnesses as tests, and every target under libFuzzer: one build of each kind.
fn targets(anykernel: &Path) -> Result {
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

/// Whether it found something, and what it said.
pub(crate) fn fuzz(anykernel: &Path, target: &str, more: &[&str]) -> Result<(bool, String)> {
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
