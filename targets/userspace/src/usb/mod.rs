//! USB devices of this machine, through libusb.
//!
//! [`UsbBus`] is what an instance gets; a thread of its own handles libusb's events. Only `transfer` contains unsafe code.

mod transfer;

use crate::Failure;
use crate::host::{PosixHost, Recover};
use hypercall::{
    Error, HostUsb, Result, Signal, UsbCompletion, UsbDeviceId, UsbDeviceInfo, UsbPath, UsbRefused, UsbSpeed,
    UsbTransfer, UsbTransferKind,
};
use rusb::{Context, Device, DeviceHandle, Hotplug, HotplugBuilder, Registration, UsbContext};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use transfer::Transfers;

/// The event thread looks at least this often whether it is to end.
const EVENTS: Duration = Duration::from_millis(500);

/// An interface with the endpoints of all its settings: address and kind.
struct Interface {
    number: u8,
    endpoints: Vec<(u8, rusb::TransferType)>,
}

type Watcher = Option<(PosixHost, Arc<Signal>)>;

/// All USB devices that libusb shows.
pub struct UsbBus {
    context: Context,
    shared: Arc<Shared>,
    /// Not dropped before the thread has ended.
    registration: Mutex<Option<Registration<Context>>>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    stopping: AtomicBool,
    watcher: Mutex<Watcher>,
    known: Mutex<Known>,
    open: Mutex<HashMap<UsbDeviceId, Arc<Open>>>,
}

#[derive(Default)]
struct Known {
    last_id: u64,
    devices: Vec<(UsbDeviceId, Device<Context>)>,
}

struct Open {
    handle: DeviceHandle<Context>,
    transfers: Arc<Transfers>,
    claimed: Mutex<Vec<Interface>>,
}

impl std::fmt::Debug for UsbBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("UsbBus")
    }
}

/// What libusb says of hot plug, on its event thread.
struct Plugging(Arc<Shared>);

impl Hotplug<Context> for Plugging {
    fn device_arrived(&mut self, _: Device<Context>) {
        self.0.tell();
    }

    fn device_left(&mut self, device: Device<Context>) {
        let known = self.0.known.lock().recover();
        let id = known.devices.iter().find(|one| one.1.as_raw() == device.as_raw()).map(|one| one.0);
        drop(known);
        let open = id.and_then(|id| self.0.open.lock().recover().get(&id).cloned());
        if let Some(open) = open {
            open.transfers.raise();
        }
        self.0.tell();
    }
}

impl Shared {
    fn tell(&self) {
        if let Some((host, signal)) = &*self.watcher.lock().recover() {
            signal.raise(host);
        }
    }
}

