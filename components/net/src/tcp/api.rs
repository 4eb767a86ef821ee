//! What applications do with connections. All of it happens under the shard's lock.

use super::engine::Engine;
use super::flow::ORPHAN_NS;
use super::mend::Progress;
use super::table::Tuple;
use crate::shard::{FlowId, Shard, scope_of};
use anykernel::socket::{NetError, Result, Shutdown};
use core::net::SocketAddr;
use core::task::{Context, Poll};
use smoltcp::socket::tcp::State;
use smoltcp::time::Duration;

impl Shard {
    /// Begins to connect. The caller picked the shard by the hash of both ends.
    pub(crate) fn tcp_connect(&mut self, local: SocketAddr, remote: SocketAddr) -> Result<FlowId> {
        self.scope = scope_of(remote);
        let result = self.tcp_connect_scoped(local, remote);
        self.scope = 0;
        result
    }

    fn tcp_connect_scoped(&mut self, local: SocketAddr, remote: SocketAddr) -> Result<FlowId> {
        let tuple = Tuple {
            local: local.ip(),
            remote: remote.ip(),
            local_port: local.port(),
            remote_port: remote.port(),
        };
        let hash = self.secret.tuple_hash((tuple.local, tuple.local_port), (tuple.remote, tuple.remote_port));
        if self.demux.get(hash, &tuple).is_some() {
            return Err(NetError::AddrInUse);
        }
        if self.flows.len() + self.half_open.len() >= self.limits.connections {
            return Err(NetError::NoMemory);
        }
        let path = self.path_to(tuple.remote).ok_or(NetError::Unreachable)?;
        let mut engine = Engine::new(&self.limits, path, self.now_ns).ok_or(NetError::NoMemory)?;
        let seed = self.prf.next_u64();
        engine.restart(tuple.local, seed, path, self.now_ns);
        if !engine.connect(&tuple) {
            return Err(NetError::Invalid);
        }
        let key =
            self.flow_insert(tuple, hash, engine, Progress::default(), None).ok_or(NetError::NoMemory)?;
        self.service(key);
        Ok(FlowId { shard: self.id, key })
    }

    pub(crate) fn tcp_poll_connected(&mut self, id: FlowId, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let Some(flow) = self.flows.get_mut(id.key) else { return Poll::Ready(Err(NetError::Closed)) };
        if flow.established {
            return Poll::Ready(Ok(()));
        }
        if flow.engine.is_none() || flow.state() == State::Closed {
            return Poll::Ready(Err(flow.end_error()));
        }
        flow.send_waker = Some(cx.waker().clone());
        Poll::Pending
    }

