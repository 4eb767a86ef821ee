//! The virtio drivers against a device whose registers, rings, memory, order and interrupts are the input.

pub mod blk;
pub mod device;
pub mod net;
mod pci;
