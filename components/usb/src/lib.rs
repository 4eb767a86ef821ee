//! The usb component: a host stack that is the same above a host controller of our own and above a platform's USB core.
//!
//! A driver for a host controller implements [`controller::HostController`].
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::indexing_slicing, clippy::unwrap_used))]

extern crate alloc;
#[cfg(any(test, feature = "testing"))]
extern crate std;

mod asking;
mod class;
pub mod controller;
pub mod descriptor;
mod device;
mod engine;
mod hub;
mod platform;
mod port;
pub mod quirks;
mod request;
mod stack;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod tree;
pub mod usbmon;

pub use class::{hid, net, storage};
pub use engine::Failure;
pub use hub::hub_port_status;
pub use platform::{Claim, PLATFORM_MANIFEST, PlatformStack};
pub use stack::{MANIFEST, Options, UsbStack};
pub use tree::{DriverNote, Listed, Node, NodeDevice, NodeState};
