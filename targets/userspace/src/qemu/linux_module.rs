//! `--on linux-module`: a Debian kernel booted in QEMU, which loads the module.
//!
//! To do here: build the module ([`super::build::cargo`]), find the kernel, make the initramfs, and describe the machine.

use crate::{Failure, RunSpec};
use hypercall::ExitStatus;

/// Builds the module if it is not up to date, boots the kernel, loads the module and waits until it ends.
///
/// Errors are lines for a person. The guest's own end is an `Ok`.
pub fn run(_spec: &RunSpec) -> Result<ExitStatus, Failure> {
    Err(Failure::new("the linux-module target is not part of this build yet: use --on userspace"))
}
