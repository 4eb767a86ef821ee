//! `--on rumprun`: the unikernel image of an application, booted in QEMU.

use super::{Machine, build, symbols};
use crate::{Failure, HostDisk, MachineKind, RunSpec};
use hypercall::ExitStatus;
use module_build::toolchain::{Need, TARGET, Toolchain};
use std::path::PathBuf;

/// The profile of the workspace that images are built with.
const PROFILE: &str = "image";
/// Memory of the machine unless told otherwise.
const DEFAULT_MEMORY: u64 = 128 << 20;

/// Builds the image of the application `app` if it is not up to date, and says where it is.
pub fn image(app: &str) -> Result<PathBuf, Failure> {
    image_with(app, None)
}

/// As [`image`], able to do something more: a feature of the target's crate. It is another file.
pub fn image_with(app: &str, feature: Option<&str>) -> Result<PathBuf, Failure> {
    let what = format!("building the unikernel {app}");
    let package = "anykernel-rumprun";
    let workspace = build::workspace()?;
    let target_dir =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from);
    let features = feature.map_or_else(|| app.to_owned(), |feature| format!("{app},{feature}"));
    let mut cargo = build::cargo()?;
    cargo.args(["build", "--package", package, "--profile", PROFILE, "--target", TARGET]);
    cargo.args(["--features", &features, "--bin", app]);
    Toolchain::find(Need::Core)?.apply(&mut cargo);
    // Cargo gives all of them one name, so nobody else may build until this one is packed.
    let _exclusive = build::exclusive(&target_dir)?;
    build::step(&what, cargo)?;
    let linked = target_dir.join(TARGET).join(PROFILE).join(app);
    let packed =
        linked.with_extension(feature.map_or_else(|| "elf".to_owned(), |feature| format!("{feature}.elf")));
    let fail = |error: &dyn std::fmt::Display| Failure::new(format!("{}: {error}", linked.display()));
    let elf = std::fs::read(&linked).map_err(|error| fail(&error))?;
    let image = symbols::pack(&elf).map_err(|error| fail(&error))?;
    if std::fs::read(&packed).ok().as_ref() != Some(&image) {
        // Whole or not at all: another run may be booting it.
        let fresh = linked.with_extension(format!("elf.{}", std::process::id()));
        std::fs::write(&fresh, &image)
            .and_then(|()| std::fs::rename(&fresh, &packed))
            .map_err(|error| fail(&error))?;
    }
    Ok(packed)
}

/// Builds the image if it is not up to date, boots it and waits until it ends.
///
/// Errors are lines for a person. The guest's own end is an `Ok`.
pub fn run(spec: &RunSpec) -> Result<ExitStatus, Failure> {
    let app = spec.config.app.first().map(String::as_str).unwrap_or_default();
    match app {
        // Its image has USB anyway.
        "usb" => boot(spec, &image_with("usb-app", spec.layer())?),
        app => boot(spec, &image_with(app, spec.feature())?),
    }
}

/// Boots an image that is there.
pub fn boot(spec: &RunSpec, image: &std::path::Path) -> Result<ExitStatus, Failure> {
    let mut machine = match spec.machine {
        // Its host controllers are on PCI.
        MachineKind::Microvm if spec.usb.is_empty() => {
            Machine::microvm("the unikernel", spec, DEFAULT_MEMORY)
        }
        _ => Machine::q35("the unikernel", spec, DEFAULT_MEMORY),
    };
    // The configuration is the boot module: a file in memory, which leaves nothing behind.
    let (config, _file) = HostDisk::memory_path(spec.config.to_json().as_bytes())
        .map_err(|error| Failure::new(format!("handing over the configuration: {error}")))?;
    machine.kernel(image);
    machine.arg("-initrd").arg(config);
    machine.run(spec)
}
