//! A keyboard and a mouse.

use super::build::Descriptors;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use hypercall::UsbSpeed;
use hypercall::testing::{UsbModel, UsbReply, UsbStandard, usb_reply};
use std::sync::Mutex;

/// The report descriptor of a keyboard as in HID 1.11, B.1.
pub const KEYBOARD: &[u8] = &[
    0x05, 1, 0x09, 6, 0xa1, 1, 0x05, 7, 0x19, 0xe0, 0x29, 0xe7, 0x15, 0, 0x25, 1, 0x75, 1, 0x95, 8, 0x81, 2,
    0x95, 1, 0x75, 8, 0x81, 1, 0x95, 5, 0x75, 1, 0x05, 8, 0x19, 1, 0x29, 5, 0x91, 2, 0x95, 1, 0x75, 3, 0x91,
    1, 0x95, 6, 0x75, 8, 0x15, 0, 0x25, 0x65, 0x05, 7, 0x19, 0, 0x29, 0x65, 0x81, 0, 0xc0,
];

/// That of a mouse with three buttons and a wheel, whose reports have number 5.
pub const MOUSE: &[u8] = &[
    0x05, 1, 0x09, 2, 0xa1, 1, 0x85, 5, 0x09, 1, 0xa1, 0, 0x05, 9, 0x19, 1, 0x29, 3, 0x15, 0, 0x25, 1, 0x95,
    3, 0x75, 1, 0x81, 2, 0x95, 1, 0x75, 5, 0x81, 3, 0x05, 1, 0x09, 0x30, 0x09, 0x31, 0x09, 0x38, 0x15, 0x81,
    0x25, 0x7f, 0x75, 8, 0x95, 3, 0x81, 6, 0xc0, 0xc0,
];

/// What a test does with an input device.
#[derive(Debug, Default)]
pub struct HidState {
    /// Reports that wait to be sent.
    pub reports: VecDeque<Vec<u8>>,
    /// SET_PROTOCOL was asked for with this.
    pub protocol: Option<u8>,
    /// Its reports stall.
    pub stall: bool,
}

/// An input device.
pub struct HidModel {
    standard: UsbStandard,
    descriptor: Vec<u8>,
    state: Arc<Mutex<HidState>>,
}

impl HidModel {
    /// A full speed device with this report descriptor. `protocol`: 1 keyboard, 2 mouse.
    pub fn new(descriptor: &[u8], protocol: u8) -> (Self, Arc<Mutex<HidState>>) {
        let [low, high] = (descriptor.len() as u16).to_le_bytes();
        let standard = Descriptors::new(0x0627, 1, [0; 3], false)
            .interface(0, 0, 1, [3, 1, protocol])
            .raw(&[9, 0x21, 0x11, 1, 0, 1, 0x22, low, high])
            .endpoint(0x81, 3, 8)
            .build();
        let state = Arc::new(Mutex::new(HidState::default()));
        (Self { standard, descriptor: descriptor.to_vec(), state: state.clone() }, state)
    }
}

impl UsbModel for HidModel {
    fn speed(&self) -> UsbSpeed {
        UsbSpeed::Full
    }
    fn descriptors(&self) -> Vec<u8> {
        self.standard.descriptors()
    }
    fn control(&mut self, setup: [u8; 8], data: &mut [u8]) -> UsbReply {
        match (setup[0], setup[1]) {
            (0x81, 6) if setup[3] == 0x22 => usb_reply(data, &self.descriptor),
            (0x21, 0x0a) => UsbReply::Stall,
            (0x21, 0x0b) => {
                self.state.lock().unwrap().protocol = Some(setup[2]);
                UsbReply::Ack(0)
            }
            _ => self.standard.control(setup, data).unwrap_or(UsbReply::Stall),
        }
    }
    fn packet_out(&mut self, _: u8, _: &[u8]) -> UsbReply {
        UsbReply::Stall
    }
    fn packet_in(&mut self, _: u8, room: &mut [u8]) -> UsbReply {
        let mut state = self.state.lock().unwrap();
        match state.reports.pop_front() {
            _ if state.stall => UsbReply::Stall,
            Some(report) => usb_reply(room, &report),
            None => UsbReply::Nak,
        }
    }
    fn bus_reset(&mut self) {
        self.standard.reset();
    }
}
