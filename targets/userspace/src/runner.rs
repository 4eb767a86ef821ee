//! Running one application, as `anykernel run` does.

use crate::control::Control;
use crate::gateway::{self, Bound, Gateway};
use crate::instance::Enter;
use crate::link::{Pcap, Tap};
use crate::record::Recording;
use crate::trace::Trace;
use crate::usb::UsbBus;
use crate::usb_pcap::UsbPcap;
use crate::{
    Builder, ConsoleSink, Failure, HostDisk, Instance, Link, NetSpec, PosixHost, RunSpec, UsbSpec, apps,
    interrupt, qemu, replay,
};
use anykernel::{StartError, nearest};
use anykernel_usb::Options;
use anykernel_usb::usbmon::Capture;
use hypercall::layers::recorded::ENTER_STOP;
use hypercall::layers::{Recorded, Recorder, Traced};
use hypercall::{ExitStatus, Host, HostBlock, HostLink, HostUsb};
use serde_json::json;
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Where an application runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// This process.
    Userspace,
    /// A unikernel in QEMU.
    Rumprun,
    /// A Linux kernel in QEMU that loads the module.
    LinuxModule,
}

/// Less is refused: no component can work in it.
pub const LEAST_MEMORY: u64 = 4 << 20;

/// Less is refused: the calls of a start are more.
pub const LEAST_RECORDING: u64 = 256 << 10;

/// Runs `spec.config.app` on `target` to its end. Failures are lines for a person.
pub fn run(target: Target, spec: &RunSpec) -> Result<ExitStatus, Failure> {
    check(target, spec)?;
    let serves = spec.config.app.first().is_some_and(|app| app == "httpd");
    if serves && spec.net == NetSpec::User && spec.publish.is_empty() && !spec.json && !spec.quiet {
        eprintln!("anykernel: nothing leads to the guest: publish a port, as in --publish 8080:80");
    }
    let status = match target {
        // Says more when it ends.
        Target::Userspace => {
            let usb_pcap = spec.usb_pcap.as_deref().map(UsbPcap::create).transpose()?;
            let status = userspace(spec, usb_pcap.clone())?;
            return usb_pcap.map_or(Ok(()), |file| file.finish()).map(|()| status);
        }
        Target::Rumprun => qemu::rumprun::run(&with_ports(spec)?),
        Target::LinuxModule => qemu::linux_module::run(&with_ports(spec)?),
    }?;
    if spec.json {
        announce(spec, &json!({ "event": "exit", "status": status.code() }), "");
    }
    Ok(status)
}

/// The same with a free port wherever port 0 asks for one: QEMU would not tell which it took.
fn with_ports(spec: &RunSpec) -> Result<RunSpec, Failure> {
    let mut spec = spec.clone();
    for publish in &mut spec.publish {
        let listener = TcpListener::bind(publish.host);
        let listener = listener.map_err(|error| crate::spec::port_failure(publish.host, &error))?;
        if publish.host.port() == 0 {
            let chosen = listener.local_addr().map_err(|error| Failure::new(error.to_string()))?;
            publish.host.set_port(chosen.port());
        }
    }
    Ok(spec)
}