    pub(crate) fn tcp_poll_recv(
        &mut self,
        id: FlowId,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<Result<usize>> {
        let Some(flow) = self.flows.get_mut(id.key) else { return Poll::Ready(Err(NetError::Closed)) };
        if flow.read_shut {
            return Poll::Ready(Ok(0));
        }
        let Some(engine) = flow.engine.as_mut() else {
            return Poll::Ready(flow.error.map_or(Ok(0), Err));
        };
        let socket = engine.socket_mut();
        if socket.can_recv() {
            let queued = socket.recv_queue();
            let n = socket.recv_slice(buf).unwrap_or(0);
            flow.progress.taken = flow.progress.taken.wrapping_add(n as u32);
            // The peer is told of room when it may matter to it: after much was read, or when the buffer was filling
            // up. Otherwise the next acknowledgement does it, and a small request costs no look at the engine. An
            // end may also have waited for the last byte to be read.
            flow.unannounced += n;
            let capacity = socket.recv_capacity();
            let open = socket.state() == State::Established;
            if !open || queued > capacity / 2 || flow.unannounced >= capacity / 4 {
                flow.unannounced = 0;
                self.service(id.key);
            }
            return Poll::Ready(Ok(n));
        }
        if !matches!(socket.state(), State::SynSent | State::SynReceived) && !socket.may_recv() {
            return Poll::Ready(flow.error.map_or(Ok(0), Err));
        }
        flow.recv_waker = Some(cx.waker().clone());
        Poll::Pending
    }

    pub(crate) fn tcp_poll_send(
        &mut self,
        id: FlowId,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<Result<usize>> {
        let Some(flow) = self.flows.get_mut(id.key) else { return Poll::Ready(Err(NetError::Closed)) };
        let Some(engine) = flow.engine.as_mut() else { return Poll::Ready(Err(flow.end_error())) };
        let socket = engine.socket_mut();
        match socket.state() {
            State::SynSent | State::SynReceived => {}
            _ if !socket.may_send() => return Poll::Ready(Err(flow.end_error())),
            _ if data.is_empty() => return Poll::Ready(Ok(0)),
            _ => match socket.send_slice(data) {
                Ok(0) => {}
                Ok(n) => {
                    flow.progress.given = flow.progress.given.wrapping_add(n as u32);
                    self.service(id.key);
                    return Poll::Ready(Ok(n));
                }
                Err(_) => return Poll::Ready(Err(flow.end_error())),
            },
        }
        flow.send_waker = Some(cx.waker().clone());
        Poll::Pending
    }

    pub(crate) fn tcp_poll_flush(&mut self, id: FlowId, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let Some(flow) = self.flows.get_mut(id.key) else { return Poll::Ready(Err(NetError::Closed)) };
        let Some(engine) = flow.engine.as_ref() else { return Poll::Ready(flow.error.map_or(Ok(()), Err)) };
        let socket = engine.socket();
        if socket.send_queue() == 0 {
            return Poll::Ready(flow.error.map_or(Ok(()), Err));
        }
        if socket.state() == State::Closed {
            return Poll::Ready(Err(flow.end_error()));
        }
        flow.send_waker = Some(cx.waker().clone());
        Poll::Pending
    }

    pub(crate) fn tcp_shutdown(&mut self, id: FlowId, how: Shutdown) -> Result<()> {
        let flow = self.flows.get_mut(id.key).ok_or(NetError::Closed)?;
        let engine = flow.engine.as_mut().ok_or(NetError::NotConnected)?;
        if how != Shutdown::Write {
            flow.read_shut = true;
            self.wakers.extend(flow.recv_waker.take());
        }
        if how != Shutdown::Read {
            engine.socket_mut().close();
            self.wakers.extend(flow.send_waker.take());
        }
        self.service(id.key);
        Ok(())
    }

    pub(crate) fn tcp_abort(&mut self, id: FlowId) {
        if let Some(flow) = self.flows.get_mut(id.key) {
            flow.error = flow.error.or(Some(NetError::Closed));
        }
        self.flow_abort(id.key);
        self.service(id.key);
    }

    /// The last handle is gone: FIN after queued data, or a reset if data was left unread (RFC 9293, 3.6.1).
    pub(crate) fn tcp_drop(&mut self, id: FlowId) {
        let deadline = self.now_ns + ORPHAN_NS;
        let Some(flow) = self.flows.get_mut(id.key) else { return };
        flow.orphan = true;
        flow.orphan_deadline_ns = deadline;
        // Not dropped here: the last reference to a task may own connections of this very shard.
        self.wakers.extend(flow.recv_waker.take());
        self.wakers.extend(flow.send_waker.take());
        if let Some(engine) = &mut flow.engine {
            let unread = engine.socket().recv_queue() > 0 && !flow.read_shut;
            if unread {
                flow.aborted = true;
                engine.socket_mut().abort();
            } else {
                engine.socket_mut().close();
            }
        }
        self.service(id.key);
    }

    pub(crate) fn tcp_set_nodelay(&mut self, id: FlowId, on: bool) -> Result<()> {
        let flow = self.flows.get_mut(id.key).ok_or(NetError::Closed)?;
        if let Some(engine) = &mut flow.engine {
            engine.socket_mut().set_nagle_enabled(!on);
        }
        self.service(id.key);
        Ok(())
    }

    pub(crate) fn tcp_set_keepalive(&mut self, id: FlowId, idle_ns: Option<u64>) -> Result<()> {
        let flow = self.flows.get_mut(id.key).ok_or(NetError::Closed)?;
        if idle_ns == Some(0) {
            return Err(NetError::Invalid);
        }
        flow.keepalive_ns = idle_ns;
        flow.heard_ns = self.now_ns;
        if let Some(engine) = &mut flow.engine {
            engine
                .socket_mut()
                .set_keep_alive(idle_ns.map(|idle| Duration::from_micros((idle / 1000).max(1))));
        }
        self.service(id.key);
        Ok(())
    }
}
