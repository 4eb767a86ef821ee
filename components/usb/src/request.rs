//! Setup packets (USB 2.0, 9.3 and 9.4, 11.24; class specifications as named).

use crate::descriptor::kind;

/// Eight bytes: request type, request, value, index, length.
pub(crate) const fn setup(request_type: u8, request: u8, value: u16, index: u16, length: u16) -> [u8; 8] {
    let ([v0, v1], [i0, i1], [l0, l1]) = (value.to_le_bytes(), index.to_le_bytes(), length.to_le_bytes());
    [request_type, request, v0, v1, i0, i1, l0, l1]
}

pub(crate) const fn get_descriptor(kind: u8, index: u8, language: u16, length: u16) -> [u8; 8] {
    setup(0x80, 6, u16::from_be_bytes([kind, index]), language, length)
}

/// A class's descriptor of an interface (HID 1.11, 7.1.1).
pub(crate) const fn get_interface_descriptor(kind: u8, interface: u8, length: u16) -> [u8; 8] {
    setup(0x81, 6, u16::from_be_bytes([kind, 0]), interface as u16, length)
}

pub(crate) const fn set_configuration(value: u8) -> [u8; 8] {
    setup(0x00, 9, value as u16, 0, 0)
}

pub(crate) const fn set_interface(interface: u8, alternate: u8) -> [u8; 8] {
    setup(0x01, 11, alternate as u16, interface as u16, 0)
}

pub(crate) const fn clear_endpoint_halt(endpoint: u8) -> [u8; 8] {
    setup(0x02, 1, 0, endpoint as u16, 0)
}

pub(crate) const fn get_hub_descriptor(super_speed: bool) -> [u8; 8] {
    let kind = if super_speed { kind::SUPER_HUB } else { kind::HUB };
    setup(0xa0, 6, u16::from_be_bytes([kind, 0]), 0, if super_speed { 12 } else { 71 })
}

/// USB 3.2, 10.16.2.9.
pub(crate) const fn set_hub_depth(depth: u16) -> [u8; 8] {
    setup(0x20, 12, depth, 0, 0)
}

pub(crate) const fn get_port_status(port: u8) -> [u8; 8] {
    setup(0xa3, 0, 0, port as u16, 4)
}

pub(crate) const fn set_port_feature(port: u8, feature: u16) -> [u8; 8] {
    setup(0x23, 3, feature, port as u16, 0)
}

pub(crate) const fn clear_port_feature(port: u8, feature: u16) -> [u8; 8] {
    setup(0x23, 1, feature, port as u16, 0)
}
