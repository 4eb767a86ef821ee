//! Segments relative to the state of one connection, by a peer that may do anything but lie about its data: every byte of
//! a stream follows from its place in it, so whatever the stack delivers or repeats can be checked.

use super::wire::{self, Segment};
use super::{Station, context, pause, ready};
use crate::host::{FuzzHost, Script};
use crate::input::Input;
use crate::watch;
use anykernel::Kernel;
use anykernel::socket::{Listener, Shutdown, Stream};
use std::net::SocketAddr;
use std::sync::Arc;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
const URG: u8 = 32;
const PORT: u16 = 80;
const PEER_PORT: u16 = 4000;
/// Where the peer's stream begins; close to the wrap, so that it is crossed.
const PEER_ISN: u32 = 0xffff_ff00;

fn from_peer(at: u32) -> u8 {
    (at ^ at >> 8) as u8
}

fn from_stack(at: u32) -> u8 {
    (at.wrapping_mul(7) ^ at >> 9) as u8 ^ 0x5a
}

struct Open {
    stream: Arc<dyn Stream>,
    received: u32,
    sent: u32,
    ended: bool,
}

struct Story {
    input: Input,
    kernel: Arc<Kernel<FuzzHost>>,
    listener: Option<Arc<dyn Listener>>,
    streams: Vec<Open>,
    /// The stack's port, as far as known.
    port: u16,
    /// What the peer would send next, and the furthest it ever sent.
    next: u32,
    furthest: u32,
    /// Ends of its stream that it named.
    fins: Vec<u32>,
    /// The stack's first sequence number, the end of what it sent, the end that it was told of, and its window.
    isn: Option<u32>,
    theirs: u32,
    window: u16,
    data: Vec<u8>,
    prologue: u8,
    closing: u8,
    /// A stream may have begun elsewhere: its content and acknowledgements cannot be checked any more.
    astray: bool,
}

/// Offset in a stream from sequence number and first sequence number.
fn offset(seq: u32, isn: u32) -> u32 {
    seq.wrapping_sub(isn).wrapping_sub(1)
}

impl Story {
    /// Looks at what the stack sent.
    fn observe(&mut self, host: FuzzHost) {
        while let Some(frame) = host.link(|link| link.outgoing.pop_front()) {
            if frame.get(12..14) == Some(&[8, 6]) && frame.get(38..42) == Some(&wire::PEER) {
                host.link(|link| link.incoming.push_back(Ok(wire::arp(2))));
                continue;
            }
            let Some(segment) = wire::read_tcp(&frame) else { continue };
            if segment.to != PEER_PORT {
                continue;
            }
            self.port = segment.from;
            if segment.flags & RST != 0 {
                continue;
            }
            if segment.flags & SYN != 0 {
                self.isn = Some(segment.seq);
            }
            let Some(isn) = self.isn else { continue };
            let length = segment.data.len() as u32
                + u32::from(segment.flags & SYN != 0)
                + u32::from(segment.flags & FIN != 0);
            self.theirs = segment.seq.wrapping_add(length);
            self.window = segment.window;
            // A keep-alive probe repeats a byte that was acknowledged, and it need not be the same (RFC 1122, 4.2.3.6).
            let probe = segment.data == [0];
            for (at, byte) in segment.data.iter().enumerate().filter(|_| !probe) {
                let place = offset(segment.seq, isn).wrapping_add(at as u32);
                assert_eq!(*byte, from_stack(place), "the stack sent a wrong byte at {place} of its stream");
            }
            if segment.flags & ACK != 0 {
                let acknowledged = segment.ack.wrapping_sub(PEER_ISN);
                let sent = self.furthest.wrapping_sub(PEER_ISN);
                assert!(
                    self.astray || acknowledged <= sent,
                    "the stack acknowledges {acknowledged}, only {sent} were sent"
                );
            }
        }
    }

    fn send(&mut self, host: FuzzHost, segment: &Segment<'_>, urgent: u16) {
        let length = segment.data.len() as u32
            + u32::from(segment.flags & SYN != 0)
            + u32::from(segment.flags & FIN != 0);
        let end = segment.seq.wrapping_add(length);
        self.astray |= segment.flags & SYN != 0 && segment.seq != PEER_ISN;
        if segment.flags & FIN != 0 {
            let data_end = segment
                .seq
                .wrapping_add(segment.data.len() as u32)
                .wrapping_add(u32::from(segment.flags & SYN != 0));
            self.fins.push(offset(data_end, PEER_ISN));
        }
        if segment.flags & RST == 0 {
            if segment.seq == self.next {
                self.next = end;
            }
            if end.wrapping_sub(PEER_ISN) < 1 << 31
                && end.wrapping_sub(PEER_ISN) > self.furthest.wrapping_sub(PEER_ISN)
            {
                self.furthest = end;
            }
        }
        host.link(|link| link.incoming.push_back(Ok(segment.frame(urgent))));
    }

