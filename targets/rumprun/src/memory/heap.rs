//! The heap behind `alloc`: objects up to 2 KiB from slabs of one size each, with a few objects of each size at hand on
//! every CPU; larger ones are runs of page frames.
//!
//! The fast path takes no lock and leaves interrupts on: it only forbids the thread to leave its CPU. So memory must
//! not be allocated or freed in an interrupt handler.

use super::{frames, paging};
use crate::cpu::{self, NoPreempt};
use crate::sync::SpinLock;
use core::alloc::{GlobalAlloc, Layout};
use core::cell::Cell;
use core::ptr::{NonNull, null_mut};
use hypercall::PAGE_SIZE;

/// Sizes of objects. An alignment is met by the first class that is large enough and a multiple of it.
const CLASSES: [usize; 14] = [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1360, 2032];
const LARGEST: usize = CLASSES[CLASSES.len() - 1];

/// Bytes of a slab of class `class`; slabs are aligned to their size, so that an object's slab is found by its address.
const fn slab_bytes(class: usize) -> usize {
    if CLASSES[class] <= 256 { PAGE_SIZE } else { 4 * PAGE_SIZE }
}

/// How many free objects of a class a CPU keeps before it gives half of them back.
const fn magazine_limit(class: usize) -> u32 {
    let by_bytes = 8192 / CLASSES[class];
    if by_bytes < 8 {
        8
    } else if by_bytes > 64 {
        64
    } else {
        by_bytes as u32
    }
}

/// A free object.
struct FreeObject {
    next: *mut FreeObject,
}

/// At the end of each slab.
struct SlabHeader {
    /// Free objects of this slab.
    free: *mut FreeObject,
    free_count: u32,
    capacity: u32,
    /// Neighbours in the list of slabs with free objects.
    next: *mut SlabHeader,
    previous: *mut SlabHeader,
}

/// The slabs of one class.
struct Central {
    class: usize,
    /// Slabs that have free objects.
    partial: *mut SlabHeader,
}

// SAFETY: what the pointers lead to belongs to the heap and is used under the lock.
unsafe impl Send for Central {}

static CENTRAL: [SpinLock<Central>; CLASSES.len()] = {
    let mut all = [const { SpinLock::new(Central { class: 0, partial: null_mut() }) }; CLASSES.len()];
    let mut class = 0;
    while class < all.len() {
        all[class] = SpinLock::new(Central { class, partial: null_mut() });
        class += 1;
    }
    all
};

/// Free objects at hand on one CPU.
pub(crate) struct Magazines([Magazine; CLASSES.len()]);

struct Magazine {
    head: Cell<*mut FreeObject>,
    count: Cell<u32>,
}

impl Magazines {
    pub(crate) const fn new() -> Self {
        Self([const { Magazine { head: Cell::new(null_mut()), count: Cell::new(0) } }; CLASSES.len()])
    }
}

impl Central {
    /// The header of the slab that holds `object`.
    fn header(&self, object: *mut FreeObject) -> *mut SlabHeader {
        let bytes = slab_bytes(self.class);
        let end = (object.addr() | (bytes - 1)) + 1;
        object.with_addr(end - size_of::<SlabHeader>()).cast()
    }

    /// Makes a slab and puts it into the list. False when there is no memory.
    fn grow(&mut self) -> bool {
        let bytes = slab_bytes(self.class);
        let frames = bytes / PAGE_SIZE;
        let Ok(phys) = frames::allocate_aligned(frames, frames) else { return false };
        let base = paging::direct(phys);
        let capacity = (bytes - size_of::<SlabHeader>()) / CLASSES[self.class];
        let mut free = null_mut();
        for index in (0..capacity).rev() {
            // SAFETY: the object lies in the fresh slab, before its header.
            unsafe {
                let object = base.add(index * CLASSES[self.class]).cast::<FreeObject>();
                (*object).next = free;
                free = object;
            }
        }
        let header = self.header(base.cast());
        // SAFETY: the header is in the fresh slab and aligned, as slabs end at multiples of a page.
        unsafe {
            header.write(SlabHeader {
                free,
                free_count: capacity as u32,
                capacity: capacity as u32,
                next: null_mut(),
                previous: null_mut(),
            });
            self.link(header);
        }
        true
    }

    /// # Safety
    /// `header` is a slab of this class that is in no list.
    unsafe fn link(&mut self, header: *mut SlabHeader) {
        // SAFETY: by the caller, and list members are slabs of this class.
        unsafe {
            (*header).next = self.partial;
            (*header).previous = null_mut();
            if !self.partial.is_null() {
                (*self.partial).previous = header;
            }
        }
        self.partial = header;
    }

    /// # Safety
    /// `header` is in the list.
    unsafe fn unlink(&mut self, header: *mut SlabHeader) {
        // SAFETY: by the caller.
        unsafe {
            let (next, previous) = ((*header).next, (*header).previous);
            if !next.is_null() {
                (*next).previous = previous;
            }
            if previous.is_null() {
                self.partial = next;
            } else {
                (*previous).next = next;
            }
        }
    }

