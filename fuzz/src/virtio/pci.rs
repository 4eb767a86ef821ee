//! The same device behind PCI (VirtIO 1.2, 4.1): its registers elsewhere, and a configuration space whose capabilities,
//! base addresses and doorbells say what the input says, also between two looks.

use super::device::Hostile;
use crate::host::{Device, DmaMemory, REGISTERS};
use crate::input::Input;
use hypercall::Width;

/// Where the structures are, in the window of base address register 0.
const COMMON: usize = 0;
const ISR: usize = 0x1000;
const CONFIG: usize = 0x2000;
const NOTIFY: usize = 0x3000;
const DOORBELL_BYTES: usize = 4;
const NO_VECTOR: u16 = 0xffff;

/// Command: it may be reached in memory, and reach memory.
const COMMAND: usize = 4;
const COMMAND_NEEDED: u8 = 6;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;

/// A byte of the configuration space, so many reads from now.
struct Lie {
    reads: u8,
    at: usize,
    value: u8,
}

/// A virtio device behind PCI.
pub struct OnPci {
    device: Hostile,
    space: [u8; 256],
    lies: Vec<Lie>,
    selected: u16,
    vectors: [u16; 4],
}

/// The configuration space of an honest device.
fn honest(kind: u32, msix: bool) -> [u8; 256] {
    let mut space = [0; 256];
    space[..2].copy_from_slice(&0x1af4u16.to_le_bytes());
    space[2..4].copy_from_slice(&(0x1040 + kind as u16).to_le_bytes());
    space[6] = 1 << 4;
    space[BAR0..BAR0 + 4].copy_from_slice(&(REGISTERS as u32 | 4).to_le_bytes());
    space[CAPABILITIES] = 0x40;
    (space[0x3c], space[0x3d]) = (5, 1);
    let structures = [(1, COMMON, 0x38), (3, ISR, 1), (4, CONFIG, 0x100), (2, NOTIFY, 0x100)];
    let mut at = 0x40;
    for (kind, offset, len) in structures {
        space[at..at + 5].copy_from_slice(&[9, at as u8 + 0x14, 0x14, kind, 0]);
        space[at + 8..at + 12].copy_from_slice(&(offset as u32).to_le_bytes());
        space[at + 12..at + 16].copy_from_slice(&(len as u32).to_le_bytes());
        at += 0x14;
    }
    space[at - 4] = DOORBELL_BYTES as u8;
    // The table itself is the host's.
    (space[at], space[at + 2]) = (0x11, 3);
    if !msix {
        space[at - 0x14 + 1] = 0;
    }
    space
}

impl OnPci {
    /// Puts a device there. What is told of it comes from `input`, before the device's own stream.
    pub fn new(input: &mut Input, kind: u32, device: impl FnOnce(Input) -> Hostile) -> Self {
        let how = input.u8();
        let mut space = honest(kind, how & 0x10 != 0);
        let mut lies = Vec::new();
        for _ in 0..how & 7 {
            let at = match input.u8() {
                // The header, a field of a capability, or anywhere.
                byte @ 0..64 => usize::from(byte),
                byte @ 64..192 => 0x40 + usize::from(byte) % 0x70,
                _ => input.u8().into(),
            };
            let choice = input.u8();
            let old = space[at];
            let value = match choice & 7 {
                0 => 0,
                1 => 0xff,
                2 => old.wrapping_add(1),
                3 => old.wrapping_sub(1),
                4 => old ^ 1 << (choice >> 3 & 7),
                // A capability, the next one or itself.
                5 => 0x40 + 0x14 * (choice >> 3 & 7),
                _ => input.u8(),
            };
            match choice >> 6 {
                0..3 => space[at] = value,
                _ => lies.push(Lie { reads: input.u8(), at, value }),
            }
        }
        let device = device(core::mem::take(input));
        if how & 7 != 0 {
            device.lied();
        }
        Self { device, space, lies, selected: 0, vectors: [NO_VECTOR; 4] }
    }

    fn vector(&mut self, offset: usize) -> Option<&mut u16> {
        let queue = usize::from(self.selected);
        match offset {
            0x10 => Some(&mut self.vectors[3]),
            0x1a => self.vectors[..3].get_mut(queue),
            _ => None,
        }
    }
}

/// The register of virtio-mmio that means what this one of the common structure (4.1.4.3) does.
fn same_as(offset: usize, write: bool) -> Option<usize> {
    Some(match offset {
        0x00 => 0x14,
        0x04 => 0x10,
        0x08 => 0x24,
        0x0c => 0x20,
        0x14 => 0x70,
        0x15 => 0xfc,
        0x16 => 0x30,
        0x18 if write => 0x38,
        0x18 => 0x34,
        0x1c => 0x44,
        0x20..0x38 => [0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4][(offset - 0x20) / 4],
        _ => return None,
    })
}

impl Device for OnPci {
    fn read(&mut self, dma: &mut DmaMemory, offset: usize, width: Width) -> u64 {
        match offset {
            ISR => {
                // Reading clears it (4.1.4.5).
                let cause = self.device.read(dma, 0x60, width);
                self.device.write(dma, 0x64, Width::U32, u64::from(u32::MAX));
                cause
            }
            CONFIG..NOTIFY => self.device.read(dma, 0x100 + (offset - CONFIG), width),
            _ => {
                let selected = self.selected;
                let own = match (offset, self.vector(offset)) {
                    (_, Some(vector)) => *vector,
                    (0x12, _) => 3,
                    (0x1e, _) => selected,
                    _ => match same_as(offset, false) {
                        Some(same) => return self.device.read(dma, same, width),
                        None => 0,
                    },
                };
                self.device.or_lie(own.into())
            }
        }
    }

    fn write(&mut self, dma: &mut DmaMemory, offset: usize, width: Width, value: u64) {
        match offset {
            NOTIFY.. => {
                let enabled = self.space[COMMAND] & COMMAND_NEEDED == COMMAND_NEEDED;
                assert!(
                    enabled || !self.device.is_honest(),
                    "the driver did not let the device reach memory"
                );
                self.device.write(dma, 0x50, Width::U32, value);
            }
            _ => {
                if offset == 0x16 {
                    self.selected = value as u16;
                }
                if let Some(vector) = self.vector(offset) {
                    *vector = value as u16;
                } else if let Some(same) = same_as(offset, true) {
                    self.device.write(dma, same, width, value);
                }
            }
        }
    }

    fn tick(&mut self, dma: &mut DmaMemory) {
        self.device.tick(dma);
    }

    fn interrupt(&mut self) -> bool {
        self.device.interrupt()
    }

    fn pci(&mut self) -> Option<&mut [u8]> {
        let space = &mut self.space;
        self.lies.retain_mut(|lie| {
            if lie.reads == 0 {
                space[lie.at] = lie.value;
                return false;
            }
            lie.reads -= 1;
            true
        });
        Some(space)
    }

    fn pci_write(&mut self, offset: usize, bytes: &[u8]) {
        // The rest is as the device says it is.
        if offset == COMMAND
            && let Some(&low) = bytes.first()
        {
            self.space[COMMAND] = low;
        }
    }
}
