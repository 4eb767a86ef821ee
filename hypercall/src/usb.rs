//! Private contract: USB devices of a platform that owns the host controller and has enumerated them (libusb on usbfs,
//! a host kernel's USB core).
//!
//! Where nobody owns the controller, a driver of ours does, on [`crate::DeviceHost`]; then this contract is not needed.

use crate::{Result, Signal};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

/// Names a device while it is plugged in. A host never gives a number twice: plugged in again, a device has a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UsbDeviceId(pub u64);

/// How fast a device signals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UsbSpeed {
    /// 1.5 Mbit/s.
    Low,
    /// 12 Mbit/s.
    Full,
    /// 480 Mbit/s.
    High,
    /// 5 Gbit/s.
    Super,
    /// 10 Gbit/s and more.
    SuperPlus,
}

impl UsbSpeed {
    /// As lsusb writes it: `1.5M`, `12M`, `480M`, `5000M`, `10000M`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Low => "1.5M",
            Self::Full => "12M",
            Self::High => "480M",
            Self::Super => "5000M",
            Self::SuperPlus => "10000M",
        }
    }
}

/// Where a device is plugged in: a bus, and the port numbers from its root hub on. Displays as Linux names it: `1-2.3`;
/// the root hub itself is `usb1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UsbPath {
    /// Numbered from 1.
    pub bus: u8,
    ports: [u8; Self::DEPTH],
    depth: u8,
}

impl UsbPath {
    /// Most ports in a path: a root port, and five hubs behind it (USB 2.0, 4.1.1).
    pub const DEPTH: usize = 6;

    /// The root hub of `bus`.
    pub const fn root(bus: u8) -> Self {
        Self { bus, ports: [0; Self::DEPTH], depth: 0 }
    }

    /// The device at `port` of the hub at this path; `None` where a chain of hubs must end.
    pub fn child(mut self, port: u8) -> Option<Self> {
        *self.ports.get_mut(usize::from(self.depth))? = port;
        self.depth += 1;
        Some(self)
    }

    /// The hub that it is plugged in to; `None` for a root hub.
    pub fn parent(mut self) -> Option<Self> {
        self.depth = self.depth.checked_sub(1)?;
        *self.ports.get_mut(usize::from(self.depth))? = 0;
        Some(self)
    }

    /// Port numbers from the root hub on, each from 1 on.
    pub fn ports(&self) -> &[u8] {
        self.ports.get(..usize::from(self.depth)).unwrap_or_default()
    }

    /// Reads what `Display` writes.
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(bus) = text.strip_prefix("usb") {
            return bus.parse().ok().map(Self::root);
        }
        let (bus, ports) = text.split_once('-')?;
        let mut path = Self::root(bus.parse().ok()?);
        for port in ports.split('.') {
            path = path.child(port.parse().ok().filter(|port| *port > 0)?)?;
        }
        Some(path)
    }
}

impl fmt::Display for UsbPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((first, rest)) = self.ports().split_first() else { return write!(f, "usb{}", self.bus) };
        write!(f, "{}-{first}", self.bus)?;
        rest.iter().try_for_each(|port| write!(f, ".{port}"))
    }
}

/// What the platform knows of a device without asking it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UsbDeviceInfo {
    /// Its name in all other calls.
    pub id: UsbDeviceId,
    /// Where it is plugged in.
    pub path: UsbPath,
    /// Its address on the bus, 1 to 127.
    pub address: u8,
    /// How fast it signals.
    pub speed: UsbSpeed,
    /// `bConfigurationValue` of the configuration that it is in; 0: none.
    pub configuration: u8,
}

/// What kind of transfer (USB 2.0, 5.4). The kinds for isochronous data are not in this contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UsbTransferKind {
    /// On endpoint 0, with these eight bytes in its setup stage (USB 2.0, 9.3). `wLength` is the length of `data`, and bit 7
    /// of the first byte its direction.
    Control([u8; 8]),
    /// On a bulk endpoint.
    Bulk,
    /// On an interrupt endpoint.
    Interrupt,
}

