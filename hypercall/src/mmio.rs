//! Private contract: memory-mapped registers.
//!
//! Access goes through the host, not through pointers: in production it inlines to one instruction, and a device
//! model in a process can stand behind the same calls.

use crate::Result;

/// A physical address as the platform's firmware or bus gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PhysAddr(pub u64);

/// Width of a register access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// 1 byte.
    U8,
    /// 2 bytes.
    U16,
    /// 4 bytes.
    U32,
    /// 8 bytes.
    U64,
}

impl Width {
    /// In bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Width::U8 => 1,
            Width::U16 => 2,
            Width::U32 => 4,
            Width::U64 => 8,
        }
    }
}

/// A mapped range of registers. Only a host can make one, so holding it is the right to access it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioRegion {
    base: usize,
    len: usize,
}

impl MmioRegion {
    /// A region at `base` (whatever the host means by it) of `len` bytes.
    ///
    /// # Safety
    /// Called by hosts only: every access that the host's `mmio_read` and `mmio_write` make within it is sound.
    #[expect(unsafe_code, reason = "minting the right to access registers")]
    pub const unsafe fn new(base: usize, len: usize) -> Self {
        Self { base, len }
    }

    /// The host's base.
    pub const fn base(&self) -> usize {
        self.base
    }

    /// Length in bytes.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no registers.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether an access of `width` at `offset` lies inside and is aligned.
    pub const fn holds(&self, offset: usize, width: Width) -> bool {
        let bytes = width.bytes();
        offset.is_multiple_of(bytes) && offset < self.len && self.len - offset >= bytes
    }

    /// The part `offset .. offset + len`, if it lies inside.
    pub fn part(&self, offset: usize, len: usize) -> Option<Self> {
        let end = offset.checked_add(len)?;
        (end <= self.len).then_some(Self { base: self.base + offset, len })
    }
}

/// A device that is not on a discoverable bus, as firmware or the command line describes it: so far
/// `virtio,mmio` only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDevice {
    /// Where its registers are.
    pub registers: PhysAddr,
    /// Their length in bytes.
    pub len: usize,
    /// Its interrupt line (GSI).
    pub line: u32,
}

/// Register access.
pub trait Mmio {
    /// Calls `found` for every `virtio,mmio` transport the platform was told of.
    /// Context: thread. Counterpart: Linux `virtio_mmio.device=` and platform devices.
    fn mmio_devices(&self, found: &mut dyn FnMut(MmioDevice));

    /// Makes registers reachable, uncached.
    ///
    /// Errors: [`crate::Error::Denied`] if the range is memory or belongs to the host; [`crate::Error::Invalid`];
    /// [`crate::Error::NoMemory`]. Context: thread. Mappings last as long as the domain.
    /// Counterparts: `rumpcomp_pci_map`; LKL `ioremap`.
    fn mmio_map(&self, at: PhysAddr, len: usize) -> Result<MmioRegion>;

    /// Reads a register. Panics if the access is not inside the region or not aligned
    /// ([`MmioRegion::holds`]): a driver checks offsets that a device told it. Context: any.
    /// Counterpart: LKL `iomem_access`.
    fn mmio_read(&self, region: MmioRegion, offset: usize, width: Width) -> u64;

    /// Writes a register; otherwise as [`Mmio::mmio_read`].
    fn mmio_write(&self, region: MmioRegion, offset: usize, width: Width, value: u64);
}
