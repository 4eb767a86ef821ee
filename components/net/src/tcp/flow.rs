//! A connection: the engine, who waits for it, and how it ends.

use super::egress::{Emitted, LinkEgress, Way};
use super::engine::Engine;
use super::listen::{Accept, Accepted};
use super::mend::Progress;
use super::table::{Target, Tuple};
use super::timewait::TimeWait;
use crate::packet::{Ip, Tcp, flag};
use crate::route::Hop;
use crate::shard::{FlowId, Shard, Timer};
use crate::slab::Key;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::socket::NetError;
use anykernel::timer::TimerKey;
use core::net::SocketAddr;
use core::task::Waker;
use smoltcp::socket::tcp::State;
use smoltcp::time::Duration;

/// Packets that one connection may send before others have their turn.
const BURST: usize = 64;
/// A connection attempt is given up after this (RFC 9293, 3.8.3 asks for 3 minutes at least; people give up earlier).
const CONNECT_NS: u64 = 30_000_000_000;
/// A connection whose data or FIN is not acknowledged for this long is dead (RFC 9293, 3.8.3: R2, at least 100 s).
const SILENCE_NS: u64 = 100_000_000_000;
/// How long a closed connection waits for the peer's FIN.
pub(super) const ORPHAN_NS: u64 = 60_000_000_000;
/// With keep-alive, how many idle times without an answer end the connection.
const KEEPALIVE_TRIES: u64 = 4;
/// Acknowledgements are delayed this long (RFC 9293, 3.8.6.3 allows 500 ms), so that they travel with an answer...
const ACK_DELAY: Duration = Duration::from_millis(10);
/// ... but not for the first segments with data, while the peer's congestion window is small and grows with every one.
const QUICK_ACKS: u8 = 16;
/// More than was ever sent and not acknowledged.
const MAX_FLIGHT: u32 = 1 << 24;
/// Every link takes as much (RFC 8200, 5).
const IPV6_LEAST_MTU: usize = 1280;
/// Guards against an engine that wants to be polled at once for ever.
pub(super) const MIN_WAIT_NS: u64 = 1_000_000;
/// How often a connection is looked at that waits for something without a time.
pub(super) const SLOW_NS: u64 = 1_000_000_000;

/// A connection.
pub(crate) struct Flow {
    pub(super) tuple: Tuple,
    hash: u64,
    way: Way,
    /// Gone when the connection is over and everything was read.
    pub(super) engine: Option<Box<Engine>>,
    pub(super) emitted: Emitted,
    pub(super) progress: Progress,
    /// How many segments had been sent when TIME-WAIT began.
    before_time_wait: Option<u32>,
    pub(super) established: bool,
    /// How many segments with data are still acknowledged at once.
    quick_acks: u8,
    /// Bytes that the application read since the engine last looked whether to announce room.
    pub(super) unannounced: usize,
    /// No handle is left.
    pub(super) orphan: bool,
    pub(super) orphan_deadline_ns: u64,
    pub(super) read_shut: bool,
    pub(super) aborted: bool,
    pub(super) error: Option<NetError>,
    accept: Option<Arc<Accept>>,
    pub(super) recv_waker: Option<Waker>,
    pub(super) send_waker: Option<Waker>,
    timer: Option<(u64, TimerKey)>,
    queued: bool,
    /// When the peer was heard last, and since when it owes us an acknowledgement.
    pub(super) heard_ns: u64,
    owed_since_ns: Option<u64>,
    pub(super) keepalive_ns: Option<u64>,
}

impl Flow {
    /// It was taken from the queue of those with something to do.
    pub(crate) fn unqueue(&mut self) {
        self.queued = false;
    }

    pub(super) fn state(&self) -> State {
        self.engine.as_ref().map_or(State::Closed, |engine| engine.socket().state())
    }

    /// Whether the peer owes us an acknowledgement.
    pub(super) fn is_owed(&self) -> bool {
        let Some(engine) = &self.engine else { return false };
        let socket = engine.socket();
        match socket.state() {
            State::SynSent | State::SynReceived | State::FinWait1 | State::Closing | State::LastAck => true,
            State::Closed | State::Listen | State::FinWait2 | State::TimeWait => false,
            State::Established | State::CloseWait => socket.send_queue() > 0,
        }
    }

