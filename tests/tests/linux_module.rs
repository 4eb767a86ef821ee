//! Boots Debian kernels in QEMU and loads the module: the contract's suite inside, bad parameters, a panic, unloading under
//! load, and the file server through the user's own command. Needs `qemu-system-x86_64`, `mkfs.ext4`, curl and Debian's
//! packages of the kernels (fetched without privileges when they are not installed).

use anykernel_tests::module::{self, PATIENCE, of};
use anykernel_tests::{Running, anykernel, free_port};
use anykernel_userspace::{DiskSpec, RunSpec, qemu::linux_module};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const SERIES: [&str; 2] = ["6.1", "6.12"];

/// One boot at a time: the machine's CPUs are few, and clocks in guests are real.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Functions of every script, beside those of [`module::run_script`].
const PRELUDE: &str = r#"
log() { dmesg | sed -n 's/^.*\] anykernel: /log /p' >/dev/ttyS1; }
unload() { rmmod anykernel && say "unloaded" || say "not unloaded"; }
"#;

struct Guest {
    disks: Vec<DiskSpec>,
    series: &'static str,
}

impl Guest {
    fn new(series: &'static str) -> Self {
        Self { disks: Vec::new(), series }
    }

    fn disk(mut self, path: &Path, writable: bool) -> Self {
        self.disks.push(DiskSpec { path: path.into(), writable });
        self
    }

    /// Runs the script and returns what it said, line by line.
    fn run(self, script: &str) -> Vec<String> {
        let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let spec = RunSpec { disks: self.disks, cpus: 2, ..RunSpec::new(Default::default()) };
        module::run_script(&spec, self.series, &format!("{PRELUDE}\n{script}")).0
    }
}

fn file(dir: &Path, name: &str, content: &[u8]) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, content).unwrap();
    path
}

/// Bytes without a pattern (SplitMix64).
fn noise(len: usize, mut seed: u64) -> Vec<u8> {
    let words = std::iter::repeat_with(|| {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    });
    words.flat_map(u64::to_le_bytes).take(len).collect()
}

/// An ext4 image with Debian's default features, and the checksums of its files.
fn image(dir: &Path, files: usize) -> (PathBuf, BTreeMap<String, String>) {
    let tree = dir.join("tree");
    let mut sums = BTreeMap::new();
    for number in 0..files {
        let name = format!("d{}/file-{number}.txt", number % 17);
        let size = [0, 1, 4095, 4096, 70_000, 1_500_000][number % 6] + number;
        let content = noise(size, number as u64);
        fs::create_dir_all(tree.join(&name).parent().unwrap()).unwrap();
        fs::write(tree.join(&name), &content).unwrap();
        sums.insert(name, format!("{:x}", Sha256::digest(&content)));
    }
    let image = dir.join("files.ext4");
    fs::File::create(&image).unwrap().set_len(200 << 20).unwrap();
    let made = Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).arg(&tree).arg(&image).status();
    assert!(made.expect("mkfs.ext4 is installed").success());
    (image, sums)
}

fn conformance(series: &'static str) {
    let dir = tempfile::tempdir().unwrap();
    let writable = file(dir.path(), "writable", &vec![0; 8 << 20]);
    let read_only = file(dir.path(), "read-only", &noise(8 << 20, 1));
    let script = r#"
dd if=/dev/zero of=/file bs=1M count=4 2>/dev/null
suite() {
	insmod /lib/anykernel.ko links=2 disk=/dev/vda:rw,/dev/vdb,/file:rw config="{\"app\":[\"conformance\",$1]}" || say "insmod failed"
	brctl addif br0 ak0 2>/dev/null
	brctl addif br0 ak1 2>/dev/null
	ip link set ak0 up
	ip link set ak1 up
	status
	unload
}
brctl addbr br0
echo 0 >/sys/class/net/br0/bridge/forward_delay
ip link set br0 up
suite '"core"'
suite '"block:0","block:1","block:2"'
suite '"link"'
log
"#;
    let said = Guest::new(series).disk(&writable, true).disk(&read_only, false).run(script);
    assert_eq!(of(&said, "status"), ["ended 0"; 3], "{said:#?}");
    let verdicts: Vec<Value> =
        of(&said, "log").iter().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let passed: Vec<&str> = verdicts
        .iter()
        .filter(|verdict| verdict["status"] == "pass")
        .filter_map(|verdict| verdict["check"].as_str()?.strip_prefix("conformance/"))
        .collect();
    for (contract, checks) in hypercall::conformance::SUITES {
        if ["core", "block", "link"].contains(contract) {
            for check in *checks {
                assert!(passed.contains(check), "{check} did not pass on Linux {series}: {said:#?}");
            }
        }
    }
    assert!(!said.iter().any(|line| line.contains("left behind")), "{said:#?}");
}

#[test]
fn conformance_in_6_1() {
    conformance("6.1");
}

