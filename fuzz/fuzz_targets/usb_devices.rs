#![no_main]

anykernel_fuzz::fuzz_target!("usb_devices");
