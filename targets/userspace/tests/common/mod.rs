//! What tests of hosts share.

use hypercall::conformance::{CheckReport, Outcome};
use std::collections::HashMap;

/// Fails with every check that did not pass, and if there were none. `absent` lists those that cannot be judged here.
pub(crate) fn judge(what: &str, absent: &[&str], run: impl FnOnce(&mut dyn FnMut(CheckReport))) {
    let mut passed = 0;
    let mut bad = Vec::new();
    run(&mut |report| match report.outcome {
        Outcome::Pass => passed += 1,
        Outcome::NotRun(_) if absent.contains(&report.name) => {}
        _ => bad.push(report.to_string()),
    });
    assert!(bad.is_empty(), "{what}:\n{}", bad.join("\n"));
    assert!(passed > 0, "{what}: no checks");
}

/// The parameters that the suite looks for.
pub(crate) fn params() -> HashMap<String, String> {
    HashMap::from([("config".into(), "{\"hostname\":\"conformance\"}".into())])
}

/// Checks of a disk that cannot be judged on one that is read-only.
pub(crate) const NEED_WRITING: [&str; 4] =
    ["block/reads-what-was-written", "block/writes-only-there", "block/flush-keeps", "block/many-threads"];
