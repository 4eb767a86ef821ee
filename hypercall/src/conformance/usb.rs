//! [`crate::HostUsb`].

use super::support::{MS, STUCK_NS, Stop, ensure, not_run, pause, wait_until};
use crate::{
    Error, Host, HostUsb, Signal, UsbCompletion, UsbDeviceId, UsbDeviceInfo, UsbPath, UsbRefused, UsbStatus,
    UsbTransfer, UsbTransferKind,
};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// GET_DESCRIPTOR of the device descriptor, into `len` bytes.
fn get_device(len: u16, tag: u64) -> UsbTransfer {
    let [low, high] = len.to_le_bytes();
    let kind = UsbTransferKind::Control([0x80, 6, 0, 1, 0, 0, low, high]);
    UsbTransfer { kind, endpoint: 0, data: room(&[usize::from(len)]), zero_packet: false, tag }
}

/// Buffers of these lengths.
fn room(lengths: &[usize]) -> Vec<Box<[u8]>> {
    lengths.iter().map(|len| alloc::vec![0; *len].into()).collect()
}

/// A device that is closed when dropped.
struct Open<H: Host + HostUsb> {
    host: H,
    device: UsbDeviceId,
    signal: Arc<Signal>,
}

impl<H: Host + HostUsb> Open<H> {
    fn new(host: H, device: UsbDeviceId) -> Result<Self, Stop> {
        let signal = Arc::new(Signal::new());
        match host.usb_open(device, signal.clone()) {
            Ok(()) => Ok(Self { host, device, signal }),
            Err(error) => Err(Stop::Fail(alloc::format!("usb_open: {error}"))),
        }
    }

    fn submit(&self, transfer: UsbTransfer) -> Result<(), Stop> {
        match self.host.usb_submit(self.device, transfer) {
            Ok(()) => Ok(()),
            Err(UsbRefused { error, .. }) => Err(Stop::Fail(alloc::format!("usb_submit: {error}"))),
        }
    }

    fn reap(&self, limit_ns: u64) -> Option<UsbCompletion> {
        let mut over = None;
        wait_until(self.host, limit_ns, || {
            over = self.host.usb_reap(self.device);
            over.is_some()
        });
        over
    }

    /// Submits and waits for the end, which must be about this transfer.
    fn transfer(&self, transfer: UsbTransfer) -> Result<UsbCompletion, Stop> {
        let (kind, tag, len) = (transfer.kind, transfer.tag, transfer.len());
        self.submit(transfer)?;
        let Some(over) = self.reap(STUCK_NS) else {
            return Err(Stop::Fail(alloc::format!("{kind:?} did not complete within 3 s")));
        };
        let back = &over.transfer;
        let same = back.kind == kind && back.tag == tag && back.len() == len;
        ensure!(same && over.actual <= len, "{kind:?} with tag {tag} came back as {over:?}");
        Ok(over)
    }

    /// An interface of the current configuration with an IN endpoint: its number, the endpoint, and a transfer for it.
    fn silent(&self) -> Result<(u8, UsbTransfer), Stop> {
        let Some(info) = info_of(self.host, self.device) else {
            return Err(Stop::Fail("the device is not listed".into()));
        };
        let bytes = all_descriptors(self.host, self.device)?;
        let (mut current, mut interface) = (false, None);
        for one in walk(&bytes) {
            match one {
                [_, 2, _, _, _, value, ..] => current = *value == info.configuration,
                [_, 4, number, alternate, ..] => interface = (current && *alternate == 0).then_some(*number),
                [_, 5, endpoint, attributes, low, high, ..]
                    if endpoint & 0x80 != 0 && attributes & 2 != 0 =>
                {
                    let Some(interface) = interface else { continue };
                    let kind =
                        if attributes & 1 == 0 { UsbTransferKind::Bulk } else { UsbTransferKind::Interrupt };
                    let len = usize::from(u16::from_le_bytes([*low, *high]) & 0x7ff);
                    let (endpoint, data) = (*endpoint, room(&[len]));
                    let transfer = UsbTransfer { kind, endpoint, data, zero_packet: false, tag: 77 };
                    return Ok((interface, transfer));
                }
                _ => {}
            }
        }
        not_run!("the device has no interface with a bulk or interrupt IN endpoint")
    }

    fn claim(&self, interface: u8) -> Result<(), Stop> {
        let claimed = self.host.usb_claim(self.device, interface);
        ensure!(claimed == Ok(()), "usb_claim of interface {interface}: {claimed:?}");
        Ok(())
    }
}

impl<H: Host + HostUsb> Drop for Open<H> {
    fn drop(&mut self) {
        self.host.usb_close(self.device);
    }
}

