//! The architecture, held by tests: which crate may depend on which (`docs/contract.md`), that components are one source for
//! all targets (law 1), and that they reach the outside through the contract only (law 2).

use module_build::toolchain::{Need, TARGET, Toolchain};
use object::{Object, ObjectSymbol};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace is one above")
}

fn cargo() -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root());
    command
}

/// What cargo knows of the workspace's own crates, or of all of them.
fn metadata(arguments: &[&str]) -> Value {
    let output =
        cargo().args(["metadata", "--format-version", "1"]).args(arguments).output().expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo writes JSON")
}

/// Where a crate stands in the picture. The order is that of the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Layer {
    Hypercall,
    Anykernel,
    Component,
    Application,
    Target,
    /// Tests, benchmarks, the build: on nobody's way.
    Tool,
}

fn layer(folder: &Path) -> Layer {
    let relative = folder.strip_prefix(root()).expect("a member lies in the workspace");
    let mut parts = relative.iter().map(|part| part.to_str().expect("UTF-8"));
    match (parts.next(), parts.next(), parts.next()) {
        (Some("hypercall"), None, _) => Layer::Hypercall,
        (Some("anykernel"), None, _) => Layer::Anykernel,
        (Some("components"), Some(_), _) => Layer::Component,
        (Some("examples"), Some(_), _) | (Some("tests"), Some("selftest"), _) => Layer::Application,
        (Some("bench"), Some(_), _) => Layer::Application,
        (Some("targets"), Some(_), None) => Layer::Target,
        // What builds a target is not part of what it builds.
        (Some("targets"), Some(_), Some(_)) | (Some("tests" | "bench" | "xtask" | "fuzz"), None, _) => {
            Layer::Tool
        }
        other => panic!("{other:?} is in no layer: say here which"),
    }
}

struct Member {
    layer: Layer,
    folder: PathBuf,
    /// Names of what it is made of; for tests only is left out.
    dependencies: Vec<String>,
}

fn members() -> BTreeMap<String, Member> {
    let metadata = metadata(&["--no-deps"]);
    let packages = metadata["packages"].as_array().expect("packages");
    packages
        .iter()
        .map(|package| {
            let text = |key: &str| package[key].as_str().expect("a string").to_owned();
            let manifest = PathBuf::from(text("manifest_path"));
            let folder = manifest.parent().expect("a folder").to_owned();
            let dependencies = package["dependencies"].as_array().expect("a list").iter();
            let dependencies = dependencies
                .filter(|one| one["kind"] != "dev")
                .map(|one| one["name"].as_str().expect("a name").to_owned())
                .collect();
            (text("name"), Member { layer: layer(&folder), folder, dependencies })
        })
        .collect()
}

fn components() -> Vec<(String, Member)> {
    let found: Vec<_> =
        members().into_iter().filter(|(_, member)| member.layer == Layer::Component).collect();
    assert!(found.len() >= 3, "net, vfs and virtio at least");
    found
}

#[test]
fn dependencies_go_down() {
    let members = members();
    let mut wrong = Vec::new();
    for (name, member) in &members {
        for dependency in &member.dependencies {
            let Some(below) = members.get(dependency) else { continue };
            let allowed = match member.layer {
                Layer::Hypercall => false,
                Layer::Anykernel => below.layer == Layer::Hypercall,
                // Not on each other either; but a part of a faction lies in the folder of the crate that it builds on.
                Layer::Component if member.folder.parent() == Some(&below.folder) => true,
                Layer::Component | Layer::Application => below.layer <= Layer::Anykernel,
                // A target does not build on another one.
                Layer::Target => below.layer <= Layer::Application || below.layer == Layer::Tool,
                Layer::Tool => true,
            };
            if !allowed {
                wrong
                    .push(format!("{name} ({:?}) depends on {dependency} ({:?})", member.layer, below.layer));
            }
        }
    }
    assert!(wrong.is_empty(), "against the layers:\n{}", wrong.join("\n"));
}

