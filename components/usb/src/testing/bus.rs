//! The controller and its root ports.

use crate::controller::*;
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;
use hypercall::testing::{TestHost, UsbModel, usb_progress};
use hypercall::{Clock, Signal, Threads, UsbTransferKind};
use std::sync::{Mutex, MutexGuard};

/// How long the reset of a port takes.
const RESET_NS: u64 = 12_000_000;

/// A device that is plugged in somewhere.
pub(super) struct Plugged {
    pub(super) model: Box<dyn UsbModel>,
    /// Its ports, if it is a hub.
    pub(super) ports: Vec<Cell>,
    pub(super) gone: bool,
    /// Answers at address 0.
    pub(super) default: bool,
}

pub(super) type Device = Arc<Mutex<Plugged>>;
/// A port, of the root hub or of another.
pub(super) type Cell = Arc<Mutex<Port>>;

#[derive(Default)]
pub(super) struct Port {
    pub(super) device: Option<Device>,
    pub(super) enabled: bool,
    pub(super) reset_until_ns: Option<u64>,
    pub(super) connect_changed: bool,
    pub(super) reset_changed: bool,
    /// Something to report.
    pub(super) news: bool,
}

impl Port {
    pub(super) fn plug(&mut self, device: Device) {
        self.unplug();
        self.device = Some(device);
        self.connect_changed = true;
        self.news = true;
    }

    pub(super) fn unplug(&mut self) -> bool {
        self.enabled = false;
        let Some(device) = self.device.take() else { return false };
        pull(&device);
        self.connect_changed = true;
        self.news = true;
        true
    }

    pub(super) fn reset(&mut self, now_ns: u64) {
        self.enabled = false;
        self.reset_until_ns = Some(now_ns + RESET_NS);
    }

    /// Ends a reset whose time has come.
    pub(super) fn advance(&mut self, now_ns: u64) {
        if self.reset_until_ns.is_some_and(|until| now_ns >= until) {
            self.reset_until_ns = None;
            self.reset_changed = true;
            self.news = true;
            if let Some(device) = &self.device {
                let mut device = device.lock().unwrap();
                device.model.bus_reset();
                device.default = true;
                self.enabled = true;
            }
        }
    }

    pub(super) fn speed(&self) -> Option<Speed> {
        self.device.as_ref().map(|device| device.lock().unwrap().model.speed())
    }
}

/// A hub takes everything behind it along.
fn pull(device: &Device) {
    let mut device = device.lock().unwrap();
    device.gone = true;
    for port in &device.ports {
        port.lock().unwrap().unplug();
    }
}

struct Held {
    device: Device,
    endpoints: BTreeMap<u8, EndpointSpec>,
    halted: BTreeSet<u8>,
}

struct Flight {
    transfer: Transfer,
    flat: Vec<u8>,
    moved: usize,
    cancelled: bool,
}

pub(super) struct Inner<H> {
    host: H,
    signal: Arc<Signal>,
    info: ControllerInfo,
    ports: Vec<Cell>,
    slots: BTreeMap<u32, Held>,
    next_slot: u32,
    flights: Vec<Flight>,
    events: VecDeque<Event>,
    /// Every token that was ever accepted and is not back.
    tokens: BTreeSet<u64>,
    pub(super) accepted: u64,
    pub(super) completed: u64,
}

/// What a test holds: plugs and unplugs.
#[derive(Clone)]
pub struct ModelBus<H = TestHost>(Arc<Mutex<Inner<H>>>);

/// What a model takes the time from, and wakes by.
pub trait ModelHost: Clock + Threads + Copy + Send + 'static {}

impl<H: Clock + Threads + Copy + Send + 'static> ModelHost for H {}

/// What the stack gets.
pub struct ModelController<H> {
    bus: ModelBus<H>,
    info: ControllerInfo,
}

