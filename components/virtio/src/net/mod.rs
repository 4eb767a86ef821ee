//! virtio-net (VirtIO 1.2, 5.1): a [`Nic`] with one queue pair for each CPU where the device can.
//!
//! The device is set up once; each pair is opened by the thread that will poll it ([`pair::Pair`]) and comes back when
//! that thread drops it. The device is reset when the NIC and all its pairs are gone.

mod control;
mod header;
mod pair;

use crate::error::{Error, Result};
use crate::spec::{feature, net as spec};
use crate::transport::{Attached, Place, Transport};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::counter::Counter;
use anykernel::nic::{Nic, NicCaps, NicInfo, NicQueue};
use anykernel::sync::Mutex;
use control::Control;
use core::sync::atomic::{AtomicBool, Ordering};
use hypercall::{CpuId, DeviceHost, Signal, Width};
use pair::{OpenPair, Pair};

const ETHERNET_HEADER: usize = 14;
/// Of a frame with a VLAN tag.
const FRAME_OVERHEAD: usize = ETHERNET_HEADER + 4;
/// An IP packet of any length in a frame.
const MAX_FRAME: usize = 65_535 + FRAME_OVERHEAD;
const DEFAULT_MTU: u16 = 1500;

/// How much memory the buffers of one pair may take.
#[derive(Debug, Clone, Copy)]
struct Budget {
    /// Entries of each ring.
    ring: u16,
    /// Bytes of a mergeable receive buffer.
    receive_bytes: usize,
    /// Transmit buffers for segments larger than the MTU.
    large: usize,
}

impl Budget {
    fn new(memory_bytes: u64) -> Self {
        match memory_bytes >> 20 {
            0..24 => Self { ring: 64, receive_bytes: 2048, large: 2 },
            24..48 => Self { ring: 128, receive_bytes: 2048, large: 8 },
            _ => Self { ring: 256, receive_bytes: 4096, large: 32 },
        }
    }
}

/// What was agreed with the device, as the fast path needs it.
#[derive(Debug, Clone, Copy)]
struct Agreed {
    header_bytes: usize,
    mergeable: bool,
    caps: NicCaps,
    /// Longest frame without cutting by the device.
    max_frame: usize,
}

/// Counters of a device.
#[derive(Clone)]
struct Counters {
    /// Received frames that no longer made sense.
    rx_errors: Counter,
    /// Frames that asked for what the device cannot do, or too long ones.
    tx_dropped: Counter,
    /// Times that the transmit ring or its buffers were used up.
    tx_full: Counter,
    /// Doorbells rung.
    kicks: Counter,
}

enum PairState<H: DeviceHost> {
    Idle(Box<Pair<H>>),
    Open,
    /// The device was given up.
    Ended,
}

struct Inner<H: DeviceHost> {
    transport: Transport<H>,
    control: Option<Control<H>>,
    pairs: Vec<PairState<H>>,
    /// How many pairs the device was told to use.
    active: u16,
}

/// A virtio network device.
pub(crate) struct Net<H: DeviceHost> {
    host: H,
    place: Place,
    info: NicInfo,
    has_status: bool,
    link_up: AtomicBool,
    gone: AtomicBool,
    inner: Mutex<H, Inner<H>>,
}

impl<H: DeviceHost> Net<H> {
    /// Sets the device up and registers it as `nicN`.
    pub(crate) fn start(kernel: &Arc<Kernel<H>>, place: Place, mut transport: Transport<H>) -> Result<()> {
        let device = match Self::set_up(kernel, &mut transport) {
            Ok(parts) => parts,
            Err(error) => {
                transport.fail();
                return Err(error);
            }
        };
        let Parts { info, has_status, control, pairs } = device;
        let [a, b, c, d, e, f] = info.mac;
        log::info!(
            "{}: {place}, {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}, mtu {}, {} queue pair(s), {:?}",
            info.name,
            info.mtu,
            info.queues,
            info.caps,
        );
        let started = transport.driver_ok();
        let host = kernel.host().of_component("virtnet");
        let pairs = pairs.into_iter().map(|pair| PairState::Idle(Box::new(pair))).collect();
        let inner = Inner { transport, control, pairs, active: 1 };
        let net = Self {
            host,
            place,
            info,
            has_status,
            link_up: AtomicBool::new(true),
            gone: AtomicBool::new(false),
            inner: Mutex::new(host, inner),
        };
        // On failure the drop of `net` undoes the rest.
        started?;
        net.refresh_link();
        kernel.add_nic(Arc::new(NicHandle(Arc::new(net))));
        Ok(())
    }

