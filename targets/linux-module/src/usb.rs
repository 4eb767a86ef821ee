//! USB devices of Linux ([`HostUsb`]), on the C half's `usb.c`.
//!
//! A transfer is a leaked box while Linux has it: its pointer is the cookie that comes back once, from `ak_usb_reap`.
#![expect(unsafe_code, reason = "calls into C")]

use crate::LinuxHost;
use crate::ffi;
use crate::host::{check, drop_signal, length};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ffi::c_void;
use core::ptr;
use hypercall::{
    Error, HostUsb, Result, Signal, UsbCompletion, UsbDeviceId, UsbDeviceInfo, UsbPath, UsbRefused, UsbSpeed,
    UsbStatus, UsbTransfer, UsbTransferKind,
};

/// `None` for a place that the contract has no name for.
fn info(one: &ffi::UsbInfo) -> Option<UsbDeviceInfo> {
    let mut path = UsbPath::root(one.bus);
    for port in one.ports.get(..usize::from(one.depth))? {
        path = path.child(*port)?;
    }
    // enum usb_device_speed (linux/usb/ch9.h); 4 is wireless.
    let speed = match one.speed {
        1 => UsbSpeed::Low,
        2 => UsbSpeed::Full,
        5 => UsbSpeed::Super,
        6 => UsbSpeed::SuperPlus,
        _ => UsbSpeed::High,
    };
    let (id, address, configuration) = (UsbDeviceId(one.id), one.address, one.configuration);
    Some(UsbDeviceInfo { id, path, address, speed, configuration })
}

fn status(status: u32) -> UsbStatus {
    match status {
        ffi::USB_DONE => UsbStatus::Done,
        ffi::USB_STALL => UsbStatus::Stall,
        ffi::USB_OVERFLOW => UsbStatus::Overflow,
        ffi::USB_CANCELLED => UsbStatus::Cancelled,
        ffi::USB_GONE => UsbStatus::Gone,
        _ => UsbStatus::Error,
    }
}

/// Everything that is plugged in. More than `room` at once is asked for again.
fn list() -> Vec<ffi::UsbInfo> {
    let mut all = Vec::new();
    let mut room = 32;
    loop {
        all.resize(room, ffi::UsbInfo::default());
        // SAFETY: there is room for as many entries as said.
        let count = unsafe { ffi::ak_usb_list(all.as_mut_ptr(), room) };
        if count <= room {
            all.truncate(count);
            return all;
        }
        room = count;
    }
}

/// What a cookie points to.
struct Flight {
    transfer: UsbTransfer,
    /// Where its buffers are.
    parts: Vec<ffi::UsbPart>,
}

/// The transfer that `ak_usb_reap` has just given back.
///
/// # Safety
/// `cookie` is what `usb_submit` leaked, and is given back once.
unsafe fn taken_back(cookie: *mut Flight) -> UsbTransfer {
    // SAFETY: by the caller's promise.
    unsafe { Box::from_raw(cookie) }.transfer
}

impl HostUsb for LinuxHost {
    fn usb_watch(&self, signal: Option<Arc<Signal>>) -> Result<()> {
        check(ffi::ak_usb_start())?;
        let signal = signal.map_or(ptr::null(), |signal| Arc::into_raw(signal).cast());
        // SAFETY: it is a leaked reference, or null, and dropped only when it is given back.
        drop_signal(unsafe { ffi::ak_usb_watch(signal) });
        Ok(())
    }

    fn usb_devices(&self, found: &mut dyn FnMut(UsbDeviceInfo)) {
        if ffi::ak_usb_start() != 0 {
            return;
        }
        let mut all: Vec<UsbDeviceInfo> = list().iter().filter_map(info).collect();
        all.sort_by_key(|info| (info.path.bus, info.path.ports().len(), info.path));
        all.into_iter().for_each(found);
    }

    fn usb_descriptors(&self, device: UsbDeviceId, buf: &mut [u8]) -> Result<usize> {
        // SAFETY: the buffer is as long as said.
        length(unsafe { ffi::ak_usb_descriptors(device.0, buf.as_mut_ptr(), buf.len()) })
    }