    /// When the connection is dead if nothing is heard until then.
    fn dead_at_ns(&self) -> Option<u64> {
        self.engine.as_ref()?;
        let patience = if self.established { SILENCE_NS } else { CONNECT_NS };
        let owed = self.owed_since_ns.map(|since| since.max(self.heard_ns) + patience);
        let idle = self
            .keepalive_ns
            .filter(|_| self.established)
            .map(|idle| self.heard_ns.saturating_add(idle.saturating_mul(KEEPALIVE_TRIES)));
        let orphan = self.orphan.then_some(self.orphan_deadline_ns);
        [owed, idle, orphan].into_iter().flatten().min()
    }

    /// Whether it is in TIME-WAIT and said so: the engine's acknowledgement of their FIN goes first, it has the numbers.
    fn is_over(&self) -> bool {
        let acked = self.before_time_wait.is_some_and(|before| self.emitted.count != before);
        acked && self.state() == State::TimeWait
    }

    /// Whether it is over, but what came before waits to be read. smoltcp would throw it away when its TIME-WAIT ends.
    pub(super) fn lingers(&self) -> bool {
        let has_unread = |engine: &Engine| engine.socket().can_recv();
        self.is_over() && !self.orphan && self.engine.as_deref().is_some_and(has_unread)
    }

    pub(super) fn end_error(&self) -> NetError {
        self.error.unwrap_or(NetError::Closed)
    }
}

impl Shard {
    /// Makes a connection of an engine and puts it into the table. `None`: no memory.
    pub(super) fn flow_insert(
        &mut self,
        tuple: Tuple,
        hash: u64,
        engine: Engine,
        progress: Progress,
        accept: Option<Arc<Accept>>,
    ) -> Option<Key> {
        let hop = self.routes.lookup(tuple.remote, self.scope)?;
        let way = Way { hop, v6: tuple.remote.is_ipv6(), may_fragment: false };
        let flow = Flow {
            tuple,
            hash,
            way,
            engine: Some(Box::new(engine)),
            emitted: Emitted { seq: progress.first_out, ..Emitted::default() },
            progress,
            before_time_wait: None,
            established: false,
            quick_acks: QUICK_ACKS,
            unannounced: 0,
            orphan: false,
            orphan_deadline_ns: 0,
            read_shut: false,
            aborted: false,
            error: None,
            accept,
            recv_waker: None,
            send_waker: None,
            timer: None,
            queued: false,
            heard_ns: self.now_ns,
            owed_since_ns: None,
            keepalive_ns: None,
        };
        let key = self.flows.insert(Box::new(flow)).ok()?;
        if !self.demux.set(hash, tuple, Target::Flow(key)) {
            self.flows.remove(key);
            return None;
        }
        Some(key)
    }

    /// Marks a connection as having something to do.
    pub(crate) fn touch(&mut self, key: Key) {
        if let Some(flow) = self.flows.get_mut(key)
            && !flow.queued
        {
            flow.queued = true;
            self.ready.push_back(key);
        }
    }