    /// Asks the device what it is and makes its queues. On an error nothing of it is left.
    fn set_up(kernel: &Arc<Kernel<H>>, transport: &mut Transport<H>) -> Result<Parts<H>> {
        let host = kernel.host().of_component("virtnet");
        let features = transport.negotiate(|offered| choose_features(offered, host.cpu_count()))?;
        let has = |bit: u64| features & bit != 0;
        if !has(feature::VERSION_1) && !has(feature::ANY_LAYOUT) {
            return Err(Error::Unsupported("a legacy device without VIRTIO_F_ANY_LAYOUT"));
        }
        let mac = if has(spec::F_MAC) { read_mac(transport)? } else { random_mac(&host)? };
        let mtu = if has(spec::F_MTU) {
            transport.config(spec::CONFIG_MTU, Width::U16)? as u16
        } else {
            DEFAULT_MTU
        };
        if mtu < 576 {
            return Err(Error::BadDevice("its MTU is below 576 bytes"));
        }
        let mergeable = has(spec::F_MRG_RXBUF);
        let agreed = Agreed {
            header_bytes: if has(feature::VERSION_1) || mergeable {
                spec::HEADER_BYTES
            } else {
                spec::LEGACY_HEADER_BYTES
            },
            mergeable,
            caps: caps(features),
            max_frame: usize::from(mtu) + FRAME_OVERHEAD,
        };
        let max_pairs = if has(spec::F_MQ) {
            match transport.config(spec::CONFIG_MAX_PAIRS, Width::U16)? as u16 {
                pairs @ 1..=0x8000 => pairs,
                _ => return Err(Error::BadDevice("its number of queue pairs is out of range")),
            }
        } else {
            1
        };
        let wanted = u32::from(max_pairs).min(host.cpu_count()).max(1) as u16;
        let vectors = transport.choose_interrupts(wanted);
        // One line cannot say which pair it means.
        let count = if vectors == 0 { 1 } else { wanted.min(vectors) };
        transport.set_config_vector(0);

        let name = alloc::format!("nic{}", kernel.nics().len());
        let counter = |what: &str| kernel.counter(&alloc::format!("{name}.{what}"));
        let counters = Counters {
            rx_errors: counter("rx_errors"),
            tx_dropped: counter("tx_dropped"),
            tx_full: counter("tx_full"),
            kicks: counter("kicks"),
        };
        let budget = Budget::new(host.memory_bytes());
        let mut pairs = Vec::new();
        let mut make = || {
            for index in 0..count {
                pairs.push(Pair::new(host, transport, index, features, agreed, budget, counters.clone())?);
            }
            (count > 1).then(|| Control::new(host, transport, 2 * max_pairs, features)).transpose()
        };
        match make() {
            Ok(control) => Ok(Parts {
                info: NicInfo { name, mac, mtu, caps: agreed.caps, queues: count },
                has_status: has(spec::F_STATUS),
                control,
                pairs,
            }),
            Err(error) => {
                // The device knows those that were made. Without a reset their memory stays lent.
                if let Some(proof) = transport.reset() {
                    pairs.into_iter().for_each(|pair| pair.dismantle(&proof));
                }
                Err(error)
            }
        }
    }

    /// Reads whether the link is up.
    fn refresh_link(&self) {
        if !self.has_status || self.gone.load(Ordering::Relaxed) {
            return;
        }
        let status = self.inner.lock().transport.config(spec::CONFIG_STATUS, Width::U16);
        let up = status.is_ok_and(|status| status as u16 & spec::STATUS_LINK_UP != 0);
        if self.link_up.swap(up, Ordering::Relaxed) != up {
            log::info!("{}: link {}", self.info.name, if up { "up" } else { "down" });
        }
    }

    /// Resets the device for good. Its pairs notice when they are used next.
    fn give_up(&self, why: &Error) {
        if self.gone.swap(true, Ordering::AcqRel) {
            return;
        }
        log::error!("{}: {}: {why}; giving the device up", self.info.name, self.place);
        self.link_up.store(false, Ordering::Relaxed);
        // The memory of all pairs stays with them until the device is dropped.
        let _ = self.inner.lock().transport.reset();
    }

    fn attach(&self, inner: &Inner<H>, index: u16, signal: Arc<Signal>) -> hypercall::Result<Attached> {
        let cpu = CpuId(u32::from(index) % self.host.cpu_count().max(1));
        inner.transport.attach(index, cpu, signal)
    }

    /// Tells the device to use as many pairs as are open from the first on.
    fn activate(&self, inner: &mut Inner<H>) -> hypercall::Result<()> {
        let open =
            inner.pairs.iter().take_while(|pair| matches!(pair, PairState::Open)).count().max(1) as u16;
        if open != inner.active
            && let Some(control) = &mut inner.control
        {
            control.set_pairs(&self.host, open).map_err(|error| {
                log::error!("{}: cannot use {open} queue pairs: {error}", self.info.name);
                hypercall::Error::Io
            })?;
            inner.active = open;
        }
        Ok(())
    }