/// A transfer: goes in with its buffer and comes back with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsbTransfer {
    /// What kind.
    pub kind: UsbTransferKind,
    /// `bEndpointAddress`: number in bits 0 to 3, bit 7 set for IN. 0 for control transfers.
    pub endpoint: u8,
    /// Scatter list. OUT: what is sent. IN: room for what is received, as long as that may become. All of it is one transfer: a
    /// packet may cross from one buffer to the next. Any alignment, any number.
    pub data: Vec<Box<[u8]>>,
    /// OUT: end with an empty packet if `data` is a multiple of the packet size, so that the device sees an end.
    pub zero_packet: bool,
    /// For the caller; no two in flight on one device are equal.
    pub tag: u64,
}

impl UsbTransfer {
    /// Sum of the buffers' lengths.
    pub fn len(&self) -> usize {
        self.data.iter().map(|buffer| buffer.len()).sum()
    }

    /// Whether it carries no data.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies the buffers to `to`, one behind the other, as far as that goes: for a host whose USB takes one piece only.
    pub fn gather(&self, mut to: &mut [u8]) {
        for buffer in &self.data {
            let (mine, behind) = to.split_at_mut(buffer.len().min(to.len()));
            mine.copy_from_slice(buffer.get(..mine.len()).unwrap_or_default());
            to = behind;
        }
    }

    /// Copies `from` to the buffers, one after the other, as far as they go. What lies behind it stays as it is.
    pub fn scatter(&mut self, mut from: &[u8]) {
        for buffer in &mut self.data {
            let (mine, behind) = from.split_at(buffer.len().min(from.len()));
            if let Some(buffer) = buffer.get_mut(..mine.len()) {
                buffer.copy_from_slice(mine);
            }
            from = behind;
        }
    }
}

/// How a transfer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum UsbStatus {
    /// In full, or with a short packet (no error here).
    Done,
    /// The endpoint answered STALL. Other than endpoint 0 it is halted until that is cleared.
    Stall,
    /// The device sent more than there was room for (babble, overflow).
    Overflow,
    /// No answer, or garbage, after the controller's own three tries (CRC, time-out, protocol).
    Error,
    /// Cancelled, or flushed because another transfer of its endpoint failed. Part of the data may have gone.
    Cancelled,
    /// The device is gone.
    Gone,
}

/// A transfer that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsbCompletion {
    /// As it was submitted, with what was received in `data`.
    pub transfer: UsbTransfer,
    /// Bytes of `data` that were moved, from its first on; at most its length.
    pub actual: usize,
    /// How it ended.
    pub status: UsbStatus,
}

/// A transfer that was not accepted, with its buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsbRefused {
    /// As it was.
    pub transfer: UsbTransfer,
    /// Why: see [`HostUsb::usb_submit`].
    pub error: crate::Error,
}

/// USB devices of the platform. All calls may be made from many threads at once.
///
/// A device must be open for all but the first three calls ([`crate::Error::NotFound`] otherwise). Once it is unplugged
/// every call about it fails with [`crate::Error::Gone`], except that what completed can still be taken, and `usb_close`.
/// Transfers of one endpoint are done in the order of their submission, several may be in flight; those of
/// different endpoints go on side by side.
pub trait HostUsb {
    /// From now on `signal` is raised whenever a device was plugged in or unplugged, or is known anew; `None` ends it and
    /// drops the last one. It may be raised for nothing.
    ///
    /// Errors: [`crate::Error::Unsupported`] (no hot plug here: list again from time to time). Context: thread.
    /// Counterparts: `libusb_hotplug_register_callback`; Linux `usb_register_notify`.
    fn usb_watch(&self, signal: Option<Arc<Signal>>) -> Result<()>;

    /// Lists the devices plugged in, hubs and root hubs included where the platform shows them, a hub before what is
    /// behind it. Context: thread. Counterparts: `libusb_get_device_list`; Linux `usb_for_each_dev`.
    fn usb_devices(&self, found: &mut dyn FnMut(UsbDeviceInfo));

