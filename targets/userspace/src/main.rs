//! The `anykernel` command.

fn main() {}
