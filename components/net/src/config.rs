//! What the configuration and the memory size say, checked.

use alloc::{string::String, vec::Vec};
use anykernel::config;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// How an interface gets its IPv4 address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ipv4Setting {
    /// From a DHCP server.
    Dhcp,
    /// Not at all.
    None,
    /// This one, with its prefix length.
    Static(Ipv4Addr, u8),
}

/// How an interface gets its IPv6 addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ipv6Setting {
    /// A link-local one, and what routers advertise.
    Auto,
    /// Not at all.
    None,
    /// This one with its prefix length, beside the link-local one.
    Static(Ipv6Addr, u8),
}

/// One interface's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// IPv4.
    pub ipv4: Ipv4Setting,
    /// IPv6.
    pub ipv6: Ipv6Setting,
    /// Default routers that the configuration names.
    pub gateways: Vec<IpAddr>,
    /// Subnets behind routers on this link.
    pub routes: Vec<(Ipv4Addr, u8, Ipv4Addr)>,
    /// Packets for others are passed on; the same for all interfaces.
    pub forward: bool,
    /// Name servers that the configuration names.
    pub dns: Vec<IpAddr>,
    /// Sent to DHCP servers.
    pub hostname: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ipv4: Ipv4Setting::Dhcp,
            ipv6: Ipv6Setting::Auto,
            gateways: Vec::new(),
            routes: Vec::new(),
            forward: false,
            dns: Vec::new(),
            hostname: String::new(),
        }
    }
}

impl Settings {
    /// Reads the entry for interface `index`. The error is one line that names the key.
    pub fn parse(config: &config::Config, index: usize) -> Result<Self, String> {
        let default = config::Interface::default();
        let interface = config.interfaces.get(index).unwrap_or(&default);
        let at = |key: &str| alloc::format!("configuration: interfaces[{index}].{key}");
        let ipv4 = match interface.ipv4.as_str() {
            "dhcp" => Ipv4Setting::Dhcp,
            "none" => Ipv4Setting::None,
            text => parse_cidr::<Ipv4Addr>(text, 32)
                .filter(|(addr, _)| !addr.is_unspecified() && !addr.is_multicast() && !addr.is_broadcast())
                .map(|(addr, prefix)| Ipv4Setting::Static(addr, prefix))
                .ok_or_else(|| {
                    alloc::format!(
                        "{}: \"{text}\" is neither \"dhcp\", \"none\" nor an address as in \"10.0.2.15/24\"",
                        at("ipv4")
                    )
                })?,
        };
        let ipv6 = match interface.ipv6.as_str() {
            "auto" => Ipv6Setting::Auto,
            "none" => Ipv6Setting::None,
            text => parse_cidr::<Ipv6Addr>(text, 128)
                .filter(|(addr, _)| !addr.is_unspecified() && !addr.is_multicast())
                .map(|(addr, prefix)| Ipv6Setting::Static(addr, prefix))
                .ok_or_else(|| {
                    alloc::format!(
                        "{}: \"{text}\" is neither \"auto\", \"none\" nor an address as in \"fd00::2/64\"",
                        at("ipv6")
                    )
                })?,
        };
        let address = |key: &str, text: &str| {
            text.parse::<IpAddr>().map_err(|_| alloc::format!("{}: \"{text}\" is not an address", at(key)))
        };
        let gateways =
            interface.gateway.iter().map(|text| address("gateway", text)).collect::<Result<_, _>>()?;
        let routes = interface.routes.iter().map(|text| {
            let route = text.split_once(" via ").and_then(|(to, via)| {
                let (to, prefix) = parse_cidr(to, 32)?;
                Some((to, prefix, via.parse().ok()?))
            });
            route.ok_or_else(|| {
                alloc::format!("{}: \"{text}\" is not as in \"10.1.0.0/16 via 10.0.0.2\"", at("routes"))
            })
        });
        let routes = routes.collect::<Result<_, _>>()?;
        let dns = interface.dns.iter().map(|text| address("dns", text)).collect::<Result<_, _>>()?;
        let (forward, hostname) = (config.forward, config.hostname.clone());
        Ok(Self { ipv4, ipv6, gateways, routes, forward, dns, hostname })
    }
}

fn parse_cidr<A: core::str::FromStr>(text: &str, max_prefix: u8) -> Option<(A, u8)> {
    let (addr, prefix) = text.split_once('/')?;
    let prefix = prefix.parse().ok().filter(|prefix| *prefix <= max_prefix)?;
    Some((addr.parse().ok()?, prefix))
}

/// Bounds of what a stack keeps in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Receive buffer of a connection in bytes: 1,024 to 16 MiB.
    pub receive_bytes: usize,
    /// Send buffer of a connection in bytes: 1,024 to 16 MiB.
    pub send_bytes: usize,
    /// Most connections of a shard, at least 1.
    pub connections: usize,
    /// Receive queue of a UDP socket in bytes.
    pub udp_bytes: usize,
    /// Bytes of fragments that wait for the rest of their packet.
    pub reassembly_bytes: usize,
}

impl Limits {
    /// By the memory of the domain, where the configuration leaves it open. Buffers grow with memory up to 256 KiB (more
    /// only pushes them out of the CPU's cache); all connections together may take half of it.
    pub fn new(tcp: &config::Tcp, memory_bytes: u64, shards: usize) -> Self {
        let by_memory = (memory_bytes / 2048).clamp(8 << 10, 256 << 10) as usize;
        let buffer = |configured: u32| match configured {
            0 => by_memory,
            bytes => (bytes as usize).clamp(1 << 10, 16 << 20),
        };
        let (receive_bytes, send_bytes) = (buffer(tcp.receive_bytes), buffer(tcp.send_bytes));
        let connections = match tcp.connections {
            0 => (memory_bytes / 2 / (receive_bytes + send_bytes) as u64).clamp(16, 1 << 20) as usize,
            n => n as usize,
        };
        Self {
            receive_bytes,
            send_bytes,
            connections: connections.div_ceil(shards.max(1)),
            udp_bytes: by_memory,
            reassembly_bytes: by_memory.max(128 << 10).min((memory_bytes / 64) as usize),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_addresses_and_names_the_wrong_key() {
        let mut config = config::Config::default();
        assert_eq!(Settings::parse(&config, 3).unwrap().ipv4, Ipv4Setting::Dhcp);
        config.interfaces.push(config::Interface {
            ipv4: "10.0.2.15/24".into(),
            gateway: Some("10.0.2.2".into()),
            ..Default::default()
        });
        let settings = Settings::parse(&config, 0).unwrap();
        assert_eq!(settings.ipv4, Ipv4Setting::Static(Ipv4Addr::new(10, 0, 2, 15), 24));
        assert_eq!(settings.gateways, [IpAddr::V4(Ipv4Addr::new(10, 0, 2, 2))]);
        for wrong in ["10.0.2.15", "10.0.2.15/33", "255.255.255.255/24", "dchp"] {
            config.interfaces[0].ipv4 = wrong.into();
            assert!(Settings::parse(&config, 0).unwrap_err().contains("interfaces[0].ipv4"));
        }
    }

    #[test]
    fn small_memory_still_gets_connections() {
        let limits = Limits::new(&config::Tcp::default(), 8 << 20, 1);
        assert_eq!(limits.receive_bytes, 8 << 10);
        assert!(limits.connections >= 128);
        assert!(limits.reassembly_bytes >= 65_536);
    }
}
