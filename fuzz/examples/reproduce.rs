//! Runs inputs and reproducers of a target without a fuzzer around: for a debugger, and for `anykernel replay`. A folder
//! means every file in it. Says `passed` for each that finds nothing.

use anykernel_fuzz::{Target, watch};
use std::process::ExitCode;

/// An input that takes longer has no end.
const PATIENCE_SECONDS: u32 = 20;

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "--list") {
        for target in anykernel_fuzz::TARGETS {
            println!("{}\t{}\t{}", target.name, target.max_len, target.about);
        }
        return ExitCode::SUCCESS;
    }
    let paths = match arguments.get(..2) {
        Some([option, _]) if option == "--target" && arguments.len() > 2 => arguments.split_off(2),
        _ => {
            eprintln!("reproduce: which? reproduce --target NAME FILE...");
            return ExitCode::from(2);
        }
    };
    let Some(target) = Target::find(&arguments[1]) else {
        eprintln!("reproduce: there is no target {}; see --list", arguments[1]);
        return ExitCode::from(2);
    };
    anykernel_fuzz::prepare();
    watch::tell_refusals();
    let (mut files, mut many) = (Vec::new(), false);
    for path in paths {
        match std::fs::read_dir(&path) {
            Ok(folder) => {
                many = true;
                files.extend(folder.flatten().map(|entry| entry.path().display().to_string()));
            }
            Err(_) => files.push(path),
        }
    }
    files.sort();
    for path in files {
        let file = match std::fs::read(&path) {
            Ok(file) => file,
            Err(error) => {
                eprintln!("reproduce: {path}: {error}");
                return ExitCode::from(2);
            }
        };
        // A reproducer is an input below a line that says what it is of.
        let input = match file.starts_with(b"anykernel-fuzz ") {
            true => file.splitn(2, |byte| *byte == b'\n').nth(1).unwrap_or_default(),
            false => &file,
        };
        watch::tell_hang(PATIENCE_SECONDS);
        target.execute(input);
        if !many {
            println!("{path}: passed");
        }
    }
    ExitCode::SUCCESS
}
