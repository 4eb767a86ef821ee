//! The Linux kernel module target: a domain of kernel threads, with block devices and a network interface of Linux as its
//! drivers' devices.
//!
//! Half of the module is C (`kbuild/`): one small function per hypercall over the kernel's own API, because that API is
//! macros and inline functions which change from release to release. This crate is the other half, linked in as a static
//! library: [`LinuxHost`] implements the contracts on those functions, and the exported functions of `entry` are what the
//! C half calls.
//!
//! The crate has no `std` and is checked on any host, but only a kernel can run it.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

mod apps;
mod conformance;
mod domain;
mod entry;
mod ffi;
#[cfg(target_os = "none")]
mod heap;
mod host;
mod logger;
mod usb;

pub use host::LinuxHost;
