//! Which accelerator: by measuring, because /dev/kvm may be there and slower than no acceleration at all (nested or
//! software KVM interprets a guest kernel at a few million instructions a second).
#![expect(unsafe_code, reason = "gives a page of memory to a virtual machine")]

use std::process::Command;
use std::sync::OnceLock;
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
        static FOUND: OnceLock<Accelerator> = OnceLock::new();
        *FOUND.get_or_init(|| match loop_time() {
            Some(time) if time < FAST => Accelerator::Kvm,
            _ => Accelerator::Tcg,
        })
    }

    /// QEMU's arguments for it.
    pub fn args(self) -> [&'static str; 4] {
        match self {
            Accelerator::Kvm => ["-accel", "kvm", "-cpu", kvm_cpu()],
            Accelerator::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }

    /// QEMU's arguments for a guest of so many CPUs that rewrites its own code while others run it, as Linux does with its
    /// static keys.
    ///
    /// QEMU before 8.1 reads the code that it translates without a lock, so a CPU can go on with a translation that is
    /// older than the code: it meets a breakpoint that Linux has taken away long ago, which is the end of that Linux. With
    /// one thread for all CPUs this cannot happen.
    pub fn args_for_self_modifying(self, cpus: u32) -> [&'static str; 4] {
        match self {
            Accelerator::Tcg if cpus > 1 && !translates_safely() => {
                ["-accel", "tcg,thread=single", "-cpu", "max"]
            }
            other => other.args(),
        }
    }
}

/// Whether this QEMU locks the code that it translates; if it does not say its version, it may not.
fn translates_safely() -> bool {
    static SAFE: OnceLock<bool> = OnceLock::new();
    *SAFE.get_or_init(|| {
        let output = Command::new(super::QEMU).arg("--version").output();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        text.ok().and_then(|text| version(&text)).is_some_and(|version| version >= (8, 1))
    })
}

/// The version in "QEMU emulator version 7.2.22 (Debian ...)".
fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split("version ").nth(1)?.split(['.', ' ', '\n']).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// The host's CPU, with its steady time stamp counter.
///
/// QEMU gives the guest IA32_ARCH_CAPABILITIES where the CPU has it, and ends itself if that fails, as it does on a software
/// KVM that knows the feature and not the register.
fn kvm_cpu() -> &'static str {
    static CPU: OnceLock<&str> = OnceLock::new();
    CPU.get_or_init(|| match takes_capabilities() {
        Some(false) => "host,migratable=off,+invtsc,arch-capabilities=off",
        _ => "host,migratable=off,+invtsc",
    })
}

/// Whether a virtual CPU takes the host's IA32_ARCH_CAPABILITIES (Intel SDM volume 4, register 0x10a); `None` without KVM.
fn takes_capabilities() -> Option<bool> {
    let kvm = kvm_ioctls::Kvm::new().ok()?;
    let cpu = kvm.create_vm().ok()?.create_vcpu(0).ok()?;
    cpu.set_cpuid2(&kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).ok()?).ok()?;
    let register = kvm_bindings::kvm_msr_entry { index: 0x10a, ..Default::default() };
    let mut registers = kvm_bindings::Msrs::from_entries(&[register]).ok()?;
    // What cannot be read QEMU does not give.
    let known = kvm.get_msrs(&mut registers).is_ok_and(|read| read == 1);
    Some(!known || cpu.set_msrs(&registers).is_ok_and(|written| written == 1))
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
    fn reads_versions() {
        assert_eq!(version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\n"), Some((7, 2)));
        assert_eq!(version("QEMU emulator version 10.0.2\nCopyright"), Some((10, 0)));
        assert_eq!(version("QEMU emulator version 9.1\n"), Some((9, 1)));
        assert_eq!(version("something else"), None);
    }

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