/// The contract needs core and alloc only.
#[test]
fn the_contract_depends_on_nothing() {
    let members = members();
    // loom is there in model checks only.
    let dependencies: Vec<_> =
        members["hypercall"].dependencies.iter().filter(|name| *name != "loom").collect();
    assert!(dependencies.is_empty(), "{dependencies:?}");
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Law 1: the same source in all targets.
#[test]
fn components_know_no_target() {
    for (name, member) in components() {
        let text = std::fs::read_to_string(member.folder.join("src/lib.rs")).expect("src/lib.rs");
        assert!(text.contains("#![no_std]"), "{name} is not no_std");
        // These alone have unsafe code, in their modules for queues and memory.
        let drivers = ["anykernel-virtio", "anykernel-xhci"];
        let attribute =
            if drivers.contains(&&*name) { "#![deny(unsafe_code)]" } else { "#![forbid(unsafe_code)]" };
        assert!(text.contains(attribute), "{name} lacks {attribute}");
        let mut files = Vec::new();
        rust_files(&member.folder.join("src"), &mut files);
        assert!(!files.is_empty());
        for file in files {
            let text = std::fs::read_to_string(&file).expect("UTF-8");
            for word in ["target_os", "target_env", "target_vendor", "target_family", "cfg(unix)", "asm!("] {
                assert!(!text.contains(word), "{}: {word}", file.display());
            }
        }
    }
}

/// Symbols of the objects in a library: defined ones and undefined ones.
fn symbols(library: &Path) -> (BTreeSet<String>, BTreeSet<String>) {
    let data = std::fs::read(library).expect("a library");
    let archive = object::read::archive::ArchiveFile::parse(&*data).expect("an archive");
    let (mut defined, mut undefined) = (BTreeSet::new(), BTreeSet::new());
    for member in archive.members() {
        let content = member.expect("a member").data(&*data).expect("its content");
        // Beside objects there is the compiler's metadata.
        if !content.starts_with(b"\x7fELF") {
            continue;
        }
        let object = object::File::parse(content).expect("an object");
        for symbol in object.symbols() {
            let name = symbol.name().expect("UTF-8").to_owned();
            match symbol.is_undefined() {
                _ if name.is_empty() => {}
                true => drop(undefined.insert(name)),
                false => drop(defined.insert(name)),
            }
        }
    }
    (defined, undefined)
}

/// The prebuilt libraries of the toolchain for the target, if there are: core, alloc and what the compiler calls.
fn toolchain() -> BTreeSet<String> {
    let output = Command::new("rustc").args(["--print", "target-libdir", "--target", TARGET]).output();
    let folder = String::from_utf8(output.expect("rustc runs").stdout).expect("UTF-8");
    let files = std::fs::read_dir(folder.trim()).into_iter().flatten().flatten().map(|entry| entry.path());
    let libraries = files.filter(|file| file.extension().is_some_and(|extension| extension == "rlib"));
    libraries.flat_map(|library| symbols(&library).0).collect()
}

/// Builds the package in `folder` for a machine without a system: with all its functions, also those that would be made only
/// where they are used, but for generic ones. `linker` is what a program is linked with.
fn build(folder: &Path, linker: &[String]) -> Output {
    let mut cargo = cargo();
    cargo
        .current_dir(folder)
        .args(["rustc", "--release", "--target", TARGET, "--message-format", "json"])
        .args(["--target-dir", concat!(env!("CARGO_TARGET_TMPDIR"), "/architecture")])
        // Objects with symbols, whatever the profile says of link-time optimisation.
        .args(["--config", "profile.release.lto=\"off\""])
        .env("CARGO_ENCODED_RUSTFLAGS", "-Clink-dead-code\x1f-Crelocation-model=static");
    Toolchain::find(Need::Core).unwrap_or_else(|line| panic!("{line}")).apply(&mut cargo);
    cargo.arg("--").args(linker.iter().map(|argument| format!("-Clink-arg={argument}")));
    cargo.output().expect("cargo runs")
}

/// The libraries that a component is made up of, its own among them. Several versions of one library may be among them.
fn libraries(folder: &Path) -> Vec<(String, PathBuf)> {
    let output = build(folder, &[]);
    assert!(output.status.success(), "{}:\n{}", folder.display(), String::from_utf8_lossy(&output.stderr));
    let messages = String::from_utf8(output.stdout).expect("UTF-8");
    let messages = messages.lines().map(|line| serde_json::from_str::<Value>(line).expect("a message"));
    let built = messages.filter(|message| message["reason"] == "compiler-artifact").filter_map(|message| {
        let files = message["filenames"].as_array()?.iter().filter_map(Value::as_str).map(PathBuf::from);
        // Not the macros and build scripts, which run here.
        let mut libraries = files.filter(|file| file.iter().any(|part| part == TARGET));
        let library = libraries.find(|file| file.extension().is_some_and(|extension| extension == "rlib"))?;
        Some((message["target"]["name"].as_str()?.to_owned(), library))
    });
    built.collect()
}

/// What the component and all it is made of leave undefined, but for the heap and the end of a panic, which every target
/// provides; and the library that wants it.
fn foreign(name: &str, folder: &Path, toolchain: &BTreeSet<String>) -> Vec<(String, String)> {
    let libraries = libraries(folder);
    assert!(
        libraries.iter().any(|(library, _)| *library == name.replace('-', "_")),
        "{name} is not among {libraries:?}"
    );
    let (mut defined, mut undefined) = (toolchain.clone(), BTreeMap::new());
    for (library, file) in libraries {
        let (its_defined, its_undefined) = symbols(&file);
        defined.extend(its_defined);
        undefined.extend(its_undefined.into_iter().map(|symbol| (symbol, library.clone())));
    }
    assert!(defined.len() > 1000, "{name}: the toolchain hardly has symbols: this looks at the wrong thing");
    undefined
        .into_iter()
        .filter(|(symbol, _)| !defined.contains(symbol))
        .map(|(symbol, library)| (format!("{:#}", rustc_demangle::demangle(&symbol)), library))
        .filter(|(symbol, _)| {
            !symbol.starts_with("__rustc::__rust_") && symbol != "__rustc::rust_begin_unwind"
        })
        .collect()
}

/// Law 2: a component needs no function of a system and no symbol behind the contract's back.
#[test]
fn components_reach_the_outside_through_the_contract_only() {
    let toolchain = toolchain();
    for (name, member) in components() {
        let foreign = foreign(&name, &member.folder, &toolchain);
        assert!(foreign.is_empty(), "{name} links what is not the contract's: {foreign:#?}");
    }
}

/// A component that tries to get at its host, in a workspace of its own.
fn plant(name: &str, file: &str, source: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("planted").join(name);
    let mut manifest =
        format!("[package]\nname = \"{name}\"\nedition = \"2024\"\n[workspace]\n[dependencies]\n");
    let needs: &[_] = match file {
        "main.rs" => &[
            ("anykernel", "anykernel"),
            ("hypercall", "hypercall"),
            ("anykernel-rumprun", "targets/rumprun"),
        ],
        _ => &[("hypercall", "hypercall")],
    };
    for (dependency, place) in needs {
        manifest += &format!("{dependency}.path = {:?}\n", root().join(place));
    }
    std::fs::create_dir_all(folder.join("src")).expect("a folder");
    std::fs::write(folder.join("Cargo.toml"), manifest).expect("a manifest");
    std::fs::write(folder.join("src").join(file), source).expect("a source");
    // The same versions, so that nothing is fetched.
    std::fs::copy(root().join("Cargo.lock"), folder.join("Cargo.lock")).expect("the workspace's Cargo.lock");
    folder
}

/// The law's check, tried on components that break it.
#[test]
fn components_that_reach_past_the_contract_are_found() {
    let toolchain = toolchain();
    // Calls the C library, and a function that only one target happens to have.
    let source = "#![no_std]
        use hypercall::Clock;
        unsafe extern \"C\" { fn getpid() -> i32; fn ak_monotonic_ns() -> u64; }
        pub fn now(host: &dyn Clock) -> u64 { host.monotonic_ns() + unsafe { getpid() as u64 + ak_monotonic_ns() } }";
    let found = foreign("planted-calls", &plant("planted-calls", "lib.rs", source), &toolchain);
    let found: Vec<_> = found.iter().map(|(symbol, library)| (symbol.as_str(), library.as_str())).collect();
    assert_eq!(found, [("ak_monotonic_ns", "planted_calls"), ("getpid", "planted_calls")]);

    // The same through a variable, and hidden in a function that nobody calls.
    let source = "#![no_std]
        unsafe extern \"C\" { static environ: *const *const u8; }
        pub fn unused() -> bool { unsafe { environ.is_null() } }";
    let found = foreign("planted-variable", &plant("planted-variable", "lib.rs", source), &toolchain);
    assert_eq!(found, [("environ".to_owned(), "planted_variable".to_owned())]);

    // std is not there to be called.
    let source = "pub fn now() -> std::time::Instant { std::time::Instant::now() }";
    let output = build(&plant("planted-std", "lib.rs", source), &[]);
    let errors = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && errors.contains("can't find crate for `std`"), "{errors}");

    // And one that keeps to the contract passes, so that it is not the planting that is found.
    let source = "#![no_std]
        use hypercall::Clock;
        pub fn now(host: &dyn Clock) -> u64 { host.monotonic_ns() }";
    assert!(foreign("planted-good", &plant("planted-good", "lib.rs", source), &toolchain).is_empty());
}

