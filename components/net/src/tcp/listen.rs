//! Listening ports and half-open connections.
//!
//! A SYN costs a small entry, not a connection: the SYN-ACK is made by one scratch engine per shard with a seed of
//! its own, and the entry keeps the SYN and the seed. When the last ACK of the handshake comes, a new engine replays
//! the SYN with that seed, arrives at the same sequence numbers, and takes the ACK.

use super::engine::{Egress, Engine, Path};
use super::mend::Progress;
use super::table::{Target, Tuple};
use crate::io::Layout;
use crate::packet::{Ip, Tcp, flag, put};
use crate::shard::{FlowId, Shard};
use crate::slab::Key;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use atomic_waker::AtomicWaker;
use core::net::{IpAddr, Ipv6Addr, SocketAddr};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crossbeam_queue::ArrayQueue;

/// Largest backlog.
const MAX_BACKLOG: usize = 4096;
/// SYN-ACKs before a half-open connection is forgotten; the wait doubles from one second (RFC 6298, 2.1).
const SYNACK_TRIES: u8 = 4;
const SYNACK_WAIT_NS: u64 = 1_000_000_000;

/// A listening port: shared by all shards, which fill its queue, and its owner, who empties it.
pub(crate) struct Accept {
    local: SocketAddr,
    backlog: usize,
    /// Half-open and not yet accepted connections of all shards.
    pending: AtomicUsize,
    open: AtomicBool,
    queue: ArrayQueue<Accepted>,
    waker: AtomicWaker,
}

/// An established connection that nobody owns yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Accepted {
    pub(crate) flow: FlowId,
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
}

impl Accept {
    /// A port with room for `backlog` connections.
    pub(crate) fn new(local: SocketAddr, backlog: usize) -> Arc<Self> {
        let backlog = backlog.clamp(1, MAX_BACKLOG);
        Arc::new(Self {
            local,
            backlog,
            pending: AtomicUsize::new(0),
            open: AtomicBool::new(true),
            queue: ArrayQueue::new(backlog),
            waker: AtomicWaker::new(),
        })
    }

    pub(crate) fn local(&self) -> SocketAddr {
        self.local
    }

    pub(crate) fn waker(&self) -> &AtomicWaker {
        &self.waker
    }

    /// Takes the next connection.
    pub(crate) fn pop(&self) -> Option<Accepted> {
        let accepted = self.queue.pop()?;
        self.pending.fetch_sub(1, Ordering::Relaxed);
        Some(accepted)
    }

    pub(crate) fn close(&self) {
        self.open.store(false, Ordering::Release);
    }

    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    fn reserve(&self) -> bool {
        self.pending
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |pending| {
                (pending < self.backlog).then_some(pending + 1)
            })
            .is_ok()
    }

    /// Gives up a reservation: the connection never came to be.
    pub(crate) fn release(&self) {
        self.pending.fetch_sub(1, Ordering::Relaxed);
    }

    /// Queues an established connection that was reserved.
    pub(crate) fn push(&self, accepted: Accepted) -> bool {
        self.is_open() && self.queue.push(accepted).is_ok()
    }
}

/// The listening ports of a shard (all shards have the same ones).
#[derive(Default)]
pub(crate) struct Listeners(BTreeMap<(u16, Option<IpAddr>), Arc<Accept>>);

fn listen_key(addr: SocketAddr) -> (u16, Option<IpAddr>) {
    // `::` takes both versions, so it differs from `0.0.0.0`; specific addresses stand for themselves.
    let ip = match addr.ip() {
        IpAddr::V4(v4) if v4.is_unspecified() => None,
        ip => Some(ip),
    };
    (addr.port(), ip)
}

impl Listeners {
    /// Adds a port; `false` if it is taken.
    pub(crate) fn insert(&mut self, accept: &Arc<Accept>) -> bool {
        let key = listen_key(accept.local);
        if self.0.contains_key(&key) {
            return false;
        }
        self.0.insert(key, accept.clone());
        true
    }

    pub(crate) fn remove(&mut self, accept: &Arc<Accept>) {
        let key = listen_key(accept.local);
        if self.0.get(&key).is_some_and(|known| Arc::ptr_eq(known, accept)) {
            self.0.remove(&key);
        }
    }

