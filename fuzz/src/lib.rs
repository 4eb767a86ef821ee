//! Fuzz targets: one function from bytes to nothing for each, which panics when something is wrong.
//!
//! The same functions run under libFuzzer (`fuzz_targets/`), in `cargo test` on the corpus, and in `reproduce`. Every
//! execution starts from nothing, in this process and on this thread: [`host`] is a host without threads and with virtual
//! time, devices and peers are played from the input, and nothing is read or written outside memory.
//!
//! Beside panics these are findings: memory or steps beyond a bound ([`watch`]), memory left behind, a deadlock, a TCP
//! stream with a wrong byte, a FAT volume that differs from a model or that a checker complains of, a driver that gives
//! a caller a buffer of the wrong length, an HTTP answer whose length is not what it says.

pub mod config;
pub mod fs;
pub mod host;
pub mod http;
pub mod input;
pub mod net;
pub mod recording;
pub mod usb;
pub mod virtio;
pub mod watch;

/// A fuzz target.
#[derive(Clone, Copy)]
pub struct Target {
    /// As in `fuzz_targets/NAME.rs`.
    pub name: &'static str,
    /// What is attacked, in one line.
    pub about: &'static str,
    /// Longest input worth trying, in bytes.
    pub max_len: usize,
    /// One execution, without its bounds.
    run: fn(&[u8]),
}

macro_rules! targets {
    ($($name:literal, $about:literal, $max_len:literal, $run:path;)*) => {
        /// Every target.
        pub const TARGETS: &[Target] =
            &[$(Target { name: $name, about: $about, max_len: $max_len, run: $run }),*];
    };
}

targets! {
    "config", "the JSON configuration", 4096, config::run;
    "dhcp", "the DHCP client and router advertisements, against a hostile server", 2048, net::dhcp::run;
    "dns", "name look-ups, against a hostile name server", 2048, net::dns::run;
    "ext4", "mount, walk and read of an ext4 image changed field by field, with checksums made right", 512, fs::ext4::run;
    "fat", "mount, walk, read and write of FAT volumes; whole ones against a model and a checker", 1024, fs::fat::run;
    "frames", "Ethernet, ARP, IPv4, IPv6, ICMP, NDP, UDP and TCP frames against open sockets", 4096, net::frames::run;
    "hostlink", "the NIC driver over host links, with a host that lies", 2048, net::hostlink::run;
    "http", "the HTTP server, with clients that send and take what they like", 2048, http::run;
    "partition", "partition tables and everything that mounts by itself", 8192, fs::partition::run;
    "recording", "the recorder's files: chunks and records", 4096, recording::run;
    "tcp", "segments against a connection in every state; the streams are checked byte by byte", 2048, net::tcp::run;
    "usb_descriptors", "device, configuration and string descriptors of a USB device", 1024, usb::descriptors;
    "usb_devices", "the whole USB stack, with a hub, a disk, a keyboard and a network device that lie", 1024, usb::devices::run;
    "usb_hid", "report descriptors of input devices, and their reports", 1024, usb::hid;
    "usb_hub", "descriptors and port states of a USB hub", 256, usb::hub;
    "usb_ncm", "blocks of Ethernet frames from a USB network device", 4096, usb::ncm;
    "usb_storage", "status wrappers and SCSI answers of a USB disk", 256, usb::storage;
    "virtio_blk", "the virtio-blk driver against a device that breaks every rule", 1024, virtio::blk::run;
    "virtio_net", "the virtio-net driver against a device that breaks every rule", 1024, virtio::net::run;
    "xhci", "the xHCI driver with a disk and a keyboard, against a controller that lies", 512, usb::xhci::run;
}

impl Target {
    /// The target of this name.
    pub fn find(name: &str) -> Option<&'static Self> {
        TARGETS.iter().find(|target| target.name == name)
    }

    /// The target of this name, known when compiled: of the others nothing gets into the program, and what it counts are the
    /// edges that it can reach.
    pub const fn named(name: &str) -> Self {
        let mut at = 0;
        while at < TARGETS.len() {
            if same(TARGETS[at].name.as_bytes(), name.as_bytes()) {
                return TARGETS[at];
            }
            at += 1;
        }
        panic!("no target has this name")
    }

    /// One execution. Panics, or aborts for memory, when it finds something.
    pub fn execute(&self, data: &[u8]) {
        watch::bounded(|| {
            (self.run)(data);
            // What the host was left with goes before memory is counted, or a longer input than the last looks like a leak.
            host::FuzzHost::fresh();
        });
    }
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    let (mut at, same_len) = (0, a.len() == b.len());
    while same_len && at < a.len() && a[at] == b[at] {
        at += 1;
    }
    same_len && at == a.len()
}

/// What `fuzz_targets/NAME.rs` consist of. A plant grows where `ANYKERNEL_PLANT` names one and the build has them.
#[cfg(feature = "libfuzzer")]
#[macro_export]
macro_rules! fuzz_target {
    ($name:literal) => {
        const TARGET: $crate::Target = $crate::Target::named($name);
        libfuzzer_sys::fuzz_target!(init: $crate::prepare(), |data: &[u8]| TARGET.execute(data));
    };
}

/// What the environment asks for, before the first execution: the bug that `ANYKERNEL_PLANT` names grows, if the build has
/// plants, and with `ANYKERNEL_TELL_PLACE` a refused allocation and an input that takes so many seconds print their place.
pub fn prepare() {
    if let Some(seconds) = std::env::var("ANYKERNEL_TELL_PLACE").ok().and_then(|value| value.parse().ok()) {
        watch::tell_refusals();
        watch::tell_hang(seconds);
    }
    if let Ok(name) = std::env::var("ANYKERNEL_PLANT") {
        #[cfg(feature = "planted")]
        hypercall::planted::grow(&name);
        #[cfg(not(feature = "planted"))]
        panic!("this build cannot have the planted bug {name}");
    }
}
