//! The peer of the unikernel: a Debian cloud kernel with busybox, nginx and `netpeer` in its initramfs.

use super::Result;
use anykernel_userspace::Failure;
use anykernel_userspace::qemu::build::workspace;
use anykernel_userspace::qemu::linux_module::initramfs::Initramfs;
use anykernel_userspace::qemu::linux_module::{MODULES, find_modules, kernel};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the guest needs beside the modules of the other guests.
const SERIES: &str = "6.1";

/// The guest's first process. `@ADDRESS@` is its address with prefix length.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
echo uptime $(cat /proc/uptime)
mkdir -p /tmp /var/log/nginx /var/lib/nginx/body /run
for file in /lib/*.ko.xz; do [ -f "$file" ] && unxz "$file"; done
for name in $(cat /modules); do [ -f "/lib/$name.ko" ] && insmod "/lib/$name.ko"; done
ip link set lo up
ip addr add @ADDRESS@ dev eth0
ip link set eth0 up
/netpeer &
/usr/sbin/nginx -c /nginx.conf
echo ready
while :; do sleep 1000; done
"#;

/// One worker, access log off, the kernel's sendfile: nginx as one would run it on one CPU.
const NGINX: &str = "worker_processes 1; pid /run/nginx.pid; error_log /dev/null; \
    events { worker_connections 1024; } \
    http { access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000; \
    server { listen 80 default_server; root /srv; } }\n";

/// What boots.
pub struct LinuxGuest {
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initial file system.
    pub initrd: PathBuf,
}

fn told(path: &Path) -> impl Fn(std::io::Error) -> String + '_ {
    move |error| format!("{}: {error}", path.display())
}

/// A program and the libraries that ldd(1) names, at their paths.
fn program(root: &mut Initramfs, made: &mut BTreeSet<String>, from: &Path, to: &str) -> Result<()> {
    let output = Command::new("ldd").arg(from).output().map_err(|error| format!("ldd: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for word in text.split_whitespace().filter(|word| word.starts_with('/')) {
        file(root, made, Path::new(word), word.trim_start_matches('/'))?;
    }
    file(root, made, from, to)
}

fn file(root: &mut Initramfs, made: &mut BTreeSet<String>, from: &Path, to: &str) -> Result<()> {
    if made.contains(to) {
        return Ok(());
    }
    let content = fs::read(from).map_err(told(from))?;
    add(root, made, to, &content);
    Ok(())
}

fn add(root: &mut Initramfs, made: &mut BTreeSet<String>, to: &str, content: &[u8]) {
    for (at, _) in to.match_indices('/') {
        if made.insert(to[..at].into()) {
            root.directory(&to[..at]);
        }
    }
    if made.insert(to.into()) {
        root.file(to, content);
    }
}

/// Makes the guest's files in `dir`. `address` is what it gets, as in `10.7.0.2/24`; `pages` go to `/srv`.
pub fn prepare(dir: &Path, address: &str, netpeer: &Path, pages: &[(String, Vec<u8>)]) -> Result<LinuxGuest> {
    let line = |failure: Failure| failure.to_string();
    let store = workspace().map_err(line)?.join("target/linux");
    let kernel = kernel::find(SERIES, kernel::Flavour::Cloud, &store).map_err(line)?;
    let mut root = Initramfs::default();
    let mut made = BTreeSet::new();
    for directory in ["dev", "proc", "sys", "tmp", "run", "var", "etc"] {
        made.insert(directory.into());
        root.directory(directory);
    }
    file(&mut root, &mut made, &kernel::busybox(&store).map_err(line)?, "bin/busybox")?;
    add(&mut root, &mut made, "init", INIT.replace("@ADDRESS@", address).as_bytes());
    add(&mut root, &mut made, "modules", MODULES.join("\n").as_bytes());
    add(&mut root, &mut made, "nginx.conf", NGINX.as_bytes());
    add(&mut root, &mut made, "etc/passwd", b"root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n");
    add(&mut root, &mut made, "etc/group", b"root:x:0:\nnogroup:x:65534:\n");
    program(&mut root, &mut made, netpeer, "netpeer")?;
    program(&mut root, &mut made, Path::new("/usr/sbin/nginx"), "usr/sbin/nginx")?;
    let mut modules = Vec::new();
    find_modules(&kernel.modules, &mut modules);
    for (name, path) in modules {
        file(&mut root, &mut made, &path, &format!("lib/{name}"))?;
    }
    for (name, content) in pages {
        add(&mut root, &mut made, &format!("srv/{name}"), content);
    }
    let initrd = dir.join("linux-peer.cpio");
    fs::write(&initrd, root.finish()).map_err(told(&initrd))?;
    Ok(LinuxGuest { kernel: kernel.image, initrd })
}
