//! `usb keys`.

use crate::print;
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::input::{Axis, InputDevice, InputEvent, InputKind, ascii};
use hypercall::{ExitStatus, Host, Signal};
use serde_json::{Value, json};

/// How often new devices are looked for.
const PERIOD_NS: u64 = 50_000_000;
/// Usages of the two Shift keys.
const SHIFTS: [u16; 2] = [225, 229];

/// A device that is listened to.
struct Source {
    device: Arc<dyn InputDevice>,
    /// Shift keys that are down.
    shifts: usize,
    /// It was unplugged, and has nothing more to say.
    over: bool,
}

/// Prints what is typed and moved, a JSON object for each event, until `count` were seen or the instance is stopped.
pub(crate) fn run<H: Host>(kernel: &Arc<Kernel<H>>, count: Option<u64>) -> ExitStatus {
    let host = kernel.host();
    let signal = Arc::new(Signal::new());
    kernel.raise_on_stop(signal.clone());
    let mut sources: Vec<Source> = Vec::new();
    let mut left = count.unwrap_or(u64::MAX);
    while !kernel.stopping() && left > 0 {
        let seen = signal.count();
        for device in kernel.inputs() {
            if !sources.iter().any(|source| Arc::ptr_eq(&source.device, &device)) {
                device.watch(Some(signal.clone()));
                print(
                    kernel,
                    &json!({ "input": device.info().name, "product": device.info().product }).to_string(),
                );
                sources.push(Source { device, shifts: 0, over: false });
            }
        }
        for source in &mut sources {
            // What comes after this look is seen in the next round.
            source.over = source.device.gone();
            while left > 0
                && let Some(event) = source.device.read()
            {
                print(kernel, &source.line(event).to_string());
                left -= 1;
            }
        }
        sources.retain(|source| !source.over);
        signal.wait(&host, seen, Some(host.monotonic_ns().saturating_add(PERIOD_NS)));
    }
    sources.iter().for_each(|source| source.device.watch(None));
    ExitStatus::Success
}

impl Source {
    fn line(&mut self, event: InputEvent) -> Value {
        let mut line = match event.kind {
            InputKind::Key { usage, pressed } => {
                if SHIFTS.contains(&usage) {
                    self.shifts = if pressed { self.shifts + 1 } else { self.shifts.saturating_sub(1) };
                }
                json!({ "key": usage, "pressed": pressed, "char": ascii(usage, self.shifts > 0) })
            }
            InputKind::Button { number, pressed } => json!({ "button": number, "pressed": pressed }),
            InputKind::Motion { axis, delta } => json!({ "axis": name(axis), "delta": delta }),
            InputKind::Position { axis, value, min, max } => {
                json!({ "axis": name(axis), "value": value, "min": min, "max": max })
            }
            InputKind::Control { page, usage, value } => {
                json!({ "page": page, "usage": usage, "value": value })
            }
        };
        line["device"] = json!(self.device.info().name);
        line["time_ns"] = json!(event.time_ns);
        line
    }
}

fn name(axis: Axis) -> Value {
    match axis {
        Axis::X => json!("x"),
        Axis::Y => json!("y"),
        Axis::Wheel => json!("wheel"),
        Axis::Other(usage) => json!(usage),
    }
}
