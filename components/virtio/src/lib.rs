//! Drivers for the block and network devices of virtual machines (VirtIO 1.2), on our own virtqueue.
//!
//! [`probe`] finds the devices and registers them with the kernel. Below it, from the top down: the drivers `blk` and
//! `net`; the `transport`s virtio-mmio and virtio-pci; the split virtqueue `queue`; and `dma`, memory as owned tokens.
//! Only the last two contain unsafe code.
//!
//! Nothing that a device says is trusted: see `queue` for the rings and `dma` for memory. A device that breaks the
//! rules is reset and given up; its users see errors, never a panic.
#![no_std]
#![deny(unsafe_code)]
#![warn(clippy::indexing_slicing, clippy::unwrap_used)]

extern crate alloc;
#[cfg(any(test, feature = "testing"))]
extern crate std;

mod blk;
mod dma;
mod error;
mod net;
mod probe;
mod queue;
mod spec;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod transport;

pub use probe::{BLK_MANIFEST, NET_MANIFEST, probe};
