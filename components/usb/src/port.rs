//! Ports, of the root hub and of others: one task for each, which takes in what is plugged in and lets go what is
//! pulled out (USB 2.0, 7.1.7 and 9.1.2; 11.24).

use crate::controller::{
    Command, HubSpec, Outcome, Place, PortAction, PortStatus, RootPort, Slot, Speed, Translator,
};
use crate::descriptor::{
    Configuration, DescriptorError, DeviceDescriptor, HubDescriptor, kind, max_packet_0, text,
};
use crate::device::{Device, Identity};
use crate::engine::{Engine, Failure};
use crate::quirks::Quirks;
use crate::request;
use crate::stack::{Busy, Shared};
use crate::tree::{NodeDevice, NodeState};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::sync::Mutex;
use core::fmt;
use core::task::{Context, Poll, Waker};
use hypercall::{Host, UsbPath};

/// How often a device is reset and asked again before it is given up.
pub(crate) const ATTEMPTS: u32 = 3;
/// How often one descriptor is asked for.
const TRIES: u32 = 2;
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
/// Least time between two reports of a hub.
const HUB_REST_MS: u64 = 5;
/// Reports of a hub that may fail in a row.
const HUB_FAILURES: u32 = 3;
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

/// What the ports of a hub share.
pub(crate) struct Hub<H: Host> {
    device: Arc<Device<H>>,
    ports: Mutex<H, HubState>,
    super_speed: bool,
    multiple_translators: bool,
}

#[derive(Default)]
struct HubState {
    watches: Vec<(bool, Option<Waker>)>,
    /// Tasks of ports that have not ended.
    active: usize,
    detaching: Option<Waker>,
}

/// Ports of one hub.
pub(crate) enum Ports<H: Host> {
    Root(Arc<Engine<H>>),
    Hub(Arc<Hub<H>>),
}

impl<H: Host> Clone for Ports<H> {
    fn clone(&self) -> Self {
        match self {
            Self::Root(engine) => Self::Root(engine.clone()),
            Self::Hub(hub) => Self::Hub(hub.clone()),
        }
    }
}

mod feature {
    pub(super) const ENABLE: u16 = 1;
    pub(super) const SUSPEND: u16 = 2;
    pub(super) const RESET: u16 = 4;
    pub(super) const LINK_STATE: u16 = 5;
    pub(super) const POWER: u16 = 8;
    pub(super) const C_CONNECTION: u16 = 16;
    pub(super) const C_ENABLE: u16 = 17;
    pub(super) const C_SUSPEND: u16 = 18;
    pub(super) const C_OVER_CURRENT: u16 = 19;
    pub(super) const C_RESET: u16 = 20;
    pub(super) const C_LINK_STATE: u16 = 25;
    pub(super) const C_CONFIG_ERROR: u16 = 26;
    pub(super) const WARM_RESET: u16 = 28;
    pub(super) const C_WARM_RESET: u16 = 29;
}

/// Makes sense of the four bytes of GET_STATUS (USB 2.0, 11.24.2.7; USB 3.2, 10.16.2.6).
pub fn hub_port_status(bytes: [u8; 4], super_speed: bool) -> PortStatus {
    let [s0, s1, c0, c1] = bytes;
    let (status, change) = (u16::from_le_bytes([s0, s1]), u16::from_le_bytes([c0, c1]));
    let has = |word: u16, bit: u32| word & (1 << bit) != 0;
    let (powered, speed, needs_warm_reset) = if super_speed {
        // Link states 6 and 10: Inactive, Compliance Mode.
        let link = status >> 5 & 15;
        (has(status, 9), Speed::Super, matches!(link, 6 | 10))
    } else {
        let speed = match (has(status, 9), has(status, 10)) {
            (true, _) => Speed::Low,
            (_, true) => Speed::High,
            _ => Speed::Full,
        };
        (has(status, 8), speed, false)
    };
    let enabled = has(status, 1);
    // Link state 3: U3. USB 2 has a bit for it.
    let suspended = if super_speed { status >> 5 & 15 == 3 } else { has(status, 2) };
    PortStatus {
        suspended,
        connected: has(status, 0),
        enabled,
        resetting: has(status, 4),
        powered,
        over_current: has(status, 3),
        super_speed,
        needs_warm_reset,
        speed: (enabled || super_speed).then_some(speed),
        connect_changed: has(change, 0),
        reset_changed: has(change, 4) || super_speed && has(change, 5),
    }
}

