//! A machine in memory, for tests and fuzzers: [`TestMachine`] is a host with DMA memory, register windows, PCI
//! functions and interrupts, behind which device models stand.
//!
//! The models are written from the device's side of the specification and share no code with the drivers. They can be
//! honest or break the rules in one chosen way ([`Hostility`]).
//!
//! DMA memory is an arena with addresses of its own, and mapped buffers are copied into it. So a device model reaches
//! only what the driver gave it, and touching anything else is counted ([`TestMachine::violations`]).
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that breaks may panic")]

mod arena;
mod blk;
mod device;
mod host;
mod mmio;
mod net;
mod pci;

pub use arena::Arena;
pub use blk::BlkModel;
pub use device::{Access, Element, Hostility, Model, Rings};
pub use host::{Handle, MmioOptions, PciOptions, TestMachine};
pub use net::{NetModel, SentFrame};

/// A lock that a failed assertion does not poison: the first message is the one to read.
#[derive(Default)]
struct Mutex<T: ?Sized>(std::sync::Mutex<T>);

impl<T> Mutex<T> {
    fn new(value: T) -> Self {
        Self(std::sync::Mutex::new(value))
    }
}

impl<T: ?Sized> Mutex<T> {
    fn lock(&self) -> std::sync::MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
