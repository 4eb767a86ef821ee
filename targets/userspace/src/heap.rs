//! The heap of a process that holds instances: the system's, but for the clusters of the block cache.
//!
//! Those are many, of three sizes, and live long. Scattered over pages of 4 KiB they cost a miss of the TLB every
//! few hundred bytes read: a cached file was read at 16 GB/s, and at 20 GB/s from the slabs of 2 MiB that lie here on
//! transparent huge pages (`Documentation/admin-guide/mm/transhuge.rst` of Linux).
#![expect(unsafe_code, reason = "an allocator")]

use core::ffi::c_void;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

const SLAB_BYTES: usize = 2 << 20;
/// Most slabs: 32 GiB of addresses. Beyond it, and where so many addresses are not to be had, the system's heap serves.
const SLABS: usize = 1 << 14;
const REGION_BYTES: usize = SLABS * SLAB_BYTES;
const SMALLEST: usize = 16 << 10;
const CLASSES: usize = 3;
/// Where the first piece of a slab begins; the last one is left out for it. Buffers that data is copied to mostly begin
/// at the start of a page or 16 bytes behind it. A copy from the same place of a page, or from a little before it, is
/// slow: a load seems to depend on the stores just made, whose addresses end in the same 12 bits (8 GB/s against 21).
const SKEW: usize = 128;
const MAX_ALIGN: usize = SKEW;
/// This many empty slabs, those with the lowest addresses, keep their memory.
const KEPT: usize = 4;

/// [`Heap::base`] before the region is asked for, and when there is none.
const UNASKED: usize = 0;
const NONE: usize = 1;

/// Install it in a program that holds instances:
///
/// ```
/// #[global_allocator]
/// static HEAP: anykernel_userspace::Heap = anykernel_userspace::Heap::new();
/// HEAP.keep_large_apart();
/// ```
pub struct Heap {
    /// First byte of the region, aligned to a slab; constant once it is known.
    base: AtomicUsize,
    slabs: Mutex<Slabs>,
}

struct Slabs {
    /// Slabs that were in use once: those below this number.
    begun: usize,
    empty: Set,
    /// Slabs of each class that have room and are not empty.
    partial: [Set; CLASSES],
    of: [Slab; SLABS],
}

#[derive(Clone, Copy)]
struct Slab {
    /// Pieces that can be handed out.
    free: u128,
    /// Of these, the ones that the kernel zeroed and nobody had since.
    zeroed: u128,
}

/// A set of slabs.
struct Set([u64; SLABS / 64]);

impl Set {
    const NONE: Self = Self([0; SLABS / 64]);

    fn set(&mut self, slab: usize, member: bool) {
        let bit = 1 << (slab % 64);
        if member {
            self.0[slab / 64] |= bit;
        } else {
            self.0[slab / 64] &= !bit;
        }
    }

    fn first(&self) -> Option<usize> {
        let word = self.0.iter().position(|word| *word != 0)?;
        Some(word * 64 + self.0[word].trailing_zeros() as usize)
    }
}

/// The sizes of clusters.
fn class(layout: Layout) -> Option<usize> {
    (0..CLASSES).find(|class| layout.size() == SMALLEST << class && layout.align() <= MAX_ALIGN)
}

/// All pieces of a slab of this class.
fn all(class: usize) -> u128 {
    u128::MAX >> (128 - (SLAB_BYTES - SKEW) / (SMALLEST << class))
}

impl Heap {
    /// An empty heap.
    #[expect(clippy::new_without_default, reason = "for statics only: it is large")]
    pub const fn new() -> Self {
        let slabs = Slabs {
            begun: 0,
            empty: Set::NONE,
            partial: [const { Set::NONE }; CLASSES],
            of: [Slab { free: 0, zeroed: 0 }; SLABS],
        };
        Self { base: AtomicUsize::new(UNASKED), slabs: Mutex::new(slabs) }
    }

