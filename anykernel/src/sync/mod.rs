//! Locks and waiting, on the host's park and unpark.
//!
//! Every lock carries its host handle (zero-sized on bare metal and in a module), because a process may hold many
//! instances and there is no global host. That is why these are not `lock_api` locks: its raw mutex is made by a
//! constant and has no place for a handle.

mod condvar;
mod mutex;
mod rwlock;

pub use condvar::Condvar;
pub use mutex::{Mutex, MutexGuard};
pub use rwlock::{RwLock, RwLockReadGuard, RwLockWriteGuard};
