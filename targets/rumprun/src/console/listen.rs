//! What comes in on the console is looked at for Ctrl-C, which asks for the end.

use super::{FIFO, LINE_STATUS, PORT, SERIAL_LINE, UART, set};
use crate::cpu::regs::inb;
use crate::domain::{self, Domain};
use crate::host::Machine;
use crate::interrupts::irq;
use alloc::boxed::Box;
use alloc::sync::Arc;
use anykernel::{Kernel, StartError};
use hypercall::{CpuId, IrqSource, Signal, ThreadSpec, Threads};

/// End of text: what Ctrl-C is on a terminal.
const STOP: u8 = 3;
const DATA_READY: u8 = 0x01;

/// Stops `kernel` when Ctrl-C comes over the serial port, so that a guest ends with everything written. A machine without
/// the port's interrupt does not listen.
pub(crate) fn listen(kernel: &Arc<Kernel<Domain>>) -> Result<(), StartError> {
    let signal = Arc::new(Signal::new());
    let irq = match irq::attach(IrqSource::Line(SERIAL_LINE), CpuId(0), signal.clone()) {
        Ok(irq) => irq,
        Err(error) => {
            log::debug!("nobody listens for Ctrl-C: serial port: {error}");
            return Ok(());
        }
    };
    let kernel = Arc::downgrade(kernel);
    // A thread of the machine, not of the domain, because it sees what no component may. It ends with the machine.
    let listener = move || {
        // Interrupt on received data, and the pin that lets it out of a PC's port.
        set(&[(1, 0x01), (4, 0x0b)]);
        loop {
            let seen = signal.count();
            if stop_received() {
                let Some(kernel) = kernel.upgrade() else { break };
                domain::enter(&kernel.host(), || kernel.stop());
            }
            signal.wait(&Machine, seen, None);
        }
    };
    let spec = ThreadSpec { name: "console", cpu: None };
    match Machine.spawn(spec, Box::new(listener)) {
        Ok(_) => Ok(()),
        Err(error) => {
            irq::detach(irq);
            Err(StartError::Host { what: "starting thread console".into(), error })
        }
    }
}

/// Takes what was received, and says whether Ctrl-C was among it.
fn stop_received() -> bool {
    let _uart = UART.lock();
    let mut stop = false;
    // A port that is not there reads as all ones for ever.
    for _ in 0..FIFO {
        // SAFETY: reading the line status and the data register harms no memory.
        let byte = unsafe {
            if inb(LINE_STATUS) & DATA_READY == 0 {
                break;
            }
            inb(PORT)
        };
        stop |= byte == STOP;
    }
    stop
}
