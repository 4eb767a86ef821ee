//! The control queue (5.1.6.5), used for the number of queue pairs.

use crate::dma::{Chain, DmaSlot};
use crate::error::{Error, Fault, Result};
use crate::queue::{Queue, QueueOptions};
use crate::spec::{feature, net as spec, pci};
use crate::transport::{Doorbell, Transport};
use anykernel::driver::Quiet;
use hypercall::DeviceHost;

const TIMEOUT_NS: u64 = 1_000_000_000;
/// Class, command, and the number of pairs.
const COMMAND_BYTES: usize = 4;

/// The control queue.
pub(super) struct Control<H: DeviceHost> {
    queue: Queue<H, ()>,
    doorbell: Doorbell<H>,
    slot: Option<DmaSlot<H>>,
}

impl<H: DeviceHost> Control<H> {
    /// Sets up queue `index`.
    pub(super) fn new(host: H, transport: &mut Transport<H>, index: u16, features: u64) -> Result<Self> {
        let offered = transport.queue_max(index);
        if offered < 2 {
            return Err(Error::BadDevice("its control queue is missing or too small"));
        }
        let options = QueueOptions {
            size: (1 << offered.ilog2()).min(4),
            event_idx: features & feature::EVENT_IDX != 0,
            indirect: 0,
            max_segment: u32::MAX,
        };
        let queue = Queue::new(host, options)?;
        let slot = DmaSlot::pool(host, COMMAND_BYTES + 1, 1)
            .map_err(|error| Error::Host("allocating the control buffer", error))?
            .pop();
        // Last: what the device was told of is not freed when the set-up fails.
        let doorbell = transport.enable_queue(index, &queue, pci::NO_VECTOR)?;
        Ok(Self { queue, doorbell, slot })
    }

    /// Tells the device to use `pairs` queue pairs. Context: thread. Waits for the device, at most a second.
    pub(super) fn set_pairs(&mut self, host: &H, pairs: u16) -> Result<()> {
        // A command that timed out keeps the slot: the device may still write to it.
        let mut slot = self.slot.take().ok_or(Fault::Timeout)?;
        let [low, high] = pairs.to_le_bytes();
        let command = [spec::CTRL_MQ, spec::CTRL_MQ_PAIRS_SET, low, high, !spec::CTRL_OK];
        for (byte, value) in slot.bytes_mut().iter_mut().zip(command) {
            *byte = value;
        }
        if let Err((chain, (), _)) =
            self.queue.add(Chain::new(slot, COMMAND_BYTES, 1, Default::default()), ())
        {
            self.slot = Some(chain.into_parts().0);
            return Err(Fault::Answer("the control queue takes no command").into());
        }
        if self.queue.publish() {
            self.doorbell.ring();
        }
        let deadline_ns = host.monotonic_ns().saturating_add(TIMEOUT_NS);
        let returned = loop {
            if let Some(returned) = self.queue.pop()? {
                break returned;
            }
            if host.monotonic_ns() >= deadline_ns {
                self.queue.set_fault(Fault::Timeout);
                return Err(Fault::Timeout.into());
            }
            host.yield_now();
        };
        let mut answer = [!spec::CTRL_OK];
        let _ = returned.chain.slot().copy_out(COMMAND_BYTES, &mut answer);
        self.slot = Some(returned.chain.into_parts().0);
        if answer == [spec::CTRL_OK] {
            Ok(())
        } else {
            Err(Error::BadDevice("it refuses the number of queue pairs that it offered"))
        }
    }

    /// Frees its memory after a reset.
    pub(super) fn dismantle(self, proof: &Quiet) {
        self.queue.dismantle(proof, |(), chain| drop(chain));
    }
}
