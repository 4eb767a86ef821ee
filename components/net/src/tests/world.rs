//! Stacks on one simulated Ethernet segment. Time is virtual and jumps to the next thing that happens; loss, duplication
//! and reordering come from a seed, so that every run is the same.

use crate::config::{Ipv4Setting, Ipv6Setting, Limits, Settings};
use crate::counters::NetCounters;
use crate::shard::{FlowId, NicSetup, Shard, ShardSetup};
use crate::tcp::listen::Accept;
use alloc::sync::Arc;
use anykernel::nic::{NicCaps, NicInfo, NicQueue, RxMeta, TxFull, TxMeta};
use anykernel::socket::{NetError, Result};
use core::net::SocketAddr;
use core::task::{Context, Poll, Waker};
use std::boxed::Box;
use std::collections::{BTreeMap, VecDeque};
use std::format;
use std::sync::Mutex;
use std::vec::Vec;

pub(crate) const MS: u64 = 1_000_000;
pub(crate) const SECOND: u64 = 1_000_000_000;

#[derive(Default)]
struct Wire {
    rx: VecDeque<Vec<u8>>,
    tx: VecDeque<(Vec<u8>, TxMeta)>,
}

struct MemQueue {
    wire: Arc<Mutex<Wire>>,
    room: usize,
}

impl NicQueue for MemQueue {
    fn receive(&mut self, budget: usize, sink: &mut dyn FnMut(&[u8], RxMeta)) -> usize {
        for got in 0..budget {
            let Some(frame) = self.wire.lock().unwrap().rx.pop_front() else { return got };
            sink(&frame, RxMeta::default());
        }
        budget
    }
    fn transmit(
        &mut self,
        len: usize,
        meta: TxMeta,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> core::result::Result<(), TxFull> {
        if self.wire.lock().unwrap().tx.len() >= self.room {
            return Err(TxFull);
        }
        let mut frame = std::vec![0xaa; len];
        fill(&mut frame);
        self.wire.lock().unwrap().tx.push_back((frame, meta));
        Ok(())
    }
    fn flush(&mut self) {}
    fn arm(&mut self) -> bool {
        !self.wire.lock().unwrap().rx.is_empty()
    }
}

/// One stack.
pub(crate) struct Node {
    pub(crate) shards: Vec<Shard>,
    pub(crate) counters: NetCounters,
    pub(crate) mac: [u8; 6],
    wire: Arc<Mutex<Wire>>,
}

/// How a stack is made.
#[derive(Clone)]
pub(crate) struct Spec {
    pub(crate) settings: Settings,
    pub(crate) shards: usize,
    pub(crate) limits: Limits,
    pub(crate) caps: NicCaps,
    pub(crate) mtu: u16,
    pub(crate) room: usize,
}

impl Spec {
    pub(crate) fn v4(last: u8) -> Self {
        let settings = Settings {
            ipv4: Ipv4Setting::Static([10, 0, 0, last].into(), 24),
            ipv6: Ipv6Setting::None,
            ..Settings::default()
        };
        Self::new(settings)
    }

    pub(crate) fn v6(last: u8) -> Self {
        Self::new(Settings {
            ipv4: Ipv4Setting::None,
            ipv6: Ipv6Setting::Static([0xfd00, 0, 0, 0, 0, 0, 0, last.into()].into(), 64),
            ..Settings::default()
        })
    }

