//! What a network interface is: queue pairs, each owned by the one thread that uses it.

use alloc::{boxed::Box, string::String, sync::Arc};
use hypercall::Signal;

bitflags::bitflags! {
    /// What the device does for the stack.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct NicCaps: u32 {
        /// Fills in TCP and UDP checksums ([`TxMeta::checksum`]).
        const TX_CHECKSUM = 1;
        /// Says which received checksums are good ([`RxMeta::checksum_ok`]).
        const RX_CHECKSUM = 2;
        /// Cuts large TCP/IPv4 segments ([`TxMeta::segment`]).
        const TSO4 = 4;
        /// Cuts large TCP/IPv6 segments.
        const TSO6 = 8;
        /// May hand over received TCP segments larger than the MTU.
        const LRO = 16;
    }
}

/// What an interface is. Constant while it exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicInfo {
    /// Registry name: `nic0`, `nic1`.
    pub name: String,
    /// Its address.
    pub mac: [u8; 6],
    /// Largest IP packet in bytes, 576 to 65,535.
    pub mtu: u16,
    /// Offloads.
    pub caps: NicCaps,
    /// How many queue pairs can be opened, at least 1.
    pub queues: u16,
}

/// What the device knows of a received frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RxMeta {
    /// The transport checksum was verified, or the sender vouches for it. Otherwise: verify it.
    pub checksum_ok: bool,
}

/// What the device is to do with a frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TxMeta {
    /// Fill in the transport checksum; the field holds the pseudo-header sum.
    pub checksum: Option<ChecksumAt>,
    /// Cut the TCP segment into pieces.
    pub segment: Option<Segment>,
}

/// Where the checksum goes, in bytes from the start of the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChecksumAt {
    /// First byte that is summed.
    pub start: u16,
    /// The field, counted from `start`.
    pub field: u16,
}

/// How to cut a large TCP segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Payload bytes per piece.
    pub mss: u16,
    /// Length of all headers in front of the payload, Ethernet's included.
    pub header_len: u16,
    /// IPv6 instead of IPv4.
    pub ipv6: bool,
}

/// The transmit queue is full: poll again when the signal was raised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TxFull;

/// A queue pair. Owned by one shard, which polls it. Nothing here blocks. Context: thread.
pub trait NicQueue: Send {
    /// Hands at most `budget` received frames to `sink` and gives their buffers back to the device. A frame is
    /// contiguous, Ethernet header first, no FCS. Returns how many there were.
    fn receive(&mut self, budget: usize, sink: &mut dyn FnMut(&[u8], RxMeta)) -> usize;

    /// Reserves room for a frame of `len` bytes and lets `fill` write it in place: every byte, as what was there before is
    /// unspecified (part of an earlier frame, for example). It leaves with the next [`NicQueue::flush`] at the latest.
    fn transmit(&mut self, len: usize, meta: TxMeta, fill: &mut dyn FnMut(&mut [u8])) -> Result<(), TxFull>;

    /// Tells the device about everything transmitted since the last flush: one doorbell a batch.
    fn flush(&mut self);

    /// Asks for the signal at the next event, before the caller sleeps. `true`: something is there already (poll on).
    fn arm(&mut self) -> bool;

    /// Whether the link is up.
    fn link_up(&self) -> bool {
        true
    }
}

/// A network interface.
pub trait Nic: Send + Sync {
    /// What it is.
    fn info(&self) -> &NicInfo;

    /// Opens queue pair `index` for the thread that will poll it; `signal` is raised for frames, room and link changes.
    /// Errors: [`hypercall::Error::Busy`] if it is open; whatever the device set-up meets. Context: thread.
    fn open_queue(&self, index: u16, signal: Arc<Signal>) -> hypercall::Result<Box<dyn NicQueue>>;
}
