//! `--trace`: every hypercall of an instance, in a file for <https://ui.perfetto.dev>.

use crate::Failure;
use hypercall::layers::{ChromeWriter, TraceRing};
use std::fmt;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Events that wait to be written. A busy instance makes a few million a second, of which then most are dropped (and
/// counted).
const EVENTS: usize = 1 << 18;

/// A trace in the making. Dropped without [`Trace::finish`] it is cut off, which viewers forgive.
pub struct Trace {
    ring: &'static TraceRing,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<(), fmt::Error>>>,
    shown: String,
}

/// `fmt::Write` over a file. The first error stays.
struct Out(BufWriter<File>);

impl fmt::Write for Out {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write_all(text.as_bytes()).map_err(|_| fmt::Error)
    }
}

impl Trace {
    /// Begins a file. `name` is the domain's. Failures are lines for a person.
    pub fn start(path: &Path, name: &str) -> Result<Self, Failure> {
        let shown = path.display().to_string();
        let file = File::create(path).map_err(|error| Failure::new(format!("{shown}: {error}")))?;
        let ring = TraceRing::new(EVENTS).ok_or_else(|| Failure::new("too little memory for a trace"))?;
        // Hosts are `Copy` and so are their sinks: whoever keeps one must find a ring. A process has one trace.
        let ring: &'static TraceRing = Box::leak(Box::new(ring));
        let stop = Arc::new(AtomicBool::new(false));
        let mut writer = ChromeWriter::new(Out(BufWriter::with_capacity(1 << 20, file)), name)
            .map_err(|_| Failure::new(format!("{shown}: cannot write")))?;
        let stopped = stop.clone();
        let body = move || {
            loop {
                // Looked at before draining, so that nothing recorded before the stop is missed.
                let last = stopped.load(Ordering::Acquire);
                let written = writer.drain(ring)?;
                if last {
                    break;
                }
                if written == 0 {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            let mut out = writer.finish(ring.dropped())?;
            out.0.flush().map_err(|_| fmt::Error)
        };
        let thread = std::thread::Builder::new()
            .name("trace".into())
            .spawn(body)
            .map_err(|error| Failure::new(format!("starting the trace's thread: {error}")))?;
        Ok(Self { ring, stop, thread: Some(thread), shown })
    }

    /// Where events go.
    pub fn sink(&self) -> &'static TraceRing {
        self.ring
    }

    /// Writes what is left and completes the file.
    pub fn finish(mut self) -> Result<(), Failure> {
        self.stop.store(true, Ordering::Release);
        let result = self.thread.take().and_then(|thread| thread.join().ok());
        if self.ring.dropped() > 0 {
            log::warn!(
                "{}: {} events are missing, because the file was too slow",
                self.shown,
                self.ring.dropped()
            );
        }
        match result {
            Some(Ok(())) => Ok(()),
            _ => Err(Failure::new(format!("{}: cannot write: is the disk full?", self.shown))),
        }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}
