//! Partition tables, and through them every file system that mounts by itself, with the beginning of a disk as input.

use super::disk::{Changes, Overlay, patch};
use super::images;
use crate::host::FuzzHost;
use crate::input::Input;
use crate::watch;
use anykernel::Kernel;
use anykernel::config::{Config, Mount};

/// One execution.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let how = input.u8();
    let tables = images::tables();
    let base: &'static [u8] = &tables[usize::from(how) % tables.len()];
    let mut changes = Changes::new();
    if how & 0x80 != 0 {
        patch(base, &mut changes, 0, &input.bytes(base.len()));
    }
    while !input.is_empty() {
        // The tables are at both ends.
        let at = usize::from(input.u16()) % 0x1_2000;
        let at = if at < 0x9000 { at } else { base.len().saturating_sub(0x1_2000 - at) };
        let len = input.u8();
        patch(base, &mut changes, at, &input.bytes(1 + usize::from(len & 15)));
    }
    let host = FuzzHost::fresh();
    let mount = |source: &str, target: &str| Mount {
        source: source.into(),
        target: target.into(),
        kind: None,
        read_only: true,
    };
    // The first that cannot be mounted ends the list, as it ends a start.
    let mounts = match how >> 4 & 3 {
        0 => vec![mount("disk0p1", "/")],
        1 => vec![mount("disk0p2", "/"), mount("disk0p5", "/5")],
        _ => vec![],
    };
    let kernel = Kernel::new(host, Config { mounts, ..Config::default() });
    kernel.add_block_device(Overlay::new(base, changes, true));
    let started = anykernel_vfs::start(&kernel);
    let disk_sectors = (base.len() / 512) as u64;
    for device in kernel.block_devices() {
        watch::step();
        let info = device.info();
        assert!(info.sectors > 0 && info.sectors <= disk_sectors, "{info:?}");
    }
    if started.is_ok()
        && let Some(namespace) = kernel.namespace()
        && let Ok(root) = namespace.resolve(b"/", true)
    {
        super::visit(root);
    }
    kernel.shutdown();
}
