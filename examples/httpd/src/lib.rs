//! A static file server written once against the anykernel API.
