//! The controller: commands, events, ports (xHCI 1.2, chapter 4).
//!
//! Nothing that it says is trusted: slot numbers, endpoint numbers and addresses in events are looked up among our own,
//! lengths are cut to what was asked for, and what names nothing of ours is counted and ignored. A controller that says
//! only such things, or nothing at all, is given up.

use crate::context::{self, CONTROL, EndpointContext, SlotContext};
use crate::dma::{DmaMemory, Lent, Quiet};
use crate::endpoint::{Endpoint, Found, InFlight};
use crate::regs::{Command as Usbcmd, Port, Registers, STUCK_LINKS, Status as Usbsts, interrupter, link, op};
use crate::ring::{Commands, Events};
use crate::slot::{Job, Op, Purpose, Slot as Device};
use crate::trb::{Trb, bit, code, kind};
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use anykernel::counter::Counter;
use anykernel_usb::controller::{
    Command, CommandTag, ControllerError, ControllerInfo, EndpointKind, Event, HostController, Outcome,
    Place, PortAction, PortStatus, Refused, RootPort, Slot, Speed, Status, Token, Transfer,
};
use hypercall::{DeviceHost, DmaDirection, IrqId};

/// Most transfers in flight: each may come to three events, for which an event ring has room.
pub(crate) const MAX_IN_FLIGHT: usize = 320;
/// So many events in a row about nothing of ours, and the controller is given up.
const MAX_SPURIOUS: u32 = 4096;
/// How long a command may take, and how often the controller is looked at meanwhile at least: a clock may jump.
const COMMAND_TIMEOUT_NS: u64 = 20_000_000_000;
const COMMAND_LOOKS: u32 = 1000;
/// How long it may take to halt (5.4.1.1 says 16 ms), and the same for a clock that stands still.
pub(crate) const HALT_TIMEOUT_NS: u64 = 100_000_000;
pub(crate) const HALT_TRIES: u32 = 1_000_000;
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

    fn give(&mut self, block: Trb, pending: Pending) {
        self.waiting.push_back((block, pending));
        self.give_waiting();
    }

    fn give_waiting(&mut self) {
        let Some(parts) = &mut self.parts else { return };
        let mut given = false;
        while let Some((block, pending)) = self.waiting.pop_front() {
            if let Err(pending) = parts.commands.0.push(block, pending) {
                self.waiting.push_front((block, pending));
                break;
            }
            given = true;
        }
        if given {
            if self.commands_in_flight == 0 {
                self.commands_moved_ns = self.host.monotonic_ns();
            }
            self.commands_in_flight += 1;
            parts.doorbells.write(0, 0);
        }
    }

    /// Adds a job for a slot, and begins it if there is no other.
    fn add_job(&mut self, number: u8, job: Job<H>) {
        let Some(slot) = self.slot(number) else { return };
        slot.jobs.push_back(job);
        if slot.jobs.len() == 1 {
            self.go_on(number);
        }
    }

    /// Gives the next command of a slot's first job; ends jobs that have no more.
    fn go_on(&mut self, number: u8) {
        while let Some(slot) = self.slots.get_mut(usize::from(number)).and_then(Option::as_deref_mut) {
            match slot.jobs.front() {
                None => return,
                Some(job) if !job.begun => slot.begin(),
                Some(_) => {}
            }
            let Some(op) = slot.jobs.front().and_then(|job| job.ops.front().copied()) else {
                if let Some(Job { tag: Some(tag), result, .. }) = slot.jobs.pop_front() {
                    self.outbox.command(tag, result);
                }
                continue;
            };
            let block = match op {
                Op::Address => {
                    Trb::command(kind::ADDRESS_DEVICE, number, 0, slot.input(op).unwrap_or_default())
                }
                Op::Evaluate => {
                    Trb::command(kind::EVALUATE_CONTEXT, number, 0, slot.input(op).unwrap_or_default())
                }
                Op::Configure => {
                    Trb::command(kind::CONFIGURE_ENDPOINT, number, 0, slot.input(op).unwrap_or_default())
                }
                Op::ResetEndpoint(index) => Trb::command(kind::RESET_ENDPOINT, number, index, 0),
                Op::Stop(index) => Trb::command(kind::STOP_ENDPOINT, number, index, 0),
                Op::SetDequeue(index) => {
                    let start = slot.endpoint(index).map_or(0, |endpoint| {
                        endpoint.stopped();
                        endpoint.rewind();
                        endpoint.start()
                    });
                    Trb::command(kind::SET_DEQUEUE, number, index, start)
                }
                Op::ResetDevice => Trb::command(kind::RESET_DEVICE, number, 0, 0),
                Op::Disable => Trb::command(kind::DISABLE_SLOT, number, 0, 0),
            };
            self.give(block, Pending::Slot(number));
            return;
        }
    }

    /// A command of a slot's first job is over.
    fn op_ended(&mut self, number: u8, code: u32) {
        let Self { slots, outbox, parts, scratch, rung, .. } = self;
        let quiet = Quiet::vouched();
        let Some(slot) = slots.get_mut(usize::from(number)).and_then(Option::as_deref_mut) else { return };
        let Device { endpoints, jobs, contexts, context, .. } = slot;
        let Some(job) = jobs.front_mut() else { return };
        let Some(op) = job.ops.pop_front() else { return };
        let ok = code == code::SUCCESS;
        let place = |index: u8| usize::from(index & 31);
        match op {
            Op::Address if ok => {
                let address = contexts.address();
                if let Some(control) = endpoints.get_mut(place(CONTROL)).and_then(Option::as_mut) {
                    control.halted = false;
                    control.run(scratch);
                }
                match (1..=127).contains(&address) {
                    true if matches!(job.purpose, Purpose::Attach) => {
                        job.result = Ok(Outcome::Attached { slot: Slot(u32::from(number)), address });
                    }
                    true => {}
                    false => job.fail(ControllerError::NoAnswer),
                }
            }
            Op::Address => job.fail(failure(code)),
            Op::Evaluate if ok => {}
            Op::Evaluate => job.fail(failure(code)),
            Op::Configure => match &mut job.purpose {
                Purpose::Configure { remove, add, hub } if ok => {
                    for index in remove.iter() {
                        let Some(mut endpoint) = endpoints.get_mut(place(*index)).and_then(Option::take)
                        else {
                            continue;
                        };
                        for transfer in endpoint.drain(|_| true) {
                            let actual = transfer.actual;
                            outbox.finish(transfer, actual, Status::Cancelled, &quiet);
                        }
                        endpoint.free(&quiet);
                    }
                    for (index, mut endpoint) in add.drain(..) {
                        endpoint.run(scratch);
                        if let Some(place) = endpoints.get_mut(place(index)) {
                            *place = Some(Box::new(endpoint));
                        }
                    }
                    let present = endpoints.iter().enumerate().filter(|(_, one)| one.is_some());
                    context.last = context::last_index(present.map(|(index, _)| index as u8));
                    context.hub = hub.or(context.hub);
                }
                Purpose::Configure { remove, add, .. } => {
                    let stopped: Vec<u8> = remove.clone();
                    add.drain(..).for_each(|(_, endpoint)| endpoint.free(&quiet));
                    job.ops.extend(stopped.into_iter().map(Op::SetDequeue));
                    job.fail(failure(code));
                }
                Purpose::Reset(index) if ok => {
                    let index = *index;
                    if let Some(endpoint) = endpoints.get_mut(place(index)).and_then(Option::as_mut) {
                        endpoint.halted = false;
                        endpoint.run(scratch);
                        rung.push((number, index));
                    }
                }
                _ => job.fail(failure(code)),
            },
            Op::ResetEndpoint(index) => {
                if !ok {
                    // It was not halted.
                    job.ops.push_front(Op::Stop(index));
                }
            }
            Op::Stop(index) => {
                let Some(endpoint) = endpoints.get_mut(place(index)).and_then(Option::as_mut) else {
                    job.ops.clear();
                    return self.go_on(number);
                };
                let cancel = matches!(job.purpose, Purpose::Cancel(_));
                let in_place = cancel && ok && endpoint.resume_in_place(contexts.dequeue(index));
                let was_running = endpoint.is_running();
                endpoint.stopped();
                if cancel {
                    for transfer in endpoint.drain(|one| one.cancelled) {
                        let actual = transfer.actual;
                        outbox.finish(transfer, actual, Status::Cancelled, &quiet);
                    }
                    if in_place {
                        endpoint.run(scratch);
                        rung.push((number, index));
                    }
                    // One that failed meanwhile is not to run.
                    if in_place || !was_running {
                        job.ops.clear();
                    }
                }
            }
            Op::SetDequeue(index) => {
                let Some(endpoint) = endpoints.get_mut(place(index)).and_then(Option::as_mut) else {
                    return self.go_on(number);
                };
                if ok {
                    endpoint.halted = false;
                    endpoint.run(scratch);
                    rung.push((number, index));
                } else {
                    endpoint.halted = true;
                    for transfer in endpoint.drain(|_| true) {
                        outbox.finish(transfer, 0, Status::Error, &quiet);
                    }
                    job.fail(failure(code));
                }
            }
            Op::ResetDevice => {
                // Refused where the device had no address: then there is nothing to forget.
                for (index, place) in endpoints.iter_mut().enumerate() {
                    let Some(endpoint) = place else { continue };
                    endpoint.stopped();
                    for transfer in endpoint.drain(|_| true) {
                        let actual = transfer.actual;
                        outbox.finish(transfer, actual, Status::Cancelled, &quiet);
                    }
                    if index == usize::from(CONTROL) {
                        endpoint.rewind();
                    } else if let Some(endpoint) = place.take() {
                        endpoint.free(&quiet);
                    }
                }
                context.last = CONTROL;
                context.hub = None;
            }
            Op::Disable => {
                if !ok && code != code::SLOT_NOT_ENABLED {
                    self.die("it does not let go of a device");
                    return;
                }
                if let Some(parts) = parts {
                    parts.contexts.write64(8 * usize::from(number), 0);
                }
                let tags: Vec<_> = jobs.drain(..).filter_map(|job| Some((job.tag?, job))).collect();
                let gone = slots.get_mut(usize::from(number)).and_then(Option::take);
                if let Some(slot) = gone {
                    for transfer in slot.dismantle(&quiet) {
                        let actual = transfer.actual;
                        outbox.finish(transfer, actual, Status::Gone, &quiet);
                    }
                }
                for (at, (tag, job)) in tags.into_iter().enumerate() {
                    let result = if at == 0 { job.result } else { Err(ControllerError::Invalid) };
                    if let Purpose::Configure { add, .. } = job.purpose {
                        add.into_iter().for_each(|(_, endpoint)| endpoint.free(&quiet));
                    }
                    outbox.command(tag, result);
                }
                return;
            }
        }
        let attach_failed = matches!(job.purpose, Purpose::Attach) && job.result.is_err();
        if attach_failed && op == Op::Address {
            job.ops.push_back(Op::Disable);
        }
        self.go_on(number);
    }

    fn command_ended(&mut self, event: Trb) {
        let Some(parts) = &mut self.parts else { return };
        let Some(pending) = parts.commands.0.take(event.parameter) else { return self.spurious() };
        self.spurious_in_a_row = 0;
        self.commands_in_flight = self.commands_in_flight.saturating_sub(1);
        self.commands_moved_ns = self.host.monotonic_ns();
        self.late_looks = 0;
        match pending {
            Pending::Slot(number) => self.op_ended(number, event.code()),
            Pending::Discard { tag } => self.outbox.command(tag, Err(ControllerError::NoMemory)),
            Pending::Enable { tag, .. } if event.code() != code::SUCCESS => {
                self.outbox.command(tag, Err(failure(event.code())));
            }
            Pending::Enable { tag, place, max_packet } => self.enabled(event.slot(), tag, place, max_packet),
        }
        self.give_waiting();
    }

    /// The controller gave us a slot.
    fn enabled(&mut self, number: u8, tag: CommandTag, place: Place, max_packet: u16) {
        let free = number > 0 && matches!(self.slots.get(usize::from(number)), Some(None));
        let interrupter = self.interrupter(number);
        let Some(parts) = &self.parts else { return };
        if !free {
            self.outbox.command(tag, Err(ControllerError::Dead));
            return self.die("it gave out a slot that it does not have");
        }
        let context = SlotContext { place, hub: None, last: CONTROL, interrupter };
        match Device::new(self.host, parts.stride, context, max_packet) {
            Ok(slot) => {
                parts.contexts.write64(8 * usize::from(number), slot.contexts.output());
                if let Some(place) = self.slots.get_mut(usize::from(number)) {
                    *place = Some(Box::new(slot));
                }
                self.add_job(number, Job::new(Some(tag), Purpose::Attach));
            }
            Err(_) => {
                self.give(Trb::command(kind::DISABLE_SLOT, number, 0, 0), Pending::Discard { tag });
            }
        }
    }

    fn transfer_ended(&mut self, event: Trb) {
        let (number, index, code) = (event.slot(), event.endpoint(), event.code());
        if matches!(code, code::RING_UNDERRUN | code::RING_OVERRUN) {
            return;
        }
        let Self { slots, outbox, scratch, rung, .. } = self;
        let endpoint = slots
            .get_mut(usize::from(number))
            .and_then(Option::as_deref_mut)
            .and_then(|slot| slot.endpoint(index));
        let Some(endpoint) = endpoint else { return self.spurious() };
        let by_number = event.control & bit::EVENT_DATA != 0;
        let found = match by_number {
            true => endpoint.find_number(event.parameter),
            false => endpoint.find_block(event.parameter, scratch),
        };
        let stopped =
            matches!(code, code::STOPPED | code::STOPPED_LENGTH_INVALID | code::STOPPED_SHORT_PACKET);
        let Some(Found { position, last, before, here }) = found else {
            // One that stopped between two transfers names neither.
            if !stopped {
                self.spurious();
            }
            return;
        };
        self.spurious_in_a_row = 0;
        let Some(transfer) = endpoint.in_flight.get_mut(position) else { return };
        let length = (event.status & 0xff_ffff) as usize;
        // With event data it is what was moved; else what was left of the block.
        let moved = match (by_number, code) {
            (true, _) | (_, code::STOPPED_SHORT_PACKET) => length,
            (_, code::STOPPED_LENGTH_INVALID) => before,
            _ => before + here.saturating_sub(length),
        };
        let quiet = Quiet::vouched();
        match code {
            _ if stopped => transfer.actual = moved.min(transfer.bytes),
            code::SUCCESS | code::SHORT_PACKET => {
                // Of an OUT transfer nothing remains; its length would not count an empty packet's companions.
                let all = code == code::SUCCESS && !transfer.is_in();
                if by_number {
                    transfer.actual = if all { transfer.bytes } else { moved.min(transfer.bytes) };
                }
                if !last {
                    return;
                }
                for _ in 0..position {
                    // The controller forgot about those in front.
                    let Some(skipped) = endpoint.take(0, scratch) else { break };
                    outbox.finish(skipped, 0, Status::Error, &quiet);
                    if let Some(parts) = &self.parts {
                        parts.lost.increment();
                    }
                }
                if let Some(transfer) = endpoint.take(0, scratch) {
                    let actual = transfer.actual;
                    outbox.finish(transfer, actual, Status::Done, &quiet);
                }
                if endpoint.rung {
                    rung.push((number, index));
                }
            }
            _ => {
                let status = match code {
                    code::STALL => Status::Stall,
                    code::BABBLE => Status::Overflow,
                    _ => Status::Error,
                };
                endpoint.stopped();
                for _ in 0..position {
                    let Some(skipped) = endpoint.take(0, scratch) else { break };
                    outbox.finish(skipped, 0, Status::Error, &quiet);
                }
                if let Some(transfer) = endpoint.take(0, scratch) {
                    outbox.finish(transfer, moved, status, &quiet);
                }
                if index == CONTROL {
                    self.add_job(number, Job::new(None, Purpose::Recover));
                } else {
                    endpoint.halted = true;
                    for transfer in endpoint.drain(|_| true) {
                        outbox.finish(transfer, 0, Status::Cancelled, &quiet);
                    }
                }
            }
        }
    }

    fn handle(&mut self, event: Trb) {
        match event.kind() {
            kind::TRANSFER_EVENT => self.transfer_ended(event),
            kind::COMMAND_EVENT => self.command_ended(event),
            kind::PORT_EVENT => {
                let port = RootPort((event.parameter >> 24) as u8);
                let known = Event::Port(port);
                if port.0 == 0 || port.0 > self.info.ports {
                    self.spurious();
                } else if !self.outbox.events.contains(&known) {
                    self.outbox.events.push_back(known);
                }
            }
            // Others tell of nothing that we asked for.
            _ => {}
        }
    }

    /// An event about nothing of ours.
    fn spurious(&mut self) {
        self.spurious_in_a_row += 1;
        if let Some(parts) = &self.parts {
            parts.spurious.increment();
        }
        if self.spurious_in_a_row > MAX_SPURIOUS {
            self.die("it reports only what nobody asked for");
        }
    }

    /// Gives the controller up: halts it, and completes everything.
    fn die(&mut self, why: &'static str) {
        let Some(parts) = self.parts.take() else { return };
        log::error!("{}: {why}; giving the controller up", self.info.name);
        self.outbox.events.push_back(Event::Dead(why));
        self.end(parts);
    }

    /// Halts the controller, completes everything, and frees what it does not use any more.
    fn end(&mut self, mut parts: Parts<H>) {
        let quiet = halt(self.host, &parts.operational);
        detach(self.host, &parts.interrupts);
        let mut pending = parts.commands.0.drain();
        pending.extend(self.waiting.drain(..).map(|(_, pending)| pending));
        for pending in pending {
            if let Pending::Enable { tag, .. } | Pending::Discard { tag } = pending {
                self.outbox.command(tag, Err(ControllerError::Dead));
            }
        }
        for slot in self.slots.iter_mut().filter_map(Option::take) {
            let mut slot = *slot;
            for job in &slot.jobs {
                if let Some(tag) = job.tag {
                    self.outbox.command(tag, Err(ControllerError::Dead));
                }
            }
            match &quiet {
                Some(quiet) => {
                    for transfer in slot.dismantle(quiet) {
                        self.outbox.finish(transfer, 0, Status::Gone, quiet);
                    }
                }
                // The controller may still write to the buffers: they are lost.
                None => {
                    for endpoint in slot.endpoints.iter_mut().flatten() {
                        for transfer in endpoint.drain(|_| true) {
                            self.outbox.tokens.remove(&transfer.token());
                            let transfer = transfer.abandon();
                            self.outbox.events.push_back(Event::Transfer {
                                transfer,
                                actual: 0,
                                status: Status::Gone,
                            });
                        }
                    }
                }
            }
        }
        if let Some(quiet) = quiet {
            parts.contexts.free(&quiet);
            parts.scratch.into_iter().for_each(|page| page.free(&quiet));
            parts.commands.0.free(&quiet);
            parts.interrupters.into_iter().for_each(|one| one.events.free(&quiet));
        }
    }

    /// Whether the controller still does its work; if not, it is given up.
    fn check(&mut self) {
        let Some(parts) = &self.parts else { return };
        let status = parts.operational.read(op::STATUS);
        if status == u32::MAX {
            return self.die("it is gone");
        }
        let status = Usbsts::from_bits_truncate(status);
        if status.intersects(Usbsts::SYSTEM_ERROR | Usbsts::CONTROLLER_ERROR) {
            return self.die("it reports an internal error");
        }
        if status.contains(Usbsts::HALTED) {
            return self.die("it has stopped by itself");
        }
        let cleared = status & (Usbsts::EVENT | Usbsts::PORT_CHANGE);
        if !cleared.is_empty() {
            parts.operational.write(op::STATUS, cleared.bits());
        }
        if let Interrupts::Line(irq) = parts.interrupts {
            if let Some(first) = parts.interrupters.first() {
                first.registers.write(interrupter::MANAGEMENT, interrupter::PENDING | interrupter::ENABLE);
            }
            self.host.irq_unmask(irq);
        }
        if self.commands_in_flight > 0
            && self.host.monotonic_ns().saturating_sub(self.commands_moved_ns) > COMMAND_TIMEOUT_NS
        {
            self.late_looks += 1;
            if self.late_looks > COMMAND_LOOKS {
                self.die("it does not answer a command");
            }
        }
    }

    fn accept(&mut self, mut transfer: Transfer) -> Result<(), Box<Refused>> {
        let refuse = |transfer, error| Err(Box::new(Refused { transfer, error }));
        let number = u8::try_from(transfer.slot.0).unwrap_or(0);
        let index = context::index_of(transfer.endpoint);
        let bytes = transfer.len();
        let is_in = transfer.is_in();
        let (most_bytes, most_buffers) = (self.info.max_transfer_bytes, self.info.max_buffers);
        if self.parts.is_none() {
            return refuse(transfer, ControllerError::Dead);
        }
        let in_flight = self.outbox.tokens.len();
        let known = self.outbox.tokens.contains_key(&transfer.token);
        let next = self.next_number;
        let host = self.host;
        let Self { slots, scratch, outbox, rung, .. } = self;
        let slot =
            slots.get_mut(usize::from(number)).and_then(Option::as_deref_mut).filter(|slot| !slot.leaving);
        let Some(endpoint) = slot.and_then(|slot| slot.endpoint(index)) else {
            return refuse(transfer, ControllerError::Invalid);
        };
        let fits = match transfer.setup {
            Some([.., low, high]) => {
                usize::from(u16::from_le_bytes([low, high])) == bytes && index == CONTROL
            }
            None => endpoint.kind != EndpointKind::Control,
        };
        if !fits || known || bytes > most_bytes || transfer.data.len() > most_buffers {
            return refuse(transfer, ControllerError::Invalid);
        }
        if endpoint.halted {
            return refuse(transfer, ControllerError::Halted);
        }
        if in_flight >= MAX_IN_FLIGHT {
            return refuse(transfer, ControllerError::Full);
        }
        let direction = if is_in { DmaDirection::FromDevice } else { DmaDirection::ToDevice };
        let quiet = Quiet::vouched();
        let mut lent: Vec<Lent<H>> = Vec::new();
        let mut failed = lent.try_reserve_exact(transfer.data.len()).err().map(|_| ControllerError::NoMemory);
        let mut kept = Vec::new();
        for buffer in core::mem::take(&mut transfer.data) {
            if failed.is_some() {
                kept.push(buffer);
                continue;
            }
            match Lent::new(host, buffer, direction) {
                Ok(buffer) => lent.push(buffer),
                Err((buffer, error)) => {
                    kept.push(buffer);
                    failed = Some(match error {
                        hypercall::Error::NoMemory => ControllerError::NoMemory,
                        _ => ControllerError::Invalid,
                    });
                }
            }
        }
        if let Some(error) = failed {
            transfer.data = lent.into_iter().map(|buffer| buffer.reclaim(&quiet)).chain(kept).collect();
            return refuse(transfer, error);
        }
        let token = transfer.token;
        match endpoint.push(InFlight::new(transfer, lent, next), scratch) {
            Ok(()) => {
                if endpoint.rung && rung.last() != Some(&(number, index)) {
                    rung.push((number, index));
                }
                outbox.tokens.insert(token, (number, index));
                self.next_number += 1;
                Ok(())
            }
            Err(back) => refuse(back.reclaim(&quiet), ControllerError::Full),
        }
    }

    /// The endpoints of a `Configure`.
    fn endpoints(
        &self,
        slot: u8,
        speed: Speed,
        add: &[anykernel_usb::controller::EndpointSpec],
    ) -> Result<Vec<(u8, Endpoint<H>)>, ControllerError> {
        let target = self.interrupter(slot);
        let mut made: Vec<(u8, Endpoint<H>)> = Vec::new();
        let mut failed = None;
        for spec in add {
            let index = context::index_of(spec.address);
            if index == CONTROL || made.iter().any(|(one, _)| *one == index) {
                failed = Some(ControllerError::Invalid);
                break;
            }
            let Ok(mut endpoint) = Endpoint::new(self.host, spec.kind, spec.max_packet, target) else {
                failed = Some(ControllerError::NoMemory);
                break;
            };
            endpoint.context = EndpointContext::of(spec, speed, endpoint.start());
            if endpoint.context.is_none() {
                failed = Some(ControllerError::Invalid);
            }
            made.push((index, endpoint));
        }
        match failed {
            None => Ok(made),
            Some(error) => {
                made.into_iter().for_each(|(_, endpoint)| endpoint.free(&Quiet::vouched()));
                Err(error)
            }
        }
    }
}

