//! The shard: all state of one CPU, and what moves it.

use crate::config::{Ipv4Setting, Ipv6Setting, Limits, Settings};
use crate::counters::NetCounters;
use crate::dhcp::Dhcp;
use crate::icmp::{PingState, RateLimit};
use crate::io::{Io, Port};
use crate::neighbor::Neighbors;
use crate::packet::Mac;
use crate::prf::{Prf, Secret};
use crate::reassembly::Reassembly;
use crate::route::{Interface, LOOPBACK, Routes};
use crate::slab::{Key, Slab};
use crate::tcp::engine::Engine;
use crate::tcp::flow::Flow;
use crate::tcp::listen::{Accept, HalfOpen, Listeners};
use crate::tcp::table::Demux;
use crate::tcp::timewait::TimeWaits;
use crate::udp::UdpTable;
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::nic::{NicInfo, NicQueue, TxMeta};
use anykernel::timer::TimerQueue;
use core::net::{IpAddr, SocketAddr};
use core::task::Waker;

pub use crate::udp::UdpId;

/// Frames taken from one queue at a time.
const RX_BUDGET: usize = 64;
/// Connections served and local packets taken in at a time.
const WORK_BUDGET: usize = 256;

/// Names a connection of a stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowId {
    pub(crate) shard: usize,
    pub(crate) key: Key,
}

/// What shards tell each other.
#[derive(Debug)]
pub(crate) enum Message {
    /// A received frame that belongs to the other shard.
    Frame { iface: usize, frame: Vec<u8>, checksum_ok: bool },
    /// A packet to ourselves, or one put together of fragments, behind room for an Ethernet header.
    Packet { iface: usize, packet: Vec<u8>, checksum_ok: bool },
    /// A frame to send by a queue of the other shard.
    Transmit { iface: usize, frame: Vec<u8>, meta: TxMeta },
    /// Where a neighbour is.
    Neighbor { iface: usize, addr: IpAddr, mac: Mac, create: bool },
    /// Addresses and routes changed.
    Routes(Arc<Routes>),
}

/// What a timer is for.
#[derive(Debug, Clone)]
pub(crate) enum Timer {
    Flow(Key),
    HalfOpen(Key),
    Ping(Key),
    Wake(Waker),
}

/// What [`Shard::poll`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Poll {
    /// There is more to do: poll again at once.
    pub again: bool,
}

/// The settings of one interface and what carries them out; only shard 0 has any.
pub(crate) struct Control {
    pub(crate) settings: Settings,
    pub(crate) dhcp: Option<Dhcp>,
    pub(crate) ndp: crate::ndp::Ndp,
}

/// An interface as one shard gets it.
pub struct NicSetup {
    /// What it is.
    pub info: NicInfo,
    /// The queue that this shard owns, if it owns one.
    pub queue: Option<Box<dyn NicQueue>>,
    /// The shard whose queue this shard's frames leave by.
    pub owner: usize,
}

/// What a shard is made of.
pub struct ShardSetup {
    /// Its number, below `count`.
    pub id: usize,
    /// How many shards the stack has.
    pub count: usize,
    /// Secrets, the same for all shards of the stack.
    pub secret: [u64; 4],
    /// Bounds.
    pub limits: Limits,
    /// Counters, the same for all shards.
    pub counters: NetCounters,
    /// Every interface.
    pub nics: Vec<NicSetup>,
    /// The settings of every interface.
    pub settings: Vec<Settings>,
    /// Now, in nanoseconds of the monotonic clock.
    pub now_ns: u64,
}

/// One shard of a stack.
pub struct Shard {
    pub(crate) id: usize,
    pub(crate) count: usize,
    pub(crate) secret: Secret,
    pub(crate) prf: Prf,
    pub(crate) limits: Limits,
    pub(crate) now_ns: u64,
    pub(crate) io: Io,
    pub(crate) routes: Arc<Routes>,
    /// Interface of link-local destinations in what is being done, counted from 1 as in RFC 4007; 0: the first.
    pub(crate) scope: u32,
    pub(crate) neighbors: Neighbors,
    pub(crate) timers: TimerQueue<Timer>,
    pub(crate) demux: Demux,
    pub(crate) flows: Slab<Box<Flow>>,
    pub(crate) half_open: Slab<HalfOpen>,
    pub(crate) time_waits: TimeWaits,
    pub(crate) listeners: Listeners,
    pub(crate) scratch: Option<Engine>,
    pub(crate) udp: UdpTable,
    pub(crate) pings: Slab<PingState>,
    pub(crate) reassembly: Reassembly,
    pub(crate) rate_limit: RateLimit,
    pub(crate) control: Vec<Control>,
    /// Connections with something to do.
    pub(crate) ready: VecDeque<Key>,
    /// Connections that wait for room in a transmit queue.
    pub(crate) blocked: Vec<Key>,
    /// Whom to wake when the shard's lock is given back.
    pub(crate) wakers: Vec<Waker>,
    configured_wakers: Vec<Waker>,
}

