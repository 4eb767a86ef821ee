//! Ports, of the root hub and of others: one task for each, which takes in what is plugged in and lets go what is
//! pulled out (USB 2.0, 7.1.7 and 9.1.2; 11.24).

use crate::asking::Asking;
use crate::controller::{Command, HubSpec, Outcome, Place, PortAction, RootPort, Slot, Speed, Translator};
use crate::descriptor::{
    Configuration, DescriptorError, DeviceDescriptor, HubDescriptor, kind, max_packet_0,
};
use crate::device::{Device, Identity};
use crate::engine::{Engine, Failure};
use crate::hub::{Active, Hub, Ports, feature};
use crate::quirks::Quirks;
use crate::request;
use crate::stack::{Busy, Shared};
use crate::tree::{NodeDevice, NodeState};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::task::Poll;
use hypercall::{Host, UsbPath};

/// How often a device is reset and asked again before it is given up.
pub(crate) const ATTEMPTS: u32 = 3;
/// A connection is good once it stands this long (USB 2.0, 7.1.7.3: TATTDB).
const DEBOUNCE_MS: u64 = 100;
/// Longest debouncing of a port that does not come to rest.
const DEBOUNCE_LIMIT_MS: u64 = 1_500;
const DEBOUNCE_STEP_MS: u64 = 25;
/// A reset ends within this time.
const RESET_LIMIT_MS: u64 = 800;
const RESET_STEP_MS: u64 = 10;
/// Rest after a reset (TRSTRCY) and after SET_ADDRESS (9.2.6.3).
const RECOVERY_MS: u64 = 10;
const ADDRESS_MS: u64 = 2;
/// How long a link is woken (TDRSMDN), and how long its device then needs (TRSMRCY; USB 2.0, 7.1.7.7).
const RESUME_MS: u64 = 20;
const RESUME_RECOVERY_MS: u64 = 10;
/// Longest pause before a port that keeps failing is looked at again.
const MOST_BACKOFF_MS: u64 = 30_000;

/// Why a device was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    Unstable,
    NoReset,
    At(&'static str, Failure),
    Descriptor(DescriptorError),
    Changed,
    TooDeep,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unstable => f.write_str("its connection does not come to rest"),
            Self::NoReset => f.write_str("its port does not end a reset"),
            Self::At(what, failure) => write!(f, "{what}: {failure}"),
            Self::Descriptor(error) => error.fmt(f),
            Self::Changed => f.write_str("it came back from a reset as something else"),
            Self::TooDeep => f.write_str("more than five hubs in a row"),
        }
    }
}

fn at(what: &'static str) -> impl Fn(Failure) -> Reason {
    move |failure| Reason::At(what, failure)
}

/// Something that is plugged in and works.
struct Attached<H: Host> {
    device: Arc<Device<H>>,
    hub: Option<Arc<Hub<H>>>,
}

/// One port.
struct Port<H: Host> {
    shared: Arc<Shared<H>>,
    ports: Ports<H>,
    number: u8,
    path: UsbPath,
}

/// Starts a task for each port. `parent` is the place of the hub.
pub(crate) fn start<H: Host>(shared: &Arc<Shared<H>>, ports: &Ports<H>, parent: UsbPath, count: u8) {
    for number in 1..=count {
        let Some(path) = parent.child(number) else { return };
        let active = Active::new(ports.clone());
        let port = Port { shared: shared.clone(), ports: ports.clone(), number, path };
        let busy = Busy::new(shared);
        shared.engine.spawn(async move {
            port.run(busy).await;
            drop(active);
        });
    }
}

impl<H: Host> Port<H> {
    fn engine(&self) -> &Arc<Engine<H>> {
        &self.shared.engine
    }

