//! Counters: every drop, retry, reset and fallback is one, and users can read them all.

use alloc::{string::String, sync::Arc, vec::Vec};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// One number that only grows.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    /// Adds one.
    #[inline]
    pub fn increment(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    /// Adds `n`.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// What it is now.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// All counters of an instance, by name (`net.rx_frames`, `vfs.cache_hits`).
pub(crate) struct Counters(pub(crate) Vec<(String, Counter)>);

impl Counters {
    pub(crate) fn get_or_add(&mut self, name: &str) -> Counter {
        match self.0.iter().find(|(known, _)| known == name) {
            Some((_, counter)) => counter.clone(),
            None => {
                let counter = Counter::default();
                self.0.push((name.into(), counter.clone()));
                counter
            }
        }
    }
}
