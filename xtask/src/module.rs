//! The Linux module for the user's own kernel.

use crate::sh::{Result, root, run, step};
use module_build::{Build, build};
use std::path::{Path, PathBuf};

/// What to load it with: serves a disk over HTTP.
const PARAMETERS: &str =
    r#"disk=/dev/vdb config='{"app":["httpd"],"mounts":[{"source":"disk0","target":"/","read_only":true}]}'"#;

/// Builds for the kernel with these headers; without, for the running one.
pub(crate) fn run_build(kernel: Option<&Path>, output: Option<&Path>) -> Result {
    let kernel = match kernel {
        Some(kernel) => kernel.to_path_buf(),
        None => running()?,
    };
    let plan = Build { workspace: root(), kernel, feature: None };
    let module = build::<String>(&plan, &mut |what, mut command| {
        step(what);
        run(&mut command)
    })?;
    let mut path = module.path;
    if let Some(output) = output {
        let target = if output.is_dir() { output.join("anykernel.ko") } else { output.into() };
        std::fs::copy(&path, &target).map_err(|error| format!("{}: {error}", target.display()))?;
        path = target;
    }
    println!("{} is built for Linux {}. To load it there:", path.display(), module.release);
    println!();
    println!("    sudo insmod {} {PARAMETERS}", path.display());
    println!();
    println!(
        "It then asks for an address by DHCP on ak0, an interface of Linux that you bridge or route as any other."
    );
    println!("`modinfo -p {}` lists the parameters; `sudo rmmod anykernel` ends it.", path.display());
    Ok(())
}

fn running() -> Result<PathBuf> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").map_err(|error| error.to_string())?;
    Ok(Path::new("/lib/modules").join(release.trim()).join("build"))
}
