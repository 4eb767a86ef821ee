//! Every hypercall fails: a node boots, mounts, writes, reads, talks TCP and UDP to another one, and shuts down, while one
//! call of its fails, or all from one on, or any by chance. Whatever fails, it must not panic, not hang, give everything
//! back, and keep what it said was durable. `faults-httpd` does the same to a node that serves a file over HTTP.

use super::{Options, Report, image, pattern, patterned, serve, with_address, with_kernel};
use crate::sim::{DiskModel, Failure, MS, NodeSetup, PowerCut, SECOND, SimConfig, SimHost, Simulation};
use anykernel::Kernel;
use anykernel::config::{Config, Mount};
use anykernel::fs::{FileKind, Namespace, OpenOptions};
use anykernel::socket::{SocketProvider, TcpStream, UdpSocket};
use anykernel::task::{block_on, block_on_until};
use hypercall::layers::{Fault, FaultPlan, Faulty};
use hypercall::{Call, Clock, Host, ThreadSpec, Threads};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

/// Files and what must be in them.
type Promised = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;

const SERVER: [u8; 4] = [10, 0, 0, 2];
/// Longer than any recovery takes: TCP gives up before.
const LIMIT_NS: u64 = 3_600 * SECOND;

fn config() -> Config {
    let mount =
        Mount { source: "disk0".into(), target: "/data".into(), kind: Some("vfat".into()), read_only: false };
    Config { mounts: vec![mount], ..with_address("10.0.0.1/24") }
}

/// What the node does once it is up. Errors are for those who caused them; what was acknowledged is promised.
fn work<H: Host>(kernel: &Arc<Kernel<H>>, promised: &Promised) {
    if let Some(namespace) = kernel.namespace() {
        files(&*namespace, promised);
    }
    if let Some(sockets) = kernel.sockets() {
        // Failures on the way are seen as time-outs.
        let _ = upload(kernel, &*sockets);
        let _ = ask(kernel, &*sockets);
    }
    if let Some(namespace) = kernel.namespace() {
        more_files(&*namespace, promised);
    }
}

fn save(namespace: &dyn Namespace, path: &str, content: &[u8], promised: &Promised) -> Option<()> {
    // Whatever was promised before may be gone as soon as it is overwritten.
    promised.lock().expect("one thread").remove(path);
    let file = namespace.open(path.as_bytes(), OpenOptions::CREATE).ok()?;
    let mut at = 0;
    while at < content.len() {
        match file.write_at(at as u64, &content[at..]).ok()? {
            0 => return None,
            n => at += n,
        }
    }
    file.inode.sync().ok()?;
    // The file is durable; whether its name is depends on the directory.
    namespace.sync().ok()?;
    promised.lock().expect("one thread").insert(path.into(), content.to_vec());
    Some(())
}

fn files(namespace: &dyn Namespace, promised: &Promised) {
    // Each step is tried, whatever became of the one before.
    let _ = namespace.create(b"/data/dir", FileKind::Directory, None);
    save(namespace, "/data/one", &patterned(1, 3000), promised);
    save(namespace, "/data/dir/two", &patterned(2, 20_000), promised);
    let mut buf = vec![0; 30_000];
    if let Ok(file) = namespace.open(b"/data/dir/two", OpenOptions::READ)
        && let Ok(n) = file.read_at(0, &mut buf)
    {
        assert!((0..n).all(|at| buf[at] == pattern(2, at)), "a read returned what nobody wrote");
    }
}

fn more_files(namespace: &dyn Namespace, promised: &Promised) {
    save(namespace, "/data/one", &patterned(3, 5000), promised);
    let two = promised.lock().expect("one thread").remove("/data/dir/two");
    if namespace.rename(b"/data/dir/two", b"/data/moved").is_ok()
        && namespace.sync().is_ok()
        && let Some(content) = two
    {
        promised.lock().expect("one thread").insert("/data/moved".into(), content);
    }
    if namespace.remove(b"/data/dir").is_ok() {
        let _ = namespace.sync();
    }
}

