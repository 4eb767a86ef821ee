//! Running cargo for a guest, with a line of progress.

use super::process;
use crate::{Failure, interrupt};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// The workspace this binary was built from; guests are built from the same source.
///
/// Errors: it is not there any more (the binary was moved to another machine).
pub fn workspace() -> Result<PathBuf, Failure> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new("/"));
    if root.join("Cargo.toml").is_file() && root.join("hypercall").is_dir() {
        return Ok(root.into());
    }
    Err(Failure::new(format!(
        "the source tree {} is gone, and guests are built from it: run this command with `cargo run --release --` \
         in a checkout",
        root.display()
    )))
}

/// A spinner on standard error that says what is going on; invisible when that is not a terminal.
pub fn spinner(message: impl Into<String>) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(message.into());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg} {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// Runs `command` (cargo, make, ...) to its end under a spinner that shows its latest line, as in "building the
/// unikernel: Compiling smoltcp". If it fails, its output goes to standard error and the failure says `what`.
///
/// Call it on the main thread: the child dies with the thread that started it.
pub fn step(what: &str, mut command: Command) -> Result<(), Failure> {
    let program = command.get_program().to_string_lossy().into_owned();
    let bar = spinner(what);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    process::die_with_parent(&mut command);
    let mut child = command.spawn().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Failure::new(format!("{what}: {program} is not installed")),
        _ => Failure::new(format!("{what}: cannot start {program}: {error}")),
    })?;
    let pid = child.id();
    let guard = interrupt::on_interrupt(move || process::terminate(pid));
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let out = std::thread::spawn(move || lines(stdout, |_| ()));
    let err = lines(stderr, |line| bar.set_message(format!("{what}: {}", line.trim())));
    let out = out.join().unwrap_or_default();
    let status = child.wait().map_err(|error| Failure::new(format!("{what}: {error}")))?;
    drop(guard);
    bar.finish_and_clear();
    if interrupt::interrupted() {
        return Err(Failure::new(format!("{what}: interrupted")));
    }
    if !status.success() {
        eprint!("{out}{err}");
        return Err(Failure::new(format!("{what} failed ({program}, {status}): see above")));
    }
    Ok(())
}

/// Waits until nobody else builds in `dir`, and keeps others waiting until dropped.
pub fn exclusive(dir: &Path) -> Result<std::fs::File, Failure> {
    let path = dir.join(".anykernel-lock");
    let locked = std::fs::create_dir_all(dir)
        .and_then(|()| std::fs::File::create(&path))
        .and_then(|file| file.lock().map(|()| file));
    locked.map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

/// cargo, in the workspace.
pub fn cargo() -> Result<Command, Failure> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace()?);
    Ok(command)
}

fn lines(from: Option<impl std::io::Read>, mut each: impl FnMut(&str)) -> String {
    let mut all = String::new();
    let Some(from) = from else { return all };
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    while from.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
        let text = String::from_utf8_lossy(&line);
        each(&text);
        all.push_str(&text);
        line.clear();
    }
    all
}
