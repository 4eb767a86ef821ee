//! Human interface devices (HID 1.11): reports of an interrupt endpoint as an input event stream.

mod events;
mod report;
#[cfg(test)]
mod tests;

pub use events::Decoder;
pub use report::{Field, Layout, ReportError};

use crate::controller::EndpointKind;
use crate::descriptor::{Setting, kind};
use crate::device::{Device, zeroed};
use crate::engine::Failure;
use crate::request;
use crate::stack::{Busy, Shared};
use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use anykernel::input::{InputDevice, InputEvent, InputInfo};
use anykernel::sync::Mutex;
use hypercall::{Host, Signal};

/// Events that wait for a reader.
const MAX_EVENTS: usize = 1024;
/// Longest report descriptor that is read.
const MAX_DESCRIPTOR: u16 = 4096;
/// Reports that may fail in a row.
const MOST_FAILURES: u32 = 4;
/// Least time between two reports: what a device sends faster waits in it.
const REST_MS: u64 = 1;

struct Input<H: Host> {
    host: H,
    info: InputInfo,
    queue: Mutex<H, Queue>,
}

#[derive(Default)]
struct Queue {
    events: VecDeque<InputEvent>,
    signal: Option<Arc<Signal>>,
    gone: bool,
}

impl<H: Host> InputDevice for Input<H> {
    fn info(&self) -> &InputInfo {
        &self.info
    }
    fn read(&self) -> Option<InputEvent> {
        self.queue.lock().events.pop_front()
    }
    fn watch(&self, signal: Option<Arc<Signal>>) {
        let mut queue = self.queue.lock();
        queue.signal = signal;
        let waiting = if queue.events.is_empty() && !queue.gone { None } else { queue.signal.clone() };
        drop(queue);
        waiting.into_iter().for_each(|signal| signal.raise(&self.host));
    }
    fn gone(&self) -> bool {
        self.queue.lock().gone
    }
}

/// Takes the device out of the registry however its task ends.
struct Registered<H: Host> {
    shared: Arc<Shared<H>>,
    input: Arc<Input<H>>,
    decoder: Decoder,
}

impl<H: Host> Registered<H> {
    /// Decodes a report (`None`: the device is gone) and hands on what it says.
    fn take(&mut self, report: Option<&[u8]>) {
        let time_ns = self.input.host.monotonic_ns();
        let mut queue = self.input.queue.lock();
        let before = queue.events.len();
        let mut dropped = 0;
        let mut tell = |kind| {
            if queue.events.len() < MAX_EVENTS {
                queue.events.push_back(InputEvent { time_ns, kind });
            } else {
                dropped += 1;
            }
        };
        match report {
            Some(report) => {
                if !self.decoder.report(report, &mut tell) {
                    self.shared.counters.input_errors.increment();
                }
            }
            None => self.decoder.release(&mut tell),
        }
        self.shared.counters.input_dropped.add(dropped);
        queue.gone |= report.is_none();
        let signal = if queue.events.len() > before || queue.gone { queue.signal.clone() } else { None };
        drop(queue);
        signal.into_iter().for_each(|signal| signal.raise(&self.input.host));
    }
}

impl<H: Host> Drop for Registered<H> {
    fn drop(&mut self) {
        self.take(None);
        if let Some(kernel) = self.shared.kernel.upgrade() {
            kernel.remove_input(&self.input.info.name);
        }
    }
}