fn upload<H: Host>(kernel: &Arc<Kernel<H>>, sockets: &dyn SocketProvider) -> Option<()> {
    let host = kernel.host();
    let to = SocketAddr::from((SERVER, netbench::SINK));
    let data = patterned(4, 40_000);
    block_on_until(
        host,
        async {
            let stream = TcpStream::connect(sockets, to).await.ok()?;
            stream.send_all(&data).await.ok()?;
            stream.0.shutdown(anykernel::socket::Shutdown::Write).ok()?;
            let mut one = [0; 1];
            stream.recv(&mut one).await.ok()
        },
        Some(host.monotonic_ns() + 300 * SECOND),
    )??;
    Some(())
}

fn ask<H: Host>(kernel: &Arc<Kernel<H>>, sockets: &dyn SocketProvider) -> Option<()> {
    let host = kernel.host();
    let socket = UdpSocket(sockets.bind(([0, 0, 0, 0], 0).into()).ok()?);
    block_on(host, socket.send_to(b"hello", (SERVER, netbench::ECHO).into())).ok()?;
    let mut buf = [0; 100];
    let (n, _) =
        block_on_until(host, socket.recv_from(&mut buf), Some(host.monotonic_ns() + SECOND))?.ok()?;
    assert_eq!(&buf[..n], b"hello", "an echo changed");
    Some(())
}

/// What `faults-httpd` serves as `/file` of its disk.
pub fn served_file() -> Vec<u8> {
    patterned(6, 60_000)
}

/// Name of the scenario with a server.
pub(super) const HTTPD: &str = "faults-httpd";

/// Runs the whole once under `plan` and reports what it broke.
pub fn once(options: &Options, plan: &'static FaultPlan) -> Report {
    let mut report = Report::new(options);
    let limits = SimConfig { time_limit_ns: LIMIT_NS, step_limit: 50_000_000, ..options.sim_config() };
    let sim = Simulation::new(limits);
    if options.scenario == HTTPD {
        serve_once(options, plan, &sim, &mut report);
    } else {
        work_once(options, plan, &sim, &mut report);
    }
    report.close(&sim);
    report
}

fn work_once(options: &Options, plan: &'static FaultPlan, sim: &Simulation, report: &mut Report) {
    let wire = sim.segment(options.link.clone());
    let disk = sim.disk(image::fat(), DiskModel { latency_ns: 10_000, ..DiskModel::default() });
    sim.set_power_cut(disk, PowerCut::LoseAll);
    let server = sim.node(NodeSetup { links: vec![wire], ..NodeSetup::named("server") });
    serve(sim, server, with_address("10.0.0.2/24"), netbench::main);
    let setup =
        NodeSetup { cpus: options.cpus, disks: vec![disk], links: vec![wire], ..NodeSetup::named("node") };
    let node = sim.node(setup.clone());
    let promised = Promised::default();
    let its = promised.clone();
    let result = sim.run(node, "main", move || {
        let (_, held) = with_kernel(Faulty::new(node, plan), config(), |kernel| work(kernel, &its));
        held
    });
    check_end(sim, node, result, report);
    sim.crash(node);
    if report.findings.is_empty() {
        check_promises(sim, sim.reboot(node), &promised, report);
    }
}

/// Whether a node gave everything back. `ended`: how often its kernel is still held after its shutdown.
fn check_end(sim: &Simulation, node: SimHost, ended: Result<usize, Failure>, report: &mut Report) {
    match ended {
        Ok(0) => {}
        Ok(held) => report.find(format!("the kernel is still held {held} times after shutdown")),
        Err(failure) => report.find(failure.to_string()),
    }
    let leaks = sim.leaks(node);
    if leaks.any() {
        report.find(format!("leaks: {leaks}"));
    }
}

/// The disk that `options` name, or a FAT volume with the file.
fn disk_to_serve(options: &Options) -> Result<Vec<u8>, String> {
    if let Some(path) = options.disks.first() {
        return std::fs::read(path).map_err(|error| format!("{path}: {error}"));
    }
    let sim = Simulation::new(SimConfig::default());
    let disk = sim.disk(image::fat(), DiskModel::default());
    let node = sim.node(NodeSetup { disks: vec![disk], ..NodeSetup::named("writer") });
    let done = sim.run(node, "main", move || {
        let config = Config { interfaces: Vec::new(), ..config() };
        with_kernel(node, config, |kernel| {
            save(&*kernel.namespace()?, "/data/file", &served_file(), &Promised::default())
        })
    });
    match done {
        Ok((Ok(Some(())), 0)) => Ok(sim.durable_image(disk)),
        other => Err(format!("the volume to serve could not be made: {other:?}")),
    }
}

