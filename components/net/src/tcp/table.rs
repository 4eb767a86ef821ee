//! The one table that every TCP segment is looked up in.

use crate::slab::Key;
use core::net::IpAddr;
use hashbrown::HashTable;

/// Both ends of a connection, ours first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tuple {
    pub(crate) local: IpAddr,
    pub(crate) remote: IpAddr,
    pub(crate) local_port: u16,
    pub(crate) remote_port: u16,
}

/// In which state of its life a connection is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// A [`super::flow::Flow`].
    Flow(Key),
    /// A SYN that was answered.
    HalfOpen(Key),
    /// A [`super::timewait::TimeWait`].
    TimeWait(Key),
}

struct Entry {
    hash: u64,
    tuple: Tuple,
    target: Target,
}

/// Connections by both ends.
#[derive(Default)]
pub(crate) struct Demux(HashTable<Entry>);

impl Demux {
    pub(crate) fn get(&self, hash: u64, tuple: &Tuple) -> Option<Target> {
        self.0.find(hash, |entry| entry.tuple == *tuple).map(|entry| entry.target)
    }

    /// Sets what a connection is now. `false`: no memory.
    pub(crate) fn set(&mut self, hash: u64, tuple: Tuple, target: Target) -> bool {
        if let Some(entry) = self.0.find_mut(hash, |entry| entry.tuple == tuple) {
            entry.target = target;
            return true;
        }
        if self.0.try_reserve(1, |entry| entry.hash).is_err() {
            return false;
        }
        self.0.insert_unique(hash, Entry { hash, tuple, target }, |entry| entry.hash);
        true
    }

    /// Removes a connection if it still is `target`.
    pub(crate) fn remove(&mut self, hash: u64, tuple: &Tuple, target: Target) {
        if let Ok(entry) = self.0.find_entry(hash, |entry| entry.tuple == *tuple && entry.target == target) {
            entry.remove();
        }
    }
}
