//! A readers-writer lock that sleeps. Writers are preferred: a waiting writer keeps new readers out, so a stream of
//! readers cannot starve it; a stream of writers can starve readers.
//!
//! All is in one word, so that a lock nobody waits for costs one atomic operation to take and one to give back, and no
//! hypercall. Readers park on that word; writers park on a count of wake-ups, so that one of them can be woken
//! without the readers.
#![expect(unsafe_code, reason = "a lock hands out references to what it guards")]

use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};
use hypercall::Threads;
use hypercall::atomic::{
    AtomicU32,
    Ordering::{Acquire, Relaxed, Release},
};

/// The low bits of the word: how many readers, or all ones for a writer.
const HOLDERS: u32 = WRITER;
const WRITER: u32 = (1 << 30) - 1;
/// Readers sleep.
const READERS_WAIT: u32 = 1 << 30;
/// Writers sleep, or are about to.
const WRITERS_WAIT: u32 = 1 << 31;

/// Many readers or one writer. Never taken in interrupt context.
pub struct RwLock<H, T: ?Sized> {
    host: H,
    state: AtomicU32,
    /// Counts wake-ups of writers; what they park on.
    writer_wakeups: AtomicU32,
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

// SAFETY: a shared guard gives `&T` only.
unsafe impl<H: Threads + Sync, T: ?Sized + Sync> Sync for RwLockReadGuard<'_, H, T> {}
// SAFETY: a shared guard gives `&T` only.
unsafe impl<H: Threads + Sync, T: ?Sized + Sync> Sync for RwLockWriteGuard<'_, H, T> {}

impl<H, T> RwLock<H, T> {
    super::const_unless_loom! {
        /// A free lock around `value`.
        pub fn new(host: H, value: T) -> Self {
            Self {
                host,
                state: AtomicU32::new(0),
                writer_wakeups: AtomicU32::new(0),
                value: UnsafeCell::new(value),
            }
        }
    }

    /// Ends the lock and returns the value.
    pub fn into_inner(self) -> T {
        self.value.into_inner()
    }
}

/// Whether a reader may enter: no writer holds it, nobody waits before it.
const fn readable(state: u32) -> bool {
    state < WRITER - 1
}

impl<H: Threads, T: ?Sized> RwLock<H, T> {
    /// Waits for the right to read. A reader must not read-lock again: a writer may wait in between.
    /// Context: thread. Blocks.
    #[inline]
    pub fn read(&self) -> RwLockReadGuard<'_, H, T> {
        let state = self.state.load(Relaxed);
        if !readable(state) || self.state.compare_exchange_weak(state, state + 1, Acquire, Relaxed).is_err() {
            self.read_slow();
        }
        RwLockReadGuard(self, core::marker::PhantomData)
    }

    /// Waits for the right to write. Context: thread. Blocks.
    #[inline]
    pub fn write(&self) -> RwLockWriteGuard<'_, H, T> {
        if self.state.compare_exchange(0, WRITER, Acquire, Relaxed).is_err() {
            self.write_slow();
        }
        RwLockWriteGuard(self, core::marker::PhantomData)
    }

    /// What is guarded, without locking: the exclusive reference proves that nobody holds it.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }

    #[cfg(test)]
    pub(super) fn has_waiting_writer(&self) -> bool {
        self.state.load(Relaxed) & WRITERS_WAIT != 0
    }

    #[cold]
    fn read_slow(&self) {
        let mut state = self.spin(|state| state & HOLDERS != WRITER || state & !HOLDERS != 0);
        loop {
            if readable(state) {
                match self.state.compare_exchange_weak(state, state + 1, Acquire, Relaxed) {
                    Ok(_) => return,
                    Err(now) => state = now,
                }
                continue;
            }
            // More than a thousand million readers: a leak of guards, and the count must not become a writer's mark.
            assert!(state & HOLDERS != WRITER - 1, "too many readers of one lock");
            if state & READERS_WAIT == 0
                && let Err(now) = self.state.compare_exchange(state, state | READERS_WAIT, Relaxed, Relaxed)
            {
                state = now;
                continue;
            }
            self.host.park(&self.state, state | READERS_WAIT, None);
            state = self.spin(|state| state & HOLDERS != WRITER || state & !HOLDERS != 0);
        }
    }

    #[cold]
    fn write_slow(&self) {
        let mut state = self.spin(|state| state & HOLDERS == 0 || state & WRITERS_WAIT != 0);
        // Once we slept others may sleep too, and only we would know: then we take the lock with the mark set.
        let mut mark = 0;
        loop {
            if state & HOLDERS == 0 {
                match self.state.compare_exchange_weak(state, state | WRITER | mark, Acquire, Relaxed) {
                    Ok(_) => return,
                    Err(now) => state = now,
                }
                continue;
            }
            if state & WRITERS_WAIT == 0
                && let Err(now) = self.state.compare_exchange(state, state | WRITERS_WAIT, Relaxed, Relaxed)
            {
                state = now;
                continue;
            }
            mark = WRITERS_WAIT;
            // A wake-up between this and the park changes the count; one before it has changed the state.
            let seen = self.writer_wakeups.load(Acquire);
            state = self.state.load(Relaxed);
            if state & HOLDERS == 0 || state & WRITERS_WAIT == 0 {
                continue;
            }
            self.host.park(&self.writer_wakeups, seen, None);
            state = self.spin(|state| state & HOLDERS == 0 || state & WRITERS_WAIT != 0);
        }
    }

    /// Looks at the state for a short while until `enough`.
    fn spin(&self, enough: impl Fn(u32) -> bool) -> u32 {
        for _ in 0..super::SPINS {
            let state = self.state.load(Relaxed);
            if enough(state) {
                return state;
            }
            core::hint::spin_loop();
        }
        self.state.load(Relaxed)
    }

    /// The lock was given up while somebody waits: wakes one writer, or else all readers.
    #[cold]
    fn wake(&self, mut state: u32) {
        if state == WRITERS_WAIT {
            match self.state.compare_exchange(state, 0, Relaxed, Relaxed) {
                Ok(_) => {
                    self.wake_writer();
                    return;
                }
                // Readers came to wait meanwhile, or somebody holds the lock and will do the waking.
                Err(now) => state = now,
            }
        }
        if state == READERS_WAIT | WRITERS_WAIT {
            if self.state.compare_exchange(state, READERS_WAIT, Relaxed, Relaxed).is_err() {
                return;
            }
            if self.wake_writer() {
                return;
            }
            // The writer was not asleep yet and will find the lock by itself; nobody else would wake the readers.
            state = READERS_WAIT;
        }
        if state == READERS_WAIT && self.state.compare_exchange(state, 0, Relaxed, Relaxed).is_ok() {
            self.host.unpark(&self.state, u32::MAX);
        }
    }

    fn wake_writer(&self) -> bool {
        self.writer_wakeups.fetch_add(1, Release);
        self.host.unpark(&self.writer_wakeups, 1) > 0
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
    #[inline]
    fn drop(&mut self) {
        let state = self.0.state.fetch_sub(1, Release) - 1;
        // Readers wait behind other readers only because a writer waits, so that mark is enough.
        if state & HOLDERS == 0 && state & WRITERS_WAIT != 0 {
            self.0.wake(state);
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
    #[inline]
    fn drop(&mut self) {
        let state = self.0.state.fetch_sub(WRITER, Release) - WRITER;
        if state != 0 {
            self.0.wake(state);
        }
    }
}
