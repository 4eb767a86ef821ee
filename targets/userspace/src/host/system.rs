//! Entropy, parameters, console, exit and versions.

use super::PosixHost;
use hypercall::{Console, ContractVersion, Entropy, Error, Exit, ExitStatus, Params, Result, Versions};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

impl Versions for PosixHost {
    fn contracts(&self) -> &'static [ContractVersion] {
        &[ContractVersion::CORE, ContractVersion::BLOCK, ContractVersion::LINK, ContractVersion::USB]
    }
}

impl Entropy for PosixHost {
    fn fill_random(&self, mut buf: &mut [u8]) -> Result<()> {
        while !buf.is_empty() {
            match getrandom(&mut *buf, GetRandomFlags::empty()) {
                Ok(n) => buf = &mut buf[n..],
                Err(Errno::INTR) => {}
                Err(_) => return Err(Error::Unsupported),
            }
        }
        Ok(())
    }
}

impl Params for PosixHost {
    fn param(&self, key: &str, buf: &mut [u8]) -> Result<usize> {
        self.with(|inner| {
            let value = inner.params.get(key).ok_or(Error::NotFound)?.as_bytes();
            buf.get_mut(..value.len()).ok_or(Error::BufferTooSmall)?.copy_from_slice(value);
            Ok(value.len())
        })
        .unwrap_or(Err(Error::NotFound))
    }
}

impl Console for PosixHost {
    fn console_write(&self, bytes: &[u8]) {
        self.with(|inner| inner.console.write(bytes));
    }
}

/// What [`Exit::exit`] unwinds the calling thread with. Whoever runs a domain's code on a thread of its own catches it, as
/// [`crate::Instance::run`] does.
#[derive(Debug, Clone, Copy)]
pub struct DomainExit(pub ExitStatus);

impl Exit for PosixHost {
    fn exit(&self, status: ExitStatus) -> ! {
        end(self, status);
        // Not a panic: no hook, no message. Threads of the host end here; their wrapper then stops the others.
        std::panic::resume_unwind(Box::new(DomainExit(status)))
    }
}

/// The first end counts.
pub(super) fn end(host: &PosixHost, status: ExitStatus) {
    host.with(|inner| inner.exit.set(status).is_ok());
}

/// Tells the instance's owner that its domain has ended.
pub(super) fn run_stop_hook(host: &PosixHost) {
    if let Some(inner) = host.inner()
        && let Some(hook) = inner.stop_hook.get()
    {
        hook();
    }
}
