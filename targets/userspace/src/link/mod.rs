//! Links: a wire in memory, a switch in memory, a TAP interface of the host.

mod pcap;
mod ring;
mod switch;
mod tap;
mod wire;

pub use pcap::Pcap;
pub use switch::Switch;
pub use tap::Tap;
pub use wire::Wire;

use crate::host::{PosixHost, Recover};
use hypercall::{Error, LinkInfo, Result, Signal};
use pcap::Direction;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Bytes of an Ethernet header.
const HEADER: usize = 14;

/// An end of a link, to be given to an instance.
#[derive(Debug)]
pub enum Link {
    /// One end of a wire between two instances.
    Wire(Wire),
    /// A port of a switch.
    Port(switch::Port),
    /// A TAP interface.
    Tap(Tap),
}

/// Who is told when frames arrive or room comes back.
#[derive(Debug, Clone)]
pub(crate) struct Listener {
    host: PosixHost,
    signal: Arc<Signal>,
}

impl Listener {
    fn raise(&self) {
        self.signal.raise(&self.host);
    }
}

/// A listener that comes and goes.
#[derive(Debug, Default)]
pub(crate) struct Doorbell(Mutex<Option<Listener>>);

impl Doorbell {
    fn set(&self, listener: Option<Listener>) {
        *self.0.lock().recover() = listener;
    }
    fn ring(&self) {
        if let Some(listener) = &*self.0.lock().recover() {
            listener.raise();
        }
    }
}

/// A locally administered unicast address, different each time.
fn random_mac() -> [u8; 6] {
    let mut mac = [0; 6];
    // Without entropy all are the same, which only matters on a link with several.
    let _ = rustix::rand::getrandom(&mut mac, rustix::rand::GetRandomFlags::empty());
    mac[0] = mac[0] & 0xfc | 0x02;
    mac
}

/// A link as an instance sees it.
pub(crate) struct LinkPort {
    index: usize,
    link: Link,
    info: LinkInfo,
    open: AtomicBool,
    pcap: Option<Arc<Pcap>>,
}

impl LinkPort {
    pub(crate) fn new(index: usize, link: Link, pcap: Option<Arc<Pcap>>) -> Self {
        let info = match &link {
            Link::Wire(wire) => wire.info(),
            Link::Port(port) => port.info(),
            Link::Tap(tap) => tap.info(),
        };
        Self { index, link, info, open: AtomicBool::new(false), pcap }
    }

    pub(crate) fn open(&self, host: PosixHost, signal: Arc<Signal>) -> Result<LinkInfo> {
        if self.open.swap(true, Ordering::AcqRel) {
            return Err(Error::Busy);
        }
        let listener = Listener { host, signal };
        let opened = match &self.link {
            Link::Wire(wire) => {
                wire.open(listener);
                Ok(())
            }
            Link::Port(port) => {
                port.open(listener);
                Ok(())
            }
            Link::Tap(tap) => tap.open(listener),
        };
        if opened.is_err() {
            self.open.store(false, Ordering::Release);
        }
        opened.map(|()| self.info)
    }

    pub(crate) fn send(&self, frame: &[u8]) -> Result<()> {
        if !(HEADER..=HEADER + usize::from(self.info.mtu)).contains(&frame.len()) {
            return Err(Error::Invalid);
        }
        if !self.open.load(Ordering::Acquire) {
            return Err(Error::Gone);
        }
        match &self.link {
            Link::Wire(wire) => wire.send(frame),
            Link::Port(port) => port.send(frame),
            Link::Tap(tap) => tap.send(frame),
        }?;
        self.record(Direction::Sent, frame);
        Ok(())
    }

    pub(crate) fn receive(&self, buf: &mut [u8]) -> Result<usize> {
        if !self.open.load(Ordering::Acquire) {
            return Err(Error::Gone);
        }
        let len = match &self.link {
            Link::Wire(wire) => wire.receive(buf),
            Link::Port(port) => port.receive(buf),
            Link::Tap(tap) => tap.receive(buf),
        }?;
        self.record(Direction::Received, &buf[..len]);
        Ok(len)
    }

    pub(crate) fn close(&self) {
        if self.open.swap(false, Ordering::AcqRel) {
            match &self.link {
                Link::Wire(wire) => wire.close(),
                Link::Port(port) => port.close(),
                Link::Tap(tap) => tap.close(),
            }
            if let Some(pcap) = &self.pcap {
                pcap.flush();
            }
        }
    }

    fn record(&self, direction: Direction, frame: &[u8]) {
        if let Some(pcap) = &self.pcap {
            pcap.record(self.index, self.info.mtu, direction, frame);
        }
    }
}
