//! The server side of the network benchmarks, as an anykernel application.
//!
//! `netpeer` in the bench crate is the same server for Linux, `netload` there is the client. The services:
//!
//! | port | service |
//! | --- | --- |
//! | TCP 5001 | sink: receives until the client closes, then sends one byte |
//! | TCP 5002 | source: sends until the client closes |
//! | TCP 5003 | request/response: 4-byte request length, 4-byte response length (big-endian), request; then the response, again and again |
//! | UDP 5004 | echo |
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::format;
use alloc::sync::Arc;
use alloc::vec;
use anykernel::Kernel;
use anykernel::socket::{NetError, Result, SocketProvider, TcpListener, TcpStream, UdpSocket};
use anykernel::task::Executor;
use core::future::Future;
use core::net::{Ipv4Addr, SocketAddr};
use hypercall::{ExitStatus, Host};

/// TCP: receives and counts.
pub const SINK: u16 = 5001;
/// TCP: sends.
pub const SOURCE: u16 = 5002;
/// TCP: answers.
pub const RESPOND: u16 = 5003;
/// UDP: echoes.
pub const ECHO: u16 = 5004;

/// Largest request or response of [`RESPOND`], in bytes.
const MAX_MESSAGE: usize = 1 << 20;
/// Bytes per call in the stream services.
const CHUNK: usize = 64 << 10;

/// Serves until the instance stops. Context: the application's thread. Blocks.
pub fn main<H: Host>(kernel: &Arc<Kernel<H>>) -> ExitStatus {
    let Some(sockets) = kernel.sockets() else {
        log::error!("netbench: there is no network stack: give the instance a network (--net tap:NAME)");
        return ExitStatus::Failure;
    };
    let started =
        kernel.start_executor("netbench").map_err(|error| format!("{error}")).and_then(|executor| {
            start(&*sockets, &executor)
                .map_err(|error| format!("{error}; its ports 5001 to 5004 must be free"))
        });
    if let Err(line) = started {
        log::error!("netbench: {line}");
        return ExitStatus::Failure;
    }
    log::info!("netbench: ready");
    kernel.wait_for_stop();
    ExitStatus::Success
}

fn start<H: Host>(sockets: &dyn SocketProvider, executor: &Arc<Executor<H>>) -> Result<()> {
    service(sockets, executor, SINK, sink)?;
    service(sockets, executor, SOURCE, source)?;
    service(sockets, executor, RESPOND, respond)?;
    let socket = UdpSocket(sockets.bind(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), ECHO))?);
    executor.spawn(async move {
        let mut buffer = [0; 2048];
        loop {
            match socket.recv_from(&mut buffer).await {
                // A lost answer is the client's to notice.
                Ok((length, from)) => {
                    let _ = socket.send_to(buffer.get(..length).unwrap_or_default(), from).await;
                }
                Err(NetError::Closed) => return,
                // A client that went away before its last answer came: others go on.
                Err(_) => {}
            }
        }
    });
    Ok(())
}

fn service<H: Host, F: Future<Output = Result<()>> + Send + 'static>(
    sockets: &dyn SocketProvider,
    executor: &Arc<Executor<H>>,
    port: u16,
    serve: fn(TcpStream) -> F,
) -> Result<()> {
    let listener = TcpListener(sockets.listen(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port), 64)?);
    let spawner = executor.clone();
    executor.spawn(async move {
        while let Ok(stream) = listener.accept().await {
            spawner.spawn(async move {
                if let Err(error) = serve(stream).await {
                    log::debug!("netbench: port {port}: {error}");
                }
            });
        }
    });
    Ok(())
}

async fn sink(stream: TcpStream) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    while stream.recv(&mut buffer).await? > 0 {}
    stream.send_all(&[1]).await
}

async fn source(stream: TcpStream) -> Result<()> {
    let buffer = vec![0x5a; CHUNK];
    loop {
        stream.send_all(&buffer).await?;
    }
}

async fn respond(stream: TcpStream) -> Result<()> {
    stream.0.set_nodelay(true)?;
    let mut buffer = vec![0; CHUNK];
    let (mut start, mut end) = (0, 0);
    loop {
        while end - start < 8 {
            buffer.copy_within(start..end, 0);
            (start, end) = (0, end - start);
            match stream.recv(buffer.get_mut(end..).unwrap_or_default()).await? {
                0 => return Ok(()),
                n => end += n,
            }
        }
        let number = |at: usize| {
            let bytes: [u8; 4] =
                buffer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).unwrap_or_default();
            u32::from_be_bytes(bytes) as usize
        };
        let (mut request, response) = (number(start), number(start + 4));
        if request > MAX_MESSAGE || response > MAX_MESSAGE {
            return Err(NetError::Invalid);
        }
        start += 8;
        let have = request.min(end - start);
        (start, request) = (start + have, request - have);
        while request > 0 {
            let room = buffer.len().min(request);
            match stream.recv(buffer.get_mut(..room).unwrap_or_default()).await? {
                0 => return Ok(()),
                n => request -= n,
            }
            (start, end) = (0, 0);
        }
        let mut left = response;
        let filler = [0x5a; 4096];
        while left > 0 {
            let part = filler.get(..left.min(filler.len())).unwrap_or_default();
            stream.send_all(part).await?;
            left -= part.len();
        }
    }
}
