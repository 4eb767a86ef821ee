//! Whole stacks against each other in memory, with virtual time.

mod forward;
mod ip;
mod plug;
mod stall;
mod tcp;
mod world;
