//! The usb component: a host stack that is the same above a host controller of our own and above a platform's USB core.
//!
//! A driver for a host controller implements [`controller::HostController`].
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::indexing_slicing, clippy::unwrap_used))]

extern crate alloc;

pub mod controller;
