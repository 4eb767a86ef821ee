//! TAP links keep the contract: two of them, joined by a bridge, in a network namespace of their own.

use anykernel_userspace::link::Tap;
use anykernel_userspace::{HostOwner, HostSetup, Link};
use hypercall::conformance::{self, Outcome};
use std::process::Command;

/// Interfaces must be up before the bridge forwards; made before they are attached to, so that names are sure.
const SET_UP: &str = "set -e
for tap in ak0 ak1; do ip tuntap add $tap mode tap; done
ip link add br0 type bridge forward_delay 0
for tap in ak0 ak1; do ip link set $tap master br0 up; done
ip link set br0 up
exec \"$0\" --exact inside_the_namespace --ignored --nocapture";

#[test]
fn taps_joined_by_a_bridge() {
    let output = Command::new("unshare")
        .args(["--map-root-user", "--net", "--", "sh", "-c", SET_UP])
        .arg(std::env::current_exe().unwrap())
        .output()
        .expect("unshare(1) of util-linux is needed");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "taps_joined_by_a_bridge runs it in a namespace"]
fn inside_the_namespace() {
    let tap = |name| Link::Tap(Tap::open_interface(name).unwrap());
    let owner =
        HostOwner::new(HostSetup { cpus: 2, links: vec![tap("ak0"), tap("ak1")], ..HostSetup::default() });
    // An interface is taken by one process only, and only by name.
    assert!(Tap::open_interface("ak0").unwrap_err().line.contains("in use"));
    assert!(Tap::open_interface("lo").unwrap_err().line.contains("not a TAP"));
    std::thread::sleep(std::time::Duration::from_millis(200));
    let mut bad = Vec::new();
    conformance::run_link(owner.host(), 0, Some(1), &mut |report| {
        // The kernel drops what its queue has no room for.
        let may = matches!(report.outcome, Outcome::NotRun(_)) && report.name == "link/room-comes-back";
        if report.outcome != Outcome::Pass && !may {
            bad.push(report.to_string());
        }
    });
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}