impl<H: Host> Ports<H> {
    async fn status(&self, port: u8) -> Result<PortStatus, Failure> {
        match self {
            Self::Root(engine) if engine.dead() => Err(Failure::Gone),
            Self::Root(engine) => Ok(engine.with_controller(|one| one.port_status(RootPort(port)))),
            Self::Hub(hub) => {
                let answer = hub.device.control_in(request::get_port_status(port)).await?;
                let bytes = answer.first_chunk().ok_or(Failure::Error)?;
                Ok(hub_port_status(*bytes, hub.super_speed))
            }
        }
    }

    async fn action(&self, port: u8, action: PortAction) -> Result<(), Failure> {
        let hub = match self {
            Self::Root(engine) => {
                engine.with_controller(|one| one.port_action(RootPort(port), action));
                return Ok(());
            }
            Self::Hub(hub) => hub,
        };
        let set = |feature| request::set_port_feature(port, feature);
        let clear = |feature| request::clear_port_feature(port, feature);
        let setup = match action {
            PortAction::PowerOn => set(feature::POWER),
            PortAction::WarmReset if hub.super_speed => set(feature::WARM_RESET),
            PortAction::Reset | PortAction::WarmReset => set(feature::RESET),
            // A port of a USB 3 hub is not disabled by a feature; its device is let go and left alone.
            PortAction::Disable if hub.super_speed => return Ok(()),
            // Link state U0; the hub does the rest by itself.
            PortAction::Resume if hub.super_speed => set(feature::LINK_STATE),
            PortAction::Resume => clear(feature::SUSPEND),
            PortAction::Resumed => return Ok(()),
            PortAction::Disable => clear(feature::ENABLE),
            PortAction::ClearChanges => return hub.clear_changes(port).await,
        };
        hub.device.control_out(setup, &[]).await
    }

