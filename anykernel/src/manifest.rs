//! Manifests: what a component may use, checked before it starts.

use hypercall::ContractVersion;

pub use hypercall::Capability;

/// What a component is and may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Manifest {
    /// `net`, `vfs`, `ext4`, `virtio-blk`.
    pub name: &'static str,
    /// One line for a person.
    pub summary: &'static str,
    /// Capabilities of the core contract.
    pub core: &'static [Capability],
    /// Contracts with the versions it was compiled against; the core contract always among them.
    pub contracts: &'static [ContractVersion],
}
