//! The console: whole lines, one instance's not torn by another's.

use super::Recover;
use crate::spec::ConsoleLines;
use std::io::Write;
use std::sync::{Arc, Mutex};

/// Where an instance's console goes.
#[derive(Debug, Clone, Default)]
pub enum ConsoleSink {
    /// Standard error.
    #[default]
    Stderr,
    /// Standard output; with `json` each line as `{"event":"console","line":...}`.
    Stdout {
        /// One JSON object a line.
        json: bool,
    },
    /// Kept in memory, for tests and tools.
    Capture(ConsoleText),
    /// Nowhere.
    Null,
}

/// What an instance wrote so far. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct ConsoleText(Arc<Mutex<Vec<u8>>>);

impl ConsoleText {
    /// The text; what is not UTF-8 is replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().recover()).into_owned()
    }
}

/// A line longer than this is written in pieces.
const LONGEST_LINE: usize = 64 << 10;

pub(super) struct Console {
    sink: ConsoleSink,
    prefix: String,
    /// The line that is not finished yet.
    line: Mutex<Vec<u8>>,
}

impl Console {
    pub(super) fn new(sink: ConsoleSink, name: &str) -> Self {
        let prefix = if name.is_empty() { String::new() } else { format!("{name}: ") };
        Self { sink, prefix, line: Mutex::default() }
    }

    pub(super) fn write(&self, bytes: &[u8]) {
        let mut line = self.line.lock().recover();
        line.extend_from_slice(bytes);
        if let Some(end) = line.iter().rposition(|byte| *byte == b'\n') {
            self.emit(&line[..=end]);
            line.drain(..=end);
        }
        if line.len() > LONGEST_LINE {
            self.emit(&line);
            line.clear();
        }
    }

    /// Writes what is left.
    pub(super) fn finish(&self) {
        let mut line = self.line.lock().recover();
        if !line.is_empty() {
            line.push(b'\n');
            self.emit(&line);
            line.clear();
        }
    }

    fn emit(&self, lines: &[u8]) {
        let prefixed;
        let lines = if self.prefix.is_empty() {
            lines
        } else {
            let mut all = Vec::with_capacity(lines.len() + 64);
            for line in lines.split_inclusive(|byte| *byte == b'\n') {
                all.extend_from_slice(self.prefix.as_bytes());
                all.extend_from_slice(line);
            }
            prefixed = all;
            &prefixed
        };
        // A console that is gone swallows what is written.
        match &self.sink {
            ConsoleSink::Stderr => drop(std::io::stderr().lock().write_all(lines)),
            ConsoleSink::Stdout { json } => {
                ConsoleLines::new(*json).write(&mut std::io::stdout().lock(), lines)
            }
            ConsoleSink::Capture(text) => text.0.lock().recover().extend_from_slice(lines),
            ConsoleSink::Null => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_whole_lines_with_the_name_in_front() {
        let text = ConsoleText::default();
        let console = Console::new(ConsoleSink::Capture(text.clone()), "a");
        console.write(b"one\ntw");
        assert_eq!(text.text(), "a: one\n");
        console.write(b"o\nthree");
        assert_eq!(text.text(), "a: one\na: two\n");
        console.finish();
        assert_eq!(text.text(), "a: one\na: two\na: three\n");
    }
}