    pub(crate) fn new(settings: Settings) -> Self {
        let limits = Limits {
            receive_bytes: 64 << 10,
            send_bytes: 64 << 10,
            connections: 1000,
            udp_bytes: 64 << 10,
            reassembly_bytes: 256 << 10,
        };
        Self { settings, shards: 1, limits, caps: NicCaps::empty(), mtu: 1500, room: 100_000 }
    }
}

/// What a link does to frames; all but the delay in a million frames.
#[derive(Clone, Copy, Default)]
pub(crate) struct Link {
    pub(crate) delay_ns: u64,
    pub(crate) lost: u64,
    pub(crate) duplicated: u64,
    pub(crate) late: u64,
    /// A byte of the headers is changed and the checksums are made right again.
    pub(crate) forged: u64,
    /// A TCP segment says that the window is closed.
    pub(crate) shut: u64,
}

/// All stacks and the link between them.
pub(crate) struct World {
    pub(crate) now_ns: u64,
    pub(crate) nodes: Vec<Node>,
    pub(crate) link: Link,
    pub(crate) frames: u64,
    /// Every frame that was sent, when asked for.
    pub(crate) trace: Option<Vec<Vec<u8>>>,
    flying: BTreeMap<(u64, u64), (usize, Vec<u8>)>,
    seed: u64,
}

impl World {
    pub(crate) fn new(specs: &[Spec]) -> Self {
        let mut world = Self {
            now_ns: SECOND,
            nodes: Vec::new(),
            link: Link { delay_ns: 100_000, ..Link::default() },
            frames: 0,
            trace: None,
            flying: BTreeMap::new(),
            seed: 0x1234_5678_9abc_def1,
        };
        for (index, spec) in specs.iter().enumerate() {
            let mac = [2, 0, 0, 0, 0, index as u8 + 1];
            let wire = Arc::new(Mutex::new(Wire::default()));
            let counters = NetCounters::default();
            let shards = (0..spec.shards)
                .map(|id| {
                    let info =
                        NicInfo { name: "nic0".into(), mac, mtu: spec.mtu, caps: spec.caps, queues: 1 };
                    let queue = (id == 0).then(|| {
                        Box::new(MemQueue { wire: wire.clone(), room: spec.room }) as Box<dyn NicQueue>
                    });
                    Shard::new(ShardSetup {
                        id,
                        count: spec.shards,
                        secret: [index as u64 + 1, 2, 3, 4],
                        limits: spec.limits,
                        counters: counters.clone(),
                        nics: std::vec![NicSetup { info, queue, owner: 0 }],
                        settings: std::vec![spec.settings.clone()],
                        now_ns: SECOND,
                    })
                })
                .collect();
            world.nodes.push(Node { shards, counters, mac, wire });
        }
        world
    }

    /// Pulls the first interface of a stack out.
    pub(crate) fn unplug(&mut self, node: usize) {
        self.nodes[node].shards.iter_mut().rev().for_each(|shard| shard.unplug(0));
        self.settle();
    }

    /// Plugs an interface in as number `iface`, on the same link.
    pub(crate) fn plug(&mut self, node: usize, iface: usize, spec: &Spec) {
        let Node { shards, mac, wire, .. } = &mut self.nodes[node];
        for shard in shards.iter_mut().rev() {
            let name = format!("nic{iface}");
            let info = NicInfo { name, mac: *mac, mtu: spec.mtu, caps: spec.caps, queues: 1 };
            let queue = (shard.id == 0)
                .then(|| Box::new(MemQueue { wire: wire.clone(), room: spec.room }) as Box<dyn NicQueue>);
            shard.plug(iface, NicSetup { info, queue, owner: 0 }, &spec.settings);
        }
    }

    /// Starts another run of chance.
    pub(crate) fn reseed(&mut self, seed: u64) {
        self.seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).max(1);
    }

