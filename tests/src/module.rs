//! Scripts in a guest whose Linux can load the module.

use anykernel_userspace::RunSpec;
use anykernel_userspace::qemu::linux_module::{self, Said};
use hypercall::ExitStatus;
use std::time::Duration;

/// Longer than any script takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(400);

/// How scripts speak: to the second serial port, which the test reads.
const SAY: &str = r#"say() { echo "$*" >/dev/ttyS1; }"#;

/// A function of scripts that waits until the instance in the module has ended, and says how. For scripts that have `say`.
pub const STATUS: &str = r#"
status() {
	while read -r state code </sys/module/anykernel/parameters/status; do
		case $state in ended | dead) break ;; esac
		sleep 0.2
	done
	say "status $state $code"
}
"#;

/// Runs a script, which has `say` and `status`, to its end, and returns what it said, line by line. Panics with the last words of a guest that stopped early.
pub fn run_script(spec: &RunSpec, series: &str, script: &str) -> (Vec<String>, Said) {
    let script = format!("{SAY}\n{STATUS}\n{script}\nsay complete\nend 0\n");
    let said =
        linux_module::run_script(spec, series, &script, PATIENCE).unwrap_or_else(|error| panic!("{error}"));
    let lines: Vec<String> = said.lines.lines().map(|line| line.trim_end().to_owned()).collect();
    assert!(
        said.ended == Ok(ExitStatus::Success) && lines.iter().any(|line| line == "complete"),
        "Linux {series} stopped early ({:?}), after {lines:#?}, with these last words:\n{}",
        said.ended,
        said.last_words()
    );
    (lines, said)
}

/// Those lines that begin with `key`, without it.
pub fn of<'a>(lines: &'a [String], key: &str) -> Vec<&'a str> {
    lines.iter().filter_map(|line| line.strip_prefix(key)?.strip_prefix(' ')).collect()
}
