//! The spin lock: taken with interrupts off, so that its holder is neither preempted nor interrupted by code that wants
//! the same lock. Held for a few dozen instructions at most.

use crate::cpu::regs;
use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicBool, Ordering};

/// Mutual exclusion among CPUs.
pub(crate) struct SpinLock<T> {
    held: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the lock hands `&mut T` to one holder at a time.
unsafe impl<T: Send> Sync for SpinLock<T> {}

/// Interrupts are off on this CPU while it lives; then they are as before.
pub(crate) struct InterruptsOff {
    were_on: bool,
    _not_send: core::marker::PhantomData<*mut ()>,
}

impl InterruptsOff {
    #[inline]
    pub(crate) fn new() -> Self {
        let were_on = regs::interrupts_on();
        regs::interrupts_disable();
        Self { were_on, _not_send: core::marker::PhantomData }
    }
}

impl Drop for InterruptsOff {
    #[inline]
    fn drop(&mut self) {
        if self.were_on {
            // SAFETY: they were on before, and guards end in the order opposite to their making.
            unsafe { regs::interrupts_enable() };
        }
    }
}

/// The right to use what a [`SpinLock`] guards.
pub(crate) struct SpinGuard<'a, T> {
    lock: &'a SpinLock<T>,
    _interrupts: InterruptsOff,
}

impl<T> SpinLock<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self { held: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// Takes the lock. Not recursive.
    #[inline]
    pub(crate) fn lock(&self) -> SpinGuard<'_, T> {
        let interrupts = InterruptsOff::new();
        while self.held.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            while self.held.load(Ordering::Relaxed) {
                core::hint::spin_loop();
            }
        }
        SpinGuard { lock: self, _interrupts: interrupts }
    }

    /// Takes the lock if it is free.
    pub(crate) fn try_lock(&self) -> Option<SpinGuard<'_, T>> {
        let interrupts = InterruptsOff::new();
        self.held.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).ok()?;
        Some(SpinGuard { lock: self, _interrupts: interrupts })
    }

    /// Takes the lock, or goes ahead without it after `spins` looks: for the last words of the machine, when a CPU may
    /// have been stopped inside the lock.
    ///
    /// # Safety
    /// No other CPU runs on inside the lock.
    pub(crate) unsafe fn lock_or_break(&self, spins: u32) -> SpinGuard<'_, T> {
        for _ in 0..spins {
            if let Some(guard) = self.try_lock() {
                return guard;
            }
            core::hint::spin_loop();
        }
        SpinGuard { lock: self, _interrupts: InterruptsOff::new() }
    }
}

impl<'a, T> SpinGuard<'a, T> {
    /// Keeps the lock for good: what it guards can be shared then, as nobody changes it any more.
    pub(crate) fn keep(self) -> &'a T {
        let guard = core::mem::ManuallyDrop::new(self);
        // SAFETY: the lock is never released, so no `&mut` to the value is made again.
        unsafe { &*guard.lock.value.get() }
    }
}

impl<T> Deref for SpinGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the guard is the exclusive right.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for SpinGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for SpinGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.lock.held.store(false, Ordering::Release);
    }
}
