//! The image of the server side of the network benchmarks.
#![cfg_attr(target_os = "none", no_std, no_main)]

anykernel_rumprun::image!(netbench::main);
