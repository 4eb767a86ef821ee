//! An external hub.

use super::build::Descriptors;
use super::bus::{Cell, ModelBus, ModelHost, Plugged};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use hypercall::UsbSpeed;
use hypercall::testing::{TestHost, UsbModel, UsbReply, UsbStandard, usb_reply};
use std::sync::Mutex;

/// A hub with a number of ports. The handle stays with the test; what is plugged in is a copy of it.
#[derive(Clone)]
pub struct HubModel<H = TestHost> {
    host: H,
    bus: ModelBus<H>,
    ports: Vec<Cell>,
    standard: UsbStandard,
    /// Reports all the time, about nothing.
    pub chatty: bool,
}

impl<H: ModelHost> HubModel<H> {
    /// A high speed hub.
    pub fn new(host: H, bus: &ModelBus<H>, ports: u8) -> Self {
        let standard = Descriptors::new(0x0409, 0x55aa, [9, 0, 0], false)
            .interface(0, 0, 1, [9, 0, 0])
            .endpoint(0x81, 3, 8)
            .build();
        let cells = (0..ports).map(|_| Cell::default()).collect();
        Self { host, bus: bus.clone(), ports: cells, standard, chatty: false }
    }

    /// Plugs the hub itself into a root port.
    pub fn plug_into_root(&self, port: u8) {
        self.plug_into_root_as(port, self.clone());
    }

    /// Plugs `model`, which answers in the hub's place, into a root port.
    pub fn plug_into_root_as(&self, port: u8, model: impl UsbModel + 'static) {
        self.bus.plug_device(port, model, self.ports.clone());
    }

    /// Plugs the hub into a port of another.
    pub fn plug_into(&self, hub: &HubModel<H>, port: u8) {
        hub.plug_device(port, self.clone(), self.ports.clone());
    }

    /// Plugs a device into a port.
    pub fn plug(&self, port: u8, model: impl UsbModel + 'static) {
        self.plug_device(port, model, Vec::new());
    }

    fn plug_device(&self, port: u8, model: impl UsbModel + 'static, ports: Vec<Cell>) {
        let device = Plugged { model: Box::new(model), ports, gone: false, default: false };
        self.ports[usize::from(port) - 1].lock().unwrap().plug(Arc::new(Mutex::new(device)));
        self.bus.kick();
    }

    /// Pulls out what is in a port.
    pub fn unplug(&self, port: u8) -> bool {
        let was = self.ports[usize::from(port) - 1].lock().unwrap().unplug();
        self.bus.kick();
        was
    }

    fn status(&self, port: u8) -> Option<[u8; 4]> {
        let mut port = self.ports.get(usize::from(port).checked_sub(1)?)?.lock().unwrap();
        port.advance(self.host.monotonic_ns());
        let bit = |yes: bool, bit: u16| if yes { 1u16 << bit } else { 0 };
        let speed = port.speed().unwrap_or(UsbSpeed::High);
        let status = bit(port.device.is_some(), 0)
            | bit(port.enabled, 1)
            | bit(port.reset_until_ns.is_some(), 4)
            | bit(true, 8)
            | bit(speed == UsbSpeed::Low, 9)
            | bit(speed == UsbSpeed::High, 10);
        let change = bit(port.connect_changed, 0) | bit(port.reset_changed, 4);
        let ([s0, s1], [c0, c1]) = (status.to_le_bytes(), change.to_le_bytes());
        Some([s0, s1, c0, c1])
    }
}

impl<H: ModelHost> UsbModel for HubModel<H> {
    fn descriptors(&self) -> Vec<u8> {
        self.standard.descriptors()
    }

    fn control(&mut self, setup: [u8; 8], data: &mut [u8]) -> UsbReply {
        let [request_type, request, value, _, port, ..] = setup;
        let cell = self.ports.get(usize::from(port).wrapping_sub(1));
        match (request_type, request, value) {
            (0xa0, 6, _) => usb_reply(data, &[9, 0x29, self.ports.len() as u8, 0, 0, 10, 0, 0, 0xff]),
            (0xa3, 0, _) => self.status(port).map_or(UsbReply::Stall, |status| usb_reply(data, &status)),
            (0x23, 3, 8) => UsbReply::Ack(0),
            (0x23, 3, 4) => cell.map_or(UsbReply::Stall, |cell| {
                cell.lock().unwrap().reset(self.host.monotonic_ns());
                UsbReply::Ack(0)
            }),
            (0x23, 1, feature) => cell.map_or(UsbReply::Stall, |cell| {
                let mut cell = cell.lock().unwrap();
                match feature {
                    1 => cell.enabled = false,
                    16 => cell.connect_changed = false,
                    20 => cell.reset_changed = false,
                    _ => {}
                }
                UsbReply::Ack(0)
            }),
            _ => self.standard.control(setup, data).unwrap_or(UsbReply::Stall),
        }
    }

    fn packet_out(&mut self, _: u8, _: &[u8]) -> UsbReply {
        UsbReply::Stall
    }

    fn packet_in(&mut self, _: u8, room: &mut [u8]) -> UsbReply {
        let mut report = alloc::vec![0u8; self.ports.len() / 8 + 1];
        let now_ns = self.host.monotonic_ns();
        for (index, port) in self.ports.iter().enumerate() {
            let mut port = port.lock().unwrap();
            port.advance(now_ns);
            if port.connect_changed || port.reset_changed || self.chatty {
                report[(index + 1) / 8] |= 1 << ((index + 1) % 8);
            }
        }
        if report.iter().all(|byte| *byte == 0) { UsbReply::Nak } else { usb_reply(room, &report) }
    }

    fn bus_reset(&mut self) {
        self.standard.reset();
    }
}