    /// A segment of a connection.
    pub(crate) fn flow_in(&mut self, key: Key, ip: &Ip<'_>, tcp: &Tcp) {
        let Some(flow) = self.flows.get_mut(key) else { return };
        flow.heard_ns = self.now_ns;
        let before = flow.state();
        let count = flow.emitted.count;
        if tcp.has(flag::SYN) && before == State::SynSent {
            (flow.progress.first_in, flow.progress.first_out) = (tcp.seq.wrapping_add(1), flow.emitted.seq);
        }
        if before == State::TimeWait && tcp.has(flag::RST) {
            // RFC 1337: a reset does not end TIME-WAIT.
            return self.io.counters.drop_window.increment();
        }
        if flow.is_beyond_window(tcp) || flow.is_behind_end(tcp) {
            return self.io.counters.drop_window.increment();
        }
        if !flow.hear(tcp, self.now_ns) {
            return self.touch(key);
        }
        let mut egress =
            LinkEgress::new(&mut self.io, &mut self.neighbors, self.now_ns, flow.way, &mut flow.emitted);
        if let Some(engine) = &mut flow.engine {
            if tcp.len > 0 {
                // What the device merged is more than one segment, of which every second is due an answer.
                let quick = flow.quick_acks > 0 || ip.whole.len() > engine.mtu();
                flow.quick_acks = flow.quick_acks.saturating_sub(1);
                engine.socket_mut().set_ack_delay(Some(if quick { Duration::ZERO } else { ACK_DELAY }));
            }
            engine.ingress(self.now_ns, ip.whole, &mut egress);
        }
        let after = flow.state();
        if after == State::TimeWait && before != State::TimeWait {
            if before == State::Closing {
                // Nothing more is to be sent; this segment has the numbers.
                flow.emitted =
                    Emitted { seq: tcp.ack, ack: tcp.end(), count: count.wrapping_add(1), ..flow.emitted };
            }
            flow.before_time_wait = Some(count);
        }
        if before != State::Closed && after == State::Closed && flow.error.is_none() {
            // Only a reset closes a connection at once, except the last acknowledgement.
            let error = match before {
                State::LastAck if !tcp.has(flag::RST) => None,
                State::SynSent => Some(NetError::Refused),
                _ => Some(NetError::Reset),
            };
            if error.is_some() {
                self.io.counters.resets_received.increment();
            }
            flow.error = error;
        }
        self.touch(key);
    }

    /// Lets a connection send what it has to, tells those who wait for it, and sets its timer.
    pub(crate) fn service(&mut self, key: Key) {
        let now_ns = self.now_ns;
        let Some(flow) = self.flows.get_mut(key) else { return };
        let lingers = flow.lingers();
        let Some(engine) = flow.engine.as_mut() else { return self.flow_finish(key) };
        let before = engine.socket().state();
        let mut egress =
            LinkEgress::new(&mut self.io, &mut self.neighbors, now_ns, flow.way, &mut flow.emitted);
        let mut sent = 0;
        while sent < BURST && !lingers && engine.egress(now_ns, &mut egress) {
            sent += 1;
        }
        let (unresolved, probe, full) = (egress.unresolved, egress.probe, egress.full);
        let (mac, hop) = (egress.mac, flow.way.hop);

        let state = engine.socket().state();
        if flow.read_shut {
            flow.progress.taken = flow.progress.taken.wrapping_add(discard(engine));
        } else if flow.orphan && !flow.aborted && engine.socket().can_recv() {
            // Data for nobody (RFC 9293, 3.6.1).
            flow.aborted = true;
            engine.socket_mut().abort();
            if !flow.queued {
                flow.queued = true;
                self.ready.push_back(key);
            }
        }
        if before != State::Closed && state == State::Closed && flow.error.is_none() && !flow.aborted {
            // `dispatch` closes by itself only when TIME-WAIT ends.
            flow.error = (before != State::TimeWait).then_some(NetError::TimedOut);
        }
        let handshake_over = !matches!(state, State::SynSent | State::SynReceived | State::Listen);
        if !flow.established && handshake_over && state != State::Closed {
            flow.established = true;
            match flow.accept.take() {
                Some(accept) => {
                    let accepted = Accepted {
                        flow: FlowId { shard: self.id, key },
                        local: SocketAddr::new(flow.tuple.local, flow.tuple.local_port),
                        remote: SocketAddr::new(flow.tuple.remote, flow.tuple.remote_port),
                    };
                    if accept.push(accepted) {
                        self.io.counters.accepted.increment();
                        self.wakers.extend(accept.waker().take());
                    } else {
                        accept.release();
                        flow.orphan = true;
                        flow.orphan_deadline_ns = now_ns + ORPHAN_NS;
                        flow.aborted = true;
                        engine.socket_mut().abort();
                        flow.queued = true;
                        self.ready.push_back(key);
                    }
                }
                None => self.io.counters.connected.increment(),
            }
        }
        if state == State::Closed
            && let Some(accept) = flow.accept.take()
        {
            accept.release();
            flow.orphan = true;
        }
        let socket = engine.socket();
        if flow.recv_waker.is_some() && (socket.can_recv() || !socket.may_recv()) && handshake_over {
            self.wakers.extend(flow.recv_waker.take());
        }
        if flow.send_waker.is_some() && handshake_over {
            // Poll functions register anew if this was not what they wait for.
            let flushed = socket.send_queue() == 0;
            let roomy = socket.send_capacity() - socket.send_queue() >= socket.send_capacity() / 4;
            if flushed || roomy || !socket.may_send() {
                self.wakers.extend(flow.send_waker.take());
            }
        }
        let engine_at = if unresolved || full {
            // It is touched when it can go on; a slow timer covers lost answers.
            Some(now_ns + SLOW_NS)
        } else {
            flow.engine_deadline_ns(now_ns, &self.io.counters)
        };
        flow.owed_since_ns = if flow.is_owed() { flow.owed_since_ns.or(Some(now_ns)) } else { None };
        if let Some(mac) = mac
            && probe
        {
            self.solicit(hop.iface, hop.next, Some(mac));
        }
        if unresolved {
            self.flow_ask(key, hop);
        } else if full {
            self.blocked.push(key);
        } else if sent == BURST {
            self.touch(key);
        }
        self.flow_finish(key);
        self.flow_arm(key, engine_at);
    }

