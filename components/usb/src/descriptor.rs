//! Descriptors (USB 2.0, 9.6; USB 3.2, 9.6): parsed from whatever a device sends.
//!
//! Pure functions of bytes. Every length is checked, every count bounded. Where a configuration has nonsense in it the
//! rest is used and [`Configuration::faults`] says how much was passed over, as many devices are sold like that.

use crate::controller::{EndpointKind, EndpointSpec, Speed};
use alloc::vec::Vec;
use core::fmt;

/// Types of descriptors.
pub mod kind {
    /// Device.
    pub const DEVICE: u8 = 1;
    /// Configuration.
    pub const CONFIGURATION: u8 = 2;
    /// String.
    pub const STRING: u8 = 3;
    /// Interface.
    pub const INTERFACE: u8 = 4;
    /// Endpoint.
    pub const ENDPOINT: u8 = 5;
    /// Binary object store.
    pub const BOS: u8 = 15;
    /// HID, behind an interface.
    pub const HID: u8 = 0x21;
    /// HID report.
    pub const REPORT: u8 = 0x22;
    /// Class-specific, of an interface.
    pub const CS_INTERFACE: u8 = 0x24;
    /// Hub.
    pub const HUB: u8 = 0x29;
    /// SuperSpeed hub.
    pub const SUPER_HUB: u8 = 0x2a;
    /// SuperSpeed endpoint companion.
    pub const COMPANION: u8 = 0x30;
}

/// Largest configuration that is read, in bytes.
pub const MAX_CONFIGURATION: usize = 16 << 10;
/// Most interface settings of a configuration.
pub const MAX_SETTINGS: usize = 128;
/// Most configurations of a device.
pub const MAX_CONFIGURATIONS: u8 = 8;

/// What is wrong with a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DescriptorError {
    /// Fewer bytes than it must have.
    Short,
    /// Another type than was asked for, or a length that its type cannot have.
    NotOne,
    /// `bMaxPacketSize0` is none that the speed allows.
    MaxPacket,
    /// No configuration, or no interface in it.
    Empty,
    /// More of something than can be.
    TooMany,
}

impl fmt::Display for DescriptorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Short => "a descriptor is cut short",
            Self::NotOne => "it answers with something else than the descriptor asked for",
            Self::MaxPacket => "the packet size of endpoint 0 is none that exists",
            Self::Empty => "it has no configuration with interfaces",
            Self::TooMany => "it claims more configurations or interfaces than can be",
        })
    }
}

impl core::error::Error for DescriptorError {}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// A device descriptor (USB 2.0, 9.6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceDescriptor {
    /// `bcdUSB`.
    pub usb: u16,
    /// `bDeviceClass`, `bDeviceSubClass`, `bDeviceProtocol`.
    pub class: [u8; 3],
    /// Bytes per packet of endpoint 0.
    pub max_packet: u16,
    /// `idVendor`.
    pub vendor: u16,
    /// `idProduct`.
    pub product: u16,
    /// `bcdDevice`.
    pub release: u16,
    /// Indices of the strings for manufacturer, product, serial number; 0: none.
    pub strings: [u8; 3],
    /// How many configurations there are: 1 to [`MAX_CONFIGURATIONS`].
    pub configurations: u8,
}

/// The packet size of endpoint 0 out of the first 8 bytes of a device descriptor.
pub fn max_packet_0(bytes: &[u8], speed: Speed) -> Result<u16, DescriptorError> {
    if bytes.get(1) != Some(&kind::DEVICE) {
        return Err(DescriptorError::NotOne);
    }
    let size = *bytes.get(7).ok_or(DescriptorError::Short)?;
    match (speed, size) {
        (Speed::Low, 8) | (Speed::Full, 8 | 16 | 32 | 64) | (Speed::High, 64) => Ok(u16::from(size)),
        (Speed::Super | Speed::SuperPlus, 9) => Ok(512),
        _ => Err(DescriptorError::MaxPacket),
    }
}

impl DeviceDescriptor {
    /// Parses the 18 bytes.
    pub fn parse(bytes: &[u8], speed: Speed) -> Result<Self, DescriptorError> {
        let bytes = bytes.get(..18).ok_or(DescriptorError::Short)?;
        let &[len, _, usb0, usb1, class, subclass, protocol, _, v0, v1, p0, p1, r0, r1, s0, s1, s2, count] =
            bytes
        else {
            return Err(DescriptorError::Short);
        };
        let max_packet = max_packet_0(bytes, speed)?;
        match (len, count) {
            (18.., 1..=MAX_CONFIGURATIONS) => Ok(Self {
                usb: u16::from_le_bytes([usb0, usb1]),
                class: [class, subclass, protocol],
                max_packet,
                vendor: u16::from_le_bytes([v0, v1]),
                product: u16::from_le_bytes([p0, p1]),
                release: u16::from_le_bytes([r0, r1]),
                strings: [s0, s1, s2],
                configurations: count,
            }),
            (18.., 0) => Err(DescriptorError::Empty),
            (18.., _) => Err(DescriptorError::TooMany),
            _ => Err(DescriptorError::NotOne),
        }
    }
}

