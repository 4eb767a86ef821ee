//! The POSIX-process target and the anykernel command line.