impl UsbBus {
    /// Opens libusb. Errors: this machine has no USB, in a line for a person.
    pub fn new() -> std::result::Result<Arc<Self>, Failure> {
        let context = Context::new().map_err(|error| {
            Failure::new(format!(
                "libusb: {error}: this machine shows no USB bus (is /dev/bus/usb there? in a container it is handed \
                 in with --device); or give a unikernel devices of its own with --on rumprun --usb"
            ))
        })?;
        let shared = Arc::new(Shared::default());
        let registration = match rusb::has_hotplug() {
            true => HotplugBuilder::new().register(&context, Box::new(Plugging(shared.clone()))).ok(),
            false => None,
        };
        let (events, state) = (context.clone(), shared.clone());
        let thread = std::thread::Builder::new()
            .name("libusb".into())
            .spawn(move || {
                while !state.stopping.load(Ordering::Acquire) {
                    // What fails shows in the transfers.
                    if events.handle_events(Some(EVENTS)).is_err() {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                }
            })
            .map_err(|error| Failure::new(format!("libusb: {error}")))?;
        let thread = Mutex::new(Some(thread));
        Ok(Arc::new(Self { context, shared, registration: Mutex::new(registration), thread }))
    }

    /// Looks what is there now, and gives new devices their numbers.
    fn refresh(&self) -> Vec<(UsbDeviceId, Device<Context>)> {
        let Ok(list) = self.context.devices() else { return Vec::new() };
        let mut known = self.shared.known.lock().recover();
        let mut devices = Vec::new();
        for device in list.iter() {
            let before = known.devices.iter().find(|one| one.1.as_raw() == device.as_raw()).map(|one| one.0);
            let id = before.unwrap_or_else(|| {
                known.last_id += 1;
                UsbDeviceId(known.last_id)
            });
            devices.push((id, device));
        }
        known.devices.clone_from(&devices);
        devices
    }

    fn device(&self, id: UsbDeviceId) -> Option<Device<Context>> {
        let known = self.shared.known.lock().recover();
        known.devices.iter().find(|one| one.0 == id).map(|one| one.1.clone())
    }

    fn open(&self, id: UsbDeviceId) -> Result<Arc<Open>> {
        self.shared.open.lock().recover().get(&id).cloned().ok_or(Error::NotFound)
    }

    /// The domain is gone: nothing of it is to be told of anything.
    pub(crate) fn retire(&self) {
        *self.shared.watcher.lock().recover() = None;
        let open: Vec<_> = self.shared.open.lock().recover().drain().collect();
        for (_, open) in open {
            open.close();
        }
    }

    fn watch(&self, watcher: Watcher) -> Result<()> {
        if self.registration.lock().recover().is_none() {
            return Err(Error::Unsupported);
        }
        *self.shared.watcher.lock().recover() = watcher;
        Ok(())
    }

    fn list(&self, found: &mut dyn FnMut(UsbDeviceInfo)) {
        let mut all: Vec<UsbDeviceInfo> =
            self.refresh().into_iter().filter_map(|(id, device)| info(id, &device)).collect();
        all.sort_by_key(|info| (info.path.bus, info.path.ports().len(), info.path));
        all.into_iter().for_each(found);
    }

    fn descriptors(&self, id: UsbDeviceId, buf: &mut [u8]) -> Result<usize> {
        let device = self.device(id).ok_or(Error::NotFound)?;
        let bytes = raw_descriptors(&device).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::Gone,
            _ if error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) => Error::Gone,
            _ => Error::Io,
        })?;
        buf.get_mut(..bytes.len()).ok_or(Error::BufferTooSmall)?.copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    fn open_device(&self, id: UsbDeviceId, host: PosixHost, signal: Arc<Signal>) -> Result<()> {
        let device = self.device(id).ok_or(Error::NotFound)?;
        let mut open = self.shared.open.lock().recover();
        if open.contains_key(&id) {
            return Err(Error::Busy);
        }
        let handle = device.open().map_err(error)?;
        // Where it does not exist there are no drivers that could be in the way.
        let _ = handle.set_auto_detach_kernel_driver(true);
        let transfers = Transfers::new(host, signal);
        open.insert(id, Arc::new(Open { handle, transfers, claimed: Mutex::default() }));
        Ok(())
    }

    fn close(&self, id: UsbDeviceId) {
        let open = self.shared.open.lock().recover().remove(&id);
        if let Some(open) = open {
            open.close();
        }
    }
}

impl Drop for UsbBus {
    fn drop(&mut self) {
        self.retire();
        *self.registration.lock().recover() = None;
        self.shared.stopping.store(true, Ordering::Release);
        self.context.interrupt_handle_events();
        if let Some(thread) = self.thread.lock().recover().take() {
            // It holds nothing that a panic could have broken.
            let _ = thread.join();
        }
        self.shared.known.lock().recover().devices.clear();
    }
}

impl Open {
    fn close(&self) {
        self.transfers.close();
        for interface in core::mem::take(&mut *self.claimed.lock().recover()) {
            // A device that is gone has nothing to give back.
            let _ = self.handle.release_interface(interface.number);
        }
    }

    /// The interfaces of the current configuration.
    fn interfaces(&self) -> Result<Vec<Interface>> {
        let configuration = self.handle.device().active_config_descriptor().map_err(error)?;
        Ok(configuration
            .interfaces()
            .map(|interface| {
                let endpoints = interface.descriptors().flat_map(|one| {
                    one.endpoint_descriptors().map(|e| (e.address(), e.transfer_type())).collect::<Vec<_>>()
                });
                Interface { number: interface.number(), endpoints: endpoints.collect() }
            })
            .collect())
    }

