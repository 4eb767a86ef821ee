//! Links joined by wires.

use super::TestHost;
use crate::*;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use std::sync::Mutex;

/// Frames that one direction of a wire holds.
const CAPACITY: usize = 256;

type SharedWire = Arc<Mutex<Wire>>;

/// One direction.
#[derive(Default)]
struct Wire {
    frames: VecDeque<Vec<u8>>,
    /// Whose frames arrive here.
    receiver: Option<(TestHost, Arc<Signal>)>,
    /// Who waits for room.
    sender: Option<(TestHost, Arc<Signal>)>,
    /// Every so many frames one is lost; 0: none.
    lose_one_in: u32,
    sent: u64,
}

pub(super) struct End {
    info: LinkInfo,
    open: bool,
    out: SharedWire,
    inward: SharedWire,
}

impl TestHost {
    /// Joins two new links of this host and returns their numbers.
    pub fn add_link_pair(&self) -> (u32, u32) {
        self.add_link_to(self)
    }

    /// Joins a new link of this host to a new link of `other`; returns both numbers.
    pub fn add_link_to(&self, other: &TestHost) -> (u32, u32) {
        let (there, back) = (SharedWire::default(), SharedWire::default());
        let here = self.add_end(1, there.clone(), back.clone());
        (here, other.add_end(2, back, there))
    }

    fn add_end(&self, side: u8, out: SharedWire, inward: SharedWire) -> u32 {
        let mut links = self.0.links.lock().unwrap();
        let number = links.len() as u32;
        let info = LinkInfo { mac: [2, 0, 0, 0, number as u8, side], mtu: 1500 };
        links.push(End { info, open: false, out, inward });
        number
    }

    /// From now on every `one_in`th frame sent on `link` is lost; 0: none.
    pub fn lose_frames(&self, link: u32, one_in: u32) {
        self.0.links.lock().unwrap()[link as usize].out.lock().unwrap().lose_one_in = one_in;
    }

    /// The wires of an open link: out and in.
    fn wires(&self, link: u32) -> Result<(SharedWire, SharedWire, LinkInfo)> {
        let links = self.0.links.lock().unwrap();
        let end = links.get(link as usize).ok_or(Error::NotFound)?;
        if !end.open {
            return Err(Error::NotFound);
        }
        Ok((end.out.clone(), end.inward.clone(), end.info))
    }
}

fn raise(whom: Option<(TestHost, Arc<Signal>)>) {
    if let Some((host, signal)) = whom {
        signal.raise(&host);
    }
}

impl HostLink for TestHost {
    fn link_count(&self) -> u32 {
        self.0.links.lock().unwrap().len() as u32
    }

    fn link_open(&self, link: u32, signal: Arc<Signal>) -> Result<LinkInfo> {
        let mut links = self.0.links.lock().unwrap();
        let end = links.get_mut(link as usize).ok_or(Error::NotFound)?;
        if end.open {
            return Err(Error::Busy);
        }
        end.open = true;
        end.out.lock().unwrap().sender = Some((*self, signal.clone()));
        let mut inward = end.inward.lock().unwrap();
        inward.frames.clear();
        inward.receiver = Some((*self, signal));
        Ok(end.info)
    }

    fn link_send(&self, link: u32, frame: &[u8]) -> Result<()> {
        let (out, _, info) = self.wires(link)?;
        if frame.len() < 14 || frame.len() > usize::from(info.mtu) + 14 {
            return Err(Error::Invalid);
        }
        let receiver = {
            let mut out = out.lock().unwrap();
            if out.frames.len() >= CAPACITY {
                return Err(Error::WouldBlock);
            }
            out.sent += 1;
            let lost = out.lose_one_in > 0 && out.sent.is_multiple_of(u64::from(out.lose_one_in));
            // Nobody at the other end: the frame goes nowhere, as on a real wire.
            if lost || out.receiver.is_none() {
                return Ok(());
            }
            out.frames.push_back(frame.to_vec());
            out.receiver.clone()
        };
        raise(receiver);
        Ok(())
    }

    fn link_receive(&self, link: u32, buf: &mut [u8]) -> Result<usize> {
        let (_, inward, _) = self.wires(link)?;
        let (frame, waiting) = {
            let mut inward = inward.lock().unwrap();
            let was_full = inward.frames.len() >= CAPACITY;
            let frame = inward.frames.pop_front().ok_or(Error::WouldBlock)?;
            (frame, if was_full { inward.sender.clone() } else { None })
        };
        raise(waiting);
        buf.get_mut(..frame.len()).ok_or(Error::BufferTooSmall)?.copy_from_slice(&frame);
        Ok(frame.len())
    }

    fn link_close(&self, link: u32) {
        let mut links = self.0.links.lock().unwrap();
        let Some(end) = links.get_mut(link as usize) else { return };
        end.open = false;
        end.out.lock().unwrap().sender = None;
        let mut inward = end.inward.lock().unwrap();
        inward.receiver = None;
        inward.frames.clear();
    }
}
