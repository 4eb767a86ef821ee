//! A device as class drivers see it, whoever enumerated it: pipes, and the few requests that concern the controller too.

use crate::controller::{Command, EndpointSpec, Slot, Speed, Token, Transfer};
use crate::descriptor::{Configuration, DeviceDescriptor, Setting};
use crate::engine::{Engine, Failure, Over, Transferring};
use crate::quirks::Quirks;
use crate::request;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::sync::Mutex;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};
use hypercall::{Host, UsbPath};

/// How long a control transfer may take (USB 2.0, 9.2.6.4 allows 5 s).
pub(crate) const CONTROL_TIMEOUT_MS: u64 = 5_000;

type Operation = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send>>;

/// What a platform does itself with a device that it enumerated ([`hypercall::HostUsb`]).
pub(crate) trait Platform: Send + Sync {
    fn claim(&self, interface: u8) -> Operation;
    fn set_alternate(&self, interface: u8, alternate: u8) -> Operation;
    fn clear_halt(&self, endpoint: u8) -> Operation;
    fn reset(&self) -> Operation;
}

/// What is constant about a device.
pub(crate) struct Identity {
    pub(crate) path: UsbPath,
    pub(crate) slot: Slot,
    pub(crate) address: u8,
    pub(crate) speed: Speed,
    pub(crate) descriptor: DeviceDescriptor,
    pub(crate) configurations: Vec<Configuration>,
    /// The device descriptor and every configuration, as they came.
    pub(crate) raw: Vec<u8>,
    /// Manufacturer, product, serial number.
    pub(crate) strings: [String; 3],
    pub(crate) quirks: Quirks,
}

#[derive(Default)]
struct State {
    gone: bool,
    waiting: Vec<Waker>,
    /// Settings in use, by interface.
    alternates: Vec<(u8, u8)>,
    reset: Reset,
    /// Who serves resets: the task of the port.
    port: Option<Waker>,
}

#[derive(Default)]
enum Reset {
    #[default]
    None,
    Wanted(Option<Waker>),
    Over(Result<(), Failure>),
}

pub(crate) struct Device<H: Host> {
    pub(crate) engine: Arc<Engine<H>>,
    pub(crate) identity: Identity,
    /// Index of the configuration in use.
    pub(crate) chosen: usize,
    platform: Option<Box<dyn Platform>>,
    state: Mutex<H, State>,
}

impl<H: Host> Device<H> {
    pub(crate) fn new(
        engine: Arc<Engine<H>>,
        identity: Identity,
        chosen: usize,
        platform: Option<Box<dyn Platform>>,
    ) -> Self {
        let state = Mutex::new(engine.host, State::default());
        Self { engine, identity, chosen, platform, state }
    }

    /// The configuration in use.
    pub(crate) fn configuration(&self) -> Option<&Configuration> {
        self.identity.configurations.get(self.chosen)
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.state.lock().gone
    }

