//! The simulated host: any number of nodes in one process, on one virtual clock, run the same way twice.
//!
//! A [`Simulation`] owns nodes. A [`SimHost`] is the handle of one of them: it implements the core contract, disks, links
//! and the device contracts, so a kernel with its components runs on it unchanged.
//!
//! * **Threads** of all nodes are coroutines on the calling OS thread and run one at a time. They change at hypercalls
//!   only, as a seeded [`Schedule`] decides. The code that made the simulation is a thread too, the *outside*: it may make
//!   hypercalls through any handle, and what would block it runs the others instead.
//! * **Time** is virtual. Every hypercall costs a little of it; when nobody can run it jumps to the next event.
//! * **Entropy** comes from the seed. Nothing of the real clock, of addresses or of hash seeds enters, so
//!   [`Simulation::trace_hash`], which takes in every hypercall, is the same on every machine.
//! * **Ends**: [`Simulation::crash`] and dropping the simulation stop threads wherever they are. Each unwinds from the
//!   hypercall that it is in; hypercalls of a node that is down do nothing. A thread that will not end loses its stack
//!   and is counted in [`Leaks::abandoned`].
//!
//! What a thread does between two hypercalls is atomic here. A thread that spins without any hypercall cannot be
//! preempted: a watchdog ends the process and says which thread it was.
//!
//! Neighbours: `segment` and `disk` simulate what nodes are joined by and keep data on, `device` is where
//! models of registers plug in, `fiber` is the only one that switches stacks.

mod config;
mod device;
mod disk;
mod engine;
mod event;
mod fiber;
mod host;
mod memory;
mod node;
mod park;
mod random;
mod report;
pub mod scenario;
mod schedule;
mod segment;
mod simulation;
mod thread;
mod trace;
mod watchdog;

pub use config::{DiskModel, LinkModel, NodeSetup, Schedule, SimConfig};
pub use device::{Bus, Registers};
pub use disk::{DiskId, PowerCut};
pub use host::SimHost;
pub use random::Random;
pub use report::{Failure, Leaks, Panicked, ThreadReport};
pub use segment::{SegmentCounters, SegmentId};
pub use simulation::Simulation;

/// Nanoseconds in a millisecond.
pub const MS: u64 = 1_000_000;
/// Nanoseconds in a second.
pub const SECOND: u64 = 1_000_000_000;
