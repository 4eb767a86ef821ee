//! `--record` and `replay`, by the command itself.

use anykernel_userspace::RunSpec;
use anykernel_userspace::record::Recording;
use anykernel_userspace::replay::{RecordingFile, header};
use assert_cmd::Command;
use hypercall::layers::recorded::Record;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

const SITE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/site.ext4");

/// Records a server that serves a page to a few clients, and is then ended by this signal.
fn record(dir: &Path, signal: &str) -> PathBuf {
    let file = dir.join("recording");
    let mut server = std::process::Command::new(env!("CARGO_BIN_EXE_anykernel"))
        .args(["run", "httpd", "--json", "--cpus", "2", "--publish", "0:80", "--disk", SITE, "--record"])
        .arg(&file)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
    let published = lines
        .find_map(|line| {
            let event: serde_json::Value = serde_json::from_str(&line.unwrap()).unwrap();
            (event["event"] == "publish").then(|| event["host"].as_str().unwrap().to_owned())
        })
        .expect("a publish event");
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let address = published.clone();
            std::thread::spawn(move || {
                let mut stream = TcpStream::connect(address).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                write!(stream, "GET /docs/contract.txt HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                    .unwrap();
                let mut answer = Vec::new();
                stream.read_to_end(&mut answer).unwrap();
                assert!(answer.starts_with(b"HTTP/1.1 200"));
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());
    // What is not yet written when it is killed is lost.
    let mut len = 0;
    while std::fs::metadata(&file).unwrap().len()
        != std::mem::replace(&mut len, std::fs::metadata(&file).unwrap().len())
    {
        std::thread::sleep(Duration::from_millis(300));
    }
    let kill = std::process::Command::new("kill").args([signal, &server.id().to_string()]).status();
    assert!(kill.unwrap().success());
    assert_eq!(server.wait().unwrap().success(), signal == "-INT");
    file
}

/// What `replay` says, as JSON, and on standard error.
fn replay(file: &Path, more: &[&str]) -> (serde_json::Value, String) {
    let mut command = Command::cargo_bin("anykernel").unwrap();
    let output =
        command.arg("replay").arg(file).arg("--json").args(more).timeout(Duration::from_secs(60)).output();
    let output = output.unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    assert_eq!(output.status.success(), value["why"].is_null() && !value.is_null(), "{value} {said}");
    (value, said)
}

/// The recording with other records.
fn rewrite(file: &Path, change: impl FnOnce(&mut Vec<Record>)) {
    let recording = RecordingFile::open(file).unwrap();
    let mut rest = &recording.records[..];
    let mut records: Vec<Record> = std::iter::from_fn(|| Record::take(&mut rest).ok()).collect();
    change(&mut records);
    let mut bytes = Vec::new();
    records.iter().for_each(|record| record.put(&mut bytes));
    let header = header(&recording.header.target, &RunSpec::new(recording.header.config));
    let (writer, ring) = Recording::start(file, &header, 1 << 30).unwrap();
    assert!(ring.write(&bytes, || {
        std::thread::yield_now();
        true
    }));
    writer.finish().unwrap();
}

#[test]
fn a_recording_replays_to_the_same_state_and_says_where_it_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let file = record(dir.path(), "-INT");
    let (whole, said) = replay(&file, &[]);
    assert_eq!((whole["end"].as_str(), said.as_str()), (Some("complete"), ""));
    let calls = whole["calls"].as_u64().unwrap();
    assert!(calls > 250, "{whole}");
    assert_eq!(replay(&file, &[]).0, whole, "twice the same");

    let (part, _) = replay(&file, &["--until", "200"]);
    assert_eq!((part["end"].as_str(), part["calls"].as_u64()), (Some("reached"), Some(200)));
    assert_ne!(part["hash"], whole["hash"]);

    // The file as a crash of the host may leave it.
    let bytes = std::fs::read(&file).unwrap();
    let cut = dir.path().join("cut");
    std::fs::write(&cut, &bytes[..bytes.len() - 5]).unwrap();
    let (value, said) = replay(&cut, &[]);
    assert_eq!(value["end"], "complete");
    assert!(
        value["calls"].as_u64().unwrap() <= calls && said.contains("middle of a chunk"),
        "{value} {said}"
    );

    // A component that does something else: here, one that is told to have done so.
    let other = dir.path().join("other");
    std::fs::copy(&file, &other).unwrap();
    let mut changed = 0;
    rewrite(&other, |records| {
        changed = (100..).find(|at| !records[*at].arguments.is_empty()).unwrap();
        records[changed].arguments[0] ^= 1;
    });
    let (value, said) = replay(&other, &[]);
    assert_eq!((value["end"].as_str(), value["calls"].as_u64()), (Some("diverged"), Some(changed as u64)));
    assert!(said.contains(&format!("diverged at call {}: recorded is ", changed + 1)), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");

    let corrupt = dir.path().join("corrupt");
    let mut wrong = bytes.clone();
    wrong[bytes.len() / 2] ^= 1;
    std::fs::write(&corrupt, wrong).unwrap();
    let (_, said) = replay(&corrupt, &[]);
    assert!(said.contains("is corrupt at byte"), "{said}");
    let (_, said) = replay(Path::new(SITE), &[]);
    assert!(said.contains("is not a recording"), "{said}");
}

/// A recording that somebody changed is refused in one line, or goes as far as it can: no crash, no end of memory, no wait
/// for ever.
#[test]
fn a_changed_recording_ends() {
    let dir = tempfile::tempdir().unwrap();
    let file = record(dir.path(), "-INT");
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |end: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) as usize % end.max(1)
    };
    let mut ends = std::collections::BTreeMap::new();
    for round in 0..30 {
        let changed = dir.path().join("changed");
        std::fs::copy(&file, &changed).unwrap();
        let mut what = String::new();
        rewrite(&changed, |records| {
            for _ in 0..1 + random(3) {
                let (at, other) = (random(records.len()), random(records.len()));
                let strange =
                    [0, 1, 7, 0xffff, 1 << 20, 1 << 31, 1 << 40, u64::MAX >> 1, u64::MAX][random(9)];
                let record = &mut records[at];
                let kind = random(8);
                what += &format!("{kind} {at} {:?} {strange:#x} {other}; ", record.event);
                match kind {
                    0..=2 => match record.results.len() {
                        0 => record.results.push(strange),
                        len => record.results[random(len)] = strange,
                    },
                    3 => record.data.truncate(random(record.data.len())),
                    4 => record.data.extend((0..1 + random(3000)).map(|n| n as u8)),
                    5 => record.thread = random(6) as u32,
                    6 => drop(records.remove(at)),
                    _ => records.swap(at, other),
                }
            }
        });
        // In 4 GiB of addresses, so that asking for too much is seen.
        let output = Command::new("sh")
            .args([
                "-c",
                "ulimit -v 4194304; exec \"$0\" replay --json \"$1\"",
                env!("CARGO_BIN_EXE_anykernel"),
            ])
            .arg(&changed)
            .timeout(Duration::from_secs(60))
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let code = output.status.code();
        assert!(
            matches!(code, Some(0 | 1)) && said.lines().count() <= 1,
            "round {round}: {what}{code:?}: {said}"
        );
        let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let end = value["end"].as_str().unwrap_or("refused").to_owned();
        assert_ne!(end, "panicked", "round {round}: {what}{said}");
        *ends.entry(end).or_insert(0) += 1;
    }
    assert!(ends.get("diverged").is_some_and(|count| *count > 5), "{ends:?}");
}