/// The interface that a socket address names, counted from 1; 0: none.
pub(crate) fn scope_of(addr: SocketAddr) -> u32 {
    match addr {
        SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() => v6.scope_id(),
        _ => 0,
    }
}

/// Picks one of `count` by a hash, without favouring any.
pub(crate) fn pick(hash: u64, count: usize) -> usize {
    ((u128::from(hash) * count as u128) >> 64) as usize
}

impl Shard {
    /// A shard with nothing but its interfaces.
    pub fn new(setup: ShardSetup) -> Self {
        let ShardSetup { id, count, secret, limits, counters, nics, settings, now_ns } = setup;
        let secret = Secret(secret);
        let mut prf = Prf::new(secret, id as u64);
        let mut ports = Vec::new();
        let mut interfaces = Vec::new();
        for (NicSetup { info, queue, owner }, settings) in nics.into_iter().zip(&settings) {
            interfaces.push(interface(&info, settings));
            ports.push(Port::new(queue, owner, info.mac, info.caps));
        }
        let forward = settings.iter().any(|one| one.forward);
        let control = if id == 0 {
            interfaces
                .iter()
                .zip(settings)
                .map(|(interface, settings)| Control::new(interface.mac, settings, &mut prf, now_ns))
                .collect()
        } else {
            Vec::new()
        };
        let mut shard = Self {
            id,
            count,
            secret,
            prf,
            limits,
            now_ns,
            io: Io::new(id, ports, counters),
            routes: Arc::new(Routes { interfaces, forward }),
            scope: 0,
            neighbors: Neighbors::default(),
            timers: TimerQueue::default(),
            demux: Demux::default(),
            flows: Slab::default(),
            half_open: Slab::default(),
            time_waits: TimeWaits::default(),
            listeners: Listeners::default(),
            scratch: None,
            udp: UdpTable::default(),
            pings: Slab::default(),
            reassembly: Reassembly::default(),
            rate_limit: RateLimit::default(),
            control,
            ready: VecDeque::new(),
            blocked: Vec::new(),
            wakers: Vec::new(),
            configured_wakers: Vec::new(),
        };
        if id == 0 {
            for iface in 0..shard.routes.interfaces.len() {
                let own = shard.routes.get(iface).and_then(|interface| interface.v4.first().copied());
                if let Some((own, _)) = own {
                    shard.arp_announce(iface, own);
                }
            }
        }
        shard
    }

    /// Takes in the interface with number `iface`: the next one, or one that was unplugged. All shards are told, shard 0 as
    /// the last, as it tells the others of addresses.
    pub(crate) fn plug(&mut self, iface: usize, nic: NicSetup, settings: &Settings) {
        let NicSetup { info, queue, owner } = nic;
        let port = Port::new(queue, owner, info.mac, info.caps);
        match self.io.ports.get_mut(iface) {
            Some(place) => *place = port,
            None => self.io.ports.push(port),
        }
        self.neighbors.forget(iface);
        if self.id == 0 {
            let control = Control::new(info.mac, settings.clone(), &mut self.prf, self.now_ns);
            self.replace(iface, interface(&info, settings), control);
            let own = self.routes.get(iface).and_then(|interface| interface.v4.first().copied());
            if let Some((own, _)) = own {
                self.arp_announce(iface, own);
            }
        }
    }

    /// The interface with number `iface` is gone. Shard 0 is told last.
    pub(crate) fn unplug(&mut self, iface: usize) {
        let Some(port) = self.io.ports.get_mut(iface) else { return };
        let lost = port.unplug();
        self.io.counters.drop_tx_full.add(lost as u64);
        self.neighbors.forget(iface);
        if self.id == 0
            && let Some(before) = self.routes.get(iface)
        {
            let gone = Interface {
                name: before.name.clone(),
                mac: before.mac,
                mtu: before.mtu,
                configured_v4: true,
                configured_v6: true,
                gone: true,
                ..Interface::default()
            };
            let settings =
                Settings { ipv4: Ipv4Setting::None, ipv6: Ipv6Setting::None, ..Settings::default() };
            let control = Control::new(gone.mac, settings, &mut self.prf, self.now_ns);
            self.replace(iface, gone, control);
        }
    }

