//! Names and numbers of VirtIO 1.2 that the drivers use. The unit tests hold them against the `virtio-spec` crate.

use bitflags::bitflags;

/// Device types (section 5).
pub(crate) const DEVICE_NET: u32 = 1;
pub(crate) const DEVICE_BLOCK: u32 = 2;

bitflags! {
    /// The device status field (2.1).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Status: u8 {
        const ACKNOWLEDGE = 1;
        const DRIVER = 2;
        const DRIVER_OK = 4;
        const FEATURES_OK = 8;
        const NEEDS_RESET = 64;
        const FAILED = 128;
        // Whatever else a device shows is kept, and means nothing to us.
        const _ = !0;
    }
}

/// Features of every device type (6).
pub(crate) mod feature {
    /// Legacy only: a device that takes any framing of its headers.
    pub(crate) const ANY_LAYOUT: u64 = 1 << 27;
    pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
    pub(crate) const VERSION_1: u64 = 1 << 32;
    pub(crate) const ACCESS_PLATFORM: u64 = 1 << 33;
}

/// The split virtqueue (2.7).
pub(crate) mod ring {
    pub(crate) const DESC_NEXT: u16 = 1;
    pub(crate) const DESC_WRITE: u16 = 2;
    pub(crate) const DESC_INDIRECT: u16 = 4;
    pub(crate) const DESC_BYTES: usize = 16;
    pub(crate) const USED_ELEM_BYTES: usize = 8;
    /// In `avail.flags`: do not interrupt.
    pub(crate) const AVAIL_NO_INTERRUPT: u16 = 1;
    /// In `used.flags`: do not notify.
    pub(crate) const USED_NO_NOTIFY: u16 = 1;
    /// Alignment of the used ring in the legacy layout (2.7.2), and the page size told to legacy devices.
    pub(crate) const LEGACY_ALIGN: usize = 4096;
}

/// virtio-mmio registers (4.2.2, and 4.2.4 for the legacy ones).
pub(crate) mod mmio {
    pub(crate) const MAGIC: usize = 0x00;
    pub(crate) const MAGIC_VALUE: u32 = 0x7472_6976;
    pub(crate) const VERSION: usize = 0x04;
    pub(crate) const DEVICE_ID: usize = 0x08;
    pub(crate) const DEVICE_FEATURES: usize = 0x10;
    pub(crate) const DEVICE_FEATURES_SEL: usize = 0x14;
    pub(crate) const DRIVER_FEATURES: usize = 0x20;
    pub(crate) const DRIVER_FEATURES_SEL: usize = 0x24;
    pub(crate) const LEGACY_PAGE_SIZE: usize = 0x28;
    pub(crate) const QUEUE_SEL: usize = 0x30;
    pub(crate) const QUEUE_NUM_MAX: usize = 0x34;
    pub(crate) const QUEUE_NUM: usize = 0x38;
    pub(crate) const LEGACY_QUEUE_ALIGN: usize = 0x3c;
    pub(crate) const LEGACY_QUEUE_PFN: usize = 0x40;
    pub(crate) const QUEUE_READY: usize = 0x44;
    pub(crate) const QUEUE_NOTIFY: usize = 0x50;
    pub(crate) const INTERRUPT_STATUS: usize = 0x60;
    pub(crate) const INTERRUPT_ACK: usize = 0x64;
    pub(crate) const STATUS: usize = 0x70;
    pub(crate) const QUEUE_DESC: usize = 0x80;
    pub(crate) const QUEUE_DRIVER: usize = 0x90;
    pub(crate) const QUEUE_DEVICE: usize = 0xa0;
    pub(crate) const CONFIG_GENERATION: usize = 0xfc;
    pub(crate) const CONFIG: usize = 0x100;
}

/// virtio-pci: capabilities and the common configuration structure (4.1.4).
pub(crate) mod pci {
    pub(crate) const VENDOR: u32 = 0x1af4;
    /// Modern devices: this plus the device type.
    pub(crate) const MODERN_BASE: u32 = 0x1040;
    pub(crate) const TRANSITIONAL_NET: u32 = 0x1000;
    pub(crate) const TRANSITIONAL_BLOCK: u32 = 0x1001;

    pub(crate) const CAP_COMMON: u8 = 1;
    pub(crate) const CAP_NOTIFY: u8 = 2;
    pub(crate) const CAP_ISR: u8 = 3;
    pub(crate) const CAP_DEVICE: u8 = 4;

