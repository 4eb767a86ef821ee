//! The whole stack, with devices that answer as the input says: a hub, and behind it a disk, a keyboard and a network device,
//! each of which may lie about anything, fall silent, and be pulled out and plugged in at any moment. Beside them is a disk
//! that is sound: nothing that its neighbours do may keep it from working.

use crate::host::FuzzHost;
use crate::input::Input;
use crate::watch;
use anykernel::Kernel;
use anykernel::block::{BlockDevice, BlockError, Complete, Op, Request};
use anykernel::config::Config;
use anykernel::nic::{NicQueue, TxMeta};
use anykernel_usb::testing::{
    HidModel, HidState, HubModel, KEYBOARD, ModelBus, NetModel, NetState, StorageModel,
};
use anykernel_usb::{Options, UsbStack};
use hypercall::testing::{UsbModel, UsbReply};
use hypercall::{Clock, Signal, UsbSpeed};
use std::sync::{Arc, Mutex};

/// Actions of an execution at most.
const ACTIONS: usize = 48;
/// Until everything must be found, or given up.
const SETTLE_NS: u64 = 900_000_000_000;
const MEDIUM: usize = 64 << 10;
const MS: u64 = 1_000_000;

type Lies = Arc<Mutex<Input>>;

/// A device that answers as another, but for what the input says.
struct Lying<M> {
    model: M,
    lies: Lies,
    mute: bool,
}

impl<M: UsbModel> Lying<M> {
    fn new(model: M, lies: &Lies) -> Self {
        Self { model, lies: lies.clone(), mute: false }
    }

    fn answer(&mut self, honest: UsbReply, data: &mut [u8]) -> UsbReply {
        // What waits would use up the input by being asked again.
        if honest == UsbReply::Nak {
            return honest;
        }
        let mut lies = self.lies.lock().expect("no panic");
        let sent = if let UsbReply::Ack(sent) = honest { sent.min(data.len()) } else { 0 };
        let mut change = |lies: &mut Input| {
            let at = lies.below(sent);
            data[at] = lies.u8();
        };
        match lies.u8() {
            0xc0..=0xdf if sent > 0 => change(&mut lies),
            0xe0..=0xe7 if sent > 0 => (0..=lies.below(8)).for_each(|_| change(&mut lies)),
            0xe8..=0xef => return UsbReply::Ack(lies.below(sent + 1)),
            0xf0..=0xf3 => return UsbReply::Ack(data.len()),
            0xf4..=0xf6 => return UsbReply::Nak,
            0xf7..=0xfa => return UsbReply::Stall,
            0xfb | 0xfc => return UsbReply::Silence,
            0xfd | 0xfe => return UsbReply::Babble,
            0xff => {
                self.mute = true;
                return UsbReply::Nak;
            }
            _ => {}
        }
        honest
    }
}

impl<M: UsbModel> UsbModel for Lying<M> {
    fn speed(&self) -> UsbSpeed {
        self.model.speed()
    }
    fn descriptors(&self) -> Vec<u8> {
        self.model.descriptors()
    }
    fn control(&mut self, setup: [u8; 8], data: &mut [u8]) -> UsbReply {
        if self.mute {
            return UsbReply::Nak;
        }
        let honest = self.model.control(setup, data);
        // What is sent to a device has no answer to be changed.
        let data = if setup[0] & 0x80 != 0 { data } else { &mut [] };
        self.answer(honest, data)
    }
    fn packet_out(&mut self, endpoint: u8, packet: &[u8]) -> UsbReply {
        if self.mute {
            return UsbReply::Nak;
        }
        let honest = self.model.packet_out(endpoint, packet);
        self.answer(honest, &mut [])
    }
    fn packet_in(&mut self, endpoint: u8, room: &mut [u8]) -> UsbReply {
        if self.mute {
            return UsbReply::Nak;
        }
        let honest = self.model.packet_in(endpoint, room);
        self.answer(honest, room)
    }
    fn bus_reset(&mut self) {
        self.mute = false;
        self.model.bus_reset();
    }
}

/// Requests that are under way, and how the last one ended.
#[derive(Default)]
struct Requests {
    under_way: usize,
    last: Option<(Result<(), BlockError>, Vec<u8>)>,
}

struct Back(Arc<Mutex<Requests>>);

