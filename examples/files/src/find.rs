//! The first file system on some disks.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use anykernel::Kernel;
use hypercall::{Host, Signal};

/// How often it is looked whether the disks are there.
const PERIOD_NS: u64 = 20_000_000;

/// The name of the first device with a file system among `disks` and their partitions, or on partition `partition` of them, and
/// its kind. Waits until `deadline_ns` (the host's monotonic clock) for a disk. An error is a line for a person. Context: thread. Blocks.
pub fn find<H: Host>(
    kernel: &Arc<Kernel<H>>,
    disks: &[String],
    partition: Option<u32>,
    deadline_ns: u64,
) -> Result<(String, String), String> {
    let host = kernel.host();
    let pause = Arc::new(Signal::new());
    kernel.raise_on_stop(pause.clone());
    let devices = loop {
        let mut devices = kernel.block_devices();
        devices.retain(|one| {
            let name = &one.info().name;
            disks.iter().any(|disk| match (name.strip_prefix(disk.as_str()), partition) {
                (Some(rest), Some(number)) => rest == format!("p{number}"),
                (Some(rest), None) => rest.is_empty() || rest.starts_with('p'),
                (None, _) => false,
            })
        });
        let seen = pause.count();
        let now = host.monotonic_ns();
        if !devices.is_empty() || now >= deadline_ns || kernel.stopping() {
            break devices;
        }
        pause.wait(&host, seen, Some(now.saturating_add(PERIOD_NS)));
    };
    let kinds = kernel.fs_types();
    let found = devices.iter().find_map(|device| {
        let kind = kinds.iter().find(|kind| matches!(kind.probe(device), Ok(true)))?;
        Some((device.info().name.clone(), kind.name().to_string()))
    });
    found.ok_or_else(|| match devices.is_empty() {
        true => "no disk is there: `anykernel usb list` shows what is, and why not".into(),
        false => "no file system that is known here (ext4, FAT)".into(),
    })
}
