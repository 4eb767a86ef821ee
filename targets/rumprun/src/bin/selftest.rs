//! The image of the application that checks its own kernel.
#![cfg_attr(target_os = "none", no_std, no_main)]

anykernel_rumprun::image!(selftest::main);
