//! Builds `anykernel.ko` for the kernel whose headers are given: cargo makes a static library, the linker one object of
//! it, and the kernel's own build system links that with the C half.
//!
//! Distribution kernels are not configured for Rust (CONFIG_RUST), which does not matter here: nothing of the kernel's
//! Rust support is used. The code is compiled with the mitigations that such kernels expect of their modules.

pub mod toolchain;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use toolchain::{Need, TARGET, Toolchain};

/// How a program is run: its purpose for a person, and the command. What it returns as an error ends the build.
pub type Run<'a, E> = &'a mut dyn FnMut(&str, Command) -> Result<(), E>;

/// What Rust exports to the C half; everything else in the object is made local.
const EXPORTS: [&str; 5] =
    ["ak_rust_check", "ak_rust_main", "ak_rust_thread", "ak_rust_stop", "ak_rust_raise"];

/// As the kernel's own code: no GOT (the module loader knows no GOTPCREL), retpolines and return thunks (the loader
/// patches them as the CPU needs), ENDBR at indirect targets, no jump tables (they would be indirect jumps).
const RUSTFLAGS: [&str; 7] = [
    "-Crelocation-model=static",
    "-Zplt=yes",
    "-Zretpoline-external-thunk=yes",
    "-Zfunction-return=thunk-extern",
    "-Zindirect-branch-cs-prefix=yes",
    "-Zcf-protection=branch",
    "-Cjump-tables=no",
];

/// What to build.
#[derive(Debug, Clone)]
pub struct Build {
    /// The workspace.
    pub workspace: PathBuf,
    /// The kernel's headers, as in `/usr/src/linux-headers-6.1.0-56-cloud-amd64` or `/lib/modules/6.1.0-56-amd64/build`.
    pub kernel: PathBuf,
    /// A feature of the module's crate, such as `trace`; the module is made beside the one without.
    pub feature: Option<String>,
}

/// A module and what it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// `anykernel.ko`.
    pub path: PathBuf,
    /// The kernel's release, as `uname -r` says it.
    pub release: String,
}

/// The release that headers are for. The error is one line that says what to do.
pub fn release(kernel: &Path) -> Result<String, String> {
    let shown = kernel.display();
    let file = kernel.join("include/generated/utsrelease.h");
    // #define UTS_RELEASE "6.1.0-56-cloud-amd64"
    let text = fs::read_to_string(&file).unwrap_or_default();
    let release = text.split('"').nth(1).ok_or_else(|| {
        format!(
            "{shown} holds no built kernel headers: give a directory as /lib/modules/$(uname -r)/build \
             (Debian: apt-get install linux-headers-$(uname -r))"
        )
    })?;
    if !kernel.join("Module.symvers").is_file() {
        return Err(format!(
            "{shown} has no Module.symvers: build that kernel first, or install its headers package"
        ));
    }
    Ok(release.into())
}

/// Builds the module; does little if it is up to date.
pub fn build<E: From<String>>(build: &Build, run: Run<'_, E>) -> Result<Module, E> {
    let release = release(&build.kernel)?;
    let kernel = fs::canonicalize(&build.kernel).map_err(told(&build.kernel))?;
    let target_dir = build.workspace.join("target").join("linux-module");
    let feature = build.feature.as_deref();
    let dir = target_dir.join(match feature {
        Some(feature) => format!("kbuild-{release}-{feature}"),
        None => format!("kbuild-{release}"),
    });
    fs::create_dir_all(&dir).map_err(told(&dir))?;

    // The core library is compiled with the kernel's flags, too.
    let toolchain = Toolchain::find(Need::Source)?;
    run("compiling the module's Rust half", cargo(&toolchain, &build.workspace, &target_dir, feature))?;
    let library = target_dir.join(TARGET).join("release").join("libanykernel_linux_module.a");
    let object = dir.join("rust.o");
    if newer(&library, &object) {
        let script = build.workspace.join("targets/linux-module/kbuild/merge.lds");
        let merged = dir.join("merged.tmp");
        run("linking the module's Rust half", ld(&library, &script, &merged))?;
        run("stripping the module's Rust half", objcopy(&merged, &object))?;
        let _ = fs::remove_file(&merged);
    }
    // kbuild wants to know how each object was made; this one it does not make.
    let made = dir.join(".rust.o.cmd");
    fs::write(&made, "").map_err(told(&made))?;
    copy_changed(&build.workspace.join("targets/linux-module/kbuild"), &dir)?;

    let mut make = Command::new("make");
    make.arg("-C").arg(&kernel).arg(setting("M", &dir)).arg("modules");
    // A make above us would hand down its flags.
    make.env_remove("MAKEFLAGS").env_remove("MFLAGS");
    run(&format!("building the module for Linux {release}"), make)?;
    Ok(Module { path: dir.join("anykernel.ko"), release })
}

