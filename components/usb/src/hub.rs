//! Ports as their tasks see them: those of the root hub, and those of hubs that are devices (USB 2.0, 11.24; USB 3.2, 10.16).

use crate::controller::{PortAction, PortStatus, RootPort, Speed};
use crate::device::Device;
use crate::engine::{Engine, Failure};
use crate::request;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::sync::Mutex;
use core::task::{Context, Poll, Waker};
use hypercall::Host;

/// Least time between two reports of a hub.
const HUB_REST_MS: u64 = 5;
/// Reports of a hub that may fail in a row.
const HUB_FAILURES: u32 = 3;

/// What the ports of a hub share.
pub(crate) struct Hub<H: Host> {
    pub(crate) device: Arc<Device<H>>,
    ports: Mutex<H, HubState>,
    super_speed: bool,
    pub(crate) multiple_translators: bool,
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

pub(crate) mod feature {
    pub(super) const ENABLE: u16 = 1;
    pub(super) const SUSPEND: u16 = 2;
    pub(super) const RESET: u16 = 4;
    pub(super) const LINK_STATE: u16 = 5;
    pub(crate) const POWER: u16 = 8;
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
    pub(crate) async fn status(&self, port: u8) -> Result<PortStatus, Failure> {
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

    pub(crate) async fn action(&self, port: u8, action: PortAction) -> Result<(), Failure> {
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

    pub(crate) fn poll_changed(&self, port: u8, cx: &mut Context<'_>) -> Poll<()> {
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

    pub(crate) fn gone(&self) -> bool {
        match self {
            Self::Root(engine) => engine.dead(),
            Self::Hub(hub) => hub.device.is_gone(),
        }
    }
}

impl<H: Host> Hub<H> {
    /// A hub with `ports` ports.
    pub(crate) fn new(device: Arc<Device<H>>, ports: u8, multiple_translators: bool) -> Self {
        let watches = (0..=ports).map(|_| (false, None)).collect();
        let state = HubState { watches, active: 0, detaching: None };
        let super_speed = device.identity.speed >= Speed::Super;
        Self { ports: Mutex::new(device.engine.host, state), device, super_speed, multiple_translators }
    }

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
    pub(crate) async fn watch(&self, endpoint: u8, room: usize) -> Result<(), Failure> {
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
    pub(crate) async fn emptied(&self) {
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
pub(crate) struct Active<H: Host>(Ports<H>);

impl<H: Host> Active<H> {
    pub(crate) fn new(ports: Ports<H>) -> Self {
        if let Ports::Hub(hub) = &ports {
            hub.ports.lock().active += 1;
        }
        Self(ports)
    }
}

impl<H: Host> Drop for Active<H> {
    fn drop(&mut self) {
        if let Ports::Hub(hub) = &self.0 {
            let mut ports = hub.ports.lock();
            ports.active -= 1;
            ports.detaching.take().into_iter().for_each(Waker::wake);
        }
    }
}
