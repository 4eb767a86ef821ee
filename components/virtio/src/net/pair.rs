//! A queue pair: the fast path. Nothing here allocates per frame.
//!
//! Received frames are copied out of the memory that the device can write before anybody looks at them; a frame that
//! came in several buffers is made contiguous by the same copy. Frames to send are written in place.

use super::{Agreed, Budget, Counters, ETHERNET_HEADER, MAX_FRAME, Net, header};
use crate::dma::{Chain, DmaSlot};
use crate::error::{Error, Fault, Result};
use crate::queue::{Queue, QueueOptions, Returned};
use crate::spec::{feature, net as spec};
use crate::transport::{Acknowledger, Attached, Doorbell, Transport};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::driver::Quiet;
use anykernel::nic::{NicQueue, RxMeta, TxFull, TxMeta};
use core::sync::atomic::Ordering;
use hypercall::{DeviceHost, Signal};

/// Receive buffers given back to the device together.
const REPOST_BATCH: u16 = 16;
/// The link state is read at most this often by a busy queue.
const LINK_CHECK_NS: u64 = 100_000_000;
const MIN_BUFFERS: usize = 4;
/// Buffers for large segments that are there from the start; the others are made when they are first needed.
const MIN_LARGE: usize = 2;

/// Which free list a transmit buffer belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Small,
    Large,
}

/// A frame of which some buffers have not come yet.
#[derive(Debug, Clone, Copy, Default)]
struct Partial {
    /// Buffers still to come; 0: no frame has begun.
    left: u16,
    filled: usize,
    meta: RxMeta,
    /// It does not fit, or is shorter than an Ethernet header: counted and skipped.
    bad: bool,
}

/// A queue pair with its buffers.
pub(super) struct Pair<H: DeviceHost> {
    host: H,
    agreed: Agreed,
    counters: Counters,
    receive: Queue<H, ()>,
    receive_bell: Doorbell<H>,
    transmit: Queue<H, Class>,
    transmit_bell: Doorbell<H>,
    /// Receive buffers that the device does not have (before the first poll).
    receive_idle: Vec<DmaSlot<H>>,
    small: Vec<DmaSlot<H>>,
    large: Vec<DmaSlot<H>>,
    /// How many more large buffers may be made.
    large_left: usize,
    frame: Box<[u8]>,
    partial: Partial,
    /// A frame of this class found no room, so that room is worth an interrupt.
    starved: Option<Class>,
}

impl<H: DeviceHost> Pair<H> {
    /// Makes the rings and buffers of pair `index` and tells the device.
    pub(super) fn new(
        host: H,
        transport: &mut Transport<H>,
        index: u16,
        features: u64,
        agreed: Agreed,
        budget: Budget,
        counters: Counters,
    ) -> Result<Self> {
        let no_memory = |error| Error::Host("allocating network buffers", error);
        let mut ring = |queue: u16| {
            let offered = transport.queue_max(queue);
            if usize::from(offered) < MIN_BUFFERS {
                return Err(Error::BadDevice("a network queue is missing or too small"));
            }
            Ok((queue, 1u16 << offered.min(budget.ring).ilog2()))
        };
        let (rx, tx) = (ring(2 * index)?, ring(2 * index + 1)?);
        let options = |size| QueueOptions {
            size,
            event_idx: features & feature::EVENT_IDX != 0,
            indirect: 0,
            max_segment: u32::MAX,
        };

        let whole = agreed.header_bytes + agreed.max_frame;
        let receive_bytes = if agreed.mergeable { budget.receive_bytes } else { whole };
        let receive_idle = DmaSlot::pool(host, receive_bytes, usize::from(rx.1)).map_err(no_memory)?;
        let small = DmaSlot::pool(host, whole, usize::from(tx.1)).map_err(no_memory)?;
        let cuts = agreed.caps.intersects(anykernel::nic::NicCaps::TSO4 | anykernel::nic::NicCaps::TSO6);
        let large = if cuts { MIN_LARGE } else { 0 };
        let large = DmaSlot::pool(host, agreed.header_bytes + MAX_FRAME, large).map_err(no_memory)?;
        if receive_idle.len() < MIN_BUFFERS || small.len() < MIN_BUFFERS {
            return Err(no_memory(hypercall::Error::NoMemory));
        }
        let longest = if agreed.mergeable { MAX_FRAME } else { agreed.max_frame };
        let mut frame = Vec::new();
        frame.try_reserve_exact(longest).map_err(|_| no_memory(hypercall::Error::NoMemory))?;
        frame.resize(longest, 0);

        let receive = Queue::new(host, options(rx.1))?;
        let transmit = Queue::new(host, options(tx.1))?;
        let receive_bell = transport.enable_queue(rx.0, &receive, index)?;
        let transmit_bell = match transport.enable_queue(tx.0, &transmit, index) {
            Ok(bell) => bell,
            Err(error) => {
                // The device knows one of the two; a later reset by the caller does not hurt.
                if let Some(proof) = transport.reset() {
                    receive.dismantle(&proof, |(), chain| drop(chain));
                }
                return Err(error);
            }
        };
        Ok(Self {
            host,
            agreed,
            counters,
            receive,
            receive_bell,
            transmit,
            transmit_bell,
            receive_idle,
            small,
            large_left: budget.large.saturating_sub(large.len()),
            large,
            frame: frame.into_boxed_slice(),
            partial: Partial::default(),
            starved: None,
        })
    }

