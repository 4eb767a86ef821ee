//! Events: which transfer, command or port each is about, if any of ours.

use super::Xhci;
use crate::context::CONTROL;
use crate::dma::vouch;
use crate::endpoint::Found;
use crate::slot::{Job, Purpose};
use crate::trb::{Trb, bit, code, kind};
use anykernel_usb::controller::{Event, RootPort, Status};
use hypercall::DeviceHost;

/// So many events in a row about nothing of ours, and the controller is given up.
const MAX_SPURIOUS: u32 = 4096;

impl<H: DeviceHost> Xhci<H> {
    pub(super) fn transfer_ended(&mut self, event: Trb) {
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
        let quiet = vouch();
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

    pub(super) fn handle(&mut self, event: Trb) {
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
    pub(super) fn spurious(&mut self) {
        self.spurious_in_a_row += 1;
        if let Some(parts) = &self.parts {
            parts.spurious.increment();
        }
        if self.spurious_in_a_row > MAX_SPURIOUS {
            self.die("it reports only what nobody asked for");
        }
    }
}
