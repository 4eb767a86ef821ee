//! The controller: what it consists of, its ports, and what the stack asks of it (xHCI 1.2, chapter 4).
//!
//! `commands` gives it commands and goes on with what they were for, `events` is what it says, `transfers` what devices are
//! sent and asked, `end` its end.
//!
//! Nothing that it says is trusted: slot numbers, endpoint numbers and addresses in events are looked up among our own,
//! lengths are cut to what was asked for, and what names nothing of ours is counted and ignored. A controller that says
//! only such things, or nothing at all, is given up.

mod commands;
mod end;
mod events;
mod transfers;

pub(crate) use end::{halt, run, wait};

use crate::context;
use crate::dma::vouch;
use crate::endpoint::InFlight;
use crate::regs::{Port, Registers, STUCK_LINKS, interrupter, link, op};
use crate::ring::{Commands, Events};
use crate::slot::{Job, Purpose, Slot as Device};
use crate::trb::{Trb, kind};
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use anykernel::counter::Counter;
use anykernel::driver::{DmaMemory, Quiet};
use anykernel_usb::controller::{
    Command, CommandTag, ControllerError, ControllerInfo, Event, HostController, Outcome, Place, PortAction,
    PortStatus, Refused, RootPort, Speed, Status, Token, Transfer,
};
use hypercall::{DeviceHost, IrqId};

/// Most commands of the stack that are waiting.
const MAX_COMMANDS: usize = 256;

/// A command on the ring.
enum Pending {
    Enable {
        tag: CommandTag,
        place: Place,
        max_packet: u16,
    },
    /// A slot that we have no memory for is given back.
    Discard {
        tag: CommandTag,
    },
    /// The next of the slot's first job.
    Slot(u8),
}

/// What goes to the stack at the next poll, and what of it is awaited.
#[derive(Default)]
struct Outbox {
    events: VecDeque<Event>,
    tokens: BTreeMap<Token, (u8, u8)>,
}

impl Outbox {
    fn finish<H: hypercall::Dma>(
        &mut self,
        transfer: InFlight<H>,
        actual: usize,
        status: Status,
        quiet: &Quiet,
    ) {
        self.tokens.remove(&transfer.token());
        let actual = actual.min(transfer.bytes);
        self.events.push_back(Event::Transfer { transfer: transfer.reclaim(quiet), actual, status });
    }

    fn command(&mut self, tag: CommandTag, result: Result<Outcome, ControllerError>) {
        self.events.push_back(Event::Command { tag, result });
    }
}

/// An event ring with its registers.
pub(crate) struct Interrupter<H: DeviceHost> {
    pub(crate) events: Events<H>,
    pub(crate) registers: Registers<H>,
    /// Events taken since the controller was told where we are.
    pub(crate) taken: usize,
    /// None was taken since it was told that we are ready for an interrupt.
    pub(crate) armed: bool,
}

impl<H: DeviceHost> Interrupter<H> {
    fn took(&mut self, count: usize) {
        self.taken += count;
        self.armed &= count == 0;
    }
}

/// How the controller interrupts.
pub(crate) enum Interrupts {
    Msix(Vec<IrqId>),
    Line(IrqId),
    /// Not at all: it must be polled.
    None,
}

/// What setting up comes to.
pub(crate) struct Parts<H: DeviceHost> {
    pub(crate) host: H,
    pub(crate) info: ControllerInfo,
    pub(crate) operational: Registers<H>,
    pub(crate) doorbells: Registers<H>,
    /// Of a context: 32 or 64.
    pub(crate) stride: usize,
    /// Which ports are USB 3's, from port 1 on.
    pub(crate) super_speed: Vec<bool>,
    pub(crate) contexts: DmaMemory<H>,
    pub(crate) scratch: Vec<DmaMemory<H>>,
    pub(crate) commands: DmaCommands<H>,
    pub(crate) interrupters: Vec<Interrupter<H>>,
    pub(crate) interrupts: Interrupts,
    pub(crate) spurious: Counter,
    pub(crate) lost: Counter,
}

/// See [`Parts`].
pub(crate) struct DmaCommands<H: DeviceHost>(Commands<H, Pending>);

impl<H: DeviceHost> DmaCommands<H> {
    pub(crate) fn new(host: H) -> hypercall::Result<Self> {
        Commands::new(host).map(Self)
    }

    pub(crate) fn start(&self) -> u64 {
        self.0.start()
    }
}

/// An xHCI host controller.
pub(crate) struct Xhci<H: DeviceHost> {
    /// `None` once it was given up.
    parts: Option<Parts<H>>,
    host: H,
    info: ControllerInfo,
    /// By slot number.
    slots: Vec<Option<Box<Device<H>>>>,
    waiting: VecDeque<(Trb, Pending)>,
    outbox: Outbox,
    /// Endpoints that have something new, perhaps.
    rung: Vec<(u8, u8)>,
    next_number: u64,
    spurious_in_a_row: u32,
    commands_in_flight: usize,
    /// When the last command was given or ended, and how often we looked since it was late.
    commands_moved_ns: u64,
    late_looks: u32,
    scratch: Vec<Trb>,
}