    /// The life of a port.
    async fn run(&self, busy: Busy<H>) {
        let mut busy = Some(busy);
        let mut attached: Option<Attached<H>> = None;
        let mut given_up = false;
        // Connections in a row that came to nothing.
        let mut failures = 0u32;
        let _ = self.ports.action(self.number, PortAction::PowerOn).await;
        while let Ok(status) = self.ports.status(self.number).await {
            let _ = self.ports.action(self.number, PortAction::ClearChanges).await;
            if let Some(one) = attached.take_if(|_| !status.connected || status.connect_changed) {
                self.detach(one).await;
            }
            if let Some(one) = &attached
                && one.device.is_gone()
            {
                // Given up from above.
                self.give_up(attached.take()).await;
                given_up = true;
            }
            if attached.is_some() && status.suspended {
                self.wake().await;
            }
            if !status.connected || status.connect_changed {
                given_up = false;
                self.shared.forget(self.path);
            }
            if status.connected && attached.is_none() && !given_up {
                let busy_now = busy.take().unwrap_or_else(|| Busy::new(&self.shared));
                match self.attach(busy_now).await {
                    Ok(one) => {
                        attached = Some(one);
                        failures = 0;
                    }
                    Err(reason) => {
                        let now = self.ports.status(self.number).await;
                        if now.is_ok_and(|now| now.connected && !now.connect_changed) {
                            self.refuse(reason).await;
                            given_up = true;
                        }
                        failures += 1;
                        if failures > 1 {
                            let backoff_ms = 100u64 << failures.min(12);
                            self.engine().sleep_ms(backoff_ms.min(MOST_BACKOFF_MS)).await;
                        }
                        continue;
                    }
                }
            }
            busy = None;
            if self.wait(attached.as_ref()).await
                && let Some(one) = &attached
            {
                let result = self.reset(one).await;
                if result.is_err() {
                    self.shared.counters.lost.increment();
                    let one = attached.take();
                    if let Some(one) = one {
                        self.detach(one).await;
                    }
                }
            }
        }
        if let Some(one) = attached {
            self.detach(one).await;
        }
        self.shared.forget(self.path);
    }

    /// Wakes a link that sleeps: its device asked for that, or something put it to sleep that was not us.
    async fn wake(&self) {
        let _ = self.ports.action(self.number, PortAction::Resume).await;
        self.engine().sleep_ms(RESUME_MS).await;
        let _ = self.ports.action(self.number, PortAction::Resumed).await;
        self.engine().sleep_ms(RESUME_RECOVERY_MS).await;
        log::debug!("usb {}: woken", self.path);
    }

    /// Waits for a change (`false`) or until a driver wants its device reset (`true`).
    async fn wait(&self, attached: Option<&Attached<H>>) -> bool {
        core::future::poll_fn(|cx| {
            if self.ports.gone() || self.ports.poll_changed(self.number, cx).is_ready() {
                return Poll::Ready(false);
            }
            if let Some(one) = attached {
                if one.device.poll_reset(cx).is_ready() {
                    return Poll::Ready(true);
                }
                return one.device.poll_gone(cx).map(|()| false);
            }
            Poll::Pending
        })
        .await
    }

    /// Lets go of a device that is gone.
    async fn detach(&self, one: Attached<H>) {
        one.device.mark_gone();
        if let Some(hub) = &one.hub {
            hub.emptied().await;
        }
        let slot = one.device.identity.slot;
        let _ = self.engine().command(Command::Detach { slot }).await;
        self.shared.counters.detached.increment();
        self.shared.forget(self.path);
        log::info!("usb {}: unplugged", self.path);
    }

    /// Lets go of a device that is still there but no good.
    async fn give_up(&self, one: Option<Attached<H>>) {
        let _ = self.ports.action(self.number, PortAction::Disable).await;
        if let Some(one) = one {
            if let Some(hub) = &one.hub {
                hub.emptied().await;
            }
            let slot = one.device.identity.slot;
            let _ = self.engine().command(Command::Detach { slot }).await;
        }
    }

    async fn refuse(&self, reason: Reason) {
        log::error!("usb {}: {reason}; giving the device up, its port is disabled", self.path);
        self.shared.counters.given_up.increment();
        self.shared.set_failed(self.path, alloc::format!("{reason}"));
        let _ = self.ports.action(self.number, PortAction::Disable).await;
    }

    /// Waits for the connection to come to rest.
    async fn debounce(&self) -> Result<(), Reason> {
        let (mut stable_ms, mut total_ms) = (0, 0);
        while stable_ms < DEBOUNCE_MS {
            if total_ms >= DEBOUNCE_LIMIT_MS {
                return Err(Reason::Unstable);
            }
            self.engine().sleep_ms(DEBOUNCE_STEP_MS).await;
            total_ms += DEBOUNCE_STEP_MS;
            stable_ms += DEBOUNCE_STEP_MS;
            let status = self.ports.status(self.number).await.map_err(at("asking the port"))?;
            if !status.connected || status.connect_changed {
                stable_ms = 0;
                let _ = self.ports.action(self.number, PortAction::ClearChanges).await;
            }
        }
        Ok(())
    }

