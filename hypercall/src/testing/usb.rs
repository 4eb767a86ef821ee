//! USB devices in memory, and the [`HostUsb`] that shows them.

mod model;

pub use model::{UsbLoopback, UsbModel, UsbReply, UsbStandard, reply, usb_progress};

use super::TestHost;
use crate::*;
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use model::walk;

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
    in_flight: Vec<Flight>,
    over: VecDeque<UsbCompletion>,
}

struct Flight {
    transfer: UsbTransfer,
    /// Its data in one piece, and how much of that was moved.
    flat: Vec<u8>,
    moved: usize,
}

impl Flight {
    fn new(transfer: UsbTransfer) -> Self {
        let mut flat = alloc::vec![0; transfer.len()];
        transfer.gather(&mut flat);
        Self { transfer, flat, moved: 0 }
    }

    fn over(self, status: UsbStatus) -> UsbCompletion {
        let Self { mut transfer, flat, moved } = self;
        transfer.scatter(&flat);
        UsbCompletion { transfer, actual: moved, status }
    }
}

impl Plugged {
    /// Moves everything in flight as far as it goes; whether something is over now.
    fn progress(&mut self) -> bool {
        let Some(open) = &mut self.open else { return false };
        let before = open.over.len();
        let mut blocked = Vec::new();
        let mut still = Vec::new();
        for mut flight in core::mem::take(&mut open.in_flight) {
            let UsbTransfer { kind, endpoint, zero_packet, .. } = flight.transfer;
            let status = if blocked.contains(&endpoint) {
                None
            } else if self.gone {
                Some(UsbStatus::Gone)
            } else {
                let (data, moved) = (&mut flight.flat, &mut flight.moved);
                usb_progress(&mut *self.model, kind, endpoint, data, zero_packet, moved)
            };
            match status {
                Some(status) => open.over.push_back(flight.over(status)),
                None => {
                    blocked.push(endpoint);
                    still.push(flight);
                }
            }
        }
        open.in_flight = still;
        open.over.len() > before
    }

    /// Ends what is in flight on `endpoints`.
    fn cancel(&mut self, which: impl Fn(&UsbTransfer) -> bool) {
        let Some(open) = &mut self.open else { return };
        let (cancelled, rest): (Vec<_>, Vec<_>) =
            core::mem::take(&mut open.in_flight).into_iter().partition(|flight| which(&flight.transfer));
        open.in_flight = rest;
        open.over.extend(cancelled.into_iter().map(|flight| flight.over(UsbStatus::Cancelled)));
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
                    new.endpoint == 0 && usize::from(u16::from_le_bytes([setup[6], setup[7]])) == new.len()
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
            let in_use = open.in_flight.iter().any(|other| other.transfer.tag == new.tag)
                || open.over.iter().any(|other| other.transfer.tag == new.tag);
            if !right || in_use {
                return Err(Error::Invalid);
            }
            open.in_flight.extend(transfer.take().map(Flight::new));
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
