//! Descriptors for people: every field by the name that its specification gives it, its value, and what the value means where that
//! is known.
//!
//! The tables are of USB 2.0 chapter 9.6, USB 3.2 chapter 9.6, HID 1.11 chapter 6.2.1, CDC 1.2 chapter 5.2.3, ECM 1.2 chapter 5.4 and
//! NCM 1.0 chapter 5.2.1.

use crate::list::class_name;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// How a field is shown.
#[derive(Clone, Copy)]
enum As {
    Number,
    /// An identifier or bits.
    Hex,
    /// A version: two decimal digits behind the point.
    Version,
    Class,
    /// The address of an endpoint.
    Endpoint,
    /// The kind of an endpoint, in its two lowest bits.
    Kind,
    /// Units of 2 mA, or of 8 mA for a SuperSpeed device.
    Power,
    /// Index of a string of the device: manufacturer, product, serial number.
    Text,
    /// The type of another descriptor.
    Type,
}

use As::*;

/// Name, bytes, form.
type Field = (&'static str, usize, As);

const HEAD: [Field; 2] = [("bLength", 1, Number), ("bDescriptorType", 1, Number)];

/// Title, how far it is indented, and the fields behind the first two.
type Table = (&'static str, usize, &'static [Field]);

const DEVICE: Table = (
    "Device Descriptor",
    0,
    &[
        ("bcdUSB", 2, Version),
        ("bDeviceClass", 1, Class),
        ("bDeviceSubClass", 1, Number),
        ("bDeviceProtocol", 1, Number),
        ("bMaxPacketSize0", 1, Number),
        ("idVendor", 2, Hex),
        ("idProduct", 2, Hex),
        ("bcdDevice", 2, Version),
        ("iManufacturer", 1, Text),
        ("iProduct", 1, Text),
        ("iSerial", 1, Text),
        ("bNumConfigurations", 1, Number),
    ],
);

const CONFIGURATION: Table = (
    "Configuration Descriptor",
    1,
    &[
        ("wTotalLength", 2, Hex),
        ("bNumInterfaces", 1, Number),
        ("bConfigurationValue", 1, Number),
        ("iConfiguration", 1, Number),
        ("bmAttributes", 1, Hex),
        ("MaxPower", 1, Power),
    ],
);

const INTERFACE: Table = (
    "Interface Descriptor",
    2,
    &[
        ("bInterfaceNumber", 1, Number),
        ("bAlternateSetting", 1, Number),
        ("bNumEndpoints", 1, Number),
        ("bInterfaceClass", 1, Class),
        ("bInterfaceSubClass", 1, Number),
        ("bInterfaceProtocol", 1, Number),
        ("iInterface", 1, Number),
    ],
);

const ASSOCIATION: Table = (
    "Interface Association",
    2,
    &[
        ("bFirstInterface", 1, Number),
        ("bInterfaceCount", 1, Number),
        ("bFunctionClass", 1, Class),
        ("bFunctionSubClass", 1, Number),
        ("bFunctionProtocol", 1, Number),
        ("iFunction", 1, Number),
    ],
);

const ENDPOINT: Table = (
    "Endpoint Descriptor",
    3,
    &[
        ("bEndpointAddress", 1, Endpoint),
        ("bmAttributes", 1, Kind),
        ("wMaxPacketSize", 2, Hex),
        ("bInterval", 1, Number),
    ],
);

const COMPANION: Table = (
    "SuperSpeed Endpoint Companion",
    4,
    &[("bMaxBurst", 1, Number), ("bmAttributes", 1, Hex), ("wBytesPerInterval", 2, Number)],
);

const HID: Table = (
    "HID Device Descriptor",
    3,
    &[
        ("bcdHID", 2, Version),
        ("bCountryCode", 1, Number),
        ("bNumDescriptors", 1, Number),
        ("bDescriptorType", 1, Type),
        ("wDescriptorLength", 2, Number),
    ],
);

const CDC_HEADER: Table = ("CDC Header", 3, &[("bDescriptorSubtype", 1, Number), ("bcdCDC", 2, Version)]);
const CDC_CALLS: Table = (
    "CDC Call Management",
    3,
    &[("bDescriptorSubtype", 1, Number), ("bmCapabilities", 1, Hex), ("bDataInterface", 1, Number)],
);
const CDC_ACM: Table = ("CDC ACM", 3, &[("bDescriptorSubtype", 1, Number), ("bmCapabilities", 1, Hex)]);
const CDC_UNION: Table = (
    "CDC Union",
    3,
    &[("bDescriptorSubtype", 1, Number), ("bMasterInterface", 1, Number), ("bSlaveInterface", 1, Number)],
);
const CDC_ETHERNET: Table = (
    "CDC Ethernet",
    3,
    &[
        ("bDescriptorSubtype", 1, Number),
        ("iMacAddress", 1, Number),
        ("bmEthernetStatistics", 4, Hex),
        ("wMaxSegmentSize", 2, Number),
        ("wNumberMCFilters", 2, Hex),
        ("bNumberPowerFilters", 1, Number),
    ],
);
const CDC_NCM: Table = (
    "CDC NCM",
    3,
    &[("bDescriptorSubtype", 1, Number), ("bcdNcmVersion", 2, Version), ("bmNetworkCapabilities", 1, Hex)],
);

/// Communications (CDC 1.2, table 16).
const CLASS_CDC: u8 = 2;

/// What the descriptor of this type is; those of a class are told by the class of the interface that they are behind.
fn table(kind: u8, subtype: Option<u8>, class: u8) -> Option<&'static Table> {
    Some(match (kind, subtype) {
        (1, _) => &DEVICE,
        (2, _) => &CONFIGURATION,
        (4, _) => &INTERFACE,
        (5, _) => &ENDPOINT,
        (0x0b, _) => &ASSOCIATION,
        (0x21, _) if class == 3 => &HID,
        (0x30, _) => &COMPANION,
        (0x24, Some(0x00)) if class == CLASS_CDC => &CDC_HEADER,
        (0x24, Some(0x01)) if class == CLASS_CDC => &CDC_CALLS,
        (0x24, Some(0x02)) if class == CLASS_CDC => &CDC_ACM,
        (0x24, Some(0x06)) if class == CLASS_CDC => &CDC_UNION,
        (0x24, Some(0x0f)) if class == CLASS_CDC => &CDC_ETHERNET,
        (0x24, Some(0x1a)) if class == CLASS_CDC => &CDC_NCM,
        _ => return None,
    })
}

