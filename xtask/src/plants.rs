//! The bugs that were planted for the fuzzers: each is found by the target meant for it, within its budget, and by name; the
//! same search without them finds nothing.

use crate::fuzz::fuzz;
use crate::sh::{Result, root, step};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// A bug of `docs/planted-bugs.md`.
struct Plant {
    name: &'static str,
    /// The target that is to find it.
    target: &'static str,
    /// Executions until it is found at the latest.
    runs: u64,
    /// What the report says of the place: a finding elsewhere is another bug.
    place: &'static str,
}

/// Those of a target stand together.
const PLANTS: [Plant; 7] = [
    Plant { name: "ring-toctou", target: "virtio_blk", runs: 200_000, place: "virtio/src/queue.rs" },
    Plant {
        name: "descriptor-off-by-one",
        target: "virtio_blk",
        runs: 20_000,
        place: "the driver offers a chain that",
    },
    Plant { name: "unchecked-extent", target: "ext4", runs: 400_000, place: "vfs/src/ext4/map.rs" },
    Plant { name: "fat-cluster-loop", target: "fat", runs: 200_000, place: "vfs/src/fat/chain.rs" },
    Plant { name: "dns-compression-loop", target: "dns", runs: 1_500_000, place: "net/src/dns.rs" },
    Plant { name: "tcp-urgent-overflow", target: "tcp", runs: 200_000, place: "net/src/packet.rs" },
    Plant { name: "http-range-overflow", target: "http", runs: 200_000, place: "httpd/src/range.rs" },
];

/// Executions without a planted bug, at least.
const LEAST: u64 = 1000;

/// Looks for every plant, two targets at a time.
pub(crate) fn run(anykernel: &Path) -> Result {
    check_list()?;
    let targets = Mutex::new(PLANTS.chunk_by(|one, next| one.target == next.target));
    let all = || -> Result {
        loop {
            let next = targets.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(plants) = next else { return Ok(()) };
            let mut runs = LEAST;
            for plant in plants {
                runs = runs.max(plant.find(anykernel)?);
            }
            plants.first().map_or(Ok(()), |plant| clean(anykernel, plant.target, runs))?;
        }
    };
    std::thread::scope(|scope| {
        let workers = [scope.spawn(all), scope.spawn(all)];
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a search panicked")?)
    })
}

/// The search without a bug.
fn clean(anykernel: &Path, target: &str, runs: u64) -> Result {
    let (found, said) = search(anykernel, target, "none", runs)?;
    if found {
        return Err(format!("fuzzing {target} finds something although nothing is planted:\n{said}"));
    }
    step(&format!("{target}: nothing is found in {runs} executions without a planted bug"));
    Ok(())
}

/// One worker, from the seeds only and with the same random numbers: nearly the same executions every time.
fn search(anykernel: &Path, target: &str, plant: &str, runs: u64) -> Result<(bool, String)> {
    let runs = runs.to_string();
    fuzz(anykernel, target, &["--plant", plant, "--first", "--workers", "1", "--runs", &runs])
}

impl Plant {
    /// Finds it, and says after how many executions.
    fn find(&self, anykernel: &Path) -> Result<u64> {
        let runs = self.runs;
        let (found, said) = search(anykernel, self.target, self.name, runs)?;
        let headline = format!("FOUND: planted bug {} ", self.name);
        let Some(at) = said.find(&headline).filter(|_| found) else {
            return Err(format!(
                "fuzzing {} did not find the planted bug {} in {runs} executions:\n{said}",
                self.target, self.name
            ));
        };
        let report = &said[at..];
        if !report.contains(self.place) {
            return Err(format!(
                "fuzzing {} with the planted bug {} found something else, not in {}:\n{report}",
                self.target, self.name, self.place
            ));
        }
        step(report.lines().next().unwrap_or_default());
        let after = report[headline.len()..].strip_prefix("after ").and_then(|rest| rest.split(' ').next());
        after
            .and_then(|number| number.parse().ok())
            .ok_or_else(|| format!("after how many executions?\n{report}"))
    }
}

/// Every plant of the source is in the document, and those that a fuzzer is to find are looked for here.
fn check_list() -> Result {
    let path = root().join("docs/planted-bugs.md");
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let rows = text.lines().filter_map(|line| {
        let mut cells = line.split('|').map(|cell| cell.trim().trim_matches('`'));
        let name = cells.nth(1).filter(|name| !name.is_empty() && *name != "name" && *name != "---")?;
        Some((name, cells.nth(2)?))
    });
    let rows: Vec<(&str, &str)> = rows.collect();
    let mut names: Vec<&str> = rows.iter().map(|(name, _)| *name).collect();
    names.sort_unstable();
    let mut planted = Vec::new();
    for folder in ["anykernel/src", "components", "examples"] {
        planted_in(&root().join(folder), &mut planted)?;
    }
    planted.sort();
    planted.dedup();
    if names != planted {
        return Err(format!("{} lists {names:?}, but the source has {planted:?}", path.display()));
    }
    let listed = rows.iter().filter_map(|(name, tool)| Some((*name, tool.strip_prefix("anykernel fuzz ")?)));
    let listed: Vec<(&str, &str)> = listed.collect();
    let ours: Vec<_> = PLANTS.iter().map(|plant| (plant.name, plant.target)).collect();
    if listed == ours {
        return Ok(());
    }
    Err(format!(
        "{} lists {listed:?} for fuzzers, but the test runs {ours:?}: make them the same",
        path.display()
    ))
}

/// The names of the bugs that are planted below a folder.
fn planted_in(folder: &Path, names: &mut Vec<String>) -> Result {
    let fail = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
    for entry in std::fs::read_dir(folder).map_err(|error| fail(folder, error))?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            planted_in(&path, names)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).map_err(|error| fail(&path, error))?;
            let marks = text.split("planted!(\"").skip(1);
            names.extend(marks.filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())));
        }
    }
    Ok(())
}
