#![no_main]

anykernel_fuzz::fuzz_target!("virtio_blk");
