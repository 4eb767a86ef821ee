//! A connection: the engine, who waits for it, and how it ends.

use super::engine::{Egress, Engine};
use super::listen::{Accept, Accepted};
use super::table::{Target, Tuple};
use super::timewait::TimeWait;
use crate::checksum::Sum;
use crate::io::{Io, Layout};
use crate::neighbor::Neighbors;
use crate::packet::{Ip, Mac, Tcp, flag, put};
use crate::route::{Hop, LOOPBACK};
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
/// The largest unit of a scaled window in bytes (RFC 7323, 2.3), which rounding can take from it.
const MOST_ROUNDING: u32 = 1 << 14;
/// More than was ever sent and not acknowledged.
const MAX_FLIGHT: u32 = 1 << 24;
/// Guards against an engine that wants to be polled at once for ever.
const MIN_WAIT_NS: u64 = 1_000_000;

/// What the last segments sent said; TIME-WAIT answers with it when the engine is gone.
#[derive(Debug, Clone, Copy, Default)]
struct Emitted {
    seq: u32,
    ack: u32,
    window: u16,
    count: u32,
}

/// A connection.
pub(crate) struct Flow {
    pub(super) tuple: Tuple,
    hash: u64,
    hop: Hop,
    /// Gone when the connection is over and everything was read.
    pub(super) engine: Option<Box<Engine>>,
    emitted: Emitted,
    /// Acknowledgement and window of the peer's last segment.
    said: (u32, u16),
    /// How many segments had been sent when TIME-WAIT began.
    before_time_wait: Option<u32>,
    pub(super) established: bool,
    /// How many segments with data are still acknowledged at once.
    quick_acks: u8,
    /// A router told that our segments are too long for its next link.
    may_fragment: bool,
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

/// The way out of a connection.
struct LinkEgress<'a> {
    io: &'a mut Io,
    neighbors: &'a mut Neighbors,
    hop: Hop,
    now_ns: u64,
    v6: bool,
    mac: Option<Mac>,
    emitted: &'a mut Emitted,
    may_fragment: bool,
    /// The next hop has to be asked for first.
    unresolved: bool,
    probe: bool,
    full: bool,
}

impl LinkEgress<'_> {
    fn resolve(&mut self) -> bool {
        if self.mac.is_some() || self.hop.iface == LOOPBACK {
            return true;
        }
        match self.neighbors.lookup(self.hop.iface, self.hop.next, self.now_ns) {
            Some((mac, probe)) => {
                self.mac = Some(mac);
                self.probe = probe;
                true
            }
            None => {
                self.unresolved = true;
                false
            }
        }
    }
}

impl Egress for LinkEgress<'_> {
    fn ready(&mut self) -> bool {
        if !self.io.has_room(self.hop.iface) {
            self.full = true;
            return false;
        }
        self.resolve()
    }

    fn send(&mut self, len: usize, mss: Option<u16>, fill: &mut dyn FnMut(&mut [u8])) {
        let header_len = if self.v6 { 40 } else { 20 };
        let emitted = &mut *self.emitted;
        let may_fragment = self.may_fragment && !self.v6;
        let mut write = |buf: &mut [u8]| {
            fill(buf);
            if may_fragment {
                let ident = emitted.count as u16;
                allow_fragments(buf, ident);
            }
            if let Some(tcp) = buf.get(header_len..).and_then(Tcp::parse) {
                emitted.seq = tcp.end();
                emitted.ack = tcp.ack;
                emitted.window = tcp.window;
                emitted.count = emitted.count.wrapping_add(1);
            }
        };
        let resolved = self.mac.is_some()
            || self.hop.iface == LOOPBACK
            || match self.neighbors.lookup(self.hop.iface, self.hop.next, self.now_ns) {
                Some((mac, _)) => {
                    self.mac = Some(mac);
                    true
                }
                None => false,
            };
        if resolved {
            let layout = Layout::tcp(self.v6, mss);
            self.io.transmit(self.hop.iface, self.mac.unwrap_or_default(), len, layout, &mut write);
        } else {
            // An immediate answer to a neighbour that was forgotten: the peer will repeat what it sent.
            self.unresolved = true;
            self.io.counters.drop_unresolved.increment();
            write(&mut alloc::vec![0; len]);
        }
    }
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
    fn is_owed(&self) -> bool {
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

    pub(super) fn end_error(&self) -> NetError {
        self.error.unwrap_or(NetError::Closed)
    }
}

