//! Findings: which bug it is, the smallest input that shows it, and the file that shows it again.

use super::Options;
use super::build::{self, Folders};
use super::reproducer::Reproducer;
use super::worker;
use crate::Failure;
use crate::qemu::die_with_parent;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

/// How long an input is made smaller, in seconds.
const MINIMISE_SECONDS: u64 = 10;
/// How long a reproducer may take: more than it takes to say where it hangs.
const REPRODUCE: Duration = Duration::from_secs(60);
/// How long one input may take when it is run alone. As long as the fuzzer allows, so that a finding is one again.
const ALONE: Duration = Duration::from_secs(worker::TIMEOUT);
/// The same while it is made smaller: every attempt that hangs takes so long.
const SMALLER_SECONDS: u64 = 2;
/// How what an input without end is called begins.
const HANG: &str = "no end within ";
/// Frames of the stack that tell one bug from another.
const FRAMES: usize = 3;

/// A distinct bug.
pub(super) struct Finding {
    /// The message, and where it came from.
    pub(super) what: String,
    pub(super) reproducer: PathBuf,
    pub(super) times: usize,
    bug: String,
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
        text + &format!("    {} bytes: {path}\n    see it again: anykernel replay {path}", self.bytes)
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
        // It ended without a place, for memory or time: once more, so that it tells.
        (what, stack) = read(&once(program, options, artifact)?);
    }
    let bug = number(&what, &stack);
    if let Some(known) = findings.iter().position(|finding| finding.bug == bug) {
        findings[known].times += 1;
        let _ = std::fs::remove_file(artifact);
        return Ok(known);
    }
    let smallest = minimise(program, options, artifact, &bug);
    let input = std::fs::read(smallest.as_deref().unwrap_or(artifact))
        .map_err(|error| Failure::new(format!("{}: {error}", artifact.display())))?;
    let file = Reproducer {
        target: options.target.clone(),
        plant: options.planted().map(str::to_owned),
        harness: build::harness()?,
        bug: bug.clone(),
        input,
    };
    let reproducer = folders.artifacts.join(format!("{}.repro", file.bug));
    std::fs::write(&reproducer, file.to_bytes())
        .map_err(|error| Failure::new(format!("{}: {error}", reproducer.display())))?;
    let bytes = file.input.len();
    for path in [Some(artifact.to_path_buf()), smallest].into_iter().flatten() {
        let _ = std::fs::remove_file(path);
    }
    findings.push(Finding { what, reproducer, times: 1, bug, stack, bytes });
    Ok(findings.len() - 1)
}

