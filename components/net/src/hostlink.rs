//! The NIC driver over links that the host carries ([`HostLink`]).

use alloc::{boxed::Box, collections::VecDeque, format, sync::Arc, vec::Vec};
use anykernel::manifest::{Capability, Manifest};
use anykernel::nic::{Nic, NicCaps, NicInfo, NicQueue, RxMeta, TxFull, TxMeta};
use anykernel::{Kernel, StartError};
use core::sync::atomic::{AtomicBool, Ordering};
use hypercall::{ContractVersion, Error, Host, HostLink, LinkInfo, Signal};

/// Frames that wait when the link is full.
const MAX_QUEUED: usize = 64;

/// What this driver uses.
const MANIFEST: Manifest = Manifest {
    name: "hostlink",
    summary: "network interfaces over links that the host carries",
    core: &[Capability::Threads],
    contracts: &[ContractVersion::CORE, ContractVersion::LINK],
};

struct HostNic<H> {
    host: H,
    link: u32,
    info: NicInfo,
    opened: AtomicBool,
}

struct HostQueue<H: Host + HostLink> {
    host: H,
    link: u32,
    frame_bytes: usize,
    buf: Vec<u8>,
    scratch: Vec<u8>,
    /// Sent, but the link had no room.
    waiting: VecDeque<Vec<u8>>,
    /// A frame was refused: room is news.
    starved: bool,
    /// A frame taken while looking whether there is one.
    peeked: Option<usize>,
}

/// Registers every link of the host as `nicN`. Context: thread.
pub fn register<H: Host + HostLink>(kernel: &Arc<Kernel<H>>) -> Result<(), StartError> {
    kernel.admit(MANIFEST)?;
    let host = kernel.host().of_component("hostlink");
    for link in 0..host.link_count() {
        let name = format!("nic{}", kernel.nics().len());
        let fail = |error| {
            if hypercall::planted!("leak-on-error") {
                core::mem::forget(kernel.clone());
            }
            StartError::Host { what: format!("opening host link {link} as {name}"), error }
        };
        // The contract tells address and MTU only on opening: opened for a look, and again with the queue's signal.
        let LinkInfo { mac, mtu } = host.link_open(link, Arc::new(Signal::new())).map_err(fail)?;
        host.link_close(link);
        if mtu < 576 || mac[0] & 1 != 0 {
            return Err(fail(Error::Invalid));
        }
        let info = NicInfo { name: name.clone(), mac, mtu, caps: NicCaps::empty(), queues: 1 };
        kernel.add_nic(Arc::new(HostNic { host, link, info, opened: AtomicBool::new(false) }));
    }
    Ok(())
}

impl<H: Host + HostLink> Nic for HostNic<H> {
    fn info(&self) -> &NicInfo {
        &self.info
    }

    fn open_queue(&self, index: u16, signal: Arc<Signal>) -> hypercall::Result<Box<dyn NicQueue>> {
        if index != 0 {
            return Err(Error::Invalid);
        }
        if self.opened.swap(true, Ordering::AcqRel) {
            return Err(Error::Busy);
        }
        // All that can fail by itself comes before the link is open.
        let frame_bytes = usize::from(self.info.mtu) + crate::packet::ETHERNET_LEN;
        let opened = buffer(frame_bytes).and_then(|buf| {
            let scratch = buffer(frame_bytes)?;
            self.host.link_open(self.link, signal)?;
            Ok((buf, scratch))
        });
        let (buf, scratch) = opened.inspect_err(|_| self.opened.store(false, Ordering::Release))?;
        Ok(Box::new(HostQueue {
            host: self.host,
            link: self.link,
            frame_bytes,
            buf,
            scratch,
            waiting: VecDeque::new(),
            starved: false,
            peeked: None,
        }))
    }
}

/// `len` zeroed bytes.
fn buffer(len: usize) -> hypercall::Result<Vec<u8>> {
    let mut buf = Vec::new();
    buf.try_reserve_exact(len).map_err(|_| Error::NoMemory)?;
    buf.resize(len, 0);
    Ok(buf)
}

impl<H: Host + HostLink> HostQueue<H> {
    /// Takes the next frame into `buf`.
    fn take(&mut self) -> Option<usize> {
        if let Some(len) = self.peeked.take() {
            return Some(len);
        }
        loop {
            match self.host.link_receive(self.link, &mut self.buf) {
                Ok(len) => return Some(len.min(self.buf.len())),
                // Longer than the MTU allows: the host dropped it.
                Err(Error::BufferTooSmall) => {}
                Err(_) => return None,
            }
        }
    }

    /// Sends what waited. `true`: nothing waits any more.
    fn drain(&mut self) -> bool {
        while let Some(frame) = self.waiting.front() {
            match self.host.link_send(self.link, frame) {
                Err(Error::WouldBlock) => return false,
                // Gone or refused: there is nobody to tell, as on a wire.
                Ok(()) | Err(_) => self.waiting.pop_front(),
            };
        }
        true
    }
}

impl<H: Host + HostLink> NicQueue for HostQueue<H> {
    fn receive(&mut self, budget: usize, sink: &mut dyn FnMut(&[u8], RxMeta)) -> usize {
        let mut got = 0;
        while got < budget {
            let Some(len) = self.take() else { break };
            if let Some(frame) = self.buf.get(..len) {
                sink(frame, RxMeta::default());
            }
            got += 1;
        }
        got
    }

    fn transmit(&mut self, len: usize, _: TxMeta, fill: &mut dyn FnMut(&mut [u8])) -> Result<(), TxFull> {
        if len > self.frame_bytes {
            // Never made by the stack, which knows the MTU; filled all the same so that its sender can go on.
            fill(&mut alloc::vec![0; len]);
            return Ok(());
        }
        self.starved = !self.drain() && self.waiting.len() >= MAX_QUEUED;
        if self.starved {
            return Err(TxFull);
        }
        let Some(frame) = self.scratch.get_mut(..len) else { return Err(TxFull) };
        fill(frame);
        if !self.waiting.is_empty() || self.host.link_send(self.link, frame) == Err(Error::WouldBlock) {
            self.waiting.push_back(Vec::from(frame));
        }
        Ok(())
    }

    fn flush(&mut self) {
        self.drain();
    }

    fn arm(&mut self) -> bool {
        // The host raises the signal at every frame; one that came before is found by looking. So is room: what waited here
        // may go now, and then nobody raises the signal for what the caller still has.
        self.drain();
        if self.peeked.is_none() {
            self.peeked = self.take();
        }
        let room = self.starved && self.waiting.len() < MAX_QUEUED;
        self.peeked.is_some() || room
    }
}

impl<H: Host + HostLink> Drop for HostQueue<H> {
    fn drop(&mut self) {
        self.host.link_close(self.link);
    }
}