    /// Who listens at `addr`: the most specific first.
    pub(crate) fn find(&self, addr: IpAddr, port: u16) -> Option<&Arc<Accept>> {
        self.0
            .get(&(port, Some(addr)))
            .or_else(|| if addr.is_ipv4() { self.0.get(&(port, None)) } else { None })
            .or_else(|| self.0.get(&(port, Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED)))))
    }
}

/// A SYN that was answered.
pub(crate) struct HalfOpen {
    tuple: Tuple,
    hash: u64,
    /// The SYN packet without payload.
    syn: Vec<u8>,
    syn_ns: u64,
    seed: u64,
    /// Our initial sequence number, and theirs.
    iss: u32,
    irs: u32,
    tries: u8,
    accept: Arc<Accept>,
}

/// Keeps a packet of an engine.
#[derive(Default)]
struct Capture(Vec<u8>);

impl Egress for Capture {
    fn ready(&mut self) -> bool {
        self.0.is_empty()
    }
    fn send(&mut self, len: usize, _: Option<u16>, fill: &mut dyn FnMut(&mut [u8])) {
        self.0.clear();
        self.0.resize(len, 0);
        fill(&mut self.0);
    }
}

impl Shard {
    /// A SYN for a port that `accept` listens at.
    pub(crate) fn syn_in(&mut self, accept: Arc<Accept>, tuple: Tuple, hash: u64, ip: &Ip<'_>, tcp: &Tcp) {
        if self.flows.len() + self.half_open.len() >= self.limits.connections {
            return self.io.counters.drop_no_memory.increment();
        }
        if !accept.reserve() {
            return self.io.counters.drop_backlog.increment();
        }
        let seed = self.prf.next_u64();
        let syn = without_payload(ip, tcp);
        let mut half = HalfOpen {
            tuple,
            hash,
            syn,
            syn_ns: self.now_ns,
            seed,
            iss: 0,
            irs: tcp.seq,
            tries: 1,
            accept: accept.clone(),
        };
        let Some(packet) = self.syn_ack(&half) else {
            accept.release();
            return self.io.counters.drop_malformed.increment();
        };
        let Some(header) = packet.get(packet.len().min(crate::packet::ip_header_len(tuple.local))..) else {
            return accept.release();
        };
        let Some(answer) = Tcp::parse(header) else { return accept.release() };
        half.iss = answer.seq;
        let key = match self.half_open.insert(half) {
            Ok(key) if self.demux.set(hash, tuple, Target::HalfOpen(key)) => key,
            Ok(key) => {
                self.half_open.remove(key);
                accept.release();
                return self.io.counters.drop_no_memory.increment();
            }
            Err(_) => {
                accept.release();
                return self.io.counters.drop_no_memory.increment();
            }
        };
        self.timers.insert(self.now_ns + SYNACK_WAIT_NS, crate::shard::Timer::HalfOpen(key));
        self.send_made(tuple, &packet);
    }

    /// The SYN-ACK for a half-open connection: the same one every time.
    fn syn_ack(&mut self, half: &HalfOpen) -> Option<Vec<u8>> {
        let path = self.path_to(half.tuple.remote)?;
        if self.scratch.is_none() {
            self.scratch = Engine::new(&self.limits, path, self.now_ns);
        }
        let engine = self.scratch.as_mut()?;
        engine.restart(half.tuple.local, half.seed, path, half.syn_ns);
        if !engine.listen(&half.tuple) {
            return None;
        }
        let mut capture = Capture::default();
        engine.ingress(half.syn_ns, &half.syn, &mut capture);
        engine.egress(half.syn_ns, &mut capture);
        (!capture.0.is_empty()).then_some(capture.0)
    }

    /// What an engine would use towards `remote`.
    pub(crate) fn path_to(&self, remote: IpAddr) -> Option<Path> {
        let hop = self.routes.lookup(remote, self.scope)?;
        let caps = self.io.caps(hop.iface);
        let needed =
            if remote.is_ipv4() { anykernel::nic::NicCaps::TSO4 } else { anykernel::nic::NicCaps::TSO6 };
        let tso = caps.contains(needed | anykernel::nic::NicCaps::TX_CHECKSUM);
        Some(Path { mtu: usize::from(self.routes.mtu(hop.iface)), tso })
    }

