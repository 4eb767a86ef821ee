//! The host's devices as a controller without ports: transfers go to the host as they are.

use super::worker::Worker;
use crate::controller::*;
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;
use hypercall::{Error, Host, HostUsb, UsbCompletion, UsbDeviceId, UsbTransfer, UsbTransferKind};

const MAX_TRANSFER: usize = 1 << 20;

struct Open {
    id: UsbDeviceId,
    kinds: BTreeMap<u8, EndpointKind>,
    halted: BTreeSet<u8>,
    /// A failure that is told once nothing of its endpoint is in flight any more, with what was flushed behind it.
    held_back: BTreeMap<u8, Vec<Event>>,
    detaching: Option<CommandTag>,
}

struct Flight {
    slot: Slot,
    endpoint: u8,
    setup: Option<[u8; 8]>,
}

/// See the module.
pub(super) struct PlatformController<H: Host + HostUsb> {
    host: H,
    info: ControllerInfo,
    open: BTreeMap<u32, Open>,
    flights: BTreeMap<u64, Flight>,
    events: VecDeque<Event>,
    worker: Arc<Worker<H>>,
}

impl<H: Host + HostUsb> PlatformController<H> {
    pub(super) fn new(host: H, worker: Arc<Worker<H>>) -> Self {
        let info = ControllerInfo {
            name: "platform".into(),
            ports: 0,
            max_slots: u32::MAX,
            max_transfer_bytes: MAX_TRANSFER,
            max_buffers: usize::MAX,
        };
        let (open, flights, events) = (BTreeMap::new(), BTreeMap::new(), VecDeque::new());
        Self { host, info, open, flights, events, worker }
    }

    fn in_flight(&self, slot: Slot, endpoint: Option<u8>) -> Vec<u64> {
        let of_it = self.flights.iter().filter(|(_, flight)| {
            flight.slot == slot && endpoint.is_none_or(|endpoint| flight.endpoint == endpoint)
        });
        of_it.map(|(tag, _)| *tag).collect()
    }

    /// A transfer of the host is over.
    fn over(&mut self, slot: Slot, completion: UsbCompletion) {
        let UsbCompletion { transfer, actual, status } = completion;
        let Some(flight) = self.flights.remove(&transfer.tag) else { return };
        let (actual, endpoint) = (actual.min(transfer.len()), flight.endpoint);
        let back = Transfer {
            token: Token(transfer.tag),
            slot,
            endpoint,
            setup: flight.setup,
            data: transfer.data,
            zero_packet: transfer.zero_packet,
        };
        let event = Event::Transfer { transfer: back, actual, status };
        let others = self.in_flight(slot, Some(endpoint));
        let Some(open) = self.open.get_mut(&slot.0) else { return self.events.push_back(event) };
        let fails = !matches!(status, Status::Done | Status::Cancelled) && endpoint != 0;
        if fails && open.halted.insert(endpoint) {
            for tag in &others {
                self.host.usb_cancel(open.id, *tag);
            }
            open.held_back.insert(endpoint, Vec::new());
        }
        match open.held_back.get_mut(&endpoint) {
            Some(held) => {
                held.push(event);
                if others.is_empty() {
                    let held = open.held_back.remove(&endpoint).unwrap_or_default();
                    self.events.extend(held);
                }
            }
            None => self.events.push_back(event),
        }
    }

    /// Closes what has nothing in flight any more.
    fn finish_detaching(&mut self) {
        let ready: Vec<u32> = self
            .open
            .iter()
            .filter(|(slot, open)| {
                open.detaching.is_some() && self.flights.values().all(|flight| flight.slot.0 != **slot)
            })
            .map(|(slot, _)| *slot)
            .collect();
        for slot in ready {
            let Some(open) = self.open.remove(&slot) else { continue };
            drop(self.worker.call(move |host| host.usb_close(open.id)));
            if let Some(tag) = open.detaching {
                self.events.push_back(Event::Command { tag, result: Ok(Outcome::Done) });
            }
        }
    }
}

fn refusal(error: Error) -> ControllerError {
    match error {
        Error::WouldBlock => ControllerError::Full,
        Error::NoMemory => ControllerError::NoMemory,
        Error::Gone | Error::NotFound | Error::Io => ControllerError::NoAnswer,
        _ => ControllerError::Invalid,
    }
}

impl<H: Host + HostUsb> HostController for PlatformController<H> {
    fn info(&self) -> &ControllerInfo {
        &self.info
    }

    fn port_status(&mut self, _: RootPort) -> PortStatus {
        PortStatus::default()
    }

