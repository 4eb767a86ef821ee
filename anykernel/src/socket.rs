//! What a socket provider is, in poll form, and the async and blocking handles that applications use.
//!
//! The `poll_` functions follow `core::future`: `Pending` means that the waker is called when it is worth asking
//! again. One waker per direction is kept, the last one given.

use crate::nic::Nic;
use alloc::{boxed::Box, string::String, sync::Arc, vec::Vec};
use core::fmt;
use core::net::{IpAddr, SocketAddr};
use core::task::{Context, Poll};

/// Why a socket operation failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NetError {
    /// The address or port is taken.
    AddrInUse,
    /// Not one of our addresses.
    AddrNotAvailable,
    /// No route to there.
    Unreachable,
    /// The peer refused.
    Refused,
    /// The peer reset the connection.
    Reset,
    /// The peer does not answer.
    TimedOut,
    /// We closed this direction.
    Closed,
    /// Not connected (yet).
    NotConnected,
    /// A datagram is larger than can be sent.
    TooLarge,
    /// No memory, or a configured limit is reached.
    NoMemory,
    /// The name does not exist.
    NameNotFound,
    /// An argument makes no sense.
    Invalid,
    /// The provider does not do this.
    Unsupported,
}

impl fmt::Display for NetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NetError::AddrInUse => "address already in use",
            NetError::AddrNotAvailable => "address not available",
            NetError::Unreachable => "network unreachable",
            NetError::Refused => "connection refused",
            NetError::Reset => "connection reset by peer",
            NetError::TimedOut => "connection timed out",
            NetError::Closed => "closed",
            NetError::NotConnected => "not connected",
            NetError::TooLarge => "message too large",
            NetError::NoMemory => "out of memory or over a limit",
            NetError::NameNotFound => "name not found",
            NetError::Invalid => "invalid argument",
            NetError::Unsupported => "not supported",
        })
    }
}

impl core::error::Error for NetError {}

/// Result of a socket operation.
pub type Result<T, E = NetError> = core::result::Result<T, E>;

/// Which direction to close.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shutdown {
    /// Nothing more will be read.
    Read,
    /// Nothing more will be sent: FIN after what is queued.
    Write,
    /// Both.
    Both,
}

