//! What a contract call costs beside a plain function call, as an anykernel application.
//!
//! Both loops are the same but for what they call: the host through its type parameter, or a function that is not
//! inlined. Static dispatch means that the first is never slower.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::Kernel;
use core::hint::black_box;
use hypercall::{ExitStatus, Host};

const CALLS: u32 = 1_000_000;
const RUNS: usize = 11;

/// Measures and prints `{"case","calls","contract_ns","plain_ns"}`, medians of several runs for all calls together.
pub fn main<H: Host>(kernel: &Arc<Kernel<H>>) -> ExitStatus {
    let host = kernel.host();
    let mut contract = Vec::with_capacity(RUNS);
    let mut plain = Vec::with_capacity(RUNS);
    // Taken in turns, so that a slow moment of the machine hits both.
    for _ in 0..RUNS {
        contract.push(timed(host, contract_calls));
        plain.push(timed(host, plain_calls));
    }
    let line = format!(
        "{{\"case\":\"cpu_count\",\"calls\":{CALLS},\"contract_ns\":{},\"plain_ns\":{}}}\n",
        median(&mut contract),
        median(&mut plain)
    );
    host.console_write(line.as_bytes());
    ExitStatus::Success
}

fn median(values: &mut [u64]) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

fn timed<H: Host>(host: H, calls: fn(H) -> u64) -> u64 {
    let start = host.monotonic_ns();
    black_box(calls(host));
    host.monotonic_ns() - start
}

/// What a component does: a call through its type parameter.
#[inline(never)]
fn contract_calls<H: Host>(host: H) -> u64 {
    let mut sum = 0;
    for _ in 0..CALLS {
        sum += u64::from(black_box(host).cpu_count());
    }
    sum
}

/// The same with a function of this crate.
#[inline(never)]
fn plain_calls<H: Host>(host: H) -> u64 {
    let mut sum = 0;
    for _ in 0..CALLS {
        sum += u64::from(plain(black_box(host)));
    }
    sum
}

#[inline(never)]
fn plain<H>(host: H) -> u32 {
    black_box(host);
    2
}
