//! The bare-metal x86_64 target: boot, memory, interrupts, SMP.
