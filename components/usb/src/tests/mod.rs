//! The stack over models.

mod enumeration;
mod storage;
mod support;
