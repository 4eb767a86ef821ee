//! smoltcp as the engine of one connection: one `Interface` of medium IP with one socket in its set.
//!
//! smoltcp looks at every socket for every packet; with one socket each, and our own table in front, that costs
//! nothing. The engine is given packets whose checksums were verified and leaves transport checksums to
//! [`crate::io`], which knows what the device does by itself.

use alloc::vec::Vec;
use core::net::IpAddr;
use core::num::NonZeroUsize;
use smoltcp::iface::{self, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, ChecksumCapabilities, DeviceCapabilities, Medium, PacketMeta};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpCidr};
use zerocopy::FromZeros;

use super::table::Tuple;
use crate::config::Limits;
use crate::packet::{flag, protocol, put, write_ip_header};

/// Where the packets of an engine go.
pub(crate) trait Egress {
    /// Whether one can be sent now.
    fn ready(&mut self) -> bool;
    /// Sends an IP packet of `len` bytes that `fill` writes; with `mss` the device is to cut it.
    fn send(&mut self, len: usize, mss: Option<u16>, fill: &mut dyn FnMut(&mut [u8]));
}

/// What the way out of a connection is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Path {
    /// Largest IP packet.
    pub(crate) mtu: usize,
    /// The device cuts segments of up to [`crate::packet::MAX_FRAME`].
    pub(crate) tso: bool,
}

impl Path {
    fn capabilities(self) -> DeviceCapabilities {
        let mut checksum = ChecksumCapabilities::ignored();
        checksum.ipv4 = Checksum::Tx;
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        capabilities.checksum = checksum;
        if self.tso {
            let most = NonZeroUsize::new(crate::packet::MAX_FRAME - crate::packet::ETHERNET_LEN);
            capabilities.segmentation.tcpv4 = most;
            capabilities.segmentation.tcpv6 = most;
        }
        capabilities
    }
}

struct Device<'a> {
    path: Path,
    packet: Option<&'a [u8]>,
    egress: &'a mut dyn Egress,
}

struct RxToken<'a>(&'a [u8]);
struct TxToken<'a> {
    egress: &'a mut dyn Egress,
    mss: Option<u16>,
}

impl phy::Device for Device<'_> {
    type RxToken<'a>
        = RxToken<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = TxToken<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: Instant) -> Option<(RxToken<'_>, TxToken<'_>)> {
        let packet = self.packet.take()?;
        Some((RxToken(packet), TxToken { egress: self.egress, mss: None }))
    }
    fn transmit(&mut self, _: Instant) -> Option<TxToken<'_>> {
        self.egress.ready().then_some(TxToken { egress: self.egress, mss: None })
    }
    fn capabilities(&self) -> DeviceCapabilities {
        self.path.capabilities()
    }
}

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut f = Some(f);
        let mut result = None;
        self.egress.send(len, self.mss, &mut |buf| {
            if let Some(f) = f.take() {
                result = Some(f(buf));
            }
        });
        match result {
            Some(result) => result,
            // An egress calls `fill` exactly once; if one does not, the packet is written for nobody.
            None => match f.take() {
                Some(f) => f(&mut alloc::vec![0; len]),
                None => unreachable!("fill was called and left no result"),
            },
        }
    }
    fn set_meta(&mut self, meta: PacketMeta) {
        self.mss = meta.segmentation_offload_size.map(core::num::NonZeroU16::get);
    }
}

/// Time as smoltcp counts it.
fn instant(now_ns: u64) -> Instant {
    Instant::from_micros((now_ns / 1000) as i64)
}

/// A zeroed buffer, if there is memory. It is asked for as zeroed, so that a host with virtual memory gives pages only
/// when they are first written: most connections never fill their buffers.
fn buffer(len: usize) -> Option<Vec<u8>> {
    u8::new_vec_zeroed(len).ok()
}

/// One connection.
pub(crate) struct Engine {
    iface: iface::Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    path: Path,
}

struct Nowhere;

impl Egress for Nowhere {
    fn ready(&mut self) -> bool {
        false
    }
    fn send(&mut self, len: usize, _: Option<u16>, fill: &mut dyn FnMut(&mut [u8])) {
        fill(&mut alloc::vec![0; len]);
    }
}

