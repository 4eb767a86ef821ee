//! Tasks: futures run by threads, and waiting for one future on the calling thread.
//!
//! [`Executor`] is a queue of woken tasks and a queue of timers. Threads that call [`Executor::run`] work them off; an
//! idle one parks until a task is woken or the next timer is due. Tasks are `async-task`s: one allocation each, whose
//! state machine takes a wake at any moment, also while the task is being polled.

mod block_on;
mod executor;
#[cfg(test)]
mod tests;

pub use block_on::{block_on, block_on_until};
pub use executor::{Executor, JoinHandle, Sleep};
