//! The NIC: two bounded queues between the stack's shard and the task of the device.

use crate::engine::Engine;
use crate::stack::Owner;
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::nic::{Nic, NicInfo, NicQueue, RxMeta, TxFull, TxMeta};
use anykernel::sync::Mutex;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::Waker;
use hypercall::{Error, Host, Signal};

/// Frames that wait, each way.
const MAX_QUEUED: usize = 512;
const ETHERNET_LEN: usize = 14;

#[derive(Default)]
struct State {
    rx: VecDeque<Vec<u8>>,
    tx: VecDeque<Vec<u8>>,
    /// A sender was told that there is no room.
    wants_room: bool,
    link_up: bool,
    signal: Option<Arc<Signal>>,
    task: Option<Waker>,
    /// The device is unplugged.
    gone: bool,
}

/// What shard and task share.
pub(crate) struct NicPort<H: Host> {
    engine: Arc<Engine<H>>,
    pub(crate) info: NicInfo,
    state: Mutex<H, State>,
    open: AtomicBool,
}

impl<H: Host> NicPort<H> {
    pub(super) fn new(engine: Arc<Engine<H>>, info: NicInfo) -> Arc<Self> {
        let state = Mutex::new(engine.host, State::default());
        Arc::new(Self { engine, info, state, open: AtomicBool::new(false) })
    }

    /// The device is gone.
    pub(super) fn detach(&self) {
        let mut state = self.state.lock();
        state.tx.clear();
        state.task = None;
        state.gone = true;
        drop(state);
        self.set_link(false);
    }

    pub(super) fn set_link(&self, up: bool) {
        let mut state = self.state.lock();
        let changed = core::mem::replace(&mut state.link_up, up) != up;
        let signal = state.signal.clone().filter(|_| changed);
        drop(state);
        signal.into_iter().for_each(|signal| signal.raise(&self.engine.host));
    }

    /// Hands received frames on. Says how many had no room.
    pub(super) fn received(&self, frames: Vec<Vec<u8>>) -> u64 {
        let mut state = self.state.lock();
        if state.signal.is_none() {
            return 0;
        }
        let mut dropped = 0;
        for frame in frames {
            if state.rx.len() < MAX_QUEUED {
                state.rx.push_back(frame);
            } else {
                dropped += 1;
            }
        }
        let signal = state.signal.clone();
        drop(state);
        signal.into_iter().for_each(|signal| signal.raise(&self.engine.host));
        dropped
    }

    /// The next frame to send; otherwise `waker` is told when there is one.
    pub(super) fn next(&self, waker: &Waker) -> Option<Vec<u8>> {
        let mut state = self.state.lock();
        let frame = state.tx.pop_front();
        if frame.is_none() {
            state.task = Some(waker.clone());
        }
        let room = core::mem::take(&mut state.wants_room);
        let signal = state.signal.clone().filter(|_| room);
        drop(state);
        signal.into_iter().for_each(|signal| signal.raise(&self.engine.host));
        frame
    }

    /// Puts a frame back that did not fit.
    pub(super) fn put_back(&self, frame: Vec<u8>) {
        self.state.lock().tx.push_front(frame);
    }
}

/// What the registry holds.
pub(super) struct UsbNic<H: Host> {
    pub(super) port: Arc<NicPort<H>>,
    pub(super) owner: Arc<Owner<H>>,
}

impl<H: Host> Nic for UsbNic<H> {
    fn info(&self) -> &NicInfo {
        &self.port.info
    }

    fn open_queue(&self, index: u16, signal: Arc<Signal>) -> hypercall::Result<Box<dyn NicQueue>> {
        if index != 0 {
            return Err(Error::Invalid);
        }
        if self.port.open.swap(true, Ordering::AcqRel) {
            return Err(Error::Busy);
        }
        self.port.state.lock().signal = Some(signal);
        Ok(Box::new(UsbQueue { port: self.port.clone(), _owner: self.owner.clone(), pending: false }))
    }
}

struct UsbQueue<H: Host> {
    port: Arc<NicPort<H>>,
    _owner: Arc<Owner<H>>,
    /// Something was queued since the last flush.
    pending: bool,
}

impl<H: Host> NicQueue for UsbQueue<H> {
    fn receive(&mut self, budget: usize, sink: &mut dyn FnMut(&[u8], RxMeta)) -> usize {
        let mut state = self.port.state.lock();
        let count = budget.min(state.rx.len());
        let frames: Vec<Vec<u8>> = state.rx.drain(..count).collect();
        drop(state);
        frames.iter().for_each(|frame| sink(frame, RxMeta::default()));
        count
    }

    fn transmit(&mut self, len: usize, _: TxMeta, fill: &mut dyn FnMut(&mut [u8])) -> Result<(), TxFull> {
        let mut frame = Vec::new();
        if frame.try_reserve_exact(len).is_err() {
            return Err(TxFull);
        }
        let mut state = self.port.state.lock();
        if state.tx.len() >= MAX_QUEUED {
            state.wants_room = true;
            return Err(TxFull);
        }
        drop(state);
        frame.resize(len, 0);
        fill(&mut frame);
        // Nobody at the other end, or longer than it takes: it goes nowhere, as on a wire without a plug.
        let mut state = self.port.state.lock();
        if !state.gone && len <= usize::from(self.port.info.mtu) + ETHERNET_LEN {
            state.tx.push_back(frame);
            self.pending = true;
        }
        Ok(())
    }

    fn flush(&mut self) {
        if !core::mem::take(&mut self.pending) {
            return;
        }
        let task = self.port.state.lock().task.take();
        if let Some(task) = task {
            task.wake();
            self.port.engine.kick();
        }
    }

    fn arm(&mut self) -> bool {
        !self.port.state.lock().rx.is_empty()
    }

    fn link_up(&self) -> bool {
        self.port.state.lock().link_up
    }
}

impl<H: Host> Drop for UsbQueue<H> {
    fn drop(&mut self) {
        let mut state = self.port.state.lock();
        state.signal = None;
        state.rx.clear();
        drop(state);
        self.port.open.store(false, Ordering::Release);
    }
}
