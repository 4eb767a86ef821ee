//! The atomics behind park words.
//!
//! These are `core`'s. In a model check (`--cfg loom`) they are loom's, so that every order of every access to a word
//! is tried; code whose words are to be checked takes them from here.

#[cfg(not(loom))]
pub use core::sync::atomic::{AtomicU32, Ordering};
#[cfg(loom)]
pub use loom::sync::atomic::{AtomicU32, Ordering};
