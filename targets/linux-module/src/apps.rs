//! The applications that are linked in.

use crate::LinuxHost;
use alloc::string::String;
use alloc::sync::Arc;
use anykernel::Kernel;
use hypercall::ExitStatus;

/// Runs until it has done its work or the instance stops.
pub(crate) type App = fn(&Arc<Kernel<LinuxHost>>) -> ExitStatus;

const APPS: &[(&str, App)] = &[
    ("httpd", httpd::main::<LinuxHost>),
    ("selftest", selftest::main::<LinuxHost>),
    ("netbench", netbench::main::<LinuxHost>),
    ("contractbench", contractbench::main::<LinuxHost>),
];

/// The application of that name, or a line for a person.
pub(crate) fn find(name: &str) -> Result<App, String> {
    APPS.iter().find(|(known, _)| *known == name).map(|(_, app)| *app).ok_or_else(|| {
        let known: alloc::vec::Vec<&str> = APPS.iter().map(|(name, _)| *name).collect();
        alloc::format!("there is no application {name:?}: this module has {}", known.join(", "))
    })
}