    /// Waits for the next hop's link address.
    fn flow_ask(&mut self, key: Key, hop: Hop) {
        let Some((waiting, ask)) = self.neighbors.ask(hop.iface, hop.next, self.now_ns) else { return };
        if !waiting.flows.contains(&key) {
            waiting.flows.push(key);
        }
        if ask {
            self.solicit(hop.iface, hop.next, None);
        }
    }

    /// Sets the timer of a connection if the one that is set is too late. (One that is too early is kept: it costs one
    /// look, where moving it would cost one for every packet.)
    fn flow_arm(&mut self, key: Key, engine_at: Option<u64>) {
        let Some(flow) = self.flows.get_mut(key) else { return };
        let engine_at = engine_at.filter(|_| flow.engine.is_some());
        let dead_at = flow.dead_at_ns();
        let Some(due) = [dead_at, engine_at].into_iter().flatten().min() else { return };
        if flow.timer.is_some_and(|(at, _)| at <= due) {
            return;
        }
        if let Some((_, timer)) = flow.timer.take() {
            self.timers.cancel(timer);
        }
        flow.timer = Some((due, self.timers.insert(due, Timer::Flow(key))));
    }

    /// The timer of a connection is due.
    pub(crate) fn flow_on_time(&mut self, key: Key) {
        let now_ns = self.now_ns;
        let Some(flow) = self.flows.get_mut(key) else { return };
        flow.timer = None;
        if flow.dead_at_ns().is_some_and(|at| at <= now_ns) {
            if flow.error.is_none() && !flow.orphan {
                flow.error = Some(NetError::TimedOut);
            }
            self.io.counters.timeouts.increment();
            self.flow_abort(key);
            // One reset, if it can be sent; then it is over in any case.
            self.service(key);
            if let Some(flow) = self.flows.get_mut(key) {
                flow.engine = None;
            }
        }
        self.service(key);
    }

    pub(super) fn flow_abort(&mut self, key: Key) {
        if let Some(flow) = self.flows.get_mut(key) {
            flow.aborted = true;
            if let Some(engine) = &mut flow.engine {
                engine.socket_mut().abort();
            }
        }
    }

    /// The next hop of a connection does not answer: fatal to one that is not established.
    pub(crate) fn flow_unreachable(&mut self, key: Key) {
        self.flow_fail(key, NetError::Unreachable);
        self.touch(key);
    }

    /// Ends a connection attempt with `error`. Established connections only take it as a hint (RFC 5461, 4.1).
    pub(crate) fn flow_fail(&mut self, key: Key, error: NetError) {
        let Some(flow) = self.flows.get_mut(key) else { return };
        if flow.established {
            return;
        }
        flow.error = Some(error);
        // Without a reset: nobody is there to take it.
        flow.engine = None;
        self.service(key);
    }