    /// Takes back a pair whose user is done with it.
    fn close(&self, index: u16, pair: Box<Pair<H>>, attached: Attached) {
        let mut inner = self.inner.lock();
        inner.transport.detach(attached);
        if let Some(state) = inner.pairs.get_mut(usize::from(index)) {
            *state = PairState::Idle(pair);
        }
        if !self.gone.load(Ordering::Acquire) {
            // A device that does not take it drops what it steers to the closed pair.
            let _ = self.activate(&mut inner);
        }
    }
}

impl<H: DeviceHost> Drop for Net<H> {
    fn drop(&mut self) {
        let inner = self.inner.get_mut();
        let quiet = inner.transport.reset();
        // Without a reset the memory stays lent: queues free nothing by themselves.
        let Some(proof) = quiet else { return };
        for state in &mut inner.pairs {
            if let PairState::Idle(pair) = core::mem::replace(state, PairState::Ended) {
                pair.dismantle(&proof);
            }
        }
        if let Some(control) = inner.control.take() {
            control.dismantle(&proof);
        }
    }
}

struct Parts<H: DeviceHost> {
    info: NicInfo,
    has_status: bool,
    control: Option<Control<H>>,
    pairs: Vec<Pair<H>>,
}

/// What is registered. Pairs keep the device alive beyond it.
struct NicHandle<H: DeviceHost>(Arc<Net<H>>);

impl<H: DeviceHost> Nic for NicHandle<H> {
    fn info(&self) -> &NicInfo {
        &self.0.info
    }

    fn open_queue(&self, index: u16, signal: Arc<Signal>) -> hypercall::Result<Box<dyn NicQueue>> {
        let net = &self.0;
        if net.gone.load(Ordering::Acquire) {
            return Err(hypercall::Error::Gone);
        }
        let mut inner = net.inner.lock();
        let state = inner.pairs.get_mut(usize::from(index)).ok_or(hypercall::Error::NotFound)?;
        let pair = match core::mem::replace(state, PairState::Open) {
            PairState::Idle(pair) => pair,
            other => {
                *state = other;
                return Err(hypercall::Error::Busy);
            }
        };
        let opened = net.attach(&inner, index, signal.clone()).and_then(|attached| {
            net.activate(&mut inner).map(|()| attached).inspect_err(|_| inner.transport.detach(attached))
        });
        match opened {
            Ok(attached) => {
                let acknowledger = inner.transport.acknowledger(attached);
                drop(inner);
                Ok(Box::new(OpenPair::new(net.clone(), index, pair, signal, attached, acknowledger)))
            }
            Err(error) => {
                if let Some(state) = inner.pairs.get_mut(usize::from(index)) {
                    *state = PairState::Idle(pair);
                }
                Err(error)
            }
        }
    }
}

/// What we take of what a device offers. Features that need others (5.1.3.1) go with them.
fn choose_features(offered: u64, cpus: u32) -> u64 {
    let has = |bit: u64| offered & bit != 0;
    let mut features = spec::F_MTU | spec::F_MAC | spec::F_MRG_RXBUF | spec::F_STATUS;
    if has(spec::F_CSUM) {
        features |= spec::F_CSUM | spec::F_HOST_TSO4 | spec::F_HOST_TSO6;
    }
    if has(spec::F_GUEST_CSUM) {
        features |= spec::F_GUEST_CSUM;
        // Without mergeable buffers each would have to take 64 KiB.
        if has(spec::F_MRG_RXBUF) {
            features |= spec::F_GUEST_TSO4 | spec::F_GUEST_TSO6;
        }
    }
    if has(spec::F_CTRL_VQ) && has(spec::F_MQ) && cpus > 1 {
        features |= spec::F_CTRL_VQ | spec::F_MQ;
    }
    features
}

fn caps(features: u64) -> NicCaps {
    let mut caps = NicCaps::empty();
    caps.set(NicCaps::TX_CHECKSUM, features & spec::F_CSUM != 0);
    caps.set(NicCaps::RX_CHECKSUM, features & spec::F_GUEST_CSUM != 0);
    caps.set(NicCaps::TSO4, features & spec::F_HOST_TSO4 != 0);
    caps.set(NicCaps::TSO6, features & spec::F_HOST_TSO6 != 0);
    caps.set(NicCaps::LRO, features & (spec::F_GUEST_TSO4 | spec::F_GUEST_TSO6) != 0);
    caps
}

fn read_mac<H: DeviceHost>(transport: &Transport<H>) -> Result<[u8; 6]> {
    transport.stable_config(|transport| {
        let mut mac = [0; 6];
        for (i, byte) in mac.iter_mut().enumerate() {
            *byte = transport.config(spec::CONFIG_MAC + i, Width::U8)? as u8;
        }
        Ok(mac)
    })
}

/// A locally administered address (5.1.5).
fn random_mac<H: DeviceHost>(host: &H) -> Result<[u8; 6]> {
    let mut mac = [0; 6];
    host.fill_random(&mut mac).map_err(|error| Error::Host("making up a MAC address", error))?;
    let [first, ..] = &mut mac;
    *first = *first & 0xfe | 2;
    Ok(mac)
}
