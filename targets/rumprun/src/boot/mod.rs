//! From the first instruction to the first thread.

pub(crate) mod cmdline;
pub(crate) mod start_info;

use core::sync::atomic::{AtomicU64, Ordering};

/// The time stamp counter at the first instruction. Written by `entry.s`.
#[unsafe(no_mangle)]
static ENTRY_TSC: AtomicU64 = AtomicU64::new(0);

#[cfg(target_os = "none")]
core::arch::global_asm!(include_str!("entry.s"), boot_main = sym boot_main);

/// The time stamp counter at the first instruction.
pub(crate) fn entry_tsc() -> u64 {
    ENTRY_TSC.load(Ordering::Relaxed)
}

/// Called by `entry.s` on the boot stack, with the address that the loader left in ebx.
#[cfg(target_os = "none")]
extern "C" fn boot_main(start_info: u32) -> ! {
    crate::cpu::prepare_boot_cpu();
    // SAFETY: this is the first code on the first CPU.
    unsafe { crate::cpu::adopt(0) };
    crate::console::init();
    // SAFETY: the loader's address, by the PVH protocol.
    let info = match unsafe { start_info::read(u64::from(start_info)) } {
        Ok(info) => info,
        Err(why) => panic!("boot: {why}"),
    };
    // SAFETY: called once, here, before any other memory is used.
    unsafe { crate::memory::init(info) };
    crate::start::start(info)
}