    /// A router dropped a segment because its next link takes `mtu` bytes only. Over IPv4 routers may from now on cut the
    /// segments of this connection, as they did before path MTU discovery (RFC 1191). Over IPv6 none may, and segments
    /// become shorter (RFC 8201); what was dropped is sent again when its time is over.
    pub(crate) fn flow_too_long(&mut self, tuple: &Tuple, seq: u32, mtu: u32) {
        let hash = self.secret.tuple_hash((tuple.local, tuple.local_port), (tuple.remote, tuple.remote_port));
        let Some(Target::Flow(key)) = self.demux.get(hash, tuple) else { return };
        let Some(flow) = self.flows.get_mut(key) else { return };
        // Only what was sent lately: a stranger would have to guess the sequence number (RFC 5927, 7.2).
        if flow.emitted.seq.wrapping_sub(seq) > MAX_FLIGHT {
            return;
        }
        if !flow.way.v6 {
            if !core::mem::replace(&mut flow.way.may_fragment, true) {
                self.io.counters.fragmentable.increment();
            }
        } else if let Some(engine) = &mut flow.engine {
            let mtu = (mtu as usize).max(IPV6_LEAST_MTU);
            if mtu < engine.mtu() {
                engine.narrow(tuple.local, mtu, self.now_ns);
                self.io.counters.narrowed.increment();
            }
        }
    }

    /// The connection attempt from `local` to `remote`, if `seq` is what its SYN had.
    pub(crate) fn flow_connecting(&self, tuple: &Tuple, seq: u32) -> Option<Key> {
        let hash = self.secret.tuple_hash((tuple.local, tuple.local_port), (tuple.remote, tuple.remote_port));
        let Some(Target::Flow(key)) = self.demux.get(hash, tuple) else { return None };
        let flow = self.flows.get(key)?;
        (!flow.established && flow.emitted.seq == seq.wrapping_add(1)).then_some(key)
    }

    /// Frees what a connection does not need any more: the engine when it is over, all of it when nobody looks.
    fn flow_finish(&mut self, key: Key) {
        let Some(flow) = self.flows.get_mut(key) else { return };
        if flow.is_over() && !flow.lingers() {
            let Emitted { seq, ack, .. } = flow.emitted;
            let entry = TimeWait { tuple: flow.tuple, hash: flow.hash, seq, ack };
            flow.engine = None;
            self.time_waits.insert(&mut self.demux, entry, self.now_ns);
        } else if flow.state() == State::Closed && flow.engine.is_some() {
            // Its reset, if one was due, was sent by the service before; data that came before the end stays readable.
            let unread = flow.engine.as_ref().is_some_and(|engine| engine.socket().recv_queue() > 0);
            let waits =
                flow.engine.as_ref().is_some_and(|engine| engine.socket().remote_endpoint().is_some());
            if !waits && (!unread || flow.orphan || flow.error.is_some()) {
                flow.engine = None;
            }
        }
        if flow.engine.is_some() {
            return;
        }
        self.wakers.extend(flow.recv_waker.take());
        self.wakers.extend(flow.send_waker.take());
        if let Some((_, timer)) = flow.timer.take() {
            self.timers.cancel(timer);
        }
        let (hash, tuple) = (flow.hash, flow.tuple);
        if let Some(accept) = flow.accept.take() {
            accept.release();
            flow.orphan = true;
        }
        if flow.orphan {
            self.flows.remove(key);
        }
        self.demux.remove(hash, &tuple, Target::Flow(key));
    }

    /// Touches every connection whose local address is not ours any more, so that it ends.
    pub(crate) fn flows_check_addresses(&mut self) {
        let gone: Vec<Key> = self
            .flows
            .iter()
            .filter(|(_, flow)| !self.routes.is_ours(flow.tuple.local))
            .map(|(key, _)| key)
            .collect();
        for key in gone {
            if let Some(flow) = self.flows.get_mut(key) {
                flow.error = Some(NetError::AddrNotAvailable);
                flow.engine = None;
            }
            self.touch(key);
        }
    }
}

/// Drops received data that nobody will read, so that the window stays open. Returns how many bytes.
fn discard(engine: &mut Engine) -> u32 {
    let socket = engine.socket_mut();
    let mut dropped = 0;
    while socket.can_recv() {
        match socket.recv(|data| (data.len(), data.len())) {
            Ok(len) => dropped += len as u32,
            Err(_) => break,
        }
    }
    dropped
}
