//! Locks and waiting, on the host's park and unpark.
//!
//! Every lock carries its host handle (zero-sized on bare metal and in a module), because a process may hold many
//! instances and there is no global host. That is why these are not `lock_api` locks: its raw mutex is made by a
//! constant and has no place for a handle.

/// loom's atomics are not made by constant functions.
macro_rules! const_unless_loom {
    ($(#[$doc:meta])* pub fn $($rest:tt)*) => {
        #[cfg(not(loom))]
        $(#[$doc])*
        pub const fn $($rest)*
        #[cfg(loom)]
        $(#[$doc])*
        pub fn $($rest)*
    };
}
use const_unless_loom;

/// How often a locker looks again before it sleeps; holders that run on another CPU are usually done by then.
const SPINS: u32 = if cfg!(loom) { 0 } else { 100 };

mod condvar;
mod mutex;
mod rwlock;
#[cfg(test)]
mod tests;

pub use condvar::Condvar;
pub use mutex::{Mutex, MutexGuard};
pub use rwlock::{RwLock, RwLockReadGuard, RwLockWriteGuard};