    fn port_action(&mut self, _: RootPort, _: PortAction) {}

    fn command(&mut self, tag: CommandTag, command: Command) -> Result<(), ControllerError> {
        let mut result = Err(ControllerError::Invalid);
        match command {
            // The device is open; the slot says which. The endpoints say what kind they are.
            Command::Configure { slot, remove, add, .. } => {
                if let Some(open) = self.open.get_mut(&slot.0) {
                    for address in remove {
                        open.kinds.remove(&address);
                        open.halted.remove(&address);
                    }
                    open.kinds.extend(add.iter().map(|spec| (spec.address, spec.kind)));
                    result = Ok(Outcome::Done);
                }
            }
            Command::ResetEndpoint { slot, endpoint } => {
                if let Some(open) = self.open.get_mut(&slot.0) {
                    open.halted.remove(&endpoint);
                    result = Ok(Outcome::Done);
                }
            }
            Command::Readdress { slot, .. } => {
                if let Some(open) = self.open.get_mut(&slot.0) {
                    open.halted.clear();
                    result = Ok(Outcome::Done);
                }
            }
            Command::Detach { slot } => {
                let tags = self.in_flight(slot, None);
                if let Some(open) = self.open.get_mut(&slot.0) {
                    tags.into_iter().for_each(|one| self.host.usb_cancel(open.id, one));
                    open.detaching = Some(tag);
                    self.finish_detaching();
                    return Ok(());
                }
                result = Ok(Outcome::Done);
            }
            Command::Attach { .. } | Command::SetMaxPacket { .. } => {}
        }
        self.events.push_back(Event::Command { tag, result });
        Ok(())
    }

    fn submit(&mut self, transfer: Transfer) -> Result<(), Box<Refused>> {
        let refuse = |transfer, error| Err(Box::new(Refused { transfer, error }));
        // Opened by [`open`], under the number that the platform gave.
        let slot = transfer.slot;
        let open = self.open.entry(slot.0).or_insert_with(|| Open {
            id: UsbDeviceId(u64::from(slot.0)),
            kinds: BTreeMap::new(),
            halted: BTreeSet::new(),
            held_back: BTreeMap::new(),
            detaching: None,
        });
        let kind = match (transfer.setup, open.kinds.get(&transfer.endpoint)) {
            (Some(setup), _) => UsbTransferKind::Control(setup),
            (None, Some(EndpointKind::Bulk)) => UsbTransferKind::Bulk,
            (None, Some(EndpointKind::Interrupt)) => UsbTransferKind::Interrupt,
            _ => return refuse(transfer, ControllerError::Invalid),
        };
        if open.halted.contains(&transfer.endpoint) {
            return refuse(transfer, ControllerError::Halted);
        }
        if open.detaching.is_some() {
            return refuse(transfer, ControllerError::Invalid);
        }
        let Transfer { token, slot, endpoint, setup, data, zero_packet } = transfer;
        let one = UsbTransfer { kind, endpoint, data, zero_packet, tag: token.0 };
        match self.host.usb_submit(open.id, one) {
            Ok(()) => {
                self.flights.insert(token.0, Flight { slot, endpoint, setup });
                Ok(())
            }
            Err(refused) => {
                let data = refused.transfer.data;
                let transfer = Transfer { token, slot, endpoint, setup, data, zero_packet };
                refuse(transfer, refusal(refused.error))
            }
        }
    }

    fn flush(&mut self) {}

    fn cancel(&mut self, token: Token) {
        let slot = self.flights.get(&token.0).map(|flight| flight.slot.0);
        if let Some(open) = slot.and_then(|slot| self.open.get(&slot)) {
            self.host.usb_cancel(open.id, token.0);
        }
    }

    fn poll(&mut self, events: &mut VecDeque<Event>) {
        let open: Vec<_> = self.open.iter().map(|(slot, open)| (Slot(*slot), open.id)).collect();
        for (slot, id) in open {
            // Bounded by what is in flight.
            for _ in 0..=self.flights.len() {
                let Some(completion) = self.host.usb_reap(id) else { break };
                self.over(slot, completion);
            }
        }
        self.finish_detaching();
        events.append(&mut self.events);
    }

    fn arm(&mut self) -> bool {
        // The host always raises the signal.
        !self.events.is_empty()
    }
}

impl<H: Host + HostUsb> Drop for PlatformController<H> {
    fn drop(&mut self) {
        for open in self.open.values() {
            self.host.usb_close(open.id);
        }
    }
}