    pub(crate) const DEVICE_FEATURE_SELECT: usize = 0;
    pub(crate) const DEVICE_FEATURE: usize = 4;
    pub(crate) const DRIVER_FEATURE_SELECT: usize = 8;
    pub(crate) const DRIVER_FEATURE: usize = 12;
    pub(crate) const CONFIG_MSIX_VECTOR: usize = 16;
    pub(crate) const DEVICE_STATUS: usize = 20;
    pub(crate) const CONFIG_GENERATION: usize = 21;
    pub(crate) const QUEUE_SELECT: usize = 22;
    pub(crate) const QUEUE_SIZE: usize = 24;
    pub(crate) const QUEUE_MSIX_VECTOR: usize = 26;
    pub(crate) const QUEUE_ENABLE: usize = 28;
    pub(crate) const QUEUE_NOTIFY_OFF: usize = 30;
    pub(crate) const QUEUE_DESC: usize = 32;
    pub(crate) const QUEUE_DRIVER: usize = 40;
    pub(crate) const QUEUE_DEVICE: usize = 48;
    pub(crate) const COMMON_BYTES: usize = 56;
    pub(crate) const NO_VECTOR: u16 = 0xffff;
}

/// Interrupt status bits, both transports (4.1.4.5, 4.2.2).
pub(crate) const ISR_CONFIG: u32 = 2;

/// Block devices (5.2).
pub(crate) mod blk {
    pub(crate) const F_SIZE_MAX: u64 = 1 << 1;
    pub(crate) const F_SEG_MAX: u64 = 1 << 2;
    pub(crate) const F_RO: u64 = 1 << 5;
    pub(crate) const F_BLK_SIZE: u64 = 1 << 6;
    pub(crate) const F_FLUSH: u64 = 1 << 9;
    pub(crate) const F_MQ: u64 = 1 << 12;

    pub(crate) const CONFIG_CAPACITY: usize = 0;
    pub(crate) const CONFIG_SIZE_MAX: usize = 8;
    pub(crate) const CONFIG_SEG_MAX: usize = 12;
    pub(crate) const CONFIG_BLK_SIZE: usize = 20;
    pub(crate) const CONFIG_NUM_QUEUES: usize = 34;

    pub(crate) const T_IN: u32 = 0;
    pub(crate) const T_OUT: u32 = 1;
    pub(crate) const T_FLUSH: u32 = 4;

    pub(crate) const S_OK: u8 = 0;

    /// Requests count these, whatever the block size.
    pub(crate) const SECTOR: u64 = 512;
    pub(crate) const HEADER_BYTES: usize = 16;
}

/// Network devices (5.1).
pub(crate) mod net {
    pub(crate) const F_CSUM: u64 = 1 << 0;
    pub(crate) const F_GUEST_CSUM: u64 = 1 << 1;
    pub(crate) const F_MTU: u64 = 1 << 3;
    pub(crate) const F_MAC: u64 = 1 << 5;
    pub(crate) const F_GUEST_TSO4: u64 = 1 << 7;
    pub(crate) const F_GUEST_TSO6: u64 = 1 << 8;
    pub(crate) const F_HOST_TSO4: u64 = 1 << 11;
    pub(crate) const F_HOST_TSO6: u64 = 1 << 12;
    pub(crate) const F_MRG_RXBUF: u64 = 1 << 15;
    pub(crate) const F_STATUS: u64 = 1 << 16;
    pub(crate) const F_CTRL_VQ: u64 = 1 << 17;
    pub(crate) const F_MQ: u64 = 1 << 22;

    pub(crate) const CONFIG_MAC: usize = 0;
    pub(crate) const CONFIG_STATUS: usize = 6;
    pub(crate) const CONFIG_MAX_PAIRS: usize = 8;
    pub(crate) const CONFIG_MTU: usize = 10;
    pub(crate) const STATUS_LINK_UP: u16 = 1;

    pub(crate) const HDR_NEEDS_CSUM: u8 = 1;
    pub(crate) const HDR_DATA_VALID: u8 = 2;
    pub(crate) const GSO_NONE: u8 = 0;
    pub(crate) const GSO_TCPV4: u8 = 1;
    pub(crate) const GSO_TCPV6: u8 = 4;
    /// The header with `num_buffers`; without it (legacy, no mergeable buffers) two bytes less.
    pub(crate) const HEADER_BYTES: usize = 12;
    pub(crate) const LEGACY_HEADER_BYTES: usize = 10;

    pub(crate) const CTRL_MQ: u8 = 4;
    pub(crate) const CTRL_MQ_PAIRS_SET: u8 = 0;
    pub(crate) const CTRL_OK: u8 = 0;
}
