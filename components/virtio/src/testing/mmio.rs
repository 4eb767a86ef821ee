//! The virtio-mmio registers in front of a device model (4.2.2, 4.2.4).

use super::device::Core;
use hypercall::Width;

pub(super) fn read(core: &mut Core, offset: usize, width: Width) -> u64 {
    if offset >= 0x100 {
        return core.read_config(offset - 0x100, width.bytes());
    }
    if width != Width::U32 {
        core.complaints.push(std::format!("{width:?} read of register {offset:#x}"));
        return 0;
    }
    let legacy = core.legacy;
    let value = match offset {
        0x00 => 0x7472_6976,
        0x04 => {
            if legacy {
                1
            } else {
                2
            }
        }
        0x08 => core.device_type,
        0x0c => 0x554d_4551,
        0x10 => core.features_half(),
        0x34 => core.queue_max(),
        0x40 if legacy => core.selected().map_or(0, |queue| (queue.desc >> 12) as u32),
        0x44 if !legacy => core.selected().map_or(0, |queue| u32::from(queue.ready)),
        0x60 => u32::from(core.isr),
        0x70 => u32::from(core.status),
        0xfc if !legacy => core.next_generation(),
        _ => {
            core.complaints.push(std::format!("read of register {offset:#x}"));
            0
        }
    };
    u64::from(value)
}

/// Writes a register. Doorbells are left in `core.pending`.
pub(super) fn write(core: &mut Core, offset: usize, width: Width, value: u64) {
    let value = value as u32;
    if offset >= 0x100 || width != Width::U32 {
        core.complaints.push(std::format!("{width:?} write of register {offset:#x}"));
        return;
    }
    let legacy = core.legacy;
    let half = |field: &mut u64, high: bool| {
        let shift = if high { 32 } else { 0 };
        *field = *field & !(0xffff_ffff << shift) | u64::from(value) << shift;
    };
    match offset {
        0x14 => core.feature_select = value,
        0x20 => core.accept_half(value),
        0x24 => core.driver_select = value,
        0x28 if legacy && value == 4096 => {}
        0x30 => core.queue_select = value as u16,
        0x38 => {
            if let Some(queue) = core.selected() {
                queue.size = value as u16;
            }
        }
        0x3c if legacy && value == 4096 => {}
        0x40 if legacy => {
            if let Some(queue) = core.selected() {
                let n = u64::from(queue.size);
                queue.desc = u64::from(value) << 12;
                queue.avail = queue.desc + 16 * n;
                queue.used = (queue.avail + 6 + 2 * n).next_multiple_of(4096);
                queue.ready = value != 0;
            }
            core.check_queue();
        }
        0x44 if !legacy => {
            if let Some(queue) = core.selected() {
                queue.ready = value == 1;
            }
            core.check_queue();
        }
        0x50 => core.kick(value as u16),
        0x64 => core.isr &= !(value as u8),
        0x70 => core.set_status(value as u8),
        0x80 | 0x84 | 0x90 | 0x94 | 0xa0 | 0xa4 if !legacy => {
            if let Some(queue) = core.selected() {
                let field = match offset & 0xf0 {
                    0x80 => &mut queue.desc,
                    0x90 => &mut queue.avail,
                    _ => &mut queue.used,
                };
                half(field, offset & 4 != 0);
            }
        }
        _ => core.complaints.push(std::format!("write of register {offset:#x}")),
    }
}
