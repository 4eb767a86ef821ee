//! Network devices: Ethernet control model (CDC ECM 1.2) and network control model (CDC NCM 1.0), each a NIC.

mod nic;
mod ntb;
#[cfg(test)]
mod tests;

pub use ntb::{Builder, NtbError, NtbParameters, parse as parse_ntb};

use crate::controller::EndpointKind;
use crate::descriptor::{Setting, kind, text};
use crate::device::{Device, zeroed};
use crate::engine::{Failure, Over, Transferring};
use crate::request;
use crate::stack::{Busy, Shared};
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::nic::{NicCaps, NicInfo};
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};
use hypercall::Host;
use nic::{NicPort, UsbNic};

/// Transfers in flight, each way.
const IN_FLIGHT: usize = 8;
/// Room for a frame of ECM, with a VLAN tag.
const FRAME_ROOM: usize = 2048;
/// A block to the device may take so long.
const SEND_TIMEOUT_MS: u64 = 5_000;
/// Failures in a row before the device is given up.
const MOST_FAILURES: u32 = 8;
/// Broadcast, directed, all multicast (CDC PSTN 6.2.4 for Ethernet).
const PACKET_FILTER: u16 = 0x0e;
const ETHERNET_LEN: usize = 14;

/// What a class descriptor of the function says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ethernet {
    /// String with the address.
    mac: u8,
    /// Largest frame, without FCS.
    segment: u16,
    /// The interface with the data.
    data: u8,
}

impl Ethernet {
    /// Out of the functional descriptors behind the control interface (CDC 1.2, 5.2.3; ECM 1.2, 5.4).
    fn parse(setting: &Setting) -> Option<Self> {
        let (mut mac, mut data) = (None, None);
        for (_, bytes) in setting.extras().filter(|(one, _)| *one == kind::CS_INTERFACE) {
            match bytes {
                [_, _, 0x06, _, slave, ..] => data = Some(*slave),
                [_, _, 0x0f, index, _, _, _, _, low, high, ..] => {
                    mac = Some((*index, u16::from_le_bytes([*low, *high])));
                }
                _ => {}
            }
        }
        let (mac, segment) = mac?;
        // Some leave the union out: the next interface has the data.
        Some(Self { mac, segment, data: data.unwrap_or(setting.interface.wrapping_add(1)) })
    }
}

/// Twelve hexadecimal digits of a station's address (ECM 1.2, 5.4).
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let digits: Vec<u8> =
        text.chars().map(|one| one.to_digit(16).map(|one| one as u8)).collect::<Option<_>>()?;
    let (pairs, []) = digits.as_chunks::<2>() else { return None };
    let mut mac = [0; 6];
    if pairs.len() != mac.len() {
        return None;
    }
    mac.iter_mut().zip(pairs).for_each(|(to, [high, low])| *to = high << 4 | low);
    (mac[0] & 1 == 0 && mac != [0; 6]).then_some(mac)
}

/// How frames stand in transfers.
enum Framing {
    /// One in each.
    Ecm,
    Ncm(NtbParameters),
}

/// Takes the NIC out of the registry however the task ends.
struct Registered<H: Host> {
    shared: Arc<Shared<H>>,
    port: Arc<NicPort<H>>,
}

impl<H: Host> Drop for Registered<H> {
    fn drop(&mut self) {
        self.port.detach();
        if let Some(kernel) = self.shared.kernel.upgrade() {
            kernel.remove_nic(&self.port.info.name);
        }
    }
}

/// Serves a network function until the device is unplugged.
pub(crate) async fn run<H: Host>(
    shared: Arc<Shared<H>>,
    device: Arc<Device<H>>,
    setting: Setting,
    busy: Busy<H>,
) -> Result<(), String> {
    match serve(shared, device, setting, busy).await {
        Ok(()) | Err(Trouble::Failed(_, Failure::Gone)) => Ok(()),
        Err(Trouble::Failed(what, failure)) => Err(format!("{what}: {failure}")),
        Err(Trouble::Wrong(line)) => Err(line.into()),
    }
}

