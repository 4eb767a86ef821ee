//! Ethernet segments: a switch with a bad day.

use super::engine::World;
use super::event::Event;
use super::node::Node;
use super::park::Raiser;
use super::random::Random;
use super::trace::digest;
use super::{LinkModel, SimHost, Simulation};
use hypercall::{Call, Error, HostLink, LinkInfo, Result, Signal};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

/// Names a segment of a simulation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentId(pub(super) usize);

type Mac = [u8; 6];

/// Most addresses that a segment learns; frames to others go to everybody.
const MOST_ADDRESSES: usize = 65_536;

/// Ethernet's header.
const HEADER: usize = 14;

/// What happened on a segment so far, in frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SegmentCounters {
    /// Sent by somebody.
    pub sent: u64,
    /// Put into somebody's queue.
    pub delivered: u64,
    /// Lost by chance.
    pub lost: u64,
    /// Doubled by chance.
    pub duplicated: u64,
    /// Held back by chance.
    pub reordered: u64,
    /// Changed by chance.
    pub corrupted: u64,
    /// Not carried because of a partition.
    pub partitioned: u64,
    /// Lost because a receiver's queue was full, or its link closed.
    pub overrun: u64,
}

impl SegmentCounters {
    /// All of them with their names.
    pub fn list(&self) -> [(&'static str, u64); 8] {
        [
            ("sent", self.sent),
            ("delivered", self.delivered),
            ("lost", self.lost),
            ("duplicated", self.duplicated),
            ("reordered", self.reordered),
            ("corrupted", self.corrupted),
            ("partitioned", self.partitioned),
            ("overrun", self.overrun),
        ]
    }
}

pub(super) struct Segment {
    model: LinkModel,
    ports: Vec<usize>,
    addresses: HashMap<Mac, usize, std::hash::BuildHasherDefault<super::engine::AddressHasher>>,
    random: Random,
    counters: SegmentCounters,
    /// Ports and the part that they are in.
    parts: BTreeMap<usize, u32>,
}

/// A node's end of a segment.
pub(super) struct Port {
    pub(super) node: u32,
    segment: usize,
    mac: Mac,
    open: Option<(u32, Arc<Signal>)>,
    received: VecDeque<Rc<[u8]>>,
    received_bytes: usize,
    /// When the wire is free again.
    free_ns: u64,
    waiting_bytes: usize,
    was_full: bool,
    /// When the last frame that was not held back arrives.
    last_arrival_ns: u64,
}

impl Port {
    pub(super) fn is_open_by(&self, node: u32) -> bool {
        self.open.as_ref().is_some_and(|(by, _)| *by == node)
    }
}

/// A frame on its way.
pub(super) struct Flight {
    to: usize,
    frame: Rc<[u8]>,
}

impl Simulation {
    /// Adds a segment.
    pub fn segment(&self, model: LinkModel) -> SegmentId {
        let mut segments = self.world().segments.borrow_mut();
        let id = segments.len();
        segments.push(Segment {
            model,
            ports: Vec::new(),
            addresses: HashMap::default(),
            random: Random::new(self.world().config.seed, 2_000_000 + id as u64),
            counters: SegmentCounters::default(),
            parts: BTreeMap::new(),
        });
        SegmentId(id)
    }

    /// From now on the segment does this to frames.
    pub fn set_link_model(&self, segment: SegmentId, model: LinkModel) {
        self.world().segments.borrow_mut()[segment.0].model = model;
    }

    /// What happened on it.
    pub fn segment_counters(&self, segment: SegmentId) -> SegmentCounters {
        self.world().segments.borrow()[segment.0].counters
    }

    /// Nodes hear only nodes of their own part from now on; those not named are one part.
    pub fn partition(&self, segment: SegmentId, parts: &[&[SimHost]]) {
        let ports = self.world().ports.borrow();
        let mut segments = self.world().segments.borrow_mut();
        let segment = &mut segments[segment.0];
        segment.parts.clear();
        for (number, hosts) in parts.iter().enumerate() {
            for port in &segment.ports {
                if hosts.iter().any(|host| host.index() == ports[*port].node) {
                    segment.parts.insert(*port, number as u32 + 1);
                }
            }
        }
    }

    /// Ends a partition.
    pub fn heal(&self, segment: SegmentId) {
        self.partition(segment, &[]);
    }