/// What can be said before anything starts.
fn check(target: Target, spec: &RunSpec) -> Result<(), Failure> {
    let app = spec.config.app.first().map(String::as_str).unwrap_or_default();
    let names = || apps::APPS.iter().map(|(name, _)| *name);
    if !names().any(|name| name == app) {
        let hint = match nearest(app, names()) {
            Some(name) => format!("did you mean {name}?"),
            None => format!("there are {}", names().collect::<Vec<_>>().join(", ")),
        };
        return Err(Failure::usage(format!("no application is called {app:?}: {hint}")));
    }
    if !spec.publish.is_empty() && spec.net != NetSpec::User {
        return Err(Failure::usage(
            "--publish works with --net user only: elsewhere the guest has an address of its own",
        ));
    }
    if target != Target::Userspace {
        qemu::check_installed()?;
    }
    for path in [&spec.trace, &spec.record, &spec.pcap, &spec.usb_pcap, &spec.control].into_iter().flatten() {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        if let Some(dir) = dir.filter(|dir| !dir.is_dir()) {
            return Err(Failure::new(format!(
                "{}: there is no directory {}: make it first",
                path.display(),
                dir.display()
            )));
        }
    }
    if spec.trace.is_some() && spec.record.is_some() {
        return Err(Failure::usage("--trace and --record do not go together: give one of them"));
    }
    if spec.record.is_some() && spec.record_limit < LEAST_RECORDING {
        return Err(Failure::usage(format!(
            "--record-limit is too small to record anything: give at least {}K",
            LEAST_RECORDING >> 10
        )));
    }
    if spec.memory.is_some_and(|bytes| bytes < LEAST_MEMORY) {
        return Err(Failure::usage(format!(
            "too little memory: give at least --memory {}M",
            LEAST_MEMORY >> 20
        )));
    }
    if target == Target::Userspace && spec.record.is_some() && spec.usb_pcap.is_some() {
        return Err(Failure::usage(
            "--usb-pcap and --record do not go together in a process, whose stack would ask for the time: give one of them",
        ));
    }
    let usb_disk = spec.config.mounts.iter().any(|mount| mount.source.starts_with("usb"));
    if spec.usb_pcap.is_some()
        && spec.usb.is_empty()
        && spec.config.usb.is_empty()
        && !usb_disk
        && app != "usb"
    {
        return Err(Failure::usage(
            "--usb-pcap records USB, and nothing here uses it: add --usb disk:FILE, for example",
        ));
    }
    let of_guests = |one: &UsbSpec| !matches!(one, UsbSpec::Host(_));
    if target == Target::Userspace && spec.usb.iter().any(of_guests) {
        return Err(Failure::usage(
            "--usb plugs what QEMU plays in to a guest: add --on rumprun, or give a device of this machine as host:BUS-PORT \
             (`anykernel usb list` shows them)",
        ));
    }
    for disk in spec.usb.iter().filter_map(|one| match one {
        UsbSpec::Disk(disk) => Some(disk),
        _ => None,
    }) {
        drop(HostDisk::open(&disk.path, disk.writable)?);
    }
    // What a USB disk is called shows when it is plugged in.
    for mount in spec.config.mounts.iter().filter(|mount| !mount.source.starts_with("usb")) {
        check_device(&mount.source, spec.disks.len())?;
    }
    // Opened here for the message only; each target opens them its own way.
    for disk in &spec.disks {
        drop(HostDisk::open(&disk.path, disk.writable)?);
    }
    Ok(())
}

/// Refuses a name that no device can have.
fn check_device(name: &str, disks: usize) -> Result<(), Failure> {
    let disk = name.strip_prefix("disk").map(|rest| rest.split_once('p').map_or(rest, |(disk, _)| disk));
    if name == "tmpfs" || disk.is_some_and(|disk| disk.parse().is_ok_and(|index: usize| index < disks)) {
        return Ok(());
    }
    let mut known: Vec<_> = (0..disks).map(|index| format!("disk{index}")).collect();
    known.push("tmpfs".into());
    let hint = match nearest(name, known.iter().map(String::as_str)) {
        Some(nearest) if disk.is_none() => format!("did you mean {nearest}?"),
        _ if disks == 0 => "no disk is attached: add --disk FILE".into(),
        _ => format!("there are {}, and partitions as disk0p1", known.join(", ")),
    };
    Err(Failure::usage(format!("no device is called {name:?}: {hint}")))
}

fn start_failure(error: StartError) -> Failure {
    match error {
        StartError::Config(line) => Failure::usage(line),
        error => Failure::new(error.to_string()),
    }
}