/// An endpoint of a setting, as it describes itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    /// `bEndpointAddress`.
    pub address: u8,
    /// What transfers it does.
    pub kind: EndpointKind,
    /// `wMaxPacketSize`.
    pub max_packet: u16,
    /// `bInterval`.
    pub interval: u8,
    /// The companion of a SuperSpeed endpoint: `bMaxBurst`, `bmAttributes`, `wBytesPerInterval`.
    pub companion: Option<(u8, u8, u16)>,
}

impl Endpoint {
    /// Whether it sends to the host.
    pub fn is_in(&self) -> bool {
        self.address & 0x80 != 0
    }

    /// What the controller is to set up; `None` for one that cannot be used at `speed` (or not by this stack). Sizes beyond what
    /// the specification allows are cut to it.
    pub fn spec(&self, speed: Speed) -> Option<EndpointSpec> {
        let most = match (self.kind, speed) {
            (EndpointKind::Bulk, Speed::Full) => 64,
            (EndpointKind::Bulk, Speed::High) => 512,
            (EndpointKind::Bulk, Speed::Super | Speed::SuperPlus) => 1024,
            (EndpointKind::Interrupt, Speed::Low) => 8,
            (EndpointKind::Interrupt, Speed::Full) => 64,
            (EndpointKind::Interrupt, _) => 1024,
            _ => return None,
        };
        let max_packet = (self.max_packet & 0x7ff).min(most);
        let is_super = speed >= Speed::Super;
        // Bulk endpoints of these speeds have one size only.
        let max_packet =
            if self.kind == EndpointKind::Bulk && speed >= Speed::High { most } else { max_packet };
        if max_packet == 0 {
            return None;
        }
        let interrupt = self.kind == EndpointKind::Interrupt;
        let (burst, _, bytes) = self.companion.filter(|_| is_super).unwrap_or((0, 0, 0));
        let additional = match (self.max_packet >> 11) & 3 {
            extra @ 1..=2 if interrupt && speed == Speed::High => extra as u8,
            _ => 0,
        };
        let burst = burst.min(if interrupt { 2 } else { 15 });
        let interval = match (interrupt, speed) {
            (false, _) => 0,
            (true, Speed::Low | Speed::Full) => self.interval.max(1),
            (true, _) => self.interval.clamp(1, 16),
        };
        let room = u32::from(max_packet) * (u32::from(burst) + 1);
        let bytes_per_interval = match (interrupt && is_super, bytes) {
            (false, _) => 0,
            (true, 0) => max_packet,
            (true, bytes) => u32::from(bytes).min(room).min(0xffff) as u16,
        };
        Some(EndpointSpec {
            address: self.address,
            kind: self.kind,
            max_packet,
            additional,
            max_burst: burst,
            bytes_per_interval,
            interval,
        })
    }
}

/// An alternate setting of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// `bInterfaceNumber`.
    pub interface: u8,
    /// `bAlternateSetting`.
    pub alternate: u8,
    /// `bInterfaceClass`, `bInterfaceSubClass`, `bInterfaceProtocol`.
    pub class: [u8; 3],
    /// Index of its string; 0: none.
    pub name: u8,
    /// No address twice.
    pub endpoints: Vec<Endpoint>,
    /// Class descriptors behind it, one after the other, each with its length in front.
    pub extra: Vec<u8>,
}

impl Setting {
    /// The first endpoint of a kind and direction.
    pub fn endpoint(&self, kind: EndpointKind, is_in: bool) -> Option<&Endpoint> {
        self.endpoints.iter().find(|one| one.kind == kind && one.is_in() == is_in)
    }

    /// The class descriptors behind it.
    pub fn extras(&self) -> Descriptors<'_> {
        Descriptors(&self.extra)
    }
}

/// A configuration with all that is in it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Configuration {
    /// `bConfigurationValue`.
    pub value: u8,
    /// Index of its string; 0: none.
    pub name: u8,
    /// `bmAttributes`.
    pub attributes: u8,
    /// `bMaxPower`, in units of 2 mA (8 mA for SuperSpeed).
    pub max_power: u8,
    /// Settings in their order. No (interface, alternate) twice.
    pub settings: Vec<Setting>,
    /// Descriptors passed over: cut short, repeated, out of range.
    pub faults: u32,
}

/// Walks over descriptors that follow each other: type and all bytes of each. Ends at the first that has no sound length.
#[derive(Debug, Clone, Copy)]
pub struct Descriptors<'a>(pub &'a [u8]);

