//! Interrupts and exceptions: the table, the entry code, and who handles what.

pub(crate) mod apic;
mod exceptions;
pub(crate) mod ioapic;
pub(crate) mod irq;

use crate::cpu::descriptors::{CODE, IST_DOUBLE, IST_FAULT, IST_NMI};
use crate::sync::SpinLock;

#[cfg(target_os = "none")]
core::arch::global_asm!(include_str!("entry.s"), interrupt = sym interrupt);

/// Vectors for devices.
pub(crate) const FIRST_DEVICE_VECTOR: u8 = 0x30;
/// How many there are on each CPU.
pub(crate) const DEVICE_VECTORS: usize = 176;
/// The local timer.
pub(crate) const TIMER_VECTOR: u8 = 0xf0;
/// Another CPU says: look at your run queue.
pub(crate) const RESCHEDULE_VECTOR: u8 = 0xf1;
/// An interrupt that went away while it was delivered; not acknowledged.
pub(crate) const SPURIOUS_VECTOR: u8 = 0xff;

/// What `entry.s` pushes.
#[repr(C)]
pub(crate) struct Frame {
    r15: u64,
    r14: u64,
    r13: u64,
    r12: u64,
    rbp: u64,
    rbx: u64,
    r11: u64,
    r10: u64,
    r9: u64,
    r8: u64,
    rdi: u64,
    rsi: u64,
    rdx: u64,
    rcx: u64,
    rax: u64,
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// Descriptors of the 256 vectors (Intel SDM volume 3, 6.14.1).
static TABLE: SpinLock<[[u64; 2]; 256]> = SpinLock::new([[0; 2]; 256]);

unsafe extern "C" {
    static interrupt_stubs: u8;
}

/// Fills in the table. Called once.
pub(crate) fn init() {
    let stubs = (&raw const interrupt_stubs).addr() as u64;
    let mut table = TABLE.lock();
    for (vector, descriptor) in table.iter_mut().enumerate() {
        let stub = stubs + 16 * vector as u64;
        let stack = match vector {
            8 => IST_DOUBLE,
            2 | 18 => IST_NMI,
            0..32 => IST_FAULT,
            _ => 0,
        };
        // Present, interrupt gate, ring 0.
        let kind = 0x8e00 | u64::from(stack);
        *descriptor =
            [(stub & 0xffff) | u64::from(CODE) << 16 | kind << 32 | (stub >> 16 & 0xffff) << 48, stub >> 32];
    }
}

/// Address and limit of the table, for `lidt`.
pub(crate) fn table() -> (usize, u16) {
    let table = TABLE.lock();
    (table.as_ptr().addr(), (size_of_val(&*table) - 1) as u16)
}

/// Every interrupt and exception gets here, with interrupts off.
#[cfg(target_os = "none")]
extern "C" fn interrupt(frame: &mut Frame) {
    let vector = frame.vector as u8;
    match vector {
        0..32 => exceptions::exception(frame),
        TIMER_VECTOR => {
            apic::end_of_interrupt();
            crate::time::timer::fired();
        }
        RESCHEDULE_VECTOR => {
            apic::end_of_interrupt();
            crate::thread::scheduler::kicked();
        }
        SPURIOUS_VECTOR => return,
        FIRST_DEVICE_VECTOR..TIMER_VECTOR => irq::handle(vector),
        _ => {}
    }
    crate::thread::scheduler::interrupt_exit();
}
