//! The Linux kernel module target.
