//! The bugs that were planted for the fuzzers: each is found by the target meant for it, within its budget, and by name.

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
    runs: u32,
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
    Plant { name: "unchecked-extent", target: "ext4", runs: 100_000, place: "vfs/src/ext4/map.rs" },
    Plant { name: "fat-cluster-loop", target: "fat", runs: 50_000, place: "allocation of" },
    Plant { name: "dns-compression-loop", target: "dns", runs: 200_000, place: "net/src/dns.rs" },
    Plant { name: "tcp-urgent-overflow", target: "tcp", runs: 200_000, place: "net/src/packet.rs" },
    Plant { name: "http-range-overflow", target: "http", runs: 200_000, place: "httpd/src/range.rs" },
];

/// Looks for every plant, two targets at a time.
pub(crate) fn run(anykernel: &Path) -> Result {
    check_list()?;
    let targets = Mutex::new(PLANTS.chunk_by(|one, next| one.target == next.target));
    let search = || -> Result {
        loop {
            let next = targets.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(plants) = next else { return Ok(()) };
            plants.iter().try_for_each(|plant| plant.find(anykernel))?;
        }
    };
    std::thread::scope(|scope| {
        let workers = [scope.spawn(search), scope.spawn(search)];
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a search panicked")?)
    })
}

impl Plant {
    fn find(&self, anykernel: &Path) -> Result {
        let runs = self.runs.to_string();
        let arguments =
            ["--plant", self.name, "--first", "--workers", "1", "--seconds", "0", "--runs", &runs];
        let (found, said) = fuzz(anykernel, self.target, &arguments)?;
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
        Ok(())
    }
}

/// Every plant that a fuzzer is to find is in the document, and is run here.
fn check_list() -> Result {
    let path = root().join("docs/planted-bugs.md");
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let listed: Vec<(&str, &str)> = text
        .lines()
        .filter_map(|line| {
            let mut cells = line.split('|').map(|cell| cell.trim().trim_matches('`'));
            Some((cells.nth(1)?, cells.nth(2)?.strip_prefix("anykernel fuzz ")?))
        })
        .collect();
    let ours: Vec<_> = PLANTS.iter().map(|plant| (plant.name, plant.target)).collect();
    if listed == ours {
        return Ok(());
    }
    Err(format!(
        "{} lists {listed:?} for fuzzers, but the test runs {ours:?}: make them the same",
        path.display()
    ))
}