/// FNV-1a over what makes the bug, so that its file has the same name every time: where it was, whatever the message says of
/// this input. Only a finding without a stack is told apart by its message.
fn number(what: &str, stack: &[String]) -> String {
    let place = what.rsplit_once(" (").map_or("", |(_, place)| short(place));
    let message = what.bytes().filter(|byte| !byte.is_ascii_digit());
    let number = |bytes: &mut dyn Iterator<Item = u8>| {
        bytes.fold(0x811c_9dc5, |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
    };
    let number = match stack {
        [] => number(&mut message.into_iter()),
        _ => number(&mut stack.iter().flat_map(|frame| frame.bytes()).chain(place.bytes())),
    };
    format!("{number:08x}")
}

/// Makes the input smaller as long as it shows the same bug.
fn minimise(program: &Path, options: &Options, artifact: &Path, bug: &str) -> Option<PathBuf> {
    let small = artifact.with_extension("small");
    let mut command = build::start(program).ok()?;
    command.arg("-minimize_crash=1").arg(format!("-max_total_time={MINIMISE_SECONDS}"));
    command.arg(format!("-timeout={SMALLER_SECONDS}"));
    command.arg(format!("-exact_artifact_path={}", small.display())).arg(artifact);
    options.plant(&mut command);
    run(command, Duration::from_secs(3 * MINIMISE_SECONDS));
    // libFuzzer takes any crash for the same one.
    if small.is_file() {
        let (what, stack) = read(&once(program, options, &small).ok()?);
        if number(&what, &stack) == bug {
            return Some(small);
        }
    }
    let _ = std::fs::remove_file(&small);
    None
}

/// Runs one input, which says where it hangs and where it wants too much.
fn once(program: &Path, options: &Options, input: &Path) -> Result<String, Failure> {
    let mut command = build::start(program)?;
    // The fuzzer's own alarm is off.
    command.arg("-timeout=0").arg(input).env("ANYKERNEL_TELL_PLACE", ALONE.as_secs().to_string());
    options.plant(&mut command);
    Ok(run(command, 3 * ALONE).said)
}

/// What a program did.
struct Ran {
    said: String,
    /// How it ended; `None`: not by itself.
    status: Option<ExitStatus>,
}

/// Runs the program to its end, at most for a time.
fn run(mut command: Command, most: Duration) -> Ran {
    command.env("RUST_BACKTRACE", "1").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    die_with_parent(&mut command);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return Ran { said: error.to_string(), status: None },
    };
    let stderr = child.stderr.take();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut stderr) = stderr {
            // What could be read is what there is.
            let _ = std::io::Read::read_to_end(&mut stderr, &mut text);
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    let start = std::time::Instant::now();
    let mut status = None;
    while status.is_none() && start.elapsed() < most {
        status = child.try_wait().ok().flatten();
        std::thread::sleep(Duration::from_millis(20));
    }
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    Ran { said: reader.join().unwrap_or_default(), status }
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
        if let Some((_, report)) = said.split_once("ERROR: AddressSanitizer: ") {
            return read_address_sanitizer(report);
        }
        let error =
            said.lines().find_map(|line| line.split_once("ERROR: ")).map_or("it ended", |(_, what)| what);
        let refused = said.lines().find(|line| line.starts_with("memory allocation of"));
        return (refused.unwrap_or(error).to_owned(), Vec::new());
    };
    let message: Vec<&str> = lines
        .by_ref()
        .take_while(|line| !line.starts_with("stack backtrace:") && !line.starts_with("   0:"))
        .collect();
    let hangs = message.first().is_some_and(|line| line.starts_with(HANG));
    let (mut stack, mut function) = (Vec::new(), None);
    // The first stack only: when this ends the process, a second one may follow.
    for line in lines.take_while(|line| line.starts_with(' ')) {
        let line = line.trim();
        if let Some((number, name)) = line.split_once(": ")
            && number.bytes().all(|byte| byte.is_ascii_digit())
        {
            function = Some(name);
        } else if let (Some(path), Some(name)) = (line.strip_prefix("at "), function.take())
            && is_ours(path)
            && stack.len() < FRAMES
        {
            let frame = frame(name, path);
            // Where in a function an endless loop was met is chance.
            let place = frame.rsplit_once(':').filter(|_| hangs).map(|(place, _)| place.to_owned());
            stack.push(place.unwrap_or(frame));
        }
    }
    let message = message.join(" ");
    (if message.is_empty() { place } else { format!("{message} ({place})") }, stack)
}

/// A path without the folders above.
fn short(path: &str) -> &str {
    ["/components/", "/anykernel/src", "/hypercall/src", "/examples/", "/fuzz/src/", "/registry/src/"]
        .iter()
        .find_map(|part| path.find(part))
        .map_or(path, |at| &path[at + 1..])
}

/// A frame as it is shown, without column and the folders above.
fn frame(name: &str, path: &str) -> String {
    let path = path.rsplit_once(':').map_or(path, |(path, _)| path);
    format!("{name} at {}", short(path))
}

/// What AddressSanitizer said: the kind, which is its first word, and lines `#0 0x5581 in name path:line:column`, of which the
/// first stack is where it happened.
fn read_address_sanitizer(report: &str) -> (String, Vec<String>) {
    let kind = report.split_whitespace().next().unwrap_or_default();
    let is_frame = |line: &&str| line.trim_start().starts_with('#');
    let stack = report
        .lines()
        .skip_while(|line| !is_frame(line))
        .take_while(is_frame)
        .filter_map(|line| line.split_once(" in ")?.1.rsplit_once(' '))
        .filter(|(_, path)| is_ours(path))
        .map(|(name, path)| frame(name, path))
        .take(FRAMES)
        .collect();
    (format!("AddressSanitizer: {kind}"), stack)
}

/// What is on every stack: the libraries, the language, and the watch over executions.
const NOT_OURS: [&str; 9] = [
    "/rustc/",
    "/rustlib/",
    "/registry/",
    "libfuzzer",
    "src/watch.rs",
    "src/host.rs",
    "fuzz/src/lib.rs",
    "fuzz/fuzz_targets/",
    "fuzz/examples/",
];

fn is_ours(path: &str) -> bool {
    path.contains(".rs:") && !NOT_OURS.iter().any(|part| path.contains(part))
}