    /// Copies the descriptors that the platform read: the device descriptor (18 bytes), then each configuration in full
    /// (`wTotalLength` bytes). Returns their length. Needs no right to use the device.
    ///
    /// Errors: [`crate::Error::NotFound`], [`crate::Error::BufferTooSmall`] (they never take more than 128 KiB; nothing is copied),
    /// [`crate::Error::Gone`], [`crate::Error::Io`]. Context: thread. Counterparts: read() of a usbdevfs file;
    /// `libusb_get_config_descriptor`; Linux `usb_device.rawdescriptors`.
    fn usb_descriptors(&self, device: UsbDeviceId, buf: &mut [u8]) -> Result<usize>;

    /// Opens a device: `signal` is raised when a transfer of it is over and when it is unplugged. It may be raised for
    /// nothing.
    ///
    /// Errors: [`crate::Error::NotFound`], [`crate::Error::Busy`] (open in this domain), [`crate::Error::Denied`] (the user may
    /// not), [`crate::Error::Gone`]. Context: thread. May block. Counterparts: `libusb_open`; `/dev/bus/usb/BBB/DDD`;
    /// Linux `usb_get_dev`.
    fn usb_open(&self, device: UsbDeviceId, signal: Arc<Signal>) -> Result<()>;

    /// Ends everything: cancels transfers and forgets their completions, releases interfaces (the platform's drivers may
    /// take them again) and drops the signal; when it returns it is raised no more. Nothing happens if it is not open.
    /// Context: thread. Blocks until no transfer is in flight. Counterparts: `libusb_close`; Linux `usb_put_dev`.
    fn usb_close(&self, device: UsbDeviceId);

    /// Puts the device into the configuration with this `bConfigurationValue` (0: none), if it is in another one; no
    /// interface may be claimed, and the platform's drivers lose theirs.
    ///
    /// Errors: [`crate::Error::Invalid`] (no such configuration), [`crate::Error::Busy`], [`crate::Error::Io`],
    /// [`crate::Error::Gone`]. Context: thread. Blocks. Counterparts: `libusb_set_configuration`;
    /// `USBDEVFS_SETCONFIGURATION`; Linux `usb_driver_set_configuration`.
    fn usb_configure(&self, device: UsbDeviceId, configuration: u8) -> Result<()>;

    /// Takes an interface of the current configuration for this domain, away from a driver of the platform if need be.
    ///
    /// Errors: [`crate::Error::Invalid`] (no such interface), [`crate::Error::Busy`] (a driver does not let go),
    /// [`crate::Error::Denied`], [`crate::Error::Gone`]. Context: thread. Blocks. Counterparts: `libusb_claim_interface`
    /// with `libusb_set_auto_detach_kernel_driver`; `USBDEVFS_DISCONNECT_CLAIM`; Linux `usb_driver_claim_interface`.
    fn usb_claim(&self, device: UsbDeviceId, interface: u8) -> Result<()>;

    /// Gives a claimed interface back; its endpoints' transfers are cancelled and complete. Nothing happens if it is not
    /// claimed. Context: thread. Blocks. Counterparts: `libusb_release_interface`; Linux `usb_driver_release_interface`.
    fn usb_release(&self, device: UsbDeviceId, interface: u8);

    /// Chooses an alternate setting of a claimed interface, none of whose endpoints has a transfer in flight.
    ///
    /// Errors: [`crate::Error::Invalid`] (no such setting, not claimed), [`crate::Error::Io`], [`crate::Error::Gone`]. Context: thread. Blocks.
    /// Counterparts: `libusb_set_interface_alt_setting`; `USBDEVFS_SETINTERFACE`; Linux `usb_set_interface`.
    fn usb_set_alternate(&self, device: UsbDeviceId, interface: u8, alternate: u8) -> Result<()>;

    /// Ends the halt of an endpoint of a claimed interface, in the device and in the controller; no transfer may be in
    /// flight there.
    ///
    /// Errors: [`crate::Error::Invalid`] (no such endpoint, not claimed), [`crate::Error::Io`], [`crate::Error::Gone`]. Context: thread.
    /// Blocks. Counterparts: `libusb_clear_halt`; `USBDEVFS_CLEAR_HALT`; Linux `usb_clear_halt`.
    fn usb_clear_halt(&self, device: UsbDeviceId, endpoint: u8) -> Result<()>;

