//! `--control`: what a running instance costs, for `anykernel top`.
//!
//! A socket of the file system on which every connection gets one JSON object and is closed.

use crate::Failure;
use hypercall::layers::{ByteRing, TraceEvent};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// What calls of one kind by one component cost so far.
#[derive(Debug, Default, Clone, Copy)]
struct Cost {
    calls: u64,
    total_ns: u64,
    longest_ns: u64,
}

/// How many are told apart: what a guest says of its components is not trusted.
const MOST_COSTS: usize = 4096;

/// Counters with their values.
type Values = Vec<(String, u64)>;
type Counters = Box<dyn Fn() -> Values + Send + Sync>;

/// What is known of an instance.
pub struct Control {
    start: Instant,
    costs: Mutex<BTreeMap<(String, &'static str), Cost>>,
    counters: OnceLock<Counters>,
    /// What a guest told of its counters.
    told: Mutex<Values>,
    path: PathBuf,
}

impl Control {
    /// Listens at `path`, which must not be there, unless it is what an instance that is gone left.
    pub fn listen(path: &Path) -> Result<Arc<Self>, Failure> {
        let fail = |error: std::io::Error| {
            Failure::new(format!("{}: {error}: give --control a path where there is nothing", path.display()))
        };
        let left_behind = || {
            let socket = std::fs::symlink_metadata(path).is_ok_and(|what| what.file_type().is_socket());
            socket && UnixStream::connect(path).is_err()
        };
        let listener = UnixListener::bind(path).or_else(|error| match error.kind() {
            ErrorKind::AddrInUse if left_behind() => {
                std::fs::remove_file(path).and_then(|()| UnixListener::bind(path))
            }
            _ => Err(error),
        });
        let listener = listener.map_err(fail)?;
        let control = Arc::new(Self {
            start: Instant::now(),
            costs: Mutex::default(),
            counters: OnceLock::new(),
            told: Mutex::default(),
            path: path.into(),
        });
        let told = Arc::downgrade(&control);
        let body = move || {
            for stream in listener.incoming() {
                let Some(control) = told.upgrade() else { return };
                // Who does not want it does not get it.
                let _ = stream.and_then(|mut stream| {
                    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
                    stream.write_all(control.snapshot().to_string().as_bytes())
                });
            }
        };
        std::thread::Builder::new().name("control".into()).spawn(body).map_err(fail)?;
        Ok(control)
    }

    /// Where the instance's counters are read.
    pub fn set_counters(&self, counters: impl Fn() -> Values + Send + Sync + 'static) {
        // The first one counts.
        let _ = self.counters.set(Box::new(counters));
    }

    /// A guest told these.
    fn tell(&self, values: Values) {
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = values;
    }

    /// Counts one call.
    pub fn add(&self, event: &TraceEvent) {
        let mut costs = self.costs.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |component: &str| (component.to_owned(), event.call.name());
        let mut key = of(event.component.as_str());
        if costs.len() >= MOST_COSTS && !costs.contains_key(&key) {
            key = of("others");
        }
        let cost = costs.entry(key).or_default();
        cost.calls += 1;
        cost.total_ns = cost.total_ns.saturating_add(event.duration_ns);
        cost.longest_ns = cost.longest_ns.max(event.duration_ns);
    }

