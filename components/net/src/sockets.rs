//! What an application holds: connections, listening ports, UDP sockets and echo requests.

use crate::shard::{FlowId, UdpId};
use crate::slab::Key;
use crate::stack::Stack;
use crate::tcp::listen::Accept;
use alloc::sync::Arc;
use anykernel::socket::{Datagram, Listener, Ping, Result, Shutdown, Stream};
use core::net::SocketAddr;
use core::task::{Context, Poll};
use hypercall::Host;

/// A connection's handle.
pub(crate) struct TcpStream<H: Host> {
    pub(crate) stack: Arc<Stack<H>>,
    pub(crate) flow: FlowId,
    pub(crate) local: SocketAddr,
    pub(crate) peer: SocketAddr,
}

impl<H: Host> Stream for TcpStream<H> {
    fn poll_connected(&self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.stack.enter(self.flow.shard)?.tcp_poll_connected(self.flow, cx)
    }
    fn poll_recv(&self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<Result<usize>> {
        self.stack.enter(self.flow.shard)?.tcp_poll_recv(self.flow, cx, buf)
    }
    fn poll_send(&self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize>> {
        self.stack.enter(self.flow.shard)?.tcp_poll_send(self.flow, cx, data)
    }
    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.stack.enter(self.flow.shard)?.tcp_poll_flush(self.flow, cx)
    }
    fn shutdown(&self, how: Shutdown) -> Result<()> {
        self.stack.enter(self.flow.shard)?.tcp_shutdown(self.flow, how)
    }
    fn abort(&self) {
        if let Ok(mut shard) = self.stack.enter(self.flow.shard) {
            shard.tcp_abort(self.flow);
        }
    }
    fn local_addr(&self) -> SocketAddr {
        self.local
    }
    fn peer_addr(&self) -> SocketAddr {
        self.peer
    }
    fn set_nodelay(&self, on: bool) -> Result<()> {
        self.stack.enter(self.flow.shard)?.tcp_set_nodelay(self.flow, on)
    }
    fn set_keepalive(&self, idle_ns: Option<u64>) -> Result<()> {
        self.stack.enter(self.flow.shard)?.tcp_set_keepalive(self.flow, idle_ns)
    }
}

impl<H: Host> Drop for TcpStream<H> {
    fn drop(&mut self) {
        if let Ok(mut shard) = self.stack.enter(self.flow.shard) {
            shard.tcp_drop(self.flow);
        }
    }
}

/// A listening port's handle.
pub(crate) struct TcpListener<H: Host> {
    pub(crate) stack: Arc<Stack<H>>,
    pub(crate) accept: Arc<Accept>,
}

impl<H: Host> Listener for TcpListener<H> {
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<Result<Arc<dyn Stream>>> {
        let accepted = self.accept.pop().or_else(|| {
            self.accept.waker().register(cx.waker());
            // One may have come between the look and the registration.
            self.accept.pop()
        });
        match accepted {
            Some(accepted) => Poll::Ready(Ok(Arc::new(TcpStream {
                stack: self.stack.clone(),
                flow: accepted.flow,
                local: accepted.local,
                peer: accepted.remote,
            }))),
            None => Poll::Pending,
        }
    }
    fn local_addr(&self) -> SocketAddr {
        self.accept.local()
    }
}

impl<H: Host> Drop for TcpListener<H> {
    fn drop(&mut self) {
        self.accept.close();
        for index in 0..self.stack.cells.len() {
            if let Ok(mut shard) = self.stack.enter(index) {
                shard.listeners.remove(&self.accept);
            }
        }
        while let Some(accepted) = self.accept.pop() {
            if let Ok(mut shard) = self.stack.enter(accepted.flow.shard) {
                shard.tcp_abort(accepted.flow);
                shard.tcp_drop(accepted.flow);
            }
        }
    }
}

/// A UDP socket's handle.
pub(crate) struct UdpSocket<H: Host> {
    pub(crate) stack: Arc<Stack<H>>,
    pub(crate) id: UdpId,
    pub(crate) local: SocketAddr,
}

impl<H: Host> Datagram for UdpSocket<H> {
    fn poll_recv_from(&self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<Result<(usize, SocketAddr)>> {
        self.stack.enter(self.id.shard)?.udp_poll_recv(self.id, cx, buf)
    }
    fn poll_send_to(&self, _: &mut Context<'_>, data: &[u8], to: SocketAddr) -> Poll<Result<()>> {
        Poll::Ready(self.stack.enter(self.id.shard)?.udp_send(self.id, data, to))
    }
    fn local_addr(&self) -> SocketAddr {
        self.local
    }
}

impl<H: Host> Drop for UdpSocket<H> {
    fn drop(&mut self) {
        if let Ok(mut shard) = self.stack.enter(self.id.shard) {
            let _second =
                (hypercall::planted!("lock-order") && self.id.shard != 0).then(|| self.stack.enter(0));
            shard.udp_close(self.id);
        }
    }
}

/// An echo request's handle.
pub(crate) struct Echo<H: Host> {
    pub(crate) stack: Arc<Stack<H>>,
    pub(crate) key: Key,
}

impl<H: Host> Ping for Echo<H> {
    fn poll_reply(&mut self, cx: &mut Context<'_>) -> Poll<Result<u64>> {
        self.stack.enter(0)?.ping_poll(self.key, cx)
    }
}

impl<H: Host> Drop for Echo<H> {
    fn drop(&mut self) {
        if let Ok(mut shard) = self.stack.enter(0) {
            shard.ping_drop(self.key);
        }
    }
}
