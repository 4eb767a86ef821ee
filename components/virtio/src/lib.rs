//! virtio: virtqueues, transports, and the blk and net drivers.
