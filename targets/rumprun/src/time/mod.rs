//! Time: one monotonic clock for all CPUs, and the wall clock.
//!
//! The monotonic clock is KVM's paravirtual clock where it is offered, else the time stamp counter with a frequency that
//! is asked for or measured (`calibrate`).

mod calibrate;
pub(crate) mod pvclock;
mod rtc;
pub(crate) mod timer;

use crate::cpu::regs;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Nanoseconds per tick of the time stamp counter, times 2^32.
static NS_PER_TSC: AtomicU64 = AtomicU64::new(0);
/// Ticks of the time stamp counter per nanosecond, times 2^32.
static TSC_PER_NS: AtomicU64 = AtomicU64::new(0);
/// Ticks of the local APIC timer per nanosecond, times 2^32.
static APIC_PER_NS: AtomicU64 = AtomicU64::new(0);
/// What the paravirtual clock said at the first instruction, about.
static PV_START_NS: AtomicU64 = AtomicU64::new(0);
static USE_PV: AtomicBool = AtomicBool::new(false);
/// Wall clock when the monotonic clock was 0; 0 when the platform does not tell.
static WALL_START_NS: AtomicU64 = AtomicU64::new(0);

/// `value * factor / 2^32`.
fn scale(value: u64, factor: u64) -> u64 {
    ((u128::from(value) * u128::from(factor)) >> 32) as u64
}

/// `2^32 * numerator / denominator`.
fn ratio(numerator: u64, denominator: u64) -> u64 {
    ((u128::from(numerator) << 32) / u128::from(denominator.max(1))) as u64
}

/// The time stamp counter, read after everything before it in program order.
fn ordered_tsc() -> u64 {
    // SAFETY: LFENCE has no effect but order.
    unsafe { core::arch::asm!("lfence", options(nostack, preserves_flags)) };
    regs::rdtsc()
}

/// Nanoseconds since the first instruction. 0 before [`init`].
pub(crate) fn monotonic_ns() -> u64 {
    if USE_PV.load(Ordering::Relaxed) {
        return pvclock::now_ns().saturating_sub(PV_START_NS.load(Ordering::Relaxed));
    }
    let ticks = ordered_tsc().saturating_sub(crate::boot::entry_tsc());
    scale(ticks, NS_PER_TSC.load(Ordering::Relaxed))
}

/// Nanoseconds since 1970, or 0.
pub(crate) fn realtime_ns() -> u64 {
    match WALL_START_NS.load(Ordering::Relaxed) {
        0 => 0,
        start => start + monotonic_ns(),
    }
}

/// Sets the clocks up. Once, on the boot CPU, after its APIC is on; `pm_timer` is the I/O port of ACPI's timer, if any.
pub(crate) fn init(pm_timer: Option<u16>) -> Result<(), &'static str> {
    let pv = pvclock::init();
    let rates = calibrate::rates(pm_timer)?;
    NS_PER_TSC.store(ratio(1_000_000_000, rates.tsc_hz), Ordering::Relaxed);
    TSC_PER_NS.store(ratio(rates.tsc_hz, 1_000_000_000), Ordering::Relaxed);
    APIC_PER_NS.store(ratio(rates.apic_hz, 1_000_000_000), Ordering::Relaxed);
    if pv {
        let since_entry =
            scale(regs::rdtsc().saturating_sub(crate::boot::entry_tsc()), NS_PER_TSC.load(Ordering::Relaxed));
        PV_START_NS.store(pvclock::now_ns().saturating_sub(since_entry), Ordering::Relaxed);
        USE_PV.store(true, Ordering::Relaxed);
    }
    let wall_now = if pv { pvclock::wall_ns() } else { None }.or_else(rtc::now_ns);
    WALL_START_NS.store(wall_now.map_or(0, |now| now.saturating_sub(monotonic_ns())), Ordering::Relaxed);
    Ok(())
}
