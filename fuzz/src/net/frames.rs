//! Frames of every kind, made by changing good ones, against a stack with sockets in every state.

use super::{Station, context, pause, ready, wire};
use crate::host::{FuzzHost, Script};
use crate::input::Input;
use crate::watch;
use anykernel::Kernel;
use anykernel::socket::{Datagram, Listener, Lookup, Ping, SocketProvider, Stream};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// A frame as a well-behaved neighbour would send it.
pub fn template(kind: usize, last: &[u8]) -> Vec<u8> {
    let segment = |from, to, flags, seq, data| {
        wire::Segment { from, to, seq, ack: 0, flags, window: 8192, options: &[2, 4, 5, 0xb4], data }.frame(0)
    };
    let icmp6 = |hops, body: &[u8]| wire::ipv6(58, hops, body);
    let mut target = vec![135, 0, 0, 0, 0, 0, 0, 0];
    match kind {
        0 => wire::arp(1),
        1 => wire::arp(2),
        2 => wire::ipv4(1, b"\x08\0\0\0\0\x01\0\x01ping"),
        3 => wire::ipv4(1, &[&[3, 3, 0, 0, 0, 0, 0, 0][..], last.get(14..42).unwrap_or(&[0; 28])].concat()),
        4 => wire::ipv4(1, &[&[3, 4, 0, 0, 0, 0, 2, 64][..], last.get(14..42).unwrap_or(&[0; 28])].concat()),
        5 => wire::udp(4000, 5000, b"datagram"),
        6 => wire::udp(53, 5353, b"\0\x01\x80\0\0\x01\0\x01\0\0\0\0\x01a\0\0\x01\0\x01"),
        7 => segment(4001, 80, 2, 1000, b""),
        8 => segment(4001, 80, 16, 1001, b"GET / HTTP/1.0\r\n"),
        9 => segment(4000, 80, 16, 1, b"data"),
        10 => segment(4000, 80, 17, 5, b""),
        11 => {
            // The first half of a datagram, and by its changes any other part of it.
            let mut frame = wire::udp(4000, 5000, &[7; 64]);
            frame[20] = 0x20;
            wire::repair(&mut frame);
            frame
        }
        12 => {
            target.extend(wire::STACK6);
            target.extend([1, 1]);
            target.extend(wire::PEER_MAC);
            icmp6(255, &target)
        }
        13 => {
            target[0] = 136;
            target[4] = 0x60;
            target.extend(wire::PEER6);
            target.extend([2, 1]);
            target.extend(wire::PEER_MAC);
            icmp6(255, &target)
        }
        14 => {
            let mut advert = vec![134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0, 3, 4, 64, 0xc0];
            advert.extend([0, 0, 14, 16, 0, 0, 14, 16, 0, 0, 0, 0, 0xfd, 0, 0, 0, 0, 0, 0, 1]);
            advert.extend([0; 8]);
            advert.extend([25, 3, 0, 0, 0, 0, 14, 16, 0xfd, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]);
            icmp6(255, &advert)
        }
        15 => icmp6(64, b"\x80\0\0\0\0\x01\0\x01ping"),
        16 => wire::ipv6(0, 64, b"\x11\0\x01\x04\0\0\0\0\x0f\xa0\x13\x88\0\x0c\0\0data"),
        17 => wire::ipv6(44, 64, b"\x11\0\0\x01\0\0\0\x01\x0f\xa0\x13\x88\0\x10\0\0datagram"),
        18 => icmp6(64, &[&[2, 0, 0, 0, 0, 0, 5, 0][..], last.get(14..62).unwrap_or(&[0; 48])].concat()),
        19 => wire::ipv6(6, 64, b"\x0f\xa1\0\x50\0\0\0\x07\0\0\0\0\x50\x02\x20\0\0\0\0\0"),
        20 => wire::udp(67, 68, &[2; 300]),
        21 => wire::ipv4(2, &[0x11, 0, 0, 0, 0, 0, 0, 0]),
        _ => last.to_vec(),
    }
}

/// How many templates there are.
pub const TEMPLATES: usize = 23;

struct Story {
    input: Input,
    kernel: Arc<Kernel<FuzzHost>>,
    sockets: Arc<dyn SocketProvider>,
    listener: Option<Arc<dyn Listener>>,
    streams: Vec<Arc<dyn Stream>>,
    datagram: Option<Arc<dyn Datagram>>,
    ping: Option<Box<dyn Ping>>,
    lookup: Option<Box<dyn Lookup>>,
    last: Vec<u8>,
    closing: u8,
}