    /// Takes in what is plugged in, in a few tries.
    async fn attach(&self, busy: Busy<H>) -> Result<Attached<H>, Reason> {
        self.shared.set_state(self.path, NodeState::New);
        self.debounce().await?;
        let mut last = Reason::Unstable;
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                self.shared.counters.retries.increment();
                let status = self.ports.status(self.number).await.map_err(at("asking the port"))?;
                if !status.connected || status.connect_changed {
                    return Err(last);
                }
            }
            let slot = match self.address().await {
                Ok(found) => found,
                Err(reason) => {
                    last = reason;
                    continue;
                }
            };
            match self.enumerate(slot).await {
                Ok(identity) => match self.configure(identity, &busy).await {
                    Ok(one) => {
                        self.shared.counters.attached.increment();
                        return Ok(one);
                    }
                    Err(reason) => last = reason,
                },
                Err(reason) => last = reason,
            }
            let _ = self.engine().command(Command::Detach { slot: slot.0 }).await;
            if matches!(last, Reason::TooDeep) {
                break;
            }
        }
        Err(last)
    }

    /// Resets the port until its device can be spoken to.
    async fn reset_port(&self) -> Result<Speed, Reason> {
        let failed = at("resetting the port");
        let before = self.ports.status(self.number).await.map_err(&failed)?;
        let action = if before.needs_warm_reset { PortAction::WarmReset } else { PortAction::Reset };
        self.ports.action(self.number, action).await.map_err(&failed)?;
        let mut waited_ms = 0;
        loop {
            self.engine().sleep_ms(RESET_STEP_MS).await;
            waited_ms += RESET_STEP_MS;
            let status = self.ports.status(self.number).await.map_err(&failed)?;
            if !status.connected {
                return Err(Reason::At("resetting the port", Failure::Gone));
            }
            if status.enabled && !status.resetting {
                self.engine().sleep_ms(RECOVERY_MS).await;
                return status.speed.ok_or(Reason::NoReset);
            }
            if waited_ms >= RESET_LIMIT_MS {
                return Err(Reason::NoReset);
            }
        }
    }

    /// Resets the device and has it given an address. One device of the controller at a time, as all answer to address 0.
    async fn address(&self) -> Result<(Slot, u8, Speed), Reason> {
        let turn = self.shared.turn.take().await;
        let speed = self.reset_port().await?;
        let place = self.place(speed);
        let max_packet = first_max_packet(speed);
        let outcome = self.engine().command(Command::Attach { place, max_packet }).await;
        drop(turn);
        match outcome.map_err(at("giving it an address"))? {
            Outcome::Attached { slot, address } => {
                self.engine().name_slot(slot, self.path, address);
                self.engine().sleep_ms(ADDRESS_MS).await;
                Ok((slot, address, speed))
            }
            Outcome::Done => Err(Reason::At("giving it an address", Failure::Error)),
        }
    }

    fn place(&self, speed: Speed) -> Place {
        let (root, behind) = self.path.ports().split_first().unwrap_or((&1, &[]));
        let nibbles = behind.iter().enumerate().map(|(tier, port)| u32::from(*port.min(&15)) << (4 * tier));
        let translator = match &self.ports {
            Ports::Hub(hub) if speed < Speed::High => match hub.device.identity.speed {
                Speed::High => Some(Translator {
                    hub: hub.device.identity.slot,
                    port: self.number,
                    multiple: hub.multiple_translators,
                }),
                // The translator is further up.
                _ => self.shared.translator(hub.device.identity.slot),
            },
            _ => None,
        };
        Place { root_port: RootPort(*root), route: nibbles.sum(), speed, translator }
    }

    /// Reads who it is.
    async fn enumerate(&self, (slot, address, speed): (Slot, u8, Speed)) -> Result<Identity, Reason> {
        let asking = Asking { engine: self.engine(), slot };
        let first = asking.descriptor(kind::DEVICE, 0, 8).await.map_err(at("reading its descriptor"))?;
        let max_packet = max_packet_0(&first, speed).map_err(Reason::Descriptor)?;
        if max_packet != first_max_packet(speed) {
            let command = Command::SetMaxPacket { slot, max_packet };
            self.engine().command(command).await.map_err(at("setting its packet size"))?;
        }
        let mut raw = asking.descriptor(kind::DEVICE, 0, 18).await.map_err(at("reading its descriptor"))?;
        let descriptor = DeviceDescriptor::parse(&raw, speed).map_err(Reason::Descriptor)?;
        raw.truncate(18);
        let quirks = self.shared.quirks_of(descriptor.vendor, descriptor.product);
        let mut configurations = Vec::new();
        for index in 0..descriptor.configurations {
            let reading = at("reading its configuration");
            let head = asking.descriptor(kind::CONFIGURATION, index, 9).await.map_err(&reading)?;
            let total = Configuration::total_length(&head).map_err(Reason::Descriptor)?;
            let bytes =
                asking.descriptor(kind::CONFIGURATION, index, total as u16).await.map_err(&reading)?;
            let parsed = Configuration::parse(&bytes).map_err(Reason::Descriptor)?;
            raw.extend_from_slice(bytes.get(..total).unwrap_or(&bytes));
            configurations.push(parsed);
        }
        let mut strings = [const { String::new() }; 3];
        if !quirks.contains(Quirks::NO_STRINGS) {
            asking.strings(descriptor.strings, &mut strings).await.map_err(at("reading its strings"))?;
        }
        Ok(Identity {
            path: self.path,
            slot,
            address,
            speed,
            descriptor,
            configurations,
            raw,
            strings,
            quirks,
        })
    }

    /// Chooses a configuration, sets it, and starts the drivers.
    async fn configure(&self, identity: Identity, busy: &Busy<H>) -> Result<Attached<H>, Reason> {
        let chosen = crate::class::choose(&identity);
        let device = Arc::new(Device::new(self.engine().clone(), identity, chosen, None));
        let failed = at("setting its configuration");
        let configuration = device.configuration().ok_or(Reason::Descriptor(DescriptorError::Empty))?;
        let setting = request::set_configuration(configuration.value);
        let hub = self.hub_of(&device).await?;
        let spec = hub.as_ref().map(|(_, spec, _)| *spec);
        let command = Command::Configure {
            slot: device.identity.slot,
            remove: Vec::new(),
            add: device.endpoints(),
            hub: spec,
        };
        self.engine().command(command).await.map_err(&failed)?;
        device.control_out(setting, &[]).await.map_err(&failed)?;
        self.shared.set_device(self.path, NodeDevice::of(&device.identity, chosen));
        self.shared.set_state(self.path, NodeState::Configured);
        let hub = match hub {
            Some((descriptor, spec, endpoint)) => {
                let started = self.start_hub(&device, descriptor, spec, endpoint).await;
                if started.is_err() {
                    self.shared.set_state(self.path, NodeState::New);
                    device.mark_gone();
                }
                Some(started?)
            }
            None => {
                crate::class::start(&self.shared, &device, busy);
                None
            }
        };
        Ok(Attached { device, hub })
    }

    /// If it is a hub: what it says of itself, and its endpoint.
    async fn hub_of(&self, device: &Arc<Device<H>>) -> Result<Option<(HubDescriptor, HubSpec, u8)>, Reason> {
        let [class, _, protocol] = device.identity.descriptor.class;
        if class != 9 {
            return Ok(None);
        }
        if self.path.child(1).is_none() {
            return Err(Reason::TooDeep);
        }
        let super_speed = device.identity.speed >= Speed::Super;
        let failed = at("reading its hub descriptor");
        let bytes = device.control_in(request::get_hub_descriptor(super_speed)).await.map_err(&failed)?;
        let descriptor = HubDescriptor::parse(&bytes).map_err(Reason::Descriptor)?;
        let setting = device.configuration().and_then(|one| one.settings.first());
        let endpoint = setting
            .and_then(|setting| setting.endpoint(crate::controller::EndpointKind::Interrupt, true))
            .ok_or(Reason::Descriptor(DescriptorError::Empty))?;
        let spec = HubSpec {
            ports: descriptor.ports,
            think_time: (descriptor.characteristics >> 5 & 3) as u8,
            // Protocol 2 has one for each port, in its alternate setting 1; setting 0 uses one for all.
            multiple_translators: false,
        };
        let _ = protocol;
        Ok(Some((descriptor, spec, endpoint.address)))
    }

    async fn start_hub(
        &self,
        device: &Arc<Device<H>>,
        descriptor: HubDescriptor,
        spec: HubSpec,
        endpoint: u8,
    ) -> Result<Arc<Hub<H>>, Reason> {
        let failed = at("starting the hub");
        let super_speed = device.identity.speed >= Speed::Super;
        if super_speed {
            let depth = self.path.ports().len() as u16 - 1;
            device.control_out(request::set_hub_depth(depth), &[]).await.map_err(&failed)?;
        }
        for port in 1..=descriptor.ports {
            let setup = request::set_port_feature(port, feature::POWER);
            device.control_out(setup, &[]).await.map_err(&failed)?;
        }
        self.engine().sleep_ms(u64::from(descriptor.power_good_ms)).await;
        let hub = Arc::new(Hub::new(device.clone(), descriptor.ports, spec.multiple_translators));
        if device.identity.speed < Speed::High
            && let Some(translator) = self.place(device.identity.speed).translator
        {
            self.shared.set_translator(device.identity.slot, translator);
        }
        start(&self.shared, &Ports::Hub(hub.clone()), self.path, descriptor.ports);
        let (watched, shared, path) = (hub.clone(), self.shared.clone(), self.path);
        self.shared.set_driver(path, 0, "hub", alloc::format!("{} ports", descriptor.ports));
        let room = usize::from(descriptor.ports) / 8 + 1;
        self.engine().spawn(async move {
            if let Err(failure) = watched.watch(endpoint, room).await {
                log::error!("usb {path}: its reports fail: {failure}; giving the hub up");
                shared.counters.given_up.increment();
                shared.set_failed(path, alloc::format!("its reports fail: {failure}"));
                watched.device.mark_gone();
            }
        });
        Ok(hub)
    }

    /// A driver wants its device reset: brings it back as it was, or says that this is another one.
    async fn reset(&self, one: &Attached<H>) -> Result<(), Failure> {
        let device = &one.device;
        self.shared.counters.resets.increment();
        let result = self.reset_device(device).await;
        if let Err(reason) = &result {
            log::warn!("usb {}: after a reset: {reason}", self.path);
        }
        let result = result.map_err(|_| Failure::Gone);
        device.reset_over(result);
        result
    }

    async fn reset_device(&self, device: &Device<H>) -> Result<(), Reason> {
        let identity = &device.identity;
        let slot = identity.slot;
        {
            let _turn = self.shared.turn.take().await;
            let speed = self.reset_port().await?;
            if speed != identity.speed {
                return Err(Reason::Changed);
            }
            let max_packet = identity.descriptor.max_packet;
            let command = Command::Readdress { slot, max_packet };
            self.engine().command(command).await.map_err(at("giving it an address"))?;
        }
        let _ = self.ports.action(self.number, PortAction::ClearChanges).await;
        self.engine().sleep_ms(ADDRESS_MS).await;
        let asking = Asking { engine: self.engine(), slot };
        let bytes = asking.descriptor(kind::DEVICE, 0, 18).await.map_err(at("reading its descriptor"))?;
        if identity.raw.get(..18) != Some(&bytes[..]) {
            return Err(Reason::Changed);
        }
        let failed = at("setting its configuration");
        let command = Command::Configure { slot, remove: Vec::new(), add: device.endpoints(), hub: None };
        self.engine().command(command).await.map_err(&failed)?;
        let value = device.configuration().map_or(0, |one| one.value);
        device.control_out(request::set_configuration(value), &[]).await.map_err(&failed)?;
        for (interface, alternate) in device.alternates() {
            device.control_out(request::set_interface(interface, alternate), &[]).await.map_err(&failed)?;
        }
        Ok(())
    }
}

/// The packet size of endpoint 0 that every device of a speed can begin with (USB 2.0, 5.5.3).
fn first_max_packet(speed: Speed) -> u16 {
    match speed {
        Speed::Low | Speed::Full => 8,
        Speed::High => 64,
        Speed::Super | Speed::SuperPlus => 512,
    }
}
