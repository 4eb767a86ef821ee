//! Which accelerator: by measuring, because /dev/kvm may be there and slower than no acceleration at all (nested or
//! software KVM interprets a guest kernel at a few million instructions a second).
#![expect(unsafe_code, reason = "gives a page of memory to a virtual machine")]

use std::time::{Duration, Instant};

/// How QEMU runs guest code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// Hardware virtualization.
    Kvm,
    /// Translation.
    Tcg,
}

impl Accelerator {
    /// The faster one here. Takes well under 100 ms, once per process.
    pub fn detect() -> Self {
        static FOUND: std::sync::OnceLock<Accelerator> = std::sync::OnceLock::new();
        *FOUND.get_or_init(|| match loop_time() {
            Some(time) if time < FAST => Accelerator::Kvm,
            _ => Accelerator::Tcg,
        })
    }

    /// QEMU's arguments for it.
    pub fn args(self) -> &'static [&'static str] {
        match self {
            Accelerator::Kvm => &["-accel", "kvm", "-cpu", "host,migratable=off,+invtsc"],
            Accelerator::Tcg => &["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }
}

/// Iterations of a loop of two instructions. Hardware takes about 20 us, software KVM over 10 ms, TCG about 100 us.
const ITERATIONS: u64 = 20_000;
const FAST: Duration = Duration::from_millis(2);

/// `dec ecx; jnz $-2; hlt` in real mode.
const CODE: [u8; 5] = [0x66, 0x49, 0x75, 0xfc, 0xf4];

#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// How long the loop takes in a virtual machine made for it; `None` if there is no usable KVM.
fn loop_time() -> Option<Duration> {
    let mut page = Box::new(Page([0; 4096]));
    page.0[..CODE.len()].copy_from_slice(&CODE);
    let vm = kvm_ioctls::Kvm::new().ok()?.create_vm().ok()?;
    let region = kvm_bindings::kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0x1000,
        memory_size: 4096,
        userspace_addr: core::ptr::from_mut(&mut *page).addr() as u64,
    };
    // SAFETY: the page is page-aligned, as long as the region says, and dropped only after the virtual machine.
    unsafe { vm.set_user_memory_region(region) }.ok()?;
    let mut cpu = vm.create_vcpu(0).ok()?;
    let mut sregs = cpu.get_sregs().ok()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    cpu.set_sregs(&sregs).ok()?;
    let regs = kvm_bindings::kvm_regs { rip: 0x1000, rcx: ITERATIONS, rflags: 2, ..Default::default() };
    cpu.set_regs(&regs).ok()?;
    let start = Instant::now();
    let halted = matches!(cpu.run(), Ok(kvm_ioctls::VcpuExit::Hlt));
    let time = start.elapsed();
    drop(cpu);
    drop(vm);
    drop(page);
    halted.then_some(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decides_quickly_and_always_the_same() {
        let start = Instant::now();
        let first = Accelerator::detect();
        assert!(start.elapsed() < Duration::from_secs(2));
        assert_eq!(first, Accelerator::detect());
        // Without /dev/kvm there is only one answer.
        if !std::path::Path::new("/dev/kvm").exists() {
            assert_eq!(first, Accelerator::Tcg);
        }
    }
}
