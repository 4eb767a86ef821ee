//! A guest that only serves its files: booted for one command, ended with it.

use super::Remote;
use crate::runner::{self, Target};
use crate::{Failure, NetSpec, Publish, RunSpec, gateway, interrupt};
use anykernel::fs::Namespace;
use files::Options;
use hypercall::ExitStatus;
use rustix::rand::{GetRandomFlags, getrandom};
use std::fmt::Write;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;

/// The running guest. It ends when its one client has left.
#[derive(Debug)]
pub struct Guest {
    names: Arc<Remote>,
    run: Option<JoinHandle<Result<ExitStatus, Failure>>>,
}

/// What nobody else on this machine knows: the port is open to all of them.
fn key() -> Result<String, Failure> {
    let mut bytes = [0; 16];
    getrandom(&mut bytes, GetRandomFlags::empty())
        .map_err(|error| Failure::new(format!("no random numbers: {error}")))?;
    Ok(bytes.iter().fold(String::new(), |mut text, byte| {
        // A string takes everything.
        let _ = write!(text, "{byte:02x}");
        text
    }))
}

fn free_port() -> std::io::Result<u16> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr().map(|address| address.port())
}

fn ended(run: JoinHandle<Result<ExitStatus, Failure>>) -> Result<ExitStatus, Failure> {
    run.join().unwrap_or_else(|_| Err(Failure::new("running the guest: the thread panicked")))
}

impl Guest {
    /// Boots `spec`'s disks and USB devices on `target` and waits until it serves what `options` say, on a port and with a key
    /// that are chosen here. Failures are lines for a person.
    pub fn start(target: Target, mut spec: RunSpec, mut options: Options) -> Result<Self, Failure> {
        let port = free_port().map_err(|error| Failure::new(format!("no free port: {error}")))?;
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        options.key = key()?;
        options.once = true;
        spec.publish = vec![Publish { host: address, guest: options.port }];
        spec.net = NetSpec::User;
        spec.stderr = true;
        spec.config.interfaces = vec![gateway::guest_interface()];
        spec.config.app = std::iter::once("files".into()).chain(options.to_words()).collect();
        let run = std::thread::Builder::new().name("guest".into()).spawn(move || runner::run(target, &spec));
        let run = run.map_err(|error| Failure::new(format!("running the guest: {error}")))?;
        let over = || run.is_finished() || interrupt::interrupted();
        match Remote::connect(address, &options.key, over)? {
            Some(names) => Ok(Self { names, run: Some(run) }),
            None => Err(match ended(run) {
                Err(failure) => failure,
                Ok(_) if interrupt::interrupted() => Failure::new("interrupted"),
                Ok(_) => Failure::new("the guest has no files to show: its last words are above"),
            }),
        }
    }

    /// Its files.
    pub fn names(&self) -> Arc<dyn Namespace> {
        self.names.clone()
    }

    /// It ended by itself.
    pub fn is_over(&self) -> bool {
        self.run.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Lets it end, and waits for that.
    pub fn finish(mut self) -> Result<(), Failure> {
        self.end()
    }

    fn end(&mut self) -> Result<(), Failure> {
        self.names.close();
        match self.run.take().map(ended).transpose()? {
            None | Some(ExitStatus::Success) => Ok(()),
            Some(status) => Err(Failure::new(format!("the guest ended with status {}", status.code()))),
        }
    }
}

impl Drop for Guest {
    /// Also after a failure it writes out what it has, and leaves no files of its own behind.
    fn drop(&mut self) {
        if let Err(failure) = self.end() {
            log::warn!("{failure}");
        }
    }
}
