//! `anykernel run` as users meet it, on every target alike: what it says, how it ends, and what it leaves on the disks.
//! Needs QEMU, curl, tshark, mtools and dosfstools.

use anykernel_tests::{Running, anykernel, line};
use serde_json::Value;
use std::io::{BufRead, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const TARGETS: [&[&str]; 4] = [
    &["--on", "userspace"],
    &["--on", "rumprun"],
    &["--on", "rumprun", "--machine", "q35", "--cpus", "2"],
    &["--on", "linux-module"],
];

/// Longer than any boot takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// One boot at a time: the machine's CPUs are few.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn tool(program: &str, arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    let output = Command::new(program).args(arguments.iter().map(|argument| argument.as_ref())).output();
    output.unwrap_or_else(|error| panic!("{program}: {error}"))
}

fn text(output: &[u8]) -> String {
    String::from_utf8_lossy(output).into_owned()
}

/// A FAT image with one file.
fn fat(dir: &Path) -> PathBuf {
    let image = dir.join("disk.fat");
    std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    assert!(tool("/sbin/mkfs.fat", &[&"-F", &"32", &image]).status.success());
    let file = dir.join("hello.txt");
    std::fs::write(&file, "hello").unwrap();
    assert!(tool("mcopy", &[&"-i", &image, &file, &"::hello.txt"]).status.success());
    image
}

#[test]
fn events_and_frames_are_the_same_on_every_target() {
    let dir = tempfile::tempdir().unwrap();
    let image = fat(dir.path());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    for target in TARGETS {
        let frames = dir.path().join("frames.pcap");
        let mut command = Command::new(anykernel());
        command.args(["run", "httpd", "--json", "--log", "info", "--publish", "0:80", "--disk"]).arg(&image);
        let (mut run, mut stdout) = Running::start(command.arg("--pcap").arg(&frames).args(target));
        let event = |line: &str| -> Value {
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{target:?}: {error}: {line:?}"))
        };
        let publish = line(&mut stdout, |line| Some(event(line)).filter(|event| event["event"] != "console"));
        assert_eq!(publish["event"], "publish", "{target:?}: {publish}");
        assert_eq!(publish["guest"], 80, "{target:?}: {publish}");
        let host = publish["host"].as_str().unwrap();
        let body = tool("curl", &[&"-s", &"--fail", &format!("http://{host}/hello.txt")]);
        assert_eq!(text(&body.stdout), "hello", "{target:?}");

        run.interrupt();
        let rest: Vec<Value> = stdout.lines().map(|line| event(&line.unwrap())).collect();
        assert!(run.end(PATIENCE).success(), "{target:?}: {rest:?}");
        let (exit, before) = rest.split_last().unwrap();
        assert_eq!((&exit["event"], &exit["status"]), (&"exit".into(), &0.into()), "{target:?}");
        assert!(before.is_empty(), "{target:?}: a good end goes without saying: {before:?}");

        // The request as Wireshark reads it, and nothing that it finds malformed.
        let fields =
            ["-Y", "http.request.uri == \"/hello.txt\"", "-T", "fields", "-e", "ip.dst", "-e", "tcp.dstport"];
        let found = Command::new("tshark").arg("-r").arg(&frames).args(fields).output().unwrap();
        assert_eq!(text(&found.stdout).trim(), "10.0.2.15\t80", "{target:?}: {}", text(&found.stderr));
        let bad = tool("tshark", &[&"-r", &frames, &"-Y", &"_ws.malformed || ip.checksum.status == 0"]);
        assert!(bad.status.success() && bad.stdout.is_empty(), "{target:?}: {}", text(&bad.stdout));
    }
}