    /// A segment that the input describes.
    fn segment(&mut self, host: FuzzHost) {
        let common =
            [ACK, ACK, ACK | 8, SYN, SYN | ACK, FIN | ACK, RST, RST | ACK, ACK | URG, 0, FIN | SYN, 0xff];
        let choice = self.input.u8();
        let flags =
            if choice & 0x80 != 0 { self.input.u8() } else { common[usize::from(choice) % common.len()] };
        let far = self.input.u8();
        let isn = self.isn.unwrap_or(0);
        let seq = match far & 15 {
            0..6 => self.next,
            6 => self.next.wrapping_sub(1),
            7 => PEER_ISN,
            8 => self.next.wrapping_add(u32::from(self.input.u8())),
            9 => self.next.wrapping_sub(u32::from(self.input.u8())),
            10 => self.next.wrapping_add(u32::from(self.window)),
            11 => self.next.wrapping_add(u32::from(self.window)).wrapping_sub(u32::from(self.input.u8())),
            12 => PEER_ISN.wrapping_add(1),
            13 => self.next.wrapping_add(u32::from(self.input.u16())),
            14 => self.next.wrapping_sub(u32::from(self.input.u16())),
            _ => self.input.u32(),
        };
        // Where the stream begins is fixed, or nothing in it could be checked.
        let seq = if flags & SYN != 0 && far & 15 < 6 { PEER_ISN } else { seq };
        let ack = match far >> 4 {
            0..8 => self.theirs,
            8 => isn.wrapping_add(1),
            9 => isn,
            10 => self.theirs.wrapping_add(1),
            11 => self.theirs.wrapping_sub(1 + u32::from(self.input.u8())),
            12 => self.theirs.wrapping_add(u32::from(self.input.u16())),
            13 => self.theirs.wrapping_sub(1 << 31),
            14 => 0,
            _ => self.input.u32(),
        };
        let shape = self.input.u8();
        let window = match shape & 7 {
            0..3 => 0xffff,
            3 => 0,
            4 => 1,
            5 => 600,
            _ => self.input.u16(),
        };
        let mut options = match shape >> 3 & 7 {
            0..3 => Vec::new(),
            3 => vec![2, 4, 2, 0],
            4 => vec![2, 4, 5, 0xb4, 3, 3, 14, 1, 4, 2, 1, 1],
            5 => {
                let base = self.theirs.wrapping_sub(u32::from(self.input.u16()));
                let mut sack = vec![1, 1, 5, 10];
                sack.extend(base.to_be_bytes());
                sack.extend(base.wrapping_add(u32::from(self.input.u16())).to_be_bytes());
                sack
            }
            6 => [&[1, 1, 8, 10][..], &self.input.bytes(8)].concat(),
            _ => {
                let len = self.input.below(41);
                self.input.bytes(len)
            }
        };
        options.resize(options.len().next_multiple_of(4).min(40), 0);
        let len = match shape >> 6 {
            0 => 0,
            1 => 1,
            2 => self.input.below(64),
            _ => self.input.below(1461),
        };
        let first = offset(seq, PEER_ISN).wrapping_add(u32::from(flags & SYN != 0));
        let data: Vec<u8> = (0..len as u32).map(|at| from_peer(first.wrapping_add(at))).collect();
        let urgent = if flags & URG != 0 { self.input.u16() } else { 0 };
        let segment = Segment {
            from: PEER_PORT,
            to: self.port,
            seq,
            ack,
            flags,
            window,
            options: &options,
            data: &data,
        };
        self.send(host, &segment, urgent);
    }

    /// A step of an orderly handshake, from whichever side began.
    fn handshake(&mut self, host: FuzzHost) {
        let flags = match (self.isn, self.listener.is_some()) {
            (None, true) => SYN,
            (None, false) => return,
            (Some(_), _) if self.next == PEER_ISN => SYN | ACK,
            (Some(_), _) => ACK,
        };
        let options = if flags & SYN != 0 { &[2, 4, 5, 0xb4][..] } else { &[] };
        let (seq, ack) = (self.next, self.theirs);
        let segment =
            Segment { from: PEER_PORT, to: self.port, seq, ack, flags, window: 0xffff, options, data: &[] };
        self.send(host, &segment, 0);
    }

    /// Data in order, at most what the window takes.
    fn data(&mut self, host: FuzzHost, len: usize) {
        let len = len.min(usize::from(self.window)).min(1460);
        let first = offset(self.next, PEER_ISN);
        let data: Vec<u8> = (0..len as u32).map(|at| from_peer(first.wrapping_add(at))).collect();
        let (seq, ack) = (self.next, self.theirs);
        let segment = Segment {
            from: PEER_PORT,
            to: self.port,
            seq,
            ack,
            flags: ACK,
            window: 0xffff,
            options: &[],
            data: &data,
        };
        self.send(host, &segment, 0);
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        while let Some(Ok(stream)) = ready(listener.poll_accept(&mut context())) {
            assert!(self.streams.len() < 1000, "more connections than were opened");
            self.streams.push(Open { stream, received: 0, sent: 0, ended: false });
        }
    }

