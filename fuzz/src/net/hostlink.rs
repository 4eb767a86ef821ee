//! The NIC driver over host links, on a host that breaks its contract: impossible descriptions, lengths that are not
//! true, errors at every call.

use super::{Station, pause, wire};
use crate::host::{FuzzHost, Script};
use crate::input::Input;
use crate::watch;
use anykernel::Kernel;
use anykernel::socket::SocketProvider;
use hypercall::{Error, LinkInfo};
use std::net::SocketAddr;
use std::sync::Arc;

const ERRORS: [Error; 6] =
    [Error::WouldBlock, Error::BufferTooSmall, Error::Gone, Error::Invalid, Error::Io, Error::NoMemory];

struct Story {
    input: Input,
    kernel: Arc<Kernel<FuzzHost>>,
    sockets: Arc<dyn SocketProvider>,
}

impl Script for Story {
    fn step(&mut self, host: FuzzHost) -> bool {
        watch::step();
        if self.input.is_empty() {
            self.kernel.stop();
            return false;
        }
        host.link(|link| link.outgoing.clear());
        match self.input.u8() & 15 {
            0..5 => {
                let kind = self.input.below(super::frames::TEMPLATES);
                let frame = super::frames::template(kind, &[]);
                host.link(|link| link.incoming.push_back(Ok(frame)));
            }
            5 => {
                let len = self.input.u16();
                host.link(|link| link.incoming.push_back(Ok(vec![0x55; len.into()])));
            }
            6 => {
                let error = self.input.pick(&ERRORS);
                host.link(|link| link.incoming.push_back(Err(error)));
            }
            7 | 8 => {
                let (error, times) = (self.input.pick(&ERRORS), self.input.u8());
                host.link(|link| (0..times).for_each(|_| link.refuse.push_back(error)));
            }
            9 => {
                let lie = self.input.u16();
                host.link(|link| link.lie = lie.into());
            }
            10..13 => {
                let data = vec![1; self.input.u16().into()];
                if let Ok(socket) = self.sockets.bind(SocketAddr::from(([0, 0, 0, 0], 0))) {
                    let _ = socket.poll_send_to(&mut super::context(), &data, (wire::PEER, 9).into());
                }
            }
            _ => host.advance(pause(self.input.u8())),
        }
        host.raise_link();
        true
    }
}

/// One execution.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut mac = wire::STACK_MAC;
    mac[0] = input.u8() & 3;
    let mtu = input.pick(&[1500, 576, 575, 0, 65_535, 1280, 9000, 600]);
    let Some(station) = Station::start(super::static_config("auto"), LinkInfo { mac, mtu }) else { return };
    let story = Story { input, kernel: station.kernel.clone(), sockets: station.sockets.clone() };
    station.host.link(|link| link.incoming.push_back(Ok(wire::arp(1))));
    station.run(story);
}
