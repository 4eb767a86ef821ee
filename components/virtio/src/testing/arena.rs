//! DMA memory of a [`super::TestMachine`].
#![allow(unsafe_code, reason = "hands out memory")]

use super::Mutex;
use alloc::vec::Vec;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use hypercall::{DmaAddr, DmaBlock, DmaDirection, Error, Result};
use std::collections::BTreeMap;

/// Where devices see the arena.
const BASE: u64 = 0x4000_0000;
const PAGE: usize = 4096;
/// The largest alignment that the contract knows.
const ALIGN: usize = 64 << 10;
const POISON: u8 = 0xdb;

/// What a block is in use for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Coherent,
    Mapped { cpu: usize, direction: DmaDirection },
}

/// Memory that devices reach.
pub struct Arena {
    memory: NonNull<u8>,
    len: usize,
    /// Offset to length and use.
    blocks: Mutex<BTreeMap<usize, (usize, Use)>>,
    fail: AtomicUsize,
    violations: AtomicUsize,
}

// SAFETY: blocks are handed out once; device models copy in and out by raw pointers, as hardware does.
unsafe impl Sync for Arena {}
// SAFETY: nothing in it belongs to a thread.
unsafe impl Send for Arena {}

impl Arena {
    pub(super) fn new(len: usize) -> Self {
        // Ordinary zeroed memory, aligned by hand: the pages that nobody touches then cost nothing.
        let layout = core::alloc::Layout::from_size_align(len + ALIGN, 16).unwrap();
        // SAFETY: the length is not 0. The memory is never freed: machines live as long as the test.
        let memory = unsafe { std::alloc::alloc_zeroed(layout) };
        // SAFETY: at most `ALIGN` further, for which there is room.
        let memory = NonNull::new(unsafe { memory.add(memory.align_offset(ALIGN)) }).unwrap();
        Self {
            memory,
            len,
            blocks: Mutex::default(),
            fail: AtomicUsize::new(usize::MAX),
            violations: AtomicUsize::new(0),
        }
    }

    /// The memory itself and where devices see it, for an independent device implementation.
    pub fn raw(&self) -> (*mut u8, usize, u64) {
        (self.memory.as_ptr(), self.len, BASE)
    }

    /// After `n` more allocations and mappings the rest fail.
    pub fn fail_after(&self, n: usize) {
        self.fail.store(n, Ordering::SeqCst);
    }

    /// How many blocks are allocated or mapped.
    pub fn blocks_in_use(&self) -> usize {
        self.blocks.lock().len()
    }

    /// How many bytes of them.
    pub fn bytes_in_use(&self) -> usize {
        self.blocks.lock().values().map(|(len, _)| len).sum()
    }

    pub(super) fn violations(&self) -> usize {
        self.violations.load(Ordering::SeqCst)
    }

    fn take(&self, len: usize, align: usize, what: Use) -> Result<usize> {
        if len == 0 || !align.is_power_of_two() || align > ALIGN {
            return Err(Error::Invalid);
        }
        let left = self.fail.load(Ordering::SeqCst);
        if left == 0 {
            return Err(Error::NoMemory);
        }
        if left != usize::MAX {
            self.fail.store(left - 1, Ordering::SeqCst);
        }
        let mut blocks = self.blocks.lock();
        let mut at = 0usize;
        for (&start, &(taken, _)) in blocks.iter() {
            if start >= at + len {
                break;
            }
            // A gap of a page, so that running over an end is seen.
            at = (start + taken + PAGE).next_multiple_of(align);
        }
        if at + len > self.len {
            return Err(Error::NoMemory);
        }
        blocks.insert(at, (len, what));
        Ok(at)
    }

    fn fill(&self, at: usize, len: usize, byte: u8) {
        assert!(at + len <= self.len);
        // SAFETY: inside the arena.
        unsafe { self.memory.add(at).write_bytes(byte, len) };
    }

