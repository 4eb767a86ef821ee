//! The image of the application that measures what a contract call costs.
#![cfg_attr(target_os = "none", no_std, no_main)]

anykernel_rumprun::image!(contractbench::main);
