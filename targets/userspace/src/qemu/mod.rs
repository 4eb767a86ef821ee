//! Running a guest in QEMU: process, devices, console, exit status. Shared by the targets that boot.
//!
//! # What a target provides
//! One file, [`rumprun`] or [`linux_module`], with `run(&RunSpec) -> Result<ExitStatus, Failure>`, which
//! 1. builds what boots, with [`build::step`] (spinner, Ctrl-C and error output are its own);
//! 2. makes a [`Machine`]: [`Machine::microvm`] or [`Machine::q35`], [`Machine::kernel`], [`Machine::arg`] for the rest.
//!    CPUs, memory, disks and the network come from the [`RunSpec`], already checked, as virtio devices in order
//!    (disks first), on virtio-mmio for microvm and PCI for q35;
//! 3. hands the guest `spec.config.to_json()` by a way of its own (`-append`, a second module, fw_cfg);
//! 4. calls [`Machine::run`], which streams the first serial port as the console until QEMU ends.
//!
//! # Ctrl-C
//! The host sends [`STOP`] to the console, and the guest ends as it does when its application ends: its disks are synced.
//! A guest that takes too long is ended from outside.
//!
//! # Exit status
//! The guest ends the machine by writing [`exit_value`] as one byte to port [`DEBUG_EXIT_PORT`]; QEMU then ends with twice
//! that plus one. QEMU's own failures (exit code 1) cannot be mistaken for it. A guest that
//! powers off counts as success only where its target says so, since a reset looks the same.

pub mod accel;
mod backlog;
pub mod build;
mod channel;
pub mod linux_module;
mod machine;
mod process;
pub mod qmp;
pub mod rumprun;
pub mod symbols;
mod watch;

pub use accel::Accelerator;
pub use machine::Machine;
pub(crate) use process::die_with_parent;
pub use process::{End, Process};

use crate::Failure;
use hypercall::ExitStatus;

/// I/O port of the isa-debug-exit device (4 bytes long).
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

const QEMU: &str = "qemu-system-x86_64";

/// Says so before anything is built for it, if QEMU is not there.
pub(crate) fn check_installed() -> Result<(), Failure> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|dir| dir.join(QEMU).is_file()) {
        return Ok(());
    }
    Err(Failure::new(format!(
        "{QEMU} is not installed: install it (Debian: apt-get install qemu-system-x86), or use --on userspace"
    )))
}

/// What the host sends to the guest's console to ask it to end: end of text, which is what Ctrl-C is on a terminal. It is
/// sent again until the guest has ended, because a guest that boots does not listen yet.
pub const STOP: u8 = 3;

/// What a guest writes to [`DEBUG_EXIT_PORT`] to end with `status`: 16 more than its exit code.
pub const fn exit_value(status: ExitStatus) -> u8 {
    status.code() + 16
}

fn status_of(code: Option<i32>) -> Option<ExitStatus> {
    let all = [ExitStatus::Success, ExitStatus::Failure, ExitStatus::Usage, ExitStatus::Panic];
    match code? {
        0 => Some(ExitStatus::Success),
        code => all.into_iter().find(|status| i32::from(exit_value(*status)) * 2 + 1 == code),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_come_back() {
        for status in [ExitStatus::Success, ExitStatus::Failure, ExitStatus::Usage, ExitStatus::Panic] {
            assert_eq!(status_of(Some(i32::from(exit_value(status)) * 2 + 1)), Some(status));
        }
        assert_eq!(status_of(Some(0)), Some(ExitStatus::Success));
        assert_eq!(status_of(Some(1)), None);
        assert_eq!(status_of(None), None);
    }
}
