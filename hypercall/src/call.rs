//! Names for the hypercalls and for the capabilities they belong to: what manifests, grants and traces speak of.

/// A capability: one trait of the contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Capability {
    /// [`crate::Clock`].
    Clock,
    /// [`crate::Memory`].
    Memory,
    /// [`crate::Threads`].
    Threads,
    /// [`crate::Cpus`].
    Cpus,
    /// [`crate::Entropy`].
    Entropy,
    /// [`crate::Params`].
    Params,
    /// [`crate::Console`].
    Console,
    /// [`crate::Exit`].
    Exit,
    /// [`crate::Dma`].
    Dma,
    /// [`crate::Mmio`].
    Mmio,
    /// [`crate::Pci`].
    Pci,
    /// [`crate::Irq`].
    Irq,
    /// [`crate::HostBlock`].
    Block,
    /// [`crate::HostLink`].
    Link,
    /// [`crate::HostUsb`].
    Usb,
}

impl Capability {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::Clock,
        Self::Memory,
        Self::Threads,
        Self::Cpus,
        Self::Entropy,
        Self::Params,
        Self::Console,
        Self::Exit,
        Self::Dma,
        Self::Mmio,
        Self::Pci,
        Self::Irq,
        Self::Block,
        Self::Link,
        Self::Usb,
    ];

    /// In lower case; for a driver contract the name of its [`crate::ContractVersion`].
    pub const fn name(self) -> &'static str {
        match self {
            Self::Clock => "clock",
            Self::Memory => "memory",
            Self::Threads => "threads",
            Self::Cpus => "cpus",
            Self::Entropy => "entropy",
            Self::Params => "params",
            Self::Console => "console",
            Self::Exit => "exit",
            Self::Dma => "dma",
            Self::Mmio => "mmio",
            Self::Pci => "pci",
            Self::Irq => "irq",
            Self::Block => "block",
            Self::Link => "link",
            Self::Usb => "usb",
        }
    }

    /// The driver contract of that name.
    pub fn of_contract(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|one| one.name() == name && *one as u8 >= Self::Dma as u8)
    }

    /// The functions it has.
    pub fn calls(self) -> impl Iterator<Item = Call> {
        Call::ALL.iter().copied().filter(move |call| call.capability() == self)
    }
}

/// A set of capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Grants(u16);

impl Grants {
    /// Nothing.
    pub const NONE: Self = Self(0);

    /// This set and `capability`.
    pub const fn and(self, capability: Capability) -> Self {
        Self(self.0 | 1 << capability as u8)
    }

    /// These.
    pub const fn of(capabilities: &[Capability]) -> Self {
        let (mut set, mut index) = (Self::NONE, 0);
        while index < capabilities.len() {
            set = set.and(capabilities[index]);
            index += 1;
        }
        set
    }

    /// Whether `capability` is in it.
    #[inline]
    pub const fn has(self, capability: Capability) -> bool {
        self.0 & 1 << capability as u8 != 0
    }
}

macro_rules! calls {
    ($($name:ident $text:literal $capability:ident [$($argument:literal),*] $blocks:literal;)*) => {
        /// A function of the contract.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Call {
            $(#[doc = concat!("`", $text, "`.")] $name,)*
        }

        impl Call {
            /// All of them, in the order of the contracts.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// As it is called.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }

            /// What a component must be granted to call it.
            pub const fn capability(self) -> Capability {
                match self {
                    $(Self::$name => Capability::$capability,)*
                }
            }

            /// What the numbers in a trace event mean.
            pub const fn arguments(self) -> &'static [&'static str] {
                match self {
                    $(Self::$name => &[$($argument),*],)*
                }
            }

            /// Whether its caller sleeps in it, so that others run on the CPU meanwhile.
            pub const fn blocks(self) -> bool {
                match self {
                    $(Self::$name => $blocks,)*
                }
            }
        }
    };
}