fn serve_once(options: &Options, plan: &'static FaultPlan, sim: &Simulation, report: &mut Report) {
    let image = match disk_to_serve(options) {
        Ok(image) => image,
        Err(line) => return report.find(line),
    };
    let wire = sim.segment(options.link.clone());
    let disk = sim.disk(image, DiskModel { read_only: true, latency_ns: 10_000, ..DiskModel::default() });
    let setup =
        NodeSetup { cpus: options.cpus, disks: vec![disk], links: vec![wire], ..NodeSetup::named("node") };
    let node = sim.node(setup);
    let client = sim.node(NodeSetup { links: vec![wire], ..NodeSetup::named("client") });
    let (fetched, held) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None)));
    let (stop, its) = (fetched.clone(), held.clone());
    let main = move || {
        let mount = Mount { source: "disk0".into(), target: "/data".into(), kind: None, read_only: true };
        let app = ["httpd", "--port", "80", "--root", "/data"].map(Into::into).into();
        let config = Config { mounts: vec![mount], app, ..with_address("10.0.0.2/24") };
        let (_, held) = with_kernel(Faulty::new(node, plan), config, |kernel| {
            let (ours, asked) = (kernel.clone(), stop.clone());
            let stopper = move || {
                while !asked.load(Relaxed) {
                    node.sleep(10 * MS);
                }
                ours.stop();
            };
            let stopper = node.spawn(ThreadSpec { name: "stopper", cpu: None }, Box::new(stopper));
            httpd::main(kernel);
            stop.store(true, Relaxed);
            stopper.and_then(|stopper| node.join(stopper))
        });
        *its.lock().expect("one thread") = Some(held);
    };
    let server = node.spawn(ThreadSpec { name: "main", cpu: None }, Box::new(main));
    let answers = sim.run(client, "main", move || {
        let (answers, _) = with_kernel(client, with_address("10.0.0.1/24"), |kernel| {
            client.sleep(SECOND);
            let fetch = || {
                let deadline = client.monotonic_ns() + 300 * SECOND;
                block_on_until(
                    client,
                    super::httpd::fetch(kernel, (SERVER, 80).into(), "/file"),
                    Some(deadline),
                )
            };
            [fetch(), fetch()]
        });
        answers
    });
    fetched.store(true, Relaxed);
    let ended = match server {
        Ok(server) => sim.wait_for(node, server),
        Err(_) => Err(Failure::Down),
    };
    let held = held.lock().expect("one thread").take();
    check_end(sim, node, ended.and_then(|()| held.ok_or(Failure::Down)), report);
    let content = served_file();
    match answers {
        Ok(Ok(answers)) => {
            for answer in answers {
                match answer {
                    // Of a server that is deaf from then on nobody can expect an answer.
                    None if plan.injected() > 1 => report.count("unanswered", 1),
                    None => report.find("a request hangs for 300 s"),
                    // What was cut off says so by its length.
                    Some(Ok(Some(body))) if !content.starts_with(&body) => {
                        report.find(format!("{} bytes came that are not the file", body.len()));
                    }
                    Some(Ok(Some(body))) => report.count("whole_files", (body == content).into()),
                    Some(_) => {}
                }
            }
        }
        Ok(Err(error)) => report.find(format!("the client does not start: {error}")),
        Err(failure) => report.find(failure.to_string()),
    }
}

/// Reads back what was promised, on a node where nothing fails.
fn check_promises(sim: &Simulation, node: SimHost, promised: &Promised, report: &mut Report) {
    let promised = promised.lock().expect("one thread").clone();
    let (missing, _) = match sim.run(node, "check", move || {
        with_kernel(node, config(), |kernel| {
            let Some(namespace) = kernel.namespace() else { return vec!["no file system".to_string()] };
            promised.iter().filter_map(|(path, content)| differs(&*namespace, path, content)).collect()
        })
    }) {
        Ok(done) => done,
        Err(failure) => return report.find(format!("while reading back: {failure}")),
    };
    match missing {
        Ok(lines) => lines.into_iter().for_each(|line| report.find(line)),
        Err(error) => report.find(format!("the volume does not mount any more: {error}")),
    }
}

