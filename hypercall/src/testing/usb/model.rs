//! What USB devices in memory are: packets, the standard requests, and one device that gives back what it gets.

use crate::*;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

/// What a device answers to a packet, or to a whole control transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UsbReply {
    /// Took it, or sent so many bytes.
    Ack(usize),
    /// Not now: asked again later.
    Nak,
    /// STALL: the endpoint halts.
    Stall,
    /// No answer, or garbage.
    Silence,
    /// Sent more than there was room for.
    Babble,
}

/// The device side of a bus, for tests to play.
///
/// Packets are as large as the endpoint's `wMaxPacketSize` says; a shorter one ends a transfer.
pub trait UsbModel: Send {
    /// How fast it signals.
    fn speed(&self) -> UsbSpeed {
        UsbSpeed::High
    }

    /// Its device descriptor and its configurations, as the platform would have read them.
    fn descriptors(&self) -> Vec<u8>;

    /// A control transfer on endpoint 0. `data` is what is sent, or room for the answer.
    fn control(&mut self, setup: [u8; 8], data: &mut [u8]) -> UsbReply;

    /// A packet to an OUT endpoint.
    fn packet_out(&mut self, endpoint: u8, packet: &[u8]) -> UsbReply;

    /// A packet from an IN endpoint, of at most `room`.
    fn packet_in(&mut self, endpoint: u8, room: &mut [u8]) -> UsbReply;

    /// The port was reset: back to the default state.
    fn bus_reset(&mut self) {}
}

/// Moves a transfer as far as the device lets it. `moved` counts the bytes so far; `Some`: the transfer is over.
pub fn usb_progress(
    model: &mut dyn UsbModel,
    kind: UsbTransferKind,
    endpoint: u8,
    data: &mut [u8],
    zero_packet: bool,
    moved: &mut usize,
) -> Option<UsbStatus> {
    let end = |reply| match reply {
        UsbReply::Ack(_) => Some(UsbStatus::Done),
        UsbReply::Nak => None,
        UsbReply::Stall => Some(UsbStatus::Stall),
        UsbReply::Silence => Some(UsbStatus::Error),
        UsbReply::Babble => Some(UsbStatus::Overflow),
    };
    if let UsbTransferKind::Control(setup) = kind {
        let reply = model.control(setup, data);
        if let UsbReply::Ack(n) = reply {
            *moved = if setup[0] & 0x80 != 0 { n.min(data.len()) } else { data.len() };
        }
        return end(reply);
    }
    let packet = max_packet(&model.descriptors(), endpoint).unwrap_or(512);
    loop {
        let rest = &mut data[*moved..];
        let room = rest.len().min(packet);
        if endpoint & 0x80 != 0 {
            match model.packet_in(endpoint, &mut rest[..room]) {
                UsbReply::Ack(n) if n > room => return Some(UsbStatus::Overflow),
                UsbReply::Ack(n) => {
                    *moved += n;
                    if n < packet || *moved == data.len() {
                        return Some(UsbStatus::Done);
                    }
                }
                other => return end(other),
            }
        } else {
            match model.packet_out(endpoint, &rest[..room]) {
                UsbReply::Ack(_) => {
                    *moved += room;
                    if *moved == data.len() && (room < packet || !zero_packet) {
                        return Some(UsbStatus::Done);
                    }
                }
                other => return end(other),
            }
        }
    }
}

/// The descriptors in `bytes`, as far as their lengths make sense.
pub(super) fn walk(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = bytes;
    core::iter::from_fn(move || {
        let len = usize::from(*rest.first()?);
        let (one, after) = rest.split_at_checked(len.max(2))?;
        rest = after;
        Some(one)
    })
}

fn max_packet(descriptors: &[u8], endpoint: u8) -> Option<usize> {
    let found = walk(descriptors).find(|one| one.len() >= 7 && one[1] == 5 && one[2] == endpoint)?;
    Some(usize::from(u16::from_le_bytes([found[4], found[5]]) & 0x7ff))
}

/// The standard requests of chapter 9, for models to build on.
#[derive(Debug, Clone, Default)]
pub struct UsbStandard {
    /// The device descriptor.
    pub device: Vec<u8>,
    /// Each configuration in full.
    pub configurations: Vec<Vec<u8>>,
    /// String descriptors from index 1 on, as text.
    pub strings: Vec<&'static str>,
    /// `bConfigurationValue` that is set.
    pub configuration: u8,
    /// Interfaces with another alternate setting than 0.
    pub alternates: Vec<(u8, u8)>,
    /// Endpoints that are halted.
    pub halted: Vec<u8>,
}

