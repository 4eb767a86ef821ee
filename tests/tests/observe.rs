//! What a person sees of a running domain, on every target: traces, frames, and recordings that run again in a process. Needs
//! what booting the targets needs, curl, and tshark (Debian: apt-get install tshark).

use anykernel_tests::{Running, anykernel, free_port, line};
use anykernel_userspace::runner::{self, Target};
use anykernel_userspace::{NetSpec, RunSpec, gateway};
use hypercall::ExitStatus;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// The application `selftest`: it calls the whole core contract and sends packets to itself and its neighbour, then ends.
fn selftest(trace: &Path, frames: &Path) -> RunSpec {
    let config = anykernel::config::Config {
        app: ["selftest", "conformance", "network"].map(Into::into).into(),
        log: "warn".into(),
        interfaces: vec![gateway::guest_interface()],
        ..Default::default()
    };
    RunSpec {
        net: NetSpec::User,
        cpus: 2,
        trace: Some(trace.into()),
        pcap: Some(frames.into()),
        ..RunSpec::new(config)
    }
}

fn is_traced(target: Target, known: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let (trace, frames) = (dir.path().join("trace.json"), dir.path().join("frames.pcapng"));
    let status =
        runner::run(target, &selftest(&trace, &frames)).unwrap_or_else(|failure| panic!("{failure}"));
    assert_eq!(status, ExitStatus::Success);

    let trace: Value = serde_json::from_slice(&std::fs::read(trace).unwrap()).expect("a JSON document");
    let events = trace["traceEvents"].as_array().unwrap();
    let calls: Vec<&Value> = events.iter().filter(|event| event["ph"] == "X" || event["ph"] == "b").collect();
    let cpus: BTreeSet<u64> = calls.iter().map(|call| call["tid"].as_u64().unwrap()).collect();
    assert_eq!(cpus, BTreeSet::from([0, 1]), "calls come from both CPUs");
    for name in known {
        let (component, call) = name.split_once('.').unwrap();
        let found = calls.iter().any(|event| event["name"] == call && event["cat"] == component);
        assert!(found, "{name} is not in the trace of {} calls", calls.len());
    }
    let timed = calls.iter().filter(|call| call["ph"] == "X");
    assert!(timed.clone().count() > 0 && timed.clone().all(|call| call["dur"].is_number()));
    assert_eq!(trace["otherData"]["events"].as_u64(), Some(calls.len() as u64));

    let header = std::fs::read(&frames).unwrap();
    assert_eq!(header.get(..4), Some(&[0x0a, 0x0d, 0x0d, 0x0a][..]), "a pcapng section");
    let shark = Command::new("tshark").arg("-r").arg(&frames).output();
    let shark = shark.expect("tshark (Debian: apt-get install tshark)");
    assert!(shark.status.success(), "{}", String::from_utf8_lossy(&shark.stderr));
}

#[test]
fn traces_of_userspace() {
    is_traced(Target::Userspace, &["net.park", "kernel.spawn", "hostlink.link_receive"]);
}

#[test]
fn traces_of_rumprun() {
    is_traced(Target::Rumprun, &["net.park", "kernel.spawn", "virtnet.dma_alloc", "virtio.mmio_write"]);
}

#[test]
fn traces_of_linux_module() {
    is_traced(Target::LinuxModule, &["net.park", "kernel.spawn", "hostlink.link_receive"]);
}

const SITE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../targets/userspace/demo/site.ext4");

/// Serves real clients, recorded, and runs the recording twice.
fn is_replayed(target: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (file, port) = (dir.path().join("recording"), free_port());
    let mut command = Command::new(anykernel());
    command.args(["run", "httpd", "--json", "--on", target, "--cpus", "2", "--disk", SITE, "--record"]);
    command.arg(&file).args(["--publish", &format!("{port}:80")]);
    let (mut server, mut stdout) = Running::start(&mut command);
    line(&mut stdout, |line| line.contains("\"publish\"").then_some(()));
    let url = format!("http://127.0.0.1:{port}/docs/contract.txt");
    let curl = Command::new("curl")
        .args(["-sS", "--fail", "--parallel", "--max-time", "60"])
        .args((0..8).flat_map(|_| [url.as_str(), "-o", "/dev/null"]))
        .status();
    assert!(curl.expect("curl (Debian: apt-get install curl)").success());
    server.interrupt();
    assert!(server.end(Duration::from_secs(60)).success());
    let replay = || -> Value {
        let output =
            Command::new("timeout").arg("60").arg(anykernel()).args(["replay", "--json"]).arg(&file).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{target}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let first = replay();
    assert_eq!(first["end"], "complete", "{target}");
    // Eight requests are far over a hundred calls on every target; a recording that began too late is none.
    assert!(first["calls"].as_u64().unwrap() > 200, "{target}: {first}");
    assert_eq!(first, replay(), "{target}: twice the same hash");
}

#[test]
fn recordings_of_rumprun_replay_in_a_process() {
    is_replayed("rumprun");
}

#[test]
fn recordings_of_linux_module_replay_in_a_process() {
    is_replayed("linux-module");
}
