//! Building what `fuzz/` holds.

use super::Options;
use crate::Failure;
use crate::qemu::build as tool;
use hypercall::layers::recorded::{SEED, digest, mix};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What watches memory beside the language.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sanitizer {
    /// Nothing: components are safe Rust but for a few modules, and this is several times faster.
    None,
    /// AddressSanitizer.
    Address,
}

/// The folders of a target.
pub(super) struct Folders {
    /// What was found so far, here.
    pub(super) corpus: PathBuf,
    /// What comes with the source.
    pub(super) seeds: PathBuf,
    /// Words of the format, if somebody wrote them down.
    pub(super) dictionary: Option<PathBuf>,
    /// Findings.
    pub(super) artifacts: PathBuf,
}

/// The flags of libFuzzer's coverage, as cargo-fuzz passes them.
const COVERAGE: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cforce-frame-pointers",
];

/// No look at what unsafe code promises in every access that the standard library makes: that is AddressSanitizer's, and
/// each is a branch that is counted and compared. Overflow and `debug_assert!` are looked at as ever.
const TRUST: &str = "-Zub-checks=no";

/// Where `fuzz/` is.
pub(super) fn folder() -> Result<PathBuf, Failure> {
    let folder = tool::workspace()?.join("fuzz");
    if folder.join("Cargo.toml").is_file() {
        return Ok(folder);
    }
    Err(Failure::new(format!("{} is not there: fuzzing needs the whole source tree", folder.display())))
}

/// The names of all targets with what they attack, from the harness itself.
///
/// Builds it, without a fuzzer around.
pub fn targets() -> Result<Vec<(String, String)>, Failure> {
    let output = Command::new(reproduce(false)?)
        .arg("--list")
        .output()
        .map_err(|error| Failure::new(format!("listing the targets: {error}")))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let row = |line: &str| {
        let mut parts = line.split('\t');
        Some((parts.next()?.to_owned(), parts.nth(1)?.to_owned()))
    };
    Ok(text.lines().filter_map(row).collect())
}

fn cargo() -> Result<Command, Failure> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(folder()?);
    // Whatever a surrounding cargo set for its own build.
    command.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS").env_remove("CARGO_TARGET_DIR");
    Ok(command)
}

/// A program of the harness, to be started at the top of the tree: so the paths of its stacks are always the same.
pub(super) fn start(program: &Path) -> Result<Command, Failure> {
    let mut command = Command::new(program);
    command.current_dir(tool::workspace()?);
    if std::env::var_os("ASAN_OPTIONS").is_none() {
        // The harness looks for leaks itself, and knows what a device that cannot be reset has to keep. The other is for
        // where llvm-symbolizer is not installed.
        command.env("ASAN_OPTIONS", "detect_leaks=0:allow_addr2line=1");
    }
    Ok(command)
}

/// The compiler's own triple, and where its tools are.
pub(super) fn rustc() -> Result<(String, PathBuf), Failure> {
    let ask = |arguments: &[&str]| {
        let output = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
            .args(arguments)
            .output()
            .map_err(|error| Failure::new(format!("rustc: {error}")))?;
        Ok::<_, Failure>(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let version = ask(&["-vV"])?;
    let host = version
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .ok_or_else(|| Failure::new("rustc -vV does not say its host"))?;
    let tools = PathBuf::from(ask(&["--print", "sysroot"])?).join("lib/rustlib").join(host).join("bin");
    Ok((host.into(), tools))
}

/// Builds the program that runs one input without a fuzzer, and says where it is.
pub(super) fn reproduce(planted: bool) -> Result<PathBuf, Failure> {
    let mut command = cargo()?;
    let target_dir = if planted { "target/planted" } else { "target" };
    command.args(["build", "--release", "--no-default-features", "--example", "reproduce"]);
    command.args(["--target-dir", target_dir]);
    if planted {
        command.args(["--features", "planted"]);
    }
    tool::step("building the harness", command)?;
    Ok(folder()?.join(target_dir).join("release/examples/reproduce"))
}

/// The names of all targets, by their programs, sorted.
pub fn names() -> Result<Vec<String>, Failure> {
    let folder = folder()?.join("fuzz_targets");
    let entries = std::fs::read_dir(&folder)
        .map_err(|error| Failure::new(format!("{}: {error}", folder.display())))?
        .flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".rs")?.to_owned()))
        .collect();
    names.sort();
    Ok(names)
}

