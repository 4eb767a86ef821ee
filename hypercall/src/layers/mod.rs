//! Hosts around a host: [`Granted`] refuses what a component was not granted, [`Traced`] records every call, [`Faulty`]
//! makes calls fail.
//!
//! A layer is a `Copy` handle, has every driver contract that the host inside has, and may be put around another
//! layer. Its calls are inlined, so that a layer that is not used costs nothing.

mod bytes;
mod channel;
mod chrome;
mod faulty;
mod granted;
pub mod recorded;
mod ring;
#[cfg(test)]
mod tests;
mod traced;

pub use bytes::ByteRing;
pub use channel::{CHANNEL_ALIGN, Channel, ChannelKind};
pub use chrome::ChromeWriter;
pub use faulty::{Fault, FaultPlan, Faulty, Injected, errors};
pub use granted::{GrantBook, Granted};
pub use recorded::{Recorded, Recorder};
pub use ring::TraceRing;
pub use traced::{ComponentName, TraceEvent, TraceSink, Traced};