    /// What kind of endpoint of a claimed interface that is.
    fn endpoint(&self, address: u8) -> Result<rusb::TransferType> {
        let claimed = self.claimed.lock().recover();
        let mut endpoints = claimed.iter().flat_map(|interface| &interface.endpoints);
        endpoints.find(|one| one.0 == address).map(|one| one.1).ok_or(Error::Invalid)
    }

    fn check(&self, transfer: &UsbTransfer) -> Result<()> {
        let kind = match transfer.kind {
            UsbTransferKind::Control([.., low, high]) => {
                let fits = usize::from(u16::from_le_bytes([low, high])) == transfer.len();
                return if fits && transfer.endpoint == 0 { Ok(()) } else { Err(Error::Invalid) };
            }
            UsbTransferKind::Bulk => rusb::TransferType::Bulk,
            UsbTransferKind::Interrupt => rusb::TransferType::Interrupt,
        };
        match self.endpoint(transfer.endpoint)? == kind {
            true => Ok(()),
            false => Err(Error::Invalid),
        }
    }

    fn claim(&self, interface: u8) -> Result<()> {
        let mut claimed = self.claimed.lock().recover();
        if !claimed.iter().any(|one| one.number == interface) {
            let found = self.interfaces()?.into_iter().find(|one| one.number == interface);
            let found = found.ok_or(Error::Invalid)?;
            self.handle.claim_interface(interface).map_err(error)?;
            claimed.push(found);
        }
        Ok(())
    }

    fn release(&self, interface: u8) {
        let mut claimed = self.claimed.lock().recover();
        let Some(index) = claimed.iter().position(|one| one.number == interface) else { return };
        let Interface { endpoints, .. } = claimed.swap_remove(index);
        drop(claimed);
        let mine = |endpoint: u8| endpoints.iter().any(|one| one.0 == endpoint);
        self.transfers.cancel(|_, endpoint| mine(endpoint));
        self.transfers.wait(|_, endpoint| mine(endpoint));
        // A device that is gone has nothing to give back.
        let _ = self.handle.release_interface(interface);
    }
}

/// What libusb's errors mean.
fn error(error: rusb::Error) -> Error {
    match error {
        rusb::Error::NoDevice => Error::Gone,
        rusb::Error::Access => Error::Denied,
        rusb::Error::Busy => Error::Busy,
        rusb::Error::NotFound | rusb::Error::InvalidParam => Error::Invalid,
        rusb::Error::NoMem => Error::NoMemory,
        _ => Error::Io,
    }
}

fn info(id: UsbDeviceId, device: &Device<Context>) -> Option<UsbDeviceInfo> {
    let mut path = UsbPath::root(device.bus_number());
    for port in device.port_numbers().ok()? {
        path = path.child(port)?;
    }
    let speed = match device.speed() {
        rusb::Speed::Low => UsbSpeed::Low,
        rusb::Speed::Full => UsbSpeed::Full,
        rusb::Speed::Super => UsbSpeed::Super,
        rusb::Speed::SuperPlus => UsbSpeed::SuperPlus,
        _ => UsbSpeed::High,
    };
    let configuration = device.active_config_descriptor().map_or(0, |one| one.number());
    Some(UsbDeviceInfo { id, path, address: device.address(), speed, configuration })
}

/// As the kernel read them: the device descriptor, then each configuration in full. libusb would give them taken apart only.
fn raw_descriptors(device: &Device<Context>) -> std::io::Result<Vec<u8>> {
    let (bus, address) = (device.bus_number(), device.address());
    std::fs::read(format!("/dev/bus/usb/{bus:03}/{address:03}"))
}

impl PosixHost {
    fn usb<R>(&self, f: impl FnOnce(&UsbBus) -> Result<R>) -> Result<R> {
        // Not under the lock of the instance: some calls block.
        f(&*self.usb_bus().ok_or(Error::NotFound)?)
    }

