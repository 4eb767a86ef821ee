//! How fast the time stamp counter and the local APIC's timer run.
//!
//! In this order: KVM's clock says it; the hypervisor's timing leaf (CPUID 0x40000010) says it; the CPU says it (CPUID
//! 0x15); QEMU's emulator has neither, nor a timer of any kind on the microvm machine, but its APIC timer is known to run
//! at 1 GHz, so the counter is measured against that; last, ACPI's power management timer.

use super::pvclock;
use crate::cpu::regs::{self, cpuid, inl};
use crate::interrupts::apic;

/// How long a measurement takes, in nanoseconds: its error is that of two readings of a device register, about 0.1 us.
const MEASURE_NS: u32 = 150_000;
/// QEMU's and KVM's APIC timer.
const VIRTUAL_APIC_HZ: u64 = 1_000_000_000;
/// ACPI 6.5, 4.8.2.1.
const PM_TIMER_HZ: u64 = 3_579_545;

pub(super) struct Rates {
    pub(super) tsc_hz: u64,
    pub(super) apic_hz: u64,
}

/// Name of the hypervisor, or zeros.
fn hypervisor() -> [u32; 3] {
    if cpuid(1, 0).ecx & (1 << 31) == 0 {
        return [0; 3];
    }
    let leaf = cpuid(0x4000_0000, 0);
    [leaf.ebx, leaf.ecx, leaf.edx]
}

const fn name(text: &[u8; 12]) -> [u32; 3] {
    let mut words = [0; 3];
    let mut index = 0;
    while index < 12 {
        words[index / 4] |= (text[index] as u32) << (index % 4 * 8);
        index += 1;
    }
    words
}

/// Reads the counter and `other` at the same moment: of several tries that in which the least time passed.
fn together(other: impl Fn() -> u32) -> (u64, u32) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..8 {
        let before = regs::rdtsc();
        let value = other();
        let after = regs::rdtsc();
        if after - before < best.0 {
            best = (after - before, before + (after - before) / 2, value);
        }
    }
    (best.1, best.2)
}

/// The counter's rate, measured against `other`, which counts up at `hz` modulo `mask + 1`.
fn measure(other: impl Fn() -> u32, hz: u64, mask: u32) -> Option<u64> {
    let wanted = (u64::from(MEASURE_NS) * hz / 1_000_000_000) as u32;
    let (first_tsc, first) = together(&other);
    let mut looks = 0;
    while other().wrapping_sub(first) & mask < wanted {
        looks += 1;
        if looks > 10_000_000 {
            return None;
        }
        core::hint::spin_loop();
    }
    let (last_tsc, last) = together(&other);
    let passed = u64::from(last.wrapping_sub(first) & mask);
    Some(((u128::from(last_tsc - first_tsc) * u128::from(hz)) / u128::from(passed)) as u64)
}

/// Finds both rates.
pub(super) fn rates(pm_timer: Option<u16>) -> Result<Rates, &'static str> {
    let hypervisor = hypervisor();
    let kvm = hypervisor == name(b"KVMKVMKVM\0\0\0");
    let tcg = hypervisor == name(b"TCGTCGTCGTCG");
    let timing = if hypervisor == [0; 3] { None } else { Some(cpuid(0x4000_0010, 0)) };
    let timing = timing.filter(|leaf| leaf.eax != 0 && leaf.ebx != 0);
    let known_apic =
        timing.map(|leaf| u64::from(leaf.ebx) * 1000).or_else(|| (kvm || tcg).then_some(VIRTUAL_APIC_HZ));
    let crystal = cpuid(0x15, 0);

    let mut tsc_hz = pvclock::tsc_hz().or_else(|| timing.map(|leaf| u64::from(leaf.eax) * 1000));
    if tsc_hz.is_none() && crystal.eax != 0 && crystal.ebx != 0 && crystal.ecx != 0 {
        tsc_hz = Some(u64::from(crystal.ecx) * u64::from(crystal.ebx) / u64::from(crystal.eax));
    }
    if let (None, Some(hz)) = (tsc_hz, known_apic) {
        apic::start_counting();
        tsc_hz = measure(apic::counted, hz, u32::MAX);
        apic::set_countdown(0);
        apic::enable();
    }
    if let (None, Some(port)) = (tsc_hz, pm_timer) {
        // SAFETY: reading ACPI's timer has no effect. Only its low 24 bits are sure to be there.
        tsc_hz = measure(|| unsafe { inl(port) }, PM_TIMER_HZ, 0xff_ffff);
    }
    let tsc_hz = tsc_hz.filter(|hz| *hz > 1_000_000).ok_or(
        "nothing says how fast the time stamp counter runs: give the machine kvmclock, CPUID leaf 0x15 or an ACPI timer",
    )?;
    let apic_hz = match known_apic {
        Some(hz) => hz,
        None if apic::has_deadline() => 0,
        None => {
            // The other way round: the APIC's timer against the counter.
            apic::start_counting();
            let (first_tsc, first) = together(apic::counted);
            while regs::rdtsc() - first_tsc < tsc_hz / 1000 {
                core::hint::spin_loop();
            }
            let (last_tsc, last) = together(apic::counted);
            apic::set_countdown(0);
            apic::enable();
            u64::from(last - first) * tsc_hz / (last_tsc - first_tsc)
        }
    };
    Ok(Rates { tsc_hz, apic_hz })
}