    /// Resets the port of the device and brings it back to configuration and interfaces as they were (alternate settings 0).
    /// Transfers in flight complete as cancelled.
    ///
    /// Errors: [`crate::Error::Gone`] (its descriptors have changed, or it did not come back: it is listed anew),
    /// [`crate::Error::Io`]. Context: thread. Blocks. Counterparts: `libusb_reset_device`; `USBDEVFS_RESET`; Linux
    /// `usb_reset_device`.
    fn usb_reset(&self, device: UsbDeviceId) -> Result<()>;

    /// Starts a transfer. Accepted, it comes back once, by [`HostUsb::usb_reap`], whatever happens (unless the device is
    /// closed before); never inside this call. The host has no time-out: cancel it.
    ///
    /// Errors: [`crate::Error::Invalid`] (no such endpoint or not claimed, wrong kind or direction, `wLength` is not the length of
    /// `data`, tag in use), [`crate::Error::NoMemory`], [`crate::Error::WouldBlock`] (too many in flight: one completes first),
    /// [`crate::Error::NotFound`], [`crate::Error::Gone`], [`crate::Error::Io`]. Context: thread. Never blocks. Counterparts:
    /// `libusb_submit_transfer`; `USBDEVFS_SUBMITURB`; Linux `usb_submit_urb`.
    fn usb_submit(&self, device: UsbDeviceId, transfer: UsbTransfer) -> Result<(), UsbRefused>;

    /// Asks that a transfer end soon. It completes in any case, as [`UsbStatus::Cancelled`] or as it ended before that.
    /// Nothing happens if there is none with this tag. Context: thread. Never blocks. Counterparts:
    /// `libusb_cancel_transfer`; `USBDEVFS_DISCARDURB`; Linux `usb_unlink_urb`.
    fn usb_cancel(&self, device: UsbDeviceId, tag: u64);

    /// Takes a transfer that is over; `None`: no other at the moment. Those of one endpoint come in their order.
    /// Context: thread. Never blocks. Counterparts: `libusb_handle_events_timeout` with no time, and its callbacks;
    /// `USBDEVFS_REAPURBNDELAY`; the completion handler of a Linux URB.
    fn usb_reap(&self, device: UsbDeviceId) -> Option<UsbCompletion>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn a_scatter_list_is_one_row_of_bytes() {
        let data = alloc::vec![Box::from(*b"abc"), Box::default(), Box::from(*b"de")];
        let (kind, zero_packet) = (UsbTransferKind::Bulk, false);
        let mut transfer = UsbTransfer { kind, endpoint: 1, data, zero_packet, tag: 0 };
        assert_eq!(transfer.len(), 5);
        let mut flat = [b'.'; 7];
        transfer.gather(&mut flat);
        assert_eq!(&flat, b"abcde..");
        transfer.gather(&mut flat[..4]);
        transfer.scatter(b"1234");
        transfer.gather(&mut flat);
        assert_eq!(&flat, b"1234e..");
        transfer.scatter(b"567890");
        transfer.gather(&mut flat);
        assert_eq!(&flat, b"56789..");
    }

    #[test]
    fn paths_are_written_and_read() {
        for text in ["usb1", "1-2", "3-1.4.2", "255-255.1.1.1.1.1"] {
            assert_eq!(UsbPath::parse(text).unwrap().to_string(), text);
        }
        for text in ["", "usb", "usb300", "1", "1-", "1-0", "1-2.", "x-1", "1-1.1.1.1.1.1.1", "1-256"] {
            assert_eq!(UsbPath::parse(text), None, "{text}");
        }
        let deep = UsbPath::parse("1-2.3").unwrap();
        assert_eq!(deep.parent(), UsbPath::root(1).child(2));
        assert_eq!(UsbPath::root(1).parent(), None);
    }
}
