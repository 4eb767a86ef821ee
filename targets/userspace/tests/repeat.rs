//! The same seed is the same trace hash, whatever the process and the machine around it are like.

use serde_json::Value;
use std::process::Command;

/// Worlds with real components in them: every kind of link and disk, more than one CPU, another schedule.
const WORLDS: [&[&str]; 5] = [
    &["transfer", "--seed", "7", "--nodes", "4", "--seconds", "5", "--loss", "2"],
    &["httpd", "--seed", "3", "--nodes", "3", "--seconds", "5", "--schedule", "random", "--cpus", "2"],
    &["grid", "--seed", "5", "--nodes", "9", "--loss", "1"],
    &["tasks", "--seeds", "1..5", "--cpus", "2", "--schedule", "priorities"],
    &["power-cuts", "--seed", "2"],
];

/// What `anykernel` is run by, and what it is told in its environment.
struct Around {
    name: &'static str,
    by: &'static [&'static str],
    change: fn(&mut Command),
}

const AROUND: [Around; 5] = [
    Around { name: "addresses as they come", by: &[], change: |_| () },
    Around { name: "fixed addresses", by: &["setarch", "-R"], change: |_| () },
    Around { name: "one CPU", by: &["taskset", "-c", "0"], change: |_| () },
    Around {
        name: "another place, time zone and language, a long environment",
        by: &[],
        change: |command| {
            command.env_clear().current_dir("/").env("TZ", "Pacific/Apia").env("LC_ALL", "tr_TR.UTF-8");
            command.env("LANG", "ar_EG.UTF-8").env("RUST_LOG", "trace").env("FILLING", "x".repeat(100_000));
        },
    },
    Around {
        name: "a heap that is full of something, and little stack",
        by: &["prlimit", "--stack=1048576", "--"],
        change: |command| {
            command
                .env("MALLOC_PERTURB_", "165")
                .env("MALLOC_ARENA_MAX", "1")
                .env("MALLOC_TOP_PAD_", "3000017");
        },
    },
];

/// The reports of a world but for nothing: hash, times and counters of each seed, in the order of seeds.
fn reports(world: &[&str], around: &Around) -> Vec<Value> {
    let binary = assert_cmd::cargo::cargo_bin!("anykernel");
    let mut command = match around.by {
        [] => Command::new(binary),
        [first, rest @ ..] => {
            let mut command = Command::new(first);
            command.args(rest).arg(binary);
            command
        }
    };
    command.arg("simulate").args(world).arg("--json");
    (around.change)(&mut command);
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {command:?}: {}\n{said}", around.name, output.status);
    let text = String::from_utf8(output.stdout).unwrap();
    let mut reports: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    reports.sort_by_key(|report| report["seed"].as_u64());
    assert!(reports.iter().all(|report| report["hypercalls"].as_u64() > Some(500)), "{reports:?}");
    reports
}

#[test]
fn nothing_of_the_machine_is_in_a_trace_hash() {
    for world in WORLDS {
        let first = reports(world, &AROUND[0]);
        for around in &AROUND {
            assert_eq!(reports(world, around), first, "{world:?}: {}", around.name);
        }
    }
}

/// Seeds that run beside each other on several threads do not feel each other.
#[test]
fn as_many_jobs_as_one_likes() {
    let world = |jobs| ["tasks", "--seeds", "1..9", "--cpus", "2", "--schedule", "random", "--jobs", jobs];
    assert_eq!(reports(&world("1"), &AROUND[0]), reports(&world("4"), &AROUND[0]));
}
