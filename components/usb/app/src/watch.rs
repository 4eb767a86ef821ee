//! `usb watch`.

use crate::{devices, list, print};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::block::{self, BlockDevice, Op};
use hypercall::{ExitStatus, Host, Signal};

/// How often the tree is looked at.
const PERIOD_NS: u64 = 50_000_000;

/// So many looks without a change, and it is quiet: a second.
const QUIET: u32 = 20;

/// Prints each change of the tree for `seconds`, and once it is quiet how many devices there are and what `free_bytes` says;
/// ends earlier when the instance is stopped. With `read` it reads from every disk all the time.
pub(crate) fn run<H: Host>(
    kernel: &Arc<Kernel<H>>,
    seconds: u64,
    read: bool,
    free_bytes: Option<fn() -> u64>,
) -> ExitStatus {
    let host = kernel.host();
    let until_ns = host.monotonic_ns().saturating_add(seconds.saturating_mul(1_000_000_000));
    let pause = Arc::new(Signal::new());
    kernel.raise_on_stop(pause.clone());
    let mut before: Vec<String> = Vec::new();
    let mut unchanged = 0;
    while !kernel.stopping() && host.monotonic_ns() < until_ns {
        let now: Vec<String> = devices(kernel).iter().map(list::as_line).collect();
        before.iter().filter(|line| !now.contains(line)).for_each(|line| print(kernel, &format!("- {line}")));
        now.iter().filter(|line| !before.contains(line)).for_each(|line| print(kernel, &format!("+ {line}")));
        unchanged = if now == before { unchanged + 1 } else { 0 };
        before = now;
        if let Some(free_bytes) = free_bytes.filter(|_| unchanged == QUIET) {
            print(kernel, &format!("= {} devices, {} bytes free", before.len(), free_bytes()));
        }
        if read {
            kernel.block_devices().iter().for_each(|disk| read_some(kernel, &**disk));
        }
        let seen = pause.count();
        if !kernel.stopping() {
            pause.wait(&host, seen, Some(host.monotonic_ns().saturating_add(PERIOD_NS)));
        }
    }
    print(kernel, "watched");
    ExitStatus::Success
}

/// Reads the beginning of a disk. One that is pulled out fails, and the tree shows that.
fn read_some<H: Host>(kernel: &Kernel<H>, disk: &dyn BlockDevice) {
    const BYTES: usize = 256 << 10;
    let info = disk.info();
    let bytes = BYTES.min(info.max_request_bytes) as u64;
    if info.bytes().is_some_and(|all| all >= bytes) {
        let buffers = vec![vec![0; bytes as usize].into()];
        drop(block::transfer(kernel.host(), disk, Op::Read, 0, buffers));
    }
}
