//! The configuration of an instance: one JSON document, the same on every target.
//!
//! The host gives it as the parameter `config`. Every mistake in it is one line that names the place: an unknown key
//! with the nearest known one, a value of a wrong type, a value that makes no sense. [`SCHEMA`] says the same to
//! editors and checkers.

mod read;
#[cfg(test)]
mod tests;
mod usb;

use alloc::{string::String, vec::Vec};
use serde::Serialize;
pub use usb::UsbSelector;

/// The JSON Schema (draft 2020-12) of [`Config`].
pub const SCHEMA: &str = include_str!("../../config.schema.json");

/// The whole document. Every key may be left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Config {
    /// Name of this instance: sent to DHCP servers, shown in messages. Labels of letters, digits and hyphens
    /// (RFC 1123), at most 63 characters in all.
    pub hostname: String,
    /// Messages below this level are dropped: `"off"`, `"error"`, `"warn"`, `"info"`, `"debug"`, `"trace"`.
    pub log: String,
    /// The application and its arguments; the first is its name.
    pub app: Vec<String>,
    /// Mounted in this order before the application starts. The first must be at `/`; a tmpfs is there otherwise.
    pub mounts: Vec<Mount>,
    /// One entry per interface, in the order of the registry. Interfaces without an entry use DHCP.
    pub interfaces: Vec<Interface>,
    /// Devices that the USB stack takes from a platform which owns them, beside those that are mounted: each is read by
    /// [`UsbSelector::parse`].
    pub usb: Vec<String>,
    /// Packets for others are passed on between interfaces (IPv4): this instance is a router.
    pub forward: bool,
    /// How many threads, one per CPU, run the application's tasks; 0: as many as there are CPUs.
    pub workers: u32,
    /// TCP.
    pub tcp: Tcp,
    /// The block cache.
    pub cache: Cache,
}

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mount {
    /// A block device (`"disk0"`, `"disk0p1"`) or `"tmpfs"`.
    pub source: String,
    /// Where: an absolute path.
    pub target: String,
    /// Kind of file system, as `"ext4"`, `"vfat"`, `"tmpfs"`; left out: found by looking.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Nothing is written to the device.
    pub read_only: bool,
}

/// An interface's addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Interface {
    /// `"dhcp"`, `"none"`, or an address with prefix length as in `"10.0.2.15/24"`.
    pub ipv4: String,
    /// `"auto"` (link-local, and router advertisements), `"none"`, or an address with prefix length.
    pub ipv6: String,
    /// Default router with a static address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// Subnets behind other routers on this link, as `"10.1.0.0/16 via 10.0.0.2"`. The longest prefix counts, before the
    /// default router.
    pub routes: Vec<String>,
    /// Name servers, beside those that DHCP gives.
    pub dns: Vec<String>,
}

/// TCP limits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Tcp {
    /// Receive buffer of a connection in bytes; 0: by memory size.
    pub receive_bytes: u32,
    /// Send buffer of a connection in bytes; 0: by memory size.
    pub send_bytes: u32,
    /// Most connections at once; more are refused. 0: by memory size.
    pub connections: u32,
}

/// Block cache limits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Cache {
    /// Most bytes; 0: by memory size.
    pub bytes: u64,
    /// How far sequential reading reads ahead, in bytes.
    pub read_ahead_bytes: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            hostname: "anykernel".into(),
            log: "info".into(),
            app: Vec::new(),
            mounts: Vec::new(),
            interfaces: Vec::new(),
            usb: Vec::new(),
            forward: false,
            workers: 0,
            tcp: Tcp::default(),
            cache: Cache::default(),
        }
    }
}

impl Default for Interface {
    fn default() -> Self {
        Self { ipv4: "dhcp".into(), ipv6: "auto".into(), gateway: None, routes: Vec::new(), dns: Vec::new() }
    }
}

#[expect(clippy::derivable_impls, reason = "the defaults are documented values")]
impl Default for Tcp {
    fn default() -> Self {
        Self { receive_bytes: 0, send_bytes: 0, connections: 0 }
    }
}

impl Default for Cache {
    fn default() -> Self {
        Self { bytes: 0, read_ahead_bytes: 512 << 10 }
    }
}

impl Config {
    /// Reads and checks a document. The error is one line for a person.
    pub fn parse(json: &str) -> Result<Self, String> {
        read::parse(json).map_err(|error| alloc::format!("configuration: {error}"))
    }

    /// Writes a document that [`Config::parse`] reads.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}
