//! [`ChromeWriter`]: traces as Perfetto and chrome://tracing read them.

use super::{TraceEvent, TraceRing};
use alloc::vec::Vec;
use core::fmt::{self, Write};

/// Writes trace events as JSON, "Trace Event Format", object form. One row per CPU. What overlaps on one CPU is an
/// asynchronous span beside the row, as viewers want the spans of a row to nest: calls in which a thread sleeps, and calls in
/// whose middle their thread lost the CPU to another. The category is the component that called.
///
/// The document is complete after [`ChromeWriter::finish`]; one that was cut off before is still read by both viewers.
pub struct ChromeWriter<W> {
    out: W,
    events: u64,
    /// By CPU, where its row is free again.
    rows: Vec<u64>,
}

/// Most rows. What a guest says of its CPUs is not trusted.
const ROWS: usize = 4096;

impl<W: Write> ChromeWriter<W> {
    /// Begins a document. `domain` names it in the viewer.
    pub fn new(mut out: W, domain: &str) -> Result<Self, fmt::Error> {
        out.write_str("{\"displayTimeUnit\":\"ns\",\"traceEvents\":[\n")?;
        out.write_str("{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":1,\"tid\":0,\"args\":{\"name\":\"")?;
        for char in domain.chars() {
            match char {
                '"' | '\\' => write!(out, "\\{char}")?,
                char if char.is_control() => write!(out, "\\u{:04x}", u32::from(char))?,
                char => out.write_char(char)?,
            }
        }
        out.write_str("\"}}")?;
        Ok(Self { out, events: 0, rows: Vec::new() })
    }

    /// Writes one event.
    pub fn event(&mut self, event: &TraceEvent) -> fmt::Result {
        self.events += 1;
        let (name, cpu, component) = (event.call.name(), event.cpu.0, event.component.as_str());
        let end_ns = event.start_ns.saturating_add(event.duration_ns);
        let (start, end) = (Micros(event.start_ns), Micros(end_ns));
        let aside = event.call.blocks() || !self.takes_row(cpu, event.start_ns, end_ns)?;
        let out = &mut self.out;
        if aside {
            let id = self.events;
            write!(
                out,
                ",\n{{\"name\":\"{name}\",\"cat\":\"{component}\",\"ph\":\"b\",\"id\":{id},\"pid\":1,\"tid\":{cpu}"
            )?;
            write!(out, ",\"ts\":{start}")?;
            arguments(out, event)?;
            write!(
                out,
                "}},\n{{\"name\":\"{name}\",\"cat\":\"{component}\",\"ph\":\"e\",\"id\":{id},\"pid\":1,\"tid\":{cpu}"
            )?;
            write!(out, ",\"ts\":{end}}}")
        } else {
            let duration = Micros(event.duration_ns);
            write!(
                out,
                ",\n{{\"name\":\"{name}\",\"cat\":\"{component}\",\"ph\":\"X\",\"pid\":1,\"tid\":{cpu}"
            )?;
            write!(out, ",\"ts\":{start},\"dur\":{duration}")?;
            arguments(out, event)?;
            out.write_str("}")
        }
    }

    /// Whether a span fits behind the others of its CPU; then it has the row.
    fn takes_row(&mut self, cpu: u32, start_ns: u64, end_ns: u64) -> Result<bool, fmt::Error> {
        let index = cpu as usize;
        if index >= ROWS {
            return Ok(false);
        }
        while self.rows.len() <= index {
            let row = self.rows.len();
            self.rows.push(0);
            write!(
                self.out,
                ",\n{{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":1,\"tid\":{row},\"args\":{{\"name\":\"CPU {row}\"}}}}"
            )?;
        }
        let free = self.rows.get_mut(index).filter(|free| **free <= start_ns);
        Ok(free.map(|free| *free = end_ns).is_some())
    }

    /// Writes everything that is in `ring` now and returns how much that was.
    pub fn drain(&mut self, ring: TraceRing) -> Result<u64, fmt::Error> {
        let before = self.events;
        while let Some(event) = ring.pop() {
            self.event(&event)?;
        }
        Ok(self.events - before)
    }

    /// Ends the document and gives the output back. `dropped` ([`TraceRing::dropped`]) is written into it.
    pub fn finish(mut self, dropped: u64) -> Result<W, fmt::Error> {
        write!(self.out, "\n],\"otherData\":{{\"events\":{},\"dropped\":{dropped}}}}}\n", self.events)?;
        Ok(self.out)
    }
}

fn arguments(out: &mut impl Write, event: &TraceEvent) -> fmt::Result {
    out.write_str(",\"args\":{")?;
    for (index, (name, value)) in event.call.arguments().iter().zip(event.arguments).enumerate() {
        let comma = if index > 0 { "," } else { "" };
        match value {
            // Stands for none.
            u64::MAX => write!(out, "{comma}\"{name}\":null")?,
            value => write!(out, "{comma}\"{name}\":{value}")?,
        }
    }
    out.write_str("}")
}

/// Nanoseconds, shown as the microseconds with fraction that the format wants.
struct Micros(u64);

impl fmt::Display for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03}", self.0 / 1000, self.0 % 1000)
    }
}