impl Complete for Back {
    fn complete(&self, request: Request, result: Result<(), BlockError>) {
        assert!(request.buffers.iter().all(|buffer| buffer.len() == 4096), "a buffer of another length");
        let mut requests = self.0.lock().expect("no panic");
        requests.under_way = requests.under_way.checked_sub(1).expect("a request comes back twice");
        requests.last = Some((result, request.buffers.concat()));
    }
}

struct World {
    host: FuzzHost,
    kernel: Arc<Kernel<FuzzHost>>,
    bus: ModelBus<FuzzHost>,
    hub: HubModel<FuzzHost>,
    stack: Arc<UsbStack<FuzzHost>>,
    lies: Lies,
    keys: Option<Arc<Mutex<HidState>>>,
    net: Option<Arc<Mutex<NetState>>>,
    queue: Option<Box<dyn NicQueue>>,
    requests: Arc<Mutex<Requests>>,
}

impl World {
    fn new(lies: Input) -> Self {
        let host = FuzzHost::fresh();
        let kernel = Kernel::new(host, Config::default());
        let bus = ModelBus::new(host, 2, 8);
        let (controller, signal) = bus.controller();
        let stack =
            UsbStack::attach(&kernel, controller, signal, 1, Options::default()).expect("CORE is there");
        let hub = HubModel::new(host, &bus, 4);
        let lies = Arc::new(Mutex::new(lies));
        let requests = Arc::default();
        Self { host, kernel, bus, hub, stack, lies, keys: None, net: None, queue: None, requests }
    }

    /// Port 1 of the root has the hub, and 2 the disk that is sound; the others are behind the hub.
    fn plug(&mut self, which: usize) {
        match which {
            0 => self.hub.plug_into_root_as(1, Lying::new(self.hub.clone(), &self.lies)),
            1 => self.hub.plug(1, Lying::new(StorageModel::new(vec![0; MEDIUM]).0, &self.lies)),
            2 => {
                let (model, state) = HidModel::new(KEYBOARD, 1);
                self.keys = Some(state);
                self.hub.plug(2, Lying::new(model, &self.lies));
            }
            ncm => {
                let (model, state) = NetModel::new(ncm == 3);
                self.net = Some(state);
                self.hub.plug(3, Lying::new(model, &self.lies));
            }
        }
    }

    fn unplug(&self, which: usize) {
        match which {
            0 => self.bus.unplug(1),
            port => self.hub.unplug(port.min(3) as u8),
        };
    }

    /// Lets so much time pass.
    fn run(&self, ns: u64) {
        let end_ns = self.host.monotonic_ns() + ns;
        loop {
            watch::step();
            self.stack.poll();
            let now_ns = self.host.monotonic_ns();
            if now_ns >= end_ns {
                return;
            }
            let next_ns = self.stack.next_poll_ns().unwrap_or(end_ns);
            self.host.advance(next_ns.clamp(now_ns + MS, now_ns + 20 * MS) - now_ns);
        }
    }

    fn until(&self, limit_ns: u64, what: &str, done: impl Fn(&Self) -> bool) {
        let end_ns = self.host.monotonic_ns() + limit_ns;
        while !done(self) {
            assert!(self.host.monotonic_ns() < end_ns, "{what}: {:#?}", self.stack.tree());
            self.run(50 * MS);
        }
    }

    fn submit(&self, disk: &dyn BlockDevice, op: Op, sector: u64, fill: u8) {
        let buffers = if op == Op::Flush { Vec::new() } else { vec![vec![fill; 4096].into()] };
        self.requests.lock().expect("no panic").under_way += 1;
        let request = Request { op, sector, buffers, done: Arc::new(Back(self.requests.clone())), tag: 0 };
        if disk.submit_and_poll(request).is_err() {
            self.requests.lock().expect("no panic").under_way -= 1;
        }
    }

    fn act(&mut self, input: &mut Input) {
        match input.below(12) {
            0 => self.run(MS),
            1 => self.run(200 * MS),
            2 => self.run(5_000 * MS),
            3 | 4 => self.unplug(input.below(4)),
            5 | 6 => {
                let which = input.below(5);
                self.unplug(which);
                self.plug(which);
            }
            7 => {
                let keys = input.bytes(8);
                if let Some(state) = &self.keys {
                    state.lock().expect("no panic").reports.push_back(keys);
                }
                self.bus.kick();
            }
            8 => {
                let len = input.below(2048);
                let frame = input.bytes(len);
                if let Some(state) = &self.net {
                    state.lock().expect("no panic").to_host.push_back(frame);
                }
                self.bus.kick();
            }
            9 => self.network(),
            op => {
                for disk in self.kernel.block_devices() {
                    let sector = input.below(MEDIUM / 512 + 1) as u64 & !7;
                    // The disk that is sound keeps what it has.
                    let write = op == 11 && disk.info().name != SOUND;
                    self.submit(&*disk, if write { Op::Write } else { Op::Read }, sector, 0x5a);
                    if write {
                        self.submit(&*disk, Op::Flush, 0, 0);
                    }
                }
            }
        }
    }

