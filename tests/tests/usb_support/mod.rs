//! What tests of USB share: a stick with files whose checksums are known.

use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub(crate) fn run(program: &str, args: &[&str]) {
    let status = Command::new(program).args(args).stdout(Stdio::null()).status();
    assert!(status.unwrap_or_else(|error| panic!("{program}: {error}")).success(), "{program} {args:?}");
}

fn noise(len: usize, mut seed: u32) -> Vec<u8> {
    let next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 24) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

pub(crate) fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A stick with FAT32, some files, and their checksums. Returns the sum of `/big.bin`.
pub(crate) fn stick(dir: &Path) -> (PathBuf, String) {
    let image = dir.join("stick.img");
    fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let shown = image.to_str().unwrap();
    run("mkfs.fat", &["-F", "32", shown]);
    let mut sums = String::new();
    let mut big = String::new();
    for (seed, (name, len)) in (1..).zip([("big.bin", 6 << 20), ("odd.bin", 12_345), ("empty", 0)]) {
        let (content, file) = (noise(len, seed), dir.join(name));
        fs::write(&file, &content).unwrap();
        run("mcopy", &["-i", shown, file.to_str().unwrap(), "::/"]);
        sums += &format!("{}  ./{name}\n", sum(&content));
        if name == "big.bin" {
            big = sum(&content);
        }
    }
    let file = dir.join("SHA256SUMS");
    fs::write(&file, sums).unwrap();
    run("mcopy", &["-i", shown, file.to_str().unwrap(), "::/"]);
    (image, big)
}
