//! Why a device could not be set up, or was given up.

use core::fmt;

/// What went wrong with a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub(crate) enum Error {
    /// A hypercall failed while `.0` was done.
    Host(&'static str, hypercall::Error),
    /// The device says something that the specification forbids.
    BadDevice(&'static str),
    /// A correct device that needs something we do not have.
    Unsupported(&'static str),
    /// The ring shows something impossible.
    Ring(Fault),
}

/// Result of a driver's own functions.
pub(crate) type Result<T, E = Error> = core::result::Result<T, E>;

/// How a device broke its ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// `used.idx` moved further than there are buffers in flight.
    UsedIndex(u16),
    /// `used.id` names no buffer in flight.
    UsedId(u32),
    /// `used.len` is more than the buffer could take.
    UsedLen(u32),
    /// A request got no answer in time.
    Timeout,
    /// What was answered makes no sense to the driver.
    Answer(&'static str),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::UsedIndex(index) => write!(f, "used index {index} is ahead of what was offered"),
            Fault::UsedId(id) => write!(f, "returned buffer {id} that it was not given"),
            Fault::UsedLen(len) => {
                write!(f, "claims to have written {len} bytes, more than the buffer holds")
            }
            Fault::Timeout => f.write_str("did not answer a request in time"),
            Fault::Answer(what) => f.write_str(what),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Host(what, error) => write!(f, "{what}: {error}"),
            Error::BadDevice(what) | Error::Unsupported(what) => f.write_str(what),
            Error::Ring(fault) => fault.fmt(f),
        }
    }
}

impl core::error::Error for Error {}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Error::Ring(fault)
    }
}