/// Runs the input of a reproducer again, without a fuzzer around, and shows what happens: `Ok(true)` if something is found.
/// With `gdb` this process becomes the debugger, which stops where the finding is.
///
/// Errors: it is no whole reproducer of this version; the harness does not build, or has no such target.
pub fn reproduce(path: &Path, gdb: bool) -> Result<bool, Failure> {
    let shown = path.display();
    let path = &std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let fail = |error: &dyn std::fmt::Display| Failure::new(format!("{shown}: {error}"));
    let file = std::fs::read(path).map_err(|error| fail(&error))?;
    let file = Reproducer::parse(&file).map_err(|error| fail(&error))?;
    build::known(&file.target).map_err(|error| fail(&error))?;
    if file.harness != build::harness()? {
        eprintln!(
            "anykernel: {shown}: made with another state of fuzz/: its input may mean something else now"
        );
    }
    let program = build::reproduce(file.plant.is_some())?;
    let mut command = build::start(match gdb {
        true => Path::new("gdb"),
        false => &program,
    })?;
    if gdb {
        command.args(["-q", "-ex", "set breakpoint pending on", "-ex", "break rust_panic", "-ex", "run"]);
        command.arg("--args").arg(&program);
    }
    command.args(["--target", &file.target]).arg(path);
    if let Some(plant) = &file.plant {
        command.env("ANYKERNEL_PLANT", plant);
    }
    if gdb {
        let error = command.exec();
        return Err(Failure::new(format!(
            "gdb cannot be started: {error}: install it (Debian: apt-get install gdb)"
        )));
    }
    let ran = run(command, REPRODUCE);
    if ran.status.is_some_and(|status| status.success()) {
        println!("passed: nothing is found any more");
        return Ok(false);
    }
    eprint!("{}", ran.said);
    let (what, stack) = match ran.status {
        Some(_) => read(&ran.said),
        None => (format!("no end within {} s", REPRODUCE.as_secs()), Vec::new()),
    };
    println!("FOUND: {what}");
    stack.iter().for_each(|frame| println!("    {frame}"));
    if ran.status.is_some() {
        let same = number(&what, &stack) == file.bug;
        println!("    {}", if same { "as it was found" } else { "in another place than it was found" });
    }
    Ok(true)
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

    const HANGS: &str = "thread '<unnamed>' (1) panicked at src/watch.rs:121:9:
no end within 10 s
stack backtrace:
   0: anykernel_fuzz::watch::tell_hang::late
             at ./fuzz/src/watch.rs:121:9
   1: <unknown>
   2: follow
             at ./components/net/src/dns.rs:264:15
   3: anykernel_fuzz::execute
             at ./fuzz/src/lib.rs:77:5
note: run with `RUST_BACKTRACE=full` for a verbose backtrace.
thread '<unnamed>' (1) panicked at /rustc/59/library/core/src/panicking.rs:225:5:
panic in a function that cannot unwind
stack backtrace:
   0: follow
             at ./components/net/src/dns.rs:264:15
";

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
        // What a message says of the input does not make another bug, another place does.
        let bug = number(&what, &stack);
        assert_eq!(bug, number(&what.replace("at 0", "after [1, 2]"), &stack));
        assert_ne!(bug, number(&what.replace(":264:", ":265:"), &stack));
        assert_ne!(bug, number(&what, &stack[..1]));
        let (what, stack) = read(HANGS);
        assert_eq!(what, "no end within 10 s (src/watch.rs:121:9)");
        assert_eq!(stack, ["follow at components/net/src/dns.rs"]);
        let again = HANGS.replace(":264:", ":271:").replace("10 s", "20 s");
        assert_eq!(number(&read(&again).0, &read(&again).1), number(&what, &stack));
        let report = "==7==ERROR: AddressSanitizer: heap-use-after-free on address 0x602 at pc 0x55
READ of size 1 at 0x602 thread T0
    #0 0x55 in read<u8> /rustc/5980/library/core/src/ptr/mod.rs:1700:9
    #1 0x56 in take /home/me/anykernel/components/virtio/src/queue.rs:77:5

freed by thread T0 here:
    #0 0x57 in drop /home/me/anykernel/components/virtio/src/dma.rs:7:5
";
        let (what, stack) = read(report);
        assert_eq!(what, "AddressSanitizer: heap-use-after-free");
        assert_eq!(stack, ["take at components/virtio/src/queue.rs:77"]);
        let (what, stack) = read("==1== ERROR: libFuzzer: timeout after 10 seconds\n");
        assert_eq!((what.as_str(), stack.len()), ("libFuzzer: timeout after 10 seconds", 0));
    }
}
