//! Private contract: PCI functions and their configuration space.

use crate::{Result, Width};
use core::fmt;

/// Segment, bus, device and function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciAddress {
    /// Segment group.
    pub segment: u16,
    /// 0 to 255.
    pub bus: u8,
    /// 0 to 31.
    pub device: u8,
    /// 0 to 7.
    pub function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{}", self.segment, self.bus, self.device, self.function)
    }
}

/// PCI.
pub trait Pci {
    /// Calls `found` for every function present, in address order. Context: thread.
    fn pci_functions(&self, found: &mut dyn FnMut(PciAddress));

    /// Reads configuration space. `offset` is aligned to `width` (at most 32 bits) and below 4096.
    ///
    /// Errors: [`crate::Error::NotFound`], [`crate::Error::Invalid`]. An absent register reads as all ones.
    /// Context: thread. Counterparts: `rumpcomp_pci_confread`; LKL `read` of `lkl_dev_pci_ops`.
    fn pci_read(&self, function: PciAddress, offset: u16, width: Width) -> Result<u32>;

    /// Writes configuration space; otherwise as [`Pci::pci_read`]. The host may refuse registers that it owns
    /// (MSI-X) with [`crate::Error::Denied`].
    fn pci_write(&self, function: PciAddress, offset: u16, width: Width, value: u32) -> Result<()>;
}