    pub(crate) fn random(&mut self) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed
    }

    /// Puts a frame on the link as if somebody else had sent it.
    pub(crate) fn inject(&mut self, node: usize, frame: &[u8]) {
        self.nodes[node].wire.lock().unwrap().rx.push_back(frame.to_vec());
    }

    fn collect(&mut self, from: usize) {
        let sent: Vec<_> = self.nodes[from].wire.lock().unwrap().tx.drain(..).collect();
        for (frame, meta) in sent {
            for frame in deliverable(frame, meta) {
                self.frames += 1;
                if let Some(trace) = &mut self.trace {
                    trace.push(frame.clone());
                }
                for to in (0..self.nodes.len()).filter(|to| *to != from) {
                    let for_it = frame[0] & 1 == 1 || frame[..6] == self.nodes[to].mac;
                    let lost = self.random() % 1_000_000 < self.link.lost;
                    if !for_it || lost {
                        continue;
                    }
                    let mut frame = frame.clone();
                    if self.random() % 1_000_000 < self.link.forged {
                        let at = 12 + self.random() as usize % 54.min(frame.len() - 12);
                        frame[at] = self.random() as u8;
                        super::ip::repair(&mut frame);
                    }
                    let is_tcp = frame.len() >= 54 && frame[12..14] == [8, 0] && frame[23] == 6;
                    if is_tcp && frame[47] & 2 == 0 && self.random() % 1_000_000 < self.link.shut {
                        frame[48..50].fill(0);
                        super::ip::repair(&mut frame);
                    }
                    let copies = 1 + u64::from(self.random() % 1_000_000 < self.link.duplicated);
                    for _ in 0..copies {
                        let late = self.random() % 1_000_000 < self.link.late;
                        let extra = if late { self.random() % (5 * MS) } else { 0 };
                        let at = self.now_ns + self.link.delay_ns + extra;
                        self.flying.insert((at, self.frames), (to, frame.clone()));
                        self.frames += 1;
                    }
                }
            }
        }
    }

    /// Lets everything happen that can at this moment. Says whether anything did.
    pub(crate) fn settle(&mut self) -> bool {
        let mut shards = self.nodes.iter().flat_map(|node| &node.shards);
        let waiting = shards.any(|shard| !shard.ready.is_empty() || !shard.io.local.is_empty());
        for round in 0.. {
            assert!(round < 100_000, "the stacks never come to rest");
            let mut again = false;
            while let Some(entry) = self.flying.first_entry() {
                if entry.key().0 > self.now_ns {
                    break;
                }
                let (to, frame) = entry.remove();
                self.nodes[to].wire.lock().unwrap().rx.push_back(frame);
                again = true;
            }
            for node in 0..self.nodes.len() {
                for shard in 0..self.nodes[node].shards.len() {
                    again |= self.nodes[node].shards[shard].poll(self.now_ns).again;
                    again |= self.nodes[node].shards[shard].arm();
                    let (mut wakers, mut messages) = (Vec::new(), Vec::new());
                    self.nodes[node].shards[shard].swap_effects(&mut wakers, &mut messages);
                    for waker in wakers {
                        waker.wake();
                    }
                    for (to, message) in messages {
                        self.nodes[node].shards[to].message_in(message);
                        again = true;
                    }
                }
                self.collect(node);
            }
            let due = self.deadline().is_some_and(|at| at <= self.now_ns);
            if !again && !due {
                return waiting || round > 0;
            }
        }
        false
    }

    fn deadline(&self) -> Option<u64> {
        let shards = self.nodes.iter().flat_map(|node| &node.shards).filter_map(Shard::next_deadline_ns);
        shards.chain(self.flying.first_key_value().map(|((at, _), _)| *at)).min()
    }

    /// Runs until `done`, at most for `ns`. Says whether it was done.
    pub(crate) fn run(&mut self, ns: u64, mut done: impl FnMut(&mut World) -> bool) -> bool {
        let end = self.now_ns + ns;
        loop {
            self.settle();
            if done(self) {
                self.settle();
                return true;
            }
            // What `done` did may have led to something that it wants to see before time passes.
            if self.settle() {
                continue;
            }
            match self.deadline() {
                Some(at) if at <= end => self.now_ns = at.max(self.now_ns),
                _ => {
                    self.now_ns = end;
                    self.settle();
                    return done(self);
                }
            }
        }
    }

    pub(crate) fn pass(&mut self, ns: u64) {
        self.run(ns, |_| false);
    }

    pub(crate) fn listen(&mut self, node: usize, addr: &str, backlog: usize) -> Arc<Accept> {
        let accept = Accept::new(addr.parse().unwrap(), backlog);
        for shard in &mut self.nodes[node].shards {
            assert!(shard.listen(&accept));
        }
        accept
    }

    pub(crate) fn connect(&mut self, node: usize, local: &str, remote: &str) -> Result<FlowId> {
        let (local, remote): (SocketAddr, SocketAddr) = (local.parse().unwrap(), remote.parse().unwrap());
        let now_ns = self.now_ns;
        let node = &mut self.nodes[node];
        let shard = node.shards[0].tcp_shard((local.ip(), local.port()), (remote.ip(), remote.port()));
        node.shards[shard].set_now(now_ns);
        node.shards[shard].tcp_connect(local, remote)
    }

    pub(crate) fn shard(&mut self, node: usize, flow: FlowId) -> &mut Shard {
        let now_ns = self.now_ns;
        let shard = &mut self.nodes[node].shards[flow.shard];
        shard.set_now(now_ns);
        shard
    }

    pub(crate) fn connected(&mut self, node: usize, flow: FlowId) -> Option<Result<()>> {
        ready(self.shard(node, flow).tcp_poll_connected(flow, &mut cx()))
    }

    /// `None`: would wait.
    pub(crate) fn send(&mut self, node: usize, flow: FlowId, data: &[u8]) -> Option<Result<usize>> {
        ready(self.shard(node, flow).tcp_poll_send(flow, &mut cx(), data))
    }

    /// `None`: would wait.
    pub(crate) fn recv(&mut self, node: usize, flow: FlowId) -> Option<Result<Vec<u8>>> {
        self.recv_up_to(node, flow, 16 << 10)
    }

    /// `None`: would wait.
    pub(crate) fn recv_up_to(&mut self, node: usize, flow: FlowId, len: usize) -> Option<Result<Vec<u8>>> {
        let mut buf = std::vec![0; len];
        let result = ready(self.shard(node, flow).tcp_poll_recv(flow, &mut cx(), &mut buf))?;
        Some(result.map(|n| {
            buf.truncate(n);
            buf
        }))
    }

    /// A connection from node 0 to node 1, which listens at port 80.
    pub(crate) fn pair(&mut self) -> (FlowId, FlowId) {
        self.pair_of("10.0.0.1:50000", "10.0.0.2:80")
    }

    /// The same between these, the client's and the server's.
    pub(crate) fn pair_of(&mut self, local: &str, remote: &str) -> (FlowId, FlowId) {
        let accept = self.listen(1, remote, 16);
        let client = self.connect(0, local, remote).unwrap();
        let mut server = None;
        assert!(self.run(10 * SECOND, |_| {
            server = server.or(accept.pop());
            server.is_some()
        }));
        assert_eq!(self.connected(0, client), Some(Ok(())));
        (client, server.unwrap().flow)
    }

    /// Sends `total` bytes from one node to the other and checks every one.
    pub(crate) fn transfer(&mut self, from: (usize, FlowId), to: (usize, FlowId), total: usize, ns: u64) {
        let (mut sent, mut received) = (0usize, 0usize);
        let done = self.run(ns, |world| {
            while sent < total {
                let chunk: Vec<u8> = (sent..(sent + 8192).min(total)).map(pattern).collect();
                match world.send(from.0, from.1, &chunk) {
                    Some(n) => sent += n.unwrap(),
                    None => break,
                }
            }
            while let Some(data) = world.recv(to.0, to.1) {
                let data = data.unwrap();
                assert!(!data.is_empty(), "end of stream at {received}");
                for byte in data {
                    assert_eq!(byte, pattern(received), "byte {received}");
                    received += 1;
                }
            }
            received == total
        });
        assert!(done, "only {received} of {total} bytes (sent {sent})");
    }
}

