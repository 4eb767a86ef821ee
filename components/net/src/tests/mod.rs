//! Whole stacks against each other in memory, with virtual time.

mod ip;
mod stall;
mod tcp;
mod world;
