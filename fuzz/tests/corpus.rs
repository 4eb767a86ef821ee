//! Every target on its corpus and on what the regressions left, with any compiler: the bounded run of every test.

use anykernel_fuzz::{TARGETS, fs, watch};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

fn files(folder: &str, target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).join(target);
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    files
}

/// Prints which input failed.
struct Trying<'a>(&'a str, String);

impl Drop for Trying<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("target {}, input {}", self.0, self.1);
        }
    }
}

#[test]
fn every_seed_and_regression_passes() {
    watch::tell_refusals();
    for target in TARGETS {
        let seeds = files("corpus", target.name);
        assert!(
            !seeds.is_empty(),
            "{} has no corpus: run `cargo run --no-default-features --example seeds`",
            target.name
        );
        for path in seeds.into_iter().chain(files("regressions", target.name)) {
            let _trying = Trying(target.name, path.display().to_string());
            target.execute(&std::fs::read(&path).expect("a file"));
        }
    }
}

/// Seeds changed at random, from a fixed seed: no coverage to guide it, but the same everywhere and with any compiler.
#[test]
fn changed_seeds_pass() {
    for target in TARGETS {
        let seeds: Vec<Vec<u8>> =
            files("corpus", target.name).iter().map(|path| std::fs::read(path).expect("a file")).collect();
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = |end: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 16) as usize % end.max(1)
        };
        let end = Instant::now() + Duration::from_millis(1500);
        let mut runs = 0;
        while runs < 2000 && Instant::now() < end {
            let mut input = seeds[random(seeds.len())].clone();
            for _ in 0..1 + random(6) {
                let at = random(input.len());
                match random(4) {
                    0 if !input.is_empty() => input[at] = random(256) as u8,
                    1 => input.insert(at, random(256) as u8),
                    2 => input.extend((0..random(40)).map(|_| random(256) as u8).collect::<Vec<_>>()),
                    _ => input.extend(seeds[random(seeds.len())].clone()),
                }
            }
            input.truncate(target.max_len);
            let shown = || input.iter().map(|byte| format!("{byte:02x}")).collect();
            let _trying = Trying(target.name, shown());
            target.execute(&input);
            runs += 1;
        }
        assert!(runs > 50, "{}: only {runs} executions in 1.5 s", target.name);
    }
}

/// The checker that every execution of `fat` uses agrees with fsck.fat, on volumes that were used.
#[test]
fn fsck_fat_agrees() {
    let path = std::env::temp_dir().join(format!("anykernel-fuzz-fat-{}", std::process::id()));
    for seed in files("corpus", "fat") {
        let Some(volume) = fs::fat::execute(&std::fs::read(&seed).expect("a file")) else { continue };
        std::fs::write(&path, volume).expect("room for an image");
        let output = Command::new("fsck.fat")
            .arg("-n")
            .arg(&path)
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .output()
            .unwrap_or_else(|error| panic!("fsck.fat: {error}; apt-get install dosfstools"));
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && !said.contains("Dirty bit"), "{}: {said}", seed.display());
    }
    std::fs::remove_file(&path).expect("it is there");
}

#[test]
fn every_target_has_its_program() {
    for target in TARGETS {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fuzz_targets/{}.rs", target.name));
        let text = std::fs::read_to_string(&program).expect("a program for every target");
        assert!(text.contains(&format!("fuzz_target!(\"{}\")", target.name)));
    }
}