    /// Sends a TCP packet that an engine made earlier.
    fn send_made(&mut self, tuple: Tuple, packet: &[u8]) {
        if let Some(hop) = self.routes.lookup(tuple.remote, self.scope) {
            let layout = Layout::tcp(tuple.remote.is_ipv6(), None);
            self.send_packet(hop, packet.len(), layout, &mut |buf| put(buf, 0, packet));
        }
    }

    /// A segment of a half-open connection.
    pub(crate) fn half_open_in(&mut self, key: Key, ip: &Ip<'_>, tcp: &Tcp) {
        let Some(half) = self.half_open.get(key) else { return };
        if tcp.has(flag::RST) {
            // RFC 5961, 3.2: only the exact sequence number.
            if tcp.seq == half.irs.wrapping_add(1) {
                self.half_open_remove(key);
            }
            return;
        }
        if tcp.has(flag::SYN) {
            if tcp.seq == half.irs && !tcp.has(flag::ACK) {
                self.syn_ack_again(key);
            }
            return;
        }
        if !tcp.has(flag::ACK) {
            return self.io.counters.drop_malformed.increment();
        }
        if tcp.ack != half.iss.wrapping_add(1) {
            return self.tcp_reset(ip, tcp);
        }
        let Some(half) = self.half_open_take(key) else { return };
        if !half.accept.is_open() {
            half.accept.release();
            return self.tcp_reset(ip, tcp);
        }
        let engine = self.path_to(half.tuple.remote).and_then(|path| {
            let mut engine = Engine::new(&self.limits, path, half.syn_ns)?;
            engine.restart(half.tuple.local, half.seed, path, half.syn_ns);
            engine.listen(&half.tuple).then_some(engine)
        });
        let Some(mut engine) = engine else {
            half.accept.release();
            self.io.counters.drop_no_memory.increment();
            return self.tcp_reset(ip, tcp);
        };
        let mut capture = Capture::default();
        engine.ingress(half.syn_ns, &half.syn, &mut capture);
        engine.egress(half.syn_ns, &mut capture);
        let (first_in, first_out) = (half.irs.wrapping_add(1), half.iss.wrapping_add(1));
        let progress = Progress { first_in, first_out, ..Progress::default() };
        match self.flow_insert(half.tuple, half.hash, engine, progress, Some(half.accept.clone())) {
            Some(flow) => self.flow_in(flow, ip, tcp),
            None => {
                half.accept.release();
                self.io.counters.drop_no_memory.increment();
            }
        }
    }

    fn syn_ack_again(&mut self, key: Key) {
        let Some(half) = self.half_open.remove_for(key) else { return };
        if let Some(packet) = self.syn_ack(&half) {
            self.io.counters.synack_retries.increment();
            self.send_made(half.tuple, &packet);
        }
        self.half_open.put_back(key, half);
    }

    /// The SYN-ACK was not answered in time.
    pub(crate) fn half_open_on_time(&mut self, key: Key) {
        let Some(half) = self.half_open.get_mut(key) else { return };
        if half.tries >= SYNACK_TRIES || !half.accept.is_open() {
            return self.half_open_remove(key);
        }
        let wait = SYNACK_WAIT_NS << half.tries;
        half.tries += 1;
        self.timers.insert(self.now_ns + wait, crate::shard::Timer::HalfOpen(key));
        self.syn_ack_again(key);
    }

    fn half_open_take(&mut self, key: Key) -> Option<HalfOpen> {
        let half = self.half_open.remove(key)?;
        self.demux.remove(half.hash, &half.tuple, Target::HalfOpen(key));
        Some(half)
    }

    fn half_open_remove(&mut self, key: Key) {
        if let Some(half) = self.half_open_take(key) {
            half.accept.release();
        }
    }
}

/// A copy of a SYN packet that ends after the TCP header.
fn without_payload(ip: &Ip<'_>, tcp: &Tcp) -> Vec<u8> {
    let len = ip.whole.len() - tcp.len;
    let mut syn = Vec::from(ip.whole.get(..len).unwrap_or_default());
    if ip.src.is_ipv4() {
        put(&mut syn, 2, &(len as u16).to_be_bytes());
    } else {
        put(&mut syn, 4, &(len as u16).saturating_sub(40).to_be_bytes());
    }
    syn
}
