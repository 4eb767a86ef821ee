//! `--on rumprun`: the unikernel image of an application, booted in QEMU.
//!
//! To do here: build the image ([`super::build::cargo`]), hand it the configuration, and describe the machine.

use crate::{Failure, RunSpec};
use hypercall::ExitStatus;

/// Builds the image if it is not up to date, boots it and waits until it ends.
///
/// Errors are lines for a person. The guest's own end is an `Ok`.
pub fn run(_spec: &RunSpec) -> Result<ExitStatus, Failure> {
    Err(Failure::new("the rumprun target is not part of this build yet: use --on userspace"))
}
