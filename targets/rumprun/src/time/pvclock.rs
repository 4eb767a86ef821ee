//! KVM's paravirtual clock (Linux `virt/kvm/x86/msr.rst` and `arch/x86/include/asm/pvclock-abi.h`): the host keeps, in
//! memory of ours, how to make nanoseconds of the time stamp counter.

use crate::cpu::{self, NoPreempt, regs};
use crate::memory::paging;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

const MSR_WALL: u32 = 0x4b56_4d00;
const MSR_SYSTEM: u32 = 0x4b56_4d01;
const FEATURE_CLOCK: u32 = 1 << 3;
const ENABLE: u64 = 1;
/// The counters of all CPUs agree.
const STABLE: u8 = 1;

/// `struct pvclock_vcpu_time_info`: written by the host while `version` is odd.
#[repr(C, align(32))]
pub(crate) struct Slot {
    version: AtomicU32,
    _pad: u32,
    tsc: AtomicU64,
    system_ns: AtomicU64,
    multiplier: AtomicU32,
    shift: AtomicU8,
    flags: AtomicU8,
    _pad2: [u8; 2],
}

/// `struct pvclock_wall_clock`.
#[repr(C, align(16))]
struct Wall {
    version: AtomicU32,
    seconds: AtomicU32,
    nanoseconds: AtomicU32,
}

static WALL: Wall =
    Wall { version: AtomicU32::new(0), seconds: AtomicU32::new(0), nanoseconds: AtomicU32::new(0) };

static PRESENT: AtomicBool = AtomicBool::new(false);
/// What was last read, where the CPUs' counters do not agree.
static LAST: AtomicU64 = AtomicU64::new(0);

impl Slot {
    pub(crate) const fn new() -> Self {
        Self {
            version: AtomicU32::new(0),
            _pad: 0,
            tsc: AtomicU64::new(0),
            system_ns: AtomicU64::new(0),
            multiplier: AtomicU32::new(0),
            shift: AtomicU8::new(0),
            flags: AtomicU8::new(0),
            _pad2: [0; 2],
        }
    }

    /// Nanoseconds now, and whether all CPUs would say the same.
    fn read(&self) -> (u64, bool) {
        loop {
            let version = self.version.load(Ordering::Acquire);
            let ticks = super::ordered_tsc().saturating_sub(self.tsc.load(Ordering::Relaxed));
            let shift = self.shift.load(Ordering::Relaxed) as i8;
            let ticks =
                if shift >= 0 { ticks << (shift as u32 & 63) } else { ticks >> (shift.unsigned_abs() & 63) };
            let passed = super::scale(ticks, u64::from(self.multiplier.load(Ordering::Relaxed)));
            let now = self.system_ns.load(Ordering::Relaxed).wrapping_add(passed);
            let stable = self.flags.load(Ordering::Relaxed) & STABLE != 0;
            fence(Ordering::Acquire);
            if version & 1 == 0 && self.version.load(Ordering::Relaxed) == version {
                return (now, stable);
            }
        }
    }
}

/// Where the host reaches a static or leaked object.
fn physical<T>(object: &T) -> Option<u64> {
    paging::translate(core::ptr::from_ref(object).addr())
}

/// Turns the clock on for this CPU, if it was found on the boot CPU.
pub(crate) fn enable_on_this_cpu() {
    if PRESENT.load(Ordering::Relaxed)
        && let Some(at) = physical(&cpu::this().clock)
    {
        // SAFETY: the slot stays where it is for good; it is made of atomics, so the host may write it.
        unsafe { regs::wrmsr(MSR_SYSTEM, at | ENABLE) };
    }
}

/// Looks for the clock and turns it on. Says whether it is there.
pub(super) fn init() -> bool {
    let vendor = regs::cpuid(0x4000_0000, 0);
    let kvm = regs::cpuid(1, 0).ecx & (1 << 31) != 0 && vendor.ebx.to_le_bytes() == *b"KVMK";
    if kvm && regs::cpuid(0x4000_0001, 0).eax & FEATURE_CLOCK != 0 {
        PRESENT.store(true, Ordering::Relaxed);
        enable_on_this_cpu();
    }
    PRESENT.load(Ordering::Relaxed)
}

/// Nanoseconds since the machine was made.
pub(super) fn now_ns() -> u64 {
    let (now, stable) = cpu::get(0).clock.read();
    if stable {
        return now;
    }
    let _stay = NoPreempt::new();
    let now = cpu::this().clock.read().0;
    LAST.fetch_max(now, Ordering::AcqRel).max(now)
}

/// Rate of the time stamp counter, as the clock implies it.
pub(super) fn tsc_hz() -> Option<u64> {
    let slot = &cpu::get(0).clock;
    let multiplier = u128::from(slot.multiplier.load(Ordering::Relaxed));
    if !PRESENT.load(Ordering::Relaxed) || multiplier == 0 {
        return None;
    }
    let hz = (1_000_000_000u128 << 32) / multiplier;
    let shift = slot.shift.load(Ordering::Relaxed) as i8;
    let hz = if shift >= 0 { hz >> shift } else { hz << shift.unsigned_abs() };
    u64::try_from(hz).ok()
}

/// Nanoseconds since 1970 now.
pub(super) fn wall_ns() -> Option<u64> {
    // SAFETY: as in `enable_on_this_cpu`.
    unsafe { regs::wrmsr(MSR_WALL, physical(&WALL)?) };
    let seconds = u64::from(WALL.seconds.load(Ordering::Acquire));
    let start = seconds * 1_000_000_000 + u64::from(WALL.nanoseconds.load(Ordering::Acquire));
    (WALL.version.load(Ordering::Acquire) & 1 == 0 && seconds != 0).then(|| start + now_ns())
}
