//! Transfers and endpoints as the stack wants them.

use super::Xhci;
use crate::context::{self, CONTROL, EndpointContext};
use crate::dma::vouch;
use crate::endpoint::{Endpoint, InFlight};
use alloc::boxed::Box;
use alloc::vec::Vec;
use anykernel::driver::MappedBuffer;
use anykernel_usb::controller::{ControllerError, EndpointKind, EndpointSpec, Refused, Speed, Transfer};
use hypercall::{DeviceHost, DmaDirection};

/// Most transfers in flight: each may come to three events, for which an event ring has room.
const MAX_IN_FLIGHT: usize = 320;

impl<H: DeviceHost> Xhci<H> {
    pub(super) fn accept(&mut self, mut transfer: Transfer) -> Result<(), Box<Refused>> {
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
        let quiet = vouch();
        let mut lent: Vec<MappedBuffer<H>> = Vec::new();
        let mut failed = lent.try_reserve_exact(transfer.data.len()).err().map(|_| ControllerError::NoMemory);
        let mut kept = Vec::new();
        for buffer in core::mem::take(&mut transfer.data) {
            if failed.is_some() {
                kept.push(buffer);
                continue;
            }
            match MappedBuffer::new(host, buffer, direction) {
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
    pub(super) fn endpoints(
        &self,
        slot: u8,
        speed: Speed,
        add: &[EndpointSpec],
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
                made.into_iter().for_each(|(_, endpoint)| endpoint.free(&vouch()));
                Err(error)
            }
        }
    }
}
