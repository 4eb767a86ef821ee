//! Versions: a host and a component that were built against different contracts refuse each other.

use core::fmt;

/// Name and version of one contract.
///
/// A change that an old component or host would misunderstand raises `major`; an addition raises `minor`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContractVersion {
    /// `"core"`, `"dma"`, `"mmio"`, `"pci"`, `"irq"`, `"block"`, `"link"` or `"usb"`.
    pub name: &'static str,
    /// Must be equal on both sides.
    pub major: u16,
    /// The host's must be at least the component's.
    pub minor: u16,
}

impl ContractVersion {
    /// The core contract of this crate.
    pub const CORE: Self = Self::new("core", 1, 0);
    /// Device memory ([`crate::Dma`]).
    pub const DMA: Self = Self::new("dma", 1, 1);
    /// Memory-mapped registers ([`crate::Mmio`]).
    pub const MMIO: Self = Self::new("mmio", 1, 0);
    /// PCI functions ([`crate::Pci`]).
    pub const PCI: Self = Self::new("pci", 1, 0);
    /// Interrupts ([`crate::Irq`]).
    pub const IRQ: Self = Self::new("irq", 1, 0);
    /// Host block files ([`crate::HostBlock`]).
    pub const BLOCK: Self = Self::new("block", 1, 0);
    /// Host links ([`crate::HostLink`]).
    pub const LINK: Self = Self::new("link", 1, 0);
    /// Host USB devices ([`crate::HostUsb`]).
    pub const USB: Self = Self::new("usb", 1, 0);

    /// A version of the contract `name`.
    pub const fn new(name: &'static str, major: u16, minor: u16) -> Self {
        Self { name, major, minor }
    }
}

impl fmt::Display for ContractVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}.{}", self.name, self.major, self.minor)
    }
}

/// Which contracts a host offers.
pub trait Versions {
    /// Every contract that this host implements, in the version it was compiled against.
    /// Context: any. Never blocks, cannot fail. (rumpuser(3): the version argument of `rumpuser_init`.)
    fn contracts(&self) -> &'static [ContractVersion];

    /// This host as the component `name` is to use it. A host gives itself; a layer that tells components apart, such as
    /// [`crate::layers::Traced`], gives a handle that knows. Reaches no host, so it is no hypercall. Context: any.
    #[must_use]
    fn of_component(self, name: &'static str) -> Self
    where
        Self: Sized,
    {
        let _ = name;
        self
    }
}

/// A component and a host that do not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// What the component was built against.
    pub wants: ContractVersion,
    /// What the host offers under that name, if anything.
    pub offers: Option<ContractVersion>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.offers {
            Some(offers) => {
                write!(
                    f,
                    "the component needs contract {}, this host has {}: build both from one release",
                    self.wants, offers
                )
            }
            None => write!(f, "the component needs contract {}, which this host does not have", self.wants),
        }
    }
}

impl core::error::Error for Refusal {}

/// Checks every wanted contract against what the host offers.
pub fn check_versions(wants: &[ContractVersion], offers: &[ContractVersion]) -> Result<(), Refusal> {
    for want in wants {
        let offer = offers.iter().find(|offer| offer.name == want.name).copied();
        match offer {
            Some(offer) if offer.major == want.major && offer.minor >= want.minor => {}
            offers => return Err(Refusal { wants: *want, offers }),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_other_major_and_older_minor() {
        let offers = [ContractVersion::new("core", 1, 2)];
        assert!(check_versions(&[ContractVersion::new("core", 1, 2)], &offers).is_ok());
        assert!(check_versions(&[ContractVersion::new("core", 1, 0)], &offers).is_ok());
        assert!(check_versions(&[ContractVersion::new("core", 1, 3)], &offers).is_err());
        assert!(check_versions(&[ContractVersion::new("core", 2, 0)], &offers).is_err());
        let missing = check_versions(&[ContractVersion::DMA], &offers).unwrap_err();
        assert_eq!(missing.offers, None);
    }
}