enum Trouble {
    Failed(&'static str, Failure),
    Wrong(&'static str),
}

fn at(what: &'static str) -> impl Fn(Failure) -> Trouble {
    move |failure| Trouble::Failed(what, failure)
}

async fn serve<H: Host>(
    shared: Arc<Shared<H>>,
    device: Arc<Device<H>>,
    setting: Setting,
    busy: Busy<H>,
) -> Result<(), Trouble> {
    let is_ncm = setting.class[1] == 0x0d;
    let ethernet = Ethernet::parse(&setting).ok_or(Trouble::Wrong("it has no Ethernet descriptor"))?;
    let setup = request::get_descriptor(kind::STRING, ethernet.mac, 0x0409, 255);
    let answer = device.control_in(setup).await.map_err(at("reading its address"))?;
    let mac = parse_mac(&text(&answer)).ok_or(Trouble::Wrong("its Ethernet address is none"))?;
    let configuration = device.configuration().ok_or(Trouble::Wrong("it has no configuration"))?;
    let data = configuration
        .settings
        .iter()
        .find(|one| one.interface == ethernet.data && super::has_bulk_pair(one))
        .ok_or(Trouble::Wrong("it has no bulk endpoints for its data"))?;
    let endpoints =
        [true, false].map(|is_in| data.endpoint(EndpointKind::Bulk, is_in).map(|one| one.address));
    let [Some(bulk_in), Some(bulk_out)] = endpoints else {
        return Err(Trouble::Wrong("it has no bulk endpoints for its data"));
    };
    let (interface, alternate) = (data.interface, data.alternate);
    device.claim(interface).await.map_err(at("taking its data interface"))?;
    let control = u16::from(setting.interface);
    let framing = if is_ncm {
        // The data interface is in its setting without endpoints now, as the requests want it (NCM 1.0, 7.2).
        let setup = request::setup(0xa1, 0x80, 0, control, 28);
        let answer = device.control_in(setup).await.map_err(at("reading its block parameters"))?;
        let wrong = Trouble::Wrong("its block parameters make no sense");
        let parameters = NtbParameters::parse(&answer).ok_or(wrong)?;
        let setup = request::setup(0x21, 0x86, 0, control, 4);
        let set = device.control_out(setup, &parameters.in_max.to_le_bytes()).await;
        if set == Err(Failure::Gone) {
            return Ok(());
        }
        Framing::Ncm(parameters)
    } else {
        Framing::Ecm
    };
    if alternate != 0 {
        device.set_alternate(interface, alternate).await.map_err(at("starting its data interface"))?;
    }
    // What it does not know, it need not do.
    let filter = request::setup(0x21, 0x43, PACKET_FILTER, control, 0);
    if device.control_out(filter, &[]).await == Err(Failure::Gone) {
        return Ok(());
    }
    let mtu = usize::from(ethernet.segment).saturating_sub(ETHERNET_LEN).clamp(576, 1500) as u16;
    let port = shared.nic(mac, mtu).ok_or(Trouble::Wrong("the kernel has stopped"))?;
    let registered = Registered { shared: shared.clone(), port: port.clone() };
    let name = if is_ncm { "cdc-ncm" } else { "cdc-ecm" };
    log::info!("{}: usb {} ({name})", port.info.name, device.identity.path);
    shared.set_driver(device.identity.path, setting.interface, name, port.info.name.clone());
    drop(busy);
    let pump = Pump {
        shared,
        device,
        port,
        framing,
        bulk_in,
        bulk_out,
        notify: setting.endpoint(EndpointKind::Interrupt, true).map(|one| one.address),
        rx: VecDeque::new(),
        tx: VecDeque::new(),
        note: None,
        sequence: 0,
        failures: 0,
    };
    let result = pump.run().await;
    drop(registered);
    result
}

/// Moves frames.
struct Pump<H: Host> {
    shared: Arc<Shared<H>>,
    device: Arc<Device<H>>,
    port: Arc<NicPort<H>>,
    framing: Framing,
    bulk_in: u8,
    bulk_out: u8,
    notify: Option<u8>,
    rx: VecDeque<Transferring<H>>,
    tx: VecDeque<Transferring<H>>,
    note: Option<Transferring<H>>,
    sequence: u16,
    failures: u32,
}

enum Next {
    Received(Over),
    Sent(Over),
    Note(Over),
    Frame(Vec<u8>),
    Gone,
}

/// The end of the first of several, if it is there.
fn first<H: Host>(queue: &mut VecDeque<Transferring<H>>, cx: &mut Context<'_>) -> Option<Over> {
    match Pin::new(queue.front_mut()?).poll(cx) {
        Poll::Ready(over) => {
            queue.pop_front();
            Some(over)
        }
        Poll::Pending => None,
    }
}

impl<H: Host> Pump<H> {
    async fn run(mut self) -> Result<(), Trouble> {
        // Devices that do not tell are up.
        self.port.set_link(true);
        loop {
            self.listen()?;
            match self.next().await {
                Next::Received(over) => self.received(over).await?,
                Next::Sent(over) => {
                    if let Err(failure) = over.result {
                        self.failed(self.bulk_out, failure).await?;
                    } else {
                        self.failures = 0;
                    }
                }
                Next::Note(over) => self.noted(over).await?,
                Next::Frame(frame) => self.send(frame)?,
                Next::Gone => return Ok(()),
            }
        }
    }

    /// Keeps enough transfers waiting for what comes.
    fn listen(&mut self) -> Result<(), Trouble> {
        let room = match &self.framing {
            Framing::Ecm => FRAME_ROOM,
            Framing::Ncm(parameters) => parameters.in_max as usize,
        };
        while self.rx.len() < IN_FLIGHT {
            let data = zeroed(room).map_err(at("receiving"))?;
            self.rx.push_back(self.device.pipe(self.bulk_in, data, 0));
        }
        if let (Some(endpoint), None) = (self.notify, &self.note) {
            let data = zeroed(64).map_err(at("receiving"))?;
            self.note = Some(self.device.pipe(endpoint, data, 0));
        }
        Ok(())
    }

    async fn next(&mut self) -> Next {
        let device = self.device.clone();
        core::future::poll_fn(|cx| {
            if device.poll_gone(cx).is_ready() {
                return Poll::Ready(Next::Gone);
            }
            if let Some(over) = first(&mut self.rx, cx) {
                return Poll::Ready(Next::Received(over));
            }
            if let Some(over) = first(&mut self.tx, cx) {
                return Poll::Ready(Next::Sent(over));
            }
            if let Some(note) = &mut self.note
                && let Poll::Ready(over) = Pin::new(note).poll(cx)
            {
                self.note = None;
                return Poll::Ready(Next::Note(over));
            }
            if self.tx.len() < IN_FLIGHT
                && let Some(frame) = self.port.next(cx.waker())
            {
                return Poll::Ready(Next::Frame(frame));
            }
            Poll::Pending
        })
        .await
    }

    async fn received(&mut self, over: Over) -> Result<(), Trouble> {
        if let Err(failure) = over.result {
            return self.failed(self.bulk_in, failure).await;
        }
        let bytes = over.data.first().and_then(|data| data.get(..over.actual)).unwrap_or_default();
        let longest = usize::from(self.port.info.mtu) + ETHERNET_LEN;
        let (mut frames, mut bad) = (Vec::new(), 0);
        let mut take = |frame: &[u8]| {
            if (ETHERNET_LEN..=longest + 4).contains(&frame.len()) {
                frames.push(Vec::from(frame));
            } else {
                bad += 1;
            }
        };
        match &self.framing {
            // An empty packet ends a frame of whole packets, and says nothing by itself.
            Framing::Ecm if bytes.is_empty() => {}
            Framing::Ecm => take(bytes),
            Framing::Ncm(_) if bytes.is_empty() => {}
            Framing::Ncm(_) => {
                if ntb::parse(bytes, &mut take).is_err() {
                    bad += 1;
                }
            }
        }
        self.shared.counters.net_bad_frames.add(bad);
        if !frames.is_empty() {
            self.failures = 0;
        } else if bad > 0 {
            // A device that sends nothing but nonsense is not listened to all the time.
            self.shared.engine.sleep_ms(1).await;
        }
        self.shared.counters.net_dropped.add(self.port.received(frames));
        Ok(())
    }

    /// A transfer failed: the endpoint is set going again, once nothing of it is in flight.
    async fn failed(&mut self, endpoint: u8, failure: Failure) -> Result<(), Trouble> {
        if failure == Failure::Gone {
            return Ok(());
        }
        self.shared.counters.net_errors.increment();
        self.failures += 1;
        if self.failures > MOST_FAILURES {
            return Err(Trouble::Failed("its transfers fail again and again", failure));
        }
        let queue = if endpoint == self.bulk_in { &mut self.rx } else { &mut self.tx };
        for one in core::mem::take(queue) {
            one.cancel();
            let _ = one.await;
        }
        self.device.clear_halt(endpoint).await.map_err(at("ending a halt"))
    }

    /// A notification (CDC 1.2, 6.3): whether the link is up.
    async fn noted(&mut self, over: Over) -> Result<(), Trouble> {
        let bytes = over.data.first().and_then(|data| data.get(..over.actual)).unwrap_or_default();
        match (over.result, bytes) {
            (Ok(()), [0xa1, 0x00, value, ..]) => self.port.set_link(*value != 0),
            (Ok(()), _) => {}
            // It works without.
            (Err(_), _) => self.notify = None,
        }
        self.shared.engine.sleep_ms(1).await;
        Ok(())
    }

    fn send(&mut self, frame: Vec<u8>) -> Result<(), Trouble> {
        let bytes = match &self.framing {
            Framing::Ecm => frame,
            Framing::Ncm(parameters) => {
                let mut block = Builder::new(*parameters);
                let mut next = Some(frame);
                while let Some(frame) = next.take() {
                    if block.add(&frame) {
                        next = self.port.next(core::task::Waker::noop());
                    } else if block.is_empty() {
                        // Cannot be: the least block holds the longest frame.
                        self.shared.counters.net_dropped.increment();
                        return Ok(());
                    } else {
                        self.port.put_back(frame);
                    }
                }
                self.sequence = self.sequence.wrapping_add(1);
                block.finish(self.sequence)
            }
        };
        let bytes: Box<[u8]> = bytes.into_boxed_slice();
        self.tx.push_back(self.device.message(self.bulk_out, bytes, SEND_TIMEOUT_MS));
        Ok(())
    }
}

impl<H: Host> Shared<H> {
    /// A new interface, registered.
    fn nic(&self, mac: [u8; 6], mtu: u16) -> Option<Arc<NicPort<H>>> {
        let (kernel, owner) = (self.kernel.upgrade()?, self.owner()?);
        let name = kernel.free_nic_name();
        let info = NicInfo { name, mac, mtu, caps: NicCaps::empty(), queues: 1 };
        let port = NicPort::new(self.engine.clone(), info);
        kernel.add_nic(Arc::new(UsbNic { port: port.clone(), owner }));
        Some(port)
    }
}
