//! Asynchronous transfers of libusb, which rusb does not have.
//!
//! A transfer's memory belongs to libusb from its submission until its callback, which runs once for each, on the thread that
//! handles events.
#![expect(unsafe_code, reason = "libusb's own interface")]

use crate::host::{PosixHost, Recover};
use hypercall::{Error, Signal, UsbCompletion, UsbRefused, UsbStatus, UsbTransfer, UsbTransferKind};
use rusb::constants::*;
use rusb::ffi;
use rusb::{Context, DeviceHandle};
use std::collections::{HashMap, VecDeque};
use std::ffi::c_int;
use std::sync::{Arc, Condvar, Mutex};

/// Bytes in front of a control transfer's data.
const SETUP: usize = 8;

/// What is in flight on an open device, and what is over.
pub(super) struct Transfers {
    host: PosixHost,
    signal: Mutex<Option<Arc<Signal>>>,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Default)]
struct State {
    flying: HashMap<u64, Raw>,
    over: VecDeque<UsbCompletion>,
    closing: bool,
}

/// A transfer that libusb has.
#[derive(Clone, Copy)]
struct Raw {
    transfer: *mut ffi::libusb_transfer,
    endpoint: u8,
}

// SAFETY: libusb's functions on transfers may be called from any thread; that it is not freed meanwhile is seen to by the
// lock around the map that holds it.
unsafe impl Send for Raw {}

/// What the callback finds at `user_data`.
struct Flight {
    owner: Arc<Transfers>,
    transfer: UsbTransfer,
    /// Setup packet and data of a control transfer, which libusb wants in one piece.
    control: Vec<u8>,
}

impl Transfers {
    pub(super) fn new(host: PosixHost, signal: Arc<Signal>) -> Arc<Self> {
        let signal = Mutex::new(Some(signal));
        Arc::new(Self { host, signal, state: Mutex::default(), ended: Condvar::new() })
    }

    /// Tells the domain to look.
    pub(super) fn raise(&self) {
        if let Some(signal) = &*self.signal.lock().recover() {
            signal.raise(&self.host);
        }
    }

    pub(super) fn reap(&self) -> Option<UsbCompletion> {
        self.state.lock().recover().over.pop_front()
    }

    /// Starts a transfer, which was checked but for its tag.
    pub(super) fn submit(
        self: &Arc<Self>,
        handle: &DeviceHandle<Context>,
        transfer: UsbTransfer,
    ) -> Result<(), UsbRefused> {
        let mut state = self.state.lock().recover();
        if state.closing {
            return Err(UsbRefused { transfer, error: Error::Gone });
        }
        if state.flying.contains_key(&transfer.tag) {
            return Err(UsbRefused { transfer, error: Error::Invalid });
        }
        let (tag, endpoint, busy) = (transfer.tag, transfer.endpoint, !state.flying.is_empty());
        let control = match transfer.kind {
            UsbTransferKind::Control(setup) => {
                let to_host = setup[0] & 0x80 != 0;
                let mut bytes = Vec::with_capacity(SETUP + transfer.data.len());
                bytes.extend_from_slice(&setup);
                match to_host {
                    true => bytes.resize(SETUP + transfer.data.len(), 0),
                    false => bytes.extend_from_slice(&transfer.data),
                }
                bytes
            }
            _ => Vec::new(),
        };
        let kind = match transfer.kind {
            UsbTransferKind::Control(_) => LIBUSB_TRANSFER_TYPE_CONTROL,
            UsbTransferKind::Bulk => LIBUSB_TRANSFER_TYPE_BULK,
            UsbTransferKind::Interrupt => LIBUSB_TRANSFER_TYPE_INTERRUPT,
        };
        // SAFETY: allocates; null is checked.
        let raw = unsafe { ffi::libusb_alloc_transfer(0) };
        if raw.is_null() {
            return Err(UsbRefused { transfer, error: Error::NoMemory });
        }
        let mut flight = Box::new(Flight { owner: self.clone(), transfer, control });
        let bytes: &mut [u8] = match flight.control.is_empty() {
            true => &mut flight.transfer.data,
            false => &mut flight.control,
        };
        let (data, len) = (bytes.as_mut_ptr(), bytes.len());
        let zero =
            flight.transfer.zero_packet && endpoint & 0x80 == 0 && kind != LIBUSB_TRANSFER_TYPE_CONTROL;
        let flight = Box::into_raw(flight);
        // SAFETY: both were made just now and are nobody else's. The buffers are heap memory that does not move with `Flight`,
        // and is left alone until the callback.
        let code = unsafe {
            (*raw).dev_handle = handle.as_raw();
            (*raw).flags = if zero { LIBUSB_TRANSFER_ADD_ZERO_PACKET } else { 0 };
            (*raw).endpoint = endpoint;
            (*raw).transfer_type = kind;
            (*raw).timeout = 0;
            (*raw).length = c_int::try_from(len).unwrap_or(c_int::MAX);
            (*raw).buffer = data;
            (*raw).callback = completed;
            (*raw).user_data = flight.cast();
            (*raw).num_iso_packets = 0;
            ffi::libusb_submit_transfer(raw)
        };
        if code == 0 {
            // The callback waits for the lock that we hold.
            state.flying.insert(tag, Raw { transfer: raw, endpoint });
            return Ok(());
        }
        // SAFETY: libusb did not take it, so there will be no callback and both are still ours.
        let flight = unsafe {
            ffi::libusb_free_transfer(raw);
            Box::from_raw(flight)
        };
        let error = match code {
            LIBUSB_ERROR_NO_DEVICE => Error::Gone,
            LIBUSB_ERROR_NO_MEM if busy => Error::WouldBlock,
            LIBUSB_ERROR_NO_MEM => Error::NoMemory,
            LIBUSB_ERROR_INVALID_PARAM | LIBUSB_ERROR_NOT_FOUND | LIBUSB_ERROR_NOT_SUPPORTED => {
                Error::Invalid
            }
            _ => Error::Io,
        };
        Err(UsbRefused { transfer: flight.transfer, error })
    }

