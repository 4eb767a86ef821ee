//! The platform's list followed: a task for each device on it.

use super::Claim;
use super::worker::{PlatformDevice, Worker};
use crate::asking::Asking;
use crate::controller::{Command, Slot};
use crate::descriptor::{Configuration, DescriptorError, DeviceDescriptor};
use crate::device::{Device, Identity};
use crate::engine::Engine;
use crate::quirks::Quirks;
use crate::stack::{Busy, Shared};
use crate::tree::{NodeDevice, NodeState};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::sync::Mutex;
use core::task::{Poll, Waker};
use hypercall::{Error, Host, HostUsb, UsbDeviceInfo};

/// Longest descriptors of a device.
const MAX_DESCRIPTORS: usize = 128 << 10;

/// Follows the platform's list.
pub(super) async fn watch<H: Host + HostUsb>(
    shared: Arc<Shared<H>>,
    worker: Arc<Worker<H>>,
    claim: Claim,
    first: Busy<H>,
) {
    let mut first = Some(first);
    let mut known: Vec<(UsbDeviceInfo, Arc<Seat<H>>)> = Vec::new();
    loop {
        let list = worker.listed();
        known.retain(|(info, seat)| {
            let there = list.iter().any(|other| other.id == info.id);
            if !there {
                seat.leave();
            }
            there
        });
        for info in list {
            if known.iter().any(|(other, _)| other.id == info.id) {
                continue;
            }
            let seat = Arc::new(Seat::new(&shared));
            known.push((info, seat.clone()));
            let (task_shared, worker, claim) = (shared.clone(), worker.clone(), claim.clone());
            let busy = Busy::new(&shared);
            shared.engine.spawn(async move {
                let path = info.path;
                if let Err(why) = serve(&task_shared, &worker, info, &claim, &seat, busy).await {
                    log::error!("usb {path}: {why}; going on without this device");
                    task_shared.counters.given_up.increment();
                    task_shared.set_failed(path, why);
                    seat.left().await;
                }
                task_shared.forget(path);
            });
        }
        drop(first.take());
        worker.changed().await;
    }
}

/// Whether it is gone, the device once it is open, and who waits.
type Seated<H> = (bool, Option<Arc<Device<H>>>, Option<Waker>);

/// Tells the task of a device that it is gone from the list.
struct Seat<H: Host> {
    state: Mutex<H, Seated<H>>,
}

impl<H: Host> Seat<H> {
    fn new(shared: &Shared<H>) -> Self {
        Self { state: Mutex::new(shared.engine.host, (false, None, None)) }
    }

    fn leave(&self) {
        let mut state = self.state.lock();
        state.0 = true;
        let (device, waker) = (state.1.take(), state.2.take());
        drop(state);
        if let Some(device) = device {
            device.mark_gone();
        }
        waker.into_iter().for_each(Waker::wake);
    }

