//! Whole stacks against each other in memory, with virtual time.

mod ip;
mod tcp;
mod world;
