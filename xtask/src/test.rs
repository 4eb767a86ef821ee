//! Everything that must hold, in one command: what a person runs, and CI.

use crate::sh::{self, Result, cargo, step};
use crate::{fuzz, install, matrix};
use module_build::toolchain::{Need, TARGET, Toolchain};
use std::time::Instant;

/// Crates that are components or below: they must build for a machine without an operating system.
const BARE: [&str; 11] = [
    "hypercall",
    "anykernel",
    "anykernel-net",
    "anykernel-usb",
    "anykernel-vfs",
    "anykernel-virtio",
    "anykernel-xhci",
    "files",
    "httpd",
    "selftest",
    "usb-app",
];

/// Installs, checks, tests and boots.
pub(crate) fn run(filter: Option<&str>) -> Result {
    let start = Instant::now();
    let timed = |name: &str| step(&format!("[{:4} s] {name}", start.elapsed().as_secs()));
    timed("installing what is missing");
    install::everything()?;
    if filter.is_none() {
        timed("format");
        sh::run(cargo().args(["fmt", "--all", "--check"]))?;
        timed("lints");
        sh::run(cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
        timed("components without an operating system");
        let mut check = cargo();
        check.args(["check", "--quiet", "--target", TARGET]);
        Toolchain::find(Need::Core)?.apply(&mut check);
        for name in BARE {
            check.args(["--package", name]);
        }
        sh::run(&mut check)?;
    }
    timed("the command line");
    let anykernel = sh::anykernel()?;
    timed("tests");
    let mut tests = cargo();
    tests.args(["test", "--workspace", "--no-fail-fast"]).env("ANYKERNEL", &anykernel);
    if let Some(filter) = filter {
        tests.args(["--", filter]);
    }
    sh::run(&mut tests)?;
    if filter.is_none() {
        timed("planted bugs");
        let mut planted = cargo();
        planted.args([
            "test",
            "--package",
            "anykernel-userspace",
            "--features",
            "planted",
            "--test",
            "planted",
        ]);
        sh::run(&mut planted)?;
        timed("model checks");
        // In a directory of its own: the flag is for all crates, and would have everything built again each time.
        let mut models = cargo();
        models.args(["test", "--release", "--package", "anykernel", "--test", "loom"]);
        sh::run(models.args(["--target-dir", "target/loom"]).env("RUSTFLAGS", "--cfg loom"))?;
        timed("fuzzing, and what was planted for it");
        fuzz::run(&anykernel)?;
        timed("matrix");
        matrix::run(false, None, true)?;
    }
    timed("all is well");
    Ok(())
}
