#![no_main]

anykernel_fuzz::fuzz_target!("xhci");
