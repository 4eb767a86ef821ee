//! Instructions that Rust has no words for.

use core::arch::asm;

/// Writes a byte to an I/O port.
///
/// # Safety
/// The port belongs to a device that the caller drives, and the write cannot harm memory.
pub(crate) unsafe fn outb(port: u16, value: u8) {
    // SAFETY: by the caller.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

/// Writes 32 bits to an I/O port.
///
/// # Safety
/// As [`outb`].
pub(crate) unsafe fn outl(port: u16, value: u32) {
    // SAFETY: by the caller.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) }
}

/// Writes 16 bits to an I/O port.
///
/// # Safety
/// As [`outb`].
pub(crate) unsafe fn outw(port: u16, value: u16) {
    // SAFETY: by the caller.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags)) }
}

/// Reads a byte from an I/O port.
///
/// # Safety
/// Reading has no effect that harms memory.
pub(crate) unsafe fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: by the caller.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Reads 32 bits from an I/O port.
///
/// # Safety
/// As [`inb`].
pub(crate) unsafe fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: by the caller.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Reads a model-specific register.
///
/// # Safety
/// The register exists on this CPU.
pub(crate) unsafe fn rdmsr(msr: u32) -> u64 {
    let (high, low): (u32, u32);
    // SAFETY: by the caller.
    unsafe {
        asm!("rdmsr", in("ecx") msr, out("edx") high, out("eax") low, options(nomem, nostack, preserves_flags))
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
///
/// # Safety
/// The register exists on this CPU, and the value breaks no invariant that memory safety rests on.
pub(crate) unsafe fn wrmsr(msr: u32, value: u64) {
    // SAFETY: by the caller.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("edx") (value >> 32) as u32, in("eax") value as u32, options(nostack))
    }
}

/// The address that the last page fault was about.
pub(crate) fn fault_address() -> usize {
    let value;
    // SAFETY: reading CR2 at ring 0 has no effect.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags)) }
    value
}

/// The physical address of the page tables in use.
pub(crate) fn page_tables() -> u64 {
    let value: u64;
    // SAFETY: reading CR3 at ring 0 has no effect.
    unsafe { asm!("mov {}, cr3", out(reg) value, options(nomem, nostack, preserves_flags)) }
    value & !0xfff
}

/// Goes over to other page tables.
///
/// # Safety
/// They map everything that is in use at the same place, with rights no smaller than needed.
pub(crate) unsafe fn set_page_tables(phys: u64) {
    // SAFETY: by the caller.
    unsafe { asm!("mov cr3, {}", in(reg) phys, options(nostack, preserves_flags)) }
}

/// Sets bits of CR4.
///
/// # Safety
/// The CPU has the features, and the running code can live with them.
pub(crate) unsafe fn set_cr4(bits: u64) {
    // SAFETY: by the caller.
    unsafe {
        asm!("mov {t}, cr4", "or {t}, {b}", "mov cr4, {t}", t = out(reg) _, b = in(reg) bits, options(nostack))
    }
}

/// The time stamp counter. Not ordered against other instructions.
pub(crate) fn rdtsc() -> u64 {
    // SAFETY: RDTSC has no effect on memory, and CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// A CPUID leaf, or zeros when the CPU does not have it.
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> core::arch::x86_64::CpuidResult {
    use core::arch::x86_64::{__cpuid_count, CpuidResult};
    let last = __cpuid_count(leaf & 0xffff_0000, 0).eax;
    if last < leaf {
        return CpuidResult { eax: 0, ebx: 0, ecx: 0, edx: 0 };
    }
    __cpuid_count(leaf, subleaf)
}

/// Whether interrupts are on, on this CPU.
#[inline]
pub(crate) fn interrupts_on() -> bool {
    let flags: u64;
    // SAFETY: pushes and pops one word.
    unsafe { asm!("pushfq", "pop {}", out(reg) flags, options(preserves_flags)) }
    flags & 0x200 != 0
}

/// Turns interrupts off.
#[inline]
pub(crate) fn interrupts_disable() {
    // SAFETY: fewer interruptions harm nobody's memory. Not `nomem`: the compiler must not move accesses out of the
    // section that this begins.
    unsafe { asm!("cli", options(nostack)) }
}

/// Turns interrupts on.
///
/// # Safety
/// The descriptor tables are loaded, and the caller holds no spin lock.
#[inline]
pub(crate) unsafe fn interrupts_enable() {
    // SAFETY: by the caller.
    unsafe { asm!("sti", options(nostack)) }
}

/// Turns interrupts on and sleeps until one comes, without a gap between the two.
///
/// # Safety
/// As [`interrupts_enable`].
pub(crate) unsafe fn enable_and_halt() {
    // SAFETY: by the caller.
    unsafe { asm!("sti", "hlt", options(nostack)) }
}

/// Stops this CPU for good (but for NMIs, after which it stops again).
pub(crate) fn halt_forever() -> ! {
    loop {
        // SAFETY: nothing runs after it.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}

/// The frame pointer of the caller, where a backtrace starts.
#[inline(always)]
pub(crate) fn frame_pointer() -> usize {
    let value;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rbp", out(reg) value, options(nomem, nostack, preserves_flags)) }
    value
}