impl<'a> Iterator for Descriptors<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let len = usize::from(*self.0.first()?);
        let (one, rest) = self.0.split_at_checked(len)?;
        let kind = *one.get(1)?;
        self.0 = rest;
        Some((kind, one))
    }
}

impl Configuration {
    /// `wTotalLength` out of the first 9 bytes, at most [`MAX_CONFIGURATION`].
    pub fn total_length(bytes: &[u8]) -> Result<usize, DescriptorError> {
        match bytes {
            [9..=u8::MAX, kind::CONFIGURATION, low, high, _, _, _, _, _, ..] => {
                match usize::from(u16::from_le_bytes([*low, *high])) {
                    0..9 => Err(DescriptorError::Short),
                    total if total > MAX_CONFIGURATION => Err(DescriptorError::TooMany),
                    total => Ok(total),
                }
            }
            [_, kind::CONFIGURATION, ..] => Err(DescriptorError::Short),
            _ => Err(DescriptorError::NotOne),
        }
    }

    /// Parses a configuration with everything behind it. What is beyond `wTotalLength` is left alone.
    pub fn parse(bytes: &[u8]) -> Result<Self, DescriptorError> {
        let total = Self::total_length(bytes)?.min(bytes.len());
        let &[len, _, _, _, _, value, name, attributes, max_power, ..] = bytes else {
            return Err(DescriptorError::Short);
        };
        let mut found = Self { value, name, attributes, max_power, ..Self::default() };
        let mut rest = Descriptors(bytes.get(usize::from(len)..total).ok_or(DescriptorError::Short)?);
        // Whether what comes belongs to the last setting, and to its last endpoint.
        let (mut open, mut endpoint_open) = (false, false);
        for (kind, one) in rest.by_ref() {
            match kind {
                kind::INTERFACE => {
                    open = found.add_setting(one)?;
                    endpoint_open = false;
                }
                kind::ENDPOINT if open => endpoint_open = found.add_endpoint(one),
                kind::COMPANION if endpoint_open => found.add_companion(one),
                // A second configuration inside the first, or what belongs to nothing.
                kind::CONFIGURATION | kind::DEVICE | kind::ENDPOINT | kind::COMPANION => found.faults += 1,
                _ => {
                    if let Some(setting) = found.settings.last_mut()
                        && open
                    {
                        // Bounded by the length of the configuration.
                        setting.extra.extend_from_slice(one);
                    }
                }
            }
        }
        found.faults += u32::from(!rest.0.is_empty());
        if found.settings.is_empty() {
            return Err(DescriptorError::Empty);
        }
        Ok(found)
    }

    fn add_setting(&mut self, bytes: &[u8]) -> Result<bool, DescriptorError> {
        let &[_, _, interface, alternate, _, class, subclass, protocol, name, ..] = bytes else {
            self.faults += 1;
            return Ok(false);
        };
        if self.setting(interface, alternate).is_some() {
            self.faults += 1;
            return Ok(false);
        }
        if self.settings.len() >= MAX_SETTINGS {
            return Err(DescriptorError::TooMany);
        }
        self.settings.push(Setting {
            interface,
            alternate,
            class: [class, subclass, protocol],
            name,
            endpoints: Vec::new(),
            extra: Vec::new(),
        });
        Ok(true)
    }

    fn add_endpoint(&mut self, bytes: &[u8]) -> bool {
        let Some((last, others)) = self.settings.split_last_mut() else { return false };
        let &[_, _, address, attributes, low, high, interval, ..] = bytes else {
            self.faults += 1;
            return false;
        };
        let elsewhere = others
            .iter()
            .filter(|other| other.interface != last.interface)
            .any(|other| other.endpoints.iter().any(|one| one.address == address));
        let twice = elsewhere || last.endpoints.iter().any(|one| one.address == address);
        if twice || address & 0x70 != 0 || address & 0x0f == 0 {
            self.faults += 1;
            return false;
        }
        let kind = match attributes & 3 {
            0 => EndpointKind::Control,
            1 => EndpointKind::Isochronous,
            2 => EndpointKind::Bulk,
            _ => EndpointKind::Interrupt,
        };
        let max_packet = u16::from_le_bytes([low, high]);
        last.endpoints.push(Endpoint { address, kind, max_packet, interval, companion: None });
        true
    }

    fn add_companion(&mut self, bytes: &[u8]) {
        let last = self.settings.last_mut().and_then(|setting| setting.endpoints.last_mut());
        match (last, bytes) {
            (Some(endpoint), &[_, _, burst, attributes, low, high, ..]) if endpoint.companion.is_none() => {
                endpoint.companion = Some((burst, attributes, u16::from_le_bytes([low, high])));
            }
            _ => self.faults += 1,
        }
    }

