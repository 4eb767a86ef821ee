//! What a person sees of a running domain, on every target: traces, frames, and recordings that run again in a process. Needs
//! what booting the targets needs, curl, and tshark (Debian: apt-get install tshark).

use anykernel::Kernel;
use anykernel::config::{Config, Mount};
use anykernel_tests::{Running, anykernel, free_port, line, module};
use anykernel_usb::testing::StorageModel;
use anykernel_usb::{Options, UsbStack};
use anykernel_userspace::record::Recording;
use anykernel_userspace::replay::header;
use anykernel_userspace::runner::{self, Target};
use anykernel_userspace::{NetSpec, RunSpec, apps, gateway, start_components};
use hypercall::layers::{Recorded, Recorder};
use hypercall::testing::TestHost;
use hypercall::{ExitStatus, UsbPath};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::BufReader;
use std::path::Path;
use std::process::{ChildStdout, Command};
use std::time::{Duration, Instant};

/// The application `selftest`: it calls the whole core contract and sends packets to itself and its neighbour, then ends.
fn selftest(trace: &Path, frames: &Path) -> RunSpec {
    let config = Config {
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

/// A server of the demo's site that real clients have asked for a page, eight times, and what it says.
fn serve(target: &str, more: &[&str]) -> (Running, BufReader<ChildStdout>) {
    let port = free_port();
    let mut command = Command::new(anykernel());
    command.args(["run", "httpd", "--json", "--on", target, "--cpus", "2"]).args(more);
    command.args(["--publish", &format!("{port}:80")]);
    let (server, mut stdout) = Running::start(&mut command);
    line(&mut stdout, |line| line.contains("\"publish\"").then_some(()));
    let url = format!("http://127.0.0.1:{port}/docs/contract.txt");
    let curl = Command::new("curl")
        .args(["-sS", "--fail", "--parallel", "--max-time", "60"])
        .args((0..8).flat_map(|_| [url.as_str(), "-o", "/dev/null"]))
        .status();
    assert!(curl.expect("curl (Debian: apt-get install curl)").success());
    (server, stdout)
}

fn replay(file: &Path) -> Value {
    let output =
        Command::new("timeout").arg("60").arg(anykernel()).args(["replay", "--json"]).arg(file).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["end"], "complete");
    // One that began too late is none.
    assert!(said["calls"].as_u64().unwrap() > 20, "{said}");
    said
}

/// Serves real clients, recorded, and runs the recording twice.
fn is_replayed(target: &str, disk: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("recording");
    let (mut server, _stdout) = serve(target, &[disk, &["--record", file.to_str().unwrap()]].concat());
    server.interrupt();
    assert!(server.end(Duration::from_secs(60)).success());
    let said = replay(&file);
    // Eight requests are far over a hundred calls on every target.
    assert!(said["calls"].as_u64().unwrap() > 200, "{target}: {said}");
    assert_eq!(said, replay(&file), "{target}: twice the same hash");
}

#[test]
fn recordings_of_rumprun_replay_in_a_process() {
    is_replayed("rumprun", &["--disk", SITE]);
}

/// With the unikernel's own driver of the host controller.
#[test]
fn recordings_with_a_stick_replay_in_a_process() {
    is_replayed("rumprun", &["--usb", &format!("disk:{SITE}"), "--mount", "usb1-1:/"]);
}

#[test]
fn recordings_of_linux_module_replay_in_a_process() {
    is_replayed("linux-module", &["--disk", SITE]);
}

/// What the recorder itself holds is given back, too: the module counts.
#[test]
fn a_recorded_module_leaves_nothing_behind() {
    const SCRIPT: &str = r#"
insmod /lib/anykernel.ko links=0 config_file=/config.json || say "not loaded"
status
rmmod anykernel && say "unloaded"
dmesg | grep -E 'anykernel:.*left behind|BUG:|WARNING:|Oops' >/dev/ttyS1
"#;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("recording");
    let config = Config { app: ["selftest", "tmpfs"].map(Into::into).into(), ..Config::default() };
    let spec = RunSpec { cpus: 2, record: Some(file.clone()), ..RunSpec::new(config) };
    let (lines, said) = module::run_script(&spec, "6.1", SCRIPT);
    assert_eq!(lines, ["status ended 0", "unloaded", "complete", "0"], "{}", said.last_words());
    replay(&file);
}

#[test]
fn a_recording_is_good_up_to_where_the_machine_was_killed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("recording");
    let (server, _stdout) = serve("rumprun", &["--disk", SITE, "--record", file.to_str().unwrap()]);
    // SIGKILL, and the machine goes with it.
    drop(server);
    replay(&file);
}

/// A platform's own USB stack: its devices and the stick's disk, through the components, and again without any of it.
#[test]
fn recordings_of_a_platforms_usb_replay_in_a_process() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("recording");
    let path = UsbPath::parse("1-2").unwrap();
    let config = Config {
        app: ["usb", "list", "--verbose"].map(Into::into).into(),
        mounts: vec![Mount { source: "usb1-2".into(), target: "/".into(), kind: None, read_only: true }],
        ..Config::default()
    };
    let (spec, options) = (RunSpec::new(config.clone()), Options::of_config(&config).unwrap());
    let host = TestHost::new();
    host.plug_usb(path, Box::new(StorageModel::new(std::fs::read(SITE).unwrap()).0));
    let (recording, ring) = Recording::start(&file, &header("userspace", &spec), spec.record_limit).unwrap();
    let recorder: &'static Recorder = Box::leak(Box::new(Recorder::new(ring)));
    let recorded = Recorded::new(host, recorder);
    let kernel = Kernel::new(recorded, config);
    let stack = UsbStack::start_platform(&kernel, options).unwrap();
    assert!(stack.settle(10_000_000_000));
    kernel.provide(stack);
    start_components(&kernel).unwrap();
    assert_eq!(apps::run("usb", &kernel), Some(ExitStatus::Success));
    kernel.counters();
    kernel.shutdown();
    drop(kernel);
    recorded.leave();
    recording.finish().unwrap();
    assert_eq!(replay(&file), replay(&file), "twice the same hash");
}

/// `anykernel top` sees what a guest's calls cost, and its counters.
fn is_watched(target: &str) {
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control");
    let (mut server, _stdout) = serve(target, &["--disk", SITE, "--control", control.to_str().unwrap()]);
    let top = |more: &[&str]| Command::new(anykernel()).arg("top").arg(&control).args(more).output().unwrap();
    let ask = || -> Value { serde_json::from_slice(&top(&["--once", "--json"]).stdout).unwrap() };
    let end = Instant::now() + Duration::from_secs(30);
    // A guest tells twice a second.
    while ask()["counters"]["httpd.requests"].as_u64() < Some(8) {
        assert!(Instant::now() < end, "{}", ask());
        std::thread::sleep(Duration::from_millis(100));
    }
    let said = ask();
    let calls = said["calls"].as_array().unwrap();
    assert!(
        calls.iter().any(|call| call["call"] == "monotonic_ns" && call["calls"].as_u64() > Some(8)),
        "{said}"
    );
    let table = String::from_utf8(top(&["--once"]).stdout).unwrap();
    assert!(table.contains("monotonic_ns") && table.contains("httpd.requests"), "{table}");
    server.interrupt();
    assert!(server.end(Duration::from_secs(60)).success());
    let output = top(&["--once"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.lines().count() == 1 && said.contains("--control"), "{said}");
}

#[test]
fn top_shows_rumprun() {
    is_watched("rumprun");
}

#[test]
fn top_shows_linux_module() {
    is_watched("linux-module");
}