impl Engine {
    /// A closed socket. `None`: no memory.
    pub(crate) fn new(limits: &Limits, path: Path, now_ns: u64) -> Option<Self> {
        let mut socket = tcp::Socket::new(
            tcp::SocketBuffer::new(buffer(limits.receive_bytes)?),
            tcp::SocketBuffer::new(buffer(limits.send_bytes)?),
        );
        // Without a controller smoltcp sends without regard to loss.
        socket.set_congestion_control(tcp::CongestionControl::Reno);
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(socket);
        let mut nowhere = Nowhere;
        let mut device = Device { path, packet: None, egress: &mut nowhere };
        let config = iface::Config::new(HardwareAddress::Ip);
        let iface = iface::Interface::new(config, &mut device, instant(now_ns));
        Some(Self { iface, sockets, handle, path })
    }

    /// Starts over with another address and seed. The seed decides the initial sequence number, and nothing else
    /// does: two engines with one seed that see the same packets send the same.
    pub(crate) fn restart(&mut self, local: IpAddr, seed: u64, path: Path, now_ns: u64) {
        self.socket_mut().abort();
        self.begin(local, seed, path, now_ns);
    }

    /// Sends packets of at most `mtu` bytes from now on.
    pub(crate) fn narrow(&mut self, local: IpAddr, mtu: usize, now_ns: u64) {
        // An interface reads it once, and holds nothing of a connection that has begun.
        self.begin(local, 0, Path { mtu, ..self.path }, now_ns);
    }

    fn begin(&mut self, local: IpAddr, seed: u64, path: Path, now_ns: u64) {
        let mut nowhere = Nowhere;
        let mut device = Device { path, packet: None, egress: &mut nowhere };
        let mut config = iface::Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        self.path = path;
        self.iface = iface::Interface::new(config, &mut device, instant(now_ns));
        // Prefix length 0: every peer is "on the link", because routing is not the engine's business.
        self.iface.update_ip_addrs(|addrs| {
            let _ = addrs.push(IpCidr::new(local.into(), 0));
        });
    }

    /// Begins to connect. `false`: an address or port that TCP cannot use.
    pub(crate) fn connect(&mut self, tuple: &Tuple) -> bool {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
        let remote = (smoltcp::wire::IpAddress::from(tuple.remote), tuple.remote_port);
        let local = (smoltcp::wire::IpAddress::from(tuple.local), tuple.local_port);
        socket.connect(self.iface.context(), remote, local).is_ok()
    }

    /// Waits for a SYN.
    pub(crate) fn listen(&mut self, tuple: &Tuple) -> bool {
        let local = (smoltcp::wire::IpAddress::from(tuple.local), tuple.local_port);
        self.socket_mut().listen(local).is_ok()
    }

    /// Takes in a packet; immediate answers go to `egress`, ready or not.
    pub(crate) fn ingress(&mut self, now_ns: u64, packet: &[u8], egress: &mut dyn Egress) {
        let mut device = Device { path: self.path, packet: Some(packet), egress };
        self.iface.poll_ingress_single(instant(now_ns), &mut device, &mut self.sockets);
    }

    /// Takes in an empty segment as if the peer had sent it.
    pub(crate) fn hear(&mut self, now_ns: u64, tuple: &Tuple, seq: u32, ack: u32, window: u16) {
        let mut packet = [0; 60];
        let at = write_ip_header(&mut packet, tuple.remote, tuple.local, protocol::TCP, 64, 20);
        put(&mut packet, at, &tuple.remote_port.to_be_bytes());
        put(&mut packet, at + 2, &tuple.local_port.to_be_bytes());
        put(&mut packet, at + 4, &seq.to_be_bytes());
        put(&mut packet, at + 8, &ack.to_be_bytes());
        put(&mut packet, at + 12, &[5 << 4, flag::ACK]);
        put(&mut packet, at + 14, &window.to_be_bytes());
        self.ingress(now_ns, packet.get(..at + 20).unwrap_or_default(), &mut Nowhere);
    }

    /// Sends at most one packet. `false`: there was none to send, or no room.
    pub(crate) fn egress(&mut self, now_ns: u64, egress: &mut dyn Egress) -> bool {
        let mut device = Device { path: self.path, packet: None, egress };
        let result = self.iface.poll_egress(instant(now_ns), &mut device, &mut self.sockets);
        result == iface::PollResult::SocketStateChanged
    }

    /// When [`Engine::egress`] has something to do.
    pub(crate) fn next_deadline_ns(&mut self, now_ns: u64) -> Option<u64> {
        let at = self.iface.poll_at(instant(now_ns), &self.sockets)?;
        Some(u64::try_from(at.total_micros()).unwrap_or(0) * 1000)
    }

    /// Largest packet of the way out.
    pub(crate) fn mtu(&self) -> usize {
        self.path.mtu
    }

    pub(crate) fn socket(&self) -> &tcp::Socket<'static> {
        self.sockets.get(self.handle)
    }

    pub(crate) fn socket_mut(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.handle)
    }
}
