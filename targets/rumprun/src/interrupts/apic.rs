//! The local APIC, as x2APIC where the CPU has it, else through its registers in memory (Intel SDM volume 3, 10).

use super::{SPURIOUS_VECTOR, TIMER_VECTOR};
use crate::cpu::regs::{self, outb, rdmsr, wrmsr};
use crate::memory::paging;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use hypercall::Result;

const MSR_APIC_BASE: u32 = 0x1b;
const MSR_X2APIC: u32 = 0x800;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

const ID: u32 = 0x20;
const END_OF_INTERRUPT: u32 = 0xb0;
const SPURIOUS: u32 = 0xf0;
const COMMAND_LOW: u32 = 0x300;
const COMMAND_HIGH: u32 = 0x310;
const TIMER: u32 = 0x320;
const TIMER_INITIAL: u32 = 0x380;
const TIMER_CURRENT: u32 = 0x390;
const TIMER_DIVIDE: u32 = 0x3e0;

const MASKED: u32 = 1 << 16;
const DEADLINE_MODE: u32 = 2 << 17;
const DIVIDE_BY_1: u32 = 0b1011;

const PENDING: u32 = 1 << 12;
const NMI_TO_OTHERS: u32 = 0xc_4400;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;

/// Where the registers are; 0 with x2APIC, or before [`init`].
static REGISTERS: AtomicUsize = AtomicUsize::new(0);
static X2APIC: AtomicBool = AtomicBool::new(false);
/// The timer is set to a time stamp instead of counting down.
static DEADLINE: AtomicBool = AtomicBool::new(false);

fn read(register: u32) -> u32 {
    if X2APIC.load(Ordering::Relaxed) {
        // SAFETY: x2APIC is on, and `register` is one of the above.
        return unsafe { rdmsr(MSR_X2APIC + (register >> 4)) } as u32;
    }
    let base = REGISTERS.load(Ordering::Relaxed);
    // SAFETY: `init` mapped the registers.
    unsafe { core::ptr::with_exposed_provenance::<u32>(base + register as usize).read_volatile() }
}

fn write(register: u32, value: u32) {
    if X2APIC.load(Ordering::Relaxed) {
        // SAFETY: as in `read`; none of these registers touches memory.
        return unsafe { wrmsr(MSR_X2APIC + (register >> 4), u64::from(value)) };
    }
    let base = REGISTERS.load(Ordering::Relaxed);
    // SAFETY: `init` mapped the registers.
    unsafe { core::ptr::with_exposed_provenance_mut::<u32>(base + register as usize).write_volatile(value) }
}

/// Finds out what the APIC can do. Once, on the boot CPU, before [`enable`].
pub(crate) fn init() -> Result<()> {
    let features = regs::cpuid(1, 0).ecx;
    if features & (1 << 21) != 0 {
        X2APIC.store(true, Ordering::Relaxed);
    } else {
        // SAFETY: every 64-bit CPU has the register.
        let base = unsafe { rdmsr(MSR_APIC_BASE) } & 0xf_ffff_f000;
        REGISTERS.store(paging::map_device(base, 4096)?, Ordering::Relaxed);
    }
    DEADLINE.store(features & (1 << 24) != 0, Ordering::Relaxed);
    // The old interrupt controllers, which firmware may have left on, keep quiet.
    // SAFETY: their mask registers.
    unsafe {
        outb(0x21, 0xff);
        outb(0xa1, 0xff);
    }
    Ok(())
}

/// Turns this CPU's APIC and its timer's vector on.
pub(crate) fn enable() {
    const ENABLE: u64 = 1 << 11;
    const EXTENDED: u64 = 1 << 10;
    // SAFETY: every 64-bit CPU has the register; the mode bits were checked against CPUID in `init`.
    unsafe {
        let extended = if X2APIC.load(Ordering::Relaxed) { EXTENDED } else { 0 };
        wrmsr(MSR_APIC_BASE, rdmsr(MSR_APIC_BASE) | ENABLE | extended);
    }
    write(SPURIOUS, 0x100 | u32::from(SPURIOUS_VECTOR));
    write(TIMER_DIVIDE, DIVIDE_BY_1);
    let mode = if has_deadline() { DEADLINE_MODE } else { 0 };
    write(TIMER, u32::from(TIMER_VECTOR) | mode);
}

/// Whether the timer takes a time stamp.
pub(crate) fn has_deadline() -> bool {
    DEADLINE.load(Ordering::Relaxed)
}

/// This CPU's address for interrupts.
pub(crate) fn id() -> u32 {
    if X2APIC.load(Ordering::Relaxed) { read(ID) } else { read(ID) >> 24 }
}

/// Says that the interrupt was taken.
pub(crate) fn end_of_interrupt() {
    write(END_OF_INTERRUPT, 0);
}

/// Lets the timer fire when the time stamp counter reaches `tsc`.
pub(crate) fn set_deadline(tsc: u64) {
    // SAFETY: `has_deadline` was asked.
    unsafe { wrmsr(MSR_TSC_DEADLINE, tsc) };
}

/// Lets the timer fire after `ticks` of its own clock (0: never).
pub(crate) fn set_countdown(ticks: u32) {
    write(TIMER_INITIAL, ticks);
}

/// Starts the timer at its highest count without letting it fire, to measure its clock.
pub(crate) fn start_counting() {
    write(TIMER_DIVIDE, DIVIDE_BY_1);
    write(TIMER, u32::from(TIMER_VECTOR) | MASKED);
    write(TIMER_INITIAL, u32::MAX);
}

/// How far it has counted since.
pub(crate) fn counted() -> u32 {
    u32::MAX - read(TIMER_CURRENT)
}

fn command(apic_id: u32, value: u32) {
    if X2APIC.load(Ordering::Relaxed) {
        // SAFETY: x2APIC is on; the command goes to a CPU that expects it, as our callers see to.
        return unsafe {
            wrmsr(MSR_X2APIC + (COMMAND_LOW >> 4), u64::from(apic_id) << 32 | u64::from(value))
        };
    }
    // The two halves belong together.
    let _off = crate::sync::InterruptsOff::new();
    write(COMMAND_HIGH, apic_id << 24);
    write(COMMAND_LOW, value);
    while read(COMMAND_LOW) & PENDING != 0 {
        core::hint::spin_loop();
    }
}

/// Interrupts another CPU.
pub(crate) fn send(apic_id: u32, vector: u8) {
    command(apic_id, 0x4000 | u32::from(vector));
}

/// Resets another CPU.
pub(crate) fn send_init(apic_id: u32) {
    command(apic_id, INIT);
}

/// Lets a CPU that was reset start at physical address `page` (below 1 MiB).
pub(crate) fn send_startup(apic_id: u32, page: u64) {
    command(apic_id, STARTUP | (page >> 12) as u32);
}

/// Stops all other CPUs; they see that a panic is in progress.
pub(crate) fn stop_others() {
    if crate::cpu::count() > 1 {
        command(0, NMI_TO_OTHERS);
    }
}