    /// A frame arrives at link `link` of `host` as if somebody had sent it, after the segment's latency.
    pub fn inject(&self, host: SimHost, link: u32, frame: &[u8]) {
        let world = self.world();
        let Some(to) = world.node(host.index()).and_then(|node| node.ports.get(link as usize).copied())
        else {
            return;
        };
        let latency = {
            let segment = world.ports.borrow()[to].segment;
            world.segments.borrow()[segment].model.latency_ns
        };
        world.schedule(world.now.get() + latency, Event::Flight(Flight { to, frame: frame.into() }));
    }
}

fn mac_at(frame: &[u8], at: usize) -> Mac {
    let mut mac = [0; 6];
    if let Some(bytes) = frame.get(at..at + 6) {
        mac.copy_from_slice(bytes);
    }
    mac
}

impl World {
    pub(super) fn add_port(&self, segment: SegmentId) -> usize {
        let mut ports = self.ports.borrow_mut();
        let at = ports.len();
        let [.., a, b, c] = (at as u32 + 1).to_be_bytes();
        ports.push(Port {
            node: u32::MAX,
            segment: segment.0,
            mac: [0x02, 0x51, 0x4d, a, b, c],
            open: None,
            received: VecDeque::new(),
            received_bytes: 0,
            free_ns: 0,
            waiting_bytes: 0,
            was_full: false,
            last_arrival_ns: 0,
        });
        self.segments.borrow_mut()[segment.0].ports.push(at);
        at
    }

    pub(super) fn close_ports(&self, node: &Node) {
        for port in &node.ports {
            self.close(*port);
        }
    }

    fn close(&self, port: usize) {
        let mut ports = self.ports.borrow_mut();
        let port = &mut ports[port];
        let open = port.open.take();
        port.received.clear();
        port.received_bytes = 0;
        drop(ports);
        drop(open);
    }

    fn send(&self, at: usize, frame: &[u8]) -> Result<()> {
        let now = self.now.get();
        let mut ports = self.ports.borrow_mut();
        let mut segments = self.segments.borrow_mut();
        let port = &mut ports[at];
        let segment = &mut segments[port.segment];
        let model = &segment.model;
        if port.open.is_none() {
            return Err(Error::Gone);
        }
        if frame.len() < HEADER || frame.len() > HEADER + usize::from(model.mtu) {
            return Err(Error::Invalid);
        }
        let mut left_ns = now;
        if let Some(rate) = model.bits_per_second {
            if port.waiting_bytes + frame.len() > model.send_queue_bytes {
                port.was_full = true;
                return Err(Error::WouldBlock);
            }
            let wire_ns = (frame.len() as u64 * 8_000_000_000).div_ceil(rate.max(1));
            port.free_ns = port.free_ns.max(now) + wire_ns;
            port.waiting_bytes += frame.len();
            left_ns = port.free_ns;
            self.schedule(left_ns, Event::Departed(at, frame.len()));
        }
        segment.counters.sent += 1;
        let (to, from) = (mac_at(frame, 0), mac_at(frame, 6));
        if from[0] & 1 == 0
            && (segment.addresses.len() < MOST_ADDRESSES || segment.addresses.contains_key(&from))
        {
            segment.addresses.insert(from, at);
        }
        let known = segment.addresses.get(&to).copied();
        let frame: Rc<[u8]> = frame.into();
        let part = segment.parts.get(&at).copied();
        let latest = port.last_arrival_ns;
        let mut last = latest;
        let all = core::mem::take(&mut segment.ports);
        let targets: &[usize] = match &known {
            Some(one) => core::slice::from_ref(one),
            None => &all,
        };
        for to in targets.iter().copied().filter(|to| *to != at) {
            if segment.parts.get(&to).copied() != part {
                segment.counters.partitioned += 1;
                continue;
            }
            if segment.random.chance(segment.model.loss_ppm) {
                segment.counters.lost += 1;
                continue;
            }
            let copies = 1 + u32::from(segment.random.chance(segment.model.duplicate_ppm));
            segment.counters.duplicated += u64::from(copies - 1);
            for _ in 0..copies {
                let model = &segment.model;
                let mut arrival = left_ns + model.latency_ns;
                if model.jitter_ns > 0 {
                    arrival += segment.random.below(model.jitter_ns);
                }
                if segment.random.chance(model.reorder_ppm) {
                    arrival += segment.random.below(model.reorder_ns);
                    segment.counters.reordered += 1;
                } else {
                    arrival = arrival.max(latest);
                    last = last.max(arrival);
                }
                let mut frame = frame.clone();
                if segment.random.chance(segment.model.corrupt_ppm) {
                    let mut changed = frame.to_vec();
                    let bit = segment.random.below(changed.len() as u64 * 8) as usize;
                    changed[bit / 8] ^= 1 << (bit % 8);
                    frame = changed.into();
                    segment.counters.corrupted += 1;
                }
                self.schedule(arrival, Event::Flight(Flight { to, frame }));
            }
        }
        segment.ports = all;
        ports[at].last_arrival_ns = last;
        Ok(())
    }