impl Story {
    fn frame(&mut self) -> Vec<u8> {
        let kind = self.input.u8();
        if kind == 255 {
            let len = self.input.u16();
            return self.input.bytes(usize::from(len).min(1514));
        }
        let mut frame = template(usize::from(kind & 31) % TEMPLATES, &self.last);
        let how = self.input.u8();
        for _ in 0..how & 7 {
            let at = self.input.below(frame.len().max(1));
            let value = self.input.u8();
            if let Some(byte) = frame.get_mut(at) {
                *byte = value;
            }
        }
        match how >> 3 & 7 {
            6 => frame.truncate(self.input.below(frame.len() + 1)),
            7 => {
                let more = self.input.below(512);
                frame.extend(self.input.bytes(more));
            }
            _ => {}
        }
        if how & 0x40 == 0 {
            wire::repair(&mut frame);
        }
        frame
    }

    fn application(&mut self) {
        let mut buf = [0; 600];
        let choice = self.input.u8();
        if let Some(datagram) = &self.datagram {
            while let Some(Ok((n, _))) = ready(datagram.poll_recv_from(&mut context(), &mut buf)) {
                assert!(n <= buf.len());
            }
            if choice & 1 != 0 {
                let to: SocketAddr = if choice & 2 != 0 {
                    SocketAddr::from((wire::PEER, 4000))
                } else {
                    SocketAddr::from((wire::PEER6, 4000))
                };
                let _ = datagram.poll_send_to(&mut context(), &buf[..usize::from(choice)], to);
            }
        }
        for stream in &self.streams {
            let _ = stream.poll_recv(&mut context(), &mut buf);
            if choice & 4 != 0 {
                let _ = stream.poll_send(&mut context(), &buf);
            }
        }
        if choice & 8 != 0 {
            self.ping = self
                .sockets
                .ping(IpAddr::from(if choice & 16 != 0 { [10, 0, 0, 1] } else { [10, 0, 0, 9] }))
                .ok();
        }
        if choice & 32 != 0 {
            self.lookup = self.sockets.lookup("example.org").ok();
        }
        if choice & 64 != 0
            && let Ok(stream) = self.sockets.connect(SocketAddr::from((wire::PEER, 4001)))
            && self.streams.len() < 8
        {
            self.streams.push(stream);
        }
        if choice & 128 != 0 && !self.streams.is_empty() {
            self.streams.remove(0);
        }
    }
}

impl Script for Story {
    fn step(&mut self, host: FuzzHost) -> bool {
        watch::step();
        while let Some(frame) = host.link(|link| link.outgoing.pop_front()) {
            if frame.get(12..14) == Some(&[8, 6]) && frame.get(38..42) == Some(&wire::PEER) {
                host.link(|link| link.incoming.push_back(Ok(wire::arp(2))));
            }
            let _ = wire::read_tcp(&frame);
            self.last = frame;
        }
        if let Some(listener) = &self.listener
            && let Some(Ok(stream)) = ready(listener.poll_accept(&mut context()))
        {
            self.streams.push(stream);
        }
        if let Some(ping) = &mut self.ping
            && ping.poll_reply(&mut context()).is_ready()
        {
            self.ping = None;
        }
        if let Some(lookup) = &mut self.lookup
            && lookup.poll_addresses(&mut context()).is_ready()
        {
            self.lookup = None;
        }
        if !self.input.is_empty() {
            match self.input.u8() & 15 {
                0..13 => {
                    let frame = self.frame();
                    host.link(|link| link.incoming.push_back(Ok(frame)));
                }
                13 => self.application(),
                14 => host.advance(pause(self.input.u8())),
                _ => {
                    // Many at once, as a flood would come.
                    let frame = self.frame();
                    host.link(|link| (0..70).for_each(|_| link.incoming.push_back(Ok(frame.clone()))));
                }
            }
        } else if self.closing < 12 {
            self.closing += 1;
            self.streams.clear();
            (self.datagram, self.ping, self.lookup) = (None, None, None);
            host.advance(pause(self.closing));
        } else {
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
    let station = Station::ordinary(super::static_config("auto"));
    let sockets = station.sockets.clone();
    let any = |port| SocketAddr::from(([0u16; 8], port));
    let story = Story {
        input: Input::new(data),
        kernel: station.kernel.clone(),
        listener: sockets.listen(any(80), 4).ok(),
        streams: sockets.connect(SocketAddr::from((wire::PEER, 4000))).into_iter().collect(),
        datagram: sockets.bind(any(5000)).ok(),
        ping: sockets.ping(wire::PEER.into()).ok(),
        lookup: sockets.lookup("a").ok(),
        sockets,
        last: Vec::new(),
        closing: 0,
    };
    station.host.link(|link| link.incoming.push_back(Ok(wire::arp(1))));
    station.run(story);
}