    fn snapshot(&self) -> Value {
        let costs = self.costs.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let calls: Vec<Value> = costs
            .into_iter()
            .map(|((component, call), cost)| {
                json!({
                    "component": component, "call": call, "calls": cost.calls,
                    "total_ns": cost.total_ns, "longest_ns": cost.longest_ns,
                })
            })
            .collect();
        let told = || self.told.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let counters = self.counters.get().map_or_else(told, |counters| counters());
        let counters: serde_json::Map<_, _> =
            counters.into_iter().map(|(name, value)| (name, value.into())).collect();
        json!({ "up_ns": self.start.elapsed().as_nanos() as u64, "calls": calls, "counters": counters })
    }
}

/// What a guest tells, line by line ([`anykernel::Kernel::report_counters`]).
#[derive(Default)]
pub(crate) struct Notes(Vec<u8>);

impl Notes {
    /// Reads what is there. Whatever a guest writes, it takes no more memory than `MOST`.
    pub(crate) fn read(&mut self, from: ByteRing, control: Option<&Control>) {
        const MOST: usize = 1 << 20;
        from.read(&mut self.0);
        let text = String::from_utf8_lossy(&self.0);
        let end = text.rfind("\n\n");
        if let Some(end) = end {
            let block = text[..end].rsplit("\n\n").next().unwrap_or_default();
            let values = block.lines().filter_map(|line| line.split_once(' '));
            let values = values.filter_map(|(name, value)| Some((name.into(), value.parse().ok()?)));
            if let Some(control) = control {
                control.tell(values.collect());
            }
            let rest = text[end + 2..].as_bytes().to_vec();
            self.0 = rest;
        } else if self.0.len() > MOST {
            self.0.clear();
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Wakes the listener, which then finds us gone.
        let _ = UnixStream::connect(&self.path);
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Asks the instance that listens at `path`. Failures are lines for a person.
pub fn ask(path: &Path) -> Result<Value, Failure> {
    let shown = path.display();
    let mut stream = UnixStream::connect(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => Failure::new(format!(
            "{shown}: nothing runs there: start it with `anykernel run APP --control {shown}`, or give its path"
        )),
        _ => Failure::new(format!("{shown}: {error}: give the path that `run --control` was given")),
    })?;
    let mut text = String::new();
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .and_then(|()| stream.read_to_string(&mut text))
        .map_err(|error| Failure::new(format!("{shown}: {error}")))?;
    serde_json::from_str(&text)
        .map_err(|_| Failure::new(format!("{shown}: this is no instance's control socket")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypercall::layers::ComponentName;
    use hypercall::{Call, CpuId};

    #[test]
    fn a_guest_tells_its_counters() {
        let dir = tempfile::tempdir().unwrap();
        let control = Control::listen(&dir.path().join("control")).unwrap();
        let (ring, mut notes) = (ByteRing::new(4096).unwrap(), Notes::default());
        let mut tell = |text: &[u8]| {
            assert!(ring.write(text, || false));
            notes.read(ring, Some(&control));
            control.snapshot()["counters"].clone()
        };
        assert_eq!(tell(b"net.drops 3\nvfs."), json!({}));
        assert_eq!(tell(b"hits 9\n\nnet.dr"), json!({ "net.drops": 3, "vfs.hits": 9 }));
        assert_eq!(tell(b"ops 4\n\nnet.drops 5\n\n"), json!({ "net.drops": 5 }));
        // Whatever it says.
        assert_eq!(tell(b"\xff\xff no\nx\n \ny 1\n\n"), json!({ "y": 1 }));
    }

    #[test]
    fn a_client_is_told_what_calls_cost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        assert!(ask(&path).is_err());
        let control = Control::listen(&path).unwrap();
        for duration_ns in [5, 9, 1] {
            control.add(&TraceEvent {
                call: Call::Park,
                component: ComponentName::new("net"),
                cpu: CpuId(0),
                start_ns: 1,
                duration_ns,
                arguments: [0; 2],
            });
        }
        control.set_counters(|| vec![("net.drops".into(), 3)]);
        let said = ask(&path).unwrap();
        assert_eq!(said["calls"][0]["calls"], 3);
        assert_eq!((&said["calls"][0]["total_ns"], &said["calls"][0]["longest_ns"]), (&json!(15), &json!(9)));
        assert_eq!(said["counters"]["net.drops"], 3);
        // No file of anybody is taken away.
        let file = dir.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        assert!(Control::listen(&file).is_err());
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
        // In use; and left behind by one that is gone.
        assert!(Control::listen(&path).is_err());
        drop(control);
        // The listener may still be answering the last client.
        let end = Instant::now() + Duration::from_secs(5);
        while path.exists() {
            assert!(Instant::now() < end);
            std::thread::yield_now();
        }
        drop(UnixListener::bind(&path).unwrap());
        assert!(Control::listen(&path).is_ok());
    }
}