fn walk(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = bytes;
    core::iter::from_fn(move || {
        let len = usize::from(*rest.first()?);
        let (one, after) = rest.split_at_checked(len.max(2))?;
        rest = after;
        Some(one)
    })
}

fn info_of<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Option<UsbDeviceInfo> {
    let mut found = None;
    host.usb_devices(&mut |info| {
        if info.id == device {
            found = Some(info);
        }
    });
    found
}

fn all_descriptors<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Result<Vec<u8>, Stop> {
    let mut bytes = alloc::vec![0; 128 << 10];
    match host.usb_descriptors(device, &mut bytes) {
        Ok(len) => {
            ensure!(len <= bytes.len(), "usb_descriptors says {len} bytes, with room for {}", bytes.len());
            bytes.truncate(len);
            Ok(bytes)
        }
        Err(error) => Err(Stop::Fail(alloc::format!("usb_descriptors: {error}"))),
    }
}

pub(super) fn listed<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Result<(), Stop> {
    let mut all: Vec<UsbDeviceInfo> = Vec::new();
    host.usb_devices(&mut |info| all.push(info));
    ensure!(all.iter().any(|info| info.id == device), "{device:?} is not in the list");
    for (index, info) in all.iter().enumerate() {
        let (before, after) = (&all[..index], &all[index..]);
        ensure!(before.iter().all(|other| other.id != info.id), "{:?} is in the list twice", info.id);
        ensure!(before.iter().all(|other| other.path != info.path), "two devices at {}", info.path);
        ensure!((1..=127).contains(&info.address), "{} has address {}", info.path, info.address);
        let parent = info.path.parent();
        let late = after.iter().any(|other| Some(other.path) == parent);
        ensure!(!late, "{} is listed before the hub that it is behind", info.path);
    }
    Ok(())
}

pub(super) fn not_found<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Result<(), Stop> {
    let nobody = UsbDeviceId(u64::MAX);
    let result = host.usb_descriptors(nobody, &mut [0; 64]);
    ensure!(result == Err(Error::NotFound), "usb_descriptors of no device returned {result:?}");
    let result = host.usb_open(nobody, Arc::new(Signal::new()));
    ensure!(result == Err(Error::NotFound), "usb_open of no device returned {result:?}");
    for (device, what) in [(nobody, "no device"), (device, "a device that is not open")] {
        let result = host.usb_submit(device, get_device(18, 1)).map_err(|refused| refused.error);
        ensure!(result == Err(Error::NotFound), "usb_submit to {what} returned {result:?}");
        let result = host.usb_claim(device, 0);
        ensure!(result == Err(Error::NotFound), "usb_claim of {what} returned {result:?}");
        ensure!(host.usb_reap(device).is_none(), "something completed on {what}");
        host.usb_cancel(device, 1);
        host.usb_release(device, 0);
        host.usb_close(device);
    }
    Ok(())
}

pub(super) fn descriptors<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Result<(), Stop> {
    let bytes = all_descriptors(host, device)?;
    let (head, mut rest) = bytes.split_at_checked(18).unwrap_or((&[], &[]));
    ensure!(head.starts_with(&[18, 1]), "they do not begin with a device descriptor of 18 bytes");
    for number in 0..head.get(17).copied().unwrap_or(0) {
        let total = match rest {
            [9, 2, low, high, ..] => usize::from(u16::from_le_bytes([*low, *high])),
            _ => 0,
        };
        ensure!((9..=rest.len()).contains(&total), "configuration {number} is missing or cut");
        rest = rest.get(total..).unwrap_or_default();
    }
    ensure!(rest.is_empty(), "{} bytes after the last configuration", rest.len());
    let mut small = [0x5a; 17];
    let result = host.usb_descriptors(device, &mut small);
    ensure!(result == Err(Error::BufferTooSmall), "usb_descriptors into 17 bytes returned {result:?}");
    ensure!(small == [0x5a; 17], "usb_descriptors copied something before it refused");
    Ok(())
}

pub(super) fn open_once<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Result<(), Stop> {
    let open = Open::new(host, device)?;
    let again = host.usb_open(device, Arc::new(Signal::new()));
    ensure!(again == Err(Error::Busy), "usb_open of an open device returned {again:?} instead of Busy");
    drop(open);
    drop(Open::new(host, device)?);
    Ok(())
}

pub(super) fn control<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Result<(), Stop> {
    let open = Open::new(host, device)?;
    let over = open.transfer(get_device(18, 1))?;
    ensure!(
        (over.status, over.actual) == (UsbStatus::Done, 18),
        "the device descriptor: {:?} after {} bytes",
        over.status,
        over.actual
    );
    let known = all_descriptors(host, device)?;
    ensure!(
        known.get(..18) == Some(&over.transfer.data.concat()[..]),
        "usb_descriptors and the device tell different things"
    );
    Ok(())
}