impl<H: DeviceHost> Xhci<H> {
    pub(crate) fn new(parts: Parts<H>) -> Self {
        let slots = (0..=parts.info.max_slots).map(|_| None).collect();
        Self {
            host: parts.host,
            info: parts.info.clone(),
            parts: Some(parts),
            slots,
            waiting: VecDeque::new(),
            outbox: Outbox::default(),
            rung: Vec::new(),
            next_number: 1,
            spurious_in_a_row: 0,
            commands_in_flight: 0,
            commands_moved_ns: 0,
            late_looks: 0,
            scratch: Vec::new(),
        }
    }

    fn slot(&mut self, number: u8) -> Option<&mut Device<H>> {
        self.slots.get_mut(usize::from(number))?.as_deref_mut()
    }

    fn port_register(&self, port: RootPort) -> Option<(Registers<H>, usize)> {
        let parts = self.parts.as_ref()?;
        let index = usize::from(port.0).checked_sub(1).filter(|_| port.0 <= self.info.ports)?;
        Some((parts.operational, op::PORTS + index * op::PORT_BYTES))
    }

    /// Which interrupter the events of a slot's endpoints go to: the first is for everything else, if there are others.
    fn interrupter(&self, slot: u8) -> u16 {
        match self.parts.as_ref().map_or(1, |parts| parts.interrupters.len()) {
            0 | 1 => 0,
            count => 1 + u16::from(slot) % (count as u16 - 1),
        }
    }
}

impl<H: DeviceHost> HostController for Xhci<H> {
    fn info(&self) -> &ControllerInfo {
        &self.info
    }

    fn port_status(&mut self, port: RootPort) -> PortStatus {
        let Some((registers, at)) = self.port_register(port) else { return PortStatus::default() };
        let bits = registers.read(at);
        if bits == u32::MAX {
            self.die("it is gone");
            return PortStatus::default();
        }
        let state = Port::from_bits_retain(bits);
        let super_speed = self
            .parts
            .as_ref()
            .and_then(|parts| parts.super_speed.get(usize::from(port.0) - 1).copied())
            .unwrap_or(false);
        let enabled = state.contains(Port::ENABLED);
        let speed = match state.speed() {
            1 => Some(Speed::Full),
            2 => Some(Speed::Low),
            3 => Some(Speed::High),
            4 => Some(Speed::Super),
            5.. => Some(Speed::SuperPlus),
            0 => None,
        };
        PortStatus {
            connected: state.contains(Port::CONNECTED),
            enabled: enabled && speed.is_some(),
            resetting: state.intersects(Port::RESET),
            powered: state.contains(Port::POWER),
            over_current: state.contains(Port::OVER_CURRENT),
            super_speed,
            needs_warm_reset: super_speed && STUCK_LINKS.contains(&state.link()),
            suspended: enabled && [link::U3, link::RESUME].contains(&state.link()),
            speed,
            connect_changed: state.contains(Port::CONNECT_CHANGE),
            reset_changed: state.intersects(Port::RESET_CHANGE | Port::WARM_RESET_CHANGE),
        }
    }

    fn port_action(&mut self, port: RootPort, action: PortAction) {
        let Some((registers, at)) = self.port_register(port) else { return };
        let bits = registers.read(at);
        if bits == u32::MAX {
            return self.die("it is gone");
        }
        let state = Port::from_bits_retain(bits);
        let super_speed = self
            .parts
            .as_ref()
            .and_then(|parts| parts.super_speed.get(usize::from(port.0) - 1).copied())
            .unwrap_or(false);
        let value = state.kept()
            | match action {
                PortAction::PowerOn => Port::POWER,
                PortAction::WarmReset if super_speed => Port::WARM_RESET,
                PortAction::Reset | PortAction::WarmReset => Port::RESET,
                PortAction::Disable => Port::ENABLED,
                // A USB 3 link wakes by itself; USB 2's is driven for a while (4.15.2).
                PortAction::Resume if !super_speed => Port::to_link(link::RESUME),
                PortAction::Resume | PortAction::Resumed => Port::to_link(link::U0),
                PortAction::ClearChanges => state & Port::CHANGES,
            };
        registers.write(at, value.bits());
    }

