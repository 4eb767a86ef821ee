//! A network device, ECM or NCM.

use super::build::Descriptors;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use hypercall::testing::{UsbModel, UsbReply, UsbStandard, usb_reply};
use std::sync::Mutex;

/// What a test does with a network device.
#[derive(Debug, Default)]
pub struct NetState {
    /// Transfers that wait to be sent: frames for ECM, blocks for NCM.
    pub to_host: VecDeque<Vec<u8>>,
    /// Transfers that came.
    pub from_host: Vec<Vec<u8>>,
    /// Notifications that wait to be sent.
    pub notes: VecDeque<Vec<u8>>,
    /// So many transfers stall.
    pub stalls: u32,
    /// The packet filter that was set.
    pub filter: Option<u8>,
}

/// A network device.
pub struct NetModel {
    standard: UsbStandard,
    state: Arc<Mutex<NetState>>,
    sending: Option<(Vec<u8>, usize)>,
    taking: Vec<u8>,
}

impl NetModel {
    /// A high speed device with the address 02:00:00:00:00:07. It offers a function that nobody knows in its first configuration.
    pub fn new(ncm: bool) -> (Self, Arc<Mutex<NetState>>) {
        let mut build = Descriptors::new(0x0525, 0xa4a2, [2, 0, 0], false)
            .interface(0, 0, 0, [0xe0, 1, 3])
            .configuration(2)
            .interface(0, 0, 1, if ncm { [2, 0x0d, 0] } else { [2, 6, 0] })
            .raw(&[5, 0x24, 0, 0x10, 1])
            .raw(&[5, 0x24, 6, 0, 1])
            .raw(&[13, 0x24, 0x0f, 3, 0, 0, 0, 0, 0xea, 5, 0, 0, 0]);
        if ncm {
            build = build.raw(&[6, 0x24, 0x1a, 0, 1, 0]);
        }
        let mut standard = build
            .endpoint(0x83, 3, 16)
            .interface(1, 0, 0, [10, 0, u8::from(ncm)])
            .interface(1, 1, 2, [10, 0, u8::from(ncm)])
            .endpoint(0x81, 2, 512)
            .endpoint(0x02, 2, 512)
            .build();
        standard.strings[2] = "020000000007";
        let state = Arc::new(Mutex::new(NetState::default()));
        (Self { standard, state: state.clone(), sending: None, taking: Vec::new() }, state)
    }
}

impl UsbModel for NetModel {
    fn descriptors(&self) -> Vec<u8> {
        self.standard.descriptors()
    }
    fn control(&mut self, setup: [u8; 8], data: &mut [u8]) -> UsbReply {
        match (setup[0], setup[1]) {
            (0x21, 0x43) => {
                self.state.lock().unwrap().filter = Some(setup[2]);
                UsbReply::Ack(0)
            }
            (0xa1, 0x80) => {
                let mut answer = std::vec![28, 0, 1, 0];
                answer.extend(16_384u32.to_le_bytes());
                answer.extend([4, 0, 0, 0, 4, 0, 0, 0]);
                answer.extend(8192u32.to_le_bytes());
                answer.extend([4, 0, 2, 0, 4, 0, 0, 0]);
                usb_reply(data, &answer)
            }
            (0x21, 0x86) => UsbReply::Ack(0),
            _ => self.standard.control(setup, data).unwrap_or(UsbReply::Stall),
        }
    }
    fn packet_out(&mut self, _: u8, packet: &[u8]) -> UsbReply {
        let mut state = self.state.lock().unwrap();
        if state.stalls > 0 {
            state.stalls -= 1;
            return UsbReply::Stall;
        }
        self.taking.extend(packet);
        if packet.len() < 512 {
            state.from_host.push(core::mem::take(&mut self.taking));
        }
        UsbReply::Ack(packet.len())
    }
    fn packet_in(&mut self, endpoint: u8, room: &mut [u8]) -> UsbReply {
        let mut state = self.state.lock().unwrap();
        if endpoint == 0x83 {
            return state.notes.pop_front().map_or(UsbReply::Nak, |note| usb_reply(room, &note));
        }
        if state.stalls > 0 {
            state.stalls -= 1;
            return UsbReply::Stall;
        }
        if self.sending.is_none() {
            self.sending = state.to_host.pop_front().map(|one| (one, 0));
        }
        let Some((bytes, sent)) = &mut self.sending else { return UsbReply::Nak };
        let n = (bytes.len() - *sent).min(512);
        if n > room.len() {
            self.sending = None;
            return UsbReply::Babble;
        }
        let answer = usb_reply(room, &bytes[*sent..*sent + n]);
        *sent += n;
        if n < 512 {
            self.sending = None;
        }
        answer
    }
    fn bus_reset(&mut self) {
        self.standard.reset();
        self.sending = None;
        self.taking.clear();
    }
}