    /// Gives a receive buffer to the device, at the next publish.
    fn post(&mut self, slot: DmaSlot<H>) {
        let len = slot.len();
        if let Err((chain, (), _)) = self.receive.add(Chain::new(slot, 0, len, Vec::new()), ()) {
            // There are as many buffers as entries, so only a broken queue refuses.
            self.receive_idle.push(chain.into_parts().0);
        }
    }

    /// Posts every buffer that the device does not have.
    fn post_all(&mut self) {
        while self.receive.fault().is_none()
            && let Some(slot) = self.receive_idle.pop()
        {
            self.post(slot);
        }
        self.publish_receive();
    }

    fn publish_receive(&mut self) {
        if self.receive.publish() {
            self.receive_bell.ring();
            self.counters.kicks.increment();
        }
    }

    /// Copies one buffer into the frame under assembly. `true`: the frame is whole.
    fn gather(&mut self, returned: &Returned<H, ()>) -> Result<bool, Fault> {
        let len = returned.len as usize;
        let slot = returned.chain.slot();
        let mut from = 0;
        if self.partial.left == 0 {
            let mut raw = [0; spec::HEADER_BYTES];
            let header_bytes = self.agreed.header_bytes;
            let present = raw.get_mut(..header_bytes).and_then(|raw| slot.copy_out(0, raw));
            if len < header_bytes || present.is_none() {
                return Err(Fault::Answer("a received buffer is shorter than its header"));
            }
            let (meta, buffers) = header::receive(&raw, self.agreed.caps, self.agreed.mergeable);
            if buffers == 0 || buffers > self.receive.size() {
                return Err(Fault::Answer("a received frame has an impossible number of buffers"));
            }
            self.partial = Partial { left: buffers, filled: 0, meta, bad: false };
            from = header_bytes;
        }
        let filled = self.partial.filled;
        let part = self.frame.get_mut(filled..filled + (len - from));
        match part {
            // The device's length was checked against the buffer by the queue.
            Some(part) => {
                if slot.copy_out(from, part).is_none() {
                    return Err(Fault::Answer("a received buffer is shorter than its length"));
                }
                self.partial.filled += len - from;
            }
            None => self.partial.bad = true,
        }
        self.partial.left -= 1;
        Ok(self.partial.left == 0)
    }