    fn command(&mut self, tag: CommandTag, command: Command) -> Result<(), ControllerError> {
        if self.parts.is_none() {
            return Err(ControllerError::Dead);
        }
        let waiting: usize = self.slots.iter().flatten().map(|slot| slot.jobs.len()).sum();
        if waiting + self.waiting.len() >= MAX_COMMANDS {
            return Err(ControllerError::Full);
        }
        let (slot, purpose) = match command {
            Command::Attach { place, max_packet } => {
                self.give(
                    Trb::command(kind::ENABLE_SLOT, 0, 0, 0),
                    Pending::Enable { tag, place, max_packet },
                );
                return Ok(());
            }
            Command::SetMaxPacket { slot, max_packet } => (slot, Purpose::SetMaxPacket(max_packet)),
            Command::Configure { slot, remove, add, hub } => {
                let number = u8::try_from(slot.0).unwrap_or(0);
                let speed = self.slot(number).map_or(Speed::High, |slot| slot.context.place.speed);
                match self.endpoints(number, speed, &add) {
                    Ok(add) => (slot, Purpose::Configure { remove: context::indices(&remove), add, hub }),
                    Err(error) => {
                        self.outbox.command(tag, Err(error));
                        return Ok(());
                    }
                }
            }
            Command::ResetEndpoint { slot, endpoint } => (slot, Purpose::Reset(context::index_of(endpoint))),
            Command::Readdress { slot, max_packet } => (slot, Purpose::Readdress(max_packet)),
            Command::Detach { slot } => (slot, Purpose::Detach),
        };
        let number = u8::try_from(slot.0).unwrap_or(0);
        match self.slot(number) {
            Some(slot) if !slot.leaving => {
                slot.leaving = matches!(purpose, Purpose::Detach);
                self.add_job(number, Job::new(Some(tag), purpose));
            }
            _ => {
                if let Purpose::Configure { add, .. } = purpose {
                    add.into_iter().for_each(|(_, endpoint)| endpoint.free(&vouch()));
                }
                self.outbox.command(tag, Err(ControllerError::Invalid));
            }
        }
        Ok(())
    }

    fn submit(&mut self, transfer: Transfer) -> Result<(), Box<Refused>> {
        self.accept(transfer)
    }

    fn flush(&mut self) {
        let Self { parts, slots, rung, .. } = self;
        let Some(parts) = parts else { return rung.clear() };
        for (number, index) in rung.drain(..) {
            let slot = slots.get_mut(usize::from(number)).and_then(Option::as_deref_mut);
            let Some(endpoint) = slot.and_then(|slot| slot.endpoint(index)) else { continue };
            if endpoint.rung && endpoint.is_running() {
                endpoint.rung = false;
                parts.doorbells.write(4 * usize::from(number), u32::from(index));
            }
        }
    }

    fn cancel(&mut self, token: Token) {
        let Some((number, index)) = self.outbox.tokens.get(&token).copied() else { return };
        let Some(slot) = self.slot(number) else { return };
        let Some(endpoint) = slot.endpoint(index) else { return };
        if let Some(transfer) = endpoint.in_flight.iter_mut().find(|one| one.token() == token) {
            transfer.cancelled = true;
        }
        if endpoint.is_running() {
            if !core::mem::replace(&mut endpoint.cancelling, true) {
                self.add_job(number, Job::new(None, Purpose::Cancel(index)));
            }
            return;
        }
        // The controller does not know of it, or does not look at it any more.
        let over = endpoint.drain(|one| one.token() == token);
        for transfer in over {
            let actual = transfer.actual;
            self.outbox.finish(transfer, actual, Status::Cancelled, &vouch());
        }
    }

    fn poll(&mut self, events: &mut VecDeque<Event>) {
        let mut batch: Vec<Trb> = Vec::new();
        // A ring holds no more than this.
        for _ in 0..Events::<H>::BLOCKS {
            let Some(parts) = &mut self.parts else { break };
            // Commands and ports are looked at after what was there before them on the other rings: a transfer that was
            // stopped is reported before the command that stopped it.
            let Some((first, others)) = parts.interrupters.split_first_mut() else { break };
            batch.clear();
            let own = core::iter::from_fn(|| first.events.pop()).take(64);
            let mut commands: Vec<Trb> = own.collect();
            first.took(commands.len());
            for other in others {
                let before = batch.len();
                batch.extend(core::iter::from_fn(|| other.events.pop()).take(Events::<H>::BLOCKS));
                other.took(batch.len() - before);
            }
            batch.append(&mut commands);
            for one in &mut parts.interrupters {
                if one.taken > Events::<H>::BLOCKS / 4 {
                    one.taken = 0;
                    one.registers.write64(interrupter::DEQUEUE, one.events.dequeue());
                }
            }
            if batch.is_empty() {
                break;
            }
            for event in core::mem::take(&mut batch) {
                self.handle(event);
            }
        }
        self.flush();
        events.append(&mut self.outbox.events);
    }

    fn arm(&mut self) -> bool {
        self.check();
        if let Some(parts) = &mut self.parts {
            for one in &mut parts.interrupters {
                if !core::mem::replace(&mut one.armed, true) {
                    one.taken = 0;
                    one.registers.write64(interrupter::DEQUEUE, one.events.dequeue() | interrupter::BUSY);
                }
            }
            if parts.interrupters.iter().any(|one| one.events.is_ready()) {
                return true;
            }
        }
        !self.outbox.events.is_empty()
    }
}

impl<H: DeviceHost> Drop for Xhci<H> {
    fn drop(&mut self) {
        if let Some(parts) = self.parts.take() {
            self.end(parts);
        }
    }
}
