//! The image of the application that shows USB devices.
#![cfg_attr(target_os = "none", no_std, no_main)]

anykernel_rumprun::image!(|kernel| usb_app::main_with(kernel, Some(anykernel_rumprun::free_bytes)));