/// What is generic is made only where it is used: the linker of an image finds it, because there is no system to link with.
#[test]
fn generic_code_that_reaches_past_the_contract_does_not_link() {
    let source = |body: &str| {
        format!(
            "#![no_std]
            #![no_main]
            extern crate alloc;
            use alloc::sync::Arc;
            use hypercall::{{ExitStatus, Host}};
            unsafe extern \"C\" {{ safe fn getpid() -> u32; }}
            fn application<H: Host>(kernel: &Arc<anykernel::Kernel<H>>) -> ExitStatus {{
                if {body} == 0 {{ ExitStatus::Success }} else {{ ExitStatus::Failure }}
            }}
            anykernel_rumprun::image!(application);"
        )
    };
    let script = root().join("targets/rumprun/link.ld");
    let linker = [format!("-T{}", script.display()), "--no-pie".into(), "-znorelro".into()];
    let bad =
        build(&plant("planted-image", "main.rs", &source("kernel.host().cpu_count() + getpid()")), &linker);
    let errors = String::from_utf8_lossy(&bad.stdout);
    assert!(!bad.status.success() && errors.contains("getpid"), "{errors}");
    let good = build(&plant("planted-image", "main.rs", &source("kernel.host().cpu_count()")), &linker);
    assert!(
        good.status.success(),
        "{}{}",
        String::from_utf8_lossy(&good.stderr),
        String::from_utf8_lossy(&good.stdout)
    );
}
