//! A file server over 9P2000.L, written once against the anykernel API and run on every target: what is mounted, to one client at a time.
//!
//! `files [--port N] [--key WORD] [--once] [--find DISK]... [--partition N] [--write]`
//!
//! Linux mounts it with `mount -t 9p -o trans=tcp,version=9p2000.L,port=N,aname=WORD ADDRESS DIR`; `anykernel ls`, `cp` and `mount`
//! read disks of guests through it.
#![no_std]
#![forbid(unsafe_code)]
#![warn(clippy::indexing_slicing, clippy::unwrap_used)]

extern crate alloc;

mod find;
mod session;
pub mod wire;

pub use find::find;
pub use session::{Broken, Session};

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::fs::Namespace;
use anykernel::socket::{NetError, TcpListener, TcpStream};
use anykernel::task::Executor;
use core::net::{IpAddr, Ipv6Addr, SocketAddr};
use hypercall::{ExitStatus, Host};

/// How long a disk may take until it is there.
const PATIENCE_NS: u64 = 10_000_000_000;

/// What the words behind the application's name say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The TCP port.
    pub port: u16,
    /// What a client must name when it attaches; empty: it need not.
    pub key: String,
    /// End when the first client that attached has left.
    pub once: bool,
    /// Mount the first file system of these disks in the place of the root.
    pub find: Vec<String>,
    /// The one on that partition.
    pub partition: Option<u32>,
    /// Let it be written.
    pub write: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            port: wire::PORT,
            key: String::new(),
            once: false,
            find: Vec::new(),
            partition: None,
            write: false,
        }
    }
}

impl Options {
    /// Reads them; an error is a line for a person.
    pub fn parse(words: &[String]) -> Result<Self, String> {
        let mut options = Self::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
            let number = |text: &String| text.parse().map_err(|_| format!("{word} {text}: write a number"));
            match word.as_str() {
                "--port" => options.port = value()?.parse().map_err(|_| format!("{word}: write a port"))?,
                "--key" => options.key.clone_from(value()?),
                "--find" => options.find.push(value()?.clone()),
                "--partition" => options.partition = Some(number(value()?)?),
                "--once" => options.once = true,
                "--write" => options.write = true,
                _ => {
                    return Err(format!(
                        "{word:?} is no option: there are --port, --key, --once, --find, --partition and --write"
                    ));
                }
            }
        }
        Ok(options)
    }

    /// The words that say the same.
    pub fn to_words(&self) -> Vec<String> {
        let mut words = vec!["--port".into(), self.port.to_string()];
        if !self.key.is_empty() {
            words.extend(["--key".into(), self.key.clone()]);
        }
        words.extend(self.find.iter().flat_map(|disk| ["--find".into(), disk.clone()]));
        words
            .extend(self.partition.into_iter().flat_map(|number| ["--partition".into(), number.to_string()]));
        let flags = [(self.once, "--once"), (self.write, "--write")];
        words.extend(flags.iter().filter(|(set, _)| *set).map(|(_, word)| word.to_string()));
        words
    }
}

/// Serves until the instance stops, or with `--once` until its client has left. Context: the application's thread. Blocks.
pub fn main<H: Host>(kernel: &Arc<Kernel<H>>) -> ExitStatus {
    let options = match Options::parse(kernel.config().app.get(1..).unwrap_or_default()) {
        Ok(options) => options,
        Err(line) => {
            log::error!("files: {line}");
            return ExitStatus::Usage;
        }
    };
    match serve(kernel, &options) {
        Ok(()) => ExitStatus::Success,
        Err(line) => {
            log::error!("files: {line}");
            ExitStatus::Failure
        }
    }
}

fn serve<H: Host>(kernel: &Arc<Kernel<H>>, options: &Options) -> Result<(), String> {
    let host = kernel.host();
    let sockets =
        kernel.sockets().ok_or("there is no network stack: give the instance a network (--net user)")?;
    let names =
        kernel.namespace().ok_or("there is no file system: give the instance a disk (--disk FILE)")?;
    if !options.find.is_empty() {
        let until = host.monotonic_ns().saturating_add(PATIENCE_NS);
        let (source, kind) = find(kernel, &options.find, options.partition, until)?;
        names
            .unmount(b"/")
            .and_then(|()| names.mount(&source, b"/", Some(&kind), !options.write))
            .map_err(|error| format!("{source}: {error}"))?;
    }
    let any = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), options.port);
    let listener = sockets.listen(any, 16).map_err(|error| format!("port {}: {error}", options.port))?;
    let executor = Executor::new(host);
    kernel.stop_executor_on_stop(executor.clone());
    let (done, over) = (executor.clone(), options.clone());
    executor.spawn(async move {
        clients(&TcpListener(listener), &names, &over).await;
        done.stop();
    });
    executor.run();
    Ok(())
}

async fn clients(listener: &TcpListener, names: &Arc<dyn Namespace>, options: &Options) {
    loop {
        match listener.accept().await {
            Ok(stream) => {
                let mut session = Session::new(names.clone(), &options.key);
                if let Err(error) = talk(&stream, &mut session).await {
                    log::debug!("files: {error}");
                }
                // Whoever only knocked was no client.
                if options.once && session.attached() {
                    return;
                }
            }
            Err(NetError::Closed) => return,
            // It was gone before it was ours.
            Err(error) => log::debug!("files: {error}"),
        }
    }
}

/// Fills `buffer`; `false`: the peer has nothing more to say.
async fn fill(stream: &TcpStream, buffer: &mut [u8]) -> Result<bool, NetError> {
    let mut rest = buffer;
    while !rest.is_empty() {
        let count = stream.recv(rest).await?;
        if count == 0 {
            return Ok(false);
        }
        rest = rest.get_mut(count..).unwrap_or_default();
    }
    Ok(true)
}

async fn talk(stream: &TcpStream, session: &mut Session) -> Result<(), NetError> {
    stream.0.set_nodelay(true)?;
    let mut message = vec![0; wire::HEADER];
    loop {
        let mut start = [0; wire::HEADER];
        if !fill(stream, &mut start).await? {
            return Ok(());
        }
        let (len, ..) = wire::header(&start);
        let body = (len as usize).checked_sub(wire::HEADER).filter(|_| len <= session.msize());
        let Some(body) = body else { return Err(NetError::Invalid) };
        message.clear();
        message.try_reserve(start.len() + body).map_err(|_| NetError::NoMemory)?;
        message.extend_from_slice(&start);
        message.resize(start.len() + body, 0);
        if !fill(stream, message.get_mut(wire::HEADER..).unwrap_or_default()).await? {
            return Ok(());
        }
        let answer = session.answer(&message).map_err(|Broken| NetError::Invalid)?;
        stream.send_all(&answer).await?;
    }
}
