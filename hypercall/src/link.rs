//! Private contract: Ethernet links that the host itself carries (a tap, a host kernel's netdev, a wire in memory).

use crate::{Result, Signal};
use alloc::sync::Arc;

/// What a link is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkInfo {
    /// Our address on it.
    pub mac: [u8; 6],
    /// Largest IP packet in bytes: 576 to 65,535. Frames are up to 14 bytes longer.
    pub mtu: u16,
}

/// Host links, numbered from 0. Counterparts: rump's `virtif` hypercalls (`VIFHYPER_CREATE`,
/// `VIFHYPER_SENDMBUF`, and `VIF_DELIVERMBUF` the other way); LKL `lkl_dev_net_ops`.
pub trait HostLink {
    /// How many links there are. Constant. Context: any.
    fn link_count(&self) -> u32;

    /// Opens a link; from now on `signal` is raised when frames arrive or room to send comes back.
    ///
    /// Errors: [`crate::Error::NotFound`], [`crate::Error::Busy`] (open already). Context: thread.
    fn link_open(&self, link: u32, signal: Arc<Signal>) -> Result<LinkInfo>;

    /// Sends one frame, without FCS. Errors: [`crate::Error::WouldBlock`] (full: the signal comes),
    /// [`crate::Error::Invalid`] (length), [`crate::Error::Gone`]. Context: thread. Never blocks.
    fn link_send(&self, link: u32, frame: &[u8]) -> Result<()>;

    /// Takes one received frame and returns its length.
    ///
    /// Errors: [`crate::Error::WouldBlock`] (none there: the signal comes), [`crate::Error::BufferTooSmall`] (the frame
    /// is dropped), [`crate::Error::Gone`]. Context: thread. Never blocks.
    fn link_receive(&self, link: u32, buf: &mut [u8]) -> Result<usize>;

    /// Closes the link and drops its signal. Frames not yet received are lost. Context: thread.
    fn link_close(&self, link: u32);
}