/// Says something about the run: as an event on standard output, or for a person on standard error.
fn announce(spec: &RunSpec, event: &serde_json::Value, line: &str) {
    // Nobody listens: nothing is lost.
    if spec.json {
        let _ = writeln!(std::io::stdout(), "{event}");
    } else {
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}

/// Says that a published port can be used.
pub(crate) fn announce_port(spec: &RunSpec, host: SocketAddr, guest: u16) {
    announce(
        spec,
        &json!({ "event": "publish", "host": host.to_string(), "guest": guest }),
        &format!("ready: {host} leads to port {guest} of the guest; Ctrl-C ends it"),
    );
}

/// Says of each published port that it can be used, as soon as the application listens.
fn announce_ports(
    spec: &RunSpec,
    gateway: &Gateway,
    published: &[(SocketAddr, u16)],
    ended: impl Fn() -> bool,
) {
    if spec.quiet {
        return;
    }
    for (host, guest) in published {
        if gateway.wait_until_open(*guest, &ended) {
            announce_port(spec, *host, *guest);
        }
    }
}

/// Runs in this process.
fn userspace(spec: &RunSpec, usb_pcap: Option<Arc<UsbPcap>>) -> Result<ExitStatus, Failure> {
    let mut builder = Instance::builder()
        .cpus(spec.cpus)
        .memory(spec.memory.unwrap_or(0))
        .config(spec.config.clone())
        .console(ConsoleSink::Stdout { json: spec.json });
    if let Some(options) = Options::of_config(&spec.config) {
        let capture = usb_pcap.map(|file| Capture::new(move |bytes| file.write(bytes)));
        let options = Options { capture, ..options };
        builder = builder.usb(UsbBus::new()?, options);
    }
    for disk in &spec.disks {
        builder = builder.disk(HostDisk::open(&disk.path, disk.writable)?);
    }
    if let Some(path) = &spec.pcap {
        builder = builder.pcap(Arc::new(Pcap::create(path)?));
    }
    let mut published = Vec::new();
    let mut gateway = None;
    match &spec.net {
        // They are there already, or come.
        NetSpec::None | NetSpec::Usb => {}
        NetSpec::Tap(name) => builder = builder.link(Link::Tap(Tap::open_interface(name)?)),
        NetSpec::User => {
            let bound: Bound = gateway::bind(&spec.publish)?;
            published = bound.addresses();
            let (running, link) = bound.start().map_err(start_failure)?;
            gateway = Some(running);
            builder = builder.link(link);
        }
    }
    if let Some(path) = &spec.record {
        return record(spec, path, builder, gateway, &published);
    }
    let Some(path) = &spec.trace else {
        let instance = builder.start().map_err(start_failure)?;
        return run_instance(spec, &instance, gateway, &published, |_, body| body());
    };
    let control = spec.control.as_deref().map(Control::listen).transpose()?;
    let (trace, ring) = Trace::start(path, &spec.config.hostname, control.clone())?;
    let instance = builder.start_on(|host| Traced::new(host, ring)).map_err(start_failure)?;
    if let Some(control) = control {
        let kernel = Arc::downgrade(instance.kernel());
        control.set_counters(move || kernel.upgrade().map_or_else(Vec::new, |kernel| kernel.counters()));
    }
    let status = run_instance(spec, &instance, gateway, &published, |_, body| body());
    instance.shutdown();
    trace.finish()?;
    status
}

/// The same, recorded.
fn record(
    spec: &RunSpec,
    path: &Path,
    builder: Builder,
    gateway: Option<Gateway>,
    published: &[(SocketAddr, u16)],
) -> Result<ExitStatus, Failure> {
    let header = replay::header("userspace", spec);
    let (recording, ring) = Recording::start(path, &header, spec.record_limit)?;
    let recorder: &'static Recorder = Box::leak(Box::new(Recorder::new(ring)));
    let enter: Enter<Recorded<PosixHost>> = |host, body| host.enter(ENTER_STOP, body);
    let instance =
        builder.start_entered(|host| Recorded::new(host, recorder), enter).map_err(start_failure)?;
    let host = instance.kernel().host();
    let status = run_instance(spec, &instance, gateway, published, enter);
    instance.shutdown();
    host.leave();
    recording.finish()?;
    status
}

fn run_instance<H: Host + HostBlock + HostLink + HostUsb>(
    spec: &RunSpec,
    instance: &Instance<H>,
    gateway: Option<Gateway>,
    published: &[(SocketAddr, u16)],
    enter: Enter<H>,
) -> Result<ExitStatus, Failure> {
    let kernel = instance.kernel().clone();
    let stop = Arc::downgrade(&kernel);
    let guard = interrupt::on_interrupt(move || {
        if let Some(kernel) = stop.upgrade() {
            enter(&kernel.host(), &|| kernel.stop());
        }
    });
    let app = spec.config.app.first().map(String::as_str).unwrap_or_default();
    let ended = AtomicBool::new(false);
    let status = std::thread::scope(|scope| {
        if let Some(gateway) = &gateway {
            scope.spawn(|| announce_ports(spec, gateway, published, || ended.load(Ordering::Acquire)));
        }
        let status = instance.run(|kernel| apps::run(app, kernel).unwrap_or(ExitStatus::Usage));
        ended.store(true, Ordering::Release);
        status
    });
    drop(guard);
    // Clients are cut off before the stack behind them goes.
    drop(gateway);
    // Also when nobody wants to know: a recording has the same calls either way.
    let counters = kernel.counters();
    if spec.json {
        let counters: serde_json::Map<_, _> =
            counters.into_iter().map(|(name, value)| (name, value.into())).collect();
        announce(spec, &json!({ "event": "exit", "status": status.code(), "counters": counters }), "");
    }
    drop(kernel);
    Ok(status)
}
