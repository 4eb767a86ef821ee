//! A modern virtio-pci function in front of a device model (4.1.4).

use super::device::Core;
use hypercall::Width;
use std::vec::Vec;

/// Offsets of the structures in the BAR, a page each.
pub(super) const BAR_BYTES: usize = 0x4000;
const NOTIFY_MULTIPLIER: u32 = 4;

/// Configuration space with the virtio capabilities, all in BAR 4 at `bar`, and an MSI-X table of `msix` entries.
pub(super) fn config_space(device_type: u32, transitional: bool, bar: u64, msix: u16, line: u8) -> Vec<u8> {
    let mut space = std::vec![0u8; 256];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    let id = if transitional { 0x1000 + device_type - 1 } else { 0x1040 + device_type };
    put(0x00, &0x1af4u16.to_le_bytes());
    put(0x02, &(id as u16).to_le_bytes());
    put(0x06, &0x10u16.to_le_bytes());
    // 64-bit, memory.
    put(0x20, &(bar as u32 | 4).to_le_bytes());
    put(0x24, &((bar >> 32) as u32).to_le_bytes());
    put(0x34, &[0x40]);
    put(0x3c, &[line, 1]);
    let mut at = 0x40;
    // A preferred structure in an I/O BAR comes first, as on transitional devices: to be skipped.
    put(0x10, &0xc001u32.to_le_bytes());
    for (kind, bar, offset, len) in [
        (1u8, 0u8, 0u32, 56u32),
        (1, 4, 0, 0x1000),
        (3, 4, 0x1000, 0x1000),
        (4, 4, 0x2000, 0x1000),
        (2, 4, 0x3000, 0x1000),
        (5, 0, 0, 0),
    ] {
        let bytes = if kind == 2 { 20 } else { 16 };
        put(at, &[9, (at + bytes) as u8, bytes as u8, kind, bar]);
        put(at + 8, &offset.to_le_bytes());
        put(at + 12, &len.to_le_bytes());
        if kind == 2 {
            put(at + 16, &NOTIFY_MULTIPLIER.to_le_bytes());
        }
        at += bytes;
    }
    if msix > 0 {
        put(at, &[0x11, 0]);
        put(at + 2, &(msix - 1).to_le_bytes());
    } else {
        put(at, &[0x05, 0]);
    }
    space
}

pub(super) fn read(core: &mut Core, offset: usize, width: Width) -> u64 {
    match offset {
        0x1000 => u64::from(core::mem::take(&mut core.isr)),
        0x2000..0x3000 => core.read_config(offset - 0x2000, width.bytes()),
        0..0x1000 => {
            let value = match (offset, width) {
                (4, Width::U32) => core.features_half(),
                (16, Width::U16) => u32::from(core.config_vector),
                (18, Width::U16) => core.queues.len() as u32,
                (20, Width::U8) => u32::from(core.status),
                (21, Width::U8) => core.next_generation(),
                (24, Width::U16) => core.queue_max(),
                (26, Width::U16) => core.selected().map_or(0xffff, |queue| u32::from(queue.vector)),
                (28, Width::U16) => core.selected().map_or(0, |queue| u32::from(queue.ready)),
                // Different from the queue's number, so that the multiplier and the offset both matter.
                (30, Width::U16) => u32::from(core.queue_select) + 1,
                _ => {
                    core.complaints.push(std::format!("{width:?} read at {offset} of the common structure"));
                    0
                }
            };
            u64::from(value)
        }
        _ => {
            core.complaints.push(std::format!("read at {offset:#x}"));
            0
        }
    }
}

pub(super) fn write(core: &mut Core, offset: usize, width: Width, value: u64, msix: u16) {
    if (0x3000..0x4000).contains(&offset) {
        let queue = (offset - 0x3000) as u32 / NOTIFY_MULTIPLIER;
        if width == Width::U16 && u64::from(queue) == value + 1 {
            core.kick(value as u16);
        } else {
            core.complaints.push(std::format!("doorbell {value} at {offset:#x}"));
        }
        return;
    }
    let half = |field: &mut u64| {
        let shift = if offset & 4 != 0 { 32 } else { 0 };
        *field = *field & !(0xffff_ffff << shift) | (value & 0xffff_ffff) << shift;
    };
    let vector = if value < u64::from(msix) { value as u16 } else { 0xffff };
    match (offset, width) {
        (0, Width::U32) => core.feature_select = value as u32,
        (8, Width::U32) => core.driver_select = value as u32,
        (12, Width::U32) => core.accept_half(value as u32),
        (16, Width::U16) => core.config_vector = vector,
        (20, Width::U8) => core.set_status(value as u8),
        (22, Width::U16) => core.queue_select = value as u16,
        (24..56, _) => {
            let Some(queue) = core.selected() else { return };
            match (offset, width) {
                (24, Width::U16) => queue.size = value as u16,
                (26, Width::U16) => queue.vector = vector,
                (28, Width::U16) => {
                    queue.ready = value == 1;
                    core.check_queue();
                }
                (32 | 36, Width::U32) => half(&mut queue.desc),
                (40 | 44, Width::U32) => half(&mut queue.avail),
                (48 | 52, Width::U32) => half(&mut queue.used),
                _ => core.complaints.push(std::format!("{width:?} write at {offset}")),
            }
        }
        _ => core.complaints.push(std::format!("{width:?} write at {offset}")),
    }
}
