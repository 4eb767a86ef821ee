//! What the C half calls: the life of the domain from load to unload.
#![expect(unsafe_code, reason = "called from C")]

use crate::domain::{self, Domain};
use crate::ffi::{self, Abi};
use crate::host::{Entry, LinuxHost};
use crate::{apps, logger};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::config::Config;
use anykernel::{Kernel, StartError};
use anykernel_usb::{Options, UsbStack};
use core::ffi::c_void;
use core::sync::atomic::{AtomicBool, Ordering};
use hypercall::layers::{Channel, ChannelKind};
use hypercall::{Error, Params, Signal, ThreadSpec, Threads};

const EINVAL: i32 = 22;

/// Raised when the module is to be unloaded.
static STOP: Signal = Signal::new();
static STOPPING: AtomicBool = AtomicBool::new(false);

/// Whether both halves were made for each other: 0 or -EINVAL.
///
/// # Safety
/// `abi` points to at least its first 24 bytes, which every version has.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ak_rust_check(abi: *const c_void) -> i32 {
    // SAFETY: by the caller's promise.
    let abi = unsafe { &*abi.cast::<Abi>() };
    if abi.fits() { 0 } else { -EINVAL }
}

/// The whole life of the first thread.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn ak_rust_main() {
    logger::install(log::LevelFilter::Info);
    let domain = match start() {
        Ok(domain) => domain,
        Err(line) => {
            log::error!("{line}");
            ffi::ak_started(-EINVAL);
            return;
        }
    };
    ffi::ak_started(0);
    domain::outside(&domain.kernel.host(), || {
        loop {
            let seen = STOP.count();
            if STOPPING.load(Ordering::Acquire) {
                break;
            }
            STOP.wait(&LinuxHost, seen, None);
        }
    });
    domain.end();
}

/// The whole life of every other thread.
///
/// # Safety
/// `entry` is what [`LinuxHost::spawn`](Threads::spawn) gave to the C half, and is given back once.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ak_rust_thread(entry: *mut c_void) {
    // SAFETY: by the caller's promise it is the box that `spawn` leaked.
    let entry = unsafe { Box::from_raw(entry.cast::<Entry>()) };
    entry();
}

/// Asks [`ak_rust_main`] to return. Context: any.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn ak_rust_stop() {
    STOPPING.store(true, Ordering::Release);
    STOP.raise(&LinuxHost);
}

/// Raises the signal of a link. Context: any.
///
/// # Safety
/// `signal` was given to `ak_link_open` and is not yet given back by `ak_link_close`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ak_rust_raise(signal: *const c_void) {
    // SAFETY: by the caller's promise the reference that `link_open` leaked keeps it alive.
    unsafe { &*signal.cast::<Signal>() }.raise(&LinuxHost);
}

/// A panic ends the domain, not the kernel: every thread of it ends at its next call, and the module can be unloaded.
#[cfg(target_os = "none")]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    use hypercall::{Exit, ExitStatus};
    match info.location() {
        Some(at) => logger::line(format_args!("panic at {at}: {}", info.message())),
        None => logger::line(format_args!("panic: {}", info.message())),
    }
    LinuxHost.exit(ExitStatus::Panic)
}

struct Running {
    kernel: Arc<Kernel<Domain>>,
    app: Option<hypercall::ThreadId>,
    channel: Option<Channel>,
}

impl Running {
    fn end(self) {
        self.kernel.stop();
        if let Some(app) = self.app {
            // It is ours and joined once, so there is nothing that could fail.
            let _ = self.kernel.host().join(app);
        }
        self.kernel.shutdown();
        let host = self.kernel.host();
        domain::leave(&host);
        // Nothing uses the host any more.
        drop(self.kernel);
        domain::give_back(host);
        if let Some(channel) = self.channel {
            domain::finish(channel);
        }
    }
}

fn read_config() -> Result<Config, String> {
    const STEP: usize = 4096;
    const MOST: usize = 1 << 20;
    let mut text = Vec::new();
    loop {
        text.resize(text.len() + STEP.max(text.len()), 0);
        match LinuxHost.param("config", &mut text) {
            Ok(len) => {
                text.truncate(len);
                break;
            }
            Err(Error::BufferTooSmall) if text.len() < MOST => {}
            Err(Error::NotFound) => return Ok(Config::default()),
            Err(error) => return Err(alloc::format!("configuration: {error}")),
        }
    }
    let text = core::str::from_utf8(&text).map_err(|_| String::from("configuration: not UTF-8"))?;
    Config::parse(text)
}

fn start() -> Result<Running, String> {
    let config = read_config()?;
    let level = config.log.parse().map_err(|_| {
        alloc::format!("configuration: log is {:?}: write off, error, warn, info, debug or trace", config.log)
    })?;
    logger::install(level);
    let app = config.app.first().map(|name| apps::find(name)).transpose()?;
    let (host, channel) =
        domain::host().ok_or("too little memory in one piece for a trace: load the module sooner")?;
    let kernel = Kernel::new(host, config);
    let mut domain = Running { kernel: kernel.clone(), app: None, channel };
    let components = match app {
        Some(app) if app.bare => Ok(()),
        _ => start_components(&kernel),
    };
    // A replay would not tell them.
    let notes =
        channel.filter(|channel| channel.kind() == ChannelKind::Trace).and_then(|channel| channel.notes());
    let told = notes
        .map_or(Ok(()), |notes| kernel.report_counters(notes))
        .map_err(|error| alloc::format!("{error}"));
    let started = components.and(told).and_then(|()| match app {
        Some(app) => start_app(&kernel, app).map(Some),
        None => Ok(None),
    });
    match started {
        Ok(app) => {
            domain.app = app;
            Ok(domain)
        }
        Err(line) => {
            drop(kernel);
            domain.end();
            Err(line)
        }
    }
}

/// Starts a stack on Linux's USB devices if the configuration asks for one, and waits until what is to be mounted is there.
fn start_usb(kernel: &Arc<Kernel<Domain>>) -> Result<(), StartError> {
    const PATIENCE_NS: u64 = 10_000_000_000;
    let Some(options) = Options::of_config(kernel.config()) else { return Ok(()) };
    let stack = UsbStack::start_platform(kernel, options)?;
    if !stack.settle(PATIENCE_NS) {
        log::warn!("usb: some devices are still not taken in; going on without them");
    }
    kernel.provide(stack);
    Ok(())
}

fn start_components(kernel: &Arc<Kernel<Domain>>) -> Result<(), String> {
    let components = [
        start_usb,
        anykernel_vfs::hostblk::register,
        anykernel_vfs::start,
        anykernel_net::hostlink::register,
        anykernel_net::start,
    ];
    components.iter().try_for_each(|start| start(kernel)).map_err(|error| alloc::format!("{error}"))
}

fn start_app(kernel: &Arc<Kernel<Domain>>, app: apps::App) -> Result<hypercall::ThreadId, String> {
    let (kernel, running) = (kernel.clone(), kernel);
    let run = move || {
        let status = (app.main)(&kernel);
        if !kernel.stopping() {
            log::info!("the application ended with status {}", status.code());
        }
        ffi::ak_app_ended(u32::from(status.code()));
    };
    let host = running.host();
    host.spawn(ThreadSpec { name: "ak-app", cpu: None }, Box::new(run))
        .map_err(|error| alloc::format!("starting the application: {error}"))
}