    /// Sends a frame and takes what came.
    fn network(&mut self) {
        let Some(nic) = self.kernel.nics().first().cloned() else {
            self.queue = None;
            return;
        };
        if self.queue.is_none() {
            self.queue = nic.open_queue(0, Arc::new(Signal::new())).ok();
        }
        let Some(queue) = &mut self.queue else { return };
        let _ = queue.transmit(60, TxMeta::default(), &mut |room| room.fill(7));
        queue.flush();
        let longest = usize::from(nic.info().mtu) + 18;
        queue.receive(64, &mut |frame, _| assert!(frame.len() <= longest.max(2048), "{} bytes", frame.len()));
    }
}

/// The name of the disk that is sound.
const SOUND: &str = "usb1-2";

fn pattern() -> Vec<u8> {
    (0..MEDIUM).map(|at| (at / 512) as u8 ^ at as u8).collect()
}

/// One execution.
pub fn run(data: &[u8]) {
    let mut actions = Input::new(data);
    let lies = actions.split();
    let mut world = World::new(lies);
    world.bus.plug(2, StorageModel::new(pattern()).0);
    (0..4).for_each(|which| world.plug(which));
    for _ in 0..ACTIONS {
        if actions.is_empty() {
            break;
        }
        world.act(&mut actions);
    }

    world.until(SETTLE_NS, "the stack looks for ever", |world| world.stack.settled());
    let done = |world: &World| world.requests.lock().expect("no panic").under_way == 0;
    world.until(SETTLE_NS, "requests never end", done);
    let disks = world.kernel.block_devices();
    let sound = disks.iter().find(|disk| disk.info().name == SOUND).expect("a sound disk beside bad ones");
    world.submit(&**sound, Op::Read, 8, 0);
    world.until(SETTLE_NS, "a read of a sound disk never ends", done);
    let last = world.requests.lock().expect("no panic").last.take();
    assert!(
        last == Some((Ok(()), pattern()[4096..8192].to_vec())),
        "a sound disk beside bad ones does not read"
    );

    // All gone: nothing is left of it.
    world.queue = None;
    drop(disks);
    world.bus.unplug(1);
    world.bus.unplug(2);
    world.until(SETTLE_NS, "what is gone stays", |world| {
        world.stack.settled() && world.kernel.block_devices().is_empty() && world.kernel.nics().is_empty()
    });
    assert!(world.kernel.inputs().is_empty(), "an input device that is gone is still there");
    let World { host, kernel, bus, stack, .. } = world;
    kernel.stop();
    host.run_rest();
    kernel.shutdown();
    drop(stack);
    bus.clear();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the harness asserts is worth nothing if the devices never come up.
    #[test]
    fn honest_devices_all_work() {
        let mut world = World::new(Input::default());
        (0..4).for_each(|which| world.plug(which));
        world.run(5_000 * MS);
        assert!(world.stack.settled());
        let (disks, nics) = (world.kernel.block_devices(), world.kernel.nics());
        assert_eq!((disks.len(), nics.len(), world.kernel.inputs().len()), (1, 1, 1));
        world.network();
        world.run(100 * MS);
        assert_eq!(world.net.as_ref().map(|net| net.lock().unwrap().from_host.len()), Some(1));
        world.submit(&*disks[0], Op::Write, 8, 9);
        world.run(1_000 * MS);
        assert_eq!(world.requests.lock().unwrap().last.take().map(|last| last.0), Some(Ok(())));
    }

    #[test]
    fn a_device_that_lies_is_given_up() {
        // Each answer of every device is changed, or nobody ever answers.
        for lie in [0xc0, 0xe0, 0xe8, 0xf0, 0xf4, 0xf7, 0xfb, 0xfd, 0xff] {
            let lies = [&[0xff, 0x03][..], &[lie; 0x3ff][..], &[2, 5, 1, 2, 11, 1, 9, 2]].concat();
            crate::Target::named("usb_devices").execute(&lies);
        }
    }
}
