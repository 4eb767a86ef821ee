//! What turns components into a kernel.
//!
//! This crate defines what a block device ([`block`]), a network interface ([`nic`]), an input device ([`input`]), a
//! file system ([`fs`]) and a socket provider ([`socket`]) is, and never names one. Components register with a [`Kernel`], which is one running
//! instance; applications get everything from it.
//!
//! Locks and waiting ([`sync`]), tasks ([`task`]) and timers ([`timer`]) are built here once on the
//! host's park and unpark.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

pub mod block;
pub mod calendar;
pub mod config;
pub mod counter;
pub mod driver;
pub mod fs;
pub mod input;
mod kernel;
pub mod manifest;
mod nearest;
pub mod nic;
pub mod socket;
pub mod sync;
pub mod task;
pub mod timer;

pub use kernel::{Kernel, StartError};
pub use manifest::Manifest;
pub use nearest::nearest;
