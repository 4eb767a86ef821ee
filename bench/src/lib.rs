//! Benchmarks against peers in the same run.
//!
//! The binary `bench` (`cargo xtask bench NAME`) runs them and prints one JSON object a line ([`record::Record`]). A peer
//! is measured in the same run, on the same machine, under the same emulator and options, in turns with ours.
//!
//! `netpeer` is the Linux side of the `netbench` application, `netload` loads either of them.
#![forbid(unsafe_code)]

pub mod plot;
pub mod record;
pub mod runner;

/// TCP port: receives until the client closes, then sends one byte.
pub const SINK: u16 = 5001;
/// TCP port: sends until the client closes.
pub const SOURCE: u16 = 5002;
/// TCP port: answers requests of a given length with responses of a given length.
pub const RESPOND: u16 = 5003;
/// UDP port: echoes.
pub const ECHO: u16 = 5004;
