//! The image of the application that shows USB devices.
#![cfg_attr(target_os = "none", no_std, no_main)]

anykernel_rumprun::image!(usb_app::main);
