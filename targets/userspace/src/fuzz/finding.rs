//! Findings: which bug it is, the smallest input that shows it, and the file that shows it again.

use super::build::{self, Folders};
use super::{MAGIC, Options};
use crate::Failure;
use crate::qemu::die_with_parent;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// How long an input is made smaller, in seconds.
const MINIMISE_SECONDS: u64 = 10;
/// Frames of the stack that tell one bug from another.
const FRAMES: usize = 3;

/// A distinct bug.
pub(super) struct Finding {
    /// The message, and where it came from.
    pub(super) what: String,
    pub(super) reproducer: PathBuf,
    pub(super) times: usize,
    stack: Vec<String>,
    bytes: usize,
}

impl Finding {
    /// For a person.
    pub(super) fn tell(&self, options: &Options, executions: u64, after: Duration) -> String {
        let planted = options.planted().map(|name| format!("planted bug {name} ")).unwrap_or_default();
        let mut text =
            format!("FOUND: {planted}after {executions} executions, {} s: {}\n", after.as_secs(), self.what);
        for frame in &self.stack {
            text += &format!("    {frame}\n");
        }
        let path = self.reproducer.display();
        text + &format!(
            "    {} bytes: {path}\n    see it again: anykernel fuzz --reproduce {path}",
            self.bytes
        )
    }
}

/// Looks at an input that ended a worker, and says which finding it is.
pub(super) fn examine(
    program: &Path,
    folders: &Folders,
    options: &Options,
    artifact: &Path,
    said: &str,
    findings: &mut Vec<Finding>,
) -> Result<usize, Failure> {
    let (mut what, mut stack) = read(said);
    if stack.is_empty() {
        // It ended without a panic, for memory or time: once more, with the place of a refused allocation.
        (what, stack) = read(&once(program, options, artifact, Duration::from_secs(30)));
    }
    if let Some(known) = findings.iter().position(|finding| finding.what == what && finding.stack == stack) {
        findings[known].times += 1;
        let _ = std::fs::remove_file(artifact);
        return Ok(known);
    }
    let smallest = minimise(program, options, artifact, &stack);
    let input = std::fs::read(smallest.as_deref().unwrap_or(artifact))
        .map_err(|error| Failure::new(format!("{}: {error}", artifact.display())))?;
    let mut file = MAGIC.to_vec();
    let plant = options.planted().map(|name| format!(" {name}")).unwrap_or_default();
    file.extend(format!("1 {}{plant}\n", options.target).into_bytes());
    file.extend(&input);
    let reproducer = folders.artifacts.join(format!("{:08x}.repro", number(&what, &stack)));
    std::fs::write(&reproducer, file)
        .map_err(|error| Failure::new(format!("{}: {error}", reproducer.display())))?;
    for path in [Some(artifact.to_path_buf()), smallest].into_iter().flatten() {
        let _ = std::fs::remove_file(path);
    }
    findings.push(Finding { what, reproducer, times: 1, stack, bytes: input.len() });
    Ok(findings.len() - 1)
}

