//! Why a controller could not be set up.

use core::fmt;

/// What went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A hypercall failed while `.0` was done.
    Host(&'static str, hypercall::Error),
    /// The controller says something that the specification forbids.
    BadDevice(&'static str),
    /// A correct controller that needs something we do not have.
    Unsupported(&'static str),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Host(what, error) => write!(f, "{what}: {error}"),
            Error::BadDevice(what) | Error::Unsupported(what) => f.write_str(what),
        }
    }
}

impl core::error::Error for Error {}
