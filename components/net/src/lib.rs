//! The net component: Ethernet, ARP, NDP, IPv4, IPv6, ICMP, UDP and TCP over the interfaces that drivers registered.
//!
//! The core is [`Shard`], a state machine without threads or I/O of its own: it is given the time, the queues of
//! the interfaces and messages of other shards, and says when it wants to be called next. [`start`] makes one
//! shard per CPU, each with a thread and one queue of each interface. A frame belongs to the shard that the hash of
//! its connection (TCP) or its local port (UDP) names; the others pass it on over a bounded ring.
//!
//! smoltcp is the engine of one TCP connection each (`tcp::engine`); finding the connection, timers, listening, and
//! everything below and beside TCP is done here, so that the cost of a packet does not depend on how many
//! connections there are.
#![no_std]
#![forbid(unsafe_code)]
#![warn(clippy::indexing_slicing, clippy::unwrap_used)]
#![cfg_attr(test, allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "tests panic by design"))]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod arp;
mod checksum;
mod config;
mod counters;
mod dhcp;
mod dns;
mod ethernet;
mod forward;
pub mod hostlink;
mod icmp;
mod io;
mod ipv4;
mod ndp;
mod neighbor;
mod packet;
mod prf;
mod provider;
mod reassembly;
mod route;
mod shard;
mod slab;
mod sockets;
mod stack;
mod tcp;
#[cfg(feature = "testing")]
pub mod testing;
mod udp;

pub use config::{Ipv4Setting, Ipv6Setting, Limits, Settings};
pub use counters::NetCounters;
pub use shard::{FlowId, NicSetup, Poll, Shard, ShardSetup, UdpId};
pub use stack::start;

#[cfg(test)]
mod tests;
