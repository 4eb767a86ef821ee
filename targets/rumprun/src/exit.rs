//! The end of the machine.

use crate::cpu::regs::{self, outb, outl, outw};
use core::sync::atomic::{AtomicU32, Ordering};
use hypercall::ExitStatus;

/// QEMU's `isa-debug-exit`: value v ends QEMU with code `2 * v + 1`.
const DEBUG_EXIT: u16 = 0xf4;
/// Added to the status, so that no status looks like a failure of QEMU itself (which ends with 1): status s ends QEMU
/// with `2 * (s + STATUS_BASE) + 1`: 33 is success, 35 failure, 37 usage, 235 panic.
const STATUS_BASE: u8 = 16;

/// ACPI's power management control register and the value that turns the machine off: `port << 16 | value`, or 0.
static POWER_OFF: AtomicU32 = AtomicU32::new(0);

/// Says how ACPI turns the machine off.
pub(crate) fn set_power_off(port: u16, value: u16) {
    POWER_OFF.store(u32::from(port) << 16 | u32::from(value), Ordering::Relaxed);
}

/// Ends the machine: with a status where the debug device is there, else by turning it off, else by a reset.
pub(crate) fn exit(status: ExitStatus) -> ! {
    regs::interrupts_disable();
    // SAFETY: the ports end the machine or do nothing.
    unsafe {
        outl(DEBUG_EXIT, u32::from(status.code() + STATUS_BASE));
        let power_off = POWER_OFF.load(Ordering::Relaxed);
        if power_off != 0 {
            outw((power_off >> 16) as u16, power_off as u16);
        }
        // The keyboard controller's reset line: what Firecracker and QEMU's -no-reboot take as the end.
        outb(0x64, 0xfe);
    }
    crate::interrupts::apic::stop_others();
    regs::halt_forever()
}