/// Serves a HID interface until the device is unplugged.
pub(crate) async fn run<H: Host>(
    shared: Arc<Shared<H>>,
    device: Arc<Device<H>>,
    setting: Setting,
    busy: Busy<H>,
) -> Result<(), String> {
    let endpoint = setting.endpoint(EndpointKind::Interrupt, true);
    let endpoint = endpoint.ok_or("it has no interrupt endpoint to the host")?.address;
    let interface = setting.interface;
    let layout = match layout(&device, &setting).await {
        Ok(layout) => layout,
        Err(line) => match boot_layout(&device, &setting).await {
            Some(layout) => layout,
            None => return Err(line),
        },
    };
    // Reports only when something changes; many do not know the request.
    let set_idle = request::setup(0x21, 0x0a, 0, u16::from(interface), 0);
    if device.control_out(set_idle, &[]).await == Err(Failure::Gone) {
        return Ok(());
    }
    let decoder = Decoder::new(layout);
    let (keyboard, pointer) = decoder.kinds();
    let path = device.identity.path;
    let [_, product, _] = &device.identity.strings;
    let info =
        InputInfo { name: format!("usb{path}i{interface}"), product: product.clone(), keyboard, pointer };
    let what = match (keyboard, pointer) {
        (true, false) => "keyboard",
        (false, true) => "pointer",
        (true, true) => "keyboard and pointer",
        _ => "controls",
    };
    log::info!("{}: {what}", info.name);
    shared.set_driver(path, interface, "hid", format!("{} ({what})", info.name));
    let host = shared.engine.host;
    let input = Arc::new(Input { host, info, queue: Mutex::new(host, Queue::default()) });
    let Some(kernel) = shared.kernel.upgrade() else { return Ok(()) };
    kernel.add_input(input.clone());
    drop(kernel);
    drop(busy);
    let room = decoder.layout().longest.max(8);
    let mut registered = Registered { shared: shared.clone(), input, decoder };
    let mut failures = 0;
    loop {
        let data = zeroed(room).map_err(|failure| format!("{failure}"))?;
        let over = device.end_of(device.pipe(endpoint, data, 0)).await;
        match over.result {
            Ok(()) => {
                failures = 0;
                let report = over.data.first().and_then(|data| data.get(..over.actual)).unwrap_or_default();
                registered.take(Some(report));
                shared.engine.sleep_ms(REST_MS).await;
            }
            Err(Failure::Gone) => return Ok(()),
            Err(failure) => {
                shared.counters.input_errors.increment();
                failures += 1;
                if failures > MOST_FAILURES {
                    return Err(format!("its reports fail: {failure}"));
                }
                match device.clear_halt(endpoint).await {
                    Err(Failure::Gone) => return Ok(()),
                    Err(failure) => return Err(format!("its reports fail: {failure}")),
                    Ok(()) => {}
                }
            }
        }
    }
}

/// Reads and parses the report descriptor.
async fn layout<H: Host>(device: &Device<H>, setting: &Setting) -> Result<Layout, String> {
    let hid = setting.extras().find(|(one, _)| *one == kind::HID).map(|(_, bytes)| bytes);
    // The first class descriptor that it lists is that of reports (6.2.1).
    let len = match hid {
        Some([_, _, _, _, _, _, kind::REPORT, low, high, ..]) => u16::from_le_bytes([*low, *high]),
        _ => return Err("it has no HID descriptor".into()),
    };
    let setup = request::get_interface_descriptor(kind::REPORT, setting.interface, len.min(MAX_DESCRIPTOR));
    let bytes = device.control_in(setup).await;
    let bytes = bytes.map_err(|failure| format!("reading its report descriptor: {failure}"))?;
    Layout::parse(&bytes).map_err(|error| {
        let what = match error {
            ReportError::Short => "is cut short",
            ReportError::TooMuch => "claims more than can be",
            ReportError::Size => "has a field of impossible size",
            ReportError::Empty => "has no input",
        };
        format!("its report descriptor {what}")
    })
}

/// Puts a device that has it into the boot protocol (HID 1.11, 7.2.6 and appendix B).
async fn boot_layout<H: Host>(device: &Device<H>, setting: &Setting) -> Option<Layout> {
    let layout = match setting.class {
        [3, 1, 1] => Layout::boot_keyboard(),
        [3, 1, 2] => Layout::boot_mouse(),
        _ => return None,
    };
    let setup = request::setup(0x21, 0x0b, 0, u16::from(setting.interface), 0);
    device.control_out(setup, &[]).await.ok()?;
    Some(layout)
}
