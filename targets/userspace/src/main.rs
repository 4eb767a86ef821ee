//! The `anykernel` command.
#![forbid(unsafe_code)]

mod cli;

#[global_allocator]
static HEAP: anykernel_userspace::Heap = anykernel_userspace::Heap::new();

fn main() -> std::process::ExitCode {
    HEAP.keep_large_apart();
    cli::main()
}