pub(crate) fn pattern(at: usize) -> u8 {
    (at ^ (at >> 8) ^ (at >> 16)) as u8
}

fn ready<T>(poll: Poll<T>) -> Option<T> {
    match poll {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

fn cx() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

/// What a device would put on the wire: checksums filled in, large segments cut.
fn deliverable(mut frame: Vec<u8>, meta: TxMeta) -> Vec<Vec<u8>> {
    let Some(segment) = meta.segment else {
        if let Some(at) = meta.checksum {
            let start = usize::from(at.start);
            let sum = crate::checksum::Sum::default().bytes(&frame[start..]).finish();
            let field = start + usize::from(at.field);
            frame[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        }
        return std::vec![frame];
    };
    let header_len = usize::from(segment.header_len);
    let (header, payload) = frame.split_at(header_len);
    let seq = u32::from_be_bytes(header[38..42].try_into().unwrap());
    let mut pieces = Vec::new();
    let count = payload.chunks(usize::from(segment.mss)).count();
    for (index, chunk) in payload.chunks(usize::from(segment.mss)).enumerate() {
        let mut piece = header.to_vec();
        piece.extend(chunk);
        assert!(!segment.ipv6, "this device cuts IPv4 only");
        let total = (piece.len() - 14) as u16;
        piece[16..18].copy_from_slice(&total.to_be_bytes());
        piece[24..26].fill(0);
        let sum = crate::checksum::Sum::default().bytes(&piece[14..34]).finish();
        piece[24..26].copy_from_slice(&sum.to_be_bytes());
        let at = seq.wrapping_add((index * usize::from(segment.mss)) as u32);
        piece[38..42].copy_from_slice(&at.to_be_bytes());
        if index + 1 < count {
            piece[47] &= !0x09; // FIN and PSH belong to the last.
        }
        piece[50..52].fill(0);
        let src = core::net::Ipv4Addr::from(<[u8; 4]>::try_from(&piece[26..30]).unwrap());
        let dst = core::net::Ipv4Addr::from(<[u8; 4]>::try_from(&piece[30..34]).unwrap());
        let sum = crate::checksum::Sum::default()
            .pseudo_header(src.into(), dst.into(), 6, piece.len() - 34)
            .bytes(&piece[34..])
            .finish();
        piece[50..52].copy_from_slice(&sum.to_be_bytes());
        pieces.push(piece);
    }
    pieces
}

/// Shown when a test expects an error.
pub(crate) fn error<T: core::fmt::Debug>(result: Option<Result<T>>) -> NetError {
    match result {
        Some(Err(error)) => error,
        other => panic!("{}", format!("expected an error, got {other:?}")),
    }
}