/// Stops the controller and waits, for a bounded time, until it has. `None`: it does not, and may still use memory.
pub(crate) fn halt<H: DeviceHost>(host: H, operational: &Registers<H>) -> Option<Quiet> {
    operational.write(op::COMMAND, 0);
    let halted = |status: u32| {
        // One that is gone touches no memory either.
        status == u32::MAX || Usbsts::from_bits_truncate(status).contains(Usbsts::HALTED)
    };
    wait(host, HALT_TIMEOUT_NS, || halted(operational.read(op::STATUS))).then(Quiet::vouched)
}

/// Waits until `done`, at most this long; says whether it is.
pub(crate) fn wait<H: DeviceHost>(host: H, timeout_ns: u64, mut done: impl FnMut() -> bool) -> bool {
    let deadline_ns = host.monotonic_ns().saturating_add(timeout_ns);
    for _ in 0..HALT_TRIES {
        if done() {
            return true;
        }
        if host.monotonic_ns() >= deadline_ns {
            break;
        }
        host.yield_now();
    }
    done()
}

/// Ends the delivery of interrupts.
pub(crate) fn detach<H: DeviceHost>(host: H, interrupts: &Interrupts) {
    match interrupts {
        Interrupts::Msix(irqs) => irqs.iter().for_each(|irq| host.irq_detach(*irq)),
        Interrupts::Line(irq) => host.irq_detach(*irq),
        Interrupts::None => {}
    }
}

/// What a completion code means for a command.
fn failure(code: u32) -> ControllerError {
    match code {
        code::NO_SLOTS => ControllerError::NoSlot,
        code::RESOURCE | code::BANDWIDTH | code::SECONDARY_BANDWIDTH => ControllerError::NoBandwidth,
        code::TRANSACTION | code::STALL => ControllerError::NoAnswer,
        code::PARAMETER => ControllerError::Invalid,
        _ => ControllerError::NoAnswer,
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
                    add.into_iter().for_each(|(_, endpoint)| endpoint.free(&Quiet::vouched()));
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
            self.outbox.finish(transfer, actual, Status::Cancelled, &Quiet::vouched());
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

/// Runs the controller (5.4.1).
pub(crate) fn run<H: DeviceHost>(operational: &Registers<H>) {
    operational.write(op::COMMAND, (Usbcmd::RUN | Usbcmd::INTERRUPTS).bits());
}
