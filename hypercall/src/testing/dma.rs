//! Memory for devices that catches misuse: devices have addresses of their own, mappings are copies.

use super::TestHost;
use crate::*;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::alloc::Layout;
use core::ptr::NonNull;

/// The first device address. No pointer of a process lies there, so mixing the two up shows.
const FIRST: u64 = 0x10_0000_0000;
/// What a driver sees in a buffer that a device owns.
const POISON: u8 = 0xdb;

enum Kind {
    Block(Layout),
    /// The driver's buffer and its direction; `cpu` of the entry is the copy that the device sees.
    Mapping(NonNull<u8>, DmaDirection, Vec<u8>),
}

struct Entry {
    cpu: NonNull<u8>,
    len: usize,
    kind: Kind,
}

// SAFETY: an entry is only a record of memory; all access to it goes through the table's lock or the contract.
unsafe impl Send for Entry {}

#[derive(Default)]
pub(super) struct DmaTable {
    live: BTreeMap<u64, Entry>,
    next: u64,
}

impl DmaTable {
    fn insert(&mut self, entry: Entry, align: usize) -> DmaAddr {
        let align = align as u64;
        let at = self.next.max(FIRST).next_multiple_of(align);
        // A gap after each, so that running over an end meets nothing.
        self.next = at + entry.len as u64 + 4096;
        self.live.insert(at, entry);
        DmaAddr(at)
    }

    fn find(&self, at: DmaAddr, len: usize) -> Option<(&Entry, usize)> {
        let (start, entry) = self.live.range(..=at.0).next_back()?;
        let offset = usize::try_from(at.0 - start).ok()?;
        (offset.checked_add(len)? <= entry.len).then_some((entry, offset))
    }
}

impl TestHost {
    /// How many blocks are allocated and not yet freed.
    pub fn dma_blocks(&self) -> usize {
        self.count(|kind| matches!(kind, Kind::Block(_)))
    }

    /// How many mappings were made and not yet ended.
    pub fn dma_mappings(&self) -> usize {
        self.count(|kind| matches!(kind, Kind::Mapping(..)))
    }

    fn count(&self, which: impl Fn(&Kind) -> bool) -> usize {
        self.0.dma.lock().unwrap().live.values().filter(|entry| which(&entry.kind)).count()
    }

    /// Where a device finds `len` bytes at `at`; `None` if it may not reach all of them. Playing a device: valid
    /// while the driver keeps the block or mapping.
    pub fn dma_pointer(&self, at: DmaAddr, len: usize) -> Option<NonNull<u8>> {
        let table = self.0.dma.lock().unwrap();
        let (entry, offset) = table.find(at, len)?;
        // SAFETY: `find` has checked that the offset lies in the entry's memory.
        Some(unsafe { entry.cpu.add(offset) })
    }

    /// Reads as a device does. `Invalid`: the driver did not let it; `Denied`: the mapping is the other way.
    pub fn dma_read(&self, at: DmaAddr, buf: &mut [u8]) -> Result<()> {
        self.device_access(at, buf.len(), DmaDirection::ToDevice)?;
        let from = self.dma_pointer(at, buf.len()).ok_or(Error::Invalid)?;
        for (index, byte) in buf.iter_mut().enumerate() {
            // SAFETY: the pointer is good for `buf.len()` bytes; the driver may write at the same time, so volatile.
            *byte = unsafe { from.add(index).read_volatile() };
        }
        Ok(())
    }

    /// Writes as a device does; otherwise as [`TestHost::dma_read`].
    pub fn dma_write(&self, at: DmaAddr, data: &[u8]) -> Result<()> {
        self.device_access(at, data.len(), DmaDirection::FromDevice)?;
        let to = self.dma_pointer(at, data.len()).ok_or(Error::Invalid)?;
        for (index, byte) in data.iter().enumerate() {
            // SAFETY: as for `dma_read`.
            unsafe { to.add(index).write_volatile(*byte) };
        }
        Ok(())
    }

    fn device_access(&self, at: DmaAddr, len: usize, wanted: DmaDirection) -> Result<()> {
        let table = self.0.dma.lock().unwrap();
        match &table.find(at, len).ok_or(Error::Invalid)?.0.kind {
            Kind::Mapping(_, direction, _) if *direction != wanted => Err(Error::Denied),
            _ => Ok(()),
        }
    }
}

