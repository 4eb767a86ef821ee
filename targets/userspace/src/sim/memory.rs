//! Pages and device memory, from the process's heap.
#![expect(unsafe_code, reason = "hands out memory")]

use super::SimHost;
use super::trace::digest;
use core::ptr::NonNull;
use hypercall::{Call, Dma, DmaAddr, DmaBlock, DmaDirection, Error, Memory, PAGE_SIZE, Pages, Result, Width};
use std::alloc::{Layout, alloc_zeroed, dealloc};

fn zeroed(layout: Layout) -> Result<NonNull<u8>> {
    // SAFETY: no caller passes a layout of size 0.
    NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(Error::NoMemory)
}

fn pages_layout(count: usize) -> Result<Layout> {
    let bytes = count.checked_mul(PAGE_SIZE).filter(|bytes| *bytes > 0).ok_or(Error::Invalid)?;
    Layout::from_size_align(bytes, PAGE_SIZE).map_err(|_| Error::NoMemory)
}

// SAFETY: zeroed memory of the size and alignment asked for, from an allocator that gives it to nobody else.
unsafe impl Memory for SimHost {
    fn alloc_pages(&self, count: usize) -> Result<Pages> {
        self.call(Call::AllocPages, [count as u64, 0], |node| {
            let layout = pages_layout(count)?;
            let used = node.pages.get() + count as u64;
            if used > node.memory / PAGE_SIZE as u64 {
                return Err(Error::NoMemory);
            }
            let base = zeroed(layout)?;
            node.pages.set(used);
            Ok(Pages { base, count })
        })
    }

    unsafe fn free_pages(&self, pages: Pages) {
        let Ok(layout) = pages_layout(pages.count) else { return };
        // SAFETY: by the contract this came from `alloc_pages`, with the same layout.
        unsafe { dealloc(pages.base.as_ptr(), layout) };
        // Also of a node that is down, or whose simulation is gone.
        self.note(Call::FreePages, [pages.count as u64, 0], |node| {
            node.pages.set(node.pages.get() - pages.count as u64);
        });
    }

    fn memory_bytes(&self) -> u64 {
        self.value(Call::MemoryBytes, |node| node.memory).unwrap_or(0)
    }
}

fn dma_layout(len: usize, align: usize) -> Result<Layout> {
    if len == 0 || !align.is_power_of_two() || align > 65_536 {
        return Err(Error::Invalid);
    }
    // Devices see whole pages.
    Layout::from_size_align(len, align.max(64)).map_err(|_| Error::NoMemory)
}

// SAFETY: zeroed memory that is nobody else's; a model reaches it by the node's table of device addresses only, which holds
// what is allocated or mapped at that moment.
unsafe impl Dma for SimHost {
    fn dma_alloc(&self, len: usize, align: usize) -> Result<DmaBlock> {
        self.call(Call::DmaAlloc, [len as u64, align as u64], |node| {
            let layout = dma_layout(len, align)?;
            if len as u64 > node.memory {
                return Err(Error::NoMemory);
            }
            let cpu = zeroed(layout)?;
            let device = node.dma.borrow_mut().add_block(cpu, len, layout);
            Ok(DmaBlock { cpu, device, len })
        })
    }

    unsafe fn dma_free(&self, block: DmaBlock) {
        self.note(Call::DmaFree, [block.device.0, block.len as u64], |node| {
            let Some(layout) = node.dma.borrow_mut().remove(block.device) else {
                panic!("dma_free of {:?}, which is not allocated", block.device)
            };
            // SAFETY: by the contract this came from `dma_alloc`, with the layout that the table kept.
            unsafe { dealloc(block.cpu.as_ptr(), layout) };
        });
    }

    unsafe fn dma_map(&self, buf: NonNull<[u8]>, direction: DmaDirection) -> Result<DmaAddr> {
        self.call(Call::DmaMap, [buf.len() as u64, direction as u64], |node| {
            if buf.is_empty() {
                return Err(Error::Invalid);
            }
            Ok(node.dma.borrow_mut().add_map(buf.cast(), buf.len(), direction))
        })
    }

    unsafe fn dma_unmap(&self, device: DmaAddr, buf: NonNull<[u8]>, _: DmaDirection) {
        self.note(Call::DmaUnmap, [device.0, buf.len() as u64], |node| {
            let found = node.dma.borrow_mut().remove(device);
            assert!(found.is_some(), "dma_unmap of {device:?}, which is not mapped");
        });
    }