/// FNV-1a over what makes the bug, so that its file has the same name every time.
fn number(what: &str, stack: &[String]) -> u32 {
    let bytes =
        stack.iter().flat_map(|frame| frame.bytes()).chain(what.bytes().filter(|b| !b.is_ascii_digit()));
    bytes.fold(0x811c_9dc5, |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// Makes the input smaller as long as it shows the same bug.
fn minimise(program: &Path, options: &Options, artifact: &Path, stack: &[String]) -> Option<PathBuf> {
    let small = artifact.with_extension("small");
    let mut command = Command::new(program);
    command.arg("-minimize_crash=1").arg(format!("-max_total_time={MINIMISE_SECONDS}"));
    command.arg(format!("-exact_artifact_path={}", small.display())).arg(artifact);
    run(command, options, Duration::from_secs(3 * MINIMISE_SECONDS));
    // libFuzzer takes any crash for the same one.
    let same = small.is_file() && read(&once(program, options, &small, Duration::from_secs(30))).1 == stack;
    if same {
        return Some(small);
    }
    let _ = std::fs::remove_file(&small);
    None
}

fn once(program: &Path, options: &Options, input: &Path, most: Duration) -> String {
    let mut command = Command::new(program);
    command.arg("-timeout=20").arg(input).env("ANYKERNEL_TELL_REFUSALS", "1");
    run(command, options, most)
}

/// Runs the program to its end, at most for a time, and returns what it said.
fn run(mut command: Command, options: &Options, most: Duration) -> String {
    command.env("RUST_BACKTRACE", "1").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    if let Some(plant) = &options.plant {
        command.env("ANYKERNEL_PLANT", plant);
    }
    die_with_parent(&mut command);
    let Ok(mut child) = command.spawn() else { return String::new() };
    let stderr = child.stderr.take();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut stderr) = stderr {
            let _ = std::io::Read::read_to_end(&mut stderr, &mut text);
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    let start = std::time::Instant::now();
    while child.try_wait().is_ok_and(|status| status.is_none()) {
        if start.elapsed() > most {
            let _ = child.kill();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = child.wait();
    reader.join().unwrap_or_default()
}

/// The message of what happened, and the innermost frames of our own code.
fn read(said: &str) -> (String, Vec<String>) {
    let mut lines = said.lines();
    let mut what = None;
    for line in lines.by_ref() {
        if let Some((_, place)) = line.split_once("panicked at ") {
            what = Some(place.trim_end_matches(':').to_owned());
            break;
        }
        if line.starts_with("allocation of ") {
            what = Some(line.to_owned());
            break;
        }
    }
    let Some(place) = what else {
        let error =
            said.lines().find_map(|line| line.split_once("ERROR: ")).map_or("it ended", |(_, what)| what);
        let refused = said.lines().find(|line| line.starts_with("memory allocation of"));
        return (refused.unwrap_or(error).to_owned(), Vec::new());
    };
    let message: Vec<&str> = lines
        .by_ref()
        .take_while(|line| !line.starts_with("stack backtrace:") && !line.starts_with("   0:"))
        .collect();
    let (mut stack, mut function) = (Vec::new(), None);
    for line in lines {
        let line = line.trim();
        if let Some((number, name)) = line.split_once(": ")
            && number.bytes().all(|byte| byte.is_ascii_digit())
        {
            function = Some(name);
        } else if let (Some(path), Some(name)) = (line.strip_prefix("at "), function.take())
            && is_ours(path)
            && stack.len() < FRAMES
        {
            let path = path.rsplit_once(':').map_or(path, |(path, _)| path);
            let short = ["/components/", "/anykernel/src", "/hypercall/src", "/examples/", "/fuzz/"]
                .iter()
                .find_map(|part| path.find(part))
                .map_or(path, |at| &path[at + 1..]);
            stack.push(format!("{name} at {short}"));
        }
    }
    let message = message.join(" ");
    (if message.is_empty() { place } else { format!("{message} ({place})") }, stack)
}

/// Whether a frame is of this project, and not of the libraries, the language, or the watch over executions.
fn is_ours(path: &str) -> bool {
    !["/rustc/", "/rustlib/", "/registry/", "src/watch.rs", "src/host.rs", "libfuzzer"]
        .iter()
        .any(|part| path.contains(part))
        && path.contains(".rs:")
}

/// Runs the input of a reproducer again, without a fuzzer around, and shows what happens: `Ok(true)` if the finding is
/// still there. `anykernel replay` calls this for files that begin with [`MAGIC`].
///
/// Errors: it is no reproducer, or of another version; the harness does not build.
pub fn reproduce(path: &Path) -> Result<bool, Failure> {
    let file = std::fs::read(path).map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
    let line = file.split(|byte| *byte == b'\n').next().unwrap_or_default();
    if !line.starts_with(MAGIC) || line.len() > 200 {
        return Err(Failure::new(format!(
            "{}: no reproducer of `anykernel fuzz`: it does not begin with {:?}",
            path.display(),
            String::from_utf8_lossy(MAGIC)
        )));
    }
    let planted = String::from_utf8_lossy(line).split(' ').count() > 3;
    let status = Command::new(build::reproduce(planted)?)
        .arg(path)
        .env("RUST_BACKTRACE", "1")
        .status()
        .map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
    match status.code() {
        Some(0) => Ok(false),
        // It said in one line what is wrong with the file.
        Some(2) => Err(Failure::new("")),
        _ => Ok(true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "INFO: Seed: 1
thread '<unnamed>' (8056) panicked at src/net/tcp.rs:264:13:
the stream ended at 0
stack backtrace:
   0: __rustc::rust_begin_unwind
             at /rustc/59807616e1fa/library/std/src/panicking.rs:689:5
   1: receive
             at ./src/net/tcp.rs:264:13
   2: park
             at ./src/host.rs:249:31
   3: wait<anykernel_fuzz::host::FuzzHost>
             at /home/me/anykernel/hypercall/src/irq.rs:50:21
   4: main
             at /home/me/.cargo/registry/src/index/libfuzzer-sys-0.4.13/libfuzzer/FuzzerMain.cpp:20:30
==8056== ERROR: libFuzzer: deadly signal";

    #[test]
    fn reads_what_a_crash_said() {
        let (what, stack) = read(SAID);
        assert_eq!(what, "the stream ended at 0 (src/net/tcp.rs:264:13)");
        assert_eq!(
            stack,
            [
                "receive at ./src/net/tcp.rs:264",
                "wait<anykernel_fuzz::host::FuzzHost> at hypercall/src/irq.rs:50"
            ]
        );
        // Numbers in a message do not make another bug.
        assert_eq!(number(&what, &stack), number(&what.replace("at 0", "at 17"), &stack));
        let (what, stack) = read("==1== ERROR: libFuzzer: timeout after 10 seconds\n");
        assert_eq!((what.as_str(), stack.len()), ("libFuzzer: timeout after 10 seconds", 0));
    }
}
