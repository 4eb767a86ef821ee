//! What comes in on the console is looked at for Ctrl-C, which asks for the end.

use super::{FIFO, LINE_STATUS, PORT, SERIAL_LINE, UART, set};
use crate::cpu::regs::inb;
use crate::host::Machine;
use crate::interrupts::irq;
use alloc::sync::Arc;
use anykernel::{Kernel, StartError};
use hypercall::{CpuId, Host, IrqSource, Signal};

/// End of text: what Ctrl-C is on a terminal.
const STOP: u8 = 3;
const DATA_READY: u8 = 0x01;

/// Stops `kernel` when Ctrl-C comes over the serial port, so that a guest ends with everything written. A machine without
/// the port's interrupt does not listen.
pub(crate) fn listen<H: Host>(kernel: &Arc<Kernel<H>>) -> Result<(), StartError> {
    let signal = Arc::new(Signal::new());
    let irq = match irq::attach(IrqSource::Line(SERIAL_LINE), CpuId(0), signal.clone()) {
        Ok(irq) => irq,
        Err(error) => {
            log::debug!("nobody listens for Ctrl-C: serial port: {error}");
            return Ok(());
        }
    };
    kernel.raise_on_stop(signal.clone());
    let listener = kernel.clone();
    kernel.spawn("console", None, move || {
        // Interrupt on received data, and the pin that lets it out of a PC's port.
        set(&[(1, 0x01), (4, 0x0b)]);
        loop {
            let seen = signal.count();
            if stop_received() {
                listener.stop();
            }
            if listener.stopping() {
                break;
            }
            signal.wait(&Machine, seen, None);
        }
        set(&[(1, 0x00), (4, 0x03)]);
        irq::detach(irq);
    })
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