/// Refuses the name of no target.
pub(super) fn known(name: &str) -> Result<(), Failure> {
    let names = names()?;
    match names.iter().any(|known| known == name) {
        true => Ok(()),
        false => Err(Failure::usage(format!("there is no target {name}; there are {}", names.join(", ")))),
    }
}

/// Which harness this is: a number of its source.
pub(super) fn harness() -> Result<String, Failure> {
    let mut folders = vec![folder()?.join("src")];
    let mut files = std::collections::BTreeMap::new();
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read(&path)
                    .map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
                files.insert(path, digest(&text));
            }
        }
    }
    Ok(format!("{:016x}", files.values().fold(SEED, |hash, file| mix(hash, *file))))
}

/// Builds the programs of these targets, in one go.
pub(super) fn build(names: &[String], options: &Options) -> Result<(), Failure> {
    let mut flags = COVERAGE.join(" ") + " --cfg fuzzing";
    match options.sanitizer {
        Sanitizer::None => flags = flags + " " + TRUST,
        Sanitizer::Address => flags += " -Zsanitizer=address",
    }
    let (host, _) = rustc()?;
    let target_dir = target_dir(options.sanitizer)?;
    let mut command = cargo()?;
    // Coverage passes are behind a switch of the compiler; it is the same compiler.
    command.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", flags);
    command.args(["build", "--release", "--target", &host, "--target-dir"]).arg(&target_dir);
    for name in names {
        known(name)?;
        command.args(["--bin", name]);
    }
    if options.plant.is_some() {
        command.args(["--features", "planted"]);
    }
    let what = match names {
        [one] => format!("building the target {one}"),
        all => format!("building {} targets", all.len()),
    };
    tool::step(&what, command)?;
    for name in names {
        // A name of its own, because a build for a plant and one without share the place.
        let (built, own) = (target_dir.join(&host).join("release").join(name), program(name, options)?);
        let _ = std::fs::remove_file(&own);
        std::fs::hard_link(&built, &own)
            .map_err(|error| Failure::new(format!("{}: {error}", own.display())))?;
    }
    Ok(())
}

fn target_dir(sanitizer: Sanitizer) -> Result<PathBuf, Failure> {
    let name = match sanitizer {
        Sanitizer::None => "target/fuzz",
        Sanitizer::Address => "target/fuzz-address",
    };
    Ok(folder()?.join(name))
}

/// The program of a target that was built.
pub(super) fn program(name: &str, options: &Options) -> Result<PathBuf, Failure> {
    let kind = if options.plant.is_some() { "planted" } else { "plain" };
    Ok(target_dir(options.sanitizer)?.join(format!("{name}-{kind}")))
}

/// The folders of a target; those that are written to exist.
pub(super) fn folders(target: &str, plant: Option<&str>) -> Result<Folders, Failure> {
    let top = folder()?;
    // What a planted bug leads to is no seed for anybody, and it has to be found anew each time. What finds nothing without
    // it is the same search.
    let corpus = match plant {
        Some(plant) => {
            let corpus = top.join("target/planted-corpus").join(plant).join(target);
            let _ = std::fs::remove_dir_all(&corpus);
            corpus
        }
        None => top.join("target/corpus").join(target),
    };
    let make = |path: PathBuf| {
        std::fs::create_dir_all(&path)
            .map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
        Ok::<_, Failure>(path)
    };
    let dictionary = top.join("dictionaries").join(format!("{target}.dict"));
    Ok(Folders {
        corpus: make(corpus)?,
        seeds: make(top.join("corpus").join(target))?,
        dictionary: dictionary.is_file().then_some(dictionary),
        artifacts: make(top.join("artifacts").join(target))?,
    })
}
