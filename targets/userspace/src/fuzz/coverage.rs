//! Which lines the corpus reaches: a build with the compiler's own coverage, run on every input, shown by llvm-cov.

use super::build;
use crate::Failure;
use crate::qemu::build as tool;
use std::path::PathBuf;
use std::process::Command;

/// Makes the HTML report of a target and returns its first page.
pub fn report(target: &str) -> Result<PathBuf, Failure> {
    let top = build::folder()?;
    let folders = build::folders(target, None)?;
    let (_, tools) = build::rustc()?;
    let (merge, show) = (tools.join("llvm-profdata"), tools.join("llvm-cov"));
    if !merge.is_file() || !show.is_file() {
        return Err(Failure::new(
            "the compiler's coverage tools are missing: rustup component add llvm-tools",
        ));
    }
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(&top).env("RUSTFLAGS", "-Cinstrument-coverage").env_remove("CARGO_TARGET_DIR");
    command.args(["build", "--release", "--no-default-features", "--example", "reproduce"]);
    command.args(["--target-dir", "target/coverage"]);
    // Build scripts are instrumented too; what they write is not wanted.
    command.env("LLVM_PROFILE_FILE", "/dev/null");
    tool::step("building the harness with coverage", command)?;
    let program = top.join("target/coverage/release/examples/reproduce");
    let output = top.join("coverage").join(target);
    std::fs::create_dir_all(&output)
        .map_err(|error| Failure::new(format!("{}: {error}", output.display())))?;
    let (raw, data) = (output.join("raw"), output.join("data"));
    let mut command = Command::new(&program);
    command
        .args(["--target", target])
        .arg(&folders.seeds)
        .arg(&folders.corpus)
        .env("LLVM_PROFILE_FILE", &raw);
    tool::step("running the corpus", command)?;
    let mut command = Command::new(merge);
    command.args(["merge", "-sparse"]).arg(&raw).arg("-o").arg(&data);
    tool::step("merging", command)?;
    let mut command = Command::new(show);
    command.args(["show", "--format=html", "--instr-profile"]).arg(&data);
    command.arg("--output-dir").arg(&output).arg(&program).arg("--sources");
    // What is attacked; not the harness, nor libraries.
    let tree = tool::workspace()?;
    command
        .args(["anykernel/src", "components", "examples", "hypercall/src"].map(|folder| tree.join(folder)));
    tool::step("writing the report", command)?;
    Ok(output.join("index.html"))
}