pub(super) fn scattered<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Result<(), Stop> {
    let open = Open::new(host, device)?;
    let mut asked = get_device(18, 1);
    asked.data = room(&[1, 7, 0, 4, 6]);
    let over = open.transfer(asked)?;
    ensure!(
        (over.status, over.actual) == (UsbStatus::Done, 18),
        "18 bytes into 5 buffers: {:?} after {} bytes",
        over.status,
        over.actual
    );
    let lengths: Vec<usize> = over.transfer.data.iter().map(|buffer| buffer.len()).collect();
    ensure!(lengths == [1, 7, 0, 4, 6], "5 buffers came back with the lengths {lengths:?}");
    let (known, found) = (all_descriptors(host, device)?, over.transfer.data.concat());
    ensure!(
        known.get(..18) == Some(&found[..]),
        "what was received into 5 buffers is not in them one after the other"
    );
    Ok(())
}

pub(super) fn short_in<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Result<(), Stop> {
    let open = Open::new(host, device)?;
    let over = open.transfer(get_device(255, 1))?;
    ensure!(
        (over.status, over.actual) == (UsbStatus::Done, 18),
        "18 bytes into room for 255: {:?} after {} bytes",
        over.status,
        over.actual
    );
    Ok(())
}

pub(super) fn stall<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Result<(), Stop> {
    let open = Open::new(host, device)?;
    let mut unknown = get_device(18, 1);
    unknown.kind = UsbTransferKind::Control([0x80, 6, 0, 0x7f, 0, 0, 18, 0]);
    let over = open.transfer(unknown)?;
    if over.status == UsbStatus::Done && over.actual > 0 {
        not_run!("the device knows a descriptor of type 0x7f");
    }
    ensure!(over.status == UsbStatus::Stall, "a refused request ends as {:?}", over.status);
    let over = open.transfer(get_device(18, 2))?;
    ensure!(over.status == UsbStatus::Done, "the request after a refused one ends as {:?}", over.status);
    Ok(())
}

pub(super) fn once<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Result<(), Stop> {
    let open = Open::new(host, device)?;
    for tag in 10..18 {
        open.submit(get_device(18, tag))?;
    }
    for tag in 10..18 {
        let Some(over) = open.reap(STUCK_NS) else {
            ensure!(false, "of 8 transfers, the one with tag {tag} never came back");
            break;
        };
        let back = over.transfer.tag;
        ensure!(back == tag, "of 8 transfers in a row, {back} came back where {tag} should");
    }
    let more = open.reap(50 * MS);
    ensure!(more.is_none(), "8 transfers, and 9 completions");
    Ok(())
}

pub(super) fn signals<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Result<(), Stop> {
    let open = Open::new(host, device)?;
    for tag in 0..8 {
        let mut seen = open.signal.count();
        open.submit(get_device(18, tag))?;
        let until = host.monotonic_ns() + STUCK_NS;
        loop {
            let raised = open.signal.wait(&host, seen, Some(until));
            ensure!(raised, "a transfer completed and the signal was not raised within 3 s");
            seen = open.signal.count();
            if host.usb_reap(device).is_some() {
                break;
            }
        }
    }
    Ok(())
}

pub(super) fn refuses<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Result<(), Stop> {
    let open = Open::new(host, device)?;
    let mut wrong_length = get_device(18, 1);
    wrong_length.kind = UsbTransferKind::Control([0x80, 6, 0, 1, 0, 0, 17, 0]);
    let mut no_endpoint = get_device(18, 1);
    (no_endpoint.kind, no_endpoint.endpoint) = (UsbTransferKind::Bulk, 0x8f);
    for (transfer, what) in [(wrong_length, "with a wrong wLength"), (no_endpoint, "to no endpoint")] {
        match host.usb_submit(device, transfer.clone()) {
            Ok(()) => ensure!(false, "a transfer {what} was accepted"),
            Err(refused) => {
                ensure!(
                    refused.error == Error::Invalid,
                    "a transfer {what} was refused as {:?} instead of Invalid",
                    refused.error
                );
                ensure!(refused.transfer == transfer, "a refused transfer came back changed");
            }
        }
    }
    ensure!(open.reap(50 * MS).is_none(), "a refused transfer completed");
    Ok(())
}

