//! Commands: what is given to the controller for a slot, one after the other, and what follows from how each went.

use super::{Pending, Xhci};
use crate::context::{self, CONTROL, SlotContext};
use crate::dma::vouch;
use crate::slot::{Job, Op, Purpose, Slot as Device};
use crate::trb::{Trb, code, kind};
use alloc::boxed::Box;
use alloc::vec::Vec;
use anykernel_usb::controller::{CommandTag, ControllerError, Outcome, Place, Slot, Status};
use hypercall::DeviceHost;

impl<H: DeviceHost> Xhci<H> {
    pub(super) fn give(&mut self, block: Trb, pending: Pending) {
        self.waiting.push_back((block, pending));
        self.give_waiting();
    }

    pub(super) fn give_waiting(&mut self) {
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
    pub(super) fn add_job(&mut self, number: u8, job: Job<H>) {
        let Some(slot) = self.slot(number) else { return };
        slot.jobs.push_back(job);
        if slot.jobs.len() == 1 {
            self.go_on(number);
        }
    }

    /// Gives the next command of a slot's first job; ends jobs that have no more.
    pub(super) fn go_on(&mut self, number: u8) {
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
    pub(super) fn op_ended(&mut self, number: u8, code: u32) {
        let Self { slots, outbox, parts, scratch, rung, .. } = self;
        let quiet = vouch();
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

    pub(super) fn command_ended(&mut self, event: Trb) {
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
    pub(super) fn enabled(&mut self, number: u8, tag: CommandTag, place: Place, max_packet: u16) {
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