/// The lines for a device's descriptors, as they came. `texts`: manufacturer, product, serial number.
pub(crate) fn lines(raw: &[u8], super_speed: bool, texts: &[String; 3]) -> Vec<String> {
    let (mut lines, mut rest, mut class) = (Vec::new(), raw, 0);
    while let [len, kind, ..] = *rest {
        let Some((one, behind)) = rest.split_at_checked(usize::from(len)).filter(|_| len >= 2) else {
            lines.push(format!("  (cut short: {})", hex(rest)));
            break;
        };
        rest = behind;
        if kind == 4 {
            class = one.get(5).copied().unwrap_or(0);
        }
        let Some((title, depth, fields)) = table(kind, one.get(2).copied(), class) else {
            lines.push(format!("      descriptor of type {kind:#04x}: {}", hex(one)));
            continue;
        };
        let indent = "  ".repeat(*depth);
        lines.push(format!("{indent}{title}:"));
        let (mut left, mut texts) = (one, texts.iter());
        for (name, bytes, form) in HEAD.iter().chain(fields.iter()) {
            // A short one has fewer fields.
            let Some((value, behind)) = left.split_at_checked(*bytes) else { break };
            left = behind;
            let value = value.iter().rev().fold(0u32, |value, byte| value << 8 | u32::from(*byte));
            let text = if matches!(form, Text) { texts.next() } else { None };
            let shown = show(value, *bytes, *form, super_speed, text);
            lines.push(format!("{indent}  {name:<20} {shown}"));
        }
        if !left.is_empty() {
            lines.push(format!("{indent}  (more)               {}", hex(left)));
        }
    }
    lines
}

