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
    /// Threads in [`Transfers::wait`].
    waiting: usize,
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

    /// All of it, while no transfer uses it.
    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: that many bytes are there, zeroed when they were mapped, as long as we are; the kernel writes to them only during
        // a transfer, and then `Memory::start` was asked, not this.
        unsafe { std::slice::from_raw_parts_mut(self.start, SHARED_LEN) }
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

/// The one piece of memory that libusb wants for a transfer.
enum Memory {
    /// The transfer's only buffer itself.
    Own,
    /// Stands in for its buffers; those of a control transfer follow the setup packet.
    Heap(Vec<u8>),
    Shared(Shared),
}

impl Memory {
    /// The bytes that stand in for the buffers of `kind`.
    fn bytes(&mut self, kind: UsbTransferKind) -> Option<&mut [u8]> {
        match self {
            Self::Own => None,
            Self::Heap(bytes) => match kind {
                UsbTransferKind::Control(_) => bytes.get_mut(SETUP..),
                _ => Some(bytes),
            },
            Self::Shared(shared) => Some(shared.bytes()),
        }
    }
}

/// What the callback finds at `user_data`.
struct Flight {
    owner: Arc<Transfers>,
    transfer: UsbTransfer,
    memory: Memory,
}

impl Flight {
    /// Where libusb finds the data, and its length; both stay as they are when the flight is moved.
    fn place(&mut self) -> (*mut u8, usize) {
        match &mut self.memory {
            Memory::Own => match self.transfer.data.first_mut() {
                Some(buffer) => (buffer.as_mut_ptr(), buffer.len()),
                None => (std::ptr::dangling_mut(), 0),
            },
            Memory::Heap(bytes) => (bytes.as_mut_ptr(), bytes.len()),
            Memory::Shared(shared) => (shared.start, self.transfer.len()),
        }
    }
}

/// Whether data goes to the host.
fn receives(transfer: &UsbTransfer) -> bool {
    let direction = match transfer.kind {
        UsbTransferKind::Control([request_type, ..]) => request_type,
        _ => transfer.endpoint,
    };
    direction & 0x80 != 0
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
        let len = transfer.len();
        let shared = match transfer.kind {
            UsbTransferKind::Bulk => state.share(handle, len),
            _ => None,
        };
        let mut memory = match (shared, transfer.kind) {
            (Some(shared), _) => Memory::Shared(shared),
            (None, UsbTransferKind::Control(setup)) => {
                let mut bytes = setup.to_vec();
                bytes.resize(SETUP + len, 0);
                Memory::Heap(bytes)
            }
            (None, _) if transfer.data.len() > 1 => Memory::Heap(vec![0; len]),
            (None, _) => Memory::Own,
        };
        if let Some(bytes) = memory.bytes(transfer.kind)
            && !receives(&transfer)
        {
            transfer.gather(bytes);
        }
        let zero = transfer.zero_packet && !receives(&transfer) && kind != LIBUSB_TRANSFER_TYPE_CONTROL;
        let mut flight = Box::new(Flight { owner: self.clone(), transfer, memory });
        let (data, len) = flight.place();
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
        let Flight { transfer, memory, .. } = unsafe {
            ffi::libusb_free_transfer(raw);
            *Box::from_raw(flight)
        };
        if let Memory::Shared(shared) = memory {
            state.idle.push(shared);
        }
        let error = match code {
            LIBUSB_ERROR_NO_DEVICE => Error::Gone,
            LIBUSB_ERROR_NO_MEM if busy => Error::WouldBlock,
            LIBUSB_ERROR_NO_MEM => Error::NoMemory,
            LIBUSB_ERROR_INVALID_PARAM | LIBUSB_ERROR_NOT_FOUND | LIBUSB_ERROR_NOT_SUPPORTED => {
                Error::Invalid
            }
            _ => Error::Io,
        };
        Err(UsbRefused { transfer, error })
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
        state.waiting += 1;
        while state.flying.iter().any(|(tag, raw)| which(*tag, raw.endpoint)) {
            state = self.ended.wait(state).recover();
        }
        state.waiting -= 1;
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
    let Flight { owner, mut transfer, mut memory } = *flight;
    let actual = usize::try_from(actual).unwrap_or(0).min(transfer.len());
    if let Some(bytes) = memory.bytes(transfer.kind).and_then(|bytes| bytes.get(..actual))
        && receives(&transfer)
    {
        transfer.scatter(bytes);
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
    if let Memory::Shared(shared) = memory {
        state.idle.push(shared);
    }
    if !state.closing {
        state.over.push_back(UsbCompletion { transfer, actual, status });
    }
    let awaited = state.waiting > 0;
    drop(state);
    if awaited {
        owner.ended.notify_all();
    }
    owner.raise();
}