impl UsbStandard {
    /// Answers a standard request; `None`: it is none, or unknown.
    pub fn control(&mut self, setup: [u8; 8], data: &mut [u8]) -> Option<UsbReply> {
        let [request_type, request, low, high, index, ..] = setup;
        Some(match (request_type, request) {
            // GET_DESCRIPTOR.
            (0x80, 6) => {
                let text = |text: &str| {
                    let mut bytes = alloc::vec![0, 3];
                    bytes.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
                    bytes[0] = bytes.len() as u8;
                    bytes
                };
                let answer = match high {
                    1 => Some(self.device.clone()),
                    2 => self.configurations.get(usize::from(low)).cloned(),
                    3 if low == 0 => Some(alloc::vec![4, 3, 9, 4]),
                    3 => self.strings.get(usize::from(low) - 1).map(|one| text(one)),
                    _ => None,
                };
                answer.map_or(UsbReply::Stall, |answer| reply(data, &answer))
            }
            // GET_STATUS of device and interface; of an endpoint.
            (0x80 | 0x81, 0) => reply(data, &[0, 0]),
            (0x82, 0) => reply(data, &[u8::from(self.halted.contains(&index)), 0]),
            // GET_CONFIGURATION, SET_ADDRESS.
            (0x80, 8) => reply(data, &[self.configuration]),
            (0x00, 5) => UsbReply::Ack(0),
            // SET_CONFIGURATION.
            (0x00, 9) => {
                if low != 0 && !self.configurations.iter().any(|one| one.get(5) == Some(&low)) {
                    return Some(UsbReply::Stall);
                }
                self.configuration = low;
                self.alternates.clear();
                self.halted.clear();
                UsbReply::Ack(0)
            }
            // SET_INTERFACE.
            (0x01, 11) => {
                let known = self
                    .configurations
                    .iter()
                    .flat_map(|one| walk(one))
                    .any(|one| one.len() >= 9 && one[1] == 4 && one[2] == index && one[3] == low);
                if !known {
                    return Some(UsbReply::Stall);
                }
                self.alternates.retain(|one| one.0 != index);
                self.alternates.push((index, low));
                UsbReply::Ack(0)
            }
            // CLEAR_FEATURE and SET_FEATURE (ENDPOINT_HALT).
            (0x02, 1 | 3) if low == 0 => {
                self.halted.retain(|one| *one != index);
                if request == 3 {
                    self.halted.push(index);
                }
                UsbReply::Ack(0)
            }
            _ => return None,
        })
    }

    /// As [`UsbModel::descriptors`].
    pub fn descriptors(&self) -> Vec<u8> {
        let mut all = self.device.clone();
        self.configurations.iter().for_each(|one| all.extend(one));
        all
    }

    /// Back to the default state.
    pub fn reset(&mut self) {
        self.configuration = 0;
        self.alternates.clear();
        self.halted.clear();
    }
}

/// Answers as much as there is room for.
pub fn reply(data: &mut [u8], answer: &[u8]) -> UsbReply {
    let n = answer.len().min(data.len());
    data[..n].copy_from_slice(&answer[..n]);
    UsbReply::Ack(n)
}

/// A device that sends back on bulk endpoint 0x82 what it gets on 0x01; nothing ever comes on interrupt endpoint 0x83.
pub struct UsbLoopback {
    standard: UsbStandard,
    held: VecDeque<Vec<u8>>,
}

impl Default for UsbLoopback {
    fn default() -> Self {
        let mut configuration = alloc::vec![9, 2, 0, 0, 1, 1, 0, 0x80, 50];
        configuration.extend([9, 4, 0, 0, 3, 0xff, 0, 0, 0]);
        configuration.extend([7, 5, 0x01, 2, 0, 2, 0]);
        configuration.extend([7, 5, 0x82, 2, 0, 2, 0]);
        configuration.extend([7, 5, 0x83, 3, 8, 0, 4]);
        configuration[2] = configuration.len() as u8;
        let device = alloc::vec![18, 1, 0, 2, 0xff, 0, 0, 64, 0x09, 0x12, 1, 0, 0, 1, 1, 2, 0, 1];
        let strings = alloc::vec!["anykernel", "loopback"];
        let configurations = alloc::vec![configuration];
        let standard = UsbStandard { device, configurations, strings, ..UsbStandard::default() };
        Self { standard, held: VecDeque::new() }
    }
}

impl UsbModel for UsbLoopback {
    fn descriptors(&self) -> Vec<u8> {
        self.standard.descriptors()
    }
    fn control(&mut self, setup: [u8; 8], data: &mut [u8]) -> UsbReply {
        self.standard.control(setup, data).unwrap_or(UsbReply::Stall)
    }
    fn packet_out(&mut self, _: u8, packet: &[u8]) -> UsbReply {
        self.held.push_back(packet.to_vec());
        UsbReply::Ack(packet.len())
    }
    fn packet_in(&mut self, endpoint: u8, room: &mut [u8]) -> UsbReply {
        match self.held.front() {
            Some(packet) if endpoint == 0x82 && packet.len() > room.len() => UsbReply::Babble,
            Some(packet) if endpoint == 0x82 => {
                let answer = reply(room, packet);
                self.held.pop_front();
                answer
            }
            _ => UsbReply::Nak,
        }
    }
    fn bus_reset(&mut self) {
        self.standard.reset();
        self.held.clear();
    }
}