#[test]
fn conformance_in_6_12() {
    conformance("6.12");
}

/// A guest that dies must say so: a test that only sees silence helps nobody.
#[test]
fn a_kernel_that_panics_has_last_words() {
    let spec = RunSpec::new(Default::default());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let script = "echo before >/dev/ttyS1; echo c >/proc/sysrq-trigger; echo after >/dev/ttyS1; end 0";
    let said = linux_module::run_script(&spec, "6.12", script, PATIENCE).unwrap();
    assert_eq!(said.lines.trim(), "before");
    assert!(said.last_words().contains("Kernel panic"), "{said:#?}");
}

/// Linux alone, which turns a static key on and off while the other CPU runs through it: QEMU before 8.1 with a thread per CPU
/// does not survive that for more than a few seconds, and that is how `conformance_in_6_12` stopped now and then.
#[test]
fn linux_may_rewrite_its_code_on_two_cpus() {
    let script = r#"
key=/proc/sys/kernel/sched_schedstats
yes | cat >/dev/null &
while :; do :; done &
n=0
while [ $n -lt 150 ]; do n=$((n + 1)); echo 1 >$key; echo 0 >$key; done
say "toggled $n"
"#;
    assert_eq!(of(&Guest::new("6.12").run(script), "toggled"), ["150"]);
}

#[test]
fn refuses_what_makes_no_sense() {
    let script = r#"
try() { insmod /lib/anykernel.ko "$@" 2>/dev/null; say "insmod $?"; [ -d /sys/module/anykernel ] && say "loaded"; log; dmesg -c >/dev/null; }
try config='{"hostnam":"x"}'
try config='{"app":["nope"]}'
try config='{'
try disk=/nowhere
try disk=/proc
try links=99
try config_file=/nowhere
try config='{}' config_file=/modules
try disk=/modules config='{"mounts":[{"source":"disk0","target":"/"}]}'
try
unload
"#;
    let said = Guest::new("6.1").run(script);
    let results = of(&said, "insmod");
    assert_eq!(results.len(), 10, "{said:#?}");
    assert!(results[..9].iter().all(|result| *result != "0"), "{said:#?}");
    assert_eq!(results[9], "0", "after all that it loads: {said:#?}");
    assert_eq!(said.iter().filter(|line| *line == "loaded").count(), 1, "{said:#?}");
    let log = of(&said, "log");
    for expected in
        ["hostname", "httpd", "EOF", "/nowhere", "/proc", "links must be", "config_file /nowhere", "not both"]
    {
        assert!(log.iter().any(|line| line.contains(expected)), "nothing said about {expected}: {said:#?}");
    }
    assert!(!log.iter().any(|line| line.contains("left behind")), "{said:#?}");
}

#[test]
fn a_panic_ends_the_domain_and_not_the_kernel() {
    let script = r#"
insmod /lib/anykernel.ko config='{"app":["crash"]}'
status
sleep 1
ps | grep -E '\[(ak-|crash)' | sed 's/^/left /' >/dev/ttyS1
unload
insmod /lib/anykernel.ko && say "loaded again"
unload
log
"#;
    for series in SERIES {
        let said = Guest::new(series).run(script);
        assert_eq!(of(&said, "status"), ["dead 101"], "{said:#?}");
        assert_eq!(said.iter().filter(|line| *line == "unloaded").count(), 2, "{said:#?}");
        assert!(said.contains(&"loaded again".into()), "{said:#?}");
        assert!(of(&said, "left").is_empty(), "{said:#?}");
        assert!(
            of(&said, "log").iter().any(|line| line.contains("panic at") && line.contains("as asked for"))
        );
    }
}

