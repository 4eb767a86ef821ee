//! Entropy, parameters, console and exit.

use crate::Result;

/// Randomness.
pub trait Entropy {
    /// Fills `buf` with bytes fit for keys and sequence numbers.
    ///
    /// Errors: [`crate::Error::Unsupported`] if the platform has no source. Context: thread. May block at first use.
    /// Counterpart: `rumpuser_getrandom`.
    fn fill_random(&self, buf: &mut [u8]) -> Result<()>;
}

/// Parameters given to the domain from outside.
pub trait Params {
    /// Copies the value of `key` into `buf` and returns its length in bytes.
    ///
    /// `"config"` is the JSON configuration; other keys are the target's own. Errors: [`crate::Error::NotFound`];
    /// [`crate::Error::BufferTooSmall`] (nothing was copied; the value never exceeds 1 MiB).
    /// Context: thread. Does not block. Counterparts: `rumpuser_getparam`; LKL's kernel command line.
    fn param(&self, key: &str, buf: &mut [u8]) -> Result<usize>;
}

/// Where messages go.
pub trait Console {
    /// Writes all of `bytes`. One call is not torn by another. A console that is gone swallows them.
    ///
    /// Context: any, interrupt included. May busy-wait for the device. Counterparts: `rumpuser_putchar`,
    /// `rumpuser_dprintf`; LKL `print`.
    fn console_write(&self, bytes: &[u8]);
}

/// How a domain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// All went well: process exit code 0.
    Success,
    /// It ran and failed: 1.
    Failure,
    /// It was asked for something that makes no sense: 2.
    Usage,
    /// A panic or a broken law: 101, as Rust's own.
    Panic,
}

impl ExitStatus {
    /// The exit code of a process or virtual machine that ends like this.
    pub const fn code(self) -> u8 {
        match self {
            ExitStatus::Success => 0,
            ExitStatus::Failure => 1,
            ExitStatus::Usage => 2,
            ExitStatus::Panic => 101,
        }
    }
}

/// The end.
pub trait Exit {
    /// Ends the domain: no code of it runs after this, on any CPU.
    ///
    /// Context: any. Does not return. Counterparts: `rumpuser_exit`; LKL `panic`.
    fn exit(&self, status: ExitStatus) -> !;
}
