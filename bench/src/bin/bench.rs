//! `cargo xtask bench NAME`: measures, and prints one object a line.

use anykernel_bench::runner;
use clap::{Parser, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Benchmarks against peers in the same run")]
struct Cli {
    /// Which one.
    bench: Bench,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
    /// The anykernel command (built by xtask).
    #[arg(long)]
    anykernel: PathBuf,
    /// A directory with room for images.
    #[arg(long)]
    dir: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Bench {
    /// Reading ext4 in a process, beside dd from a loop mount (root).
    Vfs,
    /// A contract call beside a plain call, in every target.
    Contract,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.bench {
        Bench::Vfs => runner::vfs::bench(&cli.dir),
        Bench::Contract => runner::contract::bench(&cli.anykernel),
    };
    match result {
        Ok(records) => {
            for record in records {
                record.print(cli.json);
            }
            ExitCode::SUCCESS
        }
        Err(line) => {
            eprintln!("bench: {line}");
            ExitCode::FAILURE
        }
    }
}
