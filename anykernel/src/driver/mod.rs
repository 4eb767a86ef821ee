//! What drivers of devices share: memory that a device reads and writes, and how a PCI function is set up.

mod dma;
pub mod pci;

pub use dma::{DmaMemory, MappedBuffer, Quiet};