fn hex(bytes: &[u8]) -> String {
    let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(" ")
}

fn show(value: u32, bytes: usize, form: As, super_speed: bool, text: Option<&String>) -> String {
    match form {
        Number => format!("{value}"),
        Hex => format!("0x{value:0width$x}", width = 2 * bytes),
        Version => format!("{:x}.{:02x}", value >> 8, value & 0xff),
        Class => format!("{value} {}", class_name(value as u8)),
        Endpoint => {
            let way = if value & 0x80 != 0 { "IN" } else { "OUT" };
            format!("0x{value:02x} EP {} {way}", value & 15)
        }
        Kind => {
            let kinds = ["control", "isochronous", "bulk", "interrupt"];
            format!("{value} {}", kinds.get((value & 3) as usize).copied().unwrap_or_default())
        }
        Power => format!("{} mA", value * if super_speed { 8 } else { 2 }),
        Text => match text.map(String::as_str).filter(|text| !text.is_empty()) {
            Some(text) => format!("{value} {text}"),
            None => format!("{value}"),
        },
        Type if value == 0x22 => format!("{value} report"),
        Type => format!("{value}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(raw: &[u8]) -> Vec<String> {
        lines(raw, false, &["Maker".into(), String::new(), "7".into()])
    }

    #[test]
    fn fields_have_their_names_and_values() {
        let raw = [18, 1, 0x10, 2, 9, 0, 1, 64, 0xf4, 0x46, 1, 0, 0x34, 0x12, 1, 2, 3, 1];
        let lines = decoded(&raw);
        for line in [
            "  bcdUSB               2.10",
            "  bDeviceClass         9 hub",
            "  idVendor             0x46f4",
            "  bcdDevice            12.34",
            "  iManufacturer        1 Maker",
            "  iProduct             2",
            "  iSerial              3 7",
        ] {
            assert!(lines.iter().any(|one| one == line), "{line} in {lines:#?}");
        }
    }

    #[test]
    fn what_is_not_known_is_shown_as_it_is() {
        assert_eq!(decoded(&[4, 0x99, 1, 2]), ["      descriptor of type 0x99: 04 99 01 02"]);
        assert_eq!(decoded(&[9, 4, 0]), ["  (cut short: 09 04 00)"]);
        assert_eq!(decoded(&[0, 4, 0]), ["  (cut short: 00 04 00)"]);
        assert_eq!(decoded(&[1]), [""; 0]);
        let long = decoded(&[8, 5, 0x81, 3, 8, 0, 10, 0xee]);
        assert_eq!(long.last().map(String::as_str), Some("        (more)               ee"));
    }

    #[test]
    fn descriptors_of_a_class_need_an_interface_of_that_class() {
        let functional = [5, 0x24, 0, 0x10, 1];
        let interface = |class| [9, 4, 0, 0, 0, class, 6, 0, 0];
        let cdc = decoded(&[&interface(2)[..], &functional[..]].concat());
        assert!(cdc.iter().any(|line| line == "        bcdCDC               1.10"), "{cdc:#?}");
        let other = decoded(&[&interface(1)[..], &functional[..]].concat());
        assert!(other.iter().any(|line| line.contains("type 0x24")), "{other:#?}");
    }

    #[test]
    fn nothing_makes_it_panic() {
        let mut seed = 1u32;
        for _ in 0..20_000 {
            let mut raw = Vec::new();
            for _ in 0..seed % 40 {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                raw.push((seed >> 24) as u8 & if seed & 4 == 0 { 0x3f } else { 0xff });
            }
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            decoded(&raw);
        }
    }
}
