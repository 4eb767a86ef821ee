//! [`crate::HostLink`].

use super::support::{MS, STUCK_NS, Stop, ensure, not_run, wait_until};
use crate::{Error, Host, HostLink, LinkInfo, Signal};
use alloc::sync::Arc;
use alloc::vec::Vec;

/// A link that is closed when dropped.
struct Open<H: Host + HostLink> {
    host: H,
    link: u32,
    info: LinkInfo,
    signal: Arc<Signal>,
}

impl<H: Host + HostLink> Open<H> {
    fn new(host: H, link: u32) -> Result<Self, Stop> {
        let signal = Arc::new(Signal::new());
        match host.link_open(link, signal.clone()) {
            Ok(info) => Ok(Self { host, link, info, signal }),
            Err(error) => Err(Stop::Fail(alloc::format!("link_open({link}): {error}"))),
        }
    }

    /// A frame to `to`, of an Ethernet type for experiments (IEEE 802, 0x88b5), that tells its number and length.
    fn frame(&self, to: &Self, number: u32, len: usize) -> Vec<u8> {
        let mut frame = Vec::new();
        frame.extend(to.info.mac);
        frame.extend(self.info.mac);
        frame.extend([0x88, 0xb5]);
        frame.extend(number.to_be_bytes());
        frame.extend((frame.len()..len).map(|index| (index as u32 ^ number) as u8));
        frame
    }

    fn send(&self, frame: &[u8]) -> Result<(), Stop> {
        let mut result = Ok(());
        wait_until(self.host, STUCK_NS, || {
            result = self.host.link_send(self.link, frame);
            result != Err(Error::WouldBlock)
        });
        ensure!(result.is_ok(), "link_send of {} bytes: {result:?}", frame.len());
        Ok(())
    }

    /// The next frame of ours; whatever else is on the wire is passed over.
    fn receive(&self) -> Result<Option<Vec<u8>>, Stop> {
        let mut buf = alloc::vec![0; usize::from(self.info.mtu) + 14];
        let mut got = None;
        let mut failed = None;
        wait_until(self.host, 500 * MS, || match self.host.link_receive(self.link, &mut buf) {
            Ok(len) => {
                let ours = buf.get(..len).filter(|frame| frame.get(12..14) == Some(&[0x88, 0xb5]));
                got = ours.map(<[u8]>::to_vec);
                got.is_some()
            }
            Err(Error::WouldBlock) => false,
            Err(error) => {
                failed = Some(error);
                true
            }
        });
        ensure!(failed.is_none(), "link_receive: {failed:?}");
        Ok(got)
    }

    fn drain(&self) {
        let mut buf = alloc::vec![0; usize::from(self.info.mtu) + 14];
        for _ in 0..10_000 {
            if self.host.link_receive(self.link, &mut buf) == Err(Error::WouldBlock) {
                break;
            }
        }
    }
}

impl<H: Host + HostLink> Drop for Open<H> {
    fn drop(&mut self) {
        self.host.link_close(self.link);
    }
}

fn both<H: Host + HostLink>(host: H, a: u32, b: Option<u32>) -> Result<(Open<H>, Open<H>), Stop> {
    let Some(b) = b else { not_run!("the host has no second link on the same wire") };
    let (a, b) = (Open::new(host, a)?, Open::new(host, b)?);
    a.drain();
    b.drain();
    Ok((a, b))
}

pub(super) fn not_found<H: Host + HostLink>(host: H) -> Result<(), Stop> {
    for link in [host.link_count(), u32::MAX] {
        let result = host.link_open(link, Arc::new(Signal::new()));
        ensure!(result == Err(Error::NotFound), "link_open({link}), which is none, returned {result:?}");
    }
    Ok(())
}

pub(super) fn info<H: Host + HostLink>(host: H, link: u32) -> Result<(), Stop> {
    let open = Open::new(host, link)?;
    ensure!(open.info.mtu >= 576, "the MTU is {}", open.info.mtu);
    ensure!(
        open.info.mac[0] & 1 == 0 && open.info.mac != [0; 6],
        "the address {:x?} is no station's",
        open.info.mac
    );
    Ok(())
}

pub(super) fn open_once<H: Host + HostLink>(host: H, link: u32) -> Result<(), Stop> {
    let open = Open::new(host, link)?;
    let again = host.link_open(link, Arc::new(Signal::new()));
    ensure!(again == Err(Error::Busy), "link_open of an open link returned {again:?} instead of Busy");
    drop(open);
    drop(Open::new(host, link)?);
    Ok(())
}

pub(super) fn length<H: Host + HostLink>(host: H, link: u32) -> Result<(), Stop> {
    let open = Open::new(host, link)?;
    let longest = usize::from(open.info.mtu) + 14;
    for len in [0, 13, longest + 1, longest + 1000] {
        let result = host.link_send(link, &alloc::vec![0; len]);
        ensure!(
            result == Err(Error::Invalid),
            "link_send of {len} bytes returned {result:?} instead of Invalid"
        );
    }
    let result = host.link_send(link, &open.frame(&open, 0, longest));
    ensure!(result.is_ok(), "link_send of the longest frame, {longest} bytes, returned {result:?}");
    Ok(())
}