    fn receive(&mut self, index: usize, len: usize) {
        self.data.resize(len.max(1), 0);
        let Some(open) = self.streams.get_mut(index) else { return };
        let Some(Ok(n)) = ready(open.stream.poll_recv(&mut context(), &mut self.data)) else { return };
        assert!(n <= self.data.len());
        if n == 0 {
            let shut = self.astray || open.ended || self.fins.contains(&open.received);
            assert!(shut, "the stream ended at {}, where the peer never ended it", open.received);
        }
        for byte in &self.data[..n] {
            assert!(
                self.astray || *byte == from_peer(open.received),
                "byte {} of the stream is wrong",
                open.received
            );
            open.received += 1;
        }
    }

    fn transmit(&mut self, index: usize, len: usize) {
        let Some(open) = self.streams.get_mut(index) else { return };
        self.data.clear();
        self.data.extend((0..len as u32).map(|at| from_stack(open.sent + at)));
        if let Some(Ok(n)) = ready(open.stream.poll_send(&mut context(), &self.data)) {
            assert!(n <= len);
            open.sent += n as u32;
        }
    }

    /// The application does something.
    fn application(&mut self) {
        let choice = self.input.u8();
        let index = usize::from(choice >> 4) % self.streams.len().max(1);
        let len = if choice & 8 != 0 { self.input.u16().into() } else { 100 };
        let Some(open) = self.streams.get_mut(index) else { return };
        match choice & 7 {
            0 | 1 => self.receive(index, len),
            2 | 3 => self.transmit(index, len.min(20_000)),
            4 => {
                // Before the handshake is over there is nothing to end in order: it is over at once.
                open.ended |= !matches!(ready(open.stream.poll_connected(&mut context())), Some(Ok(())));
                let _ = open.stream.shutdown(Shutdown::Write);
            }
            5 => {
                open.ended = true;
                let _ = open.stream.shutdown(Shutdown::Read);
            }
            6 => {
                let _ = open.stream.set_nodelay(len & 1 == 0);
                let _ = open.stream.set_keepalive((len & 2 == 0).then_some(5_000_000_000));
                let _ = ready(open.stream.poll_flush(&mut context()));
                let _ = ready(open.stream.poll_connected(&mut context()));
            }
            _ if len & 1 == 0 => {
                open.ended = true;
                open.stream.abort();
            }
            _ => drop(self.streams.swap_remove(index)),
        }
    }
}

impl Script for Story {
    fn step(&mut self, host: FuzzHost) -> bool {
        watch::step();
        self.observe(host);
        self.accept();
        // The first steps bring the connection into the state that the input wants to attack.
        if self.prologue > 0 {
            self.prologue -= 1;
            self.handshake(host);
        } else if !self.input.is_empty() {
            match self.input.u8() & 15 {
                0..8 => self.segment(host),
                8 => self.handshake(host),
                9 | 10 => {
                    let len = self.input.u8();
                    self.data(host, usize::from(len) * 4);
                }
                11 | 12 => self.application(),
                13 => self.transmit(0, 1000),
                14 => self.receive(0, 4096),
                _ => host.advance(pause(self.input.u8())),
            }
        } else if self.closing < 12 {
            // Everything is let go, and time passes until nothing may be left.
            self.streams.clear();
            self.closing += 1;
            host.advance(pause(self.closing));
        } else {
            self.observe(host);
            self.listener = None;
            self.kernel.stop();
            return false;
        }
        host.raise_link();
        true
    }
}

/// One execution.
pub fn run(data: &[u8]) {
    let station = Station::ordinary(super::static_config("none"));
    let mut input = Input::new(data);
    let how = input.u8();
    let active = how & 1 != 0;
    let sockets = station.sockets.clone();
    let listener =
        (!active).then(|| sockets.listen(SocketAddr::from(([0, 0, 0, 0], PORT)), 4).expect("a port"));
    let mut streams = Vec::new();
    if active {
        let to = SocketAddr::from((wire::PEER, PEER_PORT));
        streams.push(Open {
            stream: sockets.connect(to).expect("a route"),
            received: 0,
            sent: 0,
            ended: false,
        });
    }
    station.host.link(|link| link.incoming.push_back(Ok(wire::arp(1))));
    let story = Story {
        input,
        kernel: station.kernel.clone(),
        listener,
        streams,
        port: PORT,
        next: PEER_ISN,
        furthest: PEER_ISN,
        fins: Vec::new(),
        isn: None,
        theirs: 0,
        window: 0,
        data: Vec::new(),
        prologue: how >> 1 & 3,
        closing: 0,
        astray: false,
    };
    station.run(story);
}
