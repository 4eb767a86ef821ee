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

/// Large transfers go through memory that the kernel shares with us, so that it need not copy: in buffers of this size, so many of
/// them for an open device. Smaller ones it copies as fast.
const SHARED_LEN: usize = 1 << 20;
const SHARED_LEAST: usize = 64 << 10;
const SHARED_MOST: usize = 4;
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
    /// Shared memory that nothing uses now, and how many pieces there are in all.
    idle: Vec<Shared>,
    shared: usize,
}

// libusb 1.0.21; libusb1-sys does not declare them.
unsafe extern "system" {
    fn libusb_dev_mem_alloc(handle: *mut ffi::libusb_device_handle, len: usize) -> *mut u8;
    fn libusb_dev_mem_free(handle: *mut ffi::libusb_device_handle, start: *mut u8, len: usize) -> c_int;
}

/// [`SHARED_LEN`] bytes that the kernel shares with us.
struct Shared {
    start: *mut u8,
    handle: *mut ffi::libusb_device_handle,
}

// SAFETY: the memory is nobody else's, and libusb's functions may be called from any thread. `Transfers::close` drops them all
// before the handle is closed.
unsafe impl Send for Shared {}

impl Shared {
    /// `None` where the kernel has none to share.
    fn new(handle: &DeviceHandle<Context>) -> Option<Self> {
        let handle = handle.as_raw();
        // SAFETY: the handle is open; null is checked.
        let start = unsafe { libusb_dev_mem_alloc(handle, SHARED_LEN) };
        (!start.is_null()).then_some(Self { start, handle })
    }

    /// Copies from its beginning; at most [`SHARED_LEN`] bytes.
    fn read(&self, to: &mut [u8]) {
        assert!(to.len() <= SHARED_LEN);
        // SAFETY: that many bytes are there, mapped as long as we are, and no transfer uses them now.
        unsafe { std::ptr::copy_nonoverlapping(self.start, to.as_mut_ptr(), to.len()) };
    }

    /// Copies to its beginning, likewise.
    fn write(&self, from: &[u8]) {
        assert!(from.len() <= SHARED_LEN);
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.start, from.len()) };
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: it was allocated so, and no transfer uses it any more. It fails only for memory that is none.
        unsafe { libusb_dev_mem_free(self.handle, self.start, SHARED_LEN) };
    }
}

impl State {
    /// Memory for a bulk transfer of `len` bytes, if it is worth it.
    fn share(&mut self, handle: &DeviceHandle<Context>, len: usize) -> Option<Shared> {
        if !(SHARED_LEAST..=SHARED_LEN).contains(&len) {
            return None;
        }
        self.idle.pop().or_else(|| {
            let room = self.shared < SHARED_MOST;
            let fresh = room.then(|| Shared::new(handle)).flatten();
            // Where there is none now, it is not asked for again and again.
            self.shared =
                if fresh.is_some() || !room { self.shared + usize::from(room) } else { SHARED_MOST };
            fresh
        })
    }
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
    /// What stands in for the transfer's own buffer.
    shared: Option<Shared>,
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
        let shared = match transfer.kind {
            UsbTransferKind::Bulk => state.share(handle, transfer.data.len()),
            _ => None,
        };
        let mut flight = Box::new(Flight { owner: self.clone(), transfer, control, shared });
        let bytes: &mut [u8] = match flight.control.is_empty() {
            true => &mut flight.transfer.data,
            false => &mut flight.control,
        };
        let (mut data, len) = (bytes.as_mut_ptr(), bytes.len());
        if let Some(shared) = &flight.shared {
            if endpoint & 0x80 == 0 {
                shared.write(&flight.transfer.data);
            }
            data = shared.start;
        }
        let zero =
            flight.transfer.zero_packet && endpoint & 0x80 == 0 && kind != LIBUSB_TRANSFER_TYPE_CONTROL;
        let flight = Box::into_raw(flight);
        // SAFETY: both were made just now and are nobody else's. The buffers are heap memory that does not move with `Flight`, or
        // shared memory that it owns, and are left alone until the callback.
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
        let mut flight = unsafe {
            ffi::libusb_free_transfer(raw);
            Box::from_raw(flight)
        };
        state.idle.extend(flight.shared.take());
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
        let mut state = self.state.lock().recover();
        state.over.clear();
        // Before the device is closed.
        state.idle.clear();
        drop(state);
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
    let Flight { owner, mut transfer, control, shared } = *flight;
    let actual = usize::try_from(actual).unwrap_or(0).min(transfer.data.len());
    if let (Some(shared), Some(data)) = (&shared, transfer.data.get_mut(..actual))
        && transfer.endpoint & 0x80 != 0
    {
        shared.read(data);
    }
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
    state.idle.extend(shared);
    if !state.closing {
        state.over.push_back(UsbCompletion { transfer, actual, status });
    }
    drop(state);
    owner.ended.notify_all();
    owner.raise();
}