calls! {
    MonotonicNs "monotonic_ns" Clock [] false;
    RealtimeNs "realtime_ns" Clock [] false;
    AllocPages "alloc_pages" Memory ["count"] false;
    FreePages "free_pages" Memory ["count"] false;
    MemoryBytes "memory_bytes" Memory [] false;
    Spawn "spawn" Threads ["cpu"] false;
    Join "join" Threads ["thread"] true;
    Park "park" Threads ["word", "deadline_ns"] true;
    Unpark "unpark" Threads ["word", "count"] false;
    YieldNow "yield_now" Threads [] true;
    CpuCount "cpu_count" Cpus [] false;
    CurrentCpu "current_cpu" Cpus [] false;
    FillRandom "fill_random" Entropy ["bytes"] false;
    Param "param" Params ["bytes"] false;
    ConsoleWrite "console_write" Console ["bytes"] false;
    Exit "exit" Exit ["code"] false;
    DmaAlloc "dma_alloc" Dma ["bytes", "align"] false;
    DmaFree "dma_free" Dma ["device", "bytes"] false;
    DmaMap "dma_map" Dma ["bytes"] false;
    DmaUnmap "dma_unmap" Dma ["device", "bytes"] false;
    DmaRead "dma_read" Dma ["device", "width"] false;
    DmaCopy "dma_copy" Dma ["device", "bytes"] false;
    MmioDevices "mmio_devices" Mmio [] false;
    MmioMap "mmio_map" Mmio ["address", "bytes"] false;
    MmioRead "mmio_read" Mmio ["register", "width"] false;
    MmioWrite "mmio_write" Mmio ["register", "value"] false;
    PciFunctions "pci_functions" Pci [] false;
    PciRead "pci_read" Pci ["function", "register"] false;
    PciWrite "pci_write" Pci ["function", "register"] false;
    IrqAttach "irq_attach" Irq ["cpu"] false;
    IrqUnmask "irq_unmask" Irq ["irq"] false;
    IrqDetach "irq_detach" Irq ["irq"] false;
    DiskCount "disk_count" Block [] false;
    DiskInfo "disk_info" Block ["disk"] false;
    DiskRead "disk_read" Block ["sector", "bytes"] true;
    DiskWrite "disk_write" Block ["sector", "bytes"] true;
    DiskFlush "disk_flush" Block ["disk"] true;
    LinkCount "link_count" Link [] false;
    LinkOpen "link_open" Link ["link"] false;
    LinkSend "link_send" Link ["link", "bytes"] false;
    LinkReceive "link_receive" Link ["link", "bytes"] false;
    LinkClose "link_close" Link ["link"] false;
    UsbWatch "usb_watch" Usb [] false;
    UsbDevices "usb_devices" Usb [] false;
    UsbDescriptors "usb_descriptors" Usb ["device", "bytes"] false;
    UsbOpen "usb_open" Usb ["device"] true;
    UsbClose "usb_close" Usb ["device"] true;
    UsbConfigure "usb_configure" Usb ["device", "configuration"] true;
    UsbClaim "usb_claim" Usb ["device", "interface"] true;
    UsbRelease "usb_release" Usb ["device", "interface"] true;
    UsbSetAlternate "usb_set_alternate" Usb ["device", "interface"] true;
    UsbClearHalt "usb_clear_halt" Usb ["device", "endpoint"] true;
    UsbReset "usb_reset" Usb ["device"] true;
    UsbSubmit "usb_submit" Usb ["endpoint", "bytes"] false;
    UsbCancel "usb_cancel" Usb ["device", "tag"] false;
    UsbReap "usb_reap" Usb ["device"] false;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_core_contract_has_fewer_than_20_functions() {
        let core = |call: &&Call| (call.capability() as u8) < Capability::Dma as u8;
        assert_eq!(Call::ALL.iter().filter(core).count(), 16);
    }

    #[test]
    fn capabilities_and_calls_fit_together() {
        let all: usize = Capability::ALL.iter().map(|one| one.calls().count()).sum();
        assert_eq!(all, Call::ALL.len());
        assert!(Capability::ALL.iter().all(|one| one.calls().count() > 0));
        for (index, call) in Call::ALL.iter().enumerate() {
            assert_eq!(*call as usize, index);
            assert!(call.arguments().len() <= 2);
        }
        assert_eq!(Capability::of_contract("dma"), Some(Capability::Dma));
        assert_eq!(Capability::of_contract("core"), None);
        assert_eq!(Capability::of_contract("clock"), None);
    }

    #[test]
    fn grants_are_a_set() {
        let set = Grants::of(&[Capability::Clock, Capability::Link]);
        assert!(set.has(Capability::Clock) && set.has(Capability::Link));
        assert!(!set.has(Capability::Memory));
    }
}
