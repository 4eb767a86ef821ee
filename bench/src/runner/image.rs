//! How large the httpd image is and in how little memory it serves, beside nginx on a Debian kernel.

use super::guest::{Guest, answers, free_port};
use super::{Result, linux, net};
use crate::record::{Better, Record};
use anykernel_userspace::qemu::{Machine, rumprun};
use anykernel_userspace::{DiskSpec, NetSpec, Publish, RunSpec};
use serde_json::json;
use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::time::Duration;

/// MiB that are tried, from little to much.
const SIZES: [u32; 14] = [4, 5, 6, 7, 8, 10, 12, 16, 32, 64, 96, 128, 160, 256];

fn size(path: &Path) -> Result<f64> {
    fs::metadata(path).map(|data| data.len() as f64).map_err(|error| format!("{}: {error}", path.display()))
}

/// The least memory with which `start` makes a guest that serves a 64 KiB file, in MiB.
fn least(start: impl Fn(u32, u16) -> Result<Guest>) -> Result<f64> {
    for mib in SIZES {
        let port = free_port()?;
        if answers(&mut start(mib, port)?, port, "64k", 64 << 10, Duration::from_secs(30)) {
            return Ok(f64::from(mib));
        }
    }
    Err("nothing serves, with whatever memory".into())
}

/// Runs it.
pub fn bench(programs: &Path, dir: &Path) -> Result {
    let image = rumprun::image("httpd").map_err(|failure| failure.to_string())?;
    let disk = net::disk(dir)?;
    let config = dir.join("image.json");
    let mount = json!({"source": "disk0", "target": "/", "read_only": true});
    fs::write(&config, json!({"app": ["httpd"], "mounts": [mount]}).to_string())
        .map_err(|error| error.to_string())?;
    let peer = linux::prepare(dir, "10.0.2.15/24", &programs.join("netpeer"), &net::pages())?;

    let spec = |mib: u32, port: u16, disks| RunSpec {
        memory: Some(u64::from(mib) << 20),
        net: NetSpec::User,
        publish: vec![Publish { host: SocketAddrV4::new(Ipv4Addr::LOCALHOST, port), guest: 80 }],
        disks,
        ..RunSpec::new(Default::default())
    };
    let ours = least(|mib, port| {
        let spec = spec(mib, port, vec![DiskSpec { path: disk.clone(), writable: false }]);
        let mut machine = Machine::microvm("httpd", &spec, 0);
        Guest::start(machine.kernel(&image).arg("-initrd").arg(&config))
    })?;
    let theirs = least(|mib, port| {
        let mut machine = Machine::q35("Debian", &spec(mib, port, Vec::new()), 0);
        machine.kernel(&peer.kernel).arg("-initrd").arg(&peer.initrd);
        Guest::start(machine.args(["-append", "quiet console=ttyS0"]))
    })?;
    let bytes = size(&image)?;
    Ok(vec![
        Record::new(
            ("image", "httpd, stripped", "rumprun"),
            "bytes",
            Better::Lower,
            &[bytes],
            ("Debian 6.1 and nginx", &[size(&peer.kernel)? + size(&peer.initrd)?]),
        )
        .at_most(1.2e6)
        .note("quoted: rumprun hello 2.8 MB, Unikraft nginx 1.6 MB"),
        Record::new(
            ("image", "least memory that serves", "rumprun"),
            "MiB",
            Better::Lower,
            &[ours],
            ("Debian 6.1 and nginx", &[theirs]),
        )
        .at_most(8.0)
        .note("quoted: rumprun hello 8 MB, Unikraft nginx 5 MB"),
    ])
}
