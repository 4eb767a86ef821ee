//! Log messages as lines of the console, which is the kernel log. Works in any context: it does not allocate.

use crate::LinuxHost;
use core::fmt::Write;
use hypercall::Console;

struct Logger;

/// A line in the making; what does not fit is cut.
struct Line {
    text: [u8; 512],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        // The last byte is for the newline.
        for byte in text.bytes().take(self.text.len() - 1 - self.len) {
            self.text[self.len] = byte;
            self.len += 1;
        }
        Ok(())
    }
}

/// Writes one line to the console.
pub(crate) fn line(args: core::fmt::Arguments<'_>) {
    let mut line = Line { text: [0; 512], len: 0 };
    // Cannot fail but by a `Display` that does; then the line is cut.
    let _ = line.write_fmt(args);
    line.text[line.len] = b'\n';
    LinuxHost.console_write(&line.text[..=line.len]);
}

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let level = match record.level() {
            log::Level::Error => "error: ",
            log::Level::Warn => "warning: ",
            log::Level::Info => "",
            log::Level::Debug => "debug: ",
            log::Level::Trace => "trace: ",
        };
        line(format_args!("{level}{}", record.args()));
    }

    fn flush(&self) {}
}

/// From now on messages at `level` and above are shown.
pub(crate) fn install(level: log::LevelFilter) {
    // Fails only when there is one already: this one.
    let _ = log::set_logger(&Logger);
    log::set_max_level(level);
}