    /// Has the system's heap take what is large from the kernel and give it back when it is freed, always: zeroed memory then
    /// costs nothing until it is written, as most of a connection's buffers never is. Left alone, glibc stops doing so for
    /// what is as large as the first piece that is freed (mallopt(3), `M_MMAP_THRESHOLD`).
    pub fn keep_large_apart(&self) {
        #[cfg(target_env = "gnu")]
        {
            use core::ffi::c_int;
            const M_MMAP_THRESHOLD: c_int = -3;
            unsafe extern "C" {
                safe fn mallopt(parameter: c_int, value: c_int) -> c_int;
            }
            // If it is refused, memory is used less well, no more.
            mallopt(M_MMAP_THRESHOLD, 128 << 10);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Slabs> {
        self.slabs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The region, if `pointer` lies in it.
    fn base_of(&self, pointer: *mut u8) -> Option<usize> {
        let base = self.base.load(Ordering::Relaxed);
        (base > NONE && pointer.addr().wrapping_sub(base) < REGION_BYTES).then_some(base)
    }

    /// A piece of `class`, and whether it is zeroed. `None`: ask the system.
    fn take(&self, class: usize) -> Option<(*mut u8, bool)> {
        let mut slabs = self.lock();
        let base = match self.base.load(Ordering::Relaxed) {
            UNASKED => {
                let base = reserve().unwrap_or(NONE);
                self.base.store(base, Ordering::Relaxed);
                base
            }
            base => base,
        };
        if base == NONE {
            return None;
        }
        let (slab, piece, zeroed) = slabs.take(class)?;
        let at = base + slab * SLAB_BYTES + SKEW + piece * (SMALLEST << class);
        Some((std::ptr::with_exposed_provenance_mut(at), zeroed))
    }

    fn give_back(&self, base: usize, pointer: *mut u8, class: usize) {
        let offset = pointer.addr() - SKEW - base;
        let (slab, piece) = (offset / SLAB_BYTES, offset % SLAB_BYTES / (SMALLEST << class));
        self.lock().give_back(slab, piece, class, || {
            let start = std::ptr::with_exposed_provenance_mut::<c_void>(base + slab * SLAB_BYTES);
            // SAFETY: the slab is a part of our own mapping, and nothing in it is in use.
            unsafe { madvise(start, SLAB_BYTES, Advice::LinuxDontNeed) }.is_ok()
        });
    }
}

impl Slabs {
    /// The slab, the number of the piece in it, and whether it is zeroed.
    fn take(&mut self, class: usize) -> Option<(usize, usize, bool)> {
        let slab = match self.partial[class].first() {
            Some(slab) => slab,
            None => {
                let slab = self.empty.first().unwrap_or(self.begun);
                let zeroed = if slab == self.begun { u128::MAX } else { self.of.get(slab)?.zeroed };
                *self.of.get_mut(slab)? = Slab { free: all(class), zeroed };
                self.begun = self.begun.max(slab + 1);
                self.empty.set(slab, false);
                self.partial[class].set(slab, true);
                slab
            }
        };
        let state = &mut self.of[slab];
        let piece = state.free.trailing_zeros() as usize;
        let zeroed = state.zeroed >> piece & 1 != 0;
        state.free &= !(1 << piece);
        state.zeroed &= !(1 << piece);
        if state.free == 0 {
            self.partial[class].set(slab, false);
        }
        Some((slab, piece, zeroed))
    }

    /// `release` gives the memory of a whole slab back and says whether it will read as zeros.
    fn give_back(&mut self, slab: usize, piece: usize, class: usize, release: impl FnOnce() -> bool) {
        let state = &mut self.of[slab];
        state.free |= 1 << piece;
        let empty = state.free == all(class);
        if empty {
            // The bits of another class mean other bytes, so nothing else is known of what was used.
            state.zeroed = if slab >= KEPT && release() { u128::MAX } else { 0 };
        }
        self.empty.set(slab, empty);
        self.partial[class].set(slab, !empty);
    }
}

/// Addresses for all slabs, without memory yet.
fn reserve() -> Option<usize> {
    let bytes = REGION_BYTES + SLAB_BYTES;
    // SAFETY: a new anonymous mapping; it replaces nothing.
    let mapped = unsafe {
        mmap_anonymous(
            null_mut(),
            bytes,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }
    .ok()?;
    let base = mapped.expose_provenance().next_multiple_of(SLAB_BYTES);
    let start = std::ptr::with_exposed_provenance_mut(base);
    // A kernel without huge pages refuses; then the slabs lie on small ones.
    // SAFETY: a part of the mapping made above.
    let _ = unsafe { madvise(start, REGION_BYTES, Advice::LinuxHugepage) };
    Some(base)
}

// SAFETY: a piece is in use once at a time (its bit is not in `free`), has the class's size and lies in a slab, `SKEW` behind
// a multiple of that size, so it is aligned to `MAX_ALIGN`; all else is the system's, whose contract is the same. A pointer is known by
// its address, so it goes back where it came from.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match class(layout).and_then(|class| self.take(class)) {
            Some((piece, _)) => piece,
            // SAFETY: the caller's promise.
            None => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match class(layout).and_then(|class| self.take(class)) {
            Some((piece, true)) => piece,
            Some((piece, false)) => {
                // SAFETY: the piece has this size and is ours.
                unsafe { piece.write_bytes(0, layout.size()) };
                piece
            }
            // SAFETY: the caller's promise.
            None => unsafe { System.alloc_zeroed(layout) },
        }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        match (self.base_of(pointer), class(layout)) {
            (Some(base), Some(class)) => self.give_back(base, pointer, class),
            // SAFETY: it did not come from the region, so it came from the system's heap.
            _ => unsafe { System.dealloc(pointer, layout) },
        }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if self.base_of(pointer).is_none() {
            // SAFETY: as in `dealloc`.
            return unsafe { System.realloc(pointer, layout, new_size) };
        }
        // SAFETY: the caller promises that the new size and the old alignment make a layout.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        // SAFETY: the new size is not 0, as the caller promises.
        let moved = unsafe { self.alloc(new_layout) };
        if !moved.is_null() {
            // SAFETY: both are ours and do not overlap; the shorter length lies in both.
            unsafe { moved.copy_from_nonoverlapping(pointer, layout.size().min(new_size)) };
            // SAFETY: the caller gives it up.
            unsafe { self.dealloc(pointer, layout) };
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zeroed(heap: &Heap, len: usize) -> &'static mut [u8] {
        let layout = Layout::from_size_align(len, 1).unwrap();
        // SAFETY: the length is not 0; the memory is valid until it is freed.
        unsafe { std::slice::from_raw_parts_mut(heap.alloc_zeroed(layout), len) }
    }

    fn free(heap: &Heap, memory: &'static mut [u8]) {
        // SAFETY: made by `zeroed` with this layout.
        unsafe { heap.dealloc(memory.as_mut_ptr(), Layout::from_size_align(memory.len(), 1).unwrap()) }
    }

    #[test]
    fn pieces_are_distinct_zeroed_and_used_again() {
        static HEAP: Heap = Heap::new();
        for round in 1..4u8 {
            let mut pieces: Vec<_> =
                (0..2000usize).map(|n| zeroed(&HEAP, SMALLEST << (n % CLASSES))).collect();
            for (n, piece) in pieces.iter_mut().enumerate() {
                assert!(piece.iter().all(|byte| *byte == 0), "round {round}, piece {n}");
                assert_eq!(piece.as_ptr().addr() % MAX_ALIGN, 0);
                piece.fill(round);
                piece[0] = n as u8;
            }
            assert!(pieces.iter().enumerate().all(|(n, piece)| piece[0] == n as u8));
            assert!(HEAP.lock().begun <= 2000 * 64 / 1920);
            // Every other one first, so that slabs are left half full.
            for (n, piece) in std::mem::take(&mut pieces).into_iter().enumerate() {
                if n % 2 == 0 { free(&HEAP, piece) } else { pieces.push(piece) }
            }
            pieces.into_iter().for_each(|piece| free(&HEAP, piece));
            let slabs = HEAP.lock();
            assert_eq!(slabs.empty.0.iter().map(|word| word.count_ones()).sum::<u32>() as usize, slabs.begun);
        }
    }

    #[test]
    fn pieces_are_freed_on_other_threads() {
        static HEAP: Heap = Heap::new();
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                scope.spawn(move || {
                    for n in 0..500u16 {
                        let piece = zeroed(&HEAP, 64 << 10);
                        assert!(piece.iter().all(|byte| *byte == 0));
                        piece.fill(thread + 1);
                        if n % 7 == 0 {
                            std::thread::yield_now();
                        }
                        assert!(piece.iter().all(|byte| *byte == thread + 1));
                        std::thread::spawn(move || free(&HEAP, piece)).join().unwrap();
                    }
                });
            }
        });
    }

    #[test]
    fn growing_keeps_the_content() {
        static HEAP: Heap = Heap::new();
        let layout = |size| Layout::from_size_align(size, 1).unwrap();
        // SAFETY: each call gets the layout that the one before it left; the writes and reads lie within.
        unsafe {
            let mut pointer = HEAP.alloc(layout(100));
            pointer.write(7);
            let mut size = 100;
            for new_size in [16 << 10, 17 << 10, 32 << 10, 64 << 10, 65 << 10, 64 << 10, 16 << 10, 5] {
                pointer = HEAP.realloc(pointer, layout(size), new_size);
                size = new_size;
                assert_eq!(pointer.read(), 7);
                pointer.add(size - 1).write(9);
            }
            HEAP.dealloc(pointer, layout(size));
        }
    }
}