    fn poll_changed(&self, port: u8, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Root(engine) => engine.poll_port(port, cx),
            Self::Hub(hub) => {
                if hub.device.poll_gone(cx).is_ready() {
                    return Poll::Ready(());
                }
                let mut ports = hub.ports.lock();
                let Some(watch) = ports.watches.get_mut(usize::from(port)) else { return Poll::Pending };
                if core::mem::take(&mut watch.0) {
                    return Poll::Ready(());
                }
                watch.1 = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    fn gone(&self) -> bool {
        match self {
            Self::Root(engine) => engine.dead(),
            Self::Hub(hub) => hub.device.is_gone(),
        }
    }
}

impl<H: Host> Hub<H> {
    async fn clear_changes(&self, port: u8) -> Result<(), Failure> {
        let answer = self.device.control_in(request::get_port_status(port)).await?;
        let &[_, _, c0, c1] = answer.first_chunk().ok_or(Failure::Error)?;
        let change = u16::from_le_bytes([c0, c1]);
        let known: &[(u32, u16)] = if self.super_speed {
            &[
                (0, feature::C_CONNECTION),
                (3, feature::C_OVER_CURRENT),
                (4, feature::C_RESET),
                (5, feature::C_WARM_RESET),
                (6, feature::C_LINK_STATE),
                (7, feature::C_CONFIG_ERROR),
            ]
        } else {
            &[
                (0, feature::C_CONNECTION),
                (1, feature::C_ENABLE),
                (2, feature::C_SUSPEND),
                (3, feature::C_OVER_CURRENT),
                (4, feature::C_RESET),
            ]
        };
        for (_, feature) in known.iter().filter(|(bit, _)| change & (1 << bit) != 0) {
            self.device.control_out(request::clear_port_feature(port, *feature), &[]).await?;
        }
        Ok(())
    }

    /// Takes the hub's reports and wakes the ports that they name, until the hub is gone.
    async fn watch(&self, endpoint: u8, room: usize) -> Result<(), Failure> {
        let mut failures = 0;
        loop {
            let data = crate::device::zeroed(room)?;
            let over = self.device.end_of(self.device.pipe(endpoint, data, 0)).await;
            match over.result {
                Ok(()) => {
                    failures = 0;
                    let report =
                        over.data.first().and_then(|data| data.get(..over.actual)).unwrap_or_default();
                    self.wake_ports(report);
                }
                Err(Failure::Gone) => return Ok(()),
                Err(failure) => {
                    failures += 1;
                    if failures > HUB_FAILURES {
                        return Err(failure);
                    }
                    self.device.clear_halt(endpoint).await?;
                }
            }
            self.device.engine.sleep_ms(HUB_REST_MS).await;
        }
    }

    /// Bit n of a report is port n; bit 0 the hub itself (11.12.4).
    fn wake_ports(&self, report: &[u8]) {
        let mut ports = self.ports.lock();
        for (port, watch) in ports.watches.iter_mut().enumerate() {
            if report.get(port / 8).is_some_and(|byte| byte & (1 << (port % 8)) != 0) {
                watch.0 = true;
                watch.1.take().into_iter().for_each(Waker::wake);
            }
        }
    }

    /// Waits until every port has let go what was plugged in.
    async fn emptied(&self) {
        core::future::poll_fn(|cx| {
            let mut ports = self.ports.lock();
            if ports.active == 0 {
                return Poll::Ready(());
            }
            ports.detaching = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

/// Counts a port's task.
struct Active<H: Host>(Ports<H>);

impl<H: Host> Drop for Active<H> {
    fn drop(&mut self) {
        if let Ports::Hub(hub) = &self.0 {
            let mut ports = hub.ports.lock();
            ports.active -= 1;
            ports.detaching.take().into_iter().for_each(Waker::wake);
        }
    }
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
        if let Ports::Hub(hub) = ports {
            hub.ports.lock().active += 1;
        }
        let active = Active(ports.clone());
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
        let watches = (0..=descriptor.ports).map(|_| (false, None)).collect();
        let ports = Mutex::new(self.engine().host, HubState { watches, active: 0, detaching: None });
        let multiple_translators = spec.multiple_translators;
        let hub = Arc::new(Hub { device: device.clone(), ports, super_speed, multiple_translators });
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

/// Questions to a device that is none yet.
pub(crate) struct Asking<'a, H: Host> {
    pub(crate) engine: &'a Arc<Engine<H>>,
    pub(crate) slot: Slot,
}

impl<H: Host> Asking<'_, H> {
    async fn control(&self, setup: [u8; 8], len: u16) -> Result<Vec<u8>, Failure> {
        let transfer = crate::controller::Transfer {
            token: crate::controller::Token(0),
            slot: self.slot,
            endpoint: 0,
            setup: Some(setup),
            data: crate::device::zeroed(usize::from(len))?,
            zero_packet: false,
        };
        let over = self.engine.transfer(transfer, crate::device::CONTROL_TIMEOUT_MS).await;
        over.result?;
        let mut answer = over.data.into_iter().next().unwrap_or_default().into_vec();
        answer.truncate(over.actual);
        Ok(answer)
    }

    /// A descriptor, asked for a few times.
    pub(crate) async fn descriptor(&self, kind: u8, index: u8, len: u16) -> Result<Vec<u8>, Failure> {
        let mut last = Failure::Error;
        for _ in 0..TRIES {
            match self.control(request::get_descriptor(kind, index, 0, len), len).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => last = failure,
            }
        }
        Err(last)
    }

    /// The strings with these indices in the device's first language. One that it refuses stays empty.
    pub(crate) async fn strings(&self, indices: [u8; 3], strings: &mut [String; 3]) -> Result<(), Failure> {
        if indices == [0; 3] {
            return Ok(());
        }
        let languages = match self.control(request::get_descriptor(kind::STRING, 0, 0, 255), 255).await {
            Ok(answer) => answer,
            Err(Failure::Stall) => return Ok(()),
            Err(failure) => return Err(failure),
        };
        let &[_, _, l0, l1, ..] = &languages[..] else { return Ok(()) };
        let language = u16::from_le_bytes([l0, l1]);
        for (index, string) in indices.into_iter().zip(strings).filter(|(index, _)| *index != 0) {
            match self.control(request::get_descriptor(kind::STRING, index, language, 255), 255).await {
                Ok(answer) => *string = text(&answer),
                Err(Failure::Stall | Failure::Overflow) => {}
                Err(failure) => return Err(failure),
            }
        }
        Ok(())
    }
}