// SAFETY: blocks are fresh zeroed allocations that stay until `dma_free`; a mapping is a copy that stays until
// `dma_unmap`, which writes it back.
unsafe impl Dma for TestHost {
    fn dma_alloc(&self, len: usize, align: usize) -> Result<DmaBlock> {
        if len == 0 || !align.is_power_of_two() || align > 65_536 {
            return Err(Error::Invalid);
        }
        if self.0.fail_pages.load(super::Ordering::SeqCst) {
            return Err(Error::NoMemory);
        }
        let layout = Layout::from_size_align(len, align).map_err(|_| Error::Invalid)?;
        // SAFETY: the layout has a size above 0.
        let cpu = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).ok_or(Error::NoMemory)?;
        let entry = Entry { cpu, len, kind: Kind::Block(layout) };
        let device = self.0.dma.lock().unwrap().insert(entry, align);
        Ok(DmaBlock { cpu, device, len })
    }

    unsafe fn dma_free(&self, block: DmaBlock) {
        let entry = self.0.dma.lock().unwrap().live.remove(&block.device.0);
        let entry = entry.expect("dma_free of a block that this host did not give out, or twice");
        assert!(entry.cpu == block.cpu && entry.len == block.len, "dma_free of a block that was altered");
        let Kind::Block(layout) = entry.kind else { panic!("dma_free of a mapping") };
        // SAFETY: the entry's own memory; nobody uses it any more, says the contract. A late user sees the poison.
        unsafe {
            entry.cpu.write_bytes(POISON, entry.len);
            std::alloc::dealloc(entry.cpu.as_ptr(), layout);
        }
    }

    unsafe fn dma_map(&self, buf: NonNull<[u8]>, direction: DmaDirection) -> Result<DmaAddr> {
        let (first, len) = (buf.cast::<u8>(), buf.len());
        if len == 0 {
            return Err(Error::Invalid);
        }
        let mut copy = alloc::vec![POISON; len];
        match direction {
            // SAFETY: by the contract the buffer is valid, and nobody writes to it now.
            DmaDirection::ToDevice => copy.copy_from_slice(unsafe { buf.as_ref() }),
            // SAFETY: as above; what was in it is the device's to overwrite, so a driver that looks early sees poison.
            DmaDirection::FromDevice => unsafe { first.write_bytes(POISON, len) },
        }
        let cpu = NonNull::new(copy.as_mut_ptr()).ok_or(Error::NoMemory)?;
        let entry = Entry { cpu, len, kind: Kind::Mapping(first, direction, copy) };
        Ok(self.0.dma.lock().unwrap().insert(entry, 1))
    }

    unsafe fn dma_unmap(&self, device: DmaAddr, buf: NonNull<[u8]>, direction: DmaDirection) {
        let entry = self.0.dma.lock().unwrap().live.remove(&device.0);
        let entry = entry.expect("dma_unmap of what is not mapped, or twice");
        let Kind::Mapping(first, mapped, _copy) = entry.kind else { panic!("dma_unmap of a block") };
        assert!(first == buf.cast() && entry.len == buf.len(), "dma_unmap with another buffer than dma_map");
        assert!(mapped == direction, "dma_unmap in another direction than dma_map");
        if direction == DmaDirection::FromDevice {
            // SAFETY: both are valid for the length and apart; the device's transfer is over.
            unsafe { first.copy_from_nonoverlapping(entry.cpu, entry.len) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_reaches_only_what_is_mapped_and_as_mapped() {
        let host = TestHost::new();
        let mut buf = [1u8; 64];
        let whole = NonNull::from(&mut buf[..]);
        // SAFETY: `buf` outlives the mapping and is not touched until the unmap.
        let at = unsafe { host.dma_map(whole, DmaDirection::FromDevice) }.unwrap();
        assert_eq!(host.dma_write(at, &[7; 64]), Ok(()));
        assert_eq!(host.dma_write(at, &[7; 65]), Err(Error::Invalid));
        assert_eq!(host.dma_read(at, &mut [0; 4]), Err(Error::Denied));
        assert_eq!(host.dma_mappings(), 1);
        // SAFETY: the arguments of the `dma_map` above.
        unsafe { host.dma_unmap(at, whole, DmaDirection::FromDevice) };
        assert_eq!(buf, [7; 64]);
        assert_eq!(host.dma_write(at, &[7; 4]), Err(Error::Invalid));
        assert_eq!(host.dma_mappings(), 0);
    }

    #[test]
    fn a_forgotten_unmap_leaves_poison() {
        let host = TestHost::new();
        let mut buf = [1u8; 8];
        // SAFETY: `buf` outlives the host's use of it, which is the copy alone.
        let at = unsafe { host.dma_map(NonNull::from(&mut buf[..]), DmaDirection::FromDevice) }.unwrap();
        host.dma_write(at, &[7; 8]).unwrap();
        assert_eq!(buf, [POISON; 8]);
    }
}