    /// Asks that those in flight that `which` picks, by tag and endpoint, end soon.
    pub(super) fn cancel(&self, which: impl Fn(u64, u8) -> bool) {
        let state = self.state.lock().recover();
        for (_, raw) in state.flying.iter().filter(|(tag, raw)| which(**tag, raw.endpoint)) {
            // SAFETY: it is in flight: its callback, which frees it, waits for the lock that we hold. One that ends right now is
            // reported as not found, which is fine.
            unsafe { ffi::libusb_cancel_transfer(raw.transfer) };
        }
    }

    /// Waits until none in flight is left that `which` picks. Events must be handled meanwhile.
    pub(super) fn wait(&self, which: impl Fn(u64, u8) -> bool) {
        let mut state = self.state.lock().recover();
        while state.flying.iter().any(|(tag, raw)| which(*tag, raw.endpoint)) {
            state = self.ended.wait(state).recover();
        }
    }

    /// Cancels everything and waits for it; what is over is forgotten, and the signal dropped.
    pub(super) fn close(&self) {
        self.state.lock().recover().closing = true;
        self.cancel(|_, _| true);
        self.wait(|_, _| true);
        self.state.lock().recover().over.clear();
        *self.signal.lock().recover() = None;
    }
}

/// libusb is done with a transfer.
extern "system" fn completed(raw: *mut ffi::libusb_transfer) {
    // SAFETY: libusb calls this once for each accepted transfer, with the pointer that was submitted; `user_data` is the box that
    // was leaked then, and its buffers are ours again.
    let (flight, status, actual) = unsafe {
        let flight = Box::from_raw((*raw).user_data.cast::<Flight>());
        (flight, (*raw).status, (*raw).actual_length)
    };
    let Flight { owner, mut transfer, control } = *flight;
    let actual = usize::try_from(actual).unwrap_or(0).min(transfer.data.len());
    if let (UsbTransferKind::Control([kind, ..]), Some(data)) = (transfer.kind, control.get(SETUP..))
        && kind & 0x80 != 0
    {
        transfer.data.copy_from_slice(data);
    }
    let status = match status {
        LIBUSB_TRANSFER_COMPLETED => UsbStatus::Done,
        LIBUSB_TRANSFER_CANCELLED => UsbStatus::Cancelled,
        LIBUSB_TRANSFER_STALL => UsbStatus::Stall,
        LIBUSB_TRANSFER_NO_DEVICE => UsbStatus::Gone,
        LIBUSB_TRANSFER_OVERFLOW => UsbStatus::Overflow,
        _ => UsbStatus::Error,
    };
    let mut state = owner.state.lock().recover();
    state.flying.remove(&transfer.tag);
    // SAFETY: freed once, and nobody finds it in the map any more.
    unsafe { ffi::libusb_free_transfer(raw) };
    if !state.closing {
        state.over.push_back(UsbCompletion { transfer, actual, status });
    }
    drop(state);
    owner.ended.notify_all();
    owner.raise();
}
