//! USB devices in memory, and the [`HostUsb`] that shows them.

use super::TestHost;
use crate::*;
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
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
fn walk(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
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

/// The devices of a [`TestHost`].
#[derive(Default)]
pub(super) struct Bus {
    plugged: Vec<Plugged>,
    last_id: u64,
    watcher: Option<Arc<Signal>>,
}

struct Plugged {
    info: UsbDeviceInfo,
    model: Box<dyn UsbModel>,
    gone: bool,
    open: Option<Open>,
}

struct Open {
    signal: Arc<Signal>,
    claimed: Vec<u8>,
    in_flight: Vec<(UsbTransfer, usize)>,
    over: VecDeque<UsbCompletion>,
}

impl Plugged {
    /// Moves everything in flight as far as it goes; whether something is over now.
    fn progress(&mut self) -> bool {
        let Some(open) = &mut self.open else { return false };
        let before = open.over.len();
        let mut blocked = Vec::new();
        let mut still = Vec::new();
        for (mut transfer, mut moved) in core::mem::take(&mut open.in_flight) {
            let status = if blocked.contains(&transfer.endpoint) {
                None
            } else if self.gone {
                Some(UsbStatus::Gone)
            } else {
                usb_progress(
                    &mut *self.model,
                    transfer.kind,
                    transfer.endpoint,
                    &mut transfer.data,
                    transfer.zero_packet,
                    &mut moved,
                )
            };
            match status {
                Some(status) => open.over.push_back(UsbCompletion { transfer, actual: moved, status }),
                None => {
                    blocked.push(transfer.endpoint);
                    still.push((transfer, moved));
                }
            }
        }
        open.in_flight = still;
        open.over.len() > before
    }

    /// Ends what is in flight on `endpoints`.
    fn cancel(&mut self, which: impl Fn(&UsbTransfer) -> bool) {
        let Some(open) = &mut self.open else { return };
        let (cancelled, rest) =
            core::mem::take(&mut open.in_flight).into_iter().partition(|(transfer, _)| which(transfer));
        open.in_flight = rest;
        for (transfer, actual) in cancelled {
            open.over.push_back(UsbCompletion { transfer, actual, status: UsbStatus::Cancelled });
        }
    }

    /// The interfaces of the current configuration with their endpoints.
    fn interfaces(&self) -> Vec<(u8, Vec<u8>)> {
        let descriptors = self.model.descriptors();
        let mut current = false;
        let mut found: Vec<(u8, Vec<u8>)> = Vec::new();
        for one in walk(&descriptors) {
            match one {
                [_, 2, _, _, _, value, ..] => current = *value == self.info.configuration,
                [_, 4, number, ..] if current => found.push((*number, Vec::new())),
                [_, 5, address, ..] if current => {
                    if let Some(last) = found.last_mut() {
                        last.1.push(*address);
                    }
                }
                _ => {}
            }
        }
        found
    }

    /// The claimed interface to which `endpoint` belongs.
    fn claimed_with(&self, endpoint: u8) -> bool {
        let Some(open) = &self.open else { return false };
        self.interfaces()
            .iter()
            .any(|(number, endpoints)| open.claimed.contains(number) && endpoints.contains(&endpoint))
    }

    /// A control transfer of the host's own.
    fn control(&mut self, setup: [u8; 8]) -> Result<()> {
        match self.model.control(setup, &mut []) {
            UsbReply::Ack(_) => Ok(()),
            _ => Err(Error::Io),
        }
    }
}

impl TestHost {
    /// Plugs a device in at `path` and returns its number. It is in its first configuration.
    pub fn plug_usb(&self, path: UsbPath, mut model: Box<dyn UsbModel>) -> UsbDeviceId {
        let configuration =
            walk(&model.descriptors()).find(|one| one.get(1) == Some(&2)).map_or(0, |one| one[5]);
        model.control([0, 9, configuration, 0, 0, 0, 0, 0], &mut []);
        let mut bus = self.0.usb.lock().unwrap();
        bus.last_id += 1;
        let id = UsbDeviceId(bus.last_id);
        let address = (bus.last_id % 127 + 1) as u8;
        let info = UsbDeviceInfo { id, path, address, speed: model.speed(), configuration };
        bus.plugged.push(Plugged { info, model, gone: false, open: None });
        self.tell(bus.watcher.clone());
        id
    }

    /// Unplugs it: what is in flight ends, the rest of the world is told.
    pub fn unplug_usb(&self, device: UsbDeviceId) {
        let mut bus = self.0.usb.lock().unwrap();
        let watcher = bus.watcher.clone();
        if let Some(index) = bus.plugged.iter().position(|one| one.info.id == device) {
            let one = &mut bus.plugged[index];
            one.gone = true;
            one.progress();
            match &one.open {
                Some(open) => self.tell(Some(open.signal.clone())),
                None => drop(bus.plugged.remove(index)),
            }
        }
        self.tell(watcher);
    }

    /// Looks at everything in flight again, as a device may have something to say now. (A bus polls all the time.)
    pub fn pump_usb(&self) {
        let mut bus = self.0.usb.lock().unwrap();
        for one in &mut bus.plugged {
            if one.progress()
                && let Some(open) = &one.open
            {
                self.tell(Some(open.signal.clone()));
            }
        }
    }

    fn tell(&self, signal: Option<Arc<Signal>>) {
        if let Some(signal) = signal {
            signal.raise(self);
        }
    }

    fn with_usb<T>(&self, device: UsbDeviceId, body: impl FnOnce(&mut Plugged) -> Result<T>) -> Result<T> {
        let mut bus = self.0.usb.lock().unwrap();
        let found = bus.plugged.iter_mut().find(|one| one.info.id == device).ok_or(Error::NotFound)?;
        if found.gone {
            return Err(Error::Gone);
        }
        body(found)
    }

    fn with_open_usb<T>(
        &self,
        device: UsbDeviceId,
        body: impl FnOnce(&mut Plugged) -> Result<T>,
    ) -> Result<T> {
        self.with_usb(device, |one| if one.open.is_some() { body(one) } else { Err(Error::NotFound) })
    }
}

impl HostUsb for TestHost {
    fn usb_watch(&self, signal: Option<Arc<Signal>>) -> Result<()> {
        self.0.usb.lock().unwrap().watcher = signal;
        Ok(())
    }

    fn usb_devices(&self, found: &mut dyn FnMut(UsbDeviceInfo)) {
        let mut all: Vec<_> =
            self.0.usb.lock().unwrap().plugged.iter().filter(|one| !one.gone).map(|one| one.info).collect();
        all.sort_by_key(|info| info.path);
        all.into_iter().for_each(found);
    }

    fn usb_descriptors(&self, device: UsbDeviceId, buf: &mut [u8]) -> Result<usize> {
        self.with_usb(device, |one| {
            let all = one.model.descriptors();
            buf.get_mut(..all.len()).ok_or(Error::BufferTooSmall)?.copy_from_slice(&all);
            Ok(all.len())
        })
    }

    fn usb_open(&self, device: UsbDeviceId, signal: Arc<Signal>) -> Result<()> {
        self.with_usb(device, |one| {
            if one.open.is_some() {
                return Err(Error::Busy);
            }
            one.open =
                Some(Open { signal, claimed: Vec::new(), in_flight: Vec::new(), over: VecDeque::new() });
            Ok(())
        })
    }

    fn usb_close(&self, device: UsbDeviceId) {
        let mut bus = self.0.usb.lock().unwrap();
        if let Some(one) = bus.plugged.iter_mut().find(|one| one.info.id == device) {
            one.open = None;
        }
        bus.plugged.retain(|one| one.info.id != device || !one.gone);
    }

    fn usb_configure(&self, device: UsbDeviceId, configuration: u8) -> Result<()> {
        self.with_open_usb(device, |one| {
            if one.open.as_ref().is_some_and(|open| !open.claimed.is_empty()) {
                return Err(Error::Busy);
            }
            let known = walk(&one.model.descriptors())
                .any(|found| found.get(1) == Some(&2) && found.get(5) == Some(&configuration));
            if configuration != 0 && !known {
                return Err(Error::Invalid);
            }
            one.control([0, 9, configuration, 0, 0, 0, 0, 0])?;
            one.info.configuration = configuration;
            Ok(())
        })
    }

    fn usb_claim(&self, device: UsbDeviceId, interface: u8) -> Result<()> {
        self.with_open_usb(device, |one| {
            if !one.interfaces().iter().any(|(number, _)| *number == interface) {
                return Err(Error::Invalid);
            }
            if let Some(open) = &mut one.open
                && !open.claimed.contains(&interface)
            {
                open.claimed.push(interface);
            }
            Ok(())
        })
    }

    fn usb_release(&self, device: UsbDeviceId, interface: u8) {
        let released = self.with_open_usb(device, |one| {
            let endpoints: Vec<u8> = one
                .interfaces()
                .into_iter()
                .filter(|(number, _)| *number == interface)
                .flat_map(|(_, endpoints)| endpoints)
                .collect();
            one.cancel(|transfer| endpoints.contains(&transfer.endpoint));
            Ok(one.open.as_mut().map(|open| {
                open.claimed.retain(|number| *number != interface);
                open.signal.clone()
            }))
        });
        self.tell(released.ok().flatten());
    }

    fn usb_set_alternate(&self, device: UsbDeviceId, interface: u8, alternate: u8) -> Result<()> {
        self.with_open_usb(device, |one| {
            if !one.open.as_ref().is_some_and(|open| open.claimed.contains(&interface)) {
                return Err(Error::Invalid);
            }
            let known = walk(&one.model.descriptors()).any(
                |found| matches!(found, [_, 4, number, setting, ..] if *number == interface && *setting == alternate),
            );
            if !known {
                return Err(Error::Invalid);
            }
            one.control([1, 11, alternate, 0, interface, 0, 0, 0])
        })
    }

    fn usb_clear_halt(&self, device: UsbDeviceId, endpoint: u8) -> Result<()> {
        self.with_open_usb(device, |one| {
            if !one.claimed_with(endpoint) {
                return Err(Error::Invalid);
            }
            one.control([2, 1, 0, 0, endpoint, 0, 0, 0])
        })
    }

    fn usb_reset(&self, device: UsbDeviceId) -> Result<()> {
        let signal = self.with_open_usb(device, |one| {
            one.cancel(|_| true);
            let before = one.model.descriptors();
            one.model.bus_reset();
            if one.model.descriptors() != before {
                return Err(Error::Gone);
            }
            one.control([0, 9, one.info.configuration, 0, 0, 0, 0, 0])?;
            Ok(one.open.as_ref().map(|open| open.signal.clone()))
        })?;
        self.tell(signal);
        Ok(())
    }

    fn usb_submit(&self, device: UsbDeviceId, transfer: UsbTransfer) -> Result<(), UsbRefused> {
        let mut transfer = Some(transfer);
        let started = self.with_open_usb(device, |one| {
            let new = transfer.as_ref().ok_or(Error::Invalid)?;
            let right = match new.kind {
                UsbTransferKind::Control(setup) => {
                    new.endpoint == 0
                        && usize::from(u16::from_le_bytes([setup[6], setup[7]])) == new.data.len()
                }
                kind => {
                    let attributes = walk(&one.model.descriptors())
                        .find(|found| found.len() >= 7 && found[1] == 5 && found[2] == new.endpoint)
                        .map(|found| found[3] & 3);
                    one.claimed_with(new.endpoint)
                        && attributes == Some(if kind == UsbTransferKind::Bulk { 2 } else { 3 })
                }
            };
            let open = one.open.as_mut().ok_or(Error::NotFound)?;
            let in_use = open.in_flight.iter().any(|(other, _)| other.tag == new.tag)
                || open.over.iter().any(|other| other.transfer.tag == new.tag);
            if !right || in_use {
                return Err(Error::Invalid);
            }
            open.in_flight.extend(transfer.take().map(|new| (new, 0)));
            let signal = open.signal.clone();
            Ok(one.progress().then_some(signal))
        });
        match (started, transfer) {
            (Err(error), Some(transfer)) => Err(UsbRefused { transfer, error }),
            (started, _) => {
                self.tell(started.ok().flatten());
                Ok(())
            }
        }
    }

    fn usb_cancel(&self, device: UsbDeviceId, tag: u64) {
        let cancelled = self.with_open_usb(device, |one| {
            one.cancel(|transfer| transfer.tag == tag);
            Ok(one.open.as_ref().map(|open| open.signal.clone()))
        });
        self.tell(cancelled.ok().flatten());
    }

    fn usb_reap(&self, device: UsbDeviceId) -> Option<UsbCompletion> {
        let mut bus = self.0.usb.lock().unwrap();
        let one = bus.plugged.iter_mut().find(|one| one.info.id == device)?;
        one.progress();
        one.open.as_mut()?.over.pop_front()
    }
}