/// How a file differs from what it must hold.
pub(super) fn differs(namespace: &dyn Namespace, path: &str, content: &[u8]) -> Option<String> {
    let mut buf = vec![0; content.len() + 1];
    let mut len = 0;
    let read = namespace.open(path.as_bytes(), OpenOptions::READ).and_then(|file| {
        while len < buf.len() {
            match file.read_at(len as u64, &mut buf[len..])? {
                0 => break,
                n => len += n,
            }
        }
        Ok(())
    });
    match read {
        Err(error) => Some(format!("acknowledged data lost: {path}: {error}")),
        Ok(()) if buf[..len] != *content => {
            let at =
                buf[..len].iter().zip(content).position(|(a, b)| a != b).unwrap_or(len.min(content.len()));
            Some(format!(
                "acknowledged data lost: {path} differs at byte {at} of {} (it has {len})",
                content.len()
            ))
        }
        Ok(()) => None,
    }
}

/// Which runs a sweep makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FaultRange {
    /// The n-th call fails, for every n.
    Each,
    /// All calls fail from the n-th on, for every n.
    EachFrom,
    /// As `Each`, of one call.
    EachOf(Call),
    /// As `EachFrom`, of one call: only flushes fail, only memory is used up.
    EachFromOf(Call),
    /// By chance, with so many in a million, for so many seeds.
    Chance(u32, u64),
}

/// Runs [`once`] for the whole range, every `stride`-th of it beginning with `offset`.
pub fn sweep(options: &Options, range: &FaultRange, stride: u64, offset: u64) -> Report {
    let mut report = Report::new(options);
    let make = |fault| match range {
        FaultRange::EachOf(call) | FaultRange::EachFromOf(call) => FaultPlan::only(*call, fault),
        _ => FaultPlan::new(fault),
    };
    let counting: &'static FaultPlan = Box::leak(Box::new(make(Fault::Never)));
    let first = once(options, counting);
    if options.scenario == HTTPD && first.counters.get("whole_files") != Some(&2) {
        report.find("without any fault: the file did not come");
    }
    report.findings.extend(first.findings.iter().map(|line| format!("without any fault: {line}")));
    let end = if let FaultRange::Chance(_, seeds) = range { *seeds } else { counting.counted() };
    report.count("calls", counting.counted());
    for n in (1 + offset..=end).step_by(stride.max(1) as usize) {
        let fault = match range {
            FaultRange::Each | FaultRange::EachOf(_) => Fault::Nth(n),
            FaultRange::EachFrom | FaultRange::EachFromOf(_) => Fault::From(n),
            FaultRange::Chance(ppm, _) => Fault::Random { seed: options.seed ^ n, ppm: *ppm },
        };
        let plan: &'static FaultPlan = Box::leak(Box::new(make(fault)));
        let run = once(options, plan);
        report.count("runs", 1);
        report.count("injected", plan.injected());
        report.virtual_ns += run.virtual_ns;
        report.hypercalls += run.hypercalls;
        report.trace_hash = report.trace_hash.rotate_left(1) ^ run.trace_hash;
        let what = plan.last().map_or_else(|| "nothing failed".into(), |last| last.to_string());
        report.findings.extend(run.findings.iter().map(|line| format!("{fault:?}, {what}: {line}")));
    }
    report
}

/// The scenario.
pub(super) fn run(options: &Options) -> Report {
    let mut report = Report::new(options);
    for range in [FaultRange::Each, FaultRange::EachFrom, FaultRange::Chance(20_000, 100)] {
        let one = sweep(options, &range, 1, 0);
        report.findings.extend(one.findings);
        report.virtual_ns += one.virtual_ns;
        report.hypercalls += one.hypercalls;
        report.trace_hash = report.trace_hash.rotate_left(1) ^ one.trace_hash;
        for (name, n) in one.counters {
            report.count(&name, n);
        }
    }
    report
}
