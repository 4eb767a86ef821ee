//! The contract between a component and the host platform that runs it.
//!
//! A component (a driver, a protocol stack, a file system) is a `no_std` crate that reaches the world
//! only through the traits in this crate. A *host* implements them for one platform.
//!
//! Two levels, as in rump kernels:
//!
//! * the **core contract**, [`Host`]: what every component may need. Sixteen functions in small
//!   capability traits ([`Clock`], [`Memory`], [`Threads`], [`Cpus`], [`Entropy`], [`Params`],
//!   [`Console`], [`Exit`]), so that a component states in its bounds what it uses;
//! * one **private contract** per kind of driver, versioned apart and bound only where such a driver is
//!   linked: [`Dma`], [`Mmio`], [`Pci`], [`Irq`] (together [`DeviceHost`]), [`HostBlock`], [`HostLink`],
//!   [`HostUsb`].
//!
//! A host is a `Copy` handle that is passed by value: zero-sized on bare metal and in a kernel module, a
//! pointer to an instance in a process, so that one process can hold hundreds of them. Calls are
//! statically dispatched; wrappers such as [`layers::Traced`] are hosts around a host.
//!
//! [`conformance`] is the suite that every host must pass.
//!
//! The crate depends on `core` and `alloc` only.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "testing"))]
extern crate std;

pub mod atomic;
mod block;
mod call;
mod clock;
pub mod conformance;
mod cpu;
#[cfg(any(test, feature = "devices"))]
pub mod devices;
mod dma;
mod error;
mod irq;
pub mod layers;
mod link;
mod memory;
mod mmio;
mod pci;
pub mod planted;
mod system;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod thread;
mod usb;
mod version;

pub use block::{DiskInfo, HostBlock};
pub use call::{Call, Capability, Grants};
pub use clock::Clock;
pub use cpu::{CpuId, Cpus};
pub use dma::{Dma, DmaAddr, DmaBlock, DmaDirection};
pub use error::{Error, Result};
pub use irq::{Irq, IrqId, IrqSource, Signal};
pub use link::{HostLink, LinkInfo};
pub use memory::{Memory, PAGE_SIZE, Pages};
pub use mmio::{Mmio, MmioDevice, MmioRegion, PhysAddr, Width};
pub use pci::{Pci, PciAddress};
pub use system::{Console, Entropy, Exit, ExitStatus, Params};
pub use thread::{ParkResult, ThreadId, ThreadSpec, Threads};
pub use usb::{
    HostUsb, UsbCompletion, UsbDeviceId, UsbDeviceInfo, UsbPath, UsbRefused, UsbSpeed, UsbStatus,
    UsbTransfer, UsbTransferKind,
};
pub use version::{ContractVersion, Refusal, Versions, check_versions};

/// The core contract: every capability a component may need on every target.
///
/// Implemented for whatever implements the capabilities; components should bound on the few they use.
pub trait Host:
    Clock + Memory + Threads + Cpus + Entropy + Params + Console + Exit + Versions + Copy + Send + Sync + 'static
{
}
impl<T> Host for T where
    T: Clock
        + Memory
        + Threads
        + Cpus
        + Entropy
        + Params
        + Console
        + Exit
        + Versions
        + Copy
        + Send
        + Sync
        + 'static
{
}

/// What a driver of a real device needs beside [`Host`]. A process has none of it, so it is a second umbrella.
pub trait DeviceHost: Host + Dma + Mmio + Pci + Irq {}
impl<T> DeviceHost for T where T: Host + Dma + Mmio + Pci + Irq {}
