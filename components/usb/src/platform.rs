//! Devices of a platform that owns the host controller ([`hypercall::HostUsb`]): enumeration is done, transfers go to the
//! host, and what blocks there runs on a thread of its own.

mod controller;
mod devices;
mod worker;

use crate::device::Identity;
use crate::stack::{Busy, MANIFEST, Options, UsbStack};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::config::{Config, UsbSelector};
use anykernel::manifest::Capability;
use anykernel::{Kernel, Manifest, StartError};
use controller::PlatformController;
use hypercall::{ContractVersion, Host, HostUsb, Signal, UsbPath};
use worker::Worker;

/// What the driver uses.
pub const PLATFORM_MANIFEST: Manifest = Manifest {
    name: "usb-host",
    summary: "USB devices of a platform that has enumerated them",
    core: &[Capability::Clock, Capability::Threads],
    contracts: &[ContractVersion::CORE, ContractVersion::USB],
};

/// Which of the platform's devices the stack takes for itself. The others are only listed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Claim {
    /// None: for a look around.
    #[default]
    None,
    /// Those that one of these picks.
    Only(Vec<UsbSelector>),
    /// All that it has drivers for.
    All,
}

impl Claim {
    /// Those that a configuration names, and those whose disks it mounts: of `usb1-2.1`, `usb1-2.1p1` or `usb1-2.1l1p2` the one
    /// at 1-2.1.
    pub fn of_config(config: &Config) -> Self {
        let place = |source: &str| {
            let place = source.strip_prefix("usb")?;
            UsbPath::parse(place.split_once(['p', 'l']).map_or(place, |(place, _)| place))
        };
        let mounted = config.mounts.iter().filter_map(|mount| place(&mount.source).map(UsbSelector::Place));
        let named = config.usb.iter().filter_map(|text| UsbSelector::parse(text));
        let picked: Vec<UsbSelector> = mounted.chain(named).collect();
        if picked.is_empty() { Self::None } else { Self::Only(picked) }
    }

    fn wants(&self, device: &Identity) -> bool {
        let picks = |selector: &UsbSelector| match *selector {
            UsbSelector::Place(path) => path == device.path,
            UsbSelector::Product(vendor, product) => {
                (vendor, product) == (device.descriptor.vendor, device.descriptor.product)
            }
            UsbSelector::Class(class) => {
                let settings = device.configurations.iter().flat_map(|one| &one.settings);
                let [of_device, ..] = device.descriptor.class;
                of_device == class || settings.map(|one| one.class).any(|[of_it, ..]| of_it == class)
            }
        };
        match self {
            Self::None => false,
            Self::Only(selectors) => selectors.iter().any(picks),
            Self::All => true,
        }
    }
}

impl<H: Host + HostUsb> UsbStack<H> {
    /// A stack on the devices of the platform, without threads: whoever has it calls [`UsbStack::poll`], and
    /// [`UsbStack::look_around`] after hot plug. Errors: [`StartError::Refused`]. Context: thread. Blocks as the host does.
    pub fn attach_platform(
        kernel: &Arc<Kernel<H>>,
        options: Options,
    ) -> Result<PlatformStack<H>, StartError> {
        kernel.admit(MANIFEST)?;
        kernel.admit(PLATFORM_MANIFEST)?;
        let host = kernel.host();
        let signal = Arc::new(Signal::new());
        let worker = Arc::new(Worker::new(host, signal.clone()));
        let controller = PlatformController::new(host, worker.clone());
        let claim = options.claim.clone();
        let stack = Self::make(kernel, Box::new(controller), signal, options);
        worker.look();
        let (shared, its_worker) = (stack.shared.clone(), worker.clone());
        let busy = Busy::new(&shared);
        stack.shared.engine.spawn(async move { devices::watch(shared, its_worker, claim, busy).await });
        Ok(PlatformStack { stack, worker })
    }

    /// As [`UsbStack::attach_platform`], with two threads that serve it until the kernel stops: one for what blocks on the host.
    /// Errors: as there, and [`StartError::Host`]. Does not wait for devices: see [`UsbStack::settle`].
    pub fn start_platform(kernel: &Arc<Kernel<H>>, options: Options) -> Result<Arc<Self>, StartError> {
        let PlatformStack { stack, worker } = Self::attach_platform(kernel, options)?;
        let host = kernel.host();
        let told = host.usb_watch(Some(worker.signal.clone())).is_ok();
        kernel.raise_on_stop(worker.signal.clone());
        kernel.run_on_stop(move || {
            let _ = host.usb_watch(None);
        });
        let instance = Arc::downgrade(kernel);
        worker.set_running(true);
        let running = worker.clone();
        let started = kernel.spawn("usb-host", None, move || {
            running.run(told, || instance.upgrade().is_none_or(|kernel| kernel.stopping()));
        });
        if let Err(error) = started {
            worker.set_running(false);
            return Err(error);
        }
        stack.spawn_thread(kernel, 0)?;
        Ok(stack)
    }
}

/// A stack on the platform's devices that has no threads.
pub struct PlatformStack<H: Host> {
    /// The stack.
    pub stack: Arc<UsbStack<H>>,
    worker: Arc<Worker<H>>,
}

impl<H: Host + HostUsb> PlatformStack<H> {
    /// Looks whether something was plugged in or unplugged. Context: thread.
    pub fn look_around(&self) {
        self.worker.look();
    }
}
