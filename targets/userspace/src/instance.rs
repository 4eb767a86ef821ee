//! Instances: a kernel with its host, any number of them in one process.

use crate::host::{ConsoleSink, DomainExit, HostOwner, HostSetup, PosixHost};
use crate::link::Pcap;
use crate::usb::UsbBus;
use crate::{HostDisk, Link};
use anykernel::config::Config;
use anykernel::{Kernel, StartError};
use anykernel_usb::{Options, UsbStack};
use hypercall::{ExitStatus, Host, HostBlock, HostLink, HostUsb};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

/// How long devices may take until they can be mounted.
const USB_PATIENCE_NS: u64 = 10_000_000_000;

/// What an instance is to be; see [`Instance::builder`].
#[derive(Debug, Default)]
pub struct Builder {
    setup: HostSetup,
    config: Config,
    usb: Options,
}

impl Builder {
    /// Shown before its console lines.
    pub fn name(mut self, name: &str) -> Self {
        self.setup.name = name.into();
        self
    }

    /// Virtual CPUs: stack shards, queues. 1 unless said otherwise.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.setup.cpus = cpus;
        self
    }

    /// Binds each virtual CPU to a host CPU, if there are enough.
    pub fn pin(mut self, pin: bool) -> Self {
        self.setup.pin = pin;
        self
    }

    /// Bytes of memory for caches and buffers. A quarter of the machine's unless said otherwise.
    pub fn memory(mut self, bytes: u64) -> Self {
        self.setup.memory = bytes;
        self
    }

    /// Mounts, interfaces, limits.
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// The next disk: `disk0`, `disk1`, ...
    pub fn disk(mut self, disk: HostDisk) -> Self {
        self.setup.disks.push(disk);
        self
    }

    /// The next link: `nic0`, `nic1`, ...
    pub fn link(mut self, link: Link) -> Self {
        self.setup.links.push(link);
        self
    }

    /// USB devices of this machine, as far as `options` claim them.
    pub fn usb(mut self, bus: Arc<UsbBus>, options: Options) -> Self {
        self.setup.usb = Some(bus);
        self.usb = options;
        self
    }

    /// Records the frames of all links.
    pub fn pcap(mut self, pcap: Arc<Pcap>) -> Self {
        self.setup.pcap = Some(pcap);
        self
    }

    /// Where the console goes; standard error unless said otherwise.
    pub fn console(mut self, sink: ConsoleSink) -> Self {
        self.setup.console = sink;
        self
    }

    /// A parameter beside `config`.
    pub fn param(mut self, key: &str, value: &str) -> Self {
        self.setup.params.insert(key.into(), value.into());
        self
    }

    /// Starts it: vfs always, net if there is a link.
    pub fn start(self) -> Result<Instance, StartError> {
        self.start_on(|host| host)
    }

    /// As [`Builder::start`], on a host around the host, such as one that traces.
    pub fn start_on<H: Host + HostBlock + HostLink + HostUsb>(
        self,
        wrap: impl FnOnce(PosixHost) -> H,
    ) -> Result<Instance<H>, StartError> {
        self.start_entered(wrap, |_, body| body())
    }

    /// As [`Builder::start_on`]; who is no thread of the instance and calls it does so through `enter`.
    pub fn start_entered<H: Host + HostBlock + HostLink + HostUsb>(
        mut self,
        wrap: impl FnOnce(PosixHost) -> H,
        enter: Enter<H>,
    ) -> Result<Instance<H>, StartError> {
        self.setup.params.insert("config".into(), self.config.to_json());
        let owner = HostOwner::new(self.setup);
        let kernel = Kernel::new(wrap(owner.host()), self.config);
        let stop = Arc::downgrade(&kernel);
        owner.set_stop_hook(move || {
            if let Some(kernel) = stop.upgrade() {
                enter(&kernel.host(), &|| kernel.stop());
            }
        });
        let instance = Instance { kernel: Some(kernel), owner };
        // On an error the instance is dropped here, which takes down what has started.
        if instance.host().usb_bus().is_some() {
            start_usb(instance.kernel(), self.usb)?;
        }
        start_components(instance.kernel())?;
        Ok(instance)
    }
}

/// Runs a function in a domain, on a thread that is none of the domain's.
pub type Enter<H> = fn(&H, &dyn Fn());

/// A running instance. [`Instance::shutdown`] or dropping it gives everything back: threads, descriptors, memory.
pub struct Instance<H: Host = PosixHost> {
    /// `None` only while it is dropped.
    kernel: Option<Arc<Kernel<H>>>,
    owner: HostOwner,
}

impl<H: Host> std::fmt::Debug for Instance<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Instance({:?})", self.owner)
    }
}

impl Instance {
    /// Begins an instance.
    pub fn builder() -> Builder {
        Builder::default()
    }
}

/// Starts the USB stack of an instance on the platform's devices.
pub(crate) fn start_usb<H: Host + HostUsb>(
    kernel: &Arc<Kernel<H>>,
    options: Options,
) -> Result<(), StartError> {
    settle(kernel, UsbStack::start_platform(kernel, options)?);
    Ok(())
}

/// Waits until what is plugged in is taken in, so that it can be mounted.
pub(crate) fn settle<H: Host>(kernel: &Arc<Kernel<H>>, stack: Arc<UsbStack<H>>) {
    if !stack.settle(USB_PATIENCE_NS) {
        log::warn!("usb: some devices are still not taken in; going on without them");
    }
    kernel.provide(stack);
}

/// Starts the components of an instance: disks if there are any, vfs always, net if there is an interface.
pub fn start_components<H: Host + HostBlock + HostLink>(kernel: &Arc<Kernel<H>>) -> Result<(), StartError> {
    if kernel.host().disk_count() > 0 {
        anykernel_vfs::hostblk::register(kernel)?;
    }
    anykernel_vfs::start(kernel)?;
    if kernel.host().link_count() > 0 {
        anykernel_net::hostlink::register(kernel)?;
    }
    // Also those of USB devices.
    if !kernel.nics().is_empty() {
        anykernel_net::start(kernel)?;
    }
    Ok(())
}

impl<H: Host> Instance<H> {
    /// Its kernel.
    pub fn kernel(&self) -> &Arc<Kernel<H>> {
        self.kernel.as_ref().expect("present until dropped")
    }

    /// Its host, without what is wrapped around it.
    pub fn host(&self) -> PosixHost {
        self.owner.host()
    }

    /// Runs an application on the calling thread and says how it, or the whole domain, ended.
    pub fn run(&self, app: impl FnOnce(&Arc<Kernel<H>>) -> ExitStatus) -> ExitStatus {
        let kernel = self.kernel();
        let status = match std::panic::catch_unwind(AssertUnwindSafe(|| app(kernel))) {
            Ok(status) => status,
            Err(payload) => payload.downcast_ref::<DomainExit>().map_or(ExitStatus::Panic, |exit| exit.0),
        };
        self.host().exit_status().unwrap_or(status)
    }

    /// Stops it, waits for its threads, and gives everything back.
    pub fn shutdown(self) {
        drop(self);
    }
}

impl<H: Host> Drop for Instance<H> {
    fn drop(&mut self) {
        if let Some(kernel) = self.kernel.take() {
            kernel.shutdown();
        }
    }
}
