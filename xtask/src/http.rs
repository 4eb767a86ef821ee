//! Fetching many files with curl and comparing checksums.

use crate::images::{Sequence, hex};
use crate::sh::{Result, quiet, work_dir};
use sha2::{Digest, Sha256};
use std::fmt::Write;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::process::Command;

/// A loopback port that nothing listens on now.
pub(crate) fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(|error| format!("no free port: {error}"))?;
    listener.local_addr().map(|addr: SocketAddr| addr.port()).map_err(|error| error.to_string())
}

fn percent(name: &str) -> String {
    let mut out = String::new();
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// Waits until something answers on the port.
pub(crate) fn wait_for(port: u16, seconds: u32) -> Result {
    for _ in 0..seconds * 5 {
        let probe = Command::new("curl")
            .args(["-s", "-o", "/dev/null", "--max-time", "5", &format!("http://127.0.0.1:{port}/")])
            .status();
        if probe.is_ok_and(|status| status.success()) {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    Err(format!("nothing answered on port {port} for {seconds} s"))
}

/// Fetches `count` files, chosen by `seed`, over at most 64 connections at once; every checksum must be right.
pub(crate) fn fetch_and_compare(port: u16, sums: &[(String, String)], count: usize, seed: u64) -> Result {
    let dir = work_dir(&format!("fetched-{port}"))?;
    let mut sequence = Sequence(seed);
    let chosen: Vec<_> = (0..count).map(|_| &sums[(sequence.next() % sums.len() as u64) as usize]).collect();
    let mut config = String::new();
    for (number, (name, _)) in chosen.iter().enumerate() {
        let _ = writeln!(config, "url = \"http://127.0.0.1:{port}/{}\"", percent(name));
        let _ = writeln!(config, "output = \"{}\"", dir.join(number.to_string()).display());
    }
    let list = dir.join("list");
    fs::write(&list, config).map_err(|error| format!("{}: {error}", list.display()))?;
    let fetched = quiet(
        Command::new("curl")
            .args(["-s", "-S", "--fail", "--max-time", "600", "--parallel", "--parallel-max", "64", "-K"])
            .arg(&list),
    );
    let mut wrong = Vec::new();
    for (number, (name, sum)) in chosen.iter().enumerate() {
        match fs::read(dir.join(number.to_string())) {
            Ok(content) if hex(Sha256::digest(&content)) == **sum => {}
            Ok(content) => wrong.push(format!("{name}: {} bytes with another sha256", content.len())),
            // curl makes no file for an empty answer
            Err(_) if *sum == hex(Sha256::digest(b"")) => {}
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
    }
    let _ = fs::remove_dir_all(&dir);
    match wrong.first() {
        None => fetched.map(drop),
        Some(first) => Err(format!("{} of {count} files are wrong; the first: {first}", wrong.len())),
    }
}
