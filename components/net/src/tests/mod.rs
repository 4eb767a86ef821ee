//! Whole stacks against each other in memory, with virtual time.

mod tcp;
mod world;