fn told(path: &Path) -> impl Fn(std::io::Error) -> String + '_ {
    move |error| format!("{}: {error}", path.display())
}

fn setting(name: &str, value: &Path) -> OsString {
    let mut text = OsString::from(name);
    text.push("=");
    text.push(value);
    text
}

fn cargo(toolchain: &Toolchain, workspace: &Path, target_dir: &Path, feature: Option<&str>) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(workspace)
        .args([
            "rustc",
            "--release",
            "--package",
            "anykernel-linux-module",
            "--lib",
            "--crate-type",
            "staticlib",
        ])
        .args(["--target", TARGET, "--target-dir"])
        .arg(target_dir)
        .args(feature.map(|feature| format!("--features={feature}")))
        .env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join("\x1f"))
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_TARGET_DIR");
    toolchain.apply(&mut cargo);
    cargo
}

fn ld(library: &Path, script: &Path, output: &Path) -> Command {
    let mut ld = Command::new("ld");
    ld.args(["-r", "--gc-sections", "-e", EXPORTS[0]]);
    for export in EXPORTS {
        ld.args(["-u", export]);
    }
    ld.arg("-T").arg(script).arg("-o").arg(output).arg(library);
    ld
}

fn objcopy(input: &Path, output: &Path) -> Command {
    let mut objcopy = Command::new("objcopy");
    objcopy.arg("--strip-debug");
    for export in EXPORTS {
        objcopy.arg(format!("--keep-global-symbol={export}"));
    }
    for section in [".comment", ".llvmbc", ".llvmcmd", ".eh_frame*", ".note.gnu.property"] {
        objcopy.args(["-R", section]);
    }
    objcopy.arg(input).arg(output);
    objcopy
}

fn newer(source: &Path, made: &Path) -> bool {
    let time = |path: &Path| fs::metadata(path).and_then(|data| data.modified());
    match (time(source), time(made)) {
        (Ok(source), Ok(made)) => source > made,
        _ => true,
    }
}

/// Copies the files that differ, so that make sees only real changes.
fn copy_changed(from: &Path, to: &Path) -> Result<(), String> {
    for entry in fs::read_dir(from).map_err(told(from))? {
        let path = entry.map_err(told(from))?.path();
        let content = fs::read(&path).map_err(told(&path))?;
        let copy = to.join(path.file_name().unwrap_or_default());
        if fs::read(&copy).ok().as_ref() != Some(&content) {
            fs::write(&copy, content).map_err(told(&copy))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_no_kernel() {
        let error = release(Path::new("/nonexistent")).unwrap_err();
        assert!(error.contains("/nonexistent") && error.contains("apt-get install"), "{error}");
        assert_eq!(error.lines().count(), 1);
    }

    #[test]
    fn copies_only_what_changed() {
        let base = std::env::temp_dir().join(format!("module-build-{}", std::process::id()));
        let (from, to) = (base.join("from"), base.join("to"));
        fs::create_dir_all(&from).unwrap();
        fs::create_dir_all(&to).unwrap();
        fs::write(from.join("same"), "a").unwrap();
        fs::write(from.join("changed"), "b").unwrap();
        copy_changed(&from, &to).unwrap();
        let time = |name: &str| fs::metadata(to.join(name)).unwrap().modified().unwrap();
        let before = (time("same"), time("changed"));
        std::thread::sleep(std::time::Duration::from_millis(20));
        fs::write(from.join("changed"), "c").unwrap();
        copy_changed(&from, &to).unwrap();
        assert_eq!(time("same"), before.0);
        assert_ne!(time("changed"), before.1);
        assert_eq!(fs::read(to.join("changed")).unwrap(), b"c");
        fs::remove_dir_all(&base).unwrap();
    }
}
