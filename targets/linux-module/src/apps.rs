//! The applications that are linked in.

use crate::domain::Domain;
use crate::{LinuxHost, conformance};
use alloc::string::String;
use alloc::sync::Arc;
use anykernel::Kernel;
use hypercall::ExitStatus;

/// An application.
#[derive(Clone, Copy)]
pub(crate) struct App {
    name: &'static str,
    /// Runs until it has done its work or the instance stops.
    pub(crate) main: fn(&Arc<Kernel<Domain>>) -> ExitStatus,
    /// Without file systems and network.
    pub(crate) bare: bool,
}

const fn app(name: &'static str, main: fn(&Arc<Kernel<Domain>>) -> ExitStatus) -> App {
    App { name, main, bare: false }
}

const APPS: &[App] = &[
    app("httpd", httpd::main),
    app("files", files::main),
    app("selftest", selftest::main),
    app("usb", usb_app::main),
    app("netbench", netbench::main),
    app("contractbench", contractbench::main),
    App { name: "conformance", main: conformance::main, bare: true },
    App { name: "crash", main: crash, bare: false },
];

/// Panics as a component might, while other threads run and hold things: for trying what the module does then.
fn crash(kernel: &Arc<Kernel<Domain>>) -> ExitStatus {
    let lock = Arc::new(anykernel::sync::Mutex::new(LinuxHost, ()));
    let _held = lock.lock();
    let waiter = lock.clone();
    // It waits for ever, unless the end of the domain ends it.
    let waits = kernel.spawn("crash-waits", None, move || drop(waiter.lock()));
    if let Err(error) = waits {
        log::error!("crash: {error}");
        return ExitStatus::Failure;
    }
    panic!("as asked for");
}

/// The application of that name, or a line for a person.
pub(crate) fn find(name: &str) -> Result<App, String> {
    APPS.iter().find(|app| app.name == name).copied().ok_or_else(|| {
        let known: alloc::vec::Vec<&str> = APPS.iter().map(|app| app.name).collect();
        alloc::format!("there is no application {name:?}: this module has {}", known.join(", "))
    })
}
