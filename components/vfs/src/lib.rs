//! The vfs component: mounts, path walk, ext4, FAT, tmpfs, block cache, partitions.
//!
//! [`start`] registers the file systems, finds partitions and performs the mounts of the configuration; applications
//! then use [`anykernel::fs::Namespace`]. File systems read and write their device through the shared [`cache`].
//! [`hostblk`] is the driver for disks that the host opens.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::indexing_slicing, clippy::unwrap_used))]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod cache;
mod clock_map;
pub mod ext4;
pub mod fat;
pub mod hostblk;
pub mod namespace;
mod partition;
mod start;
#[cfg(test)]
mod testing;
pub mod tmpfs;

pub use partition::scan as scan_partitions;
pub use start::{MANIFEST, start};