impl<H: ModelHost> ModelBus<H> {
    /// A controller with `ports` root ports and room for `max_slots` devices, on the clock of `host`.
    pub fn new(host: H, ports: u8, max_slots: u32) -> Self {
        let info = ControllerInfo {
            name: "model".into(),
            ports,
            max_slots,
            max_transfer_bytes: 1 << 20,
            max_buffers: 256,
        };
        Self(Arc::new(Mutex::new(Inner {
            host,
            signal: Arc::new(Signal::new()),
            info,
            ports: (0..ports).map(|_| Cell::default()).collect(),
            slots: BTreeMap::new(),
            next_slot: 1,
            flights: Vec::new(),
            events: VecDeque::new(),
            tokens: BTreeSet::new(),
            accepted: 0,
            completed: 0,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner<H>> {
        self.0.lock().unwrap()
    }

    /// The controller, and the signal that it raises.
    pub fn controller(&self) -> (Box<dyn HostController>, Arc<Signal>) {
        let inner = self.lock();
        (Box::new(ModelController { bus: self.clone(), info: inner.info.clone() }), inner.signal.clone())
    }

    fn port(&self, port: u8) -> Cell {
        self.lock().ports[usize::from(port) - 1].clone()
    }

    /// Plugs a device into a root port.
    pub fn plug(&self, port: u8, model: impl UsbModel + 'static) {
        self.plug_device(port, model, Vec::new());
    }

    pub(super) fn plug_device(&self, port: u8, model: impl UsbModel + 'static, ports: Vec<Cell>) {
        let device = Plugged { model: Box::new(model), ports, gone: false, default: false };
        self.port(port).lock().unwrap().plug(Arc::new(Mutex::new(device)));
        self.kick();
    }

    /// Pulls out what is in a root port. Says whether there was anything.
    pub fn unplug(&self, port: u8) -> bool {
        let was = self.port(port).lock().unwrap().unplug();
        self.kick();
        was
    }

    /// Raises the signal: a device may have something to say.
    pub fn kick(&self) {
        let inner = self.lock();
        inner.signal.raise(&inner.host);
    }

    /// Whether a root port is enabled.
    pub fn enabled(&self, port: u8) -> bool {
        self.port(port).lock().unwrap().enabled
    }

    /// Transfers accepted, and those that came back.
    pub fn transfers(&self) -> (u64, u64) {
        let inner = self.lock();
        (inner.accepted, inner.completed)
    }

    /// How many devices the controller holds.
    pub fn slots(&self) -> usize {
        self.lock().slots.len()
    }

    /// Drops every device: hubs know their bus, and neither would go otherwise.
    pub fn clear(&self) {
        let (ports, slots) = {
            let mut inner = self.lock();
            (inner.ports.clone(), core::mem::take(&mut inner.slots))
        };
        for port in ports {
            port.lock().unwrap().unplug();
        }
        drop(slots);
    }
}

impl<H: ModelHost> Inner<H> {
    fn at(&self, place: &Place) -> Option<Cell> {
        let mut cell = self.ports.get(usize::from(place.root_port.0) - 1)?.clone();
        let mut route = place.route;
        while route != 0 {
            let device = cell.lock().unwrap().device.clone()?;
            let next = device.lock().unwrap().ports.get((route & 15) as usize - 1)?.clone();
            cell = next;
            route >>= 4;
        }
        Some(cell)
    }

    fn held(&mut self, slot: Slot) -> Result<&mut Held, ControllerError> {
        self.slots.get_mut(&slot.0).ok_or(ControllerError::Invalid)
    }

    /// Ends the transfers that `which` names.
    fn flush(&mut self, which: impl Fn(&Transfer) -> bool, status: Status) {
        let (over, left) =
            core::mem::take(&mut self.flights).into_iter().partition(|flight| which(&flight.transfer));
        self.flights = left;
        let over: Vec<Flight> = over;
        for flight in over {
            self.over(flight, status);
        }
    }

    fn over(&mut self, mut flight: Flight, status: Status) {
        if flight.transfer.is_in() {
            let mut from = &flight.flat[..];
            for buffer in &mut flight.transfer.data {
                let (part, rest) = from.split_at(buffer.len());
                buffer.copy_from_slice(part);
                from = rest;
            }
        }
        assert!(self.tokens.remove(&flight.transfer.token.0), "a transfer completes twice");
        self.completed += 1;
        self.events.push_back(Event::Transfer { transfer: flight.transfer, actual: flight.moved, status });
    }

    fn do_command(&mut self, command: Command) -> Result<Outcome, ControllerError> {
        match command {
            Command::Attach { place, max_packet } => {
                if self.slots.len() >= self.info.max_slots as usize {
                    return Err(ControllerError::NoSlot);
                }
                assert!([8, 64, 512].contains(&max_packet), "packets of {max_packet} bytes");
                let cell = self.at(&place).ok_or(ControllerError::Invalid)?;
                let port = cell.lock().unwrap();
                let device = port.device.clone().filter(|_| port.enabled).ok_or(ControllerError::NoAnswer)?;
                drop(port);
                if !core::mem::take(&mut device.lock().unwrap().default) {
                    return Err(ControllerError::NoAnswer);
                }
                let slot = self.next_slot;
                self.next_slot += 1;
                self.slots.insert(slot, Held { device, endpoints: BTreeMap::new(), halted: BTreeSet::new() });
                Ok(Outcome::Attached { slot: Slot(slot), address: (slot % 127 + 1) as u8 })
            }
            Command::SetMaxPacket { slot, max_packet } => {
                assert!([8, 16, 32, 64].contains(&max_packet));
                self.held(slot).map(|_| Outcome::Done)
            }
            Command::Configure { slot, remove, add, .. } => {
                self.held(slot)?;
                self.flush(|one| one.slot == slot && remove.contains(&one.endpoint), Status::Cancelled);
                let held = self.held(slot)?;
                for address in remove {
                    assert!(held.endpoints.remove(&address).is_some(), "{address:#x} was not set up");
                    held.halted.remove(&address);
                }
                for spec in add {
                    assert!(spec.max_packet > 0 && spec.max_packet <= 1024 && spec.address & 0x0f != 0);
                    assert!(matches!(spec.kind, EndpointKind::Bulk | EndpointKind::Interrupt));
                    let before = held.endpoints.insert(spec.address, spec);
                    assert!(before.is_none(), "{:#x} is set up twice", spec.address);
                }
                Ok(Outcome::Done)
            }
            Command::ResetEndpoint { slot, endpoint } => {
                let busy = self
                    .flights
                    .iter()
                    .any(|one| (one.transfer.slot, one.transfer.endpoint) == (slot, endpoint));
                assert!(!busy, "an endpoint with transfers in flight is reset");
                self.held(slot)?.halted.remove(&endpoint);
                Ok(Outcome::Done)
            }
            Command::Readdress { slot, .. } => {
                self.flush(|one| one.slot == slot, Status::Cancelled);
                let held = self.held(slot)?;
                held.endpoints.clear();
                held.halted.clear();
                if core::mem::take(&mut held.device.lock().unwrap().default) {
                    Ok(Outcome::Done)
                } else {
                    Err(ControllerError::NoAnswer)
                }
            }
            Command::Detach { slot } => {
                self.flush(|one| one.slot == slot, Status::Gone);
                self.slots.remove(&slot.0);
                Ok(Outcome::Done)
            }
        }
    }

    fn check(&mut self, transfer: &Transfer) -> Result<(), ControllerError> {
        let most = self.info.max_buffers;
        let held = self.held(transfer.slot)?;
        if transfer.data.len() > most {
            return Err(ControllerError::Invalid);
        }
        match transfer.setup {
            Some([.., low, high]) => {
                assert_eq!(usize::from(u16::from_le_bytes([low, high])), transfer.len(), "wLength");
                assert_eq!(transfer.endpoint, 0);
                Ok(())
            }
            None if !held.endpoints.contains_key(&transfer.endpoint) => Err(ControllerError::Invalid),
            None if held.halted.contains(&transfer.endpoint) => Err(ControllerError::Halted),
            None => Ok(()),
        }
    }

    /// Lets every device do what it can.
    fn progress(&mut self) {
        let mut blocked: BTreeSet<(Slot, u8)> = BTreeSet::new();
        let mut index = 0;
        while index < self.flights.len() {
            let flight = &mut self.flights[index];
            let at = (flight.transfer.slot, flight.transfer.endpoint);
            if flight.cancelled {
                let flight = self.flights.remove(index);
                self.over(flight, Status::Cancelled);
                continue;
            }
            if blocked.contains(&at) {
                index += 1;
                continue;
            }
            let device = self.slots[&at.0.0].device.clone();
            let mut device = device.lock().unwrap();
            let status = if device.gone {
                Some(Status::Error)
            } else {
                let kind = match flight.transfer.setup {
                    Some(setup) => UsbTransferKind::Control(setup),
                    None => UsbTransferKind::Bulk,
                };
                usb_progress(
                    &mut *device.model,
                    kind,
                    at.1,
                    &mut flight.flat,
                    flight.transfer.zero_packet,
                    &mut flight.moved,
                )
            };
            drop(device);
            match status {
                None => {
                    blocked.insert(at);
                    index += 1;
                }
                Some(status) => {
                    let flight = self.flights.remove(index);
                    self.over(flight, status);
                    if status != Status::Done && at.1 != 0 {
                        if let Ok(held) = self.held(at.0) {
                            held.halted.insert(at.1);
                        }
                        self.flush(|one| (one.slot, one.endpoint) == at, Status::Cancelled);
                        index = 0;
                    }
                }
            }
        }
    }
}

impl<H: ModelHost> HostController for ModelController<H> {
    fn info(&self) -> &ControllerInfo {
        &self.info
    }

    fn port_status(&mut self, port: RootPort) -> PortStatus {
        let now_ns = self.bus.lock().host.monotonic_ns();
        let cell = self.bus.port(port.0);
        let mut cell = cell.lock().unwrap();
        cell.advance(now_ns);
        let speed = cell.speed();
        PortStatus {
            connected: cell.device.is_some(),
            enabled: cell.enabled,
            resetting: cell.reset_until_ns.is_some(),
            powered: true,
            super_speed: speed.is_some_and(|speed| speed >= Speed::Super),
            speed: speed.filter(|_| cell.enabled),
            connect_changed: cell.connect_changed,
            reset_changed: cell.reset_changed,
            ..PortStatus::default()
        }
    }

    fn port_action(&mut self, port: RootPort, action: PortAction) {
        let now_ns = self.bus.lock().host.monotonic_ns();
        let cell = self.bus.port(port.0);
        let mut cell = cell.lock().unwrap();
        match action {
            PortAction::PowerOn | PortAction::Resume | PortAction::Resumed => {}
            PortAction::Reset | PortAction::WarmReset => cell.reset(now_ns),
            PortAction::Disable => cell.enabled = false,
            PortAction::ClearChanges => (cell.connect_changed, cell.reset_changed) = (false, false),
        }
    }

    fn command(&mut self, tag: CommandTag, command: Command) -> Result<(), ControllerError> {
        let mut bus = self.bus.lock();
        let result = bus.do_command(command);
        bus.events.push_back(Event::Command { tag, result });
        Ok(())
    }

    fn submit(&mut self, transfer: Transfer) -> Result<(), Box<Refused>> {
        let mut bus = self.bus.lock();
        if let Err(error) = bus.check(&transfer) {
            return Err(Box::new(Refused { transfer, error }));
        }
        let flat = match transfer.is_in() {
            true => alloc::vec![0; transfer.len()],
            false => transfer.data.concat(),
        };
        assert!(bus.tokens.insert(transfer.token.0), "a token is used twice");
        bus.accepted += 1;
        bus.flights.push(Flight { transfer, flat, moved: 0, cancelled: false });
        Ok(())
    }

    fn flush(&mut self) {}

    fn cancel(&mut self, token: Token) {
        let mut bus = self.bus.lock();
        if let Some(flight) = bus.flights.iter_mut().find(|flight| flight.transfer.token == token) {
            flight.cancelled = true;
        }
    }

    fn poll(&mut self, events: &mut VecDeque<Event>) {
        let mut bus = self.bus.lock();
        let now_ns = bus.host.monotonic_ns();
        for (index, cell) in bus.ports.clone().iter().enumerate() {
            let mut cell = cell.lock().unwrap();
            cell.advance(now_ns);
            if core::mem::take(&mut cell.news) {
                bus.events.push_back(Event::Port(RootPort(index as u8 + 1)));
            }
        }
        bus.progress();
        events.append(&mut bus.events);
    }

    fn arm(&mut self) -> bool {
        !self.bus.lock().events.is_empty()
    }
}

impl<H> Drop for ModelController<H> {
    fn drop(&mut self) {
        // Whoever drops a controller loses what is in flight, on purpose.
        let mut bus = self.bus.0.lock().unwrap();
        bus.tokens.clear();
        bus.flights.clear();
    }
}
