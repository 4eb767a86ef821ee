//! TIME-WAIT (RFC 9293, 3.6.1) without the connection: two ends and two sequence numbers.

use super::table::{Demux, Target, Tuple};
use crate::slab::{Key, Slab};
use alloc::collections::VecDeque;

/// How long late segments of a closed connection are answered. Shorter than two segment lifetimes of RFC 9293, as
/// everywhere in practice.
const DURATION_NS: u64 = 10_000_000_000;

/// Most entries of a shard; the oldest goes first.
const MAX_ENTRIES: usize = 8192;

/// What is left of a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TimeWait {
    pub(crate) tuple: Tuple,
    pub(crate) hash: u64,
    /// Our next sequence number.
    pub(crate) seq: u32,
    /// Theirs.
    pub(crate) ack: u32,
}

/// All entries of a shard, in the order in which they end.
#[derive(Default)]
pub(crate) struct TimeWaits {
    entries: Slab<TimeWait>,
    order: VecDeque<(u64, Key)>,
}

impl TimeWaits {
    pub(crate) fn get(&self, key: Key) -> Option<&TimeWait> {
        self.entries.get(key)
    }

    /// Puts a connection, which `demux` may still know as something else, into TIME-WAIT.
    pub(crate) fn insert(&mut self, demux: &mut Demux, entry: TimeWait, now_ns: u64) {
        if self.order.len() >= MAX_ENTRIES {
            self.expire_first(demux);
        }
        if let Ok(key) = self.entries.insert(entry)
            && demux.set(entry.hash, entry.tuple, Target::TimeWait(key))
        {
            self.order.push_back((now_ns + DURATION_NS, key));
        }
    }

    /// Forgets one before its time: the peer opens a new connection with the same ends.
    pub(crate) fn remove(&mut self, demux: &mut Demux, key: Key) {
        if let Some(entry) = self.entries.remove(key) {
            demux.remove(entry.hash, &entry.tuple, Target::TimeWait(key));
        }
    }

    pub(crate) fn next_deadline_ns(&self) -> Option<u64> {
        self.order.front().map(|(at, _)| *at)
    }

    pub(crate) fn on_time(&mut self, demux: &mut Demux, now_ns: u64) {
        while self.next_deadline_ns().is_some_and(|at| at <= now_ns) {
            self.expire_first(demux);
        }
    }

    fn expire_first(&mut self, demux: &mut Demux) {
        if let Some((_, key)) = self.order.pop_front() {
            self.remove(demux, key);
        }
    }
}