    fn take(&mut self) -> *mut FreeObject {
        if self.partial.is_null() && !self.grow() {
            return null_mut();
        }
        let header = self.partial;
        // SAFETY: slabs in the list have at least one free object, which belongs to the heap.
        unsafe {
            let object = (*header).free;
            (*header).free = (*object).next;
            (*header).free_count -= 1;
            if (*header).free_count == 0 {
                self.unlink(header);
            }
            object
        }
    }

    /// # Safety
    /// `object` is a free object of this class.
    unsafe fn put(&mut self, object: *mut FreeObject) {
        let header = self.header(object);
        // SAFETY: by the caller, the header is that of a slab of this class.
        unsafe {
            (*object).next = (*header).free;
            (*header).free = object;
            (*header).free_count += 1;
            if (*header).free_count == 1 {
                self.link(header);
            }
            // An empty slab goes back, unless it is the only one with room.
            let alone = self.partial == header && (*header).next.is_null();
            if (*header).free_count == (*header).capacity && !alone {
                self.unlink(header);
                let bytes = slab_bytes(self.class);
                let phys = (header.addr() & !(bytes - 1)) as u64 - paging::DIRECT_BASE;
                frames::free(phys, bytes / PAGE_SIZE);
            }
        }
    }
}

fn class_of(layout: &Layout) -> Option<usize> {
    if layout.size() > LARGEST {
        return None;
    }
    CLASSES.iter().position(|class| *class >= layout.size() && class.is_multiple_of(layout.align()))
}

fn allocate_small(class: usize) -> *mut u8 {
    let _stay = NoPreempt::new();
    let magazine = &cpu::this().heap.0[class];
    if magazine.head.get().is_null() {
        let mut central = CENTRAL[class].lock();
        for _ in 0..magazine_limit(class) / 2 {
            let object = central.take();
            if object.is_null() {
                break;
            }
            // SAFETY: a free object, now the magazine's.
            unsafe { (*object).next = magazine.head.get() };
            magazine.head.set(object);
            magazine.count.set(magazine.count.get() + 1);
            // The last objects of memory are better shared: do not make a slab to fill a magazine.
            if central.partial.is_null() {
                break;
            }
        }
    }
    let object = magazine.head.get();
    if !object.is_null() {
        // SAFETY: objects in the magazine are free ones of this CPU.
        magazine.head.set(unsafe { (*object).next });
        magazine.count.set(magazine.count.get() - 1);
    }
    object.cast()
}

/// # Safety
/// `object` is of this class and nothing refers to it any more.
unsafe fn free_small(class: usize, object: *mut FreeObject) {
    let _stay = NoPreempt::new();
    let magazine = &cpu::this().heap.0[class];
    // SAFETY: by the caller the object is free, now the magazine's.
    unsafe { (*object).next = magazine.head.get() };
    magazine.head.set(object);
    magazine.count.set(magazine.count.get() + 1);
    if magazine.count.get() > magazine_limit(class) {
        let mut central = CENTRAL[class].lock();
        for _ in 0..magazine_limit(class) / 2 {
            let object = magazine.head.get();
            // SAFETY: objects in the magazine are free ones of this class; the count says that there are enough.
            unsafe {
                magazine.head.set((*object).next);
                central.put(object);
            }
            magazine.count.set(magazine.count.get() - 1);
        }
    }
}

/// Frames of a large object.
fn frames_of(layout: &Layout) -> usize {
    layout.size().div_ceil(PAGE_SIZE)
}

/// The global allocator.
pub(crate) struct Heap;

// SAFETY: objects of a class are at least as large and as aligned as asked for (slabs are aligned to 4096 and objects lie at
// multiples of the class); runs of frames are whole pages at the asked-for alignment; nothing is given twice, as each free
// object is in one list only.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if let Some(class) = class_of(&layout) {
            return allocate_small(class);
        }
        match frames::allocate_aligned(frames_of(&layout), layout.align().div_ceil(PAGE_SIZE)) {
            Ok(phys) => paging::direct(phys),
            Err(_) => null_mut(),
        }
    }

    unsafe fn dealloc(&self, object: *mut u8, layout: Layout) {
        // SAFETY: by the contract of `dealloc`.
        unsafe {
            match class_of(&layout) {
                Some(class) => free_small(class, object.cast()),
                None => frames::free(object.addr() as u64 - paging::DIRECT_BASE, frames_of(&layout)),
            }
        }
    }

    unsafe fn realloc(&self, object: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: by the contract of `realloc` the size fits a layout.
        let new = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        let fits = match (class_of(&layout), class_of(&new)) {
            (Some(old), Some(new)) => old == new,
            (None, None) => frames_of(&layout) == frames_of(&new),
            _ => false,
        };
        if fits {
            return object;
        }
        // SAFETY: the new object is fresh, the old one is the caller's to give up.
        unsafe {
            let target = self.alloc(new);
            if let Some(target) = NonNull::new(target) {
                core::ptr::copy_nonoverlapping(object, target.as_ptr(), layout.size().min(new_size));
                self.dealloc(object, layout);
            }
            target
        }
    }
}
