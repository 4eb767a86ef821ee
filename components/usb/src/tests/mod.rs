//! The stack over models.

mod enumeration;
mod platform;
mod storage;
mod support;
