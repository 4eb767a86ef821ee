//! The image of the file server.
#![cfg_attr(target_os = "none", no_std, no_main)]

anykernel_rumprun::image!(files::main);