    async fn left(&self) {
        core::future::poll_fn(|cx| {
            let mut state = self.state.lock();
            if state.0 {
                return Poll::Ready(());
            }
            state.2 = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

/// The life of a device of the platform. `Err`: one line why it cannot be used.
async fn serve<H: Host + HostUsb>(
    shared: &Arc<Shared<H>>,
    worker: &Arc<Worker<H>>,
    info: UsbDeviceInfo,
    claim: &Claim,
    seat: &Seat<H>,
    busy: Busy<H>,
) -> Result<(), String> {
    let engine: &Arc<Engine<H>> = &shared.engine;
    let line = |what: &'static str| move |error: Error| alloc::format!("{what}: {error}");
    shared.set_state(info.path, NodeState::New);
    let raw = worker.call(move |host| {
        let mut raw = alloc::vec![0; MAX_DESCRIPTORS];
        host.usb_descriptors(info.id, &mut raw).map(|len| {
            raw.truncate(len);
            raw
        })
    });
    let raw = raw.await.map_err(line("reading its descriptors"))?;
    let mut identity = identify(&info, raw).map_err(|error| alloc::format!("{error}"))?;
    identity.quirks = shared.quirks_of(identity.descriptor.vendor, identity.descriptor.product);
    let current = identity.configurations.iter().position(|one| one.value == info.configuration);
    let chosen = crate::class::choose(&identity);
    let useful = identity.configurations.get(chosen).is_some_and(crate::class::has_driver);
    let ignored = identity.quirks.contains(Quirks::IGNORE_DEVICE);
    shared.set_device(info.path, NodeDevice::of(&identity, current.unwrap_or(chosen)));
    shared.set_state(info.path, NodeState::Configured);
    if !claim.wants(&identity) || !useful || ignored {
        if shared.ask_names && !ignored {
            ask_names(shared, worker, &info, &mut identity).await;
            shared.set_device(info.path, NodeDevice::of(&identity, current.unwrap_or(chosen)));
        }
        drop(busy);
        seat.left().await;
        return Ok(());
    }
    let signal = engine.signal.clone();
    worker.call(move |host| host.usb_open(info.id, signal)).await.map_err(line("opening it"))?;
    let slot = identity.slot;
    engine.name_slot(slot, info.path, info.address);
    let value = identity.configurations.get(chosen).map_or(0, |one| one.value);
    if current != Some(chosen) {
        let configured = worker.call(move |host| host.usb_configure(info.id, value)).await;
        if let Err(error) = configured {
            drop(worker.call(move |host| host.usb_close(info.id)));
            return Err(line("setting its configuration")(error));
        }
    }
    if !identity.quirks.contains(Quirks::NO_STRINGS) {
        let asking = Asking { engine, slot };
        let indices = identity.descriptor.strings;
        // One that is mute about its name may still work.
        let _ = asking.strings(indices, &mut identity.strings).await;
    }
    shared.set_device(info.path, NodeDevice::of(&identity, chosen));
    let platform = PlatformDevice { worker: worker.clone(), id: info.id };
    let device = Arc::new(Device::new(engine.clone(), identity, chosen, Some(Box::new(platform))));
    let configure = Command::Configure { slot, remove: Vec::new(), add: device.endpoints(), hub: None };
    let _ = engine.command(configure).await;
    {
        let mut state = seat.state.lock();
        if state.0 {
            device.mark_gone();
        }
        state.1 = Some(device.clone());
    }
    shared.counters.attached.increment();
    crate::class::start(shared, &device, &busy);
    drop(busy);
    core::future::poll_fn(|cx| device.poll_gone(cx)).await;
    let _ = engine.command(Command::Detach { slot }).await;
    shared.counters.detached.increment();
    // Given up while it is still plugged in: it stays in the tree with the reason.
    seat.left().await;
    Ok(())
}

/// The names of a device that somebody else drives; empty where that is not allowed.
async fn ask_names<H: Host + HostUsb>(
    shared: &Arc<Shared<H>>,
    worker: &Arc<Worker<H>>,
    info: &UsbDeviceInfo,
    identity: &mut Identity,
) {
    let (engine, slot, id) = (&shared.engine, identity.slot, info.id);
    if identity.quirks.contains(Quirks::NO_STRINGS) || identity.descriptor.strings == [0; 3] {
        return;
    }
    let signal = engine.signal.clone();
    if worker.call(move |host| host.usb_open(id, signal)).await.is_ok() {
        engine.name_slot(slot, info.path, info.address);
        let asking = Asking { engine, slot };
        // One that is mute about its name may still work.
        let _ = asking.strings(identity.descriptor.strings, &mut identity.strings).await;
        let _ = engine.command(Command::Detach { slot }).await;
    }
}

fn identify(info: &UsbDeviceInfo, raw: Vec<u8>) -> Result<Identity, DescriptorError> {
    let descriptor = DeviceDescriptor::parse(&raw, info.speed)?;
    let mut configurations = Vec::new();
    let mut rest = raw.get(18..).unwrap_or_default();
    for _ in 0..descriptor.configurations {
        let total = Configuration::total_length(rest)?;
        let (one, behind) = rest.split_at_checked(total).ok_or(DescriptorError::Short)?;
        configurations.push(Configuration::parse(one)?);
        rest = behind;
    }
    // The host counts devices from 1 on and never comes that far.
    let slot = Slot(u32::try_from(info.id.0).map_err(|_| DescriptorError::TooMany)?);
    Ok(Identity {
        path: info.path,
        slot,
        address: info.address,
        speed: info.speed,
        descriptor,
        configurations,
        raw,
        strings: Default::default(),
        quirks: Quirks::empty(),
    })
}