    fn usb_open(&self, device: UsbDeviceId, signal: Arc<Signal>) -> Result<()> {
        let signal: *const c_void = Arc::into_raw(signal).cast();
        // SAFETY: the signal is a leaked reference that stays valid until `ak_usb_close`.
        let opened = check(unsafe { ffi::ak_usb_open(device.0, signal) });
        if opened.is_err() {
            drop_signal(signal);
        }
        opened
    }

    fn usb_close(&self, device: UsbDeviceId) {
        if ffi::ak_usb_shut(device.0) == 0 {
            while self.usb_reap(device).is_some() {}
            drop_signal(ffi::ak_usb_close(device.0));
        }
    }

    fn usb_configure(&self, device: UsbDeviceId, configuration: u8) -> Result<()> {
        check(ffi::ak_usb_configure(device.0, configuration.into()))
    }

    fn usb_claim(&self, device: UsbDeviceId, interface: u8) -> Result<()> {
        check(ffi::ak_usb_claim(device.0, interface.into()))
    }

    fn usb_release(&self, device: UsbDeviceId, interface: u8) {
        ffi::ak_usb_release(device.0, interface.into());
    }

    fn usb_set_alternate(&self, device: UsbDeviceId, interface: u8, alternate: u8) -> Result<()> {
        check(ffi::ak_usb_set_alternate(device.0, interface.into(), alternate.into()))
    }

    fn usb_clear_halt(&self, device: UsbDeviceId, endpoint: u8) -> Result<()> {
        check(ffi::ak_usb_clear_halt(device.0, endpoint.into()))
    }

    fn usb_reset(&self, device: UsbDeviceId) -> Result<()> {
        check(ffi::ak_usb_reset(device.0))
    }

    fn usb_submit(&self, device: UsbDeviceId, transfer: UsbTransfer) -> Result<(), UsbRefused> {
        let (kind, setup) = match transfer.kind {
            UsbTransferKind::Control(setup) => (ffi::USB_CONTROL, setup),
            UsbTransferKind::Bulk => (ffi::USB_BULK, [0; 8]),
            UsbTransferKind::Interrupt => (ffi::USB_INTERRUPT, [0; 8]),
        };
        let (tag, endpoint, zero_packet) = (transfer.tag, transfer.endpoint, transfer.zero_packet.into());
        let mut parts = Vec::new();
        if parts.try_reserve_exact(transfer.data.len()).is_err() {
            return Err(UsbRefused { transfer, error: Error::NoMemory });
        }
        let mut flight = Box::new(Flight { transfer, parts });
        let Flight { transfer, parts } = &mut *flight;
        let of = |buffer: &mut Box<[u8]>| ffi::UsbPart { data: buffer.as_mut_ptr(), len: buffer.len() };
        parts.extend(transfer.data.iter_mut().map(of));
        let (len, count) = (transfer.len(), u32::try_from(parts.len()).unwrap_or(u32::MAX));
        let parts = parts.as_ptr();
        let flight = Box::into_raw(flight);
        let cookie = flight.cast();
        let reserved = [0; 1];
        let asked =
            ffi::UsbTransfer { tag, parts, len, cookie, setup, count, kind, endpoint, zero_packet, reserved };
        // SAFETY: the parts are heap memory and name heap memory of these lengths, which nobody touches until the cookie comes back.
        check(unsafe { ffi::ak_usb_submit(device.0, &raw const asked) }).map_err(|error| {
            // SAFETY: it was not accepted, so the cookie does not come back otherwise.
            UsbRefused { transfer: unsafe { taken_back(flight) }, error }
        })
    }

    fn usb_cancel(&self, device: UsbDeviceId, tag: u64) {
        ffi::ak_usb_cancel(device.0, tag);
    }

    fn usb_reap(&self, device: UsbDeviceId) -> Option<UsbCompletion> {
        let mut over = ffi::UsbOver::default();
        // SAFETY: `over` is ours to write.
        let cookie = unsafe { ffi::ak_usb_reap(device.0, &raw mut over) };
        if cookie.is_null() {
            return None;
        }
        // SAFETY: C gives each cookie back once.
        let transfer = unsafe { taken_back(cookie.cast()) };
        let actual = usize::try_from(over.actual).unwrap_or(0).min(transfer.len());
        Some(UsbCompletion { transfer, actual, status: status(over.status) })
    }
}
