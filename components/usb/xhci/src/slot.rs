//! A device as the controller holds it, and what is to be done with it, one job after another.

use crate::context::{self, CONTROL, Contexts, EndpointContext, SlotContext};
use crate::dma::vouch;
use crate::endpoint::{Endpoint, InFlight};
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use anykernel::driver::Quiet;
use anykernel_usb::controller::{CommandTag, ControllerError, EndpointKind, HubSpec, Outcome};
use hypercall::{Dma, Result};

/// One command of the controller (xHCI 1.2, 4.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    Address,
    Evaluate,
    Configure,
    ResetEndpoint(u8),
    Stop(u8),
    SetDequeue(u8),
    ResetDevice,
    Disable,
}

/// An endpoint that is to be set up: its index, and the endpoint.
pub(crate) type Added<H> = (u8, Endpoint<H>);

/// What a job is for.
pub(crate) enum Purpose<H: Dma> {
    Attach,
    SetMaxPacket(u16),
    Configure {
        remove: Vec<u8>,
        add: Vec<Added<H>>,
        hub: Option<HubSpec>,
    },
    Reset(u8),
    Readdress(u16),
    Detach,
    /// Ends the cancelled transfers of an endpoint.
    Cancel(u8),
    /// Makes endpoint 0 work again after a transfer failed.
    Recover,
}

/// Commands that are given one after another.
pub(crate) struct Job<H: Dma> {
    /// Who is told; `None`: nobody asked.
    pub(crate) tag: Option<CommandTag>,
    pub(crate) purpose: Purpose<H>,
    pub(crate) ops: VecDeque<Op>,
    pub(crate) begun: bool,
    pub(crate) result: Result<Outcome, ControllerError>,
}

impl<H: Dma> Job<H> {
    pub(crate) fn new(tag: Option<CommandTag>, purpose: Purpose<H>) -> Self {
        Self { tag, purpose, ops: VecDeque::new(), begun: false, result: Ok(Outcome::Done) }
    }

    /// Keeps the first error.
    pub(crate) fn fail(&mut self, error: ControllerError) {
        if self.result.is_ok() {
            self.result = Err(error);
        }
    }
}

/// A device.
pub(crate) struct Slot<H: Dma> {
    pub(crate) contexts: Contexts<H>,
    pub(crate) context: SlotContext,
    /// By their index in the device context.
    pub(crate) endpoints: Vec<Option<Box<Endpoint<H>>>>,
    /// The first is under way.
    pub(crate) jobs: VecDeque<Job<H>>,
    /// It is to be detached: nothing more is taken.
    pub(crate) leaving: bool,
}

impl<H: Dma + Copy> Slot<H> {
    pub(crate) fn new(host: H, stride: usize, context: SlotContext, max_packet: u16) -> Result<Self> {
        let contexts = Contexts::new(host, stride)?;
        let control = match Endpoint::new(host, EndpointKind::Control, max_packet, context.interrupter) {
            Ok(endpoint) => endpoint,
            Err(error) => {
                contexts.free(&vouch());
                return Err(error);
            }
        };
        let mut endpoints: Vec<_> = (0..32).map(|_| None).collect();
        if let Some(place) = endpoints.get_mut(usize::from(CONTROL)) {
            *place = Some(Box::new(control));
        }
        Ok(Self { contexts, context, endpoints, jobs: VecDeque::new(), leaving: false })
    }

    pub(crate) fn endpoint(&mut self, index: u8) -> Option<&mut Endpoint<H>> {
        self.endpoints.get_mut(usize::from(index))?.as_deref_mut()
    }

    /// Indices of the endpoints that there are.
    pub(crate) fn indices(&self) -> impl Iterator<Item = u8> {
        self.endpoints.iter().enumerate().filter(|(_, one)| one.is_some()).map(|(index, _)| index as u8)
    }

