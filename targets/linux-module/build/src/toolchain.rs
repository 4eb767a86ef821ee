//! Which compiler builds for bare metal: the one that is in use, else Debian's.
//!
//! The first comes from rustup, which can add a prebuilt core library and its source. Where rustup cannot fetch them, or is
//! not there at all, Debian's packages of a newer compiler bring the source, and cargo builds the core library with it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The target of images and of the module's Rust half.
pub const TARGET: &str = "x86_64-unknown-none";

/// What cargo runs unless told otherwise.
const USUAL: &str = "rustc";

/// Debian's compiler, and the packages that it comes in.
const DEBIAN: &str = "/usr/bin/rustc";
/// See [`Toolchain`].
pub const DEBIAN_PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];

/// What a build needs beside a compiler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The core library for bare metal: prebuilt, or its source.
    Core,
    /// Its source, to build it with flags of one's own.
    Source,
}

/// A compiler for [`TARGET`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Toolchain {
    rustc: OsString,
    sysroot: PathBuf,
    build_std: bool,
}

impl Toolchain {
    /// The compiler that cargo would use, if it has what is needed, else Debian's. The error is one line that says what to
    /// install.
    pub fn find(need: Need) -> Result<Self, String> {
        let usual = std::env::var_os("RUSTC").unwrap_or_else(|| USUAL.into());
        Self::among([usual, DEBIAN.into()], need).ok_or_else(|| {
            let rustup = match need {
                Need::Core => format!("rustup target add {TARGET}"),
                Need::Source => "rustup component add rust-src".into(),
            };
            format!(
                "no Rust compiler here can build for bare metal: run `{rustup}`, or as root on Debian `apt-get install \
                 --no-install-recommends {}`",
                DEBIAN_PACKAGES.join(" ")
            )
        })
    }

    fn among(compilers: impl IntoIterator<Item = OsString>, need: Need) -> Option<Self> {
        compilers.into_iter().find_map(|rustc| {
            let output = Command::new(&rustc).args(["--print", "sysroot"]).output().ok()?;
            let text = String::from_utf8(output.stdout).ok().filter(|_| output.status.success())?;
            let sysroot = PathBuf::from(text.trim());
            let has_core = sysroot.join("lib/rustlib").join(TARGET).join("lib").is_dir();
            let has_source = sysroot.join("lib/rustlib/src/rust/library/Cargo.lock").is_file();
            let build_std = need == Need::Source || !has_core;
            let enough = if build_std { has_source } else { has_core };
            enough.then_some(Self { rustc, sysroot, build_std })
        })
    }

    /// Has `cargo`, which builds for [`TARGET`], use it.
    pub fn apply(&self, cargo: &mut Command) {
        if self.rustc != USUAL {
            cargo.env("RUSTC", &self.rustc);
        }
        if self.build_std {
            // Building core is not stable, though it has worked for years.
            cargo.arg("-Zbuild-std=core,alloc").env("RUSTC_BOOTSTRAP", "1");
        }
        // Debian's compiler comes without the linker that is this target's own.
        if !has_linker(&self.sysroot) {
            cargo.env("CARGO_TARGET_X86_64_UNKNOWN_NONE_LINKER", "ld");
        }
    }
}

fn has_linker(sysroot: &Path) -> bool {
    let hosts = std::fs::read_dir(sysroot.join("lib/rustlib")).into_iter().flatten().flatten();
    hosts.into_iter().any(|host| host.path().join("bin/rust-lld").is_file())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    /// A compiler that only knows its sysroot, in which there are these files.
    fn compiler(dir: &Path, name: &str, files: &[&str]) -> OsString {
        let sysroot = dir.join(name);
        fs::create_dir_all(&sysroot).unwrap();
        for file in files {
            let file = sysroot.join("lib/rustlib").join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "").unwrap();
        }
        let program = sysroot.join("rustc");
        fs::write(&program, format!("#!/bin/sh\necho {}\n", sysroot.display())).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        program.into()
    }

    #[test]
    fn takes_the_first_compiler_that_has_what_is_needed() {
        let dir = std::env::temp_dir().join(format!("toolchain-{}", std::process::id()));
        let core = "x86_64-unknown-none/lib/libcore.rlib";
        let source = "src/rust/library/Cargo.lock";
        let linker = "x86_64-unknown-linux-gnu/bin/rust-lld";
        let full = compiler(&dir, "full", &[core, source, linker]);
        let prebuilt = compiler(&dir, "prebuilt", &[core, linker]);
        let debian = compiler(&dir, "debian", &[source]);
        let bare = compiler(&dir, "bare", &[]);
        let missing = OsString::from(dir.join("nowhere"));
        let found = |compilers: &[&OsString], need| {
            let toolchain = Toolchain::among(compilers.iter().map(|&compiler| compiler.clone()), need)?;
            let mut cargo = Command::new("cargo");
            toolchain.apply(&mut cargo);
            let set = |name: &str| cargo.get_envs().any(|(key, value)| key == name && value.is_some());
            let built = cargo.get_args().any(|arg| arg == "-Zbuild-std=core,alloc") && set("RUSTC_BOOTSTRAP");
            Some((toolchain.rustc, built, set("CARGO_TARGET_X86_64_UNKNOWN_NONE_LINKER")))
        };
        assert_eq!(found(&[&full, &debian], Need::Core), Some((full.clone(), false, false)));
        assert_eq!(found(&[&full, &debian], Need::Source), Some((full.clone(), true, false)));
        assert_eq!(found(&[&prebuilt, &debian], Need::Source), Some((debian.clone(), true, true)));
        assert_eq!(found(&[&missing, &debian], Need::Core), Some((debian.clone(), true, true)));
        assert_eq!(found(&[&bare, &missing], Need::Core), None);
        fs::remove_dir_all(dir).unwrap();
    }
}
