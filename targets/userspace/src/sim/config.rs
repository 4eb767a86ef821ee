//! What a simulation, a node, a segment and a disk are like.

use super::{DiskId, MS, SegmentId};
use serde::Deserialize;
use std::collections::BTreeMap;

/// Who runs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// In turns; a thread runs until it blocks or its time slice is over. The fastest.
    Turns,
    /// At every hypercall another thread may get its turn, and any of them.
    Random {
        /// In a million hypercalls.
        switch_ppm: u32,
    },
    /// Priorities by seed, and `depth - 1` moments among the first `steps` hypercalls at which the running thread falls
    /// behind all others. Finds a bug that takes `depth` ordered events with a probability that can be stated (Burckhardt
    /// et al., "A Randomized Scheduler with Probabilistic Guarantees of Finding Bugs", 2010).
    Priorities {
        /// Ordered events.
        depth: u32,
        /// Expected length of the run in hypercalls.
        steps: u64,
    },
}

/// A simulation.
#[derive(Debug, Clone)]
pub struct SimConfig {
    /// Everything random comes from it.
    pub seed: u64,
    /// Who runs next.
    pub schedule: Schedule,
    /// What a hypercall costs in virtual time.
    pub call_ns: u64,
    /// How long a thread runs before others get their turn.
    pub slice_ns: u64,
    /// Virtual time at which the run fails with [`super::Failure::TimeLimit`].
    pub time_limit_ns: u64,
    /// Hypercalls after which the run fails with [`super::Failure::StepLimit`].
    pub step_limit: u64,
    /// Bytes of stack of a thread.
    pub stack_bytes: usize,
    /// Wall time at virtual time 0, in nanoseconds since 1970.
    pub realtime_ns: u64,
    /// Real seconds that a thread may run without a hypercall before the process is ended; 0: for ever.
    pub watchdog_s: u32,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            seed: 1,
            schedule: Schedule::Turns,
            call_ns: 20,
            slice_ns: MS / 10,
            time_limit_ns: u64::MAX,
            step_limit: u64::MAX,
            stack_bytes: 512 << 10,
            // 2025-01-01.
            realtime_ns: 1_735_689_600_000_000_000,
            watchdog_s: 60,
        }
    }
}

impl SimConfig {
    /// The usual one with this seed.
    pub fn seeded(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    /// Under another schedule.
    pub fn schedule(self, schedule: Schedule) -> Self {
        Self { schedule, ..self }
    }
}

/// A node.
#[derive(Debug, Clone)]
pub struct NodeSetup {
    /// Shown in reports.
    pub name: String,
    /// CPUs, at least 1.
    pub cpus: u32,
    /// Bytes of pages that it may use.
    pub memory: u64,
    /// Parameters; `config` is the JSON configuration.
    pub params: BTreeMap<String, String>,
    /// `disk0`, `disk1`, ...
    pub disks: Vec<DiskId>,
    /// The segments that `nic0`, `nic1`, ... are on.
    pub links: Vec<SegmentId>,
}

impl Default for NodeSetup {
    fn default() -> Self {
        Self {
            name: String::new(),
            cpus: 1,
            memory: 64 << 20,
            params: BTreeMap::new(),
            disks: Vec::new(),
            links: Vec::new(),
        }
    }
}

impl NodeSetup {
    /// A node with that name, one CPU and 64 MiB.
    pub fn named(name: &str) -> Self {
        Self { name: name.into(), ..Self::default() }
    }
}

/// What an Ethernet segment does to frames. Chances are in a million frames.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinkModel {
    /// From sending to arrival, beside the time on the wire.
    pub latency_ns: u64,
    /// Up to that much more, by chance. Frames of one sender do not overtake each other by it.
    pub jitter_ns: u64,
    /// Never arrive.
    pub loss_ppm: u32,
    /// Arrive twice.
    pub duplicate_ppm: u32,
    /// Are held back and overtaken by others.
    pub reorder_ppm: u32,
    /// For how long, at most.
    pub reorder_ns: u64,
    /// Arrive with a bit changed.
    pub corrupt_ppm: u32,
    /// Of each sender; `None`: without limit.
    pub bits_per_second: Option<u64>,
    /// Bytes that a sender may have waiting for its turn on the wire; then its sends would block.
    pub send_queue_bytes: usize,
    /// Bytes that a receiver may leave lying; more are lost.
    pub receive_queue_bytes: usize,
    /// Largest IP packet in bytes.
    pub mtu: u16,
}

impl Default for LinkModel {
    /// 100 us, nothing goes wrong.
    fn default() -> Self {
        Self {
            latency_ns: MS / 10,
            jitter_ns: 0,
            loss_ppm: 0,
            duplicate_ppm: 0,
            reorder_ppm: 0,
            reorder_ns: 5 * MS,
            corrupt_ppm: 0,
            bits_per_second: None,
            send_queue_bytes: 256 << 10,
            receive_queue_bytes: 4 << 20,
            mtu: 1500,
        }
    }
}

/// What a disk does to requests. Chances are in a million requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskModel {
    /// Bytes per sector.
    pub sector_size: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Of each request.
    pub latency_ns: u64,
    /// Reads that fail.
    pub read_error_ppm: u32,
    /// Writes that fail after some of their sectors were written.
    pub short_write_ppm: u32,
    /// Flushes that fail; what they should have made durable stays in the cache.
    pub flush_error_ppm: u32,
    /// Flushes that are reported done and do nothing.
    pub lost_flush_ppm: u32,
    /// Sectors that can neither be read nor written.
    pub bad_sectors: Vec<u64>,
}

impl Default for DiskModel {
    /// 512-byte sectors, 100 us, nothing goes wrong.
    fn default() -> Self {
        Self {
            sector_size: 512,
            read_only: false,
            latency_ns: MS / 10,
            read_error_ppm: 0,
            short_write_ppm: 0,
            flush_error_ppm: 0,
            lost_flush_ppm: 0,
            bad_sectors: Vec::new(),
        }
    }
}
