//! A readers-writer lock that sleeps. Writers are preferred: a waiting writer keeps new readers out.
#![expect(unsafe_code, reason = "a lock hands out references to what it guards")]

use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{
    AtomicU32,
    Ordering::{Acquire, Relaxed, Release},
};
use hypercall::Threads;

/// `state`: the number of readers, or this for a writer.
const WRITER: u32 = u32::MAX;

/// Many readers or one writer. Never taken in interrupt context.
pub struct RwLock<H, T: ?Sized> {
    host: H,
    state: AtomicU32,
    /// Writers that wait.
    writers: AtomicU32,
    /// Counts releases; what waiters park on.
    released: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: readers on several threads share `&T` (`T: Sync`), a writer gets `&mut T` (`T: Send`).
unsafe impl<H: Sync, T: ?Sized + Send + Sync> Sync for RwLock<H, T> {}
// SAFETY: owning the lock is owning the value.
unsafe impl<H: Send, T: ?Sized + Send> Send for RwLock<H, T> {}

/// The right to read.
pub struct RwLockReadGuard<'a, H: Threads, T: ?Sized>(&'a RwLock<H, T>, core::marker::PhantomData<*mut ()>);
/// The right to write.
pub struct RwLockWriteGuard<'a, H: Threads, T: ?Sized>(&'a RwLock<H, T>, core::marker::PhantomData<*mut ()>);

impl<H, T> RwLock<H, T> {
    /// A free lock around `value`.
    pub const fn new(host: H, value: T) -> Self {
        Self {
            host,
            state: AtomicU32::new(0),
            writers: AtomicU32::new(0),
            released: AtomicU32::new(0),
            value: UnsafeCell::new(value),
        }
    }
}

impl<H: Threads, T: ?Sized> RwLock<H, T> {
    /// Waits for the right to read. A reader must not read-lock again: a writer may wait in between.
    pub fn read(&self) -> RwLockReadGuard<'_, H, T> {
        loop {
            let seen = self.released.load(Acquire);
            let state = self.state.load(Relaxed);
            if self.writers.load(Relaxed) == 0 && state < WRITER - 1 {
                if self.state.compare_exchange_weak(state, state + 1, Acquire, Relaxed).is_ok() {
                    return RwLockReadGuard(self, core::marker::PhantomData);
                }
                continue;
            }
            self.host.park(&self.released, seen, None);
        }
    }

    /// Waits for the right to write.
    pub fn write(&self) -> RwLockWriteGuard<'_, H, T> {
        self.writers.fetch_add(1, Relaxed);
        loop {
            let seen = self.released.load(Acquire);
            if self.state.compare_exchange(0, WRITER, Acquire, Relaxed).is_ok() {
                self.writers.fetch_sub(1, Relaxed);
                return RwLockWriteGuard(self, core::marker::PhantomData);
            }
            self.host.park(&self.released, seen, None);
        }
    }

    fn release(&self) {
        self.released.fetch_add(1, Release);
        self.host.unpark(&self.released, u32::MAX);
    }
}

impl<H: Threads, T: ?Sized> Deref for RwLockReadGuard<'_, H, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: while a reader is counted no writer exists.
        unsafe { &*self.0.value.get() }
    }
}

impl<H: Threads, T: ?Sized> Drop for RwLockReadGuard<'_, H, T> {
    fn drop(&mut self) {
        if self.0.state.fetch_sub(1, Release) == 1 {
            self.0.release();
        }
    }
}

impl<H: Threads, T: ?Sized> Deref for RwLockWriteGuard<'_, H, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: a writer is alone.
        unsafe { &*self.0.value.get() }
    }
}

impl<H: Threads, T: ?Sized> DerefMut for RwLockWriteGuard<'_, H, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: a writer is alone, and this borrows the guard exclusively.
        unsafe { &mut *self.0.value.get() }
    }
}

impl<H: Threads, T: ?Sized> Drop for RwLockWriteGuard<'_, H, T> {
    fn drop(&mut self) {
        self.0.state.store(0, Release);
        self.0.release();
    }
}
