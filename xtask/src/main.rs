//! What cargo alone cannot do: install what is missing, build images and modules, boot them, compare and measure.
//!
//! One subcommand per job; CI runs the same ones that a person does.

mod fuzz;
mod http;
mod images;
mod install;
mod matrix;
mod module;
mod plants;
mod sh;
mod test;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Tasks of this workspace.
#[derive(Parser)]
#[command(name = "cargo xtask", about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing, then run everything: format, lints, unit, property and end-to-end tests, boots, matrix.
    ///
    /// As root it installs Debian packages through apt; otherwise it says which command does.
    Test {
        /// Only tests whose name contains this.
        filter: Option<String>,
    },
    /// Install what the tests need and stop: Debian packages and Rust targets.
    Install,
    /// Make the disk image of the proofs: ext4 with Debian's default features, /usr/share/doc and over 10,000 files.
    ///
    /// Beside it goes FILE.sha256, as sha256sum(1) writes it.
    Image {
        /// Where to put it.
        output: std::path::PathBuf,
    },
    /// Run every fuzz target for a few seconds, and look for every bug that was planted for the fuzzers.
    Fuzz,
    /// Measure against peers in the same run: boot, image, net, vfs, usb, contract, sim or fuzz.
    Bench {
        /// Which one.
        name: String,
        /// One object a line, as the design says.
        #[arg(long)]
        json: bool,
        /// Also draw the results, as DIR/NAME.svg.
        #[arg(long, value_name = "DIR")]
        plot: Option<std::path::PathBuf>,
    },
    /// Build the Linux module for a kernel of yours and print the line that loads it.
    Module {
        /// The kernel's headers or build directory, as /usr/src/linux-headers-...; without: the running kernel's.
        #[arg(long, value_name = "DIR")]
        kernel: Option<std::path::PathBuf>,
        /// Also put the module here (a file or a directory).
        #[arg(long, short, value_name = "FILE")]
        output: Option<std::path::PathBuf>,
    },
    /// Print targets x checks: conformance, network, ext4, FAT, httpd.
    Matrix {
        /// One object a line: {"target","check","status","reason"}; status is pass, fail or absent.
        #[arg(long)]
        json: bool,
        /// Only this target: userspace, rumprun or linux-module.
        #[arg(long)]
        target: Option<String>,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Test { filter } => test::run(filter.as_deref()),
        Task::Fuzz => sh::anykernel().and_then(|anykernel| fuzz::run(&anykernel)),
        Task::Install => install::everything(),
        Task::Image { output } => images::documentation(&output),
        Task::Bench { name, json, plot } => bench(&name, json, plot.as_deref()),
        Task::Module { kernel, output } => module::run_build(kernel.as_deref(), output.as_deref()),
        Task::Matrix { json, target } => matrix::run(json, target.as_deref(), false),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => {
            eprintln!("xtask: {line}");
            ExitCode::FAILURE
        }
    }
}

/// The benchmarks are a crate of their own, which is built only when they are wanted.
fn bench(name: &str, json: bool, plot: Option<&std::path::Path>) -> sh::Result {
    install::everything()?;
    install::benchmark_peers()?;
    let anykernel = sh::anykernel()?;
    let dir = sh::work_dir("bench")?;
    sh::run(sh::cargo().args(["build", "--quiet", "--release", "--package", "anykernel-bench", "--bins"]))?;
    let mut command = std::process::Command::new(anykernel.with_file_name("bench"));
    command.arg(name);
    command.arg("--anykernel").arg(anykernel).arg("--dir").arg(dir);
    if json {
        command.arg("--json");
    }
    if let Some(dir) = plot {
        command.arg("--plot").arg(dir);
    }
    sh::run(&mut command)
}
