//! `--trace`: every hypercall of an instance, in a file for <https://ui.perfetto.dev>.

use crate::Failure;
use crate::control::{Control, Notes};
use hypercall::layers::{ByteRing, ChromeWriter, TraceRing};
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
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Option<u64>, fmt::Error>>>,
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
    pub fn start(
        path: &Path,
        name: &str,
        control: Option<Arc<Control>>,
    ) -> Result<(Self, TraceRing), Failure> {
        // Hosts are `Copy` and so are their sinks: whoever keeps one must find a ring. A process has one trace.
        let ring = TraceRing::new(EVENTS).ok_or_else(|| Failure::new("too little memory for a trace"))?;
        Ok((Self::follow(path, name, control, move || Some((ring, None)))?, ring))
    }

    /// Begins a file of what comes out of the ring that `find` gives as soon as there is one, with the guest's notes.
    /// `control` is told of both.
    pub fn follow(
        path: &Path,
        name: &str,
        control: Option<Arc<Control>>,
        mut find: impl FnMut() -> Option<(TraceRing, Option<ByteRing>)> + Send + 'static,
    ) -> Result<Self, Failure> {
        let shown = path.display().to_string();
        let file = File::create(path).map_err(|error| Failure::new(format!("{shown}: {error}")))?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut writer = ChromeWriter::new(Out(BufWriter::with_capacity(1 << 20, file)), name)
            .map_err(|_| Failure::new(format!("{shown}: cannot write")))?;
        let stopped = stop.clone();
        let body = move || {
            let (mut found, mut told) = (None, Notes::default());
            loop {
                // Looked at before draining, so that nothing recorded before the stop is missed.
                let last = stopped.load(Ordering::Acquire);
                found = found.or_else(&mut find);
                let (ring, notes): (Option<TraceRing>, _) = found.unzip();
                if let Some(notes) = notes.flatten() {
                    told.read(notes, control.as_deref());
                }
                let mut written = 0;
                while let Some(event) = ring.and_then(|ring| ring.pop()) {
                    if let Some(control) = &control {
                        control.add(&event);
                    }
                    writer.event(&event)?;
                    written += 1;
                }
                if last {
                    break;
                }
                if written == 0 {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            let dropped = found.map(|(ring, _)| ring.dropped());
            let mut out = writer.finish(dropped.unwrap_or(0))?;
            out.0.flush().map_err(|_| fmt::Error).map(|()| dropped)
        };
        let thread = std::thread::Builder::new()
            .name("trace".into())
            .spawn(body)
            .map_err(|error| Failure::new(format!("starting the trace's thread: {error}")))?;
        Ok(Self { stop, thread: Some(thread), shown })
    }

    /// Writes what is left and completes the file.
    pub fn finish(mut self) -> Result<(), Failure> {
        self.stop.store(true, Ordering::Release);
        let result = self.thread.take().and_then(|thread| thread.join().ok());
        match result {
            Some(Ok(Some(0))) => Ok(()),
            Some(Ok(Some(dropped))) => {
                log::warn!("{}: {dropped} events are missing, because the file was too slow", self.shown);
                Ok(())
            }
            Some(Ok(None)) => {
                log::warn!("{}: nothing was traced, because the guest did not get that far", self.shown);
                Ok(())
            }
            _ => Err(Failure::new(format!("{}: cannot write: is the disk full?", self.shown))),
        }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}