    /// Puts an interface in the place of another, or behind all, here and in all shards.
    fn replace(&mut self, iface: usize, interface: Interface, control: Control) {
        let mut routes = Routes::clone(&self.routes);
        match routes.interfaces.get_mut(iface) {
            Some(place) => *place = interface,
            None => routes.interfaces.push(interface),
        }
        match self.control.get_mut(iface) {
            Some(place) => *place = control,
            None => self.control.push(control),
        }
        self.publish(routes);
    }

    /// Tells the time. Never goes back.
    pub(crate) fn set_now(&mut self, now_ns: u64) {
        self.now_ns = self.now_ns.max(now_ns);
    }

    /// Takes in frames, runs timers, lets connections send. Bounded work: `again` says that there is more.
    pub fn poll(&mut self, now_ns: u64) -> Poll {
        self.set_now(now_ns);
        let mut again = false;
        for iface in 0..self.io.ports.len() {
            let Some(mut queue) = self.io.ports.get_mut(iface).and_then(|port| port.queue.take()) else {
                continue;
            };
            let got = queue.receive(RX_BUDGET, &mut |frame, meta| {
                self.frame_from_nic(iface, frame, meta.checksum_ok);
            });
            again |= got >= RX_BUDGET;
            if let Some(port) = self.io.ports.get_mut(iface) {
                port.queue = Some(queue);
            }
        }
        self.run_timers();
        again |= self.finish();
        Poll { again }
    }

    /// Serves connections and packets to ourselves, and rings the doorbells. `true`: there is more.
    pub(crate) fn finish(&mut self) -> bool {
        self.unblock();
        for _ in 0..WORK_BUDGET {
            if let Some(packet) = self.io.local.pop_front() {
                self.local_take(packet);
            } else if let Some(key) = self.ready.pop_front() {
                if let Some(flow) = self.flows.get_mut(key) {
                    flow.unqueue();
                    self.service(key);
                }
            } else {
                break;
            }
        }
        let full = self.io.flush();
        if !full {
            self.unblock();
        }
        !self.io.local.is_empty() || !self.ready.is_empty()
    }

    fn unblock(&mut self) {
        if self.blocked.is_empty() {
            return;
        }
        for key in core::mem::take(&mut self.blocked) {
            self.touch(key);
        }
    }

    fn local_take(&mut self, packet: Vec<u8>) {
        let shard = if self.count > 1 { self.steer_packet(&packet) } else { self.id };
        if shard == self.id {
            self.packet_in(LOOPBACK, &packet, true);
            self.io.recycle(packet);
        } else {
            let message = Message::Packet { iface: LOOPBACK, packet, checksum_ok: true };
            self.io.outbox.push((shard, message));
        }
    }

    /// Takes in what another shard says.
    pub(crate) fn message_in(&mut self, message: Message) {
        match message {
            Message::Frame { iface, frame, checksum_ok } => {
                self.frame_in(iface, &frame, checksum_ok);
                self.io.recycle(frame);
            }
            Message::Packet { iface, packet, checksum_ok } => {
                self.packet_in(iface, &packet, checksum_ok);
                self.io.recycle(packet);
            }
            Message::Transmit { iface, frame, meta } => self.io.transmit_built(iface, frame, meta),
            Message::Neighbor { iface, addr, mac, create } => self.neighbor_learn(iface, addr, mac, create),
            Message::Routes(routes) => self.set_routes(routes),
        }
    }

    fn run_timers(&mut self) {
        while let Some(timer) = self.timers.pop_due(self.now_ns) {
            match timer {
                Timer::Flow(key) => self.flow_on_time(key),
                Timer::HalfOpen(key) => self.half_open_on_time(key),
                Timer::Ping(key) => self.ping_on_time(key),
                Timer::Wake(waker) => self.wakers.push(waker),
            }
        }
        self.time_waits.on_time(&mut self.demux, self.now_ns);
        let late = self.reassembly.on_time(self.now_ns);
        self.io.counters.drop_fragment.add(late as u64);
        if self.neighbors.next_deadline_ns().is_some_and(|at| at <= self.now_ns) {
            self.neighbors_on_time();
        }
        if self.control.iter().any(|control| control.next_deadline_ns().is_some_and(|at| at <= self.now_ns)) {
            self.dhcp_on_time();
            self.ndp_on_time();
        }
    }

