//! Two stacks on a wire in memory, polled by the caller's thread: for benchmarks and tools.

use crate::config::{Ipv4Setting, Ipv6Setting, Limits, Settings};
use crate::counters::NetCounters;
use crate::shard::{FlowId, NicSetup, Shard, ShardSetup};
use crate::tcp::listen::Accept;
use alloc::{boxed::Box, sync::Arc, vec::Vec};
use anykernel::nic::{NicCaps, NicInfo, NicQueue, RxMeta, TxFull, TxMeta};
use core::net::SocketAddr;
use core::task::{Context, Poll, Waker};
use crossbeam_queue::ArrayQueue;

/// Frames that one direction of the wire holds.
const WIRE_FRAMES: usize = 512;

/// One direction, with its used-up buffers.
struct Wire {
    frames: ArrayQueue<Vec<u8>>,
    free: ArrayQueue<Vec<u8>>,
}

struct MemQueue {
    rx: Arc<Wire>,
    tx: Arc<Wire>,
}

impl NicQueue for MemQueue {
    fn receive(&mut self, budget: usize, sink: &mut dyn FnMut(&[u8], RxMeta)) -> usize {
        for got in 0..budget {
            let Some(frame) = self.rx.frames.pop() else { return got };
            sink(&frame, RxMeta::default());
            let _ = self.rx.free.push(frame);
        }
        budget
    }
    fn transmit(&mut self, len: usize, _: TxMeta, fill: &mut dyn FnMut(&mut [u8])) -> Result<(), TxFull> {
        if self.tx.frames.is_full() {
            return Err(TxFull);
        }
        let mut frame = self.tx.free.pop().unwrap_or_default();
        frame.resize(len, 0);
        fill(&mut frame);
        self.tx.frames.push(frame).map_err(|_| TxFull)
    }
    fn flush(&mut self) {}
    fn arm(&mut self) -> bool {
        !self.rx.frames.is_empty()
    }
}

/// An established connection: the client's end and the server's.
#[derive(Debug, Clone, Copy)]
pub struct Connection {
    client: FlowId,
    server: FlowId,
}

/// A client and a server, at 10.0.0.1 and 10.0.0.2 port 80.
pub struct Pair {
    client: Shard,
    server: Shard,
    accept: Arc<Accept>,
    /// Time of both, in nanoseconds; moves when the caller moves it.
    pub now_ns: u64,
    next: u32,
}

impl Pair {
    /// Two stacks that have nothing to say yet. `mtu` is the link's.
    pub fn new(limits: Limits, mtu: u16) -> Self {
        let wire =
            || Arc::new(Wire { frames: ArrayQueue::new(WIRE_FRAMES), free: ArrayQueue::new(WIRE_FRAMES) });
        let (there, back) = (wire(), wire());
        let now_ns = 1_000_000_000;
        let shard = |last: u8, rx: &Arc<Wire>, tx: &Arc<Wire>| {
            let info = NicInfo {
                name: "nic0".into(),
                mac: [2, 0, 0, 0, 0, last],
                mtu,
                caps: NicCaps::empty(),
                queues: 1,
            };
            let queue: Box<dyn NicQueue> = Box::new(MemQueue { rx: rx.clone(), tx: tx.clone() });
            Shard::new(ShardSetup {
                id: 0,
                count: 1,
                secret: [1, 2, 3, u64::from(last)],
                limits,
                counters: NetCounters::default(),
                nics: alloc::vec![NicSetup { info, queue: Some(queue), owner: 0 }],
                settings: alloc::vec![Settings {
                    ipv4: Ipv4Setting::Static([10, 0, 0, last].into(), 8),
                    ipv6: Ipv6Setting::None,
                    ..Settings::default()
                }],
                now_ns,
            })
        };
        let client = shard(1, &back, &there);
        let mut server = shard(2, &there, &back);
        let accept = Accept::new(SocketAddr::from(([0, 0, 0, 0], 80)), 4096);
        server.listen(&accept);
        Self { client, server, accept, now_ns, next: 0 }
    }

