//! Messages of components, through the `log` crate, to standard error.

use log::{Level, LevelFilter, Log, Metadata, Record};
use std::cell::RefCell;
use std::io::Write;

struct Logger;

thread_local! {
    /// What this thread's messages are kept in instead of being shown.
    static CAPTURED: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

/// Keeps warnings and errors that `f` logs on this thread, for a caller that says it better.
pub fn capture<R>(f: impl FnOnce() -> R) -> (R, Vec<String>) {
    CAPTURED.set(Some(Vec::new()));
    let result = f();
    (result, CAPTURED.take().unwrap_or_default())
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // That crate warns of each operation that we leave to Linux.
        metadata.level() <= log::max_level() && !metadata.target().starts_with("fuser")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let kept = CAPTURED.with_borrow_mut(|captured| {
            let Some(lines) = captured else { return false };
            if record.level() <= Level::Warn {
                lines.push(record.args().to_string());
            }
            true
        });
        if kept {
            return;
        }
        let level = match record.level() {
            Level::Error => "error: ",
            Level::Warn => "warning: ",
            Level::Info => "",
            Level::Debug => "debug: ",
            Level::Trace => "trace: ",
        };
        // One write, so that lines of several threads do not mix. A standard error that is gone swallows it.
        let line = format!("{level}{}\n", record.args());
        let _ = std::io::stderr().lock().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Shows messages up to `level`; the environment variable `ANYKERNEL_LOG` overrides it.
pub fn init(level: &str) {
    let wanted = std::env::var("ANYKERNEL_LOG").ok();
    let level = wanted.as_deref().unwrap_or(level).parse().unwrap_or(LevelFilter::Info);
    // Fails only when there is a logger already, which is as good.
    let _ = log::set_logger(&Logger);
    log::set_max_level(level);
}
