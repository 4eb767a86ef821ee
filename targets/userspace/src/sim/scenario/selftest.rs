//! The application `selftest` on a node, and `httpd` on another with the same disks, whose files a third one fetches and
//! compares: the simulated host in a row with the other targets.

use super::httpd::fetch;
use super::{Options, Report, Verdict, with_address, with_kernel};
use crate::sim::{DiskId, DiskModel, NodeSetup, SECOND, SegmentId, SimConfig, SimHost, Simulation};
use crate::spec::DiskSpec;
use anykernel::Kernel;
use anykernel::config::{Config, Mount};
use anykernel::task::block_on_until;
use hypercall::Clock;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::fmt::Write;

const GATEWAY: &str = "10.8.0.1";
const SERVER: [u8; 4] = [10, 8, 0, 3];
/// As many as `cargo xtask matrix` fetches elsewhere.
const FETCHES: usize = 1000;
/// The list of sums, as sha256sum(1) writes it, is fetched first.
const LIST: &str = "SHA256SUMS";

/// One verdict, as the application prints it.
#[derive(Deserialize)]
struct Line {
    check: String,
    status: String,
    reason: String,
}

fn setup(name: &str, options: &Options, disks: Vec<DiskId>, wire: SegmentId) -> NodeSetup {
    let mut setup = NodeSetup { cpus: options.cpus, disks, links: vec![wire], ..NodeSetup::named(name) };
    setup.params.insert("config".into(), "{}".into());
    setup
}

fn config(address: &str, disks: &[DiskSpec], app: &[&str]) -> Config {
    let mount = |(number, disk): (usize, &DiskSpec)| Mount {
        source: format!("disk{number}"),
        target: if number == 0 { "/".into() } else { "/fat".into() },
        kind: None,
        read_only: !disk.writable,
    };
    let mut config = with_address(&format!("{address}/24"));
    config.interfaces[0].gateway = Some(GATEWAY.into());
    config.mounts = disks.iter().enumerate().map(mount).collect();
    config.app = app.iter().map(|word| (*word).into()).collect();
    config
}

/// A path in a URL (RFC 3986, 2.1).
fn encoded(path: &str) -> String {
    let mut url = String::from("/");
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'.' | b'_' | b'~' => {
                url.push(byte.into())
            }
            _ => write!(url, "%{byte:02X}").expect("a string takes everything"),
        }
    }
    url
}

/// Fetches the list and what it lists, evenly over the whole of it. Says how many files were right.
fn fetch_all(host: SimHost, kernel: &Kernel<SimHost>) -> Result<u64, String> {
    let get = |path: &str| {
        let deadline = Some(host.monotonic_ns() + 300 * SECOND);
        match block_on_until(host, fetch(kernel, (SERVER, 80).into(), &encoded(path)), deadline) {
            Some(Ok(Some(body))) => Ok(body),
            Some(Ok(None)) => Err(format!("{path}: no answer of 200")),
            Some(Err(error)) => Err(format!("{path}: {error}")),
            None => Err(format!("{path}: no answer within 300 s")),
        }
    };
    let list = String::from_utf8(get(LIST)?).map_err(|_| format!("{LIST} is no text"))?;
    let files: Vec<_> = list.lines().filter_map(|line| line.split_once("  ")).collect();
    if files.is_empty() {
        return Err(format!("{LIST} lists nothing"));
    }
    let count = files.len().min(FETCHES);
    for (sum, path) in (0..count).map(|n| files[n * files.len() / count]) {
        let got = Sha256::digest(get(path)?);
        let got: String = got.iter().map(|byte| format!("{byte:02x}")).collect();
        if got != sum {
            return Err(format!("{path} has the sum {got}, it should have {sum}"));
        }
    }
    Ok(count as u64)
}

fn result(check: &str, result: Result<(), String>) -> Verdict {
    let status = if result.is_ok() { "pass" } else { "fail" };
    Verdict { check: check.into(), status: status.into(), reason: result.err().unwrap_or_default() }
}

