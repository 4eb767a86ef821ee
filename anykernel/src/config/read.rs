//! From text to [`Config`]: a walk over the parsed JSON, by hand because its errors name the path and the nearest key.
//! In an image it is as large as a derived reader, 60 KB with all it needs.

use super::{Cache, Config, Interface, Mount, Tcp, UsbSelector};
use crate::nearest::nearest;
use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use serde_json::{Map, Value};

/// What is wrong, without the prefix.
type Result<T> = core::result::Result<T, String>;

/// A value and where it is, as in `interfaces[0].ipv4`.
struct At<'a> {
    path: String,
    value: &'a Value,
}

/// An object whose keys are all known.
struct Object<'a> {
    path: String,
    map: &'a Map<String, Value>,
}

impl<'a> At<'a> {
    /// "`path` is a string, but must be `wanted`".
    fn wrong_type<T>(&self, wanted: &str) -> Result<T> {
        let found = match self.value {
            Value::Null => "null",
            Value::Bool(_) => "true or false",
            Value::Number(_) => "a number",
            Value::String(_) => "a string",
            Value::Array(_) => "a list",
            Value::Object(_) => "an object",
        };
        match self.path.as_str() {
            "" => Err(format!("it is {found}, but must be {wanted}")),
            path => Err(format!("`{path}` is {found}, but must be {wanted}")),
        }
    }

    fn object(self, known: &[&str]) -> Result<Object<'a>> {
        let Value::Object(map) = self.value else { return self.wrong_type("an object") };
        let object = Object { path: self.path, map };
        if let Some(key) = map.keys().find(|key| !known.contains(&key.as_str())) {
            let shown: String = key.chars().take(64).flat_map(char::escape_debug).collect();
            let unknown = object.path_of(&shown);
            return Err(match nearest(key, known.iter().copied()) {
                Some(nearest) => format!("unknown key `{unknown}`; did you mean `{nearest}`?"),
                None => format!("unknown key `{unknown}`; there are `{}`", known.join("`, `")),
            });
        }
        Ok(object)
    }

    fn list(self) -> Result<impl Iterator<Item = At<'a>>> {
        let Value::Array(list) = self.value else { return self.wrong_type("a list") };
        let path = self.path;
        Ok(list.iter().enumerate().map(move |(index, value)| At { path: format!("{path}[{index}]"), value }))
    }

    /// A string without NUL that `fits`, or the error says what it `must be`.
    fn text(self, must_be: &str, fits: impl Fn(&str) -> bool) -> Result<String> {
        let Value::String(text) = self.value else { return self.wrong_type("a string") };
        if text.contains('\0') || !fits(text) {
            let shown: String = text.chars().take(64).collect();
            return Err(format!("`{}` is {shown:?}, but must be {must_be}", self.path));
        }
        Ok(text.clone())
    }

    fn integer(self, most: u64) -> Result<u64> {
        if !self.value.is_number() {
            return self.wrong_type("a whole number");
        }
        // Without the value: to print a float costs 10 KB of an image.
        self.value
            .as_u64()
            .filter(|number| *number <= most)
            .ok_or_else(|| format!("`{}` must be a whole number from 0 to {most}", self.path))
    }

    fn boolean(self) -> Result<bool> {
        self.value.as_bool().map_or_else(|| self.wrong_type("true or false"), Ok)
    }
}

impl<'a> Object<'a> {
    fn path_of(&self, key: &str) -> String {
        match self.path.as_str() {
            "" => key.to_owned(),
            path => format!("{path}.{key}"),
        }
    }

    /// The value of `key`, if it is there.
    fn get(&self, key: &str) -> Option<At<'a>> {
        Some(At { path: self.path_of(key), value: self.map.get(key)? })
    }

    /// As [`Object::get`], for keys whose absence may also be written as `null`.
    fn optional(&self, key: &str) -> Option<At<'a>> {
        self.get(key).filter(|at| !at.value.is_null())
    }

    fn required(&self, key: &str) -> Result<At<'a>> {
        self.get(key).ok_or_else(|| format!("`{}` is missing", self.path_of(key)))
    }

    fn u32(&self, key: &str, default: u32) -> Result<u32> {
        // The limit makes the conversion exact.
        self.get(key).map_or(Ok(default), |at| at.integer(u32::MAX.into()).map(|number| number as u32))
    }
}

pub(super) fn parse(json: &str) -> Result<Config> {
    let value: Value = serde_json::from_str(json).map_err(|error| format!("not JSON: {error}"))?;
    let root = At { path: String::new(), value: &value }.object(&[
        "hostname",
        "log",
        "app",
        "mounts",
        "interfaces",
        "usb",
        "forward",
        "workers",
        "tcp",
        "cache",
    ])?;
    let mut config = Config::default();
    if let Some(at) = root.get("hostname") {
        config.hostname = at.text("a host name of at most 63 letters, digits and hyphens", is_hostname)?;
    }
    if let Some(at) = root.get("log") {
        config.log = at.text("off, error, warn, info, debug or trace", |text| {
            ["off", "error", "warn", "info", "debug", "trace"].contains(&text)
        })?;
    }
    if let Some(at) = root.get("app") {
        config.app = at.list()?.map(|at| at.text("a string without NUL", |_| true)).collect::<Result<_>>()?;
    }
    if let Some(at) = root.get("mounts") {
        config.mounts = at.list()?.map(mount).collect::<Result<_>>()?;
        check_targets(&config.mounts)?;
    }
    if let Some(at) = root.get("interfaces") {
        config.interfaces = at.list()?.map(interface).collect::<Result<_>>()?;
    }
    if let Some(at) = root.get("usb") {
        config.usb = at.list()?.map(usb).collect::<Result<_>>()?;
    }
    config.forward = root.get("forward").map_or(Ok(false), At::boolean)?;
    config.workers = root.u32("workers", config.workers)?;
    if let Some(at) = root.get("tcp") {
        config.tcp = tcp(at)?;
    }
    if let Some(at) = root.get("cache") {
        config.cache = cache(at)?;
    }
    Ok(config)
}

