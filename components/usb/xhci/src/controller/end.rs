//! Whether the controller still works, and its end: halted, with everything completed and freed.

use super::{Interrupts, Parts, Pending, Xhci};
use crate::dma::vouch;
use crate::regs::{Command, Registers, Status as Usbsts, interrupter, op};
use anykernel::driver::Quiet;
use anykernel_usb::controller::{ControllerError, Event, Status};
use hypercall::DeviceHost;

/// How long a command may take, and how often the controller is looked at meanwhile at least: a clock may jump.
const COMMAND_TIMEOUT_NS: u64 = 20_000_000_000;
const COMMAND_LOOKS: u32 = 1000;
/// How long it may take to halt (5.4.1.1 says 16 ms), and the same for a clock that stands still.
const HALT_TIMEOUT_NS: u64 = 100_000_000;
const HALT_TRIES: u32 = 1_000_000;

impl<H: DeviceHost> Xhci<H> {
    /// Gives the controller up: halts it, and completes everything.
    pub(super) fn die(&mut self, why: &'static str) {
        let Some(parts) = self.parts.take() else { return };
        log::error!("{}: {why}; giving the controller up", self.info.name);
        self.outbox.events.push_back(Event::Dead(why));
        self.end(parts);
    }

    /// Halts the controller, completes everything, and frees what it does not use any more.
    pub(super) fn end(&mut self, mut parts: Parts<H>) {
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
    pub(super) fn check(&mut self) {
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
}

/// Stops the controller and waits, for a bounded time, until it has. `None`: it does not, and may still use memory.
pub(crate) fn halt<H: DeviceHost>(host: H, operational: &Registers<H>) -> Option<Quiet> {
    operational.write(op::COMMAND, 0);
    let halted = |status: u32| {
        // One that is gone touches no memory either.
        status == u32::MAX || Usbsts::from_bits_truncate(status).contains(Usbsts::HALTED)
    };
    wait(host, HALT_TIMEOUT_NS, || halted(operational.read(op::STATUS))).then(vouch)
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
fn detach<H: DeviceHost>(host: H, interrupts: &Interrupts) {
    match interrupts {
        Interrupts::Msix(irqs) => irqs.iter().for_each(|irq| host.irq_detach(*irq)),
        Interrupts::Line(irq) => host.irq_detach(*irq),
        Interrupts::None => {}
    }
}

/// Runs the controller (5.4.1).
pub(crate) fn run<H: DeviceHost>(operational: &Registers<H>) {
    operational.write(op::COMMAND, (Command::RUN | Command::INTERRUPTS).bits());
}
