//! A static file server, written once against the anykernel API and run on every target.
//!
//! HTTP/1.1 (RFC 9110, RFC 9112): keep-alive, pipelining, GET and HEAD, ranges (single and multipart), conditional
//! requests, directory listings, limits on header size, idle time and slow clients.
//!
//! One task per connection, on one executor that a few threads run; [`args`] has the options.
#![no_std]
#![forbid(unsafe_code)]
#![warn(clippy::indexing_slicing, clippy::unwrap_used)]

extern crate alloc;

pub mod args;
mod connection;
mod date;
mod listing;
mod mime;
mod range;
mod request;
mod resource;
mod response;

use alloc::format;
use alloc::sync::Arc;
use anykernel::Kernel;
use anykernel::counter::Counter;
use anykernel::fs::Namespace;
use anykernel::socket::{NetError, TcpListener, TcpStream};
use anykernel::task::Executor;
use core::net::{IpAddr, Ipv6Addr, SocketAddr};
use hypercall::{ExitStatus, Host};

/// What every connection shares.
struct Server<H: Host> {
    host: H,
    options: args::Options,
    files: Arc<dyn Namespace>,
    executor: Arc<Executor<H>>,
    /// Bytes read from a file at a time; small where memory is.
    chunk_bytes: usize,
    connections: Counter,
    requests: Counter,
    refused: Counter,
    timeouts: Counter,
    broken: Counter,
}

/// Serves until the instance stops. Context: the application's thread. Blocks.
pub fn main<H: Host>(kernel: &Arc<Kernel<H>>) -> ExitStatus {
    let options = match args::Options::parse(kernel.config().app.get(1..).unwrap_or_default()) {
        Ok(options) => options,
        Err(line) => {
            log::error!("httpd: {line}");
            return ExitStatus::Usage;
        }
    };
    match serve(kernel, options) {
        Ok(()) => ExitStatus::Success,
        Err(line) => {
            log::error!("httpd: {line}");
            ExitStatus::Failure
        }
    }
}

fn serve<H: Host>(kernel: &Arc<Kernel<H>>, options: args::Options) -> Result<(), alloc::string::String> {
    let host = kernel.host();
    let sockets =
        kernel.sockets().ok_or("there is no network stack: give the instance a network (--net user)")?;
    let files =
        kernel.namespace().ok_or("there is no file system: give the instance a disk (--disk FILE)")?;
    files.resolve(options.root.as_bytes(), true).map_err(|error| {
        format!("{}: {error}; --root names a directory of the mounted disk", options.root)
    })?;

    let listener = listen(&*sockets, options.port).map_err(|error| {
        format!("port {}: {error}; choose another with --port or end what listens there", options.port)
    })?;

    let executor = Executor::new(host);
    kernel.stop_executor_on_stop(executor.clone());
    let workers = options.workers.unwrap_or(host.cpu_count().max(2));
    let server = Arc::new(Server {
        host,
        chunk_bytes: if host.memory_bytes() < 32 << 20 { 16 << 10 } else { 64 << 10 },
        options,
        files,
        executor: executor.clone(),
        connections: kernel.counter("httpd.connections"),
        requests: kernel.counter("httpd.requests"),
        refused: kernel.counter("httpd.refused_requests"),
        timeouts: kernel.counter("httpd.timeouts"),
        broken: kernel.counter("httpd.broken_transfers"),
    });
    log::info!(
        "httpd: serving {} on port {} with {workers} threads",
        server.options.root,
        server.options.port
    );
    executor.spawn(accept_loop(server, TcpListener(listener)));
    for worker in 0..workers {
        let executor = executor.clone();
        kernel
            .spawn(&format!("httpd{worker}"), None, move || executor.run())
            .map_err(|error| format!("{error}"))?;
    }

    kernel.wait_for_stop();
    Ok(())
}

/// Listens on every address, IPv6 and IPv4.
fn listen(
    sockets: &dyn anykernel::socket::SocketProvider,
    port: u16,
) -> Result<Arc<dyn anykernel::socket::Listener>, NetError> {
    sockets.listen(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port), 512)
}

async fn accept_loop<H: Host>(server: Arc<Server<H>>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok(stream) => {
                server.connections.increment();
                server.executor.spawn(connection::serve(server.clone(), stream));
            }
            Err(NetError::Closed) => return,
            Err(error) => {
                // One connection failed before it was ours, or memory is short: others go on.
                log::debug!("httpd: accept: {error}");
                let pause = server.host.monotonic_ns() + 10_000_000;
                server.executor.sleep_until(pause).await;
            }
        }
    }
}

/// The peer's address, for messages.
fn peer(stream: &TcpStream) -> SocketAddr {
    stream.0.peer_addr()
}
