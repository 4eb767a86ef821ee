//! The command line: what it understands. Each subcommand has a file of its own.

mod copy;
mod demo;
mod files;
mod fuzz;
mod image;
mod manifest;
mod mount;
mod replay;
mod run;
mod simulate;
mod size;
mod top;
mod usb;

use anykernel_userspace::{Failure, interrupt, logger};
use clap::{Parser, Subcommand};
use hypercall::ExitStatus;
use rustix::process::{Resource, getrlimit, setrlimit};
use std::process::ExitCode;

/// Drivers and stacks of an anykernel, in a process, as a unikernel, or inside Linux.
#[derive(Parser)]
#[command(name = "anykernel", version, max_term_width = 100, arg_required_else_help = true)]
#[command(after_help = "Examples:
  anykernel demo                                        serve a small web site from an ext4 image
  anykernel run httpd --disk doc.ext4 --publish 8080:80  serve your own image
  anykernel ls -l disk.img:2:/etc                       list a directory on partition 2, without root

Exit status: 0 it worked, 1 it failed, 2 it was asked for something that makes no sense.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(Box<run::Run>),
    Demo(demo::Demo),
    Replay(replay::Replay),
    Top(top::Top),
    Simulate(simulate::Simulate),
    Ls(files::Ls),
    Tree(files::Tree),
    Stat(files::Stat),
    Cat(files::Cat),
    Cp(files::Cp),
    Mount(mount::Mount),
    Usb(usb::Usb),
    Fuzz(fuzz::Fuzz),
    Manifest(manifest::Manifest),
    Schema(manifest::Schema),
}

/// The whole command: parses, runs, and turns the outcome into an exit status.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    logger::init("warn");
    interrupt::install();
    allow_many_files();
    let result = match cli.command {
        Command::Run(command) => command.run(),
        Command::Demo(command) => command.run(),
        Command::Replay(command) => command.run(),
        Command::Top(command) => command.run(),
        Command::Simulate(command) => command.run(),
        Command::Ls(command) => command.run(),
        Command::Tree(command) => command.run(),
        Command::Stat(command) => command.run(),
        Command::Cat(command) => command.run(),
        Command::Cp(command) => command.run(),
        Command::Mount(command) => command.run(),
        Command::Usb(command) => command.run(),
        Command::Fuzz(command) => command.run(),
        Command::Manifest(command) => command.run(),
        Command::Schema(command) => command.run(),
    };
    match result {
        Ok(status) => ExitCode::from(status.code()),
        Err(failure) => {
            if !failure.line.is_empty() {
                eprintln!("anykernel: {failure}");
            }
            ExitCode::from(failure.status.code())
        }
    }
}

/// Each connection is a descriptor, and the usual limit of 1,024 is there for programs that use select(2).
fn allow_many_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // What we may not raise we do without.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// What a subcommand comes to.
type Outcome = Result<ExitStatus, Failure>;

/// Standard output cannot be written. If nobody reads it any more, as in `| head`, there is nothing to say.
fn output_failure(error: std::io::Error) -> Failure {
    match error.kind() {
        std::io::ErrorKind::BrokenPipe => Failure::new(""),
        _ => Failure::new(format!("standard output: {error}")),
    }
}