    fn receive(&mut self, budget: usize, sink: &mut dyn FnMut(&[u8], RxMeta)) -> Result<usize, Fault> {
        let mut frames = 0;
        let mut reposted = 0;
        while frames < budget {
            let Some(returned) = self.receive.pop()? else { break };
            let whole = self.gather(&returned);
            self.post(returned.chain.into_parts().0);
            reposted += 1;
            if reposted % REPOST_BATCH == 0 {
                self.publish_receive();
            }
            if whole? {
                // A frame that is refused counts too: the work is bounded by `budget`.
                frames += 1;
                match self.frame.get(..self.partial.filled) {
                    Some(frame) if !self.partial.bad && frame.len() >= ETHERNET_HEADER => {
                        sink(frame, self.partial.meta);
                    }
                    _ => self.counters.rx_errors.increment(),
                }
            }
        }
        if reposted > 0 {
            self.publish_receive();
        }
        Ok(frames)
    }

    /// Takes back buffers that were sent.
    fn reclaim(&mut self) -> Result<(), Fault> {
        while let Some(Returned { token, chain, .. }) = self.transmit.pop()? {
            let (slot, _) = chain.into_parts();
            match token {
                Class::Small => self.small.push(slot),
                Class::Large => self.large.push(slot),
            }
        }
        Ok(())
    }

    /// Makes one more large buffer, if the budget and the host's memory allow.
    fn make_large(&mut self) {
        if self.large_left == 0 {
            return;
        }
        match DmaSlot::pool(self.host, self.agreed.header_bytes + MAX_FRAME, 1) {
            Ok(mut made) => {
                self.large_left -= 1;
                self.large.append(&mut made);
            }
            // Memory that is scarce now will be later: live with what there is.
            Err(_) => self.large_left = 0,
        }
    }

    fn free(&mut self, class: Class) -> &mut Vec<DmaSlot<H>> {
        match class {
            Class::Small => &mut self.small,
            Class::Large => &mut self.large,
        }
    }

    fn transmit(
        &mut self,
        len: usize,
        meta: &TxMeta,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Result<Result<(), TxFull>, Fault> {
        let header_bytes = self.agreed.header_bytes;
        let limit = if meta.segment.is_some() { MAX_FRAME } else { self.agreed.max_frame };
        let Some(header) = header::transmit(meta, self.agreed.caps).filter(|_| (1..=limit).contains(&len))
        else {
            self.counters.tx_dropped.increment();
            return Ok(Ok(()));
        };
        let class = if len <= self.agreed.max_frame { Class::Small } else { Class::Large };
        // Lazily: only when there is nothing left, and then all at once.
        if self.free(class).is_empty() {
            self.reclaim()?;
            if class == Class::Large && self.large.is_empty() {
                self.make_large();
            }
        }
        let Some(mut slot) = self.free(class).pop() else {
            self.counters.tx_full.increment();
            self.starved = Some(class);
            return Ok(Err(TxFull));
        };
        let (front, rest) = slot.bytes_mut().split_at_mut(header_bytes);
        for (byte, value) in front.iter_mut().zip(header) {
            *byte = value;
        }
        if let Some(frame) = rest.get_mut(..len) {
            fill(frame);
        }
        let chain = Chain::new(slot, header_bytes + len, 0, Vec::new());
        if let Err((chain, class, _)) = self.transmit.add(chain, class) {
            // Large and small buffers together can outnumber the entries.
            let (slot, _) = chain.into_parts();
            self.free(class).push(slot);
            self.reclaim()?;
            self.counters.tx_full.increment();
            self.starved = Some(class);
            return Ok(Err(TxFull));
        }
        if self.starved == Some(class) {
            self.starved = None;
        }
        Ok(Ok(()))
    }

    fn flush(&mut self) {
        if self.transmit.publish() {
            self.transmit_bell.ring();
            self.counters.kicks.increment();
        }
    }

    /// Frees everything after a reset.
    pub(super) fn dismantle(self, proof: &Quiet) {
        self.receive.dismantle(proof, |(), chain| drop(chain));
        self.transmit.dismantle(proof, |_, chain| drop(chain));
    }
}

/// A pair that a thread uses.
pub(super) struct OpenPair<H: DeviceHost> {
    net: Arc<Net<H>>,
    index: u16,
    /// Always there until drop.
    pair: Option<Box<Pair<H>>>,
    signal: Arc<Signal>,
    attached: Attached,
    acknowledger: Acknowledger<H>,
    /// Count of the signal when interrupts were last acknowledged.
    acknowledged: u32,
    /// Whether anything moved since then.
    progress: bool,
    link_checked_ns: u64,
}

impl<H: DeviceHost> OpenPair<H> {
    pub(super) fn new(
        net: Arc<Net<H>>,
        index: u16,
        mut pair: Box<Pair<H>>,
        signal: Arc<Signal>,
        attached: Attached,
        acknowledger: Acknowledger<H>,
    ) -> Self {
        pair.post_all();
        let acknowledged = signal.count();
        Self {
            net,
            index,
            pair: Some(pair),
            signal,
            attached,
            acknowledger,
            acknowledged,
            progress: false,
            link_checked_ns: 0,
        }
    }

