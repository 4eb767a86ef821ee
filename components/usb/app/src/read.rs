//! `usb read`.

use crate::print;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::fs::OpenOptions;
use hypercall::{ExitStatus, Host};
use serde_json::json;

/// Bytes per read.
const STEP: usize = 1 << 20;

/// Reads the file from its first byte to its last and says how long that took.
pub(crate) fn run<H: Host>(kernel: &Arc<Kernel<H>>, path: &str) -> ExitStatus {
    let host = kernel.host();
    let start_ns = host.monotonic_ns();
    match read(kernel, path) {
        Ok(bytes) => {
            let ns = host.monotonic_ns().saturating_sub(start_ns);
            print(kernel, &json!({ "bytes": bytes, "ns": ns }).to_string());
            ExitStatus::Success
        }
        Err(line) => {
            log::error!("{line}");
            ExitStatus::Failure
        }
    }
}

fn read<H: Host>(kernel: &Arc<Kernel<H>>, path: &str) -> Result<u64, String> {
    let told = |error| format!("{path}: {error}");
    let names = kernel.namespace().ok_or("no file systems are here")?;
    let file = names.open(path.as_bytes(), OpenOptions::READ).map_err(told)?;
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(STEP).map_err(|_| "no memory for a buffer")?;
    buffer.resize(STEP, 0);
    let mut offset = 0;
    loop {
        match file.read_at(offset, &mut buffer).map_err(told)? {
            0 => return Ok(offset),
            n => offset += n as u64,
        }
    }
}
