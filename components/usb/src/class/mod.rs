//! Class drivers, and which function of a device gets which.

pub mod hid;
pub mod net;
pub mod storage;

use crate::controller::EndpointKind;
use crate::descriptor::{Configuration, Setting};
use crate::device::{Device, Identity};
use crate::quirks::Quirks;
use crate::stack::{Busy, Shared};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::future::Future;
use hypercall::Host;

/// What a setting of an interface is to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Function {
    /// SCSI over the bulk-only transport.
    Storage,
    /// Reports.
    Hid,
    /// Frames, one in a transfer.
    Ecm,
    /// Frames, many in a transfer.
    Ncm,
}

impl Function {
    fn of(setting: &Setting) -> Option<Self> {
        match setting.class {
            // 6: SCSI; 2 and 5 (ATAPI) speak it too. Protocol 0x62 is UAS, which is left alone for this one.
            [8, 2 | 5 | 6, 0x50] => Some(Self::Storage),
            [3, ..] => Some(Self::Hid),
            [2, 6, _] => Some(Self::Ecm),
            [2, 0x0d, _] => Some(Self::Ncm),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Storage => "storage",
            Self::Hid => "hid",
            Self::Ecm => "cdc-ecm",
            Self::Ncm => "cdc-ncm",
        }
    }
}

/// USB attached SCSI (UAS 1.0): commands and data on pipes of their own, with streams.
const UAS: [u8; 3] = [8, 6, 0x62];
const UAS_ONLY: &str =
    "it speaks UAS only, which is not supported: use a disk that also has the bulk-only transport";

/// The functions of a configuration: the first setting of each interface that a driver knows.
fn functions(configuration: &Configuration) -> Vec<(Function, &Setting)> {
    let mut found: Vec<(Function, &Setting)> = Vec::new();
    for setting in &configuration.settings {
        let taken = found.iter().any(|(_, other)| other.interface == setting.interface);
        if let Some(function) = Function::of(setting)
            && !taken
        {
            found.push((function, setting));
        }
    }
    found
}

/// The configuration of which most functions have a driver; the first of several.
pub(crate) fn choose(identity: &Identity) -> usize {
    let scores = identity.configurations.iter().map(|one| functions(one).len());
    let best = scores.enumerate().max_by_key(|(index, score)| (*score, usize::MAX - index));
    best.map_or(0, |(index, _)| index)
}

/// Whether there is a driver for anything in it.
pub(crate) fn has_driver(configuration: &Configuration) -> bool {
    !functions(configuration).is_empty()
}

/// Starts the drivers of a device. Each holds `busy` until it has found out what there is.
pub(crate) fn start<H: Host>(shared: &Arc<Shared<H>>, device: &Arc<Device<H>>, busy: &Busy<H>) {
    if device.identity.quirks.contains(Quirks::IGNORE_DEVICE) {
        return;
    }
    let Some(configuration) = device.configuration() else { return };
    let functions = functions(configuration);
    for setting in configuration.settings.iter().filter(|setting| setting.class == UAS) {
        if functions.iter().all(|(_, one)| one.interface != setting.interface) {
            log::warn!("usb {}: {UAS_ONLY}", device.identity.path);
            shared.set_refused(device.identity.path, setting.interface, "storage", UAS_ONLY.into());
        }
    }
    for (function, setting) in functions {
        let (shared, device, setting, busy) = (shared.clone(), device.clone(), setting.clone(), busy.clone());
        // There from the start, so that a device does not pass for lost while others of its drivers still begin.
        shared.set_driver(device.identity.path, setting.interface, function.name(), String::new());
        match function {
            Function::Storage => run(shared, device, setting, function, busy, storage::run),
            Function::Hid => run(shared, device, setting, function, busy, hid::run),
            Function::Ecm | Function::Ncm => run(shared, device, setting, function, busy, net::run),
        }
    }
}

/// Runs a driver in a task: claims the interface, puts it into its setting, and notes how it ends.
fn run<H: Host, F>(
    shared: Arc<Shared<H>>,
    device: Arc<Device<H>>,
    setting: Setting,
    function: Function,
    busy: Busy<H>,
    driver: impl FnOnce(Arc<Shared<H>>, Arc<Device<H>>, Setting, Busy<H>) -> F + Send + 'static,
) where
    F: Future<Output = Result<(), String>> + Send + 'static,
{
    let engine = shared.engine.clone();
    engine.spawn(async move {
        let interface = setting.interface;
        let result = match device.claim(interface).await {
            Ok(()) if setting.alternate != 0 => device.set_alternate(interface, setting.alternate).await,
            other => other,
        };
        let result = match result {
            Ok(()) => driver(shared.clone(), device.clone(), setting, busy).await,
            Err(failure) => Err(alloc::format!("taking its interface: {failure}")),
        };
        if let Err(why) = result
            && !device.is_gone()
        {
            shared.driver_failed(&device, interface, function.name(), why);
        }
    });
}

/// Whether a setting has a bulk endpoint in each direction.
pub(crate) fn has_bulk_pair(setting: &Setting) -> bool {
    [false, true].into_iter().all(|is_in| setting.endpoint(EndpointKind::Bulk, is_in).is_some())
}
