//! The stack over models.

mod capture;
mod enumeration;
mod faults;
mod input;
mod network;
mod platform;
mod storage;
mod support;