fn usb(at: At<'_>) -> Result<String> {
    let must_be = "a place as 1-2.3, vendor and product as 46f4:0001, or a class as class:03";
    at.text(must_be, |text| UsbSelector::parse(text).is_some())
}

fn mount(at: At<'_>) -> Result<Mount> {
    let object = at.object(&["source", "target", "kind", "read_only"])?;
    Ok(Mount {
        source: object
            .required("source")?
            .text("a block device as \"disk0\" or \"disk0p1\", or \"tmpfs\"", is_word)?,
        target: object.required("target")?.text("an absolute path", |path| path.starts_with('/'))?,
        kind: object
            .optional("kind")
            .map(|at| at.text("a kind of file system as \"ext4\", \"vfat\" or \"tmpfs\"", is_word))
            .transpose()?,
        read_only: object.get("read_only").map_or(Ok(false), At::boolean)?,
    })
}

/// Two mounts at one place: the first could never be seen.
fn check_targets(mounts: &[Mount]) -> Result<()> {
    for (index, mount) in mounts.iter().enumerate() {
        let first = mounts.iter().take(index).position(|other| other.target == mount.target);
        if let Some(first) = first {
            return Err(format!(
                "`mounts[{index}].target` is {:?}, as `mounts[{first}].target`",
                mount.target
            ));
        }
    }
    Ok(())
}

fn interface(at: At<'_>) -> Result<Interface> {
    let object = at.object(&["ipv4", "ipv6", "gateway", "routes", "dns"])?;
    let mut interface = Interface::default();
    if let Some(at) = object.get("ipv4") {
        interface.ipv4 = at
            .text("\"dhcp\", \"none\" or an address with prefix length as \"10.0.2.15/24\"", |text| {
                ["dhcp", "none"].contains(&text) || is_subnet::<Ipv4Addr>(text, 32)
            })?;
    }
    if let Some(at) = object.get("ipv6") {
        interface.ipv6 = at
            .text("\"auto\", \"none\" or an address with prefix length as \"fd00::2/64\"", |text| {
                ["auto", "none"].contains(&text) || is_subnet::<Ipv6Addr>(text, 128)
            })?;
    }
    if let Some(at) = object.optional("gateway") {
        interface.gateway = Some(at.text("an IP address", is_address)?);
    }
    if let Some(at) = object.get("routes") {
        let must_be = "a subnet and its router as \"10.1.0.0/16 via 10.0.0.2\"";
        interface.routes = at.list()?.map(|at| at.text(must_be, is_route)).collect::<Result<_>>()?;
    }
    if let Some(at) = object.get("dns") {
        interface.dns = at.list()?.map(|at| at.text("an IP address", is_address)).collect::<Result<_>>()?;
    }
    Ok(interface)
}

fn tcp(at: At<'_>) -> Result<Tcp> {
    let object = at.object(&["receive_bytes", "send_bytes", "connections"])?;
    let default = Tcp::default();
    Ok(Tcp {
        receive_bytes: object.u32("receive_bytes", default.receive_bytes)?,
        send_bytes: object.u32("send_bytes", default.send_bytes)?,
        connections: object.u32("connections", default.connections)?,
    })
}

fn cache(at: At<'_>) -> Result<Cache> {
    let object = at.object(&["bytes", "read_ahead_bytes"])?;
    let default = Cache::default();
    Ok(Cache {
        bytes: object.get("bytes").map_or(Ok(default.bytes), |at| at.integer(u64::MAX))?,
        read_ahead_bytes: object.u32("read_ahead_bytes", default.read_ahead_bytes)?,
    })
}

fn is_hostname(text: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    text.len() <= 63 && text.split('.').all(label)
}

/// A device's or a file system's name.
fn is_word(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 63
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

fn is_address(text: &str) -> bool {
    text.parse::<IpAddr>().is_ok()
}

fn is_route(text: &str) -> bool {
    text.split_once(" via ")
        .is_some_and(|(to, via)| is_subnet::<Ipv4Addr>(to, 32) && via.parse::<Ipv4Addr>().is_ok())
}

fn is_subnet<A: core::str::FromStr>(text: &str, longest: u8) -> bool {
    text.split_once('/').is_some_and(|(address, prefix)| {
        let digits = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
        address.parse::<A>().is_ok() && digits && prefix.parse::<u8>().is_ok_and(|prefix| prefix <= longest)
    })
}
