//! A wire: two ends in memory, each with a ring of frames that came from the other.

use super::ring::Ring;
use super::{Doorbell, Listener, random_mac};
use crate::host::Recover;
use hypercall::{Error, LinkInfo, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// What one direction of a wire can hold, in bytes: a few round trips of the largest frames, and still in a cache.
const CAPACITY: usize = 1 << 20;

/// Frames on their way to one receiver.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    state: Mutex<State>,
    receiver: Doorbell,
}

#[derive(Debug, Default)]
struct State {
    ring: Ring,
    open: bool,
    /// Somebody was refused for lack of room and waits.
    refused: bool,
}

/// What became of a frame that was put into an [`Inbox`].
pub(crate) enum Delivery {
    /// It is there, or nobody listens: a wire into nothing takes everything.
    Done,
    /// No room; the inbox says from [`Inbox::take`] when there is.
    Full,
}

impl Inbox {
    pub(crate) fn open(&self, listener: Listener) {
        self.receiver.set(Some(listener));
        let mut state = self.state.lock().recover();
        state.ring.reset(CAPACITY);
        state.open = true;
    }

    /// Whether a sender waits for room.
    pub(crate) fn close(&self) -> bool {
        self.receiver.set(None);
        let mut state = self.state.lock().recover();
        state.ring.reset(0);
        state.open = false;
        std::mem::take(&mut state.refused)
    }

    pub(crate) fn put(&self, frame: &[u8]) -> Delivery {
        let mut state = self.state.lock().recover();
        if !state.open {
            return Delivery::Done;
        }
        let was_empty = state.ring.is_empty();
        if !state.ring.push(frame) {
            state.refused = true;
            return Delivery::Full;
        }
        drop(state);
        // A receiver takes until it finds nothing; only then does it wait, and only then need it be told.
        if was_empty {
            self.receiver.ring();
        }
        Delivery::Done
    }

    /// A frame, and whether senders that were refused should now be told of room.
    pub(crate) fn take(&self, buf: &mut [u8]) -> (Result<usize>, bool) {
        let mut state = self.state.lock().recover();
        let result = state.ring.pop(buf);
        let room = state.refused && state.ring.is_half_free();
        if room {
            state.refused = false;
        }
        (result, room)
    }

    pub(crate) fn notify(&self) {
        self.receiver.ring();
    }
}

/// One end of a wire.
#[derive(Debug)]
pub struct Wire {
    inbox: Arc<Inbox>,
    peer: Arc<Inbox>,
    /// Cleared when one end is dropped.
    whole: Arc<AtomicBool>,
    info: LinkInfo,
}

impl Wire {
    /// Both ends of a new wire. `mtu` in bytes; a large one (65,535) makes bulk transfers cheap.
    pub fn pair(mtu: u16) -> (Wire, Wire) {
        let (a, b) = (Arc::<Inbox>::default(), Arc::<Inbox>::default());
        let whole = Arc::new(AtomicBool::new(true));
        let end = |inbox: &Arc<Inbox>, peer: &Arc<Inbox>| Wire {
            inbox: inbox.clone(),
            peer: peer.clone(),
            whole: whole.clone(),
            info: LinkInfo { mac: random_mac(), mtu },
        };
        (end(&a, &b), end(&b, &a))
    }

    pub(super) fn info(&self) -> LinkInfo {
        self.info
    }

    pub(super) fn open(&self, listener: Listener) {
        self.inbox.open(listener);
    }

    pub(super) fn send(&self, frame: &[u8]) -> Result<()> {
        if !self.whole.load(Ordering::Acquire) {
            return Err(Error::Gone);
        }
        match self.peer.put(frame) {
            Delivery::Done => Ok(()),
            Delivery::Full => Err(Error::WouldBlock),
        }
    }

    pub(super) fn receive(&self, buf: &mut [u8]) -> Result<usize> {
        let (result, room) = self.inbox.take(buf);
        if room {
            self.peer.notify();
        }
        match result {
            Err(Error::WouldBlock) if !self.whole.load(Ordering::Acquire) => Err(Error::Gone),
            result => result,
        }
    }

    pub(super) fn close(&self) {
        if self.inbox.close() {
            self.peer.notify();
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.whole.store(false, Ordering::Release);
        self.close();
        self.peer.notify();
    }
}
