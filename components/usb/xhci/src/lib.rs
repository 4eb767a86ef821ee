//! Driver for USB host controllers of the xHCI kind (xHCI 1.2): a [`HostController`](anykernel_usb::controller::HostController).
//!
//! [`probe`] finds the controllers on PCI. Below it, from the top down: `start` sets one up, `controller` runs it,
//! `slot` is a device and `endpoint` its transfers, `ring` and `context` are what is shared with the controller, and `dma`,
//! which alone contains unsafe code, is memory as owned tokens. Registers are reached through the contract only.
#![no_std]
#![deny(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::indexing_slicing, clippy::unwrap_used))]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod context;
mod controller;
mod dma;
mod endpoint;
mod error;
mod probe;
mod regs;
mod ring;
mod slot;
mod start;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod trb;

pub use error::Error;
pub use probe::{MANIFEST, probe};
