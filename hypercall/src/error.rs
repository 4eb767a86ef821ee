//! The one error type of the contract.

use core::fmt;

/// Why a hypercall failed. errno exists only at the edges of the system, not here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Error {
    /// The host has no memory (or address space, or table slots) left for this.
    NoMemory,
    /// An argument is out of its documented range.
    Invalid,
    /// No such device, parameter or thread.
    NotFound,
    /// This host does not provide the function at all.
    Unsupported,
    /// The call would have to wait, and may not: try again when signalled.
    WouldBlock,
    /// The thing is in use elsewhere.
    Busy,
    /// The caller's manifest or the device's mode does not allow it (for example a write to a read-only disk).
    Denied,
    /// The buffer is too small for the answer.
    BufferTooSmall,
    /// The device or the host's file failed.
    Io,
    /// The device is gone.
    Gone,
}

/// Result of a hypercall.
pub type Result<T, E = Error> = core::result::Result<T, E>;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Error::NoMemory => "out of memory",
            Error::Invalid => "invalid argument",
            Error::NotFound => "not found",
            Error::Unsupported => "not supported by this host",
            Error::WouldBlock => "would block",
            Error::Busy => "busy",
            Error::Denied => "not permitted",
            Error::BufferTooSmall => "buffer too small",
            Error::Io => "input/output error",
            Error::Gone => "device is gone",
        })
    }
}

impl core::error::Error for Error {}
