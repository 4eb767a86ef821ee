//! `module-build HEADERS`: builds the module and prints where it is.

use module_build::{Build, build};
use std::path::Path;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let (Some(kernel), None) = (args.next(), args.next()) else {
        eprintln!("usage: module-build HEADERS, as in module-build /lib/modules/$(uname -r)/build");
        return ExitCode::from(2);
    };
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(3).unwrap_or(Path::new("/"));
    let plan = Build { workspace: workspace.into(), kernel: kernel.into(), feature: None };
    match build(&plan, &mut run) {
        Ok(module) => {
            println!("{}", module.path.display());
            ExitCode::SUCCESS
        }
        Err(line) => {
            eprintln!("module-build: {line}");
            ExitCode::FAILURE
        }
    }
}

fn run(what: &str, mut command: Command) -> Result<(), String> {
    eprintln!("==> {what}");
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{what} failed: {status}")),
        Err(error) => Err(format!("{what}: {}: {error}", command.get_program().to_string_lossy())),
    }
}