/// A TCP connection. Dropping the last handle closes it in order (FIN after queued data).
pub trait Stream: Send + Sync {
    /// Ready when the handshake is over.
    fn poll_connected(&self, cx: &mut Context<'_>) -> Poll<Result<()>>;
    /// Receives; 0 is the end of the stream.
    fn poll_recv(&self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<Result<usize>>;
    /// Queues at least one byte for sending.
    fn poll_send(&self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize>>;
    /// Ready when everything queued was acknowledged.
    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<Result<()>>;
    /// Closes a direction.
    fn shutdown(&self, how: Shutdown) -> Result<()>;
    /// Resets the connection and forgets it.
    fn abort(&self);
    /// Our end.
    fn local_addr(&self) -> SocketAddr;
    /// Their end.
    fn peer_addr(&self) -> SocketAddr;
    /// Sends at once instead of waiting for full segments. Off by default.
    fn set_nodelay(&self, on: bool) -> Result<()>;
    /// Probes after this many nanoseconds without traffic; `None` (the default) never.
    fn set_keepalive(&self, idle_ns: Option<u64>) -> Result<()>;
}

/// A listening TCP port. Dropping it closes the port and resets what nobody accepted.
pub trait Listener: Send + Sync {
    /// Takes an established connection.
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<Result<Arc<dyn Stream>>>;
    /// Where it listens.
    fn local_addr(&self) -> SocketAddr;
}

/// A UDP socket.
pub trait Datagram: Send + Sync {
    /// Receives one datagram; what does not fit `buf` is cut off. An ICMP error about the last datagram sent comes once,
    /// as an error (RFC 1122, 4.1.3.3); the socket works on after it. [`NetError::Closed`] is the only final one.
    fn poll_recv_from(&self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<Result<(usize, SocketAddr)>>;
    /// Sends one datagram.
    fn poll_send_to(&self, cx: &mut Context<'_>, data: &[u8], to: SocketAddr) -> Poll<Result<()>>;
    /// Where it is bound.
    fn local_addr(&self) -> SocketAddr;
}

/// A name look-up in progress.
pub trait Lookup: Send {
    /// All addresses, at least one.
    fn poll_addresses(&mut self, cx: &mut Context<'_>) -> Poll<Result<Vec<IpAddr>>>;
}

/// An echo request in progress.
pub trait Ping: Send {
    /// Round-trip time in nanoseconds.
    fn poll_reply(&mut self, cx: &mut Context<'_>) -> Poll<Result<u64>>;
}

/// The state of one interface, for `ifconfig`-like output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceStatus {
    /// `nic0`.
    pub name: String,
    /// Its address.
    pub mac: [u8; 6],
    /// Addresses with prefix lengths, as far as configured.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Default routers.
    pub gateways: Vec<IpAddr>,
    /// Name servers.
    pub dns: Vec<IpAddr>,
}

/// A network stack, as applications see it.
pub trait SocketProvider: Send + Sync {
    /// Listens. Port 0 picks one. `backlog`: most connections that wait to be accepted, half-open ones included.
    fn listen(&self, addr: SocketAddr, backlog: usize) -> Result<Arc<dyn Listener>>;
    /// Begins to connect.
    fn connect(&self, to: SocketAddr) -> Result<Arc<dyn Stream>>;
    /// A UDP socket.
    fn bind(&self, addr: SocketAddr) -> Result<Arc<dyn Datagram>>;
    /// Looks a name up (A and AAAA; literal addresses at once).
    fn lookup(&self, name: &str) -> Result<Box<dyn Lookup>>;
    /// Sends an ICMP echo request.
    fn ping(&self, to: IpAddr) -> Result<Box<dyn Ping>>;
    /// Interfaces and their addresses.
    fn interfaces(&self) -> Vec<InterfaceStatus>;
    /// Ready when every interface has the addresses it was configured to get (DHCP done).
    fn poll_configured(&self, cx: &mut Context<'_>) -> Poll<Result<()>>;
    /// Takes in an interface that came after the provider started; one that it has already is left alone. It gets the
    /// settings of its place: that of an interface that went, or the next. [`Kernel::add_nic`](crate::Kernel::add_nic) calls it.
    /// Context: thread.
    fn attach(&self, nic: Arc<dyn Nic>) -> Result<()> {
        let _ = nic;
        Err(NetError::Unsupported)
    }
    /// The interface `name` is gone: its addresses go, and connections that used them fail with
    /// [`NetError::AddrNotAvailable`]. Context: thread.
    fn detach(&self, name: &str) {
        let _ = name;
    }
}

/// Async helpers over a [`Stream`].
pub struct TcpStream(pub Arc<dyn Stream>);

impl TcpStream {
    /// Connects.
    pub async fn connect(provider: &dyn SocketProvider, to: SocketAddr) -> Result<Self> {
        let stream = provider.connect(to)?;
        core::future::poll_fn(|cx| stream.poll_connected(cx)).await?;
        Ok(Self(stream))
    }

    /// Receives some bytes; 0 is the end.
    pub async fn recv(&self, buf: &mut [u8]) -> Result<usize> {
        core::future::poll_fn(|cx| self.0.poll_recv(cx, buf)).await
    }

    /// Sends some bytes.
    pub async fn send(&self, data: &[u8]) -> Result<usize> {
        core::future::poll_fn(|cx| self.0.poll_send(cx, data)).await
    }

    /// Sends all of `data`.
    pub async fn send_all(&self, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            let n = self.send(data).await?;
            data = data.get(n..).ok_or(NetError::Invalid)?;
        }
        Ok(())
    }

    /// Waits until everything sent was acknowledged.
    pub async fn flush(&self) -> Result<()> {
        core::future::poll_fn(|cx| self.0.poll_flush(cx)).await
    }
}

/// Async helper over a [`Listener`].
pub struct TcpListener(pub Arc<dyn Listener>);

impl TcpListener {
    /// Takes the next connection.
    pub async fn accept(&self) -> Result<TcpStream> {
        core::future::poll_fn(|cx| self.0.poll_accept(cx)).await.map(TcpStream)
    }
}

/// Async helpers over a [`Datagram`].
pub struct UdpSocket(pub Arc<dyn Datagram>);

impl UdpSocket {
    /// Receives one datagram.
    pub async fn recv_from(&self, buf: &mut [u8]) -> Result<(usize, SocketAddr)> {
        core::future::poll_fn(|cx| self.0.poll_recv_from(cx, buf)).await
    }

    /// Sends one datagram.
    pub async fn send_to(&self, data: &[u8], to: SocketAddr) -> Result<()> {
        core::future::poll_fn(|cx| self.0.poll_send_to(cx, data, to)).await
    }
}