    /// A setting by its numbers.
    pub fn setting(&self, interface: u8, alternate: u8) -> Option<&Setting> {
        self.settings.iter().find(|one| one.interface == interface && one.alternate == alternate)
    }
}

/// A hub descriptor (USB 2.0, 11.23.2.1; USB 3.2, 10.15.2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HubDescriptor {
    /// How many ports: 1 to [`Self::MAX_PORTS`].
    pub ports: u8,
    /// `wHubCharacteristics`.
    pub characteristics: u16,
    /// Milliseconds from power on until a port is good.
    pub power_good_ms: u16,
}

impl HubDescriptor {
    /// More ports than hubs are built with.
    pub const MAX_PORTS: u8 = 31;

    /// Parses either kind.
    pub fn parse(bytes: &[u8]) -> Result<Self, DescriptorError> {
        match bytes {
            [7..=u8::MAX, kind::HUB | kind::SUPER_HUB, ports, ..] => {
                let characteristics = u16_at(bytes, 3).ok_or(DescriptorError::Short)?;
                let power_good = *bytes.get(5).ok_or(DescriptorError::Short)?;
                match *ports {
                    0 => Err(DescriptorError::Empty),
                    ports if ports > Self::MAX_PORTS => Err(DescriptorError::TooMany),
                    ports => Ok(Self { ports, characteristics, power_good_ms: u16::from(power_good) * 2 }),
                }
            }
            [_, kind::HUB | kind::SUPER_HUB, ..] => Err(DescriptorError::Short),
            _ => Err(DescriptorError::NotOne),
        }
    }
}

/// Text of a string descriptor (USB 2.0, 9.6.7): UTF-16 made presentable. What is no text is `?`.
pub fn text(bytes: &[u8]) -> alloc::string::String {
    let Some((kind::STRING, one)) = Descriptors(bytes).next() else { return Default::default() };
    let (pairs, _) = one.get(2..).unwrap_or_default().as_chunks::<2>();
    let units = pairs.iter().map(|pair| u16::from_le_bytes(*pair)).take_while(|unit| *unit != 0);
    let text = char::decode_utf16(units).map(|one| one.ok().filter(|one| !one.is_control()).unwrap_or('?'));
    text.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::Speed;
    use proptest::prelude::*;

    const SPEEDS: [Speed; 5] = [Speed::Low, Speed::Full, Speed::High, Speed::Super, Speed::SuperPlus];

    /// Descriptors with lengths that are nearly right.
    fn likely() -> impl Strategy<Value = Vec<u8>> {
        let kinds = proptest::sample::select(alloc::vec![1u8, 2, 4, 4, 4, 5, 5, 5, 0x24, 0x30, 0x21, 0x29]);
        let one =
            (kinds, 0u8..12, proptest::collection::vec(any::<u8>(), 12)).prop_map(|(kind, len, body)| {
                let mut bytes = alloc::vec![len, kind];
                bytes.extend(&body[..usize::from(len).saturating_sub(2).min(12)]);
                bytes
            });
        proptest::collection::vec(one, 0..40).prop_map(|all| {
            let mut bytes = alloc::vec![9, 2, 0, 0, 1, 1, 0, 0x80, 50];
            all.iter().for_each(|one| bytes.extend(one));
            let len = bytes.len() as u16;
            bytes[2..4].copy_from_slice(&len.to_le_bytes());
            bytes
        })
    }

    proptest! {
        #[test]
        fn hostile_descriptors(bytes in prop_oneof![likely(), proptest::collection::vec(any::<u8>(), 0..300)]) {
            text(&bytes);
            if let Ok(hub) = HubDescriptor::parse(&bytes) {
                prop_assert!((1..=31).contains(&hub.ports));
            }
            for speed in SPEEDS {
                if let Ok(device) = DeviceDescriptor::parse(&bytes, speed) {
                    prop_assert!((1..=8).contains(&device.configurations));
                }
            }
            let Ok(configuration) = Configuration::parse(&bytes) else { return Ok(()) };
            prop_assert!(!configuration.settings.is_empty() && configuration.settings.len() <= MAX_SETTINGS);
            for (index, setting) in configuration.settings.iter().enumerate() {
                let same = |other: &Setting| (other.interface, other.alternate) == (setting.interface, setting.alternate);
                prop_assert!(!configuration.settings[..index].iter().any(same));
                prop_assert!(setting.endpoints.len() <= 30);
                for endpoint in &setting.endpoints {
                    for spec in SPEEDS.iter().filter_map(|speed| endpoint.spec(*speed)) {
                        prop_assert!((1..=1024).contains(&spec.max_packet) && spec.address & 0x0f != 0);
                        prop_assert!(spec.max_burst <= 15 && spec.additional <= 2);
                    }
                }
            }
        }
    }
}