    unsafe fn dma_read(&self, block: &DmaBlock, offset: usize, width: Width) -> u64 {
        assert!(offset.is_multiple_of(width.bytes()), "offset {offset} is not aligned");
        let mut bytes = [0; 8];
        // SAFETY: the caller's promise; threads change at hypercalls only, so that nobody writes meanwhile.
        unsafe { self.dma_copy(block, offset, &mut bytes[..width.bytes()]) };
        u64::from_le_bytes(bytes)
    }

    unsafe fn dma_copy(&self, block: &DmaBlock, offset: usize, to: &mut [u8]) {
        let end = offset.checked_add(to.len());
        assert!(end.is_some_and(|end| end <= block.len), "offset {offset} outside DMA memory");
        let at = block.device.0 + offset as u64;
        self.note(Call::DmaCopy, [at, to.len() as u64], |_| ());
        // SAFETY: inside the block, which is valid by the caller; `to` is ordinary memory and cannot overlap it.
        unsafe { core::ptr::copy_nonoverlapping(block.cpu.add(offset).as_ptr(), to.as_mut_ptr(), to.len()) };
        if let Some(world) = self.world() {
            world.leave(digest(to));
        }
    }
}

/// A stretch of memory that devices reach.
struct Stretch {
    cpu: NonNull<u8>,
    len: usize,
    layout: Layout,
    /// `None`: allocated, both ways.
    mapped: Option<DmaDirection>,
}

/// What devices reach, by device address.
#[derive(Default)]
pub(super) struct DmaTable {
    stretches: std::collections::BTreeMap<u64, Stretch>,
    next: u64,
}

/// Where device addresses begin: not at 0, and beyond 32 bits.
const FIRST: u64 = 0x1_0000_0000;

impl DmaTable {
    fn place(&mut self, len: usize, align: usize) -> u64 {
        let align = (align as u64).max(4096);
        let at = self.next.max(FIRST).next_multiple_of(align);
        // A gap, so that an access beyond the end does not meet a neighbour.
        self.next = at + len as u64 + 4096;
        at
    }

    fn add_block(&mut self, cpu: NonNull<u8>, len: usize, layout: Layout) -> DmaAddr {
        let at = self.place(len, layout.align());
        self.stretches.insert(at, Stretch { cpu, len, layout, mapped: None });
        DmaAddr(at)
    }

    fn add_map(&mut self, cpu: NonNull<u8>, len: usize, direction: DmaDirection) -> DmaAddr {
        let at = self.place(len, 1);
        let stretch = Stretch { cpu, len, layout: Layout::new::<u8>(), mapped: Some(direction) };
        self.stretches.insert(at, stretch);
        DmaAddr(at)
    }

    fn remove(&mut self, at: DmaAddr) -> Option<Layout> {
        self.stretches.remove(&at.0).map(|stretch| stretch.layout)
    }

    /// Blocks, and mappings.
    pub(super) fn counts(&self) -> (u64, u64) {
        let maps = self.stretches.values().filter(|stretch| stretch.mapped.is_some()).count() as u64;
        (self.stretches.len() as u64 - maps, maps)
    }

    fn find(&self, at: DmaAddr, len: usize, denied: DmaDirection) -> Option<NonNull<u8>> {
        let (start, stretch) = self.stretches.range(..=at.0).next_back()?;
        let offset = usize::try_from(at.0 - start).ok()?;
        let inside = offset.checked_add(len).is_some_and(|end| end <= stretch.len);
        if !inside || stretch.mapped == Some(denied) {
            return None;
        }
        // SAFETY: the offset is inside the stretch.
        Some(unsafe { stretch.cpu.add(offset) })
    }

    /// A device reads. `false`: it was not given that memory.
    pub(super) fn read(&self, at: DmaAddr, buf: &mut [u8]) -> bool {
        let Some(from) = self.find(at, buf.len(), DmaDirection::FromDevice) else { return false };
        for (index, byte) in buf.iter_mut().enumerate() {
            // SAFETY: inside the stretch, which its driver keeps valid until it is freed or unmapped; volatile, as the driver
            // accesses it as memory that changes by itself.
            *byte = unsafe { from.add(index).read_volatile() };
        }
        true
    }

    /// A device writes. `false`: it was not given that memory.
    pub(super) fn write(&self, at: DmaAddr, data: &[u8]) -> bool {
        let Some(to) = self.find(at, data.len(), DmaDirection::ToDevice) else { return false };
        for (index, byte) in data.iter().enumerate() {
            // SAFETY: as in `read`.
            unsafe { to.add(index).write_volatile(*byte) };
        }
        true
    }
}