pub(super) fn claim<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Result<(), Stop> {
    let open = Open::new(host, device)?;
    let (interface, transfer) = open.silent()?;
    let refused = host.usb_submit(device, transfer).map_err(|refused| refused.error);
    ensure!(refused == Err(Error::Invalid), "a transfer of an unclaimed interface: {refused:?}");
    let none = host.usb_claim(device, 0xfe);
    ensure!(none == Err(Error::Invalid), "usb_claim of no interface returned {none:?}");
    open.claim(interface)?;
    host.usb_release(device, interface);
    open.claim(interface)
}

pub(super) fn cancel<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Result<(), Stop> {
    let open = Open::new(host, device)?;
    let (interface, transfer) = open.silent()?;
    open.claim(interface)?;
    let tag = transfer.tag;
    open.submit(transfer.clone())?;
    // First, because the tag of what is over is free.
    if let Some(early) = open.reap(50 * MS) {
        not_run!("the device is not silent: {:?} after {} bytes", early.status, early.actual);
    }
    let refused = host.usb_submit(device, transfer).map_err(|refused| refused.error);
    ensure!(refused == Err(Error::Invalid), "a tag that is in use: {refused:?}");
    host.usb_cancel(device, tag + 1);
    host.usb_cancel(device, tag);
    host.usb_cancel(device, tag);
    let over = open.reap(STUCK_NS).map(|over| (over.transfer.tag, over.status));
    ensure!(over == Some((tag, UsbStatus::Cancelled)), "a cancelled transfer: {over:?}");
    ensure!(open.reap(50 * MS).is_none(), "a cancelled transfer completed twice");
    Ok(())
}

pub(super) fn release_cancels<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Result<(), Stop> {
    let open = Open::new(host, device)?;
    let (interface, transfer) = open.silent()?;
    open.claim(interface)?;
    open.submit(transfer)?;
    pause(host, 10 * MS);
    host.usb_release(device, interface);
    let over = open.reap(STUCK_NS).map(|over| over.status);
    ensure!(over.is_some(), "a transfer of a released interface never came back");
    Ok(())
}

pub(super) fn clear_halt<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Result<(), Stop> {
    let open = Open::new(host, device)?;
    let (interface, transfer) = open.silent()?;
    open.claim(interface)?;
    let result = host.usb_clear_halt(device, transfer.endpoint);
    ensure!(result == Ok(()), "usb_clear_halt: {result:?}");
    let none = host.usb_clear_halt(device, 0x8f);
    ensure!(none == Err(Error::Invalid), "usb_clear_halt of no endpoint returned {none:?}");
    Ok(())
}

pub(super) fn close_drops_signal<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Result<(), Stop> {
    let open = Open::new(host, device)?;
    let signal = open.signal.clone();
    if let Ok((interface, transfer)) = open.silent() {
        open.claim(interface)?;
        open.submit(transfer)?;
    }
    drop(open);
    let dropped = wait_until(host, 500 * MS, || Arc::strong_count(&signal) == 1);
    ensure!(dropped, "the host keeps the signal of a closed device");
    let again = Open::new(host, device)?;
    ensure!(again.reap(50 * MS).is_none(), "a transfer from before the device was closed completed");
    Ok(())
}

pub(super) fn reset<H: Host + HostUsb>(host: H, device: UsbDeviceId) -> Result<(), Stop> {
    let open = Open::new(host, device)?;
    let result = host.usb_reset(device);
    ensure!(result == Ok(()), "usb_reset: {result:?}");
    let over = open.transfer(get_device(18, 3))?;
    ensure!(over.status == UsbStatus::Done, "a request after a reset ends as {:?}", over.status);
    Ok(())
}

pub(super) fn watch<H: Host + HostUsb>(host: H) -> Result<(), Stop> {
    let signal = Arc::new(Signal::new());
    match host.usb_watch(Some(signal.clone())) {
        Ok(()) => {}
        Err(Error::Unsupported) => not_run!("the host does not tell of hot plug"),
        Err(error) => ensure!(false, "usb_watch: {error}"),
    }
    let result = host.usb_watch(None);
    ensure!(result == Ok(()), "usb_watch(None): {result:?}");
    let dropped = wait_until(host, 500 * MS, || Arc::strong_count(&signal) == 1);
    ensure!(dropped, "the host keeps the signal of a watch that ended");
    Ok(())
}

/// Without a device: what the list says must be a tree.
pub(super) fn paths<H: Host + HostUsb>(host: H) -> Result<(), Stop> {
    let mut wrong = None;
    host.usb_devices(&mut |info| {
        let text = alloc::format!("{}", info.path);
        if info.path.bus == 0 || UsbPath::parse(&text) != Some(info.path) {
            wrong = Some(text);
        }
    });
    ensure!(wrong.is_none(), "{wrong:?} is no place: buses and ports are numbered from 1");
    Ok(())
}
