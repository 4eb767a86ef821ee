//! What each target does above the contract, from its first call to its last. It must make the same calls.

use super::file::Header;
use super::host::Replayed;
use crate::apps;
use crate::instance::{settle, start_components, start_usb};
use anykernel::{Kernel, StartError};
use anykernel_usb::{Options, UsbStack};
use hypercall::layers::recorded::{ENTER_STOP, Event};
use hypercall::{ExitStatus, ThreadSpec, Threads};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// What somebody outside does to a domain: ask it to end.
#[derive(Clone, Default)]
pub(super) struct Stop(Arc<Mutex<Weak<Kernel<Replayed>>>>);

impl Stop {
    fn set(&self, kernel: &Arc<Kernel<Replayed>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(kernel);
    }

    pub(super) fn act(&self, why: u64) {
        let kernel = self.0.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        if let Some(kernel) = kernel.filter(|_| why == ENTER_STOP) {
            kernel.stop();
        }
    }
}

/// The life of the first thread.
pub(super) fn run(header: &Header, host: Replayed, stop: &Stop) {
    let kernel = Kernel::new(host, header.config.clone());
    stop.set(&kernel);
    match header.target.as_str() {
        "rumprun" => rumprun(&kernel, header.usb),
        "linux-module" => linux_module(&kernel),
        _ => userspace(&kernel),
    }
    // The module lets go of it only when its threads have left. What goes with it makes calls, too.
    let kernel = (header.target == "linux-module").then_some(kernel);
    host.0.leave(Event::End);
    drop(kernel);
}

fn app(kernel: &Arc<Kernel<Replayed>>) -> ExitStatus {
    let name = kernel.config().app.first().cloned().unwrap_or_default();
    apps::run(&name, kernel).unwrap_or(ExitStatus::Usage)
}

fn rumprun(kernel: &Arc<Kernel<Replayed>>, usb: bool) {
    let started = anykernel_virtio::probe(kernel)
        .and_then(|()| if usb { xhci(kernel) } else { Ok(()) })
        .and_then(|()| anykernel_vfs::start(kernel))
        .and_then(|()| anykernel_net::start(kernel));
    if started.is_ok() {
        app(kernel);
        kernel.shutdown();
    }
}

fn platform_usb(kernel: &Arc<Kernel<Replayed>>) -> Result<(), StartError> {
    Options::of_config(kernel.config()).map_or(Ok(()), |options| start_usb(kernel, options))
}

fn xhci(kernel: &Arc<Kernel<Replayed>>) -> Result<(), StartError> {
    let mut found = Vec::new();
    anykernel_xhci::probe(kernel, &mut |controller, signal| found.push((controller, signal)))?;
    for (bus, (controller, signal)) in (1..=u8::MAX).zip(found) {
        settle(kernel, UsbStack::start(kernel, controller, signal, bus, Options::default())?);
    }
    Ok(())
}

fn linux_module(kernel: &Arc<Kernel<Replayed>>) {
    let components = [
        platform_usb,
        anykernel_vfs::hostblk::register,
        anykernel_vfs::start,
        anykernel_net::hostlink::register,
        anykernel_net::start,
    ];
    let started: Result<(), StartError> = components.iter().try_for_each(|start| start(kernel));
    let host = kernel.host();
    let running = kernel.clone();
    let thread = started.ok().and_then(|()| {
        host.spawn(
            ThreadSpec { name: "ak-app", cpu: None },
            Box::new(move || {
                let _ = app(&running);
            }),
        )
        .ok()
    });
    if thread.is_some() {
        host.outside();
    }
    kernel.stop();
    if let Some(thread) = thread {
        // Joined once.
        let _ = host.join(thread);
    }
    kernel.shutdown();
}

fn userspace(kernel: &Arc<Kernel<Replayed>>) {
    if platform_usb(kernel).and_then(|()| start_components(kernel)).is_ok() {
        app(kernel);
        kernel.counters();
    }
    kernel.shutdown();
}