pub(super) fn would_block<H: Host + HostLink>(host: H, link: u32) -> Result<(), Stop> {
    let open = Open::new(host, link)?;
    let mut buf = alloc::vec![0; usize::from(open.info.mtu) + 14];
    let mut result = Ok(0);
    // A busy wire may need a few tries until nothing is there.
    wait_until(host, STUCK_NS, || {
        result = host.link_receive(link, &mut buf);
        result.is_err()
    });
    ensure!(result == Err(Error::WouldBlock), "link_receive with nothing there returned {result:?}");
    Ok(())
}

pub(super) fn close_drops_signal<H: Host + HostLink>(host: H, link: u32) -> Result<(), Stop> {
    let open = Open::new(host, link)?;
    let signal = open.signal.clone();
    drop(open);
    let dropped = wait_until(host, 500 * MS, || Arc::strong_count(&signal) == 1);
    ensure!(dropped, "the host keeps the signal of a closed link");
    Ok(())
}

pub(super) fn delivers<H: Host + HostLink>(host: H, a: u32, b: Option<u32>) -> Result<(), Stop> {
    let (a, b) = both(host, a, b)?;
    let longest = usize::from(a.info.mtu.min(b.info.mtu)) + 14;
    for (from, to) in [(&a, &b), (&b, &a)] {
        for (number, len) in [(1, 60), (2, 1000), (3, longest)] {
            let frame = from.frame(to, number, len);
            from.send(&frame)?;
            let got = to.receive()?;
            ensure!(got.is_some(), "a frame of {len} bytes did not arrive within 500 ms");
            ensure!(got.as_ref() == Some(&frame), "a frame of {len} bytes arrived changed");
        }
    }
    Ok(())
}

pub(super) fn signals<H: Host + HostLink>(host: H, a: u32, b: Option<u32>) -> Result<(), Stop> {
    let (a, b) = both(host, a, b)?;
    for number in 0..20 {
        let seen = b.signal.count();
        a.send(&a.frame(&b, number, 100))?;
        let raised = b.signal.wait(&host, seen, Some(host.monotonic_ns() + 800 * MS));
        ensure!(raised, "a frame arrived and the signal was not raised within 800 ms");
        ensure!(b.receive()?.is_some(), "the signal was raised for a frame that does not come");
    }
    Ok(())
}

pub(super) fn order<H: Host + HostLink>(host: H, a: u32, b: Option<u32>) -> Result<(), Stop> {
    let (a, b) = both(host, a, b)?;
    for number in 0..32 {
        a.send(&a.frame(&b, number, 60 + number as usize))?;
    }
    for number in 0..32 {
        let frame = a.frame(&b, number, 60 + number as usize);
        ensure!(
            b.receive()? == Some(frame),
            "of 32 frames sent in a row, number {number} is not in its place"
        );
    }
    Ok(())
}

pub(super) fn buffer_too_small<H: Host + HostLink>(host: H, a: u32, b: Option<u32>) -> Result<(), Stop> {
    let (a, b) = both(host, a, b)?;
    a.send(&a.frame(&b, 1, 1000))?;
    let next = a.frame(&b, 2, 90);
    a.send(&next)?;
    let mut small = [0; 100];
    let mut result = Err(Error::WouldBlock);
    wait_until(host, 500 * MS, || {
        result = host.link_receive(b.link, &mut small);
        // Small frames of others pass through.
        matches!(result, Err(error) if error != Error::WouldBlock)
            || result == Ok(90) && small.get(..90) == Some(&next[..])
    });
    ensure!(
        result == Err(Error::BufferTooSmall),
        "a frame of 1000 bytes into a buffer of 100 returned {result:?} instead of BufferTooSmall"
    );
    ensure!(b.receive()? == Some(next), "the frame after one that did not fit is not the next");
    Ok(())
}

/// Only on a link that can fill up: the others never say `WouldBlock`, which is as good.
pub(super) fn room_comes_back<H: Host + HostLink>(host: H, a: u32, b: Option<u32>) -> Result<(), Stop> {
    let (a, b) = both(host, a, b)?;
    for number in 0..2_000 {
        let seen = a.signal.count();
        match host.link_send(a.link, &a.frame(&b, number, 60)) {
            Ok(()) => {}
            Err(Error::WouldBlock) => {
                b.drain();
                let raised = a.signal.wait(&host, seen, Some(host.monotonic_ns() + 800 * MS));
                ensure!(raised, "room came back on a full link and the sender's signal was not raised");
                return a.send(&a.frame(&b, 0, 60));
            }
            Err(error) => ensure!(false, "link_send: {error}"),
        }
    }
    Ok(())
}
