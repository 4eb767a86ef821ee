//! The POSIX-process target: components in an ordinary process, without privileges.
//!
//! As a library it holds any number of instances in one process ([`Instance`]), each on a [`PosixHost`] with its own
//! disks ([`HostDisk`]), links ([`Link`]), memory limit and console. The binary `anykernel` is the command line over
//! it; [`qemu`] is what it needs to run the other targets.
#![deny(unsafe_code)]

pub mod apps;
pub mod control;
mod disk;
pub mod fuse;
pub mod fuzz;
pub mod gateway;
mod heap;
mod host;
mod instance;
pub mod interrupt;
pub mod link;
pub mod logger;
pub mod plan;
pub mod qemu;
pub mod record;
pub mod remote;
pub mod replay;
pub mod runner;
pub mod sim;
mod spec;
pub mod trace;
pub mod usb;
mod usb_pcap;

pub use disk::HostDisk;
pub use heap::Heap;
pub use host::{ConsoleSink, ConsoleText, DomainExit, HostOwner, HostSetup, PosixHost};
pub use instance::{Builder, Enter, Instance, start_components};
pub use link::Link;
pub use spec::{DiskSpec, Failure, MachineKind, NetSpec, Publish, RunSpec, UsbSpec};
