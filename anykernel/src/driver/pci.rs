//! A PCI function as its driver sees it (PCI 3.0, chapter 6): configuration, capabilities, base addresses.

use alloc::vec::Vec;
use hypercall::{Pci, PciAddress, Result, Width};

const COMMAND: u16 = 0x04;
const STATUS: u16 = 0x06;
const BAR0: u16 = 0x10;
const CAPABILITIES: u16 = 0x34;
const INTERRUPT_LINE: u16 = 0x3c;
const INTERRUPT_PIN: u16 = 0x3d;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const CAPABILITY_MSIX: u8 = 0x11;
/// The list lies in 256 bytes and each entry takes at least 4.
const MAX_CAPABILITIES: usize = 48;
const BARS: u8 = 6;

/// A PCI function. Errors are those of [`Pci::pci_read`] and [`Pci::pci_write`]; context: thread.
#[derive(Debug, Clone, Copy)]
pub struct Function<H> {
    host: H,
    address: PciAddress,
}

/// What a base address register says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// Memory from this address on.
    Memory(u64),
    /// Memory, to which the firmware gave no address.
    Unassigned,
    /// I/O ports, a width that does not exist, or half of a wide register.
    NoMemory,
}

impl<H: Pci> Function<H> {
    /// The function at `address`.
    pub fn new(host: H, address: PciAddress) -> Self {
        Self { host, address }
    }

    /// Where it is.
    pub fn address(&self) -> PciAddress {
        self.address
    }

    /// Reads 8 bits.
    pub fn read8(&self, offset: u16) -> Result<u8> {
        Ok(self.host.pci_read(self.address, offset, Width::U8)? as u8)
    }

    /// Reads 16 bits; `offset` is even.
    pub fn read16(&self, offset: u16) -> Result<u16> {
        Ok(self.host.pci_read(self.address, offset, Width::U16)? as u16)
    }

    /// Reads 32 bits; `offset` is a multiple of 4.
    pub fn read32(&self, offset: u16) -> Result<u32> {
        self.host.pci_read(self.address, offset, Width::U32)
    }

    fn set_command(&self, command: u16) -> Result<()> {
        self.host.pci_write(self.address, COMMAND, Width::U16, command.into())
    }

    /// Lets it answer at its addresses, use memory, and interrupt by its line.
    pub fn enable(&self) -> Result<()> {
        let command = self.read16(COMMAND)?;
        self.set_command((command | COMMAND_MEMORY | COMMAND_BUS_MASTER) & !COMMAND_INTX_DISABLE)
    }

    /// Its capabilities, in their order: what each is, and where.
    pub fn capabilities(&self) -> Result<Vec<(u8, u16)>> {
        let mut found = Vec::new();
        if self.read16(STATUS)? & STATUS_CAPABILITIES == 0 {
            return Ok(found);
        }
        let mut at = u16::from(self.read8(CAPABILITIES)? & !3);
        while at >= 0x40 && found.len() < MAX_CAPABILITIES {
            let [id, next] = self.read16(at)?.to_le_bytes();
            found.push((id, at));
            at = u16::from(next & !3);
        }
        Ok(found)
    }

    /// How many interrupts it can send as messages of their own (MSI-X); 0: none.
    pub fn msix_entries(&self) -> Result<u16> {
        match self.capabilities()?.into_iter().find(|(id, _)| *id == CAPABILITY_MSIX) {
            Some((_, at)) => Ok((self.read16(at + 2)? & 0x7ff) + 1),
            None => Ok(0),
        }
    }

    /// Its interrupt line, if it has one.
    pub fn line(&self) -> Result<Option<u32>> {
        match self.read8(INTERRUPT_PIN)? {
            0 => Ok(None),
            _ => Ok(Some(self.read8(INTERRUPT_LINE)?.into())),
        }
    }

    /// What base address register `bar` says; there are six.
    pub fn base(&self, bar: u8) -> Result<Base> {
        if bar >= BARS {
            return Ok(Base::NoMemory);
        }
        let offset = BAR0 + 4 * u16::from(bar);
        let low = self.read32(offset)?;
        let high = match (low & 1, low >> 1 & 3) {
            (0, 0) => 0,
            (0, 2) if bar + 1 < BARS => self.read32(offset + 4)?,
            _ => return Ok(Base::NoMemory),
        };
        match u64::from(high) << 32 | u64::from(low & !0xf) {
            0 => Ok(Base::Unassigned),
            base => Ok(Base::Memory(base)),
        }
    }

