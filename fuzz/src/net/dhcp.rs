//! The DHCP client and router advertisements: every question is answered as the input says.

use super::{Station, context, pause, wire};
use crate::host::{FuzzHost, Script};
use crate::input::Input;
use crate::watch;
use anykernel::Kernel;
use anykernel::config::Config;
use anykernel::socket::SocketProvider;
use std::sync::Arc;

struct Story {
    input: Input,
    kernel: Arc<Kernel<FuzzHost>>,
    sockets: Arc<dyn SocketProvider>,
    question: Vec<u8>,
    rounds: u8,
}

impl Story {
    /// An answer to the last question: a good one, changed.
    fn answer(&mut self) -> Vec<u8> {
        let mut message = vec![0; 236];
        message[..4].copy_from_slice(&[2, 1, 6, 0]);
        if let Some(bytes) = self.question.get(46..50) {
            message[4..8].copy_from_slice(bytes);
        }
        message[16..20].copy_from_slice(&wire::STACK);
        message[28..34].copy_from_slice(&wire::STACK_MAC);
        message.extend([99, 130, 83, 99]);
        let how = self.input.u8();
        message.extend([
            53,
            1,
            if how & 0x80 != 0 { self.input.u8() } else { [2, 5, 5, 6][usize::from(how & 3)] },
        ]);
        if how & 4 == 0 {
            message.extend([54, 4, 10, 0, 0, 1]);
        }
        if how & 8 == 0 {
            message.extend([1, 4, 255, 255, 255, 0, 3, 4, 10, 0, 0, 1, 6, 4, 10, 0, 0, 1]);
        }
        if how & 16 == 0 {
            message.extend([51, 4]);
            message.extend(if how & 32 != 0 { self.input.u32() } else { 3600 }.to_be_bytes());
        }
        // Options that the input makes up: kind, length as it is or as it is not, content.
        for _ in 0..self.input.u8() & 7 {
            let kind = self.input.pick(&[1, 3, 6, 12, 15, 26, 51, 53, 54, 58, 59, 61, 119, 121, 0, 255]);
            let len = self.input.u8();
            let content = self.input.bytes(usize::from(len & 31));
            let told = if len & 0x20 != 0 { self.input.u8() } else { content.len() as u8 };
            message.extend([kind, told]);
            message.extend(content);
        }
        if how & 64 == 0 {
            message.push(255);
        }
        for _ in 0..self.input.u8() & 3 {
            let at = self.input.below(message.len());
            message[at] = self.input.u8();
        }
        let mut frame = wire::udp(67, 68, &message);
        frame[..6].fill(0xff);
        frame[30..34].fill(0xff);
        wire::repair(&mut frame);
        frame
    }
}

impl Script for Story {
    fn step(&mut self, host: FuzzHost) -> bool {
        watch::step();
        while let Some(frame) = host.link(|link| link.outgoing.pop_front()) {
            if frame.get(34..38) == Some(&[0, 68, 0, 67]) {
                self.question = frame;
            }
        }
        let _ = self.sockets.poll_configured(&mut context());
        for interface in self.sockets.interfaces() {
            assert!(interface.addresses.len() <= 16 && interface.dns.len() <= 128, "{interface:?}");
        }
        if self.input.is_empty() {
            self.rounds += 1;
            if self.rounds > 16 {
                self.kernel.stop();
                return false;
            }
            host.advance(pause(self.rounds));
        } else {
            let frame = match self.input.u8() & 15 {
                0..9 => Some(self.answer()),
                9 | 10 => {
                    let mut frame = super::frames::template(14, &[]);
                    for _ in 0..self.input.u8() & 7 {
                        let at = self.input.below(frame.len());
                        frame[at] = self.input.u8();
                    }
                    let more = self.input.below(128);
                    frame.extend(self.input.bytes(more));
                    let len = (frame.len() - 54) as u16;
                    frame[18..20].copy_from_slice(&len.to_be_bytes());
                    wire::repair(&mut frame);
                    Some(frame)
                }
                // Somebody else has the address.
                11 => Some(super::frames::template(if self.input.u8() & 1 == 0 { 0 } else { 13 }, &[])),
                _ => {
                    host.advance(pause(self.input.u8()));
                    None
                }
            };
            host.link(|link| link.incoming.extend(frame.map(Ok)));
        }
        host.raise_link();
        true
    }
}

/// One execution.
pub fn run(data: &[u8]) {
    let station = Station::ordinary(Config::default());
    let story = Story {
        input: Input::new(data),
        kernel: station.kernel.clone(),
        sockets: station.sockets.clone(),
        question: Vec::new(),
        rounds: 0,
    };
    station.run(story);
}