    fn gone(&self) -> bool {
        self.net.gone.load(Ordering::Relaxed)
    }

    /// The pair, unless the device was given up.
    fn live(&mut self) -> Option<&mut Pair<H>> {
        if self.gone() { None } else { self.pair.as_deref_mut() }
    }

    fn broken(&self, fault: Fault) {
        self.net.give_up(&fault.into());
    }

    /// Handles what an interrupt may mean beside buffers.
    fn acknowledge(&mut self) {
        let count = self.signal.count();
        if count == self.acknowledged {
            return;
        }
        self.acknowledged = count;
        let mut config = self.acknowledger.acknowledge();
        if !self.acknowledger.needed() && self.index == 0 {
            // MSI-X does not say why. A wake-up for nothing may be the link; a busy queue looks now and then.
            let now = self.net.host.monotonic_ns();
            if !self.progress || now.saturating_sub(self.link_checked_ns) >= LINK_CHECK_NS {
                self.link_checked_ns = now;
                config = true;
            }
        }
        self.progress = false;
        if config {
            self.net.refresh_link();
        }
    }
}

impl<H: DeviceHost> NicQueue for OpenPair<H> {
    fn receive(&mut self, budget: usize, sink: &mut dyn FnMut(&[u8], RxMeta)) -> usize {
        let Some(pair) = self.live() else { return 0 };
        pair.receive.disable_interrupts();
        match pair.receive(budget, sink) {
            Ok(frames) => {
                self.progress |= frames > 0;
                frames
            }
            Err(fault) => {
                self.broken(fault);
                0
            }
        }
    }

    fn transmit(&mut self, len: usize, meta: TxMeta, fill: &mut dyn FnMut(&mut [u8])) -> Result<(), TxFull> {
        // A device that is gone takes everything and sends nothing, as a pulled cable does.
        let Some(pair) = self.live() else { return Ok(()) };
        match pair.transmit(len, &meta, fill) {
            Ok(sent) => sent,
            Err(fault) => {
                self.broken(fault);
                Ok(())
            }
        }
    }

    fn flush(&mut self) {
        if let Some(pair) = self.live() {
            pair.flush();
        }
    }

    fn arm(&mut self) -> bool {
        self.flush();
        // Before the rings are looked at: what comes after it interrupts again.
        self.acknowledge();
        let Some(pair) = self.live() else { return false };
        // Here, too, the device's wish for a doorbell may have come late.
        pair.publish_receive();
        let mut ready = pair.receive.enable_interrupts(0);
        if pair.starved.is_some() {
            // Not at the first free buffer, but when sending a batch is worth waking up for.
            let half = pair.transmit.in_flight() / 2;
            if pair.transmit.enable_interrupts(half) {
                pair.starved = None;
                ready = true;
            }
        } else {
            pair.transmit.disable_interrupts();
        }
        if let Some(fault) = pair.receive.fault().or(pair.transmit.fault()) {
            self.broken(fault);
            return false;
        }
        ready
    }

    fn link_up(&self) -> bool {
        self.net.link_up.load(Ordering::Relaxed)
    }
}

impl<H: DeviceHost> Drop for OpenPair<H> {
    fn drop(&mut self) {
        if let Some(mut pair) = self.pair.take() {
            pair.receive.disable_interrupts();
            pair.transmit.disable_interrupts();
            self.net.close(self.index, pair, self.attached);
        }
    }
}
