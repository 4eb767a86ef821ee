//! What is plugged in where, for people and programs.

use crate::controller::Speed;
use crate::descriptor::{Configuration, DeviceDescriptor};
use crate::device::Identity;
use alloc::string::String;
use alloc::vec::Vec;
use hypercall::UsbPath;

/// How far a device has come.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum NodeState {
    /// Something is plugged in; who it is, is being found out.
    #[default]
    New,
    /// It works.
    Configured,
    /// It was given up, in one line why.
    Failed(String),
}

/// What a driver says of a function of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverNote {
    /// Its interface.
    pub interface: u8,
    /// `hub`, `storage`, `hid`, `cdc-ecm`, `cdc-ncm`.
    pub name: &'static str,
    /// What it made of it (`usb1-2`, `nic0`), or why it gave up.
    pub note: String,
    /// It gave up.
    pub failed: bool,
}

/// A place in the tree with a device.
#[derive(Debug, Clone, Default)]
pub struct Node {
    /// How far it has come.
    pub state: NodeState,
    /// Who it is, once that is known. It is also known of many that were given up.
    pub device: Option<NodeDevice>,
    /// Its functions that have a driver.
    pub drivers: Vec<DriverNote>,
}

/// Who a device is.
#[derive(Debug, Clone)]
pub struct NodeDevice {
    /// On the bus.
    pub address: u8,
    /// How fast it signals.
    pub speed: Speed,
    /// Its descriptor.
    pub descriptor: DeviceDescriptor,
    /// Its configurations.
    pub configurations: Vec<Configuration>,
    /// Index of the configuration in use.
    pub chosen: usize,
    /// Manufacturer, product, serial number.
    pub strings: [String; 3],
    /// The device descriptor and every configuration, as they came.
    pub raw: Vec<u8>,
}

impl NodeDevice {
    pub(crate) fn of(identity: &Identity, chosen: usize) -> Self {
        Self {
            address: identity.address,
            speed: identity.speed,
            descriptor: identity.descriptor,
            configurations: identity.configurations.clone(),
            chosen,
            strings: identity.strings.clone(),
            raw: identity.raw.clone(),
        }
    }
}

/// One line of a listing.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Where.
    pub path: UsbPath,
    /// What.
    pub node: Node,
}
