//! `usb list`.

use crate::{decode, devices, print};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel_usb::controller::Speed;
use anykernel_usb::{Listed, NodeDevice, NodeState};
use hypercall::{ExitStatus, Host};
use serde_json::{Value, json};

/// How to list.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Options {
    verbose: bool,
    json: bool,
}

impl Options {
    pub(crate) fn parse(words: &[&str]) -> Option<Self> {
        let mut options = Self::default();
        for word in words {
            match *word {
                "--verbose" | "-v" => options.verbose = true,
                "--json" => options.json = true,
                _ => return None,
            }
        }
        Some(options)
    }
}

pub(crate) fn run<H: Host>(kernel: &Arc<Kernel<H>>, options: Options) -> ExitStatus {
    for listed in devices(kernel) {
        if options.json {
            print(kernel, &as_json(&listed, options.verbose).to_string());
            continue;
        }
        print(kernel, &as_line(&listed));
        if let (true, Some(device)) = (options.verbose, &listed.node.device) {
            details(device).iter().for_each(|line| print(kernel, line));
        }
    }
    ExitStatus::Success
}

/// What people call a class (USB-IF, defined class codes).
pub(crate) fn class_name(class: u8) -> &'static str {
    match class {
        0x00 => "per interface",
        0x01 => "audio",
        0x02 => "communications",
        0x03 => "HID",
        0x05 => "physical",
        0x06 => "image",
        0x07 => "printer",
        0x08 => "mass storage",
        0x09 => "hub",
        0x0a => "CDC data",
        0x0b => "smart card",
        0x0e => "video",
        0xe0 => "wireless",
        0xef => "miscellaneous",
        0xff => "vendor's own",
        _ => "other",
    }
}

fn state(state: &NodeState) -> (&'static str, Option<&str>) {
    match state {
        NodeState::New => ("new", None),
        NodeState::Configured => ("configured", None),
        NodeState::Failed(why) => ("failed", Some(why)),
    }
}

/// Manufacturer and product, as far as the device has them.
fn title(device: &NodeDevice) -> String {
    let [manufacturer, product, _] = &device.strings;
    let words: Vec<&str> =
        [manufacturer, product].into_iter().map(String::as_str).filter(|s| !s.is_empty()).collect();
    words.join(" ")
}

/// A line of the tree.
pub(crate) fn as_line(listed: &Listed) -> String {
    let indent = "  ".repeat(listed.path.ports().len().saturating_sub(1));
    let mut line = format!("{indent}{}", listed.path);
    if let Some(device) = &listed.node.device {
        let descriptor = &device.descriptor;
        line += &format!(
            "  {:04x}:{:04x}  {}  {}",
            descriptor.vendor,
            descriptor.product,
            device.speed.name(),
            title(device)
        );
    }
    for driver in &listed.node.drivers {
        let failed = if driver.failed { "gave up: " } else { "" };
        line += &format!(
            "  [{}{}{failed}{}]",
            driver.name,
            if driver.note.is_empty() { "" } else { " " },
            driver.note
        );
    }
    match state(&listed.node.state) {
        (_, Some(why)) => line += &format!("  given up: {why}"),
        ("new", None) => line += "  (being looked at)",
        _ => {}
    }
    line
}

fn details(device: &NodeDevice) -> Vec<String> {
    let super_speed = matches!(device.speed, Speed::Super | Speed::SuperPlus);
    let lines = decode::lines(&device.raw, super_speed, &device.strings);
    let place = format!("    address {}", device.address);
    core::iter::once(place).chain(lines.into_iter().map(|line| format!("    {line}"))).collect()
}

fn as_json(listed: &Listed, verbose: bool) -> Value {
    let (state, why) = state(&listed.node.state);
    let drivers: Vec<Value> = listed
        .node
        .drivers
        .iter()
        .map(|one| json!({ "interface": one.interface, "driver": one.name, "note": one.note, "failed": one.failed }))
        .collect();
    let mut object = json!({
        "path": listed.path.to_string(),
        "bus": listed.path.bus,
        "ports": listed.path.ports(),
        "state": state,
        "reason": why,
        "drivers": drivers,
    });
    if let Some(device) = &listed.node.device {
        let descriptor = &device.descriptor;
        object["address"] = json!(device.address);
        object["speed"] = json!(device.speed.name());
        object["vendor"] = json!(format!("{:04x}", descriptor.vendor));
        object["product"] = json!(format!("{:04x}", descriptor.product));
        object["class"] = json!(descriptor.class);
        let [manufacturer, product, serial] = &device.strings;
        object["strings"] = json!({ "manufacturer": manufacturer, "product": product, "serial": serial });
        if verbose {
            let raw: String = device.raw.iter().map(|byte| format!("{byte:02x}")).collect();
            object["descriptors"] = json!(raw);
        }
    }
    object
}
