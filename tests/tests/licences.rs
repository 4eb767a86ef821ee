//! Licences: what the kernel module links fits GPL-2.0, and everything else is permissive.

use std::process::Command;

/// Compatible with GPL-2.0 (so not Apache-2.0 alone), as far as dependencies of ours have them.
const GPL2_COMPATIBLE: [&str; 9] =
    ["MIT", "0BSD", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Zlib", "Unlicense", "CC0-1.0", "Unicode-3.0"];
/// Permissive, for what runs in a process or on bare metal only.
const PERMISSIVE: [&str; 4] = ["Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSL-1.0", "MIT-0"];

/// Whether an SPDX expression can be satisfied with the licences of `allowed`. `/` is the old way to write OR.
fn satisfied(expression: &str, allowed: &[&str]) -> bool {
    let spaced =
        expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ").replace(" WITH ", "+WITH+");
    let mut words = spaced.split_whitespace().peekable();
    let result = any(&mut words, allowed);
    result && words.next().is_none()
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any(words: &mut Words<'_>, allowed: &[&str]) -> bool {
    let mut result = all(words, allowed);
    while words.next_if_eq(&"OR").is_some() {
        result |= all(words, allowed);
    }
    result
}

fn all(words: &mut Words<'_>, allowed: &[&str]) -> bool {
    let mut result = one(words, allowed);
    while words.next_if_eq(&"AND").is_some() {
        result &= one(words, allowed);
    }
    result
}

fn one(words: &mut Words<'_>, allowed: &[&str]) -> bool {
    if words.next_if_eq(&"(").is_some() {
        let result = any(words, allowed);
        return words.next() == Some(")") && result;
    }
    words.next().is_some_and(|name| allowed.contains(&name.replace("+WITH+", " WITH ").as_str()))
}

/// `name version licence` of everything that `package` is made of, tests and build scripts left out.
fn tree(package: &str, target: &str) -> Vec<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--package", package, "--target", target, "--edges", "normal", "--prefix", "none"])
        .args(["--format", "{p}|{l}"])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<String> = text
        .lines()
        .map(|line| line.trim_end_matches(" (*)").to_owned())
        .filter(|line| !line.is_empty())
        .collect();
    assert!(lines.len() > 5, "{package} has dependencies");
    lines
}

fn refused(lines: &[String], allowed: &[&str]) -> Vec<String> {
    lines
        .iter()
        .filter(|line| !line.split_once('|').is_some_and(|(_, l)| satisfied(l, allowed)))
        .cloned()
        .collect()
}

#[test]
fn the_module_links_what_fits_gpl2() {
    let wrong = refused(&tree("anykernel-linux-module", "x86_64-unknown-none"), &GPL2_COMPATIBLE);
    assert!(wrong.is_empty(), "not compatible with GPL-2.0:\n{}", wrong.join("\n"));
}

#[test]
fn everything_is_permissive() {
    let allowed = [&GPL2_COMPATIBLE[..], &PERMISSIVE[..]].concat();
    for (package, target) in
        [("anykernel-userspace", "x86_64-unknown-linux-gnu"), ("anykernel-rumprun", "x86_64-unknown-none")]
    {
        let wrong = refused(&tree(package, target), &allowed);
        assert!(wrong.is_empty(), "{package}: look at these licences:\n{}", wrong.join("\n"));
    }
}

#[test]
fn expressions_are_understood() {
    assert!(satisfied("MIT OR Apache-2.0", &GPL2_COMPATIBLE));
    assert!(satisfied("MIT/Apache-2.0", &GPL2_COMPATIBLE));
    assert!(!satisfied("Apache-2.0", &GPL2_COMPATIBLE));
    assert!(!satisfied("MIT AND Apache-2.0", &GPL2_COMPATIBLE));
    assert!(!satisfied("GPL-3.0-only", &PERMISSIVE));
    assert!(satisfied("(MIT OR Apache-2.0) AND Unicode-3.0", &GPL2_COMPATIBLE));
    assert!(!satisfied("(MIT OR Apache-2.0) AND Apache-2.0", &GPL2_COMPATIBLE));
    assert!(satisfied("Apache-2.0 WITH LLVM-exception OR GPL-3.0-only", &PERMISSIVE));
}
