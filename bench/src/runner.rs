//! The benchmarks, one module each; every one returns its records.

pub mod boot;
pub mod contract;
pub mod guest;
pub mod image;
pub mod linux;
pub mod net;
pub mod vfs;

use crate::record::Record;

/// An error is one line for a person.
pub type Result<T = Vec<Record>> = std::result::Result<T, String>;
