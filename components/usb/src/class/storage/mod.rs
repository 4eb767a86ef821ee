//! Mass storage: SCSI over the bulk-only transport, each medium a block device.
//!
//! The disk of the device at `1-2` is `usb1-2`; further units are `usb1-2l1` and so on. A medium that is taken out, or a device
//! that is unplugged, turns every request into an error and leaves the registry.

pub mod bot;
mod disk;
pub mod scsi;
#[cfg(test)]
mod tests;
mod transport;
mod unit;

pub(crate) use unit::run;