    pub(super) fn alloc(&self, len: usize, align: usize) -> Result<DmaBlock> {
        let at = self.take(len, align, Use::Coherent)?;
        self.fill(at, len, 0);
        // SAFETY: inside the arena.
        let cpu = unsafe { self.memory.add(at) };
        Ok(DmaBlock { cpu, device: DmaAddr(BASE + at as u64), len })
    }

    pub(super) fn free(&self, block: &DmaBlock) {
        let at = (block.device.0 - BASE) as usize;
        let known = self.blocks.lock().remove(&at);
        assert_eq!(known, Some((block.len, Use::Coherent)), "freed what was not allocated");
        self.fill(at, block.len, POISON);
    }

    pub(super) fn map(&self, buf: NonNull<[u8]>, direction: DmaDirection) -> Result<DmaAddr> {
        let cpu = buf.cast::<u8>();
        let at = self.take(buf.len(), 16, Use::Mapped { cpu: cpu.as_ptr().addr(), direction })?;
        match direction {
            // SAFETY: the driver vouches for the buffer; the copy is inside the arena.
            DmaDirection::ToDevice => unsafe {
                self.memory.add(at).copy_from_nonoverlapping(cpu, buf.len());
            },
            DmaDirection::FromDevice => self.fill(at, buf.len(), POISON),
        }
        Ok(DmaAddr(BASE + at as u64))
    }

    pub(super) fn unmap(&self, device: DmaAddr, buf: NonNull<[u8]>, direction: DmaDirection) {
        let at = (device.0 - BASE) as usize;
        let cpu = buf.cast::<u8>();
        let known = self.blocks.lock().remove(&at);
        let expected = (buf.len(), Use::Mapped { cpu: cpu.as_ptr().addr(), direction });
        assert_eq!(known, Some(expected), "unmapped what was not mapped");
        if direction == DmaDirection::FromDevice {
            // SAFETY: the driver vouches for the buffer, whose transfer is over.
            unsafe { cpu.copy_from_nonoverlapping(self.memory.add(at), buf.len()) };
        }
        self.fill(at, buf.len(), POISON);
    }

    /// The offset of a range that is inside one block (or, for a device that does not care, inside the arena).
    fn check(&self, addr: u64, len: usize, write: bool) -> Option<usize> {
        let at = usize::try_from(addr.checked_sub(BASE)?).ok()?;
        let blocks = self.blocks.lock();
        let inside = blocks.range(..=at).next_back().is_some_and(|(&start, &(taken, what))| {
            let allowed = match what {
                Use::Coherent => true,
                Use::Mapped { direction, .. } => write == (direction == DmaDirection::FromDevice),
            };
            allowed && at + len <= start + taken
        });
        if !inside {
            self.violations.fetch_add(1, Ordering::SeqCst);
        }
        inside.then_some(at)
    }

    /// A device reads. `None`, and counted: not its memory.
    pub fn read(&self, addr: u64, out: &mut [u8]) -> Option<()> {
        let at = self.check(addr, out.len(), false)?;
        // SAFETY: inside the arena.
        unsafe { self.memory.add(at).as_ptr().copy_to_nonoverlapping(out.as_mut_ptr(), out.len()) };
        Some(())
    }

    /// A device writes. `None`, and counted: not its memory.
    pub fn write(&self, addr: u64, bytes: &[u8]) -> Option<()> {
        let at = self.check(addr, bytes.len(), true)?;
        // SAFETY: inside the arena.
        unsafe { self.memory.add(at).as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Some(())
    }

    /// A 16-bit field of a ring.
    pub fn u16_at(&self, addr: u64) -> Option<&AtomicU16> {
        let at = self.check(addr, 2, true)?;
        // SAFETY: inside the arena, and ring fields are aligned by the checks of the caller's queue set-up.
        (at % 2 == 0).then(|| unsafe { AtomicU16::from_ptr(self.memory.add(at).cast().as_ptr()) })
    }

    /// Reads `len` bytes into a new vector.
    pub fn read_vec(&self, addr: u64, len: usize) -> Option<Vec<u8>> {
        let mut out = std::vec![0; len];
        self.read(addr, &mut out)?;
        Some(out)
    }
}
