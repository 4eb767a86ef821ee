//! Runs reproducers, or with `--target NAME` bare inputs, without a fuzzer around: for a debugger, and for `anykernel fuzz`.
//! A folder means every file in it. Says `passed` for each that finds nothing.

use anykernel_fuzz::reproducer::Reproducer;
use anykernel_fuzz::{Target, watch};
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "--list") {
        for target in anykernel_fuzz::TARGETS {
            println!("{}\t{}\t{}", target.name, target.max_len, target.about);
        }
        return ExitCode::SUCCESS;
    }
    let mut target = None;
    if arguments.first().is_some_and(|first| first == "--target") && arguments.len() >= 2 {
        target = Some(arguments.remove(1));
        arguments.remove(0);
    }
    if arguments.is_empty() {
        eprintln!("reproduce: which? reproduce [--target NAME] FILE...");
        return ExitCode::from(2);
    }
    anykernel_fuzz::prepare();
    watch::tell_refusals();
    let (mut paths, mut many) = (Vec::new(), false);
    for path in arguments {
        match std::fs::read_dir(&path) {
            Ok(folder) => {
                many = true;
                paths.extend(folder.flatten().map(|entry| entry.path().display().to_string()));
            }
            Err(_) => paths.push(path),
        }
    }
    paths.sort();
    for path in paths {
        let file = match std::fs::read(&path) {
            Ok(file) => file,
            Err(error) => {
                eprintln!("reproduce: {path}: {error}");
                return ExitCode::from(2);
            }
        };
        let parsed = match &target {
            Some(target) => Ok(Reproducer { target, plant: "", input: &file }),
            None => Reproducer::parse(&file),
        };
        let reproducer = match parsed {
            Ok(reproducer) => reproducer,
            Err(line) => {
                eprintln!("reproduce: {path}: {line}");
                return ExitCode::from(2);
            }
        };
        let Some(target) = Target::find(reproducer.target) else {
            eprintln!("reproduce: {path}: there is no target {}; see --list", reproducer.target);
            return ExitCode::from(2);
        };
        #[cfg(feature = "planted")]
        if !reproducer.plant.is_empty() {
            hypercall::planted::grow(reproducer.plant);
        }
        target.execute(reproducer.input);
        if !many {
            println!("{path}: passed");
        }
    }
    ExitCode::SUCCESS
}