    /// A frame arrives.
    pub(super) fn land(&self, flight: Flight) {
        let mut ports = self.ports.borrow_mut();
        let mut segments = self.segments.borrow_mut();
        let port = &mut ports[flight.to];
        let segment = &mut segments[port.segment];
        let room = port.received_bytes + flight.frame.len() <= segment.model.receive_queue_bytes;
        let Some((_, signal)) = port.open.as_ref().filter(|_| room) else {
            segment.counters.overrun += 1;
            return;
        };
        let signal = signal.clone();
        segment.counters.delivered += 1;
        port.received_bytes += flight.frame.len();
        port.received.push_back(flight.frame);
        drop((ports, segments));
        signal.raise(&Raiser(self));
    }

    /// A frame has left the queue of `at`.
    pub(super) fn departed(&self, at: usize, bytes: usize) {
        let mut ports = self.ports.borrow_mut();
        let port = &mut ports[at];
        port.waiting_bytes = port.waiting_bytes.saturating_sub(bytes);
        let limit = self.segments.borrow()[port.segment].model.send_queue_bytes;
        if port.was_full && port.waiting_bytes <= limit / 2 {
            port.was_full = false;
            let signal = port.open.as_ref().map(|(_, signal)| signal.clone());
            drop(ports);
            if let Some(signal) = signal {
                signal.raise(&Raiser(self));
            }
        }
    }
}

impl HostLink for SimHost {
    fn link_count(&self) -> u32 {
        self.value(Call::LinkCount, |node| node.ports.len() as u32).unwrap_or(0)
    }

    fn link_open(&self, link: u32, signal: Arc<Signal>) -> Result<LinkInfo> {
        self.world_call(Call::LinkOpen, [link.into(), 0], |world, node| {
            let at = *node.ports.get(link as usize).ok_or(Error::NotFound)?;
            let mut ports = world.ports.borrow_mut();
            let port = &mut ports[at];
            if port.open.is_some() {
                return Err(Error::Busy);
            }
            port.open = Some((self.index(), signal));
            port.node = self.index();
            Ok(LinkInfo { mac: port.mac, mtu: world.segments.borrow()[port.segment].model.mtu })
        })
    }

    fn link_send(&self, link: u32, frame: &[u8]) -> Result<()> {
        self.world_call(Call::LinkSend, [link.into(), digest(frame)], |world, node| {
            let at = *node.ports.get(link as usize).ok_or(Error::NotFound)?;
            world.send(at, frame)
        })
    }

    fn link_receive(&self, link: u32, buf: &mut [u8]) -> Result<usize> {
        self.world_call(Call::LinkReceive, [link.into(), buf.len() as u64], |world, node| {
            let at = *node.ports.get(link as usize).ok_or(Error::NotFound)?;
            let mut ports = world.ports.borrow_mut();
            let port = &mut ports[at];
            if port.open.is_none() {
                return Err(Error::Gone);
            }
            let frame = port.received.pop_front().ok_or(Error::WouldBlock)?;
            port.received_bytes -= frame.len();
            buf.get_mut(..frame.len()).ok_or(Error::BufferTooSmall)?.copy_from_slice(&frame);
            world.leave(digest(&frame));
            Ok(frame.len())
        })
    }

    fn link_close(&self, link: u32) {
        // That of a node that is down is closed already.
        let _ = self.world_call(Call::LinkClose, [link.into(), 0], |world, node| {
            let at = *node.ports.get(link as usize).ok_or(Error::NotFound)?;
            world.close(at);
            Ok(())
        });
    }
}
