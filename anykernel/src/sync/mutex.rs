//! A mutex that sleeps (the three-state futex mutex of Drepper's "Futexes are tricky").
#![expect(unsafe_code, reason = "a lock hands out references to what it guards")]

use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};
use hypercall::Threads;
use hypercall::atomic::{
    AtomicU32,
    Ordering::{Acquire, Relaxed, Release},
};

const FREE: u32 = 0;
const HELD: u32 = 1;
const CONTENDED: u32 = 2;

/// Mutual exclusion among threads. Never taken in interrupt context.
pub struct Mutex<H, T: ?Sized> {
    host: H,
    state: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: the lock gives `&mut T` to one thread at a time, so sharing it needs `T: Send` only.
unsafe impl<H: Sync, T: ?Sized + Send> Sync for Mutex<H, T> {}
// SAFETY: owning the lock is owning the value.
unsafe impl<H: Send, T: ?Sized + Send> Send for Mutex<H, T> {}

/// The right to use what a [`Mutex`] guards, until dropped.
pub struct MutexGuard<'a, H: Threads, T: ?Sized> {
    pub(super) mutex: &'a Mutex<H, T>,
    /// Guards stay on their thread.
    _not_send: core::marker::PhantomData<*mut ()>,
}

// SAFETY: a shared guard gives `&T` only.
unsafe impl<H: Threads + Sync, T: ?Sized + Sync> Sync for MutexGuard<'_, H, T> {}

impl<H, T> Mutex<H, T> {
    super::const_unless_loom! {
        /// A free lock around `value`.
        pub fn new(host: H, value: T) -> Self {
            Self { host, state: AtomicU32::new(FREE), value: UnsafeCell::new(value) }
        }
    }

    /// Ends the lock and returns the value.
    pub fn into_inner(self) -> T {
        self.value.into_inner()
    }
}

impl<H: Threads, T: ?Sized> Mutex<H, T> {
    /// Waits for the lock. Context: thread. Blocks. Not recursive: locking twice on one thread never returns.
    #[inline]
    pub fn lock(&self) -> MutexGuard<'_, H, T> {
        if self.state.compare_exchange(FREE, HELD, Acquire, Relaxed).is_err() {
            self.lock_slow();
        }
        MutexGuard { mutex: self, _not_send: core::marker::PhantomData }
    }

    /// Takes the lock if it is free.
    #[inline]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, H, T>> {
        self.state.compare_exchange(FREE, HELD, Acquire, Relaxed).ok()?;
        Some(MutexGuard { mutex: self, _not_send: core::marker::PhantomData })
    }

    /// What is guarded, without locking: the exclusive reference proves that nobody holds it.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }

    pub(super) fn host(&self) -> &H {
        &self.host
    }

    #[cold]
    fn lock_slow(&self) {
        let mut spins = super::SPINS;
        while spins > 0 && self.state.load(Relaxed) == HELD {
            core::hint::spin_loop();
            spins -= 1;
        }
        if self.state.compare_exchange(FREE, HELD, Acquire, Relaxed).is_ok() {
            return;
        }
        // From here on we may be one of several sleepers, so whoever unlocks must wake one.
        while self.state.swap(CONTENDED, Acquire) != FREE {
            self.host.park(&self.state, CONTENDED, None);
        }
    }

    #[inline]
    fn unlock(&self) {
        if self.state.swap(FREE, Release) == CONTENDED {
            self.host.unpark(&self.state, 1);
        }
    }
}

impl<H: Threads, T: ?Sized> Deref for MutexGuard<'_, H, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the guard holds the lock, so nobody else has a reference to the value.
        unsafe { &*self.mutex.value.get() }
    }
}

impl<H: Threads, T: ?Sized> DerefMut for MutexGuard<'_, H, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as for `deref`; `&mut self` makes this reference the only one through the guard.
        unsafe { &mut *self.mutex.value.get() }
    }
}

impl<H: Threads, T: ?Sized> Drop for MutexGuard<'_, H, T> {
    fn drop(&mut self) {
        self.mutex.unlock();
    }
}
