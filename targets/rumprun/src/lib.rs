//! The bare-metal x86_64 target: boot, memory, interrupts, SMP, and the hypercall contract on top of it ([`Machine`]).
//!
//! An image is a binary that names its application with [`image!`]; [`start`](mod@self) of the machine ends in it. The images
//! of this crate are its `[[bin]]`s, one feature each.
//!
//! What runs where: boot code in assembly ([`boot`]) enters 64-bit mode and builds page tables ([`memory`]); [`start`] brings
//! up interrupts, clocks ([`time`]) and all CPUs ([`cpu`]), starts the main thread ([`thread`]), registers drivers and calls the
//! application. On other systems than bare metal the crate is empty but for the tests of its parsers and allocators.
#![cfg_attr(target_os = "none", no_std)]
#![cfg_attr(
    not(target_os = "none"),
    allow(dead_code, reason = "only the tests use anything here: the rest is for bare metal")
)]

extern crate alloc;

mod boot;
mod bus;
mod console;
mod cpu;
#[cfg(target_os = "none")]
mod domain;
mod entropy;
mod exit;
mod host;
mod interrupts;
mod memory;
mod panic;
#[cfg(target_os = "none")]
mod start;
mod symbols;
mod sync;
mod thread;
mod time;

#[doc(hidden)]
pub use console::{SERIAL_LINE, interrupt_by_serial_port};
#[cfg(target_os = "none")]
#[doc(hidden)]
pub use domain::Domain;
pub use host::Machine;

#[cfg(target_os = "none")]
#[global_allocator]
static HEAP: memory::heap::Heap = memory::heap::Heap;

/// Memory that nobody has: whole page frames, in bytes. What the heap keeps for later counts as taken. Context: thread.
pub fn free_bytes() -> u64 {
    memory::frames::free_count() * hypercall::PAGE_SIZE as u64
}

/// Makes the binary an image that runs an application, given as `fn<H: Host>(&Arc<Kernel<H>>) -> ExitStatus`.
#[macro_export]
macro_rules! image {
    ($application:expr) => {
        #[cfg(target_os = "none")]
        #[unsafe(no_mangle)]
        fn anykernel_application(
            kernel: &$crate::reexport::Arc<$crate::reexport::Kernel<$crate::Domain>>,
        ) -> $crate::reexport::ExitStatus {
            $application(kernel)
        }

        #[cfg(not(target_os = "none"))]
        fn main() {
            $crate::not_an_image();
        }
    };
}

/// For [`image!`].
#[doc(hidden)]
pub mod reexport {
    pub use alloc::sync::Arc;
    pub use anykernel::Kernel;
    pub use hypercall::ExitStatus;
}

/// For [`image!`]: what a binary says that was built for the wrong target.
#[cfg(not(target_os = "none"))]
#[doc(hidden)]
pub fn not_an_image() {
    eprintln!(
        "this is a bootable image: build it with --target x86_64-unknown-none and boot it with `anykernel run --on rumprun`"
    );
    std::process::exit(2);
}