impl Shard {
    /// Makes a connection of an engine and puts it into the table. `None`: no memory.
    pub(crate) fn flow_insert(
        &mut self,
        tuple: Tuple,
        hash: u64,
        engine: Engine,
        accept: Option<Arc<Accept>>,
    ) -> Option<Key> {
        let hop = self.routes.lookup(tuple.remote, self.scope)?;
        let flow = Flow {
            tuple,
            hash,
            hop,
            engine: Some(Box::new(engine)),
            emitted: Emitted::default(),
            before_time_wait: None,
            established: false,
            quick_acks: QUICK_ACKS,
            may_fragment: false,
            unannounced: 0,
            orphan: false,
            orphan_deadline_ns: 0,
            read_shut: false,
            aborted: false,
            error: None,
            accept,
            said: (0, 0),
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
        // smoltcp reads neither acknowledgement nor window of an empty segment that begins elsewhere than it expects. Two
        // ends of its kind then wait for each other for ever in two cases, in which other stacks read on:
        // - Both probed a closed window at once, and both took the other's byte as the windows opened. smoltcp does not
        //   count that byte as sent, so what either says from then on begins one too early, like a keep-alive.
        // - Our window closed a few bytes before the edge that was announced first, because a scaled window is rounded
        //   (RFC 7323, 2.4). The peer sent those bytes, we did not take them, and what it says begins after them.
        // So news is passed on as if it began where it is expected. A keep-alive proper has no news and stays as it is.
        let said = (tcp.ack, tcp.window);
        let begins_early = tcp.seq.wrapping_add(1) == flow.emitted.ack;
        let begins_late =
            flow.emitted.window == 0 && (1..=MOST_ROUNDING).contains(&tcp.seq.wrapping_sub(flow.emitted.ack));
        let elsewhere = begins_early || begins_late;
        let mended =
            (flow.established && tcp.len == 0 && tcp.flags == flag::ACK && elsewhere && said != flow.said)
                .then(|| {
                    let header = ip.whole.len() - ip.payload.len();
                    let mut packet = Vec::new();
                    packet.try_reserve_exact(ip.whole.len()).ok()?;
                    packet.extend_from_slice(ip.whole);
                    // The engine does not look at the checksum, which was verified.
                    put(&mut packet, header + 4, &flow.emitted.ack.to_be_bytes());
                    Some(packet)
                })
                .flatten();
        flow.said = said;
        let mut egress = LinkEgress {
            io: &mut self.io,
            neighbors: &mut self.neighbors,
            hop: flow.hop,
            now_ns: self.now_ns,
            v6: flow.tuple.remote.is_ipv6(),
            mac: None,
            emitted: &mut flow.emitted,
            may_fragment: flow.may_fragment,
            unresolved: false,
            probe: false,
            full: false,
        };
        if let Some(engine) = &mut flow.engine {
            if tcp.len > 0 {
                // What the device merged is more than one segment, of which every second is due an answer.
                let quick = flow.quick_acks > 0 || ip.whole.len() > engine.mtu();
                flow.quick_acks = flow.quick_acks.saturating_sub(1);
                engine.socket_mut().set_ack_delay(Some(if quick { Duration::ZERO } else { ACK_DELAY }));
            }
            engine.ingress(self.now_ns, mended.as_deref().unwrap_or(ip.whole), &mut egress);
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
        let Some(engine) = flow.engine.as_mut() else { return self.flow_finish(key) };
        let before = engine.socket().state();
        let mut egress = LinkEgress {
            io: &mut self.io,
            neighbors: &mut self.neighbors,
            hop: flow.hop,
            now_ns,
            v6: flow.tuple.remote.is_ipv6(),
            mac: None,
            emitted: &mut flow.emitted,
            may_fragment: flow.may_fragment,
            unresolved: false,
            probe: false,
            full: false,
        };
        let mut sent = 0;
        while sent < BURST && engine.egress(now_ns, &mut egress) {
            sent += 1;
        }
        let (unresolved, probe, full) = (egress.unresolved, egress.probe, egress.full);
        let (mac, hop) = (egress.mac, flow.hop);

        let state = engine.socket().state();
        if flow.read_shut {
            discard(engine);
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
        self.flow_arm(key, unresolved || full);
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
    fn flow_arm(&mut self, key: Key, blocked: bool) {
        let now_ns = self.now_ns;
        let Some(flow) = self.flows.get_mut(key) else { return };
        let dead_at = flow.dead_at_ns();
        let engine_at = match flow.engine.as_mut() {
            // A blocked connection is touched when it can go on; a slow timer covers lost answers.
            Some(_) if blocked => Some(now_ns + 1_000_000_000),
            Some(engine) => engine.next_deadline_ns(now_ns).map(|at| at.max(now_ns + MIN_WAIT_NS)),
            None => None,
        };
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

    /// A router dropped a segment because its next link is too narrow (RFC 1191). An engine cannot change its MTU, so from
    /// now on routers may cut the segments of this connection, as they did before path MTU discovery.
    pub(crate) fn flow_too_long(&mut self, tuple: &Tuple, seq: u32) {
        let hash = self.secret.tuple_hash((tuple.local, tuple.local_port), (tuple.remote, tuple.remote_port));
        let Some(Target::Flow(key)) = self.demux.get(hash, tuple) else { return };
        let Some(flow) = self.flows.get_mut(key) else { return };
        // Only what was sent lately: a stranger would have to guess the sequence number (RFC 5927, 7.2).
        if flow.emitted.seq.wrapping_sub(seq) <= MAX_FLIGHT && !flow.may_fragment {
            flow.may_fragment = true;
            self.io.counters.fragmentable.increment();
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
        let state = flow.state();
        if state == State::TimeWait {
            // The engine's acknowledgement of their FIN goes first: it has the numbers.
            let unread = flow.engine.as_ref().is_some_and(|engine| engine.socket().can_recv());
            let acked = flow.before_time_wait.is_some_and(|before| flow.emitted.count != before);
            if acked && (!unread || flow.orphan) {
                let Emitted { seq, ack, .. } = flow.emitted;
                let entry = TimeWait { tuple: flow.tuple, hash: flow.hash, seq, ack };
                flow.engine = None;
                self.time_waits.insert(&mut self.demux, entry, self.now_ns);
            }
        } else if state == State::Closed && flow.engine.is_some() {
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

/// Drops received data that nobody will read, so that the window stays open.
fn discard(engine: &mut Engine) {
    let socket = engine.socket_mut();
    while socket.can_recv() {
        if socket.recv(|data| (data.len(), ())).is_err() {
            break;
        }
    }
}

/// Takes the "don't fragment" flag off an IPv4 packet and numbers it instead.
fn allow_fragments(packet: &mut [u8], ident: u16) {
    put(packet, 4, &ident.to_be_bytes());
    put(packet, 6, &[0; 2]);
    put(packet, 10, &[0; 2]);
    let sum = packet.get(..20).map_or(0, |header| Sum::default().bytes(header).finish());
    put(packet, 10, &sum.to_be_bytes());
}
