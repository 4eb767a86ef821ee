//! The scenarios of the simulated host, for a bounded time.

use anykernel_userspace::sim::scenario::{self, FaultRange, Options, Report};
use anykernel_userspace::sim::{LinkModel, Schedule};
use hypercall::Call;

fn clean(report: &Report) {
    println!(
        "{}: {} hypercalls, {} virtual ms, {:?}",
        report.scenario,
        report.hypercalls,
        report.virtual_ns / 1_000_000,
        report.counters
    );
    let shown: Vec<_> = report.findings.iter().take(12).map(String::as_str).collect();
    assert!(report.findings.is_empty(), "{} findings:\n{}", report.findings.len(), shown.join("\n"));
}

fn bad_link() -> LinkModel {
    LinkModel {
        loss_ppm: 20_000,
        duplicate_ppm: 10_000,
        reorder_ppm: 20_000,
        corrupt_ppm: 5_000,
        ..LinkModel::default()
    }
}

#[test]
fn transfer_over_a_bad_link() {
    let options = Options { seconds: 20, nodes: 4, link: bad_link(), ..Options::default() };
    let report = scenario::run(&options).unwrap();
    clean(&report);
    assert!(report.counters["bytes_received"] > 1 << 20, "{:?}", report.counters);
    assert!(report.counters["frames_lost"] > 0 && report.counters["frames_corrupted"] > 0);
    assert_eq!(report, scenario::run(&options).unwrap(), "the same seed is the same run");
    let random = Options { schedule: Schedule::Random { switch_ppm: 50_000 }, seed: 2, ..options };
    clean(&scenario::run(&random).unwrap());
}

#[test]
fn a_grid_of_routers() {
    let report =
        scenario::run(&Options { scenario: "grid".into(), nodes: 30, ..Options::default() }).unwrap();
    clean(&report);
    assert_eq!(report.counters["pings_answered"], 29 + 28);
    // More than once for each question and each answer: the nodes are routers, and the pings cross several.
    assert!(report.counters["forwarded"] > 4 * (29 + 28), "{:?}", report.counters);
}

#[test]
fn httpd_under_loss() {
    let options =
        Options { scenario: "httpd".into(), seconds: 20, nodes: 4, link: bad_link(), ..Options::default() };
    let report = scenario::run(&options).unwrap();
    clean(&report);
    assert!(report.counters["fetched"] > 5, "{:?}", report.counters);
}

#[test]
fn power_cuts() {
    for seed in 1..=4 {
        let options = Options { scenario: "power-cuts".into(), seed, ..Options::default() };
        let report = scenario::sweep_power_cuts(&options, 1);
        clean(&report);
        assert!(report.counters["files_checked"] > 10, "{:?}", report.counters);
    }
}

fn faults(range: FaultRange, stride: u64) {
    let options = Options { scenario: "faults".into(), ..Options::default() };
    let report = scenario::sweep_faults(&options, &range, stride, 0);
    clean(&report);
    assert!(report.counters["injected"] > 0, "{:?}", report.counters);
}

/// The HTTP server, on FAT and on ext4 (whose tools `cargo xtask install` installs).
#[test]
fn each_call_of_a_server_fails() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, image) = (dir.path().join("tree"), dir.path().join("image.ext4"));
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("file"), scenario::served_file()).unwrap();
    let mut mkfs = std::process::Command::new("/sbin/mkfs.ext4");
    let made = mkfs.args(["-q", "-F", "-d"]).arg(&tree).arg(&image).arg("2M").output();
    let made = made.unwrap_or_else(|error| panic!("{mkfs:?}: {error}; `cargo xtask install` installs it"));
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    for disks in [vec![], vec![image.to_str().unwrap().to_string()]] {
        let options = Options { scenario: "faults-httpd".into(), disks, ..Options::default() };
        for range in [FaultRange::Each, FaultRange::EachFrom, FaultRange::Chance(20_000, 50)] {
            let report = scenario::sweep_faults(&options, &range, 1, 0);
            clean(&report);
            assert!(report.counters["injected"] > 20, "{:?}", report.counters);
        }
    }
}

#[test]
fn each_call_fails_once() {
    faults(FaultRange::Each, 1);
}

#[test]
fn all_calls_fail_from_one_on() {
    faults(FaultRange::EachFrom, 1);
}

#[test]
fn one_kind_of_call_fails_from_then_on() {
    for call in [
        Call::DiskFlush,
        Call::DiskWrite,
        Call::DiskRead,
        Call::LinkSend,
        Call::LinkReceive,
        Call::FillRandom,
    ] {
        faults(FaultRange::EachFromOf(call), 1);
    }
}

#[test]
fn threads_in_each_others_way() {
    let schedules =
        [Schedule::Random { switch_ppm: 200_000 }, Schedule::Priorities { depth: 3, steps: 5_000 }];
    for seed in 0..40 {
        let schedule = schedules[seed as usize % 2];
        let options = Options { scenario: "tasks".into(), seed, cpus: 2, schedule, ..Options::default() };
        clean(&scenario::run(&options).unwrap());
    }
}

#[test]
fn datagrams_out_of_order() {
    let options = Options { scenario: "datagrams".into(), seconds: 10, ..Options::default() };
    let report = scenario::run(&options).unwrap();
    clean(&report);
    assert!(
        report.counters["frames_reordered"] > 100 && report.counters["arrived"] > 300,
        "{:?}",
        report.counters
    );
}

#[test]
fn each_park_returns_early() {
    faults(FaultRange::EachOf(Call::Park), 1);
}

#[test]
fn calls_fail_by_chance() {
    faults(FaultRange::Chance(20_000, 300), 1);
}