    /// Decides on the commands of the first job, now that its turn has come.
    pub(crate) fn begin(&mut self) {
        let Some(mut job) = self.jobs.pop_front() else { return };
        let ops = match &mut job.purpose {
            Purpose::Attach => [Op::Address].into(),
            Purpose::SetMaxPacket(max_packet) => {
                if let Some(control) = self.endpoint(CONTROL) {
                    control.max_packet = *max_packet;
                }
                [Op::Evaluate].into()
            }
            Purpose::Configure { remove, add, .. } => {
                let remains = |index: u8| !remove.contains(&index) && index != CONTROL;
                let doubled =
                    add.iter().any(|(index, _)| self.indices().any(|one| one == *index && remains(one)));
                if doubled || remove.iter().any(|index| !self.indices().any(|one| one == *index)) {
                    job.fail(ControllerError::Invalid);
                    VecDeque::new()
                } else {
                    remove.iter().map(|index| Op::Stop(*index)).chain([Op::Configure]).collect()
                }
            }
            Purpose::Reset(index) => match self.endpoint(*index) {
                None => {
                    job.fail(ControllerError::Invalid);
                    VecDeque::new()
                }
                Some(endpoint) if endpoint.halted || *index == CONTROL => {
                    [Op::ResetEndpoint(*index), Op::SetDequeue(*index)].into()
                }
                // Taking an endpoint out and in resets its toggle (4.6.8).
                Some(_) => [Op::Stop(*index), Op::Configure].into(),
            },
            Purpose::Readdress(_) => {
                let running = |index: &u8| {
                    self.endpoints
                        .get(usize::from(*index))
                        .and_then(Option::as_ref)
                        .is_some_and(|e| e.is_running())
                };
                let stops = self.indices().filter(running).map(Op::Stop);
                stops.chain([Op::ResetDevice, Op::Address]).collect()
            }
            Purpose::Detach => [Op::Disable].into(),
            Purpose::Cancel(index) => match self.endpoint(*index) {
                Some(endpoint) => {
                    endpoint.cancelling = false;
                    match endpoint.is_running() {
                        true => [Op::Stop(*index), Op::SetDequeue(*index)].into(),
                        false => VecDeque::new(),
                    }
                }
                None => VecDeque::new(),
            },
            Purpose::Recover => [Op::ResetEndpoint(CONTROL), Op::SetDequeue(CONTROL)].into(),
        };
        job.ops = ops;
        job.begun = true;
        self.jobs.push_front(job);
    }

    /// The input context of the first job's next command, if that takes one.
    pub(crate) fn input(&mut self, op: Op) -> Option<u64> {
        let job = self.jobs.front_mut()?;
        match (op, &job.purpose) {
            (Op::Address, purpose) => {
                let control = self.endpoints.get_mut(usize::from(CONTROL))?.as_mut()?;
                if let Purpose::Readdress(max_packet) = purpose {
                    control.max_packet = *max_packet;
                }
                let context = EndpointContext::control(control.max_packet, control.start());
                let slot = SlotContext { last: CONTROL, hub: None, ..self.context };
                Some(self.contexts.input(Some(&slot), &[(CONTROL, context)], &[]))
            }
            (Op::Evaluate, Purpose::SetMaxPacket(max_packet)) => {
                let control = self.endpoints.get(usize::from(CONTROL))?.as_ref()?;
                let context = EndpointContext::control(*max_packet, control.start());
                Some(self.contexts.input(None, &[(CONTROL, context)], &[]))
            }
            (Op::Configure, Purpose::Configure { remove, add, hub }) => {
                let added: Vec<_> =
                    add.iter().filter_map(|(index, one)| Some((*index, one.context?))).collect();
                let present = self.endpoints.iter().enumerate().filter(|(_, one)| one.is_some());
                let stay = present.map(|(index, _)| index as u8).filter(|index| !remove.contains(index));
                let last = context::last_index(stay.chain(added.iter().map(|(index, _)| *index)));
                let slot = SlotContext { last, hub: hub.or(self.context.hub), ..self.context };
                Some(self.contexts.input(Some(&slot), &added, remove))
            }
            (Op::Configure, Purpose::Reset(index)) => {
                let endpoint = self.endpoints.get_mut(usize::from(*index))?.as_mut()?;
                endpoint.rewind();
                let context = endpoint.context?;
                Some(self.contexts.input(Some(&self.context), &[(*index, context)], &[*index]))
            }
            _ => None,
        }
    }

    /// All transfers of all endpoints, and the memory, once the controller is done with it.
    pub(crate) fn dismantle(self, quiet: &Quiet) -> Vec<InFlight<H>> {
        let mut transfers = Vec::new();
        for mut endpoint in self.endpoints.into_iter().flatten() {
            transfers.extend(endpoint.drain(|_| true));
            endpoint.free(quiet);
        }
        for job in self.jobs {
            if let Purpose::Configure { add, .. } = job.purpose {
                add.into_iter().for_each(|(_, endpoint)| endpoint.free(quiet));
            }
        }
        self.contexts.free(quiet);
        transfers
    }
}