#[test]
fn a_recording_of_what_was_killed_is_good_up_to_there() {
    let dir = tempfile::tempdir().unwrap();
    let file = record(dir.path(), "-KILL");
    let (value, _) = replay(&file, &[]);
    // The clients had their answers.
    assert!(value["end"] == "complete" && value["calls"].as_u64().unwrap() > 200, "{value}");
}

/// Every call of the core contract, and threads that spin for each other.
#[test]
fn the_conformance_suite_is_recorded_and_replayed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("recording");
    let mut command = Command::cargo_bin("anykernel").unwrap();
    command.args(["run", "selftest", "--cpus", "2", "--net", "none", "--record"]).arg(&file);
    let output = command.args(["--", "conformance"]).timeout(Duration::from_secs(120)).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    let parallel = said.lines().find(|line| line.contains("conformance/threads/parallel"));
    assert!(parallel.is_some_and(|line| line.contains("\"pass\"")), "{parallel:?}");
    let (first, said) = replay(&file, &[]);
    assert_eq!((first["end"].as_str(), said.as_str()), (Some("complete"), ""), "{first}");
    assert_eq!(replay(&file, &[]).0, first);
}

/// Needs gdb (Debian: apt-get install gdb).
#[test]
fn the_debugger_stops_in_the_component() {
    let dir = tempfile::tempdir().unwrap();
    let file = record(dir.path(), "-INT");
    let mut command = Command::cargo_bin("anykernel").unwrap();
    command.arg("replay").arg(&file).args(["--gdb", "--until", "60"]).timeout(Duration::from_secs(120));
    // What a person types: a place in the component, on to it, and who called it.
    const SOURCE: &str = include_str!("../../../examples/httpd/src/connection.rs");
    let line = 1 + SOURCE.lines().position(|line| line.contains("connection.run().await")).unwrap();
    command.write_stdin(format!("break connection.rs:{line}\ncontinue\nbacktrace 5\nkill\nquit\n"));
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("anykernel_replay_stop"), "{said}");
    assert!(said.contains("httpd/src/connection.rs"), "{said}");
}
