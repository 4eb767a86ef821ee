//! Name look-ups: every question is answered as the input says, by the right server or by somebody else.

use super::{Station, context, pause, ready, wire};
use crate::host::{FuzzHost, Script};
use crate::input::Input;
use crate::watch;
use anykernel::Kernel;
use anykernel::socket::{Lookup, SocketProvider};
use std::sync::Arc;

struct Question {
    port: u16,
    message: Vec<u8>,
}

struct Story {
    input: Input,
    kernel: Arc<Kernel<FuzzHost>>,
    sockets: Arc<dyn SocketProvider>,
    lookups: Vec<Box<dyn Lookup>>,
    questions: Vec<Question>,
    rounds: u8,
}

impl Story {
    /// A name: the question's, a pointer anywhere, labels, or nonsense.
    fn name(&mut self) -> Vec<u8> {
        match self.input.u8() & 7 {
            0..3 => vec![0xc0, 12],
            3 => vec![0xc0, self.input.u8()],
            4 => vec![0xc0 | self.input.u8(), self.input.u8()],
            5 => vec![1, b'a', 0xc0, self.input.u8()],
            6 => {
                let len = self.input.u8() & 0x3f;
                let mut name = vec![len];
                name.extend(self.input.bytes(len.into()));
                name.push(if self.input.u8() & 1 == 0 { 0 } else { 0xc0 });
                name.push(12);
                name
            }
            _ => {
                let len = self.input.below(80);
                self.input.bytes(len)
            }
        }
    }

    fn answer(&mut self) -> Option<Vec<u8>> {
        let which = self.input.u8();
        let question = self.questions.get(usize::from(which) % self.questions.len().max(1))?;
        let (port, mut message) = (question.port, question.message.clone());
        if message.len() < 12 {
            return None;
        }
        let how = self.input.u8();
        message[2] = 0x80 | (how & 0x0f);
        message[3] = if how & 0x10 != 0 { self.input.u8() } else { 0x80 };
        let records = self.input.u8() & 7;
        message[7] = if how & 0x20 != 0 { self.input.u8() } else { records };
        for _ in 0..records {
            message.extend(self.name());
            let kind = self.input.pick(&[1u16, 28, 5, 1, 28, 41, 2, 255]);
            message.extend(kind.to_be_bytes());
            message.extend([0, 1, 0, 0, 0, 60]);
            let mut content = match kind {
                1 => vec![10, 0, 0, self.input.u8()],
                28 => vec![0xfd; 16],
                _ => self.name(),
            };
            let shape = self.input.u8();
            if shape & 1 != 0 {
                content.truncate(usize::from(shape >> 4));
            }
            let told = if shape & 2 != 0 { self.input.u16() } else { content.len() as u16 };
            message.extend(told.to_be_bytes());
            message.extend(content);
        }
        for _ in 0..self.input.u8() & 3 {
            let at = self.input.below(message.len());
            message[at] = self.input.u8();
        }
        let from = if how & 0x40 != 0 { self.input.u16() } else { 53 };
        Some(wire::udp(from, port, &message))
    }
}

impl Script for Story {
    fn step(&mut self, host: FuzzHost) -> bool {
        watch::step();
        while let Some(frame) = host.link(|link| link.outgoing.pop_front()) {
            if frame.get(12..14) == Some(&[8, 6]) && frame.get(38..42) == Some(&wire::PEER) {
                host.link(|link| link.incoming.push_back(Ok(wire::arp(2))));
            } else if frame.get(36..38) == Some(&[0, 53]) && frame.get(23) == Some(&17) {
                let port = u16::from_be_bytes([frame[34], frame[35]]);
                self.questions.push(Question { port, message: frame[42..].to_vec() });
                if self.questions.len() > 4 {
                    self.questions.remove(0);
                }
            }
        }
        self.lookups.retain_mut(|lookup| match ready(lookup.poll_addresses(&mut context())) {
            Some(Ok(addresses)) => {
                assert!(!addresses.is_empty() && addresses.len() <= 64, "{} addresses", addresses.len());
                false
            }
            Some(Err(_)) => false,
            None => true,
        });
        if self.input.is_empty() {
            self.rounds += 1;
            if self.rounds > 40 {
                assert!(self.lookups.is_empty(), "a look-up never ends");
                self.kernel.stop();
                return false;
            }
            host.advance(pause(5));
        } else {
            match self.input.u8() & 15 {
                0..11 => {
                    let answer = self.answer();
                    host.link(|link| link.incoming.extend(answer.map(Ok)));
                }
                11 => {
                    let len = self.input.below(24);
                    let name = String::from_utf8_lossy(&self.input.bytes(len)).into_owned();
                    if self.lookups.len() < 4 {
                        self.lookups.extend(self.sockets.lookup(&name));
                    }
                }
                12 if self.lookups.len() < 4 => self.lookups.extend(self.sockets.lookup("www.example.org")),
                _ => host.advance(pause(self.input.u8() % 6)),
            }
        }
        host.raise_link();
        true
    }
}

/// One execution.
pub fn run(data: &[u8]) {
    let station = Station::ordinary(super::static_config("none"));
    let lookups = station.sockets.lookup("www.example.org").into_iter().collect();
    let story = Story {
        input: Input::new(data),
        kernel: station.kernel.clone(),
        sockets: station.sockets.clone(),
        lookups,
        questions: Vec::new(),
        rounds: 0,
    };
    station.host.link(|link| link.incoming.push_back(Ok(wire::arp(1))));
    station.run(story);
}
