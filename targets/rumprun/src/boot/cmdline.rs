//! The kernel command line, as far as loaders describe devices on it.

use hypercall::{MmioDevice, PhysAddr};

/// Parses a number as Linux does: `0x` for hexadecimal, and a suffix K, M or G.
fn number(text: &str) -> Option<u64> {
    let (text, shift) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 10),
        b'm' | b'M' => (&text[..text.len() - 1], 20),
        b'g' | b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let value = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok()?,
        None => text.parse().ok()?,
    };
    value.checked_shl(shift).filter(|shifted| shifted >> shift == value)
}

/// One `SIZE@BASE:IRQ[:ID]` of `virtio_mmio.device=` (Linux admin-guide/kernel-parameters).
fn virtio_mmio(text: &str) -> Option<MmioDevice> {
    let (size, rest) = text.split_once('@')?;
    let mut parts = rest.split(':');
    let base = number(parts.next()?)?;
    let line = number(parts.next()?)?;
    let len = usize::try_from(number(size)?).ok().filter(|len| (0x100..=0x10000).contains(len))?;
    base.checked_add(len as u64)?;
    Some(MmioDevice { registers: PhysAddr(base), len, line: u32::try_from(line).ok()? })
}

/// Every virtio-mmio device that the command line names. What cannot be read is left out.
pub(crate) fn virtio_mmio_devices(cmdline: &str) -> impl Iterator<Item = MmioDevice> {
    cmdline.split_ascii_whitespace().filter_map(|word| virtio_mmio(word.strip_prefix("virtio_mmio.device=")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn reads_what_qemu_writes() {
        let line = "console=ttyS0 virtio_mmio.device=512@0xfeb00e00:12 virtio_mmio.device=4K@0xfeb02000:13:7";
        let devices: Vec<_> = virtio_mmio_devices(line).collect();
        assert_eq!(
            devices,
            [
                MmioDevice { registers: PhysAddr(0xfeb0_0e00), len: 512, line: 12 },
                MmioDevice { registers: PhysAddr(0xfeb0_2000), len: 4096, line: 13 },
            ]
        );
    }

    #[test]
    fn leaves_nonsense_out() {
        for word in [
            "",
            "512",
            "512@",
            "512@0x1000",
            "@:",
            "1@0x1000:5",
            "512@0xffffffffffffffff:1",
            "99999999999G@1:1",
        ] {
            assert_eq!(virtio_mmio_devices(&std::format!("virtio_mmio.device={word}")).count(), 0, "{word}");
        }
    }
}
