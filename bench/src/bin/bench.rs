//! `cargo xtask bench NAME`: measures, and prints one object a line.

use anykernel_bench::{plot, runner};
use clap::{Parser, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;

// As the `anykernel` command has it.
#[global_allocator]
static HEAP: anykernel_userspace::Heap = anykernel_userspace::Heap::new();

#[derive(Parser)]
#[command(about = "Benchmarks against peers in the same run")]
struct Cli {
    /// Which one.
    bench: Bench,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
    /// Also draw the records, as DIR/NAME.svg.
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
    /// The anykernel command (built by xtask).
    #[arg(long)]
    anykernel: PathBuf,
    /// A directory with room for images.
    #[arg(long)]
    dir: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Bench {
    /// The simulation: how long a network takes to live, and to come up.
    Sim,
    /// Reading ext4 in a process, beside dd from a loop mount (root).
    Vfs,
    /// Instructions from the first one to main, beside a Debian guest.
    Boot,
    /// Size and least memory of the httpd image, beside nginx on a Debian kernel.
    Image,
    /// The unikernel beside a Debian guest, on TAPs in a network namespace (root).
    Net,
    /// A contract call beside a plain call, in every target.
    Contract,
    /// Reading a stick and finding devices, beside a Debian guest.
    Usb,
    /// Executions of the fuzz targets, beside a process for each.
    Fuzz,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.bench {
        Bench::Sim => runner::sim::records(),
        Bench::Vfs => runner::vfs::bench(&cli.dir),
        Bench::Boot => programs().and_then(|programs| runner::boot::bench(&programs, &cli.dir)),
        Bench::Image => programs().and_then(|programs| runner::image::bench(&programs, &cli.dir)),
        Bench::Net => programs().and_then(|programs| runner::net::bench(&cli.anykernel, &programs, &cli.dir)),
        Bench::Usb => runner::usb::bench(&cli.anykernel, &cli.dir),
        Bench::Contract => runner::contract::bench(&cli.anykernel),
        Bench::Fuzz => runner::fuzz::bench(&cli.anykernel),
    };
    let drawn = result.and_then(|records| {
        records.iter().for_each(|record| record.print(cli.json));
        cli.plot.map(|dir| plot::draw(&records, &dir)).transpose()
    });
    match drawn {
        Ok(picture) => {
            if let Some(path) = picture {
                eprintln!("bench: drew {}", path.display());
            }
            ExitCode::SUCCESS
        }
        Err(line) => {
            eprintln!("bench: {line}");
            ExitCode::FAILURE
        }
    }
}

/// `netload` and `netpeer` are built beside this program.
fn programs() -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    own.parent().map(Into::into).ok_or_else(|| "this program has no directory".into())
}
