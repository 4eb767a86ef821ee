//! The POSIX host keeps every law of the contracts that it has.

use anykernel_userspace::link::{Switch, Wire};
use anykernel_userspace::{ConsoleSink, ConsoleText, HostDisk, HostOwner, HostSetup, Link};
use hypercall::conformance;

mod common;
use common::{NEED_WRITING, judge, params};

fn setup(cpus: u32) -> HostSetup {
    HostSetup {
        cpus,
        memory: 256 << 20,
        params: params(),
        console: ConsoleSink::Null,
        ..HostSetup::default()
    }
}

#[test]
fn core_with_one_cpu() {
    let owner = HostOwner::new(setup(1));
    judge("core", &["threads/parallel"], |report| conformance::run(owner.host(), report));
    assert_eq!(owner.host().memory_used(), 0, "pages are left behind");
}

#[test]
fn core_with_two_pinned_cpus() {
    let owner = HostOwner::new(HostSetup { pin: true, ..setup(2) });
    judge("core", &[], |report| conformance::run(owner.host(), report));
    assert_eq!(owner.host().memory_used(), 0, "pages are left behind");
}

#[test]
fn console() {
    let text = ConsoleText::default();
    let owner = HostOwner::new(HostSetup { console: ConsoleSink::Capture(text.clone()), ..setup(2) });
    judge("console", &[], |report| {
        conformance::run_console(owner.host(), &mut || text.text().into_bytes(), report);
    });
}

#[test]
fn disks() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4 << 20).unwrap();
    let disks = vec![HostDisk::open(file.path(), true).unwrap()];
    let owner = HostOwner::new(HostSetup { disks, ..setup(2) });
    judge("writable", &["block/read-only"], |report| conformance::run_block(owner.host(), 0, report));
    drop(owner);

    let disks = vec![HostDisk::open(file.path(), false).unwrap()];
    let owner = HostOwner::new(HostSetup { disks, ..setup(2) });
    judge("read-only", &NEED_WRITING, |report| conformance::run_block(owner.host(), 0, report));
}

#[test]
fn a_wire() {
    for mtu in [1500, u16::MAX] {
        let (a, b) = Wire::pair(mtu);
        let owner = HostOwner::new(HostSetup { links: vec![Link::Wire(a), Link::Wire(b)], ..setup(2) });
        judge("wire", &[], |report| conformance::run_link(owner.host(), 0, Some(1), report));
    }
}

#[test]
fn a_switch() {
    let switch = Switch::new(1500);
    let links = (0..3).map(|_| Link::Port(switch.port())).collect();
    let owner = HostOwner::new(HostSetup { links, ..setup(2) });
    // A switch never makes its senders wait, so room cannot come back.
    judge("switch", &["link/room-comes-back"], |report| {
        conformance::run_link(owner.host(), 0, Some(1), report)
    });
}
