//! A host controller in memory and devices to plug into it: what the tests and fuzzers of this and other crates run on.
//!
//! Devices are [`hypercall::testing::UsbModel`]s, so each also goes into a [`TestHost`](hypercall::testing::TestHost) as a
//! platform's device. Panics on misuse of the controller.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that breaks may panic")]

mod build;
mod bus;
mod hid;
mod hub;
mod net;
mod storage;

pub use build::Descriptors;
pub use bus::{ModelBus, ModelController, ModelHost};
pub use hid::{HidModel, HidState, KEYBOARD, MOUSE};
pub use hub::HubModel;
pub use net::{NetModel, NetState};
pub use storage::{Fault, StorageModel, StorageState};