    /// Buffer sizes of connections from now on.
    pub fn set_buffers(&mut self, receive_bytes: usize, send_bytes: usize) {
        for shard in [&mut self.client, &mut self.server] {
            shard.limits.receive_bytes = receive_bytes;
            shard.limits.send_bytes = send_bytes;
            shard.scratch = None;
        }
    }

    /// Polls both until neither has anything to do at this moment.
    pub fn pump(&mut self) {
        loop {
            let mut again = self.client.poll(self.now_ns).again;
            again |= self.server.poll(self.now_ns).again;
            again |= self.client.arm() | self.server.arm();
            drop_effects(&mut self.client);
            drop_effects(&mut self.server);
            if !again {
                return;
            }
        }
    }

    /// Opens a connection. `None` if it did not come to be at once.
    pub fn connect(&mut self) -> Option<Connection> {
        let port = 10_000 + (self.next % 50_000) as u16;
        let remote = SocketAddr::from(([10, 0, 0, 2], 80));
        self.next += 1;
        let local = SocketAddr::from(([10, 0, 0, 1], port));
        let client = self.client.tcp_connect(local, remote).ok()?;
        self.pump();
        let server = self.accept.pop()?.flow;
        Some(Connection { client, server })
    }

    /// How many connections the server holds.
    pub fn connections(&self) -> usize {
        self.server.flows.len()
    }

    /// Sends `bytes` from client to server, `data.len()` at a time, and reads them. `false`: it stopped in between.
    pub fn bulk(&mut self, on: Connection, bytes: usize, data: &mut [u8]) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        let (mut sent, mut received, mut idle) = (0, 0, 0);
        while received < bytes {
            let before = (sent, received);
            while sent < bytes {
                let chunk = data.get(..data.len().min(bytes - sent)).unwrap_or_default();
                match self.client.tcp_poll_send(on.client, &mut cx, chunk) {
                    Poll::Ready(Ok(n)) => sent += n,
                    Poll::Ready(Err(_)) => return false,
                    Poll::Pending => break,
                }
            }
            self.client.poll(self.now_ns);
            self.server.poll(self.now_ns);
            while let Poll::Ready(result) = self.server.tcp_poll_recv(on.server, &mut cx, data) {
                match result {
                    Ok(n @ 1..) => received += n,
                    _ => return false,
                }
            }
            self.server.finish();
            drop_effects(&mut self.client);
            drop_effects(&mut self.server);
            // A pause in the middle is a delayed acknowledgement: let its time come.
            idle = if before == (sent, received) { idle + 1 } else { 0 };
            if idle > 4 {
                self.now_ns += 1_000_000;
            }
            if idle > 10_000 {
                return false;
            }
        }
        true
    }

    /// `count` times: `len` bytes there, `len` bytes back. `false`: one was lost.
    pub fn request_response(&mut self, on: Connection, count: usize, len: usize) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        let mut buf = alloc::vec![0u8; len];
        // Whatever was sent before is acknowledged now, so that Nagle's algorithm holds nothing back.
        self.now_ns += 100_000_000;
        self.pump();
        for _ in 0..count {
            let Poll::Ready(Ok(n)) = self.client.tcp_poll_send(on.client, &mut cx, &buf) else {
                return false;
            };
            self.client.finish();
            self.server.poll(self.now_ns);
            let got = self.server.tcp_poll_recv(on.server, &mut cx, &mut buf);
            let sent = self.server.tcp_poll_send(on.server, &mut cx, &buf);
            self.server.finish();
            self.client.poll(self.now_ns);
            let back = self.client.tcp_poll_recv(on.client, &mut cx, &mut buf);
            let all = |poll: &Poll<anykernel::socket::Result<usize>>| matches!(poll, Poll::Ready(Ok(n)) if *n == len);
            if n != len || !all(&got) || !all(&sent) || !all(&back) {
                return false;
            }
            // The acknowledgement of the answer travels with the next request.
            drop_effects(&mut self.client);
            drop_effects(&mut self.server);
        }
        true
    }
}

/// Nobody waits and there is one shard only.
fn drop_effects(shard: &mut Shard) {
    shard.swap_effects(&mut Vec::new(), &mut Vec::new());
}