/// Loads, has several clients fetch through Linux's own TCP and `ak0`, and unloads in the middle of it.
fn unload_under_load(series: &'static str, times: usize) {
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = image(dir.path(), 60);
    let script = r#"
config='{"log":"warn","app":["httpd"],"mounts":[{"source":"disk0","target":"/","read_only":true}],"interfaces":[{"ipv4":"10.9.0.2/24","ipv6":"none"}]}'
client() {
	while [ -e /go ]; do
		printf "GET /$1 HTTP/1.0\r\n\r\n" | timeout 2 nc -w 1 10.9.0.2 80 2>/dev/null | wc -c >>/bytes
	done
}
free() { echo 3 >/proc/sys/vm/drop_caches; sleep 0.5; say "free $(awk '/MemFree/ {print $2}' /proc/meminfo)"; }
n=0
while [ $n -lt TIMES ]; do
	n=$((n + 1))
	insmod /lib/anykernel.ko config="$config" disk=/dev/vda || say "insmod failed"
	ip addr add 10.9.0.1/24 dev ak0
	ip link set ak0 up
	: >/bytes
	: >/go
	clients=
	for path in d5/file-5.txt d11/file-11.txt d6/file-23.txt d3/file-3.txt; do
		client $path 2>/dev/null &
		clients="$clients $!"
	done
	sleep 0.$((4 + n % 6))
	rmmod anykernel || say "rmmod failed"
	rm /go
	[ -e /sys/class/net/ak0 ] && say "leftover ak0"
	[ -d /sys/module/anykernel ] && say "leftover module"
	ps | grep -E '\[(ak-|httpd|net[0-9]|disk)' | sed 's/^/leftover /' >/dev/ttyS1
	killall nc 2>/dev/null
	wait $clients
	say "served $(awk '{s += $1} END {print s + 0}' /bytes)"
	# The first load is the one that taints.
	[ $n = 1 ] && dmesg -c >/dev/null
	[ $n = 5 ] && free
done
free
dmesg | sed 's/^/kernel /' >/dev/ttyS1
"#;
    let script = script.replace("TIMES", &times.to_string());
    let said = Guest::new(series).disk(&image, false).run(&script);
    let served: Vec<u64> = of(&said, "served").iter().map(|bytes| bytes.parse().unwrap()).collect();
    assert_eq!(served.len(), times, "{said:#?}");
    assert!(!said.iter().any(|line| line.contains("failed")), "{said:#?}");
    assert!(of(&said, "leftover").is_empty(), "{said:#?}");
    // A busy machine may be too slow for some rounds, but the load must have been one.
    let busy = served.iter().filter(|bytes| **bytes > 0).count();
    assert!(busy * 2 > times, "only {busy} of {times} rounds had load: {served:?}");
    let ours = |line: &&&str| {
        // The test itself, and what Linux says of a slow machine.
        !["drop_caches", "interrupt took", "clocksource", "tsc:", "sched_clock"]
            .iter()
            .any(|word| line.contains(word))
    };
    let kernel = of(&said, "kernel");
    assert_eq!(kernel.iter().filter(ours).count(), 0, "dmesg is not clean: {kernel:#?}");
    let free: Vec<i64> = of(&said, "free").iter().map(|kib| kib.parse().unwrap()).collect();
    assert!(free[0] - free[1] < 8 << 10, "memory went away, in KiB: {free:?}");
}

#[test]
fn unloads_under_load_fifty_times_from_6_1() {
    unload_under_load("6.1", 50);
}

#[test]
fn unloads_under_load_from_6_12() {
    unload_under_load("6.12", 20);
}

#[test]
fn httpd_serves_every_byte_through_the_module() {
    let dir = tempfile::tempdir().unwrap();
    let (image, sums) = image(dir.path(), 120);
    let before = Sha256::digest(fs::read(&image).unwrap());
    for series in SERIES {
        let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let port = free_port();
        let server = Command::new(anykernel())
            .args(["run", "httpd", "--on", "linux-module", "--cpus", "2", "--disk"])
            .arg(&image)
            .args(["--publish", &format!("{port}:80")])
            .env("ANYKERNEL_LINUX", series)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut server = Running(server);
        let start = Instant::now();
        while !fetch(port, "", &dir.path().join("index")) {
            assert!(server.0.try_wait().unwrap().is_none(), "the run ended");
            assert!(start.elapsed() < Duration::from_secs(300), "nothing answers on Linux {series}");
            std::thread::sleep(Duration::from_millis(300));
        }
        let list: String = sums
            .keys()
            .enumerate()
            .map(|(i, name)| {
                format!("url=http://127.0.0.1:{port}/{name}\noutput={}/{i}\n", dir.path().display())
            })
            .collect();
        let list = file(dir.path(), "list", list.as_bytes());
        let curl = Command::new("curl")
            .args([
                "-sS",
                "--no-progress-meter",
                "--fail",
                "--parallel",
                "--parallel-max",
                "16",
                "--max-time",
                "300",
                "-K",
            ])
            .arg(list)
            .status();
        assert!(curl.unwrap().success());
        for (i, (name, sum)) in sums.iter().enumerate() {
            // curl makes no file of an empty answer.
            let content = fs::read(dir.path().join(i.to_string())).unwrap_or_default();
            assert_eq!(format!("{:x}", Sha256::digest(&content)), *sum, "{name} on Linux {series}");
            let _ = fs::remove_file(dir.path().join(i.to_string()));
        }
        server.interrupt();
        assert!(server.end(PATIENCE).success(), "Ctrl-C is a good end");
    }
    assert_eq!(Sha256::digest(fs::read(&image).unwrap()), before, "the image was written to");
}

fn fetch(port: u16, path: &str, to: &Path) -> bool {
    Command::new("curl")
        .args(["-s", "--fail", "--max-time", "5", "-o"])
        .arg(to)
        .arg(format!("http://127.0.0.1:{port}/{path}"))
        .status()
        .is_ok_and(|status| status.success())
}