#[test]
fn ctrl_c_loses_nothing_that_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let expected: String = (0..10_000).map(|line| format!("line {line}\n")).collect();
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    for target in TARGETS {
        let image = fat(dir.path());
        let disk = format!("{}:rw", image.display());
        let mut command = Command::new(anykernel());
        command.args(["run", "selftest", "--disk", &disk]);
        let (mut run, mut stdout) = Running::start(command.args(target).args(["--net", "none", "hold"]));
        let written = line(&mut stdout, |line| line.contains("hold/written").then(|| line.to_owned()));
        assert!(written.contains("pass"), "{target:?}: {written}");

        let start = Instant::now();
        run.interrupt();
        let mut rest = String::new();
        stdout.read_to_string(&mut rest).unwrap();
        assert!(run.end(PATIENCE).success(), "{target:?}: {rest}");
        assert!(start.elapsed() < Duration::from_secs(14), "{target:?}: it had to be killed: {rest}");
        let held = tool("mtype", &[&"-i", &image, &"::held.txt"]);
        assert!(text(&held.stdout) == expected, "{target:?}: {}", text(&held.stderr));
        let check = tool("/sbin/fsck.fat", &[&"-n", &image]);
        assert!(check.status.success(), "{target:?}: {}", text(&check.stdout));
    }
}

/// The command fails with that status and one line in which all of the words are.
#[track_caller]
fn fails(command: &mut Command, status: i32, words: &[&str]) {
    let output = command.output().unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{stderr}{}", text(&output.stdout));
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(words.iter().all(|word| stderr.contains(word)), "{words:?} not all in: {stderr}");
}

#[test]
fn a_port_in_use_is_said_in_one_line_by_every_target() {
    let dir = tempfile::tempdir().unwrap();
    let image = fat(dir.path());
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    for target in TARGETS {
        let mut command = Command::new(anykernel());
        command.args(["run", "httpd", "--publish", &format!("{port}:80"), "--disk"]).arg(&image).args(target);
        fails(&mut command, 1, &[&format!("port {port}"), "in use", "publish another port"]);
    }
}

#[test]
fn a_unikernel_in_4_mib_serves_or_says_that_it_is_too_little() {
    let dir = tempfile::tempdir().unwrap();
    let image = fat(dir.path());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let command = |cpus: &str| {
        let mut command = Command::new(anykernel());
        command.args(["run", "httpd", "--on", "rumprun", "--memory", "4M", "--cpus", cpus]);
        command.args(["--json", "--publish", "0:80", "--disk"]).arg(&image);
        command
    };
    let (mut run, mut stdout) = Running::start(&mut command("1"));
    let event: Value = line(&mut stdout, |line| serde_json::from_str(line).ok());
    assert_eq!(event["event"], "publish", "{event}");
    let host = event["host"].as_str().unwrap();
    assert_eq!(text(&tool("curl", &[&"-s", &format!("http://{host}/hello.txt")]).stdout), "hello");
    run.interrupt();
    assert!(run.end(PATIENCE).success());

    // The stacks of 16 CPUs and their threads do not fit.
    let output = command("16").output().unwrap();
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("out of memory") && said.contains("--memory"), "{said}");
    assert!(!said.contains("backtrace") && !said.contains("panic"), "{said}");
}

/// As on a machine without headers and without a network: in a mount namespace of its own, for which no privileges are needed.
#[test]
fn without_a_kernel_to_be_had_the_module_says_so_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let image = fat(dir.path());
    for program in ["apt-get", "apt-cache"] {
        let fake = dir.path().join(program);
        std::fs::write(&fake, "#!/bin/sh\necho E: no network >&2\nexit 100\n").unwrap();
        assert!(tool("chmod", &[&"+x", &fake]).status.success());
    }
    let store = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("target/linux");
    std::fs::create_dir_all(&store).unwrap();
    let hide =
        "mount -t tmpfs none /usr/src && mount -t tmpfs none \"$0\" && PATH=$1:$PATH && shift && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--mount", "sh", "-c", hide]).arg(&store).arg(dir.path());
    let run = ["run", "httpd", "--on", "linux-module", "--publish", "0:80", "--disk"];
    command.arg(anykernel()).args(run).arg(&image);
    fails(&mut command, 1, &["no Debian kernel 6.1 (-cloud-amd64)", "apt-get update", "--on userspace"]);
}
