//! Every bug of `docs/planted-bugs.md` that the simulation is to find is found, within its budget, and by the scenario meant
//! for it. One test, because only one bug grows in a process at a time.

use anykernel_userspace::sim::scenario::{self, FaultRange, Options, Report};
use anykernel_userspace::sim::{LinkModel, Schedule};
use hypercall::Call;

/// A bug, the finding that names it, and the search: a number of tries of something that reports.
struct Plant {
    name: &'static str,
    finding: &'static str,
    tries: u64,
    search: fn(u64) -> Report,
}

fn tasks(try_: u64) -> Report {
    let schedule = match try_ % 2 {
        0 => Schedule::Random { switch_ppm: 200_000 },
        _ => Schedule::Priorities { depth: 3, steps: 5_000 },
    };
    let options = Options { scenario: "tasks".into(), seed: try_, cpus: 2, schedule, ..Options::default() };
    scenario::run(&options).unwrap()
}

fn power(try_: u64) -> Report {
    let options = Options { scenario: "power-cuts".into(), seed: 1 + try_, ..Options::default() };
    scenario::sweep_power_cuts(&options, 1)
}

fn faults(range: &FaultRange) -> Report {
    let options = Options { scenario: "faults".into(), ..Options::default() };
    scenario::sweep_faults(&options, range, 1, 0)
}

fn flushes(_: u64) -> Report {
    faults(&FaultRange::EachFromOf(Call::DiskFlush))
}

fn each(_: u64) -> Report {
    faults(&FaultRange::Each)
}

fn lossy(try_: u64) -> Report {
    let link = LinkModel { loss_ppm: 300_000, ..LinkModel::default() };
    let options = Options { scenario: "grid".into(), seed: try_, nodes: 4, link, ..Options::default() };
    scenario::run(&options).unwrap()
}

fn datagrams(try_: u64) -> Report {
    scenario::run(&Options { scenario: "datagrams".into(), seed: try_, seconds: 10, ..Options::default() })
        .unwrap()
}

const PLANTS: [Plant; 7] = [
    Plant { name: "lost-wakeup", finding: "parked since", tries: 60, search: tasks },
    Plant { name: "lock-order", finding: "parked since", tries: 60, search: tasks },
    Plant { name: "missing-flush", finding: "acknowledged data lost", tries: 2, search: power },
    Plant { name: "swallowed-error", finding: "acknowledged data lost", tries: 1, search: flushes },
    Plant {
        name: "leak-on-error",
        finding: "call 7 (link_open) failed: busy: the kernel is still held",
        tries: 1,
        search: each,
    },
    Plant { name: "forgotten-timer", finding: "no answer from", tries: 20, search: lossy },
    Plant { name: "reorder", finding: "although no frame was", tries: 3, search: datagrams },
];

#[test]
fn every_planted_bug_is_found() {
    let list = include_str!("../../../docs/planted-bugs.md");
    let listed = list.lines().filter(|line| line.contains("| `simulate ")).count();
    assert_eq!(listed, PLANTS.len(), "docs/planted-bugs.md lists another number for the simulation");
    let mut missed = Vec::new();
    for Plant { name, finding, tries, search } in PLANTS {
        assert!(list.contains(&format!("| `{name}` |")), "{name} is not in docs/planted-bugs.md");
        hypercall::planted::grow("");
        for try_ in 0..tries.min(3) {
            let report = search(try_);
            // Packets may all get lost where a third of them does.
            let clean = report.findings.is_empty() || name == "forgotten-timer";
            assert!(clean, "{name} is not planted, yet: {:?}", report.findings.first());
        }
        hypercall::planted::grow(name);
        let found = (0..tries).find_map(|try_| {
            let report = search(try_);
            let line = report.findings.into_iter().find(|line| line.contains(finding))?;
            Some((try_, line))
        });
        match found {
            Some((try_, line)) => println!(
                "{name}: found in try {} of {tries}: {}",
                try_ + 1,
                line.lines().next().unwrap_or("")
            ),
            None => missed.push(name),
        }
    }
    hypercall::planted::grow("");
    assert!(missed.is_empty(), "not found: {missed:?}");
}
