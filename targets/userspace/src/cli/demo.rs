//! `demo`: a small web site on an ext4 image that is part of this binary.

use super::Outcome;
use super::run::On;
use anykernel::config::Config;
use anykernel_userspace::{
    DiskSpec, Failure, HostDisk, MachineKind, NetSpec, Publish, RunSpec, gateway, interrupt, logger, plan,
    runner,
};
use clap::Args;
use hypercall::ExitStatus;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Made from `demo/site` by `demo/make-image.sh`.
static IMAGE: &[u8] = include_bytes!("../../demo/site.ext4");

/// Ports that are tried without `--port`.
const PORTS: std::ops::Range<u16> = 8080..8100;

/// How long it may take until the server answers. Building and booting a guest takes longer than starting here.
fn patience(on: On) -> Duration {
    Duration::from_secs(if on == On::Userspace { 60 } else { 1800 })
}

/// Serve a small web site from an ext4 image that comes with this command
#[derive(Args)]
#[command(after_help = "Examples:
  anykernel demo                       in this process; no privileges needed
  anykernel demo --on rumprun          the same components as a unikernel in QEMU
  anykernel demo --on linux-module     the same components inside a Linux kernel in QEMU
  anykernel demo --once                check that it works and end

The URL is printed when the server answers. Ctrl-C ends the demo; nothing is written anywhere.")]
pub(super) struct Demo {
    /// Where to run it
    #[arg(long, value_enum, default_value = "userspace", value_name = "TARGET")]
    on: On,
    /// The port on 127.0.0.1; without it 8080 or the next free one
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// CPUs of the guest
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=256), value_name = "N")]
    cpus: u32,
    /// Fetch the start page once, then end; the exit status says whether it came
    #[arg(long)]
    once: bool,
    /// Write the frames of the link, for Wireshark
    #[arg(long, value_name = "FILE")]
    pcap: Option<std::path::PathBuf>,
}

fn free_port() -> Result<u16, Failure> {
    PORTS.clone().find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok()).ok_or_else(|| {
        Failure::new(format!(
            "all ports from {} to {} are in use: choose one with --port",
            PORTS.start,
            PORTS.end - 1
        ))
    })
}

impl Demo {
    pub(super) fn run(self) -> Outcome {
        logger::init("warn");
        let port = self.port.map_or_else(free_port, Ok)?;
        // A file without a name: QEMU can open it, too, and it is gone when we are.
        let (path, file) =
            HostDisk::memory_path(IMAGE).map_err(|error| Failure::new(format!("the image: {error}")))?;
        let config = Config {
            log: "warn".into(),
            app: vec!["httpd".into()],
            mounts: vec![plan::root_mount(&path, false)?],
            interfaces: vec![gateway::guest_interface()],
            ..Config::default()
        };
        let spec = RunSpec {
            config,
            disks: vec![DiskSpec { path, writable: false }],
            publish: vec![Publish { host: SocketAddrV4::new(Ipv4Addr::LOCALHOST, port), guest: 80 }],
            usb: Vec::new(),
            net: NetSpec::User,
            machine: MachineKind::default(),
            cpus: self.cpus,
            memory: None,
            trace: None,
            control: None,
            record: None,
            record_limit: anykernel_userspace::record::DEFAULT_LIMIT,
            pcap: self.pcap,
            usb_pcap: None,
            json: false,
            quiet: true,
            stderr: false,
        };
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let greeter = scope.spawn(|| greet(port, self.once, patience(self.on), &ended));
            let outcome = runner::run(self.on.into(), &spec);
            ended.store(true, Ordering::SeqCst);
            let greeted = greeter.join().unwrap_or(false);
            drop(file);
            match outcome {
                Ok(ExitStatus::Success) if !greeted && self.once => {
                    Err(Failure::new("the server did not deliver its start page"))
                }
                outcome => outcome,
            }
        })
    }
}

/// Waits until the server answers, says where, and with `once` ends the run. Says whether it answered.
fn greet(port: u16, once: bool, patience: Duration, ended: &AtomicBool) -> bool {
    let start = Instant::now();
    let page = loop {
        if let Some(page) = fetch(port) {
            break Some(page);
        }
        if ended.load(Ordering::SeqCst) || interrupt::interrupted() || start.elapsed() > patience {
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    // Nobody reads it: the demo goes on.
    let mut out = std::io::stdout();
    if let Some(page) = page {
        let ms = start.elapsed().as_millis();
        let _ = if once {
            writeln!(out, "http://127.0.0.1:{port}/ answered {page} bytes after {ms} ms")
        } else {
            writeln!(
                out,
                "Open http://127.0.0.1:{port}/ in a browser, or: curl http://127.0.0.1:{port}/\nCtrl-C ends the demo."
            )
        };
    } else if !ended.load(Ordering::SeqCst) && !interrupt::interrupted() {
        eprintln!("anykernel: the server does not answer on port {port}; ending");
    }
    if once || page.is_none() {
        interrupt::request();
    }
    page.is_some()
}

/// The length of the start page, if it comes.
fn fetch(port: u16) -> Option<usize> {
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port).into();
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(3))).ok()?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let body = answer.windows(4).position(|end| end == b"\r\n\r\n")? + 4;
    answer.starts_with(b"HTTP/1.1 200 ").then_some(answer.len() - body)
}
