//! `usb watch`.

use crate::{devices, list, print};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::Kernel;
use hypercall::{ExitStatus, Host, Signal};

/// How often the tree is looked at.
const PERIOD_NS: u64 = 50_000_000;

/// Prints each change of the tree for `seconds`; ends earlier when the instance is stopped.
pub(crate) fn run<H: Host>(kernel: &Arc<Kernel<H>>, seconds: u64) -> ExitStatus {
    let host = kernel.host();
    let until_ns = host.monotonic_ns().saturating_add(seconds.saturating_mul(1_000_000_000));
    let pause = Arc::new(Signal::new());
    kernel.raise_on_stop(pause.clone());
    let mut before: Vec<String> = Vec::new();
    while !kernel.stopping() && host.monotonic_ns() < until_ns {
        let now: Vec<String> = devices(kernel).iter().map(list::as_line).collect();
        before.iter().filter(|line| !now.contains(line)).for_each(|line| print(kernel, &format!("- {line}")));
        now.iter().filter(|line| !before.contains(line)).for_each(|line| print(kernel, &format!("+ {line}")));
        before = now;
        let seen = pause.count();
        if !kernel.stopping() {
            pause.wait(&host, seen, Some(host.monotonic_ns().saturating_add(PERIOD_NS)));
        }
    }
    print(kernel, "watched");
    ExitStatus::Success
}