    /// How many bytes base address register `bar` covers, as far as its lower half tells; `None`: 4 GiB or more.
    ///
    /// The function does not answer meanwhile.
    pub fn base_len(&self, bar: u8) -> Result<Option<u32>> {
        let offset = BAR0 + 4 * u16::from(bar.min(BARS - 1));
        let (command, low) = (self.read16(COMMAND)?, self.read32(offset)?);
        self.set_command(command & !(COMMAND_MEMORY | COMMAND_BUS_MASTER))?;
        self.host.pci_write(self.address, offset, Width::U32, u32::MAX)?;
        // The bits that stay zero are those within it.
        let mask = self.read32(offset)? & !0xf;
        self.host.pci_write(self.address, offset, Width::U32, low)?;
        self.set_command(command)?;
        Ok((!mask).checked_add(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use hypercall::testing::TestHost;
    use proptest::prelude::*;

    fn function(space: &[u8]) -> Function<TestHost> {
        let host = TestHost::new();
        let mut address = None;
        let at = PciAddress { segment: 0, bus: 0, device: 3, function: 0 };
        host.add_pci_function(at, space, 0, &[(0x10, 0xffff_c000)]);
        host.pci_functions(&mut |found| address = Some(found));
        Function::new(host, address.unwrap())
    }

    fn space(writes: &[(usize, &[u8])]) -> Vec<u8> {
        let mut space = vec![0; 256];
        for (at, bytes) in writes {
            space[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        space
    }

    #[test]
    fn capabilities_in_a_circle_end() {
        let round = space(&[(6, &[0x10]), (0x34, &[0x40]), (0x40, &[9, 0x50]), (0x50, &[0x11, 0x40, 3, 0])]);
        let function = function(&round);
        let found = function.capabilities().unwrap();
        assert_eq!(found[..3], [(9, 0x40), (0x11, 0x50), (9, 0x40)]);
        assert_eq!(found.len(), MAX_CAPABILITIES);
        assert_eq!(function.msix_entries(), Ok(4));
    }

    #[test]
    fn without_a_list_there_are_none() {
        let function = function(&space(&[(0x34, &[0x40]), (0x40, &[0x11, 0, 3, 0])]));
        assert_eq!((function.capabilities(), function.msix_entries()), (Ok(vec![]), Ok(0)));
        assert_eq!(function.line(), Ok(None));
    }

    #[test]
    fn base_addresses() {
        let bars = [
            [0x04, 0xc0, 0xff, 0xfe], // 64 bits, its upper half follows
            [0x01, 0x00, 0x00, 0x00],
            [0x01, 0xc0, 0x00, 0x00], // ports
            [0x08, 0x00, 0x00, 0xe0], // 32 bits, prefetchable
            [0x00, 0x00, 0x00, 0x00],
            [0x04, 0x00, 0x00, 0xf0], // 64 bits, cut off
        ];
        let function = function(&space(&[(0x10, &bars.concat())]));
        let bases: Vec<_> = (0..7).map(|bar| function.base(bar).unwrap()).collect();
        assert_eq!(bases[0], Base::Memory(0x1_feff_c000));
        assert_eq!(bases[2..4], [Base::NoMemory, Base::Memory(0xe000_0000)]);
        assert_eq!(bases[4..], [Base::Unassigned, Base::NoMemory, Base::NoMemory]);
        assert_eq!(function.base_len(0), Ok(Some(0x4000)));
        assert_eq!(function.base(0), Ok(bases[0]), "it is as it was");
        function.enable().unwrap();
        assert_eq!(function.read16(COMMAND), Ok(6));
    }

    proptest! {
        #[test]
        fn anything_is_bounded(space in proptest::collection::vec(any::<u8>(), 256), bar: u8) {
            let function = function(&space);
            prop_assert!(function.capabilities().unwrap().len() <= MAX_CAPABILITIES);
            prop_assert!(function.msix_entries().unwrap() <= 2048);
            let _ = (function.base(bar), function.base_len(bar), function.line());
        }
    }
}