    /// When [`Shard::poll`] has to be called next, if nothing happens before.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        let control = self.control.iter().filter_map(Control::next_deadline_ns).min();
        [
            self.timers.next_deadline_ns(),
            self.time_waits.next_deadline_ns(),
            self.neighbors.next_deadline_ns(),
            self.reassembly.next_deadline_ns(),
            control,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Asks the queues for their signals before the caller sleeps. `true`: poll again instead.
    pub fn arm(&mut self) -> bool {
        self.io.arm()
    }

    /// Whom to wake, and what to tell other shards; the shard goes on with the (empty) vectors it is given.
    pub(crate) fn swap_effects(&mut self, wakers: &mut Vec<Waker>, messages: &mut Vec<(usize, Message)>) {
        core::mem::swap(&mut self.wakers, wakers);
        core::mem::swap(&mut self.io.outbox, messages);
    }

    /// Wakes `waker` at `at_ns`.
    pub(crate) fn wake_at(&mut self, at_ns: u64, waker: Waker) {
        self.timers.insert(at_ns, Timer::Wake(waker));
    }

    /// Adds a listening port. `false`: it is taken.
    pub(crate) fn listen(&mut self, accept: &Arc<Accept>) -> bool {
        self.listeners.insert(accept)
    }

    /// Changes an interface's addresses and routes, here and in all shards.
    pub(crate) fn configure(&mut self, iface: usize, change: impl FnOnce(&mut Interface, &Settings)) {
        let mut routes = Routes::clone(&self.routes);
        let (Some(interface), Some(control)) = (routes.interfaces.get_mut(iface), self.control.get(iface))
        else {
            return;
        };
        change(interface, &control.settings);
        self.publish(routes);
    }

    /// Gives all shards these routes.
    fn publish(&mut self, routes: Routes) {
        let routes = Arc::new(routes);
        for shard in (0..self.count).filter(|shard| *shard != self.id) {
            self.io.outbox.push((shard, Message::Routes(routes.clone())));
        }
        self.set_routes(routes);
        if self.is_configured() {
            self.wakers.append(&mut self.configured_wakers);
        }
    }

    fn set_routes(&mut self, routes: Arc<Routes>) {
        let before = core::mem::replace(&mut self.routes, routes);
        for (iface, (old, new)) in before.interfaces.iter().zip(&self.routes.interfaces).enumerate() {
            if old.v4 != new.v4 || old.mac != new.mac {
                self.neighbors.forget(iface);
            }
        }
        self.flows_check_addresses();
    }

    /// Whether every interface has what it was configured to get.
    pub(crate) fn is_configured(&self) -> bool {
        self.routes.interfaces.iter().all(|interface| interface.configured_v4 && interface.configured_v6)
    }

    pub(crate) fn when_configured(&mut self, waker: Waker) {
        self.configured_wakers.push(waker);
    }
}

impl Control {
    fn new(mac: Mac, settings: Settings, prf: &mut Prf, now_ns: u64) -> Self {
        Self {
            dhcp: (settings.ipv4 == Ipv4Setting::Dhcp)
                .then(|| Dhcp::new(mac, &settings.hostname, prf.next_u64() as u32, now_ns)),
            ndp: crate::ndp::Ndp::new(mac, settings.ipv6, now_ns),
            settings,
        }
    }

    fn next_deadline_ns(&self) -> Option<u64> {
        let dhcp = self.dhcp.as_ref().map(Dhcp::next_deadline_ns);
        [dhcp, self.ndp.next_deadline_ns()].into_iter().flatten().min()
    }
}

/// An interface before anything was learnt about it.
fn interface(info: &NicInfo, settings: &Settings) -> Interface {
    let mut interface = Interface {
        name: info.name.clone(),
        mac: info.mac,
        mtu: info.mtu.max(576),
        dns: settings.dns.clone(),
        routes_v4: settings.routes.clone(),
        configured_v4: settings.ipv4 != Ipv4Setting::Dhcp,
        // A link-local address is only waited for where there is nothing else to wait for.
        configured_v6: match settings.ipv6 {
            Ipv6Setting::None => true,
            Ipv6Setting::Auto => settings.ipv4 != Ipv4Setting::None,
            Ipv6Setting::Static(..) => false,
        },
        ..Interface::default()
    };
    if let Ipv4Setting::Static(addr, prefix) = settings.ipv4 {
        interface.v4.push((addr, prefix));
    }
    for gateway in &settings.gateways {
        match gateway {
            IpAddr::V4(v4) => interface.gateway_v4 = Some(*v4),
            IpAddr::V6(v6) => interface.gateway_v6 = Some(*v6),
        }
    }
    interface
}