    fn usb_device<R>(&self, device: UsbDeviceId, f: impl FnOnce(&Open) -> Result<R>) -> Result<R> {
        self.usb(|bus| f(&*bus.open(device)?))
    }
}

impl HostUsb for PosixHost {
    fn usb_watch(&self, signal: Option<Arc<Signal>>) -> Result<()> {
        match self.usb_bus() {
            Some(bus) => bus.watch(signal.map(|signal| (*self, signal))),
            None => Err(Error::Unsupported),
        }
    }
    fn usb_devices(&self, found: &mut dyn FnMut(UsbDeviceInfo)) {
        if let Some(bus) = self.usb_bus() {
            bus.list(found);
        }
    }
    fn usb_descriptors(&self, device: UsbDeviceId, buf: &mut [u8]) -> Result<usize> {
        self.usb(|bus| bus.descriptors(device, buf))
    }
    fn usb_open(&self, device: UsbDeviceId, signal: Arc<Signal>) -> Result<()> {
        self.usb(|bus| bus.open_device(device, *self, signal))
    }
    fn usb_close(&self, device: UsbDeviceId) {
        if let Some(bus) = self.usb_bus() {
            bus.close(device);
        }
    }
    fn usb_configure(&self, device: UsbDeviceId, configuration: u8) -> Result<()> {
        self.usb_device(device, |open| {
            if !open.claimed.lock().recover().is_empty() {
                return Err(Error::Busy);
            }
            if open.handle.active_configuration().map_err(error)? == configuration {
                return Ok(());
            }
            match configuration {
                0 => open.handle.unconfigure().map_err(error),
                value => open.handle.set_active_configuration(value).map_err(error),
            }
        })
    }
    fn usb_claim(&self, device: UsbDeviceId, interface: u8) -> Result<()> {
        self.usb_device(device, |open| open.claim(interface))
    }
    fn usb_release(&self, device: UsbDeviceId, interface: u8) {
        // Nothing happens if it is not open.
        let _ = self.usb_device(device, |open| {
            open.release(interface);
            Ok(())
        });
    }
    fn usb_set_alternate(&self, device: UsbDeviceId, interface: u8, alternate: u8) -> Result<()> {
        self.usb_device(device, |open| {
            if !open.claimed.lock().recover().iter().any(|one| one.number == interface) {
                return Err(Error::Invalid);
            }
            open.handle.set_alternate_setting(interface, alternate).map_err(error)
        })
    }
    fn usb_clear_halt(&self, device: UsbDeviceId, endpoint: u8) -> Result<()> {
        self.usb_device(device, |open| {
            open.endpoint(endpoint)?;
            open.handle.clear_halt(endpoint).map_err(error)
        })
    }
    fn usb_reset(&self, device: UsbDeviceId) -> Result<()> {
        self.usb_device(device, |open| {
            open.transfers.cancel(|_, _| true);
            open.transfers.wait(|_, _| true);
            open.handle.reset().map_err(|one| match one {
                // It must be listed anew.
                rusb::Error::NotFound => Error::Gone,
                one => error(one),
            })
        })
    }
    fn usb_submit(&self, device: UsbDeviceId, transfer: UsbTransfer) -> Result<(), UsbRefused> {
        let open = self.usb(|bus| bus.open(device));
        match open.and_then(|open| open.check(&transfer).map(|()| open)) {
            Ok(open) => open.transfers.submit(&open.handle, transfer),
            Err(error) => Err(UsbRefused { transfer, error }),
        }
    }
    fn usb_cancel(&self, device: UsbDeviceId, tag: u64) {
        // Nothing happens if it is not open.
        let _ = self.usb_device(device, |open| {
            open.transfers.cancel(|one, _| one == tag);
            Ok(())
        });
    }
    fn usb_reap(&self, device: UsbDeviceId) -> Option<UsbCompletion> {
        self.usb_device(device, |open| Ok(open.transfers.reap())).ok().flatten()
    }
}
