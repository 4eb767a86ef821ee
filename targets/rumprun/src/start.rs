//! From memory to the application: brings up what boot left and runs `application`.

use crate::boot::start_info::StartInfo;
use crate::cpu::{self, smp};
use crate::domain::{self, Domain};
use crate::host::Machine;
use crate::{bus, interrupts, thread, time};
use alloc::{format, string::String, sync::Arc, vec};
use anykernel::{Kernel, config::Config};
use hypercall::{ExitStatus, ThreadSpec};

unsafe extern "Rust" {
    /// What the image is for; defined by [`crate::image`].
    safe fn anykernel_application(kernel: &Arc<Kernel<Domain>>) -> ExitStatus;
}

/// A step of the start that must not fail.
fn must<T, E: core::fmt::Display>(what: &str, result: Result<T, E>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("boot: {what}: {error}"),
    }
}

/// Goes on after memory is set up, on the boot stack.
pub(crate) fn start(info: &'static StartInfo) -> ! {
    interrupts::init();
    // SAFETY: once on this CPU, with interrupts off.
    must("descriptor tables", unsafe { cpu::descriptors::load() });
    crate::console::start_logging(log::LevelFilter::Info);

    let platform = bus::discover(info);
    must("interrupt controller", interrupts::apic::init());
    interrupts::apic::enable();
    let boot_apic = interrupts::apic::id();
    cpu::this().apic_id.set(boot_apic);
    for (at, first_line) in &platform.io_apics {
        if let Err(error) = interrupts::ioapic::add(*at, *first_line) {
            log::warn!("I/O APIC at {at:#x}: {error}");
        }
    }
    if let Some((port, value)) = platform.power_off {
        crate::exit::set_power_off(port, value);
    }
    must("clock", time::init(platform.pm_timer));
    bus::pci::init(platform.ecam);

    let others = platform.cpus.into_iter().filter(|id| *id != boot_apic).collect();
    let starting = must("starting CPUs", smp::start(others));
    let idle = must("idle thread", thread::create_idle(0));
    cpu::this().scheduler.set_idle(idle);
    let main = move || {
        if let Some(starting) = starting {
            starting.finish();
        }
        crate::exit::exit(run());
    };
    must("main thread", thread::spawn(ThreadSpec { name: "main", cpu: None }, alloc::boxed::Box::new(main)));
    // SAFETY: the idle thread is fresh and this CPU's; interrupts are off.
    unsafe { thread::run_first(idle) }
}

/// Reads the configuration parameter.
fn configuration() -> Result<Config, String> {
    let mut buffer = vec![0; 4096];
    let len = loop {
        match hypercall::Params::param(&Machine, "config", &mut buffer) {
            Ok(len) => break len,
            Err(hypercall::Error::BufferTooSmall) if buffer.len() < 1 << 20 => {
                buffer.resize(buffer.len() * 4, 0)
            }
            Err(hypercall::Error::NotFound) => return Ok(Config::default()),
            Err(error) => return Err(format!("configuration: {error}")),
        }
    };
    let text = core::str::from_utf8(&buffer[..len]).map_err(|_| String::from("configuration: not UTF-8"))?;
    Config::parse(text)
}

/// The main thread: sets up the kernel, its drivers and stacks, and runs the application.
fn run() -> ExitStatus {
    let config = match configuration() {
        Ok(config) => config,
        Err(line) => {
            log::error!("{line}");
            return ExitStatus::Usage;
        }
    };
    match config.log.parse() {
        Ok(level) => log::set_max_level(level),
        Err(_) => {
            log::error!(
                "configuration: log level '{}': use off, error, warn, info, debug or trace",
                config.log
            );
            return ExitStatus::Usage;
        }
    }
    let Some((host, notes)) = domain::host() else {
        log::error!("too little memory for a trace: give the machine more (anykernel run --memory)");
        return ExitStatus::Failure;
    };
    let kernel = Kernel::new(host, config);
    #[cfg(feature = "drivers")]
    if let Err(error) = crate::console::listen(&kernel).and_then(|()| drivers(&kernel)) {
        log::error!("{error}");
        return ExitStatus::Failure;
    }
    if let Some(notes) = notes
        && let Err(error) = kernel.report_counters(notes)
    {
        log::error!("{error}");
        return ExitStatus::Failure;
    }
    let entry = crate::boot::entry_tsc();
    log::debug!("{} ticks from the first instruction to main", crate::cpu::regs::rdtsc() - entry);
    let status = anykernel_application(&kernel);
    kernel.shutdown();
    status
}

/// Finds the devices and starts the stacks on them.
#[cfg(feature = "drivers")]
fn drivers(kernel: &Arc<Kernel<Domain>>) -> Result<(), anykernel::StartError> {
    anykernel_virtio::probe(kernel)?;
    #[cfg(feature = "usb")]
    usb(kernel)?;
    anykernel_vfs::start(kernel)?;
    anykernel_net::start(kernel)?;
    Ok(())
}

/// Starts a stack on each USB host controller, and waits until what is plugged in is taken in, so that it can be mounted.
#[cfg(feature = "usb")]
fn usb(kernel: &Arc<Kernel<Domain>>) -> Result<(), anykernel::StartError> {
    use anykernel_usb::{Options, UsbStack};
    const PATIENCE_NS: u64 = 10_000_000_000;
    let mut found = alloc::vec::Vec::new();
    anykernel_xhci::probe(kernel, &mut |controller, signal| found.push((controller, signal)))?;
    for (bus, (controller, signal)) in (1..=u8::MAX).zip(found) {
        let stack = UsbStack::start(kernel, controller, signal, bus, Options::default())?;
        if !stack.settle(PATIENCE_NS) {
            log::warn!("usb{bus}: some devices are still not taken in; going on without them");
        }
        kernel.provide(stack);
    }
    Ok(())
}