/// Runs `body` as the life of a node, from boot to shutdown.
fn live<T: Send + 'static>(
    sim: &Simulation,
    host: SimHost,
    config: Config,
    body: impl FnOnce(&std::sync::Arc<Kernel<SimHost>>) -> T + Send + 'static,
) -> Result<T, String> {
    match sim.run(host, "main", move || with_kernel(host, config, body)) {
        Ok((Ok(value), 0)) => Ok(value),
        Ok((Ok(_), held)) => Err(format!("the kernel is still held {held} times after shutdown")),
        Ok((Err(error), _)) => Err(error.to_string()),
        Err(failure) => Err(failure.to_string()),
    }
}

pub(super) fn run(options: &Options) -> Report {
    let mut report = Report::new(options);
    if let Err(line) = try_run(options, &mut report) {
        report.find(line);
    }
    report
}

fn try_run(options: &Options, report: &mut Report) -> Result<(), String> {
    let disks: Vec<DiskSpec> = options.disks.iter().map(|disk| disk.parse()).collect::<Result<_, _>>()?;
    let sim = Simulation::new(SimConfig { time_limit_ns: 100_000 * SECOND, ..options.sim_config() });
    let wire = sim.segment(options.link.clone());
    let mut ids = Vec::new();
    for disk in &disks {
        let image = std::fs::read(&disk.path).map_err(|error| format!("{}: {error}", disk.path.display()))?;
        if !image.len().is_multiple_of(512) {
            return Err(format!("{}: not a whole number of sectors of 512 bytes", disk.path.display()));
        }
        ids.push(sim.disk(image, DiskModel { read_only: !disk.writable, ..DiskModel::default() }));
    }
    let gateway = sim.node(setup("gateway", options, Vec::new(), wire));
    super::serve(&sim, gateway, with_address(&format!("{GATEWAY}/24")), netbench::main);

    // What it checks depends on what there is to check.
    let groups = ["selftest", "conformance", "network", "tmpfs", "ext4", "fat"];
    let node = sim.node(setup("node", options, ids.clone(), wire));
    let ended =
        live(&sim, node, config("10.8.0.2", &disks, &groups[..4 + disks.len().min(2)]), selftest::main);
    let console = sim.console(node);
    let lines = console.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok());
    report.verdicts.extend(lines.map(|Line { check, status, reason }| Verdict { check, status, reason }));
    let done = console.lines().any(|line| line.starts_with("{\"selftest\":\"done\""));
    let ends = match ended {
        Ok(_) if !done => Err("it ended before it was done".into()),
        Ok(_) if sim.leaks(node).any() => Err(format!("leaks: {}", sim.leaks(node))),
        Ok(_) => Ok(()),
        Err(line) => Err(line),
    };
    report.verdicts.push(result("selftest/ends", ends));

    if !disks.is_empty() {
        let server = sim.node(setup("server", options, ids[..1].to_vec(), wire));
        let app = ["httpd", "--port", "80", "--root", "/"];
        super::serve(&sim, server, config("10.8.0.3", &disks[..1], &app), httpd::main);
        let client = sim.node(setup("client", options, Vec::new(), wire));
        let fetched = live(&sim, client, config("10.8.0.4", &[], &[]), move |kernel| {
            client.sleep(SECOND);
            fetch_all(client, kernel)
        });
        let fetched = fetched.and_then(|fetched| fetched);
        report.count("files_fetched", fetched.clone().unwrap_or(0));
        report.verdicts.push(result("httpd/sha256", fetched.map(drop)));
    }
    for (disk, id) in disks.iter().zip(&ids).filter(|(disk, _)| disk.writable) {
        std::fs::write(&disk.path, sim.durable_image(*id))
            .map_err(|error| format!("{}: {error}", disk.path.display()))?;
    }
    let bad = report.verdicts.iter().filter(|verdict| verdict.status != "pass");
    let bad: Vec<_> = bad.map(|one| format!("{}: {} {}", one.check, one.status, one.reason)).collect();
    report.findings.extend(bad);
    report.count("checks", report.verdicts.len() as u64);
    report.close(&sim);
    Ok(())
}
