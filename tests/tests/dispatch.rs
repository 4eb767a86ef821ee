//! Static dispatch (`docs/contract.md`), looked up in what is built: a component's call of the contract names its callee.
//! Were there a table of functions anywhere on the way, it would hold the address of what is called, or the call would
//! go through a register.

use anykernel_tests::anykernel;
use anykernel_userspace::qemu::{linux_module, rumprun};
use object::{
    File, Object, ObjectSection, ObjectSymbol, RelocationFlags, RelocationTarget, SectionKind, elf,
};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn name(symbol: &object::Symbol<'_, '_>) -> String {
    format!("{:#}", rustc_demangle::demangle(symbol.name().unwrap_or_default()))
}

/// Places in the machine code of which the last four bytes lead to `target`, by the byte before them.
fn references(code: &[u8], address: u64, target: u64) -> Vec<u8> {
    code.windows(5)
        .enumerate()
        .filter(|(at, window)| {
            let distance = i32::from_le_bytes(window[1..].try_into().expect("four bytes"));
            (address + *at as u64 + 5).wrapping_add_signed(distance.into()) == target
        })
        .map(|(_, window)| window[0])
        .collect()
}

#[test]
fn the_unikernel_calls_its_host_by_address() {
    const CALL: u8 = 0xe8;
    const JUMP: u8 = 0xe9;
    let image = rumprun::image("httpd").unwrap_or_else(|failure| panic!("{failure}"));
    // Beside what is booted lies what was linked, with its symbols.
    let bytes = read(&image.with_extension(""));
    let file = File::parse(&*bytes).expect("ELF");
    for function in ["anykernel_rumprun::thread::park::park", "anykernel_rumprun::thread::park::unpark"] {
        let symbol = file.symbols().find(|symbol| name(symbol) == function);
        let target = symbol.unwrap_or_else(|| panic!("{function} is not in the image")).address();
        let mut calls = 0;
        for section in file.sections() {
            let content = section.data().expect("within the file");
            match section.kind() {
                SectionKind::Text => {
                    let found = references(content, section.address(), target);
                    assert!(
                        found.iter().all(|byte| [CALL, JUMP].contains(byte)),
                        "the address of {function} is taken: {found:x?}"
                    );
                    calls += found.len();
                }
                SectionKind::Data | SectionKind::ReadOnlyData => {
                    let pointer = target.to_le_bytes();
                    let tabled = content.windows(8).any(|window| window == pointer);
                    assert!(!tabled, "{function} stands in a table in {:?}", section.name());
                }
                _ => {}
            }
        }
        println!("rumprun: {calls} direct calls of {function}");
        assert!(calls > 0, "nobody calls {function}");
    }
}

#[test]
fn the_module_calls_its_host_by_name() {
    let path = linux_module::module("6.1").unwrap_or_else(|failure| panic!("{failure}"));
    let bytes = read(&path);
    let file = File::parse(&*bytes).expect("ELF");
    let mut calls: BTreeMap<String, usize> =
        ["ak_monotonic_ns", "ak_cpu_count", "ak_park", "ak_unpark", "ak_disk_read", "ak_link_send"]
            .map(|function| (function.into(), 0))
            .into();
    for section in file.sections() {
        for (at, relocation) in section.relocations() {
            let RelocationTarget::Symbol(index) = relocation.target() else { continue };
            let symbol = file.symbol_by_index(index).expect("a symbol of the file");
            let Some(count) = symbol.name().ok().and_then(|name| calls.get_mut(name)) else { continue };
            // Only calls and jumps have this type.
            let direct = relocation.flags() == RelocationFlags::Elf { r_type: elf::R_X86_64_PLT32 };
            assert!(
                direct && section.kind() == SectionKind::Text,
                "the address of {:?} is taken at {at:#x} of {:?}",
                symbol.name(),
                section.name()
            );
            *count += 1;
        }
    }
    println!("linux-module: direct calls: {calls:?}");
    assert!(calls.values().all(|count| *count > 0), "nobody calls some of {calls:?}");
}

#[test]
fn a_process_reaches_its_host_without_a_table() {
    let path = anykernel();
    let bytes = read(path);
    let file = File::parse(&*bytes).expect("ELF");
    // The loop around a contract call that is measured; one for each kind of host.
    let loops: Vec<_> =
        file.symbols().filter(|symbol| name(symbol).starts_with("contractbench::contract_calls")).collect();
    assert!(!loops.is_empty(), "no contractbench in {}", path.display());
    let codes = loops.iter().map(|symbol| disassemble(path, symbol.address(), symbol.size()));
    // The tracing host asks the time through the address that Linux gave (vDSO), and so may have an indirect call of its
    // own; `*…(%rip)` is a fixed place that the dynamic linker filled in.
    let direct = |code: &String| !code.lines().any(|line| line.contains('*') && !line.contains("(%rip)"));
    let plain: Vec<String> = codes.filter(direct).collect();
    assert!(!plain.is_empty(), "the loop calls its host indirectly");
    println!("userspace: {}", plain[0]);
}

fn disassemble(path: &Path, start: u64, len: u64) -> String {
    let output = Command::new("objdump")
        .args(["--disassemble", "--no-show-raw-insn"])
        .arg(format!("--start-address={start:#x}"))
        .arg(format!("--stop-address={:#x}", start + len))
        .arg(path)
        .output()
        .expect("objdump of binutils");
    let code = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(code.contains("ret"), "objdump shows no function:\n{code}");
    code
}
