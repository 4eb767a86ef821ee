//! Watches for a thread that runs on without any hypercall: nothing can preempt it, so the process is ended with its name.

use crate::host::Recover;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

/// What the watchdog sees of one simulation.
struct Pulse {
    /// Counts hypercalls and changes of threads; odd in the lowest bit while a thread of a node runs.
    beats: AtomicU64,
    /// Node and thread that run.
    who: AtomicU64,
    limit: Duration,
}

pub(super) struct Watched(Option<Arc<Pulse>>);

static ALL: Mutex<Vec<Weak<Pulse>>> = Mutex::new(Vec::new());

impl Watched {
    /// Real seconds; 0: not watched.
    pub(super) fn new(seconds: u32) -> Self {
        if seconds == 0 {
            return Self(None);
        }
        let pulse = Arc::new(Pulse {
            beats: AtomicU64::new(0),
            who: AtomicU64::new(0),
            limit: Duration::from_secs(seconds.into()),
        });
        let mut all = ALL.lock().recover();
        all.retain(|one| one.strong_count() > 0);
        all.push(Arc::downgrade(&pulse));
        static STARTED: std::sync::Once = std::sync::Once::new();
        STARTED.call_once(|| {
            let watch = std::thread::Builder::new().name("sim-watchdog".into());
            // Without it a thread that spins is noticed by whoever waits for the process.
            let _ = watch.spawn(watch_all);
        });
        Self(Some(pulse))
    }

    /// A hypercall.
    #[inline]
    pub(super) fn beat(&self, steps: u64) {
        if let Some(pulse) = &self.0 {
            pulse.beats.store(steps << 1 | 1, Relaxed);
        }
    }

    /// A thread runs from now on.
    pub(super) fn runs(&self, node: u32, thread: u32) {
        if let Some(pulse) = &self.0 {
            pulse.who.store(u64::from(node) << 32 | u64::from(thread), Relaxed);
            pulse.beats.fetch_or(1, Relaxed);
        }
    }

    /// The outside runs: it may take as long as it likes.
    pub(super) fn rests(&self) {
        if let Some(pulse) = &self.0 {
            pulse.beats.fetch_and(!1, Relaxed);
        }
    }
}

fn watch_all() {
    let mut seen: Vec<(Weak<Pulse>, u64, Instant)> = Vec::new();
    loop {
        std::thread::sleep(Duration::from_secs(1));
        seen.retain(|(pulse, ..)| pulse.strong_count() > 0);
        for pulse in ALL.lock().recover().iter() {
            let Some(live) = pulse.upgrade() else { continue };
            let beats = live.beats.load(Relaxed);
            let known = seen.iter_mut().find(|(other, ..)| other.ptr_eq(pulse));
            match known {
                None => seen.push((pulse.clone(), beats, Instant::now())),
                Some((_, before, since)) if *before != beats || beats & 1 == 0 => {
                    (*before, *since) = (beats, Instant::now());
                }
                Some((_, _, since)) if since.elapsed() < live.limit => {}
                Some(_) => {
                    let who = live.who.load(Relaxed);
                    eprintln!(
                        "simulation: thread {} of node {} has run for {} s without a hypercall and cannot be preempted; \
                         let it yield, or look where it loops",
                        who as u32,
                        who >> 32,
                        live.limit.as_secs()
                    );
                    std::process::exit(101);
                }
            }
        }
    }
}
