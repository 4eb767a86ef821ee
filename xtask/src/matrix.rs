//! Targets x checks, on real images, through the same command that users run.

use crate::images::{self, Image};
use crate::sh::{self, Result, step};
use crate::{http, install};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

pub(crate) const TARGETS: [&str; 4] = ["userspace", "rumprun", "linux-module", SIMULATED];

/// The simulated host: all of it runs in one process, so it has a command of its own.
const SIMULATED: &str = "simulated";

/// Rows that make no sense on a target: how their names begin, and why.
const NOT_APPLICABLE: &[(&str, &str, &str)] = &[(
    SIMULATED,
    "usb/",
    "it has no host-usb contract; the USB stack is tried against models in its own tests",
)];

/// Files that httpd serves in each target, by curl, compared by sha256.
const FETCHES: usize = 1000;

#[derive(Clone)]
enum Status {
    Pass,
    Fail(String),
    /// Not run, or not even reported by this target; never counts as pass.
    Absent(String),
    /// It makes no sense on this target.
    NotApplicable(&'static str),
}

/// What shows that a target can do something: a test of `tests/tests/FILE.rs`, by file and name.
type Shown = (&'static str, &'static str);

const LIBUSB: Shown = ("usb_process", "a_stick_is_read_and_written");
const STICK: Shown = ("usb", "the_unikernel_reads_and_writes_a_stick");
const MODULE: Shown = ("usb_linux_module", "a_stick_works_in_6_1");
const PULLED_OUT: Shown = ("usb_process", "a_stick_is_mounted_written_and_pulled_out");
const TAKEN: Shown = ("usb_process", "a_keyboard_and_a_network_device_are_taken");
const COMES_AND_GOES: Shown = ("usb_linux_module", "devices_come_and_go_under_the_module");

/// USB, in the order of the first of [`TARGETS`]: each cell is an end-to-end test with real controllers and devices, as QEMU has them.
const USB: [(&str, [Shown; 3]); 6] = [
    ("usb/enumeration", [LIBUSB, ("usb", "the_unikernel_lists_what_is_plugged_in"), MODULE]),
    ("usb/storage-read", [LIBUSB, STICK, MODULE]),
    ("usb/storage-write-fsck", [LIBUSB, STICK, MODULE]),
    ("usb/keys", [TAKEN, ("usb_guest", "typed_keys_and_a_mouse_reach_the_application"), COMES_AND_GOES]),
    ("usb/net", [TAKEN, ("usb_guest", "a_server_on_a_network_device_that_comes_and_goes"), COMES_AND_GOES]),
    ("usb/hot-plug", [PULLED_OUT, ("usb_guest", "two_hundred_hot_plugs"), COMES_AND_GOES]),
];

struct Row {
    target: &'static str,
    check: String,
    status: Status,
}

struct Images {
    ext4: Image,
    fat: Image,
}

/// Runs the matrix and prints it; fails if a cell is neither `pass` nor `not applicable`.
/// `tested`: all tests have just passed.
pub(crate) fn run(json: bool, only: Option<&str>, tested: bool) -> Result {
    if let Some(name) = only.filter(|name| !TARGETS.contains(name)) {
        return Err(format!("no target {name}; there are {}", TARGETS.join(", ")));
    }
    install::everything()?;
    let anykernel = sh::anykernel()?;
    step("making disk images");
    let images = Images { ext4: images::ext4("matrix", 1500)?, fat: images::fat32("matrix", 300)? };
    let mut rows = Vec::new();
    for target in TARGETS.iter().filter(|target| only.is_none_or(|only| only == **target)) {
        if *target == SIMULATED {
            step("simulated: selftest and httpd");
            rows.extend(simulated(&anykernel, &images)?);
            continue;
        }
        step(&format!("{target}: selftest"));
        rows.extend(selftest(&anykernel, target, &images)?);
        step(&format!("{target}: httpd"));
        rows.push(httpd(&anykernel, target, &images));
    }
    rows.extend(usb(&anykernel, only, tested));
    fill_absent(&mut rows);
    let failed = print(json, &rows);
    if failed == 0 { Ok(()) } else { Err(format!("{failed} of {} cells are not pass", rows.len())) }
}

fn command(anykernel: &Path, app: &str, target: &str, images: &Images) -> Command {
    let mut command = Command::new(anykernel);
    command
        .args(["run", app, "--on", target, "--cpus", "2", "--memory", "256M", "--disk"])
        .arg(&images.ext4.path);
    command.stdin(Stdio::null());
    command
}

/// A copy of the FAT image for a target to write to, and how it is given to a command.
fn own_fat(target: &str, images: &Images) -> Result<(PathBuf, OsString)> {
    let fat = images.fat.path.with_extension(format!("{target}.fat"));
    std::fs::copy(&images.fat.path, &fat).map_err(|error| format!("{}: {error}", fat.display()))?;
    let mut disk = fat.clone().into_os_string();
    disk.push(":rw");
    Ok((fat, disk))
}

/// What fsck.fat says of the copy, as a row. The copy is gone afterwards.
fn fsck(target: &'static str, fat: &Path) -> Row {
    let clean = images::check_fat(fat);
    let _ = std::fs::remove_file(fat);
    Row { target, check: "fat/fsck".into(), status: clean.map_or_else(Status::Fail, |()| Status::Pass) }
}

/// A verdict, as the selftest application prints it.
fn row(target: &'static str, value: &Value) -> Option<Row> {
    let reason = || value["reason"].as_str().unwrap_or("no reason given").to_string();
    let status = match value["status"].as_str() {
        Some("pass") => Status::Pass,
        Some("absent") => Status::Absent(reason()),
        _ => Status::Fail(reason()),
    };
    Some(Row { target, check: value["check"].as_str()?.into(), status })
}

/// The same checks on the simulated host. There the client that fetches files is simulated too.
fn simulated(anykernel: &Path, images: &Images) -> Result<Vec<Row>> {
    let (fat, disk) = own_fat(SIMULATED, images)?;
    let mut command = Command::new(anykernel);
    command.args(["simulate", "selftest", "--cpus", "2", "--json", "--disk"]).arg(&images.ext4.path);
    let child = command
        .arg("--disk")
        .arg(disk)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{}: {error}", anykernel.display()))?;
    let watchdog = Watchdog::new(&child, 600);
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    drop(watchdog);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let verdicts = report["verdicts"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut rows: Vec<Row> = verdicts.iter().filter_map(|value| row(SIMULATED, value)).collect();
    if rows.is_empty() {
        let reason = format!("the run ended with {} and no verdict; {}", output.status, report["findings"]);
        rows.push(Row { target: SIMULATED, check: "selftest/ends".into(), status: Status::Fail(reason) });
    }
    rows.push(fsck(SIMULATED, &fat));
    Ok(rows)
}

/// Every verdict of the selftest application becomes a row; a run that does not come to its end is one too.
fn selftest(anykernel: &Path, target: &'static str, images: &Images) -> Result<Vec<Row>> {
    let (fat, disk) = own_fat(target, images)?;
    let config = json!({
        "mounts": [
            {"source": "disk0", "target": "/", "read_only": true},
            {"source": "disk1", "target": "/fat"},
        ],
    });
    let config_file = sh::work_dir("matrix")?.join("selftest.json");
    std::fs::write(&config_file, config.to_string()).map_err(|error| error.to_string())?;
    let mut child = command(anykernel, "selftest", target, images)
        .arg("--disk")
        .arg(disk)
        .arg("--config")
        .arg(&config_file)
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{}: {error}", anykernel.display()))?;
    let watchdog = Watchdog::new(&child, 600);
    let mut rows = Vec::new();
    let mut done = false;
    let output = child.stdout.take().ok_or("no standard output")?;
    for line in BufReader::new(output).split(b'\n').map_while(std::result::Result::ok) {
        // Kernel messages and firmware may share the console.
        let text = String::from_utf8_lossy(&line);
        let Some(value) = text.find('{').and_then(|at| serde_json::from_str::<Value>(text[at..].trim()).ok())
        else {
            continue;
        };
        rows.extend(row(target, &value));
        done |= value["selftest"] == "done";
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    drop(watchdog);
    let end = if done && status.success() {
        Status::Pass
    } else {
        Status::Fail(format!("the run ended with {status}{}", if done { "" } else { " before it was done" }))
    };
    rows.push(Row { target, check: "selftest/ends".into(), status: end });
    rows.push(fsck(target, &fat));
    Ok(rows)
}

/// A thousand files through curl.
fn httpd(anykernel: &Path, target: &'static str, images: &Images) -> Row {
    let check = || -> Result {
        let port = http::free_port()?;
        let child = command(anykernel, "httpd", target, images)
            .args(["--publish", &format!("{port}:80")])
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| error.to_string())?;
        let server = Watchdog::new(&child, 900);
        let result = http::wait_for(port, 120)
            .and_then(|()| http::fetch_and_compare(port, &images.ext4.sums, FETCHES, 1));
        server.interrupt(child)?;
        result
    };
    Row { target, check: "httpd/sha256".into(), status: check().map_or_else(Status::Fail, |()| Status::Pass) }
}

/// The cells of [`USB`]. A test that several name runs once.
fn usb(anykernel: &Path, only: Option<&str>, tested: bool) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut known: BTreeMap<Shown, Status> = BTreeMap::new();
    for (check, cells) in &USB {
        for (target, shown) in
            TARGETS.into_iter().zip(cells).filter(|(target, _)| only.is_none_or(|only| only == *target))
        {
            let run = || {
                step(&format!("{target}: {}", shown.1));
                passes(anykernel, *shown).map_or_else(Status::Fail, |()| Status::Pass)
            };
            let status = if tested { Status::Pass } else { known.entry(*shown).or_insert_with(run).clone() };
            rows.push(Row { target, check: (*check).into(), status });
        }
    }
    rows
}

/// Runs one end-to-end test.
fn passes(anykernel: &Path, (file, name): Shown) -> Result {
    let mut test = sh::cargo();
    test.args(["test", "--quiet", "--package", "anykernel-tests", "--test", file, name, "--", "--exact"]);
    let said = sh::quiet(test.env("ANYKERNEL", anykernel))?;
    // None of that name is no failure for cargo.
    match String::from_utf8_lossy(&said).contains("1 passed") {
        true => Ok(()),
        false => Err(format!("there is no test {name} in tests/tests/{file}.rs")),
    }
}

/// Ends a child that runs for too long, so that a hang is a failure and not a stuck test.
pub(crate) struct Watchdog {
    pid: u32,
    done: std::sync::mpsc::Sender<()>,
}

impl Watchdog {
    pub(crate) fn new(child: &Child, seconds: u64) -> Self {
        let pid = child.id();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || {
            let limit = std::time::Duration::from_secs(seconds);
            if wait.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("xtask: process {pid} ran for over {seconds} s, ending it");
                let _ = Command::new("kill").arg(pid.to_string()).status();
            }
        });
        Self { pid, done }
    }

    /// What Ctrl-C does; the child must end by itself within ten seconds.
    pub(crate) fn interrupt(self, mut child: Child) -> Result {
        let _ = Command::new("kill").args(["-INT", &self.pid.to_string()]).status();
        for _ in 0..100 {
            if child.try_wait().map_err(|error| error.to_string())?.is_some() {
                return Ok(());
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        let _ = child.kill();
        let _ = child.wait();
        Err("did not end within 10 s of Ctrl-C".into())
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let _ = self.done.send(());
    }
}

/// A check that some target has and another lacks is `absent` there, which never counts as pass, unless it makes no sense
/// there.
fn fill_absent(rows: &mut Vec<Row>) {
    let targets: Vec<&'static str> =
        TARGETS.into_iter().filter(|t| rows.iter().any(|row| row.target == *t)).collect();
    let mut known: BTreeMap<String, Vec<&'static str>> = BTreeMap::new();
    for row in rows.iter() {
        known.entry(row.check.clone()).or_default().push(row.target);
    }
    for (check, have) in known {
        for target in targets.iter().filter(|target| !have.contains(target)) {
            rows.push(Row {
                target,
                check: check.clone(),
                status: match not_applicable(target, &check) {
                    Some(reason) => Status::NotApplicable(reason),
                    None => Status::Absent("this target did not report the check".into()),
                },
            });
        }
    }
}

fn not_applicable(target: &str, check: &str) -> Option<&'static str> {
    let found = NOT_APPLICABLE.iter().find(|(at, begins, _)| *at == target && check.starts_with(begins));
    found.map(|(.., reason)| *reason)
}

/// Prints the rows and returns how many fail, or are absent without being known to be.
fn print(json: bool, rows: &[Row]) -> usize {
    let mut failed = 0;
    for row in rows {
        let (status, reason) = match &row.status {
            Status::Pass => ("pass", ""),
            Status::Fail(reason) => ("fail", reason.as_str()),
            Status::Absent(reason) => ("absent", reason.as_str()),
            Status::NotApplicable(reason) => ("not applicable", *reason),
        };
        failed += usize::from(matches!(row.status, Status::Fail(_) | Status::Absent(_)));
        if json {
            println!(
                "{}",
                json!({"target": row.target, "check": row.check, "status": status, "reason": reason})
            );
        } else {
            println!("{:<13} {:<42} {status:<14} {reason}", row.target, row.check);
        }
    }
    failed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_test_that_is_named_is_there() {
        for (file, name) in USB.iter().flat_map(|(_, cells)| cells) {
            let path = sh::root().join(format!("tests/tests/{file}.rs"));
            let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{file}: {error}"));
            assert!(text.contains(&format!("#[test]\nfn {name}() {{")), "{file} has no test {name}");
        }
    }
}
