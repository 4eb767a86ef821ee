//! The console: the first serial port (16550, at 0x3f8), polled, so that it works in any context.

#[cfg(feature = "drivers")]
#[cfg(target_os = "none")]
mod listen;

#[cfg(feature = "drivers")]
#[cfg(target_os = "none")]
pub(crate) use listen::listen;

use crate::cpu::regs::{inb, outb};
use crate::sync::SpinLock;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

const PORT: u16 = 0x3f8;
const LINE_STATUS: u16 = PORT + 5;
const TRANSMITTER_EMPTY: u8 = 0x20;
/// The transmitter's buffer, in bytes: after it ran empty, this many can be written without looking.
const FIFO: usize = 16;
/// Looks at the line status before the port counts as dead.
const PATIENCE: u32 = 1 << 20;

struct Uart;

static UART: SpinLock<Uart> = SpinLock::new(Uart);

/// The machine is going down and only one CPU runs on: locks need not be waited for.
static LAST_WORDS: AtomicBool = AtomicBool::new(false);

/// Sets the port up: 115,200 baud, 8N1, buffers on, no interrupts.
pub(crate) fn init() {
    set(&[(1, 0x00), (3, 0x80), (0, 0x01), (1, 0x00), (3, 0x03), (2, 0x07), (4, 0x03)]);
}

/// The serial port's interrupt line.
pub const SERIAL_LINE: u32 = 4;

/// Makes the serial port raise its line, for tests: it says that its transmitter is empty. What it said before is taken
/// back first.
pub fn interrupt_by_serial_port() {
    let _uart = UART.lock();
    // SAFETY: the interrupt enable register and the interrupt identification register, whose reading clears the cause.
    unsafe {
        outb(PORT + 1, 0);
        inb(PORT + 2);
        outb(PORT + 1, 2);
    }
}

fn set(registers: &[(u16, u8)]) {
    let _uart = UART.lock();
    for (register, value) in registers {
        // SAFETY: the serial port's registers; where there is none, nobody listens.
        unsafe { outb(PORT + register, *value) };
    }
}

/// From now on nobody waits for a lock: other CPUs may have been stopped while they held it.
pub(crate) fn last_words() {
    LAST_WORDS.store(true, Ordering::Relaxed);
}

impl Uart {
    fn write(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(FIFO) {
            let mut patience = PATIENCE;
            // SAFETY: reading the line status and writing the data register of the serial port harm no memory.
            unsafe {
                while inb(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
                    patience -= 1;
                    if patience == 0 {
                        return;
                    }
                    core::hint::spin_loop();
                }
                for byte in part {
                    outb(PORT, *byte);
                }
            }
        }
    }
}

/// Writes all of `bytes`, whole.
pub(crate) fn write(bytes: &[u8]) {
    let mut uart = if LAST_WORDS.load(Ordering::Relaxed) {
        // SAFETY: all other CPUs were told to stop.
        unsafe { UART.lock_or_break(PATIENCE) }
    } else {
        UART.lock()
    };
    uart.write(bytes);
}

/// Formats straight onto the console, piece by piece.
pub(crate) struct Writer;

impl fmt::Write for Writer {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        write(text.as_bytes());
        Ok(())
    }
}

/// A line that is formatted before it is written, so that lines of several CPUs do not mix. What is too long is cut.
pub(crate) struct Line {
    bytes: [u8; 512],
    len: usize,
}

impl Line {
    pub(crate) const fn new() -> Self {
        Self { bytes: [0; 512], len: 0 }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // One byte stays free for the line end.
        let room = self.bytes.len() - 1 - self.len;
        let part = &text.as_bytes()[..text.len().min(room)];
        self.bytes[self.len..self.len + part.len()].copy_from_slice(part);
        self.len += part.len();
        Ok(())
    }
}

struct Logger;

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let mut line = Line::new();
        let now_us = crate::time::monotonic_ns() / 1000;
        let _ = fmt::write(
            &mut line,
            format_args!(
                "[{:5}.{:06}] {:5} {}: {}",
                now_us / 1_000_000,
                now_us % 1_000_000,
                record.level(),
                record.target(),
                record.args()
            ),
        );
        line.bytes[line.len] = b'\n';
        write(&line.bytes[..=line.len]);
    }

    fn flush(&self) {}
}

/// Sends log records of `level` and above to the console.
pub(crate) fn start_logging(level: log::LevelFilter) {
    static LOGGER: Logger = Logger;
    // A second call finds the logger set, which is fine.
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(level);
}