    /// It was unplugged or given up: whoever waits for something of it is told.
    pub(crate) fn mark_gone(&self) {
        let mut state = self.state.lock();
        state.gone = true;
        let waiting = core::mem::take(&mut state.waiting);
        if let Reset::Wanted(waker) = &mut state.reset {
            let waker = waker.take();
            state.reset = Reset::Over(Err(Failure::Gone));
            waker.into_iter().for_each(Waker::wake);
        }
        drop(state);
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Ready once the device is gone.
    pub(crate) fn poll_gone(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.state.lock();
        if state.gone {
            return Poll::Ready(());
        }
        if !state.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            state.waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    fn transfer(
        &self,
        endpoint: u8,
        setup: Option<[u8; 8]>,
        data: Vec<Box<[u8]>>,
        zero_packet: bool,
        timeout_ms: u64,
    ) -> Transferring<H> {
        let transfer =
            Transfer { token: Token(0), slot: self.identity.slot, endpoint, setup, data, zero_packet };
        self.engine.transfer(transfer, timeout_ms)
    }

    /// What a failure means once the device is gone.
    fn judge(&self, failure: Failure) -> Failure {
        if self.is_gone() { Failure::Gone } else { failure }
    }

    /// A request with an answer of at most `wLength` bytes.
    pub(crate) async fn control_in(&self, setup: [u8; 8]) -> Result<Vec<u8>, Failure> {
        let [.., low, high] = setup;
        let data = zeroed(usize::from(u16::from_le_bytes([low, high])))?;
        let over = self.transfer(0, Some(setup), data, false, CONTROL_TIMEOUT_MS).await;
        over.result.map_err(|failure| self.judge(failure))?;
        let mut answer = over.data.into_iter().next().unwrap_or_default().into_vec();
        answer.truncate(over.actual);
        Ok(answer)
    }

    /// A request with `data` (of `wLength` bytes) or none.
    pub(crate) async fn control_out(&self, setup: [u8; 8], data: &[u8]) -> Result<(), Failure> {
        let data = if data.is_empty() { Vec::new() } else { alloc::vec![Box::from(data)] };
        let over = self.transfer(0, Some(setup), data, false, CONTROL_TIMEOUT_MS).await;
        over.result.map_err(|failure| self.judge(failure))
    }

    /// Starts a bulk or interrupt transfer. `timeout_ms` 0: none.
    pub(crate) fn pipe(&self, endpoint: u8, data: Vec<Box<[u8]>>, timeout_ms: u64) -> Transferring<H> {
        self.transfer(endpoint, None, data, false, timeout_ms)
    }

    /// As [`Device::pipe`] for OUT, with an empty packet where a receiver would else not see the end.
    pub(crate) fn message(&self, endpoint: u8, data: Box<[u8]>, timeout_ms: u64) -> Transferring<H> {
        self.transfer(endpoint, None, alloc::vec![data], true, timeout_ms)
    }

    /// Waits for `over`, with what it means once the device is gone.
    pub(crate) async fn end_of(&self, over: Transferring<H>) -> Over {
        let mut over = over.await;
        over.result = over.result.map_err(|failure| self.judge(failure));
        over
    }

    /// Ends the halt of an endpoint, at both ends. Nothing may be in flight there.
    pub(crate) async fn clear_halt(&self, endpoint: u8) -> Result<(), Failure> {
        match &self.platform {
            Some(platform) => platform.clear_halt(endpoint).await.map_err(|failure| self.judge(failure))?,
            None => self.control_out(request::clear_endpoint_halt(endpoint), &[]).await?,
        }
        let slot = self.identity.slot;
        self.engine.command(Command::ResetEndpoint { slot, endpoint }).await.map(drop)
    }

    /// Takes an interface for a driver. Only a platform has other takers.
    pub(crate) async fn claim(&self, interface: u8) -> Result<(), Failure> {
        match &self.platform {
            Some(platform) => platform.claim(interface).await,
            None => Ok(()),
        }
    }

    fn setting_in_use(&self, interface: u8) -> Option<&Setting> {
        let alternate =
            self.state.lock().alternates.iter().find(|one| one.0 == interface).map_or(0, |one| one.1);
        self.configuration()?.setting(interface, alternate)
    }

    /// Puts `interface` into a setting. None of its transfers may be in flight.
    pub(crate) async fn set_alternate(&self, interface: u8, alternate: u8) -> Result<(), Failure> {
        let new = self.configuration().and_then(|one| one.setting(interface, alternate));
        let new = new.ok_or(Failure::Stall)?;
        let old = self.setting_in_use(interface);
        let remove = old.map(|old| self.specs(old).map(|spec| spec.address).collect());
        let command = Command::Configure {
            slot: self.identity.slot,
            remove: remove.unwrap_or_default(),
            add: self.specs(new).collect(),
            hub: None,
        };
        self.engine.command(command).await?;
        match &self.platform {
            Some(platform) => platform.set_alternate(interface, alternate).await?,
            None => self.control_out(request::set_interface(interface, alternate), &[]).await?,
        }
        let mut state = self.state.lock();
        state.alternates.retain(|one| one.0 != interface);
        state.alternates.push((interface, alternate));
        Ok(())
    }

    /// The endpoints of a setting that can be used.
    fn specs<'a>(&'a self, setting: &'a Setting) -> impl Iterator<Item = EndpointSpec> + 'a {
        setting.endpoints.iter().filter_map(|endpoint| endpoint.spec(self.identity.speed))
    }

    /// The endpoints of every setting in use.
    pub(crate) fn endpoints(&self) -> Vec<EndpointSpec> {
        let settings = self.configuration().map(|one| &one.settings[..]).unwrap_or_default();
        let mut found: Vec<EndpointSpec> = Vec::new();
        for setting in settings {
            let in_use = self.setting_in_use(setting.interface);
            if in_use.is_some_and(|one| one.alternate == setting.alternate) {
                found.extend(self.specs(setting));
            }
        }
        found
    }

    /// Resets the port of the device and brings it back into configuration and settings. Transfers in flight are cancelled.
    /// Fails with [`Failure::Gone`] if it does not come back as what it was.
    pub(crate) async fn reset(&self) -> Result<(), Failure> {
        if let Some(platform) = &self.platform {
            platform.reset().await.map_err(|failure| self.judge(failure))?;
            let (slot, max_packet) = (self.identity.slot, self.identity.descriptor.max_packet);
            self.engine.command(Command::Readdress { slot, max_packet }).await?;
            let alternates = self.state.lock().alternates.clone();
            for (interface, alternate) in alternates.into_iter().filter(|one| one.1 != 0) {
                platform.set_alternate(interface, alternate).await?;
            }
            return Ok(());
        }
        {
            let mut state = self.state.lock();
            if state.gone {
                return Err(Failure::Gone);
            }
            state.reset = Reset::Wanted(None);
            state.port.take().into_iter().for_each(Waker::wake);
        }
        core::future::poll_fn(|cx| {
            let mut state = self.state.lock();
            match &mut state.reset {
                Reset::Over(result) => {
                    let result = *result;
                    state.reset = Reset::None;
                    Poll::Ready(result)
                }
                Reset::Wanted(waker) => {
                    *waker = Some(cx.waker().clone());
                    Poll::Pending
                }
                Reset::None => Poll::Ready(Err(Failure::Gone)),
            }
        })
        .await
    }

    /// For the port: ready if somebody wants a reset.
    pub(crate) fn poll_reset(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.state.lock();
        if matches!(state.reset, Reset::Wanted(_)) {
            return Poll::Ready(());
        }
        state.port = Some(cx.waker().clone());
        Poll::Pending
    }

    /// For the port: the reset is over.
    pub(crate) fn reset_over(&self, result: Result<(), Failure>) {
        let mut state = self.state.lock();
        if let Reset::Wanted(waker) = &mut state.reset {
            let waker = waker.take();
            state.reset = Reset::Over(result);
            waker.into_iter().for_each(Waker::wake);
        }
    }

    /// Settings other than 0 in use.
    pub(crate) fn alternates(&self) -> Vec<(u8, u8)> {
        self.state.lock().alternates.iter().copied().filter(|one| one.1 != 0).collect()
    }
}

/// One zeroed buffer of `len` bytes, or none of 0.
pub(crate) fn zeroed(len: usize) -> Result<Vec<Box<[u8]>>, Failure> {
    if len == 0 {
        return Ok(Vec::new());
    }
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(len)
        .map_err(|_| Failure::Controller(crate::controller::ControllerError::NoMemory))?;
    bytes.resize(len, 0);
    Ok(alloc::vec![bytes.into_boxed_slice()])
}
